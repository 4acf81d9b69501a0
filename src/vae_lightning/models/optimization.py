"""The optimizer and the learning-rate schedule.

`model/optimizer` chooses the optimizer, which gets `model.learning_rate` and `model.weight_decay`. To add one, name its
class in a YAML file in conf/model/optimizer/.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from vae_lightning.config import ConfigError, Spec, build, locate


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
    if fused and "fused" in takes and not {"fused", "foreach"} & set(spec) and issubclass(target, Adam | AdamW | SGD):
        given["fused"] = True
    groups: list[Any] = list(parameters)
    if weight_decay and not decay_biases:
        groups = [
            {"params": [p for p in groups if p.ndim > 1]},
            {"params": [p for p in groups if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return build(spec, Optimizer, "model.optimizer", params=groups, **given)


def make_schedule(spec: Spec, optimizer: Optimizer) -> dict[str, Any]:
    """Return the learning-rate schedule of `spec`, in the format of Lightning's `configure_optimizers`.

    `interval` in the spec is `epoch` (the default) or `step`. `monitor` is the metric of ReduceLROnPlateau. Raises
    ConfigError if the spec is invalid.
    """
    for key in ("T_max", "T_0", "total_steps", "step_size", "total_iters"):  # -1 by trainer.max_epochs=-1
        if isinstance(spec.get(key), int) and spec[key] < 1:
            raise ConfigError(f"model.schedule.{key}={spec[key]}: should be greater than or equal to 1")
    options = {key: spec[key] for key in ("interval", "monitor") if key in spec}
    scheduler = build(
        {key: value for key, value in spec.items() if key not in options},
        LRScheduler,
        "model.schedule",
        optimizer=optimizer,
    )
    if "interval" not in options and isinstance(scheduler, OneCycleLR | CyclicLR):
        raise ConfigError(f"model.schedule.interval: missing; {type(scheduler).__name__} needs step or epoch")
    interval = options.get("interval", "epoch")
    if interval not in ("epoch", "step"):
        raise ConfigError(f"model.schedule.interval={interval}: should be epoch or step")
    return {"scheduler": scheduler, "interval": interval, "monitor": options.get("monitor", "val/loss")}
