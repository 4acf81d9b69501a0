"""Train, stop, resume, evaluate and report runs with pairs of settings that each work alone.

PAIRS=300 PAIRS_SEED=7 pytest -m proof tests/test_pairs.py draws other pairs than make proof does.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
from itertools import combinations
from pathlib import Path

import pytest
from conftest import DATA, SMALL, differences, read_results

from vae_lightning.analysis.evaluation import evaluate_run
from vae_lightning.analysis.reports import find_results
from vae_lightning.training.checkpoints import Progress

WORDS = [
    *SMALL, "data._target_=helpers.Few", f"data.root={DATA}", "data.batch_size=20", "data.val_size=100",
    "trainer.accelerator=cpu", "trainer.limit_train_batches=null", "trainer.limit_test_batches=null",
    "figures.samples=[1,2]", "figures.pairs=1",
]  # fmt: skip
# Settings of one row exclude each other.
SETTINGS = {
    "objective": ["model/objective=iwae", "model/objective=dreg", "model.objective.warmup_epochs=1.5",
                  "model.objective.free_bits=0.05", "model.objective.kl=monte_carlo"],
    "beta": ["model.beta=0.5", "model.beta=0"],
    "model": ["model=autoencoder"],
    "prior": ["model/prior=vamp model.prior.pseudo_inputs=4", "model/prior=flow model.prior.hidden=[8]",
              "model/prior=mixture model.prior.components=5"],
    "posterior": ["model/posterior=flow model.posterior.hidden=[8]", "model/posterior=full_covariance"],
    "likelihood": ["model/likelihood=gaussian", "model/likelihood=continuous_bernoulli",
                   "model/likelihood=gaussian model.likelihood.learn_scale=true model.likelihood.mean=identity",
                   "model/likelihood=gaussian model.likelihood.scale=per_pixel",
                   "model/likelihood=discretized_logistic",
                   "model/likelihood=logistic_mixture model.likelihood.components=2"],
    "backbone": ["model/backbone=conv model.backbone.channels=[4]", "model.backbone.batch_norm=true"],
    "bias": ["model.data_bias=true"],
    "labels": ["model.conditional=true"],
    "dimension": ["model.latent_dim=1", "model.latent_dim=2"],
    "pixels": ["data.pixels=dynamic", "data.pixels=fixed"],
    "held out": ["data.val_size=0"],
    "batch": ["data.batch_size=37", "data.batch_size=400"],
    "optimizer": ["model/optimizer=adamw model.weight_decay=0.1 model.decay_biases=false",
                  "model/optimizer=sgd model.learning_rate=1e-5", "model/optimizer=adamax"],
    "schedule": ["model/schedule=cosine", "model/schedule=cosine model.schedule.interval=step", "model/schedule=warmup",
                 "model.schedule={_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, patience: 0}"],
    "precision": ["trainer.precision=bf16-mixed"],
    "accumulation": ["trainer.accumulate_grad_batches=3"],
    "clipping": ["trainer.gradient_clip_val=1", "trainer.gradient_clip_val=0.1 trainer.gradient_clip_algorithm=value"],
    "callbacks": ["trainer=ema", "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]",
                  "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss}]"],
    "loop": ["trainer.fast_loop=false", "trainer.compile=true"],
    "nan": ["trainer.on_nan=skip"],
    "validation": ["trainer.val_check_interval=7", "trainer.check_val_every_n_epoch=2", "trainer.limit_val_batches=0"],
    "steps": ["trainer.max_steps=31", "trainer.overfit_batches=4", "trainer.limit_train_batches=0.5"],
    "logging": ["trainer.log_every_n_steps=3", "logger=[csv,tensorboard]", "figures.every=1"],
    "saving": ["trainer.checkpoint_every=4", "trainer.checkpoint_every=1s"],
}  # fmt: skip
# Pairs that failed in the past, and one of settings whose state must be saved between two steps.
FOUND = [
    ("trainer=ema", "trainer.fast_loop=false"),  # the test used other weights than the checkpoint's
    (SETTINGS["schedule"][-1], "trainer.checkpoint_every=4"),  # a resumed epoch was not counted
    (SETTINGS["prior"][0], "trainer.val_check_interval=7"),
    (SETTINGS["schedule"][1], "data.pixels=dynamic"),  # Lightning forgets the position in the data that it measures
]
MANY, SEED = int(os.environ.get("PAIRS", "200")), int(os.environ.get("PAIRS_SEED", "0"))


def draw(number: int, seed: int) -> list[tuple[str, str]]:
    pairs = [(a, b) for one, two in combinations(SETTINGS.values(), 2) for a in one for b in two]
    return random.Random(seed).sample(pairs, min(number, len(pairs)))


@pytest.mark.parametrize(
    "pair",
    [*FOUND, *(pytest.param(pair, marks=pytest.mark.proof) for pair in draw(MANY, SEED + 1))],
    ids="  ".join,
)
def test_pairs_work_together(pair: tuple[str, str], command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, *(word for setting in pair for word in split(setting))]
    if any("model/backbone=conv" in setting for setting in pair):
        words.remove("model.backbone.hidden=[16]")
    uninterrupted = command(*words, "hydra.run.dir=uninterrupted")
    assert uninterrupted.code in ((0,) if pair in FOUND else (0, 2)), uninterrupted.err
    if uninterrupted.code == 2:
        assert len([line for line in uninterrupted.err.splitlines() if "Warning" not in line]) == 1, uninterrupted.err
        assert not [path for path in (tmp_path / "uninterrupted").rglob("*") if path.is_file()]
        return

    metrics = json.loads((tmp_path / "uninterrupted" / "metrics.json").read_text())
    with (tmp_path / "uninterrupted" / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    for found in (metrics, *rows):
        for split_name in ("train", "val", "test"):
            part = {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{split_name}/")}
            assert all(math.isfinite(value) for value in part.values()), part
            if "elbo" in part:
                assert part["elbo"] == pytest.approx(-part["reconstruction"] - part["kl"], rel=1e-5)

    due, stop_at = Progress.due, random.Random(str(pair)).randint(1, int(metrics["steps"]) - 1)

    def stopping(self: Progress, trainer, batch: int) -> tuple[bool, bool]:
        if trainer.global_step >= stop_at:
            self.stop.name = self.stop.name or "SIGTERM"
        return due(self, trainer, batch)

    monkeypatch.setattr(Progress, "due", stopping)
    stopped = command(*words, "hydra.run.dir=run")
    monkeypatch.undo()
    # 0: it finished before it could stop
    assert stopped.code in ((75,) if pair in FOUND else (0, 75)), stopped.err
    if stopped.code == 75:
        resumed = command("resume=run")
        assert resumed.code == 0, resumed.err
    if not any("1s" in setting for setting in pair):
        one, two = read_results(tmp_path / "uninterrupted"), read_results(tmp_path / "run")
        for found in (one, two):  # a resumed run starts another file
            found["files"] = [name for name in found["files"] if not name.startswith("csv/")]
        assert differences(one, two) == []

    if "model=autoencoder" not in pair:
        evaluated = evaluate_run(str(tmp_path / "run"), samples=20, probes=False)
        assert math.isfinite(evaluated["test/nll"])
    results, notes = find_results([tmp_path])
    assert (len(results), notes) == (2, [])


def split(setting: str) -> list[str]:
    """Split a setting into words; a setting with a dictionary is one word."""
    return [setting] if "{" in setting else setting.split()
