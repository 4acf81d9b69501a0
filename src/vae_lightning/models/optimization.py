"""The optimizer, the learning-rate schedule and averaged weights.

`model/optimizer` chooses the optimizer, which gets `model.learning_rate` and `model.weight_decay`. To add one, name its
class in a YAML file in conf/model/optimizer/. An argument of the schedule with the value `auto` is the length of the
run, in epochs or optimizer steps. A resumed run keeps the length that it started with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from inspect import signature
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, WeightAveraging
from pydantic import Field
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_avg_fn

from vae_lightning.config import ConfigError, NonNegativeInt, Spec, build, locate
from vae_lightning.models.metrics import MONITOR, better

log = logging.getLogger(__name__)

LENGTHS = ("T_max", "T_0", "total_steps", "total_iters", "step_size")  # arguments of PyTorch's schedules


def make_optimizer(
    spec: Spec,
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float = 0.0,
    decay_biases: bool = True,
    fused: bool = True,
) -> Optimizer:
    """Return the optimizer of `spec`.

    Without `decay_biases`, parameters of fewer than two dimensions (biases, normalization) get no weight decay. `fused`
    allows the fused implementation, which is faster and computes the same update. Raises ConfigError if the spec is
    invalid.
    """
    target = locate(spec.get("_target_"), Optimizer, "model.optimizer._target_")
    takes = signature(target).parameters
    given: dict[str, Any] = {"lr": learning_rate}
    if "weight_decay" in takes:
        given["weight_decay"] = weight_decay
    elif weight_decay:
        raise ConfigError(f"model.weight_decay={weight_decay}: {target.__name__} has no weight decay. Allowed: 0")
    if not (weight_decay or decay_biases):
        raise ConfigError("model.decay_biases=false: has no effect without model.weight_decay")
    if fused and "fused" in takes and not {"fused", "foreach"} & set(spec) and issubclass(target, Adam | AdamW | SGD):
        given["fused"] = True
    groups: list[Any] = list(parameters)
    if weight_decay and not decay_biases:
        groups = [
            {"params": [p for p in groups if p.ndim > 1]},
            {"params": [p for p in groups if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return build(spec, Optimizer, "model.optimizer", params=groups, **given)


def run_length(trainer: Trainer, interval: str) -> int | None:
    """Return the number of epochs or optimizer steps (`interval`) of a run; None if nothing but time limits it.

    An epoch that trainer.max_steps cuts short counts. Do not call it before a resumed run trains: it sets up the data
    loader, and Lightning would then forget the position in the epoch.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < float("inf"):
        return None
    trainer.fit_loop.setup_data()  # with trainer.max_epochs=-1 the number of batches is not known yet
    per_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
    return int(steps if interval == "step" else -(-steps // per_epoch))


def make_schedule(
    spec: Spec, optimizer: Optimizer, learning_rate: float, length: int | None = None, trainer: Trainer | None = None
) -> dict[str, Any]:
    """Return the learning-rate schedule of `spec`, in the format of Lightning's `configure_optimizers`.

    `interval` in the spec is `epoch` (the default) or `step`. Arguments with the value `auto`, and `T_max` and
    `total_steps` by default, are `length`, that of the run in this unit. `max_lr` is `learning_rate`. `monitor` is the
    metric of ReduceLROnPlateau. Raises ConfigError if the spec is invalid, or needs the length of a run without one.
    """
    target = locate(spec.get("_target_"), LRScheduler, "model.schedule._target_")
    takes, plateau = signature(target).parameters, issubclass(target, ReduceLROnPlateau)
    if "interval" not in spec and issubclass(target, OneCycleLR | CyclicLR):
        raise ConfigError(f"model.schedule.interval: missing; {target.__name__} needs step or epoch")
    interval, allowed = spec.get("interval", "epoch"), ["epoch"] if plateau else ["epoch", "step"]
    if interval not in allowed:
        raise ConfigError(f"model.schedule.interval={interval}: should be {' or '.join(allowed)}")
    if "monitor" in spec and not plateau:
        raise ConfigError(f"model.schedule.monitor={spec['monitor']}: {target.__name__} follows no metric")
    frequency, options = plateau_options(spec, trainer) if plateau else (1, {})
    options |= {key: "auto" for key in ("T_max", "total_steps") if key in takes and "epochs" not in spec}
    options |= {key: value for key, value in spec.items() if key not in ("interval", "monitor")}
    automatic = [key for key, value in options.items() if value == "auto"]
    if automatic and not length:
        needed = "a number, trainer.max_epochs or trainer.max_steps"
        raise ConfigError(f"model.schedule.{automatic[0]}=auto: nothing but time limits the run; set {needed}")
    if automatic and trainer and any(isinstance(c, Timer) for c in trainer.callbacks):  # type: ignore[attr-defined]
        log.warning("model.schedule is made for %d %ss; a run that trainer.max_time ends is shorter", length, interval)
    options |= dict.fromkeys(automatic, length)
    for key in LENGTHS:
        if isinstance(options.get(key), int) and options[key] < 1:
            raise ConfigError(f"model.schedule.{key}={options[key]}: should be greater than or equal to 1")
    if "max_lr" in takes and (peak := options.setdefault("max_lr", learning_rate)) != learning_rate:
        raise ConfigError(f"model.schedule.max_lr={peak}: is model.learning_rate={learning_rate}; set only that key")
    scheduler = build(options, LRScheduler, "model.schedule", optimizer=optimizer)
    return {
        "scheduler": scheduler,
        "interval": interval,
        "frequency": frequency,
        "monitor": spec.get("monitor", MONITOR),
    }


def plateau_options(spec: Spec, trainer: Trainer | None) -> tuple[int, dict[str, Any]]:
    """Return the epochs between two values of the metric of ReduceLROnPlateau, and its mode. Raises ConfigError."""
    monitor = spec.get("monitor", MONITOR)
    mode = better(monitor, spec.get("mode"), "model.schedule", trainer is None or trainer.enable_validation)
    every = trainer.check_val_every_n_epoch if trainer and monitor.startswith("val/") else 1
    if every is None:
        raise ConfigError("trainer.check_val_every_n_epoch=null: ReduceLROnPlateau acts at the end of epochs")
    # A relative threshold has the wrong sign for a negative metric, such as the ELBO.
    return every, {"mode": mode} | ({"threshold_mode": "abs"} if mode == "max" else {})


def check_lengths(trainer: Trainer, objective: Spec) -> None:
    """Warn of a schedule or warm-up that does not end with the run. Raises ConfigError for a shorter OneCycleLR."""
    ends = [("model.objective.warmup_epochs", objective.get("warmup_epochs", 0), "epoch")]
    for config in trainer.lr_scheduler_configs:
        of_schedule = vars(config.scheduler)
        for key in (*LENGTHS, "milestones"):
            if end := of_schedule.get(key):
                ends.append((f"model.schedule.{key}", max(end) if key == "milestones" else end, config.interval))
    for key, end, unit in ends:
        length, name = run_length(trainer, unit), key.rpartition(".")[2]
        if length is None:
            continue
        if name == "total_steps" and end < length:
            raise ConfigError(f"{key}={end}: the run has {length} {unit}s, and a OneCycleLR cannot be shorter")
        unreached = end >= length if name in ("milestones", "step_size") else end > length
        if unreached or (name == "T_max" and end < length):
            log.warning("%s=%s: does not end with the run, which has %d %ss", key, end, length, unit)


class EMA(WeightAveraging):
    """Average the weights exponentially over about 1 / (1 − decay) steps: for validation, checkpoints and the test.

    Until `start` steps are done, the average is the trained weights themselves.
    """

    def __init__(self, decay: Annotated[float, Field(ge=0, lt=1)] = 0.999, start: NonNegativeInt = 0) -> None:
        average = get_ema_avg_fn(decay)
        super().__init__(avg_fn=lambda old, new, steps: torch.where(steps < start, new, average(old, new, steps)))
        self.start, self.span = start, round(1 / (1 - decay))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if (steps := run_length(trainer, "step")) and steps < self.start + self.span:
            log.warning("EMA: averages %d steps from step %d on; the run has %d", self.span, self.start, steps)
