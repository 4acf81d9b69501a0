"""The optimizer and the schedule, from their specs."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from vae_lightning.config import ConfigError
from vae_lightning.models.optimization import make_optimizer, make_schedule
from vae_lightning.models.vae import VAE


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]


class Halved(SGD):
    """An optimizer of one's own: half the learning rate, and no weight decay."""

    def __init__(self, params, lr: float = 1.0) -> None:
        super().__init__(params, lr / 2)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "SGD"])
def test_every_optimizer_gets_learning_rate_and_weight_decay(name: str) -> None:
    optimizer = make_optimizer({"_target_": f"torch.optim.{name}"}, parameters(), 0.01, 0.1)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.1)
    assert optimizer.defaults.get("fused") == (None if name == "Adamax" else True)
    assert (
        make_optimizer({"_target_": f"torch.optim.{name}"}, parameters(), 0.01, fused=False).defaults.get("fused")
        is None
    )


def test_weight_decay_can_exclude_biases() -> None:
    spec = {"_target_": "torch.optim.AdamW"}
    groups = make_optimizer(spec, parameters(), 0.01, 0.1, decay_biases=False).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0.0)]
    assert groups[1]["params"][0].shape == (3,)
    assert len(make_optimizer(spec, parameters(), 0.01, 0.1).param_groups) == 1


def test_custom_optimizer() -> None:
    spec = {"_target_": "test_optimization.Halved"}
    assert make_optimizer(spec, parameters(), 0.5).param_groups[0]["lr"] == 0.25
    with pytest.raises(ConfigError, match=r"model\.weight_decay=0\.1: Halved has no weight decay\. Allowed: 0"):
        make_optimizer(spec, parameters(), 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"model\.optimizer\._target_=torch\.nn\.Linear: must be a subclass"):
        make_optimizer({"_target_": "torch.nn.Linear"}, parameters(), 0.5)
    with pytest.raises(ConfigError, match=r"model\.optimizer\.beta=1: no such key; did you mean betas"):
        make_optimizer({"_target_": "torch.optim.Adam", "beta": 1}, parameters(), 0.5)


def test_a_schedule_counts_epochs_or_steps() -> None:
    optimizer = Adam(parameters(), lr=0.1)
    milestones = {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1], "gamma": 0.1}
    assert make_schedule(milestones, optimizer)["interval"] == "epoch"
    warmup = {"_target_": "torch.optim.lr_scheduler.LinearLR", "interval": "step", "total_iters": 500}
    assert make_schedule(warmup, optimizer)["interval"] == "step"
    plateau = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 3}
    assert make_schedule(plateau, optimizer)["monitor"] == "val/loss"
    cycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": 10}
    with pytest.raises(ConfigError, match="interval: missing; OneCycleLR needs step or epoch"):
        make_schedule(cycle, optimizer)
    assert make_schedule(cycle | {"interval": "step"}, optimizer)["interval"] == "step"
    with pytest.raises(ConfigError, match="interval=batch: should be epoch or step"):
        make_schedule(milestones | {"interval": "batch"}, optimizer)
    with pytest.raises(ConfigError, match=r"model\.schedule\.total_iters=-1: should be greater than or equal to 1"):
        make_schedule(warmup | {"total_iters": -1}, optimizer)
    with pytest.raises(ConfigError, match=r"model\.schedule\.milestone=3: no such key"):
        make_schedule(milestones | {"milestone": 3}, optimizer)


def test_model_configures_optimizer_and_schedule() -> None:
    spec = {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1], "gamma": 0.1}
    (optimizer,), (schedule,) = VAE(2, learning_rate=0.01, schedule=spec).configure_optimizers()
    optimizer.step()
    schedule["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
