"""Lightning's Trainer, built from the configuration under `trainer`."""

from __future__ import annotations

import logging
import re
import sys
from inspect import signature
from typing import Any, Literal

import torch
from hydra.core.config_store import ConfigStore
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vae_lightning.config import ConfigError, NonNegative, PositiveInt, build, check_arguments
from vae_lightning.models.metrics import better
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.callbacks import Health, NonFiniteGuard, SkipNonFinite
from vae_lightning.training.checkpoints import AtomicCheckpointIO

log = logging.getLogger(__name__)

# Trainer arguments that `train` sets itself, and two without effect: nothing is predicted or uploaded.
OURS = ("logger", "callbacks", "default_root_dir", "limit_predict_batches", "model_registry")
# All other arguments of Lightning's Trainer with their defaults. conf/trainer/default.yaml builds on these, so that
# `trainer.limit_train_batches=10` works and `trainer.limit_trian_batches=10` is refused.
TRAINER_DEFAULTS = {
    name: parameter.default for name, parameter in signature(Trainer).parameters.items() if name not in OURS
}
ConfigStore.instance().store(group="trainer", name="lightning", node=TRAINER_DEFAULTS)
# Refused callbacks of Lightning: pruning, scheduled accumulation and SWA do not resume exactly, and the finders train
# with another batch size or learning rate than the configuration says.
REFUSED = (
    *(BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder, ModelPruning, StochasticWeightAveraging),
)


def make_trainer(
    run: RunDirectory,
    ours: list[Callback],
    loggers: list[Logger],
    *,
    callbacks: Any = None,
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
        "accumulate_grad_batches": accumulate_grad_batches,
        "gradient_clip_val": gradient_clip_val,
        "check_val_every_n_epoch": check_val_every_n_epoch,
        "precision": precision,
        # Lightning would keep what an earlier job of the sweep has set.
        "deterministic": options.get("deterministic") or False,
        "benchmark": options.get("benchmark") or False,
    }
    check_arguments(Trainer, options, "trainer")
    if on_nan == "skip" and str(precision) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.on_nan=skip: trainer.precision={precision} skips such updates itself. Allowed: stop"
        )
    if options["gradient_clip_algorithm"] and not gradient_clip_val:
        raise ConfigError("trainer.gradient_clip_algorithm: has no effect without trainer.gradient_clip_val")
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
    validates = options["limit_val_batches"] != 0
    ours += [make_callback(spec, f"trainer.callbacks.{i}", validates) for i, spec in enumerate(as_list(callbacks))]
    if refused := [type(callback).__name__ for callback in ours if isinstance(callback, REFUSED)]:
        raise ConfigError(f"trainer.callbacks: {refused[0]} does not resume, or trains with other settings than these")
    torch.set_float32_matmul_precision(matmul_precision)
    if compile:
        from vae_lightning.training.compiled import Compile  # here, so that the file can be deleted

        ours.append(Compile())
    options["plugins"] = [AtomicCheckpointIO(), *as_list(options["plugins"])]
    if not any(isinstance(callback, ModelCheckpoint) for callback in ours):
        options["enable_checkpointing"] = False  # or Lightning would add a ModelCheckpoint
    try:
        trainer = Trainer(**options, callbacks=ours, logger=loggers, default_root_dir=run.path)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if trainer.precision == "bf16-mixed" and str(precision) in ("16", "16-mixed"):
        raise ConfigError(f"trainer.precision={precision}: Lightning needs a GPU for it. Allowed here: bf16-mixed")
    if fast_loop:
        try:
            from vae_lightning.training.fast_loop import install

            install(trainer)
        except Exception as error:  # a new version of Lightning or PyTorch may change anything
            reason = " ".join(str(error).split())
            log.info("trainer.fast_loop: every step runs through Lightning's own loop: %s", reason)
    return trainer


def make_callback(spec: Any, key: str, validates: bool) -> Callback:
    """Build a configured callback; one that monitors a metric gets the mode of that metric. Raises ConfigError."""
    callback = build(spec, Callback, key)
    if isinstance(callback, WeightAveraging) and not callback.should_update(step_idx=0):
        advice = "use {_target_: vae_lightning.models.optimization.EMA, start: STEPS}"
        raise ConfigError(f"{key}: averages untrained weights until it starts; {advice}")
    if (metric := getattr(callback, "monitor", None)) and hasattr(callback, "mode"):
        takes = signature(type(callback)).parameters
        mode = better(metric, spec.get("mode") if "mode" in takes else callback.mode, key, validates)
        # EarlyStopping acts after a validation by default, where there is no new metric of training yet.
        options = {"check_on_train_epoch_end": None if metric.startswith("val/") else True} | spec | {"mode": mode}
        callback = build({k: value for k, value in options.items() if k in {*takes, *spec}}, Callback, key)
    return callback


def as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
