"""Lightning's Trainer, built from the configuration under `trainer`."""

from __future__ import annotations

import logging
import os
import re
import sys
from inspect import signature
from typing import Annotated, Any, Literal

import torch
from hydra.core.config_store import ConfigStore
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pydantic import Field

from vae_lightning.config import ConfigError, NonNegative, PositiveInt, Spec, build, check_arguments, did_you_mean
from vae_lightning.data.module import ImageDataModule
from vae_lightning.models.base import ImageModel
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.callbacks import Health, NonFiniteGuard, SkipNonFinite
from vae_lightning.training.checkpoints import AtomicCheckpointIO

log = logging.getLogger(__name__)

OURS = ("logger", "callbacks", "default_root_dir")  # Trainer arguments that `train` fills in itself
# Every other argument of Lightning's Trainer, with Lightning's default: conf/trainer/default.yaml builds on these, so
# that `trainer.limit_train_batches=10` works and `trainer.limit_trian_batches=10` does not.
TRAINER_DEFAULTS = {
    name: parameter.default for name, parameter in signature(Trainer).parameters.items() if name not in OURS
}
ConfigStore.instance().store(group="trainer", name="lightning", node=TRAINER_DEFAULTS)


def make_trainer(
    run: RunDirectory,
    ours: list[Callback],
    loggers: list[Logger],
    *,
    callbacks: Any = None,
    max_epochs: Annotated[int, Field(ge=-1)] | None = None,
    accumulate_grad_batches: PositiveInt = 1,
    gradient_clip_val: NonNegative | None = None,
    check_val_every_n_epoch: PositiveInt | None = 1,
    precision: Literal["32-true", "32", 32, "bf16-mixed", "bf16", "16-mixed", "16", 16] | None = None,
    on_nan: Literal["stop", "skip"] = "stop",
    fast_loop: bool = True,
    **options: Any,
) -> Trainer:
    """Lightning's Trainer with our callbacks and the user's own; `options` are its other arguments.

    Those that are named here are not Lightning's, or have ranges that it does not check. Raises ConfigError.
    """
    options |= {
        "max_epochs": max_epochs,
        "accumulate_grad_batches": accumulate_grad_batches,
        "gradient_clip_val": gradient_clip_val,
        "check_val_every_n_epoch": check_val_every_n_epoch,
        "precision": precision,
    }
    check_arguments(Trainer, options, "trainer")
    check_accelerator(options["accelerator"], options["devices"])
    if re.search("spawn|fork|notebook", str(options["strategy"])):
        raise ConfigError(f"trainer.strategy={options['strategy']}: hands the weights back by a pickle. Allowed: ddp")
    if options["enable_progress_bar"] is None:  # a bar on a terminal; in a file, the line an epoch that History writes
        options["enable_progress_bar"] = sys.stderr.isatty()
    if options["enable_progress_bar"]:
        ours = [*ours, TQDMProgressBar(refresh_rate=10)]  # a refresh costs a tenth of a step
    if options["enable_model_summary"] is not False:
        ours = [*ours, ModelSummary(max_depth=-1)]
    # The guard comes first, so that nothing else acts on a loss that is not finite.
    ours = [NonFiniteGuard(), Health(), *([SkipNonFinite()] if on_nan == "skip" else []), *ours]
    ours += [build(spec, Callback, f"trainer.callbacks.{i}") for i, spec in enumerate(as_list(callbacks))]
    options["plugins"] = [AtomicCheckpointIO(run), *as_list(options["plugins"])]
    if not any(isinstance(callback, ModelCheckpoint) for callback in ours):
        options["enable_checkpointing"] = False  # or Lightning would add one of its own
    try:
        trainer = Trainer(**options, callbacks=ours, logger=loggers, default_root_dir=run.path)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if fast_loop:
        use_fast_loop(trainer)
    return trainer


