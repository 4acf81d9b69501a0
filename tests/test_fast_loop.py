import sys
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import SMALL, checkpoint, differences, events, history
from lightning.pytorch import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.callbacks import NonFiniteGuard
from vae_lightning.training.train import train
from vae_lightning.training.trainer import TRAINER_DEFAULTS, make_trainer


@pytest.fixture
def lightning_steps(monkeypatch) -> list[int]:
    """The steps after which Lightning calls its callbacks."""
    steps: list[int] = []
    original = NonFiniteGuard.on_train_batch_end

    def noted(self, trainer, *rest):
        steps.append(trainer.global_step)
        original(self, trainer, *rest)

    monkeypatch.setattr(NonFiniteGuard, "on_train_batch_end", noted)
    return steps


class Watcher(Callback):
    steps: ClassVar[list[int]] = []

    def on_train_batch_end(self, trainer, *rest) -> None:
        self.steps.append(trainer.global_step)


class Logging(VAE):
    """A model that logs its own metric at each step."""

    def training_step(self, batch, batch_index):
        self.log("train/mine", float(self.trainer.global_step), on_step=True, on_epoch=True)
        return {"loss": super().training_step(batch, batch_index)}


class OfBatchAlone(VAE):
    """A model whose training_step takes no batch index and skips every fifth batch."""

    def training_step(self, batch):
        self.seen = getattr(self, "seen", 0) + 1
        return super().training_step(batch, 0) if self.seen % 5 else None


class Hooked(VAE):
    def on_before_optimizer_step(self, optimizer) -> None:
        self.seen = getattr(self, "seen", 0) + 1


def read_results(directory: Path) -> tuple[dict, list[dict[str, str]]]:
    """Return the last checkpoint and the history of a run, without paths and times."""
    last = checkpoint(directory)
    del last["callbacks"], last["progress"]
    return last, history(directory)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.pixels=dynamic", "model.objective.warmup_epochs=1.5", "model/schedule=steps"],
        ["trainer.val_check_interval=7", "trainer.gradient_clip_val=0.1"],
        ["trainer.max_steps=31", "model.objective.warmup_epochs=3", "model/prior=vamp", "model.prior.pseudo_inputs=4"],
        ["trainer.precision=bf16-mixed", "model.weight_decay=0.01"],
        ["model/likelihood=gaussian"],  # it has a parameter without gradient
        ["model._target_=test_fast_loop.OfBatchAlone"],
        [
            "model.optimizer._target_=torch.optim.LBFGS",
            "~model.optimizer.betas",
            "~model.optimizer.eps",
            "+model.optimizer.max_iter=2",
        ],
    ],
)
def test_fast_steps_give_the_same_bits(config, tmp_path: Path, lightning_steps: list[int], overrides) -> None:
    found, counts = [], []
    for fast in ("false", "true"):
        run = tmp_path / fast
        train(config(*SMALL, *overrides, f"trainer.fast_loop={fast}"), run)
        found.append(read_results(run))
        counts.append(len(lightning_steps))
        lightning_steps.clear()
    (slow, slow_rows), (fast, fast_rows) = found
    assert fast_rows == slow_rows
    assert differences(slow, fast) == []
    assert slow["global_step"] == counts[0] in (46, 31)
    assert counts[1] < 10  # Lightning's hooks ran only a few times


def deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vae_lightning.training.fast_loop", None)  # an import of it fails


def other_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_TrainingEpochLoop, "advance", lambda self, data_fetcher, more: None)


@pytest.mark.parametrize("change", [deleted, other_signature])
def test_unknown_lightning_loop_falls_back_with_one_log_line(change, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with caplog.at_level("INFO"):
        trainer = make_trainer(RunDirectory("."), [], [], **TRAINER_DEFAULTS | {"accelerator": "cpu"})
    assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    (line,) = [r.message for r in caplog.records if "fast_loop" in r.message]
    assert line.startswith("trainer.fast_loop: every step runs through Lightning's own loop: ")


def test_metrics_that_a_model_logs_itself(config, tmp_path: Path) -> None:
    for together in (1, 10):
        train(
            config(*SMALL, "model._target_=test_fast_loop.Logging", f"trainer.log_every_n_steps={together}"),
            tmp_path / str(together),
        )
    alone, many = (events(tmp_path / run) for run in ("1", "10"))
    assert [(e.step, e.value) for e in many.Scalars("train/mine_step")] == [(n, n) for n in (9, 19, 29, 39)]
    assert [e.value for e in many.Scalars("train/mine_epoch")] == [11, 34]
    assert [e.value for e in alone.Scalars("train/mine_epoch")] == [11, 34]
    assert [float(row["train/mine_epoch"]) for row in history(tmp_path / "10")] == [11, 34]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["trainer.callbacks=[{_target_: test_fast_loop.Watcher}]"], "the callback Watcher acts at each step"),
        (["trainer=ema"], "the callback EMA acts at each step"),
        (["model._target_=test_fast_loop.Hooked"], "the model's or data's on_before_optimizer_step acts at each step"),
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2"),
        (["trainer.profiler=simple"], "trainer.profiler=SimpleProfiler"),
    ],
)
def test_hooks_of_each_step_disable_the_fast_loop(config, tmp_path, lightning_steps, caplog, overrides, reason) -> None:
    Watcher.steps.clear()
    with caplog.at_level("INFO"):
        train(config(*SMALL, *overrides), tmp_path / "run")
    assert len(lightning_steps) == 46
    assert not Watcher.steps or list(range(1, 47)) == Watcher.steps
    lines = [r.message for r in caplog.records if "fast_loop" in r.message]
    assert lines == [f"trainer.fast_loop: every step runs through Lightning's own loop: {reason}"]
