"""Run the steps between two logged ones in a plain loop: `trainer.fast_loop`.

Around each optimizer step Lightning calls some twenty hooks. For a small model they take much of the time, and between
two logged steps (`trainer.log_every_n_steps`) most of them do nothing. Those steps run here in a plain loop, with the
same arithmetic and counters, to the bit. The last step of each stretch runs through Lightning's own loop. If a callback
or a hook of the model acts at each step, every step runs through Lightning's loop, and the log says why.

For speed, this file uses private parts of Lightning: `_TrainingEpochLoop` and its counters,
`_logger_connector`, `_current_fx_name`, settings of ModelCheckpoint and Trainer. Where they differ, `install` raises an
exception, and the run uses Lightning's loop. The file can be deleted: the result is the same, only slower.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from inspect import signature
from operator import attrgetter
from typing import Any, cast

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from vae_lightning.data.batches import DeviceBatches
from vae_lightning.training.callbacks import Health, NonFiniteGuard
from vae_lightning.training.checkpoints import Progress

log = logging.getLogger(__name__)

STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
MODULE_HOOKS = (*STEP_HOOKS, "backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping")
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def install(trainer: Trainer) -> None:
    """Replace the trainer's epoch loop by the fast loop. Raises an exception if Lightning's loop is not as expected."""
    loop = trainer.fit_loop.epoch_loop
    parts = (
        *("batch_progress", "automatic_optimization", "_batches_that_stepped", "_build_kwargs", "restarting"),
        *("automatic_optimization.optim_progress.optimizer.step", "batch_idx", "global_step", "max_steps"),
    )
    attrgetter(*parts)(loop)  # raises AttributeError, which names a missing part
    trainer_parts = ("_logger_connector.on_batch_start", "lr_scheduler_configs", "precision_plugin.train_step_context")
    attrgetter(*trainer_parts)(trainer)
    if type(loop) is not _TrainingEpochLoop or list(signature(loop.advance).parameters) != ["data_fetcher"]:
        raise TypeError(f"it is another one ({type(loop).__name__})")
    trainer.fit_loop.epoch_loop = FastLoop(trainer)


class FastLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, with a plain loop for the steps between two logged ones."""

    reason: str | None = None  # for running each step through Lightning's loop

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.progress_callback = next((c for c in callbacks if isinstance(c, Progress)), None)

    def on_run_start(self, data_fetcher: Any) -> None:
        super().on_run_start(data_fetcher)
        before, self.reason = self.reason, reason_for_single_steps(self.trainer)
        if self.reason and self.reason != before:
            log.info("trainer.fast_loop: every step runs through Lightning's own loop: %s", self.reason)

    def advance(self, data_fetcher: Any) -> None:
        callback = self.progress_callback
        # After a restart, and where the callback saves or stops, the next step must be Lightning's.
        batches = self.batch_progress.current.ready
        due = callback is not None and (callback.restored or any(callback.due(self.trainer, batches)))
        if not (self.reason or self.restarting or due):
            self._run_steps(data_fetcher)
        super().advance(data_fetcher)

    def _run_steps(self, data_fetcher: Any) -> None:
        trainer, callback = cast(Any, self.trainer), self.progress_callback
        module, optimizer = trainer.lightning_module, trainer.optimizers[0]
        progress = self.automatic_optimization.optim_progress.optimizer
        takes_index = len(self._build_kwargs(OrderedDict(), None, 0)) > 1  # training_step(batch) or (batch, batch_idx)
        clip, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        convert, start = trainer.precision_plugin.convert_input, trainer._logger_connector.on_batch_start
        training_step = trainer.strategy.training_step

        def closure() -> Tensor | None:
            progress.zero_grad.increment_by(1)
            optimizer.zero_grad()  # before the forward pass, which then uses the same memory, still in the cache
            output = training_step(batch, *([self.batch_idx + 1] if takes_index else []))
            loss = output["loss"] if isinstance(output, dict) else output
            if loss is not None:  # training_step returns None to skip a batch
                loss.backward()
            if clip:
                module.clip_gradients(optimizer, clip, algorithm)
            return loss

        module._current_fx_name = "training_step"  # `self.log` needs it
        for _ in range(self._steps_to_run()):
            if callback and callback.stop.name and trainer.world_size == 1:  # several stop in `advance`
                break
            batch, _, _ = next(data_fetcher)
            batch = convert(batch)
            start(batch)
            optimizer.step(closure)
            self.batch_progress.increment_by(1)
            progress.step.increment_by(1)
            self._batches_that_stepped += 1
        module._current_fx_name = None

    def _steps_to_run(self) -> int:
        """Return how many steps precede the next one that is logged, saved or validated, or ends the epoch or fit."""
        trainer: Any = self.trainer
        done = self.batch_idx + 1  # batches of this epoch
        last = [int(trainer.num_training_batches) - done]
        if trainer.log_every_n_steps:
            last.append(trainer.log_every_n_steps - self._batches_that_stepped % trainer.log_every_n_steps)
        if self.max_steps != -1:
            last.append(self.max_steps - self.global_step)
        if self.progress_callback and (steps := self.progress_callback.interval.steps):
            last.append(steps - self.global_step % steps)
        if trainer.val_check_batch not in (None, float("inf")):
            batches = self.total_batch_idx + 1 if trainer.check_val_every_n_epoch is None else done
            last.append(int(trainer.val_check_batch) - batches % int(trainer.val_check_batch))
        return max(0, min(last) - 1)


