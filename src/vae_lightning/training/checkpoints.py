"""Checkpoints from which a run resumes exactly where it stopped.

`last.ckpt` is written between two steps: at the start of each epoch, every `trainer.checkpoint_every`, when a signal
asks to stop, and at the end of training. Lightning saves weights, optimizer, schedules, callbacks and counters. This
file adds the random states, the sums of the current epoch, and the history.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from vae_lightning.config import ConfigError
from vae_lightning.files import atomic_write
from vae_lightning.models.base import ImageModel
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import load_checkpoint
from vae_lightning.training.history import History
from vae_lightning.training.signals import Interrupted, StopRequest

log = logging.getLogger(__name__)


class Interval(NamedTuple):
    """How often to save in mid-epoch: every some steps or seconds; both are None for null."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: int | str | None) -> Interval:
        """Parse `500`, `30s`, `10min`, `2h` or null. Raises ConfigError."""
        match = re.fullmatch(r"([1-9][0-9]*) ?(|s|min|h)", str(text))
        if text is not None and not match:
            raise ConfigError(f"trainer.checkpoint_every={text}: should be a number of steps, or a time such as 10min")
        if not match:
            return cls()
        number, unit = int(match[1]), match[2]
        return cls(seconds=number * {"s": 1, "min": 60, "h": 3600}[unit]) if unit else cls(steps=number)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, and load without unpickling."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            content = io.BytesIO()  # PyTorch's own file writer hides the reason when it fails, such as a full disk
            torch.save(checkpoint, content)
            partial.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))


@dataclass(eq=False)
class Progress(Callback):
    """Save between two steps, stop there on a signal, and add to checkpoints what Lightning does not save."""

    run: RunDirectory
    history: History
    stop: StopRequest
    interval: Interval  # how often to save in mid-epoch
    saves: bool = True  # False: write no checkpoints, only stop on a signal

    def __post_init__(self) -> None:
        self.saved_step = 0
        self.saved_time = time.monotonic()
        self.random = random_states()  # after building the model
        self.restored: dict[str, Any] | None = None  # "progress" of the checkpoint that a run resumes from

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # With several processes Lightning seeds them again at each stage; with one process it does not.
        set_random_states(self.random)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save or stop before a batch that starts an optimizer step. Raises Interrupted."""
        if self.restored:
            # In a resumed epoch Lightning skips ReduceLROnPlateau because it has no metrics; here it has them. And if
            # validation was due after the last batch, Lightning has counted a step twice for its loggers.
            trainer.fit_loop._restarting = False
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.logger_step
            self.restored = None
        stop, due = self.due(trainer, batch_idx)
        if self.saves and (stop or due) and trainer.global_step != self.saved_step:
            trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False)
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if stop:
            raise Interrupted(f"stopped by {self.stop.name or 'another process'} after step {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # so that Lightning validates the last weights, also in mid-epoch

    def due(self, trainer: Trainer, batch_idx: int) -> tuple[bool, bool]:
        """Return whether to stop and whether to save before a batch of the epoch; the same in all processes."""
        if batch_idx % trainer.accumulate_grad_batches:
            return False, False
        every = self.interval
        due = trainer.global_step != self.saved_step and (
            batch_idx == 0
            or bool(every.steps and trainer.global_step % every.steps == 0)
            or bool(every.seconds and time.monotonic() - self.saved_time >= every.seconds)
        )
        any_process = trainer.strategy.reduce_boolean_decision
        return any_process(self.stop.name is not None, all=False), any_process(due, all=False)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, ImageModel)
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]["current"]
        if batches["ready"] > batches["started"]:
            take_back_batch(loops)
        checkpoint["progress"] = {
            "random": random_states(),
            "means": {split: means.saved(trainer.strategy.all_gather) for split, means in module.means.items()},
            # Callbacks and schedules read these metrics, for example the last validation loss.
            "logged": {key: value.detach().clone() for key, value in trainer.callback_metrics.items()},
            "should_stop": trainer.should_stop,
            "history": self.history.saved(),
            # The first step that is not logged yet; at the start of an epoch its learning rate is.
            "purge_step": trainer.global_step + (batches["ready"] == 0),
        }

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, ImageModel)
        self.restored = restored = checkpoint["progress"]
        self.random = restored["random"]
        self.history.restore(restored["history"])
        for split, means in module.means.items():
            means.restore(restored["means"][split], trainer.global_rank, trainer.strategy.root_device)
        trainer.should_stop = restored["should_stop"]  # by EarlyStopping, for example: then only the test remains
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                # The run may have been moved; Lightning would then forget the best score.
                checkpoint["callbacks"][callback.state_key]["dirpath"] = callback.dirpath

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop.listen()
        self.stop.stepping = True
        self.saved_step = trainer.global_step
        self.logger_step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.restored:
            trainer.callback_metrics.update(self.restored["logged"])
            set_random_states(self.random)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.random = random_states()
        if self.saves:
            trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False)


def take_back_batch(loops: dict[str, Any]) -> None:
    """Change the saved counters as if the batch that Lightning has fetched, but not used, was not fetched."""
    batches = loops["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    for counter in ("total", "current"):
        batches[counter]["ready"] -= 1
    for loader in loops["state_dict"].get("combined_loader", []):
        if "given" in loader:  # of DeviceBatches
            loader["given"] = batches["current"]["ready"]


def random_states() -> dict[str, Any]:
    """Return the states of the random generators of Python, NumPy and PyTorch, without pickled objects.

    All processes of a run have the same states.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def load_last(run: RunDirectory) -> dict[str, Any] | None:
    """Return the last checkpoint of a run; None without any. Raises RunError if the run cannot be resumed from it."""
    if not run.last_checkpoint.exists():
        return None
    checkpoint = load_checkpoint(run.last_checkpoint)
    if "purge_step" not in checkpoint.get("progress", {}):
        raise RunError(
            f"{run.last_checkpoint}: was not written by train.py, or by an earlier version, so it cannot be resumed; "
            "it can be loaded and evaluated"
        )
    return checkpoint
