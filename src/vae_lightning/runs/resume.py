"""Which run a command is about: a new one, one to go on with, or one that is finished already.

    python train.py resume=RUN_DIR                          # with the configuration that the run has
    python train.py resume=RUN_DIR trainer.max_epochs=60    # and longer
    python train.py model.latent_dim=5 autoresume=true      # the run of this very configuration, if there is one
    python train.py repeat=RUN_DIR                          # its configuration once more, in a directory of its own

A run is known by its configuration, not by its directory's name or a job's number.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_lightning.config import ConfigError, flatten
from vae_lightning.files import FileError, read_json
from vae_lightning.runs.directory import RunError, is_held
from vae_lightning.runs.environment import describe_code
from vae_lightning.runs.loading import load_config, read_config

log = logging.getLogger(__name__)

# What a run that goes on may be told anew: how long, and what changes no number.
CHANGEABLE = (
    "trainer.max_epochs",
    "trainer.checkpoint_every",
    "trainer.accelerator",
    "trainer.fast_loop",
    "trainer.enable_progress_bar",
    "data.root",
    "test",
)
NOT_OF_THE_RUN = ("resume", "autoresume", "repeat", "trust", "timeout", "hparams_search")


PARTS = ("model", "data", "trainer")  # what a configuration names classes in


@dataclass
class Assignment:
    """What to train, where, and whether there is something to go on from, or nothing left to do."""

    config: dict[str, Any]
    directory: Path
    resume: bool = False
    finished: bool = False


def assign(config: dict[str, Any], directory: Path, given: Iterable[str], searched: Iterable[Path] = ()) -> Assignment:
    """The run that a command's `config` is about, where `directory` is for a new one.

    `given` are the keys that the command line changed, and `searched` the directories whose runs autoresume looks at.
    Raises RunError or ConfigError for a run that cannot be gone on with, or not in this way.
    """
    options = {key: config.get(key) for key in NOT_OF_THE_RUN}
    config = run_config(config)
    for key in ("resume", "repeat"):
        options[key] = as_path(options[key], key)
    if options["repeat"] and (options["resume"] or options["autoresume"]):
        raise ConfigError("repeat is a run of its own: without resume and autoresume")
    if options["repeat"]:
        former = options["repeat"]
        saved = _changed(load_config(former, options["trust"] or (), PARTS), former, config, given)
        log.info("repeating %s%s", former, _what_differs(former))
        return Assignment(saved, directory)
    if options["resume"]:
        return _resumed(options["resume"].resolve(), config, options["trust"] or (), given)
    found = find_run(config, [directory, *searched] if options["autoresume"] else [directory])
    if found is None:
        if (directory / "config.yaml").exists():
            key, theirs, ours = difference(read_config(directory), config)
            raise RunError(
                f"{directory}: already holds a run, of another configuration ({key}={theirs}, not {ours}); "
                "choose another hydra.run.dir"
            )
        return Assignment(config, directory)
    if is_finished(found):
        return Assignment(config, found, finished=True)
    if not options["autoresume"]:
        raise RunError(f"{found}: holds a run that is not finished; go on with resume={found}, or autoresume=true")
    check_links(found)
    return Assignment(config, found, resume=True)


def run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A command's configuration without what says which run it is about."""
    return {key: value for key, value in config.items() if key not in NOT_OF_THE_RUN}


def as_path(value: Any, key: str) -> Path | None:
    """A run directory as the command line gives it; one of digits arrives as a number. Raises ConfigError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise ConfigError(f"{key}={value}: should be the path of a run directory")
    return Path(str(value))


def check_links(directory: Path) -> None:
    """Raise RunError for a run directory in which something is a link: what is written there would go elsewhere."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_symlink():
            raise RunError(f"{path}: is a link, and a run that goes on would write through it")


def _resumed(directory: Path, config: dict[str, Any], trust: Iterable[str], given: Iterable[str]) -> Assignment:
    """The run at `directory`, with what the command line may change of it."""
    former = load_config(directory, trust, PARTS)
    check_links(directory)
    saved = _changed(former, directory, config, given)
    longer = saved["trainer"].get("max_epochs") != former["trainer"].get("max_epochs")
    untested = saved["test"] and not former.get("test", True)
    return Assignment(saved, directory, resume=True, finished=is_finished(directory) and not longer and not untested)


def _changed(former: dict[str, Any], directory: Path, config: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The configuration of the run at `directory` with what the command line may change of it. Raises ConfigError."""
    if not isinstance(former.get("trainer"), dict) or not isinstance(former.get("figures"), dict):
        raise RunError(f"{directory / 'config.yaml'}: is not the configuration of a run: trainer or figures is missing")
    saved = copy.deepcopy(former)
    saved.setdefault("test", True)  # of versions that always did
    asked, theirs = flatten(config), flatten(saved)
    for key in given:
        dotted = key.replace("/", ".")
        changed = [k for k in asked.keys() | theirs.keys() if k == dotted or k.startswith(f"{dotted}.")]
        different = [k for k in sorted(changed) if asked.get(k) != theirs.get(k)]
        if key.partition(".")[0] in NOT_OF_THE_RUN or (changed and not different):
            continue
        if key not in CHANGEABLE:
            what = f"{different[0]} is {theirs.get(different[0])} in {directory}" if different else "not of the run"
            raise ConfigError(f"{key}: {what}; a run that goes on, or is repeated, takes only {', '.join(CHANGEABLE)}")
        set_key(saved, key, asked[key])
    return saved


def _what_differs(directory: Path) -> str:
    """Of versions and commit, what is not as it was when the run at `directory` was trained, for a line in the log."""
    try:
        then = read_json(directory / "environment.json")
    except FileError:
        return ""
    now = describe_code()
    pairs = [("commit", then.get("git_commit"), now["git_commit"])]
    pairs += [
        (package, flatten(then).get(f"versions.{package}"), version) for package, version in now["versions"].items()
    ]
    words = [f"{name} {old} then, {new} now" for name, old, new in pairs if old and old != new]
    return f" ({'; '.join(words)})" if words else ""


def set_key(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a value by its dotted key."""
    *path, last = dotted.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def is_finished(directory: Path) -> bool:
    try:
        return bool(read_json(directory / "metrics.json"))
    except FileError:
        return False


def find_run(config: Mapping[str, Any], directories: Iterable[Path]) -> Path | None:
    """The run of `config` among `directories`: a finished one, or else one that no other process trains now."""
    found: list[Path] = []
    for directory in dict.fromkeys(directories):
        try:
            if (directory / "config.yaml").is_file() and read_config(directory) == config:
                found.append(directory)
        except RunError as problem:
            log.warning("%s", problem)
    free = [directory for directory in found if not is_held(directory)]
    finished = [directory for directory in found if is_finished(directory)]
    return next(iter(finished or free or found), None)


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first key in which two configurations differ, and both values."""
    left, right = flatten(dict(theirs)), flatten(dict(ours))
    keys = [key for key in [*right, *left] if key not in left or key not in right or left[key] != right[key]]
    key = keys[0] if keys else "a dictionary that is empty in one of them"
    return key, left.get(key, "missing"), right.get(key, "missing")
