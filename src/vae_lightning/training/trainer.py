"""Lightning's Trainer, built from the configuration under `trainer`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from inspect import signature
from typing import Annotated, Any, Literal

import torch
from hydra.core.config_store import ConfigStore
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pydantic import Field
from torch.optim.lr_scheduler import OneCycleLR

from vae_lightning.config import (
    ConfigError,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    Spec,
    UserError,
    build,
    check_arguments,
    did_you_mean,
    out_of_memory,
)
from vae_lightning.data.module import ImageDataModule
from vae_lightning.models.base import ImageModel
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.callbacks import Health, NonFiniteGuard, SkipNonFinite, TrainingError
from vae_lightning.training.checkpoints import AtomicCheckpointIO
from vae_lightning.training.signals import StopRequest

log = logging.getLogger(__name__)

OURS = ("logger", "callbacks", "default_root_dir")  # Trainer arguments that `train` sets itself
# All other arguments of Lightning's Trainer with their defaults. conf/trainer/default.yaml builds on these, so that
# `trainer.limit_train_batches=10` works and `trainer.limit_trian_batches=10` is refused.
TRAINER_DEFAULTS = {
    name: parameter.default for name, parameter in signature(Trainer).parameters.items() if name not in OURS
}
ConfigStore.instance().store(group="trainer", name="lightning", node=TRAINER_DEFAULTS)
# Callbacks of Lightning that do not resume, or train another run than the configuration describes.
REFUSED = {
    BatchSizeFinder: "trains with another batch size than the configuration says. Allowed: data.batch_size",
    GradientAccumulationScheduler: "does not resume within an epoch. Allowed: trainer.accumulate_grad_batches",
    LearningRateFinder: "trains with another rate than the configuration says. Allowed: model.learning_rate",
    ModelPruning: "does not resume. Allowed: a callback of your own",
    StochasticWeightAveraging: "averages after the last checkpoint is written. Allowed: EMAWeightAveraging",
}


def make_trainer(
    run: RunDirectory,
    ours: list[Callback],
    loggers: list[Logger],
    *,
    callbacks: Any = None,
    max_epochs: Annotated[int, Field(ge=-1)] | None = None,
    min_epochs: NonNegativeInt | None = None,
    min_steps: NonNegativeInt | None = None,
    accumulate_grad_batches: PositiveInt = 1,
    gradient_clip_val: NonNegative | None = None,
    check_val_every_n_epoch: PositiveInt | None = 1,
    precision: Literal["32-true", "32", 32, "bf16-mixed", "bf16", "16-mixed", "16", 16] | None = None,
    on_nan: Literal["stop", "skip"] = "stop",
    fast_loop: bool = True,
    compile: bool = False,
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    **options: Any,
) -> Trainer:
    """Build Lightning's Trainer with the callbacks `ours` and the configured `callbacks`.

    The arguments named here are not Lightning's, or have ranges that it does not check. Raises ConfigError.
    """
    options |= {
        "max_epochs": max_epochs,
        "min_epochs": min_epochs,
        "min_steps": min_steps,
        "accumulate_grad_batches": accumulate_grad_batches,
        "gradient_clip_val": gradient_clip_val,
        "check_val_every_n_epoch": check_val_every_n_epoch,
        "precision": precision,
        # Lightning would keep what an earlier job of the sweep has set.
        "deterministic": options.get("deterministic") or False,
        "benchmark": options.get("benchmark") or False,
    }
    check_arguments(Trainer, options, "trainer")
    check_accelerator(options["accelerator"], options["devices"])
    if on_nan == "skip" and str(precision) in ("16", "16-mixed"):  # its gradient scaler skips such updates
        raise ConfigError(
            f"trainer.on_nan=skip: trainer.precision={precision} skips such updates itself. Allowed: stop"
        )
    if re.search("spawn|fork|notebook", str(options["strategy"])):
        raise ConfigError(f"trainer.strategy={options['strategy']}: returns the weights in a pickle. Allowed: ddp")
    if options["enable_progress_bar"] is None:  # on a terminal; a log file gets one line per epoch from History
        options["enable_progress_bar"] = sys.stderr.isatty()
    if options["enable_progress_bar"]:
        ours = [*ours, TQDMProgressBar(refresh_rate=10)]  # each refresh takes a tenth of a step
    if options["enable_model_summary"] is not False:
        ours = [*ours, ModelSummary(max_depth=-1)]
    # The guard comes first, so that no other callback acts on a loss that is not finite.
    ours = [NonFiniteGuard(), Health(), *([SkipNonFinite()] if on_nan == "skip" else []), *ours]
    ours += [build(spec, Callback, f"trainer.callbacks.{i}") for i, spec in enumerate(as_list(callbacks))]
    for kind, reason in REFUSED.items():
        if any(isinstance(callback, kind) for callback in ours):
            raise ConfigError(f"trainer.callbacks: {kind.__name__} {reason}")
    torch.set_float32_matmul_precision(matmul_precision)
    if compile:
        try:
            from vae_lightning.training.compiled import Compile

            ours.append(Compile())
        except ImportError as error:  # without that file
            log.warning("compile=true has no effect: %s", error)
    options["plugins"] = [AtomicCheckpointIO(run), *as_list(options["plugins"])]
    if not any(isinstance(callback, ModelCheckpoint) for callback in ours):
        options["enable_checkpointing"] = False  # or Lightning would add a ModelCheckpoint
    try:
        trainer = Trainer(**options, callbacks=ours, logger=loggers, default_root_dir=run.path)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if fast_loop:
        try:
            from vae_lightning.training.fast_loop import install

            install(trainer)
        except Exception as error:  # a new version of Lightning or PyTorch may change anything
            reason = " ".join(str(error).split())
            log.info("trainer.fast_loop: every step runs through Lightning's own loop: %s", reason)
    return trainer


def check_batches(trainer: Trainer, data: ImageDataModule) -> int:
    """Return the number of training batches in an epoch.

    Raises ConfigError for batch limits and validation intervals that Lightning refuses only when it reaches them.
    """
    images = {"train": data.train_images, "val": data.val_images, "test": data.test_images}
    counts = {split: -(-len(of_split) // (data.batch_size * trainer.world_size)) for split, of_split in images.items()}
    for split, count in counts.items():
        key = f"limit_{split}_batches"
        limit = getattr(trainer, key)
        if isinstance(limit, float) and count and 0 < limit < 1 / count:
            raise ConfigError(f"trainer.{key}={limit}: is less than one of {count} batches; at least {1 / count:.3g}")
    limit, every = trainer.limit_train_batches, getattr(trainer, "val_check_interval", None)  # unset for a time
    batches = int(counts["train"] * limit) if isinstance(limit, float) else min(counts["train"], limit)
    least, most = (1 / max(batches, 1), 1.0) if isinstance(every, float) else (1, batches)
    if trainer.check_val_every_n_epoch and counts["val"] and every is not None and not least <= every <= most:
        raise ConfigError(
            f"trainer.val_check_interval={every}: an epoch has {batches} batches; should be from {least:.3g} to {most}"
        )
    return batches


def check_schedule(trainer: Trainer, model: ImageModel, batches: int) -> None:
    """Raise ConfigError for a schedule of fewer steps than the run, which PyTorch refuses only when it is over.

    `batches` is the number of training batches in an epoch.
    """
    configured = model.configure_optimizers()
    schedule = configured[1][0] if isinstance(configured, tuple) else {}
    scheduler = schedule.get("scheduler")
    if not isinstance(scheduler, OneCycleLR):
        return
    per_epoch = -(-batches // trainer.accumulate_grad_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = min(epochs * per_epoch, math.inf if trainer.max_steps == -1 else trainer.max_steps)
    needed = steps if schedule["interval"] == "step" else min(epochs, steps // max(per_epoch, 1))
    if scheduler.total_steps < needed:
        end = "has no last one" if needed == math.inf else f"after {needed:.0f}"
        raise ConfigError(f"model.schedule: ends after {scheduler.total_steps} {schedule['interval']}s, the run {end}")


def check_monitors(trainer: Trainer, model: ImageModel, data: ImageDataModule, schedule: Spec | None) -> None:
    """Raise ConfigError if a callback or the schedule monitors a metric that this run does not log.

    Does nothing if the model or a callback is custom code, which may log any metric.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    packages = {type(part).__module__.partition(".")[0] for part in (model, *callbacks)}
    if not packages <= {"vae_lightning", "lightning"}:
        return
    with torch.no_grad(), torch.random.fork_rng([]):
        terms = model.eval().terms(data.train_images[:2].float() / 255, data.train_labels[:2])
    model.train()
    splits = ("train", "val") if trainer.limit_val_batches and data.val_size else ("train",)
    names = [f"{split}/{term}" for split in splits for term in terms]
    names += [f"health/{name}" for name in ("active_units", "kl_max", "kl_min")] if isinstance(model, VAE) else []
    monitors = {f"{type(callback).__name__}.monitor": getattr(callback, "monitor", None) for callback in callbacks}
    if schedule and str(schedule.get("_target_")).endswith("ReduceLROnPlateau"):
        monitors["model.schedule.monitor"] = schedule.get("monitor", "val/loss")
    for key, monitor in monitors.items():
        if monitor is not None and monitor not in names and not str(monitor).startswith("lr-"):
            raise ConfigError(
                f"{key}={monitor}: no such metric{did_you_mean(monitor, names)} Allowed: {', '.join(names)}"
            )


