"""Which run a command is about, and what to do with it. A run is its directory; there is no other search.

    python train.py                                         # start a run in a new directory
    python train.py resume=RUN_DIR                          # resume it; also a checkpoint in it, or resume=latest
    python train.py resume=RUN_DIR trainer.max_epochs=60    # train it for longer
    python train.py model.latent_dim=5 resume=auto          # start, resume or skip outputs/vae/latent_dim-5

With `resume=auto`, and for every job of a sweep, the directory is composed from the overrides of the command.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from vae_lightning.config import ConfigError, flatten
from vae_lightning.runs.directory import RunDirectory

log = logging.getLogger(__name__)

# Keys that change no result, and all that may change when a run is resumed.
HARMLESS = (
    *("trainer.checkpoint_every", "trainer.accelerator", "trainer.fast_loop", "trainer.enable_progress_bar"),
    *("data.root", "test"),
)
CHANGEABLE = ("trainer.max_epochs", *HARMLESS)
LONGEST_NAME = 150  # characters


@dataclass
class Plan:
    """A run directory, its configuration, and what to do with it."""

    run: RunDirectory
    config: dict[str, Any]
    action: Literal["start", "resume", "finished"]


def plan_run(config: dict[str, Any], directory: Path, overrides: Sequence[str], resume: str | None) -> Plan:
    """Return the run of a command with this `config` and `resume`; a new run gets `directory`.

    Raises RunError or ConfigError if that run cannot be resumed, or not with these settings.
    """
    run = RunDirectory(directory) if resume in (None, "auto") else RunDirectory.locate(resume)[0]
    if resume is None or (resume == "auto" and run.state == "new"):
        return Plan(run, config, "start")
    former = run.read_config()
    keys = list(config) if resume == "auto" else [re.split("[=@]", word.lstrip("+~"))[0] for word in overrides]
    changed = with_changes(former, config, [key.replace("/", ".") for key in keys], run)
    longer = changed["trainer"].get("max_epochs") != former["trainer"].get("max_epochs")
    if longer and changed["model"].get("schedule"):
        log.warning("model.schedule stays as it was for trainer.max_epochs=%s", former["trainer"].get("max_epochs"))
    untested = changed["test"] and not former.get("test", True)
    return Plan(run, changed, "resume" if run.state == "unfinished" or longer or untested else "finished")


def with_changes(
    former: dict[str, Any], config: dict[str, Any], keys: Sequence[str], run: RunDirectory
) -> dict[str, Any]:
    """Return the configuration `former` of `run`, with the values of `config` for `keys` and the keys below them.

    Raises ConfigError for the first key that differs and is not in CHANGEABLE.
    """
    changed, theirs, ours = copy.deepcopy(former), flatten(former), flatten(config)
    for key in ours | theirs:
        old, new = theirs.get(key, "missing"), ours.get(key, "missing")
        if old == new or not any(f"{key}.".startswith(f"{name}.") for name in keys):
            continue
        if key not in CHANGEABLE or key not in ours:
            allowed = ", ".join(CHANGEABLE)
            raise ConfigError(f"{key}={new}: is {old} in {run}; when a run is resumed, only {allowed} may change")
        set_key(changed, key, new)
    return changed


def set_key(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in a nested configuration."""
    *path, last = dotted.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def run_name(overrides: Sequence[str]) -> str:
    """Return the name of a run directory from its overrides, such as `latent_dim-5_backbone-conv`.

    It consists of the shortest ends of the keys that are unambiguous, and has no character that shells or Hydra would
    want quoted. A hash replaces what is longer than `LONGEST_NAME`. `default` is the name without overrides.
    """
    values: dict[str, str] = {}
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if key not in ("resume", *HARMLESS):
            values[re.sub("[/@]", ".", key)] = re.sub(r"[\[\]{}'\"\s]", "", value) or "none"
    words = []
    for key, value in values.items():
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        end = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in values) == 1), key)
        words.append(re.sub(r"[^\w.+-]", "-", f"{end}-{value}", flags=re.ASCII))
    name = "_".join(words) or "default"
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


# For conf/train.yaml: a run that the same command has to find again is named by its overrides, any other by the time.
OmegaConf.register_new_resolver(
    "run_name", lambda resume, overrides, now: run_name(overrides) if resume == "auto" else now, replace=True
)