def check_batches(options: dict[str, Any], data: ImageDataModule, world_size: int) -> None:
    """Raise ConfigError for fractions and intervals of batches that Lightning refuses only when it comes to them."""
    together = data.batch_size * world_size
    images = {"train": data.train_images, "val": data.val_images, "test": data.test_images}
    counts = {split: -(-len(of_split) // together) for split, of_split in images.items()}
    for split, count in counts.items():
        key, limit = f"limit_{split}_batches", options.get(f"limit_{split}_batches")
        if isinstance(limit, float) and count and 0 < limit < 1 / count:
            raise ConfigError(f"trainer.{key}={limit}: is less than one of {count} batches; at least {1 / count:.3g}")
    limit, every = options.get("limit_train_batches"), options.get("val_check_interval")
    batches = counts["train"]
    if limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    within = options.get("check_val_every_n_epoch") is not None and not options.get("overfit_batches")
    least, most = (1 / max(batches, 1), 1.0) if isinstance(every, float) else (1, batches)
    if within and counts["val"] and isinstance(every, int | float) and not least <= every <= most:
        raise ConfigError(
            f"trainer.val_check_interval={every}: an epoch has {batches} batches; should be from {least:.3g} to {most}"
        )


def check_monitors(trainer: Trainer, model: ImageModel, data: ImageDataModule, schedule: Spec | None) -> None:
    """Raise ConfigError where a callback or the schedule waits for a metric that this run will not have.

    Only where the model and all callbacks are known: code of one's own may log what it likes.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = (type(part).__module__.partition(".")[0] for part in (model, *callbacks))
    if not set(known) <= {"vae_lightning", "lightning"}:
        return
    with torch.no_grad(), torch.random.fork_rng([]):
        terms = model.eval().terms(data.train_images[:2].float() / 255, data.train_labels[:2])
    model.train()
    splits = ("train", "val") if trainer.limit_val_batches and data.val_size else ("train",)
    names = [f"{split}/{term}" for split in splits for term in terms]
    waits = {f"{type(callback).__name__}.monitor": getattr(callback, "monitor", None) for callback in callbacks}
    if schedule and str(schedule.get("_target_")).endswith("ReduceLROnPlateau"):
        waits["model.schedule.monitor"] = schedule.get("monitor", "val/loss")
    for key, monitor in waits.items():
        if monitor is not None and monitor not in names and not monitor.startswith(("health/", "lr-")):
            raise ConfigError(
                f"{key}={monitor}: no such metric{did_you_mean(monitor, names)} Allowed: {', '.join(names)}"
            )


def use_fast_loop(trainer: Trainer) -> None:
    """Put the fast loop in place of Lightning's own; where it does not fit, say so and leave Lightning's."""
    try:
        from vae_lightning.training.fast_loop import install

        install(trainer)
    except Exception as reason:  # whatever a new version of Lightning or PyTorch changes
        log.info("trainer.fast_loop: steps run through Lightning's own loop: %s", " ".join(str(reason).split()))


def as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def check_accelerator(name: str, devices: Any) -> None:
    """Raise ConfigError for an accelerator that Lightning does not know, or devices that this machine does not have."""
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if name not in known:
        raise ConfigError(
            f"trainer.accelerator={name}: no such accelerator{did_you_mean(name, known)} Allowed: {', '.join(known)}"
        )

    def there(kind: str) -> bool:
        return bool(AcceleratorRegistry[kind]["accelerator"].is_available())

    if name == "cpu" and isinstance(devices, int) and devices > (cores := os.cpu_count() or 1):
        raise ConfigError(f"trainer.devices={devices}: a process each, and this machine has {cores} cores")
    if name != "auto" and not (there("cuda") or there("mps") if name == "gpu" else there(name)):
        here = ["auto", *(kind for kind in AcceleratorRegistry.available_accelerators() if there(kind))]
        raise ConfigError(f"trainer.accelerator={name}: PyTorch finds none on this machine. Allowed: {', '.join(here)}")
