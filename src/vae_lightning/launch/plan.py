"""Which run a command is about: a run is its directory, which the command names or composes from its overrides."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback
from omegaconf import OmegaConf

from vae_lightning.config import ConfigError, flatten
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.train import train

log = logging.getLogger(__name__)

# Keys that change no result, and all that may change when a run is resumed.
HARMLESS = (
    *("trainer.checkpoint_every", "trainer.accelerator", "trainer.fast_loop", "trainer.enable_progress_bar"),
    *("data.root", "test"),
)
CHANGEABLE = ("trainer.max_epochs", *HARMLESS)
LONGEST_NAME = 150  # characters


class Plan(NamedTuple):
    """A run, its configuration, and what to do with it."""

    run: RunDirectory
    config: dict[str, Any]
    action: Literal["start", "resume", "finished"]

    def carry_out(self, callbacks: Sequence[Callback] = ()) -> None:
        """Train the run, unless it is finished. Raises the errors of `train`."""
        if self.action == "finished":
            log.info("%s: finished already; nothing to do", self.run)
        else:
            train(self.config, self.run, self.action == "resume", callbacks)


def plan_run(config: dict[str, Any], directory: Path, overrides: Sequence[str], resume: str | None) -> Plan:
    """Plan the run of a command: `resume` names it, or is auto or None for the run in `directory`.

    Raises RunError or ConfigError if that run cannot be resumed, or not with this `config`.
    """
    run = RunDirectory(directory) if resume in (None, "auto") else RunDirectory.locate(resume)[0]
    if resume is None or (resume == "auto" and run.state == "new"):
        return Plan(run, config, "start")
    names = list(config) if resume == "auto" else [re.split("[=@]", word.lstrip("+~"))[0] for word in overrides]
    given = tuple(f"{name}.".replace("/", ".") for name in names)
    former = {"test": True} | run.read_config()
    changed = copy.deepcopy(former)
    for key, (old, new) in changed_keys(former, config).items():
        if not f"{key}.".startswith(given):
            continue
        if key not in CHANGEABLE or new == "missing":
            allowed = ", ".join(CHANGEABLE)
            raise ConfigError(f"{key}={new}: is {old} in {run}; when a run is resumed, only {allowed} may change")
        set_key(changed, key, new)
    epochs = former["trainer"].get("max_epochs")
    longer = changed["trainer"].get("max_epochs") != epochs
    if longer and (schedule := changed["model"].get("schedule")):
        if "OneCycleLR" in str(schedule.get("_target_")):
            raise ConfigError(f"trainer.max_epochs: a OneCycleLR ends with its run, which has {epochs} epochs")
        log.warning("model.schedule stays as it was for trainer.max_epochs=%s", epochs)
    untested = changed["test"] and not former["test"]
    return Plan(run, changed, "resume" if run.state == "unfinished" or longer or untested else "finished")


def changed_keys(former: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that differ between two configurations, each with its old and new value or "missing"."""
    old, new = flatten(former), flatten(config)
    pairs = {key: (old.get(key, "missing"), new.get(key, "missing")) for key in new | old}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def set_key(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in a nested configuration."""
    *path, last = dotted.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def run_name(overrides: Sequence[str]) -> str:
    """Return the name of a directory from overrides: `latent_dim-5_backbone-conv`, or `default` without any.

    It has the shortest ends of the keys that are unambiguous, no character that shells or Hydra would want quoted, and
    a hash in place of what is longer than `LONGEST_NAME`.
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
