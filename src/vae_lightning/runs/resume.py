"""Choose the run of a command: a new one, one to resume, or one that is already finished.

    python train.py resume=RUN_DIR                          # resume with the run's configuration; or resume=latest
    python train.py resume=RUN_DIR trainer.max_epochs=60    # train it longer
    python train.py model.latent_dim=5 resume=auto          # resume the run with this configuration, or start it
    python train.py repeat=RUN_DIR                          # train the same configuration in a new directory

`resume=auto` finds a run by its configuration, not by the name of its directory or the number of a job.
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
from vae_lightning.runs.loading import load_checkpoint, trusted_config

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: the length of training, and keys that do not change results.
CHANGEABLE = (
    *("trainer.max_epochs", "trainer.checkpoint_every", "trainer.accelerator", "trainer.fast_loop"),
    *("trainer.enable_progress_bar", "data.root", "test"),
)
COMMAND_KEYS = ("resume", "repeat", "trust", "timeout", "hparams_search")  # options of the command, not of the run
PARTS = ("model", "data", "trainer", "logger")  # parts of a configuration that name classes


@dataclass
class RunPlan:
    """A configuration, its run directory, and whether to resume that run or whether it is already finished."""

    config: dict[str, Any]
    run: RunDirectory
    resume: bool = False
    finished: bool = False


def plan_run(config: dict[str, Any], directory: Path, given: Iterable[str], searched: Iterable[Path] = ()) -> RunPlan:
    """Choose the run of a command with this `config`; a new run gets `directory`.

    `given` are the keys that the command line set. `searched` are the directories in which resume=auto looks for runs.
    Raises RunError or ConfigError if the run cannot be resumed, or not with these keys.
    """
    resume, repeat, trust = config.get("resume"), config.get("repeat"), config.get("trust") or ()
    config = run_config(config)
    if repeat is not None:
        if resume is not None:
            raise ConfigError(f"repeat={repeat}: starts a new run; remove resume={resume}")
        former = RunDirectory(as_path(repeat, "repeat"))
        changed = _changed(trusted_config(former, trust, PARTS), former, config, given)
        log.info("repeating %s%s", former, _changed_code(former))
        return RunPlan(changed, RunDirectory(directory))
    if resume not in (None, "auto"):
        run = RunDirectory(as_path(resume, "resume").resolve())
        before = trusted_config(run, trust, PARTS)
        check_files(run)
        changed = _changed(before, run, config, given)
        longer = changed["trainer"].get("max_epochs") != before["trainer"].get("max_epochs")
        if longer and changed["model"].get("schedule"):
            log.warning("model.schedule stays as it was for trainer.max_epochs=%s", before["trainer"].get("max_epochs"))
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
            f"{run}: already contains a run with another configuration ({key}={theirs}, not {ours}); "
            "choose another hydra.run.dir"
        )
    if found.state == "finished":
        return RunPlan(config, found, finished=True)
    if resume is None:
        raise RunError(f"{found}: contains a run that is not finished; use resume={found} or resume=auto")
    check_files(found)
    return RunPlan(config, found, resume=True)


def run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the run: that of the command without the keys that choose the run."""
    return {key: value for key, value in config.items() if key not in COMMAND_KEYS}


def as_path(value: Any, key: str) -> Path:
    """Return the run directory given on the command line; digits arrive as a number. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        allowed = "the path of a run directory" + (", latest, auto or null" if key == "resume" else ", latest or null")
        raise ConfigError(f"{key}={value}: should be {allowed}")
    return newest_run(Path("outputs")) if value == "latest" else Path(str(value))


def check_files(run: RunDirectory) -> None:
    """Raise RunError for a link, through which a resumed run would write to another place, and for a pipe or device.

    `checkpoints/` may be a link to a directory on another disk if this run has written the last checkpoint there.
    """
    known = (run.last_checkpoint, run.best_checkpoint, run.previous_checkpoint)
    for path in run.path.iterdir():
        if path.is_symlink():
            linked = path == run.checkpoints and path.is_dir()
            files = list(path.iterdir()) if linked else [path]
            if not all(file in known and not file.is_symlink() for file in files) or not is_own(
                run.last_checkpoint, run
            ):
                raise RunError(f"{path}: is a link; a resumed run would write through it")
        elif not (path.is_file() or path.is_dir()):
            raise RunError(f"{path}: is neither a file nor a directory")


def is_own(checkpoint: Path, run: RunDirectory) -> bool:
    """Return whether `run` has written this checkpoint, which contains the run directory's path."""
    try:
        written_by = load_checkpoint(checkpoint)["progress"]["directory"]
        return Path(written_by).resolve() == run.path.resolve()
    except (RunError, KeyError, TypeError):
        return False


def _changed(former: dict[str, Any], run: RunDirectory, config: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """Return the configuration of `run` with the command's changes. Raises ConfigError for keys not in CHANGEABLE."""
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
        if key not in CHANGEABLE or key not in asked:  # ~key removes it
            what = "not a key of the run"
            if different:  # the key itself or, for a group such as model/backbone, one of its keys
                name = different[0]
                what = f"{'' if name == key else f'{name} '}is {theirs.get(name)} in {run}"
            given_value = f"={asked[key]}" if key in asked else ""
            raise ConfigError(
                f"{key}{given_value}: {what}; to resume or repeat a run, change only {', '.join(CHANGEABLE)}"
            )
        set_key(changed, key, asked[key])
    return changed


def _changed_code(run: RunDirectory) -> str:
    """Describe the versions and the commit that have changed since `run` was trained."""
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
    """Set the value of a dotted key in a nested configuration."""
    *path, last = dotted.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def find_run(config: Mapping[str, Any], directories: Iterable[Path]) -> RunDirectory | None:
    """Find the run with this configuration, preferably a finished one, then one that no process is training."""
    found: list[RunDirectory] = []
    for run in map(RunDirectory, dict.fromkeys(directories)):
        try:
            if run.config_file.is_file() and comparable(run.read_config()) == comparable(config):
                found.append(run)
        except RunError as problem:
            log.warning("%s", problem)
    return min(found, key=lambda run: (run.state != "finished", run.is_locked()), default=None)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration, without data.root, which does not change results: the images have checksums."""
    return {key: value for key, value in flatten(dict(config)).items() if key != "data.root"}


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return the first key in which two configurations differ, and both values."""
    left, right = flatten(dict(theirs)), flatten(dict(ours))
    keys = (key for key in [*right, *left] if key not in left or key not in right or left[key] != right[key])
    key = next(keys, "nesting")
    return key, left.get(key, "missing"), right.get(key, "missing")