@contextlib.contextmanager
def user_errors(trainer: Trainer, batch_size: int, stop: StopRequest) -> Iterator[None]:
    """Turn errors of training that the user can fix into TrainingError or ConfigError, in one line.

    Every error that Lightning raises before the first step is one: a callback or an option that does not fit.
    """
    try:
        yield
    except (UserError, OSError):  # an OSError, such as that of a full disk, names its file
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if out_of_memory(error):
            raise TrainingError(
                f"out of memory at step {trainer.global_step + 1}: lower data.batch_size={batch_size} (half of it "
                "with trainer.accumulate_grad_batches=2 makes nearly the same steps), or the model's width or samples "
                f"({said[:150]})"
            ) from error
        if "returned nan values" in said:  # trainer.detect_anomaly
            raise TrainingError(f"became NaN at step {trainer.global_step + 1}: {said}") from error
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        by_lightning = f"{modules[-1]}.".startswith("lightning.") or "lightning.pytorch.callbacks" in "\n".join(modules)
        refused = isinstance(error, MisconfigurationException) or not stop.stepping or "arly stopping" in said
        if refused and by_lightning:
            raise ConfigError(f"trainer: {said}") from error
        raise


def as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def check_accelerator(name: str, devices: Any) -> None:
    """Raise ConfigError for an accelerator that Lightning does not know, or devices that this machine does not have."""
    kinds = AcceleratorRegistry.available_accelerators()
    known = ["auto", "gpu", *kinds]
    if name not in known:
        raise ConfigError(
            f"trainer.accelerator={name}: no such accelerator{did_you_mean(name, known)} Allowed: {', '.join(known)}"
        )
    if name == "cpu" and isinstance(devices, int) and devices > (cores := os.cpu_count() or 1):
        raise ConfigError(f"trainer.devices={devices}: one process per device, and this machine has {cores} cores")
    available = ["auto", *(kind for kind in kinds if AcceleratorRegistry[kind]["accelerator"].is_available())]
    if name not in available and not (name == "gpu" and {"cuda", "mps"} & {*available}):
        raise ConfigError(
            f"trainer.accelerator={name}: PyTorch finds none on this machine. Allowed: {', '.join(available)}"
        )
