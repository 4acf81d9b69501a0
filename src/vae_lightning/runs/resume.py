"""Which run a command is about: a new one, one to resume, or one that is finished already.

    python train.py resume=RUN_DIR                          # with the configuration that the run has; or resume=latest
    python train.py resume=RUN_DIR trainer.max_epochs=60    # and longer
    python train.py model.latent_dim=5 resume=auto          # the run of this very configuration, if there is one
    python train.py repeat=RUN_DIR                          # its configuration once more, in a new directory

`resume=auto` knows a run by its configuration, not by its directory's name or a job's number.
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
from vae_lightning.runs.directory import RunDirectory, RunError, newest_run
from vae_lightning.runs.environment import describe_code
from vae_lightning.runs.loading import trusted_config

log = logging.getLogger(__name__)

# What a resumed run may be told anew: how long it trains, and what changes no number.
CHANGEABLE = (
    *("trainer.max_epochs", "trainer.checkpoint_every", "trainer.accelerator", "trainer.fast_loop"),
    *("trainer.enable_progress_bar", "data.root", "test"),
)
COMMAND_KEYS = ("resume", "repeat", "trust", "timeout", "hparams_search")  # of a command, and not of its run
PARTS = ("model", "data", "trainer", "logger")  # the parts of a configuration that name classes


@dataclass
class RunPlan:
    """What to train and where; whether the directory's run is resumed, or is finished already."""

    config: dict[str, Any]
    run: RunDirectory
    resume: bool = False
    finished: bool = False


def plan_run(config: dict[str, Any], directory: Path, given: Iterable[str], searched: Iterable[Path] = ()) -> RunPlan:
    """The run that a command's `config` is about, where `directory` is for a new one.

    `given` are the keys that the command line changed, and `searched` the directories that resume=auto looks at.
    Raises RunError or ConfigError for a run that cannot be resumed, or not in this way.
    """
    resume, repeat, trust = config.get("resume"), config.get("repeat"), config.get("trust") or ()
    config = run_config(config)
    if repeat is not None:
        if resume is not None:
            raise ConfigError(f"repeat={repeat}: starts a new run; leave resume={resume} out")
        former = RunDirectory(as_path(repeat, "repeat"))
        changed = _changed(trusted_config(former, trust, PARTS), former, config, given)
        log.info("repeating %s%s", former, _changed_code(former))
        return RunPlan(changed, RunDirectory(directory))
    if resume not in (None, "auto"):
        run = RunDirectory(as_path(resume, "resume").resolve())
        before = trusted_config(run, trust, PARTS)
        check_links(run)
        changed = _changed(before, run, config, given)
        longer = changed["trainer"].get("max_epochs") != before["trainer"].get("max_epochs")
        untested = changed["test"] and not before.get("test", True)
        finished = run.state == "finished" and not longer and not untested
        return RunPlan(changed, run, resume=True, finished=finished)
    found = find_run(config, [directory, *searched] if resume == "auto" else [directory])
    if found is None:
        run = RunDirectory(directory)
        if run.state == "new":
            return RunPlan(config, run)
        key, theirs, ours = first_difference(comparable(run.read_config()), comparable(config))
        raise RunError(
            f"{run}: already holds a run, of another configuration ({key}={theirs}, not {ours}); "
            "choose another hydra.run.dir"
        )
    if found.state == "finished":
        return RunPlan(config, found, finished=True)
    if resume is None:
        raise RunError(f"{found}: holds a run that is not finished; say resume={found}, or resume=auto")
    check_links(found)
    return RunPlan(config, found, resume=True)


def run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A command's configuration without what says which run it is about."""
    return {key: value for key, value in config.items() if key not in COMMAND_KEYS}


def as_path(value: Any, key: str) -> Path:
    """A run directory as the command line gives it; one of digits arrives as a number. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        allowed = "the path of a run directory" + (", latest, auto or null" if key == "resume" else ", latest or null")
        raise ConfigError(f"{key}={value}: should be {allowed}")
    return newest_run(Path("outputs")) if value == "latest" else Path(str(value))


def check_links(run: RunDirectory) -> None:
    """Raise RunError for a link in a run directory, through which a resumed run would write somewhere else.

    `checkpoints/` may be a link to a directory on another disk, if there is nothing in it but this run's checkpoints.
    """
    known = (run.last_checkpoint, run.best_checkpoint, run.previous_checkpoint)
    for path in filter(Path.is_symlink, run.path.iterdir()):
        files = path.iterdir() if path == run.checkpoints and path.is_dir() else [path]
        if not all(file in known and not file.is_symlink() for file in files):
            raise RunError(f"{path}: is a link, and a resumed run would write through it")


def _changed(former: dict[str, Any], run: RunDirectory, config: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The configuration of `run` with what the command line may change of it. Raises ConfigError."""
    if not isinstance(former.get("trainer"), dict) or not isinstance(former.get("figures"), dict):
        raise RunError(f"{run.config_file}: is not the configuration of a run: trainer or figures is missing")
    changed = {"test": True} | copy.deepcopy(former)
    asked, theirs = flatten(config), flatten(changed)
    for key in given:
        dotted = key.replace("/", ".")
        keys = [k for k in asked.keys() | theirs.keys() if k == dotted or k.startswith(f"{dotted}.")]
        different = [k for k in sorted(keys) if asked.get(k) != theirs.get(k)]
        if key.partition(".")[0] in COMMAND_KEYS or (keys and not different):
            continue
        if key not in CHANGEABLE:
            what = f"{different[0]} is {theirs.get(different[0])} in {run}" if different else "not of the run"
            raise ConfigError(f"{key}: {what}; a run that is resumed or repeated takes only {', '.join(CHANGEABLE)}")
        set_key(changed, key, asked[key])
    return changed


def _changed_code(run: RunDirectory) -> str:
    """The versions and the commit that have changed since `run` was trained, for a line in the log."""
    try:
        then = flatten(run.read_environment())
    except FileError:
        return ""
    changes = [
        f"{key.removeprefix('versions.')} {then[key]} then, {now} now"
        for key, now in flatten(describe_code()).items()
        if key.startswith(("versions.", "git_commit")) and then.get(key) not in (None, now)
    ]
    return f" ({'; '.join(changes)})" if changes else ""


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
            if run.config_file.is_file() and comparable(run.read_config()) == comparable(config):
                found.append(run)
        except RunError as problem:
            log.warning("%s", problem)
    return min(found, key=lambda run: (run.state != "finished", run.is_locked()), default=None)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration without data.root, which changes no number: images are known by their checksums."""
    return {key: value for key, value in flatten(dict(config)).items() if key != "data.root"}


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first key in which two configurations differ, and both values."""
    left, right = flatten(dict(theirs)), flatten(dict(ours))
    keys = (key for key in [*right, *left] if key not in left or key not in right or left[key] != right[key])
    key = next(keys, "nesting")
    return key, left.get(key, "missing"), right.get(key, "missing")