def reason_for_single_steps(trainer: Any) -> str | None:
    """Return what acts at each step of the training that is about to run, or None."""
    module, precision, optimizers = trainer.lightning_module, trainer.precision_plugin, trainer.optimizers
    data, strategy, profiler = trainer.datamodule, trainer.strategy, trainer.profiler
    own = [hook for hook in MODULE_HOOKS + TRANSFER_HOOKS if overrides(module, LightningModule, hook)]
    own += [hook for hook in TRANSFER_HOOKS if data and overrides(data, LightningDataModule, hook)]
    listening = [type(callback).__name__ for callback in trainer.callbacks if listens(callback)]
    reasons = {
        f"the callback {' and '.join(listening)} acts at each step": listening,
        f"the model's or data's {' and '.join(own)} acts at each step": own,
        "optimization is manual": not module.automatic_optimization,
        "there is more than one optimizer": len(optimizers) != 1,
        "the learning rate changes at each step": any(c.interval == "step" for c in trainer.lr_scheduler_configs),
        f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}": trainer.accumulate_grad_batches != 1,
        "the batches come from another data loader": not isinstance(trainer.train_dataloader, DeviceBatches),
        f"trainer.precision={trainer.precision} scales the loss": overrides(precision, Precision, "optimizer_step")
        and getattr(precision, "scaler", True) is not None,
        f"trainer.profiler={type(profiler).__name__}": not isinstance(profiler, PassThroughProfiler),
        f"trainer.strategy={type(strategy).__name__}": type(strategy) not in (SingleDeviceStrategy, DDPStrategy),
        "trainer.val_check_interval is a time": trainer._val_check_time_interval is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def listens(callback: Callback) -> bool:
    """Return whether a callback acts at each step; those of every run, and progress bars, can wait for a logged one."""
    if isinstance(callback, NonFiniteGuard | Health | ProgressBar | Progress):
        return False
    if isinstance(callback, ModelCheckpoint):
        return bool(callback._every_n_train_steps or callback._train_time_interval)
    if isinstance(callback, LearningRateMonitor):
        return callback.logging_interval != "epoch"
    return any(overrides(callback, Callback, hook) for hook in STEP_HOOKS)


def overrides(instance: object, base: type, method: str) -> bool:
    """Return whether `instance` overrides a method of its base class."""
    return getattr(getattr(instance, method), "__func__", None) is not getattr(base, method)
