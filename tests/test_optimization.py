"""The optimizer and the schedule, from their specs."""

import pytest
import torch
from conftest import DATA, MLP
from helpers import Few
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LRScheduler

from vae_lightning.config import ConfigError
from vae_lightning.models.optimization import make_optimizer, make_schedule
from vae_lightning.models.vae import VAE


def schedule(name: str, **arguments: object) -> dict[str, object]:
    return {"_target_": f"torch.optim.lr_scheduler.{name}"} | arguments


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
    with pytest.raises(ConfigError, match=r"model\.decay_biases=false: has no effect without model\.weight_decay"):
        make_optimizer({"_target_": "torch.optim.AdamW"}, parameters(), 0.01, decay_biases=False)
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
    milestones = schedule("MultiStepLR", milestones=[1], gamma=0.1)
    assert make_schedule(milestones, optimizer, 0.1)["interval"] == "epoch"
    warmup = schedule("LinearLR", interval="step", total_iters=500)
    assert make_schedule(warmup, optimizer, 0.1)["interval"] == "step"
    assert make_schedule(schedule("OneCycleLR", interval="step", total_steps=10), optimizer, 0.1)["interval"] == "step"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (schedule("OneCycleLR", total_steps=10), "interval: missing; OneCycleLR needs step or epoch"),
        (schedule("MultiStepLR", milestones=[1], interval="batch"), "interval=batch: should be epoch or step"),
        (schedule("ReduceLROnPlateau", interval="step"), "interval=step: should be epoch"),
        (
            schedule("LinearLR", total_iters=-1),
            r"model\.schedule\.total_iters=-1: should be greater than or equal to 1",
        ),
        (schedule("MultiStepLR", milestones=[1], milestone=3), r"model\.schedule\.milestone=3: no such key"),
        (
            schedule("MultiStepLR", milestones=[1], monitor="val/loss"),
            "monitor=val/loss: MultiStepLR follows no metric",
        ),
        (schedule("CosineAnnealingLR"), "T_max=auto: nothing but time limits the run; set a number"),
        (schedule("OneCycleLR", total_steps=9, max_lr=0.2, interval="step"), "max_lr=0.2: is model.learning_rate=0.1"),
        (
            schedule("ReduceLROnPlateau", monitor="val/elbo", mode="min"),
            "mode=min: val/elbo has better .* Allowed: max",
        ),
        (schedule("ReduceLROnPlateau", monitor="val/los"), "needs model.schedule.mode, .*did you mean val/loss"),
    ],
)
def test_an_invalid_schedule_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule(spec, Adam(parameters(), lr=0.1), 0.1)


def test_a_plateau_is_of_the_better_values() -> None:
    optimizer = Adam(parameters(), lr=0.1)
    for monitor, mode, threshold in (("val/loss", "min", "rel"), ("val/elbo", "max", "abs")):
        plateau = make_schedule(schedule("ReduceLROnPlateau", monitor=monitor), optimizer, 0.1)
        assert plateau["monitor"] == monitor
        assert (plateau["scheduler"].mode, plateau["scheduler"].threshold_mode) == (mode, threshold)
    own = make_schedule(schedule("ReduceLROnPlateau", monitor="val/mine", mode="max"), optimizer, 0.1)
    assert own["scheduler"].mode == "max"


@pytest.fixture(scope="module")
def data() -> Few:
    """Five batches of 100 images per epoch."""
    few = Few(root=str(DATA), batch_size=100, val_size=0)
    few.setup()
    return few


def fitted(data: Few, spec: dict[str, object], **options) -> LRScheduler:
    """Return the schedule after a run."""
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    } | options
    trainer = Trainer(**options, enable_model_summary=False)
    trainer.fit(VAE(2, MLP, schedule=spec), data)
    return trainer.lr_scheduler_configs[0].scheduler


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"max_epochs": 3}, 15, 3),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, 3),
        ({"max_epochs": 3, "limit_train_batches": 0.5, "accumulate_grad_batches": 2}, 3, 3),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6, 2),
        ({"max_epochs": 9, "max_steps": 7}, 7, 2),
        ({"max_epochs": -1, "max_steps": 10}, 10, 2),
    ],
    ids=str,
)
def test_a_schedule_ends_with_the_run(options: dict, steps: int, epochs: int, data: Few, caplog) -> None:
    for interval, length in (("step", steps), ("epoch", epochs)):
        cosine = fitted(data, schedule("CosineAnnealingLR", interval=interval), **options)
        assert cosine.T_max == length
        if options.get("max_steps") != 7 or interval == "step":  # the last epoch was not completed
            assert cosine.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    cycle = fitted(data, schedule("OneCycleLR", interval="step"), **options)
    assert (cycle.total_steps, cycle.optimizer.param_groups[0]["max_lr"]) == (steps, 1e-3)
    assert not [record for record in caplog.records if "model.schedule" in record.message]


def test_a_schedule_needs_a_run_of_fixed_length(data: Few, caplog) -> None:
    cosine, hour = schedule("CosineAnnealingLR"), {"max_time": "00:01:00:00"}
    with pytest.raises(ConfigError, match="T_max=auto: nothing but time limits the run"):
        fitted(data, cosine, max_epochs=-1, **hour)
    assert fitted(data, cosine, max_epochs=1, **hour).T_max == 1
    assert "model.schedule is made for 1 epochs; a run that trainer.max_time ends is shorter" in caplog.text


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (schedule("MultiStepLR", milestones=[1, 2]), "milestones=2: does not end with the run, which has 2 epochs"),
        (
            schedule("LinearLR", total_iters=500, interval="step"),
            "total_iters=500: does not end with the run, which has 10",
        ),
        (schedule("CosineAnnealingLR", T_max=1), "T_max=1: does not end with the run, which has 2 epochs"),
    ],
)
def test_a_schedule_that_does_not_end_with_the_run_is_reported(spec, line: str, data: Few, caplog) -> None:
    fitted(data, spec, max_epochs=2)
    assert [record.message for record in caplog.records if line in record.message]
    with pytest.raises(ConfigError, match="total_steps=9: the run has 10 steps, and a OneCycleLR cannot be shorter"):
        fitted(data, schedule("OneCycleLR", total_steps=9, interval="step"), max_epochs=2)


def test_model_configures_optimizer_and_schedule() -> None:
    spec = schedule("MultiStepLR", milestones=[1], gamma=0.1)
    (optimizer,), (config,) = VAE(2, learning_rate=0.01, schedule=spec).configure_optimizers()
    optimizer.step()
    config["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
