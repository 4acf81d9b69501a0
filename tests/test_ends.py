"""The end of a run: why it stopped, and that the weights of the best validation are saved, tested and loaded."""

import json
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import DATA, SMALL, checkpoint
from lightning.pytorch import Callback

from vae_lightning.config import ConfigError
from vae_lightning.models.metrics import BETTER, better
from vae_lightning.runs.loading import load_run
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train

# Three epochs of 20 steps.
WORDS = [
    *SMALL, "data._target_=helpers.Few", f"data.root={DATA}", "data.batch_size=20", "data.val_size=100", "logger=none",
    "trainer.limit_train_batches=null", "trainer.max_epochs=3", "model.backbone.hidden=[4]", "figures.pairs=1",
]  # fmt: skip
Weights = dict[str, torch.Tensor]


class Witness(Callback):
    """Note the weights of each step, each validation and the test; send SIGTERM once at one of these places."""

    trained: ClassVar[dict[int, Weights]] = {}
    validated: ClassVar[dict[int, tuple[float, Weights]]] = {}
    tested: ClassVar[Weights] = {}
    armed: ClassVar[bool] = False

    def __init__(self, stop_at: str = "", step: int = 30) -> None:
        self.stop_at, self.step = stop_at, step

    def stop(self, place: str, trainer: Any) -> None:
        if Witness.armed and self.stop_at == place and trainer.global_step >= self.step:
            Witness.armed = False
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        self.trained[trainer.global_step] = copied(module)
        self.stop("training", trainer)

    def on_validation_batch_start(self, trainer, module, *rest) -> None:
        self.weights = copied(module)
        self.stop("validation", trainer)

    def on_validation_end(self, trainer, module) -> None:
        self.validated[trainer.global_step] = (trainer.callback_metrics["val/loss"].item(), self.weights)

    def on_test_start(self, trainer, module) -> None:
        Witness.tested = copied(module)


def copied(module) -> Weights:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-7) for name in a.keys() | b.keys())


def average(start: int, step: int) -> Weights:
    """Return the moving average of decay 0.9 after a step, computed from the weights of all steps."""
    found = Witness.trained[1]
    for n in range(2, step + 1):
        new = Witness.trained[n]
        found = new if n <= start else {name: 0.9 * found[name] + 0.1 * new[name] for name in new}
    return found


EMA = "{_target_: vae_lightning.models.optimization.EMA, decay: 0.9, start: %d}"
# The best validation is that of the first epoch.
EXPLODING = "model.schedule={_target_: torch.optim.lr_scheduler.MultiStepLR, milestones: [1], gamma: 1e6}"
EARLY = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/%s, patience: 1, min_delta: 1e4}"


@pytest.mark.parametrize(
    ("callback", "words", "stopped", "last"),
    [
        ("", [EXPLODING], "max_epochs", 60),
        ("", ["trainer.max_steps=31"], "max_steps", 31),
        ("", ["trainer.max_time={milliseconds: 300}", "trainer.max_epochs=9999"], "max_time", None),
        (EARLY % "elbo", [], "early stopping in epoch 2: Monitored metric val/elbo did not improve in th", 40),
        (EARLY % "loss", ["trainer.val_check_interval=15"], "early stopping in epoch 2: Monitored metric val/lo", 35),
        (EMA % 0, [], "max_epochs", 60),
        (EMA % 25, ["trainer.max_steps=31"], "max_steps", 31),
        (EMA % 1000, [], "max_epochs", 60),
        (EMA % 5, ["training"], "max_epochs", 60),
        (EMA % 5, ["validation"], "max_epochs", 60),
        ("", ["validation"], "max_epochs", 60),
    ],
)  # fmt: skip
def test_the_weights_of_the_best_validation_are_saved_tested_and_loaded(
    callback: str, words: list[str], stopped: str, last: int | None, config, tmp_path: Path, caplog
) -> None:
    Witness.trained.clear()
    Witness.validated.clear()
    place = next((word for word in words if "=" not in word), "")
    words = [word for word in words if "=" in word]
    witness, run = f"{{_target_: test_ends.Witness, stop_at: '{place}'}}", tmp_path / "run"
    composed = config(*WORDS, f"trainer.callbacks=[{', '.join(filter(None, [callback, witness]))}]", *words)
    Witness.armed = bool(place)
    if place:
        with pytest.raises(Interrupted):
            train(composed, run)
        assert "Interrupted: stopped by SIGTERM after step " in (run / "train.log").read_text()
    with caplog.at_level("INFO"):
        metrics = train(composed, run, resume=bool(place))

    assert metrics["stopped"].startswith(stopped)
    assert f"training stopped: {metrics['stopped']}" in caplog.text
    assert f"training stopped: {metrics['stopped']}" in (run / "train.log").read_text()
    assert metrics == json.loads((run / "metrics.json").read_text())
    assert last in (metrics["steps"], None)
    assert metrics["steps"] in Witness.validated  # the last weights
    best = min(Witness.validated, key=lambda step: Witness.validated[step][0])
    if last is not None:  # max_time may end a run one step after a validation, whose loss may be the better one
        assert best == (20 if EXPLODING in words else last)
    assert metrics["checkpoint_steps"] == best == checkpoint(run, "best")["global_step"]
    expected = Witness.trained[best]
    if callback.startswith(EMA[:40]):
        expected = average(int(callback.rpartition(" ")[2].rstrip("}")), best)
    loaded = load_run(run).state_dict()
    for weights in (Witness.validated[best][1], checkpoint(run, "best")["state_dict"], Witness.tested, loaded):
        assert same(weights, expected)


def test_every_metric_of_a_run_has_a_mode_or_needs_one() -> None:
    assert {metric: better(f"val/{metric}") for metric in BETTER} == BETTER
    assert better("health/active_units") == "max"
    assert better("val/kl", "min") == "min"


def test_half_precision_that_a_cpu_does_not_have_is_refused(config, tmp_path: Path) -> None:
    words = [*WORDS, "trainer.accelerator=cpu", "trainer.precision=16-mixed"]
    with pytest.raises(ConfigError, match=r"trainer\.precision=16-mixed: Lightning needs a GPU for it"):
        train(config(*words), tmp_path / "run")


def test_the_ema_says_what_the_run_is_too_short_for(config, tmp_path: Path, caplog) -> None:
    train(config(*WORDS, "trainer=ema", "trainer.fast_dev_run=2", "trainer.accelerator=cpu"), tmp_path / "run")
    assert "EMA: averages 1000 steps from step 0 on; the run has 2" in caplog.text


def test_a_warm_up_that_the_run_is_too_short_for_is_reported(config, tmp_path: Path, caplog) -> None:
    train(config(*WORDS, "trainer.max_steps=5", "model.objective.warmup_epochs=50"), tmp_path / "run")
    assert "model.objective.warmup_epochs=50: does not end with the run, which has 1 epochs" in caplog.text
