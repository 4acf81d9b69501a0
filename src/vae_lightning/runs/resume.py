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
from vae_lightning.files import FileError
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.environment import describe_code
from vae_lightning.runs.loading import trusted_config

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
COMMAND_KEYS = ("resume", "autoresume", "repeat", "trust", "timeout", "hparams_search")


PARTS = ("model", "data", "trainer")  # what a configuration names classes in


@dataclass
class RunPlan:
    """What to train and where; whether the directory's run is resumed, or is finished already."""

    config: dict[str, Any]
    run: RunDirectory
    resume: bool = False
    finished: bool = False


def plan_run(config: dict[str, Any], directory: Path, given: Iterable[str], searched: Iterable[Path] = ()) -> RunPlan:
    """The run that a command's `config` is about, where `directory` is for a new one.

    `given` are the keys that the command line changed, and `searched` the directories whose runs autoresume looks at.
    Raises RunError or ConfigError for a run that cannot be gone on with, or not in this way.
    """
    options = {key: config.get(key) for key in COMMAND_KEYS}
    config = run_config(config)
    for key in ("resume", "repeat"):
        options[key] = as_path(options[key], key)
    if options["repeat"] and (options["resume"] or options["autoresume"]):
        raise ConfigError("repeat is a run of its own: without resume and autoresume")
    if options["repeat"]:
        former = RunDirectory(options["repeat"])
        saved = _changed(trusted_config(former, options["trust"] or (), PARTS), former, config, given)
        log.info("repeating %s%s", former, _what_differs(former))
        return RunPlan(saved, RunDirectory(directory))
    if options["resume"]:
        return _resumed(RunDirectory(options["resume"].resolve()), config, options["trust"] or (), given)
    found = find_run(config, [directory, *searched] if options["autoresume"] else [directory])
    if found is None:
        run = RunDirectory(directory)
        if run.state != "new":
            key, theirs, ours = first_difference(run.read_config(), config)
            raise RunError(
                f"{run}: already holds a run, of another configuration ({key}={theirs}, not {ours}); "
                "choose another hydra.run.dir"
            )
        return RunPlan(config, run)
    if found.state == "finished":
        return RunPlan(config, found, finished=True)
    if not options["autoresume"]:
        raise RunError(f"{found}: holds a run that is not finished; go on with resume={found}, or autoresume=true")
    check_links(found)
    return RunPlan(config, found, resume=True)


def run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A command's configuration without what says which run it is about."""
    return {key: value for key, value in config.items() if key not in COMMAND_KEYS}


def as_path(value: Any, key: str) -> Path | None:
    """A run directory as the command line gives it; one of digits arrives as a number. Raises ConfigError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise ConfigError(f"{key}={value}: should be the path of a run directory")
    return Path(str(value))


def check_links(run: RunDirectory) -> None:
    """Raise RunError for a run directory in which something is a link: what is written there would go elsewhere."""
    for path in run.path.iterdir() if run.path.is_dir() else ():
        if path.is_symlink():
            raise RunError(f"{path}: is a link, and a run that goes on would write through it")


def _resumed(run: RunDirectory, config: dict[str, Any], trust: Iterable[str], given: Iterable[str]) -> RunPlan:
    """The plan to resume `run`, with what the command line may change of it."""
    former = trusted_config(run, trust, PARTS)
    check_links(run)
    saved = _changed(former, run, config, given)
    longer = saved["trainer"].get("max_epochs") != former["trainer"].get("max_epochs")
    untested = saved["test"] and not former.get("test", True)
    finished = run.state == "finished" and not longer and not untested
    return RunPlan(saved, run, resume=True, finished=finished)


def _changed(former: dict[str, Any], run: RunDirectory, config: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The configuration of `run` with what the command line may change of it. Raises ConfigError."""
    if not isinstance(former.get("trainer"), dict) or not isinstance(former.get("figures"), dict):
        raise RunError(f"{run.config_file}: is not the configuration of a run: trainer or figures is missing")
    saved = copy.deepcopy(former)
    saved.setdefault("test", True)  # of versions that always did
    asked, theirs = flatten(config), flatten(saved)
    for key in given:
        dotted = key.replace("/", ".")
        changed = [k for k in asked.keys() | theirs.keys() if k == dotted or k.startswith(f"{dotted}.")]
        different = [k for k in sorted(changed) if asked.get(k) != theirs.get(k)]
        if key.partition(".")[0] in COMMAND_KEYS or (changed and not different):
            continue
        if key not in CHANGEABLE:
            what = f"{different[0]} is {theirs.get(different[0])} in {run}" if different else "not of the run"
            raise ConfigError(f"{key}: {what}; a run that goes on, or is repeated, takes only {', '.join(CHANGEABLE)}")
        set_key(saved, key, asked[key])
    return saved


def _what_differs(run: RunDirectory) -> str:
    """The versions and the commit that have changed since `run` was trained, for a line in the log."""
    try:
        then = run.read_environment()
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


def find_run(config: Mapping[str, Any], directories: Iterable[Path]) -> RunDirectory | None:
    """The run of `config` among `directories`: a finished one, or else one that no other process trains now."""
    found: list[RunDirectory] = []
    for run in map(RunDirectory, dict.fromkeys(directories)):
        try:
            if run.config_file.is_file() and run.read_config() == config:
                found.append(run)
        except RunError as problem:
            log.warning("%s", problem)
    free = [run for run in found if not run.is_locked()]
    finished = [run for run in found if run.state == "finished"]
    return next(iter(finished or free or found), None)


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first key in which two configurations differ, and both values."""
    left, right = flatten(dict(theirs)), flatten(dict(ours))
    keys = [key for key in [*right, *left] if key not in left or key not in right or left[key] != right[key]]
    key = keys[0] if keys else "a dictionary that is empty in one of them"
    return key, left.get(key, "missing"), right.get(key, "missing")
