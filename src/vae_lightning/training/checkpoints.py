"""Checkpoints from which a run is resumed exactly where it stopped.

`last.ckpt` is written between two steps: at the start of each epoch, every `trainer.checkpoint_every`, when a signal
asks to stop, and at the end of training. Lightning puts weights, optimizer, schedules, callbacks and counters into it.
The rest is added here: random states, the epoch's sums so far, the history, and the lengths of TensorBoard's files. The
checkpoint before it stays as `previous.ckpt` until the run is finished.
"""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from vae_lightning.config import Interval
from vae_lightning.files import atomic_write
from vae_lightning.models.base import ImageModel
from vae_lightning.models.metrics import EpochMeans
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import load_checkpoint, load_weights
from vae_lightning.training.callbacks import NonFiniteGuard
from vae_lightning.training.history import History
from vae_lightning.training.loggers import event_files, event_sizes, rewind_events
from vae_lightning.training.signals import Interrupted, StopRequest

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all, keeps the `last.ckpt` before it, and unpickles nothing."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, durable=True) as partial:
            content = io.BytesIO()  # PyTorch's own writer hides why a file cannot be written
            torch.save(checkpoint, content)
            partial.write_bytes(content.getbuffer())
            if path.name == self.run.last_checkpoint.name and path.exists():
                with atomic_write(path.with_name(self.run.previous_checkpoint.name)) as former:
                    try:
                        os.link(path, former)
                    except OSError:  # a file system without links
                        shutil.copyfile(path, former)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))


class Progress(Callback):
    """Save between two steps, stop there on a signal, and complete checkpoints with what Lightning leaves out.

    `interval` is how often to save beside the start of each epoch. Without `saves` the run only stops on a signal.
    """

    def __init__(
        self, run: RunDirectory, history: History, stop: StopRequest, interval: Interval, saves: bool = True
    ) -> None:
        self.run = run
        self.history = history
        self.stop = stop
        self.interval = interval
        self.saves = saves
        self.saved_step = 0
        self.saved_time = time.monotonic()
        self.next_batch: int | None = None  # of the epoch, while a checkpoint is written between two steps
        self.random = random_states()  # as the model's making left them
        self.logged: dict[str, torch.Tensor] = {}
        self.loaded = False  # all this, from a checkpoint

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # Where there are several processes Lightning seeds them anew at each stage, and where there is one it does not.
        set_random_states(self.random)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save or stop before a batch that ends no accumulation of gradients. Raises Interrupted."""
        # Lightning leaves ReduceLROnPlateau out at the end of a resumed epoch, for want of metrics, which are here.
        trainer.fit_loop._restarting = False
        stop, due = self.due(trainer, batch_idx)
        if self.saves and (stop or due) and trainer.global_step != self.saved_step:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, NonFiniteGuard):
                    callback.check_training(trainer, module)
            self.next_batch = batch_idx
            trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False)
            self.next_batch = None
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if stop:
            raise Interrupted(f"stopped by {self.stop.name or 'another process'} after step {trainer.global_step}")

    def due(self, trainer: Trainer, batch_idx: int) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, before a batch of the epoch; the same in all processes."""
        if batch_idx % trainer.accumulate_grad_batches:
            return False, False
        every = self.interval
        due = trainer.global_step != self.saved_step and (
            batch_idx == 0
            or bool(every.steps and trainer.global_step % every.steps == 0)
            or bool(every.seconds and time.monotonic() - self.saved_time >= every.seconds)
        )
        anywhere = trainer.strategy.reduce_boolean_decision
        return anywhere(self.stop.name is not None, all=False), anywhere(due, all=False)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, ImageModel)
        if self.next_batch is not None:
            take_back_batch(trainer, checkpoint["loops"]["fit_loop"], self.next_batch)
        checkpoint["progress"] = {
            "directory": str(self.run.path.absolute()),
            "random": random_states(),
            "means": {split: means.saved(trainer.strategy.all_gather) for split, means in module.means.items()},
            "logged": logged(trainer),
            "should_stop": trainer.should_stop,
            "history": self.history.saved(),
            "events": event_sizes(trainer, self.run),
        }

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        # Paths in the states of callbacks, for a run that lies elsewhere now.
        states = checkpoint["callbacks"] = moved(
            checkpoint["callbacks"], progress["directory"], str(self.run.path.absolute())
        )
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert isinstance(module, ImageModel)
        for split, saved in progress["means"].items():
            module.means[split].restore(saved, trainer.global_rank, trainer.strategy.root_device)
        self.history.restore(progress["history"])
        trainer.should_stop = progress["should_stop"]  # by EarlyStopping, say: then nothing is left but the test
        self.random, self.logged, self.loaded = progress["random"], progress["logged"], True
        for callback in trainer.checkpoint_callbacks:  # Lightning leaves this one of its own out
            if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
                callback.current_score = states[callback.state_key]["current_score"]
                states[callback.state_key]["dirpath"] = callback.dirpath  # which may be a link now, or was one

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop.listen()
        self.stop.stepping = True
        self.saved_step = trainer.global_step
        if self.loaded:
            trainer.callback_metrics.update(self.logged)
            set_random_states(self.random)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.random = random_states()
        if self.saves:
            trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False)


def take_back_batch(trainer: Trainer, loops: dict[str, Any], next_batch: int) -> None:
    """Let the saved counters say that `next_batch` of the epoch, which Lightning has fetched, was not."""
    progress = loops["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for counter in ("total", "current"):
        progress[counter]["ready"] -= 1
    for loader in loops["state_dict"].get("combined_loader", []):
        if "given" in loader:  # of DeviceBatches
            loader["given"] = next_batch
    # On a restart Lightning first looks whether a validation is due after the batch before. If so it skips that one,
    # but counts a step for its loggers.
    epoch_wise = trainer.check_val_every_n_epoch is not None
    batches = next_batch if epoch_wise else progress["total"]["ready"]
    epoch_validates = not epoch_wise or (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
    every = trainer.val_check_batch
    if trainer.enable_validation and epoch_validates and isinstance(every, int) and batches % every == 0:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def random_states() -> dict[str, Any]:
    """The generators of Python, NumPy and PyTorch, as plain values; processes of one run share them."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": list(random.getstate()[1]),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate((3, tuple(states["python"]), None))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def logged(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The metrics that callbacks and schedules may ask for, such as the last validation's."""
    return {key: value.detach().clone() for key, value in trainer.callback_metrics.items()}


def moved(tree: Any, old: str, new: str) -> Any:
    """A copy of nested values in which paths under `old` are under `new`."""
    if isinstance(tree, dict):
        return {moved(key, old, new): moved(value, old, new) for key, value in tree.items()}
    if isinstance(tree, list):
        return [moved(value, old, new) for value in tree]
    if isinstance(tree, str) and (tree == old or tree.startswith(f"{old}{os.sep}")):
        return new + tree[len(old) :]
    return tree


def last_checkpoint(run: RunDirectory, model: ImageModel) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint from which the run of `model` is resumed: the last, or, where it is damaged, the one before.

    None where there is none yet. Raises RunError where none of those that there are will do.
    """
    if run.checkpoints.exists() and not run.checkpoints.is_dir():
        raise RunError(f"{run.checkpoints}: not a directory")
    problems = []
    for file in filter(Path.exists, (run.last_checkpoint, run.previous_checkpoint)):
        try:
            content = load_checkpoint(file)
            check_content(content, model, file)
        except RunError as problem:
            problems.append(str(problem))
            log.warning("%s", problem)
            continue
        if problems:
            log.warning("resuming from the one before it, %s, at step %d", file, content["global_step"])
        return file, content
    if problems:
        raise RunError(f"{problems[0]}; remove {run.checkpoints} to have it trained from the start")
    return None


def check_content(content: dict[str, Any], model: ImageModel, file: Path) -> None:
    """Raise RunError for a checkpoint from which this model's training cannot be resumed. Loads its weights into it."""
    if "progress" not in content:
        raise RunError(f"{file}: it was not written by train.py, or by a version that could not resume")
    load_weights(content["state_dict"], model, file)
    before = random_states()
    try:
        progress = content["progress"]
        set_random_states(progress["random"])
        event_files(RunDirectory(file.parent.parent).tensorboard, progress["events"])
        epochs_begun(content)
        for key in ("directory", "means", "logged", "should_stop"):
            progress[key]
        for saved in progress["means"].values():
            EpochMeans().restore(saved, 0, torch.device("cpu"))
        for key in ("rows", "row", "seconds"):
            progress["history"][key]
        for key in ("callbacks", "lr_schedulers"):
            content[key]
        if type(model).configure_optimizers is ImageModel.configure_optimizers:  # another may want the trainer
            made = model.configure_optimizers()
            (made[0][0] if isinstance(made, tuple) else made).load_state_dict(content["optimizer_states"][0])
    # A file that was altered, or comes from elsewhere, fails in many ways, and none of them is a bug here.
    except Exception as error:
        raise RunError(f"{file}: damaged, or not of this run") from error
    finally:
        set_random_states(before)


def epochs_begun(content: dict[str, Any]) -> int:
    """How many epochs a checkpoint's run has begun."""
    return int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["started"])


def rewind(run: RunDirectory, progress: Mapping[str, Any] | None) -> None:
    """Take what came after a checkpoint out of the run directory: it will come again. None: after the start."""
    rewind_events(run.tensorboard, progress["events"] if progress else {})
    run.remove_partial()
    if not progress:
        run.history_file.unlink(missing_ok=True)
