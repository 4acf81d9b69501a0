"""The command `vae report …`, and its tables."""

import csv
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import BRIEF, MLP, Finished
from helpers import change_json, fake_run

from vae_lightning.analysis.reports import Table, differing_keys, find_results, tables
from vae_lightning.config import flatten
from vae_lightning.files import write_json
from vae_lightning.training.train import train

CONV = {"_target_": "vae_lightning.models.backbones.Conv", "channels": [32, 64]}


@pytest.fixture
def report(script: Callable[..., Finished]) -> Callable[..., Finished]:
    return partial(script, "vae", "report")


def only_table(directory: Path) -> Table:
    (table,) = tables(find_results([directory])[0])
    return table


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    losses = {2: [150.0, 151.0, 155.0], 20: [100.0, 102.0, 101.5]}
    for d, values in losses.items():
        for seed, loss in enumerate(values):
            fake_run(tmp_path / f"{d}_{seed}", loss, seed, latent_dim=d)
    table = only_table(tmp_path)
    assert table.protocol == "MNIST, grey pixels, Bernoulli"
    assert table.keys == ["model.latent_dim"]
    assert table.metrics == ["test/loss", "test/kl", "test/reconstruction"]  # test/elbo is the negative loss
    assert [row.settings for row in table.rows] == [{"model.latent_dim": 2}, {"model.latent_dim": 20}]
    for row, values in zip(table.rows, losses.values(), strict=True):
        assert sorted(row.values("test/loss")) == sorted(values)


def test_a_part_that_is_null_in_some_runs_is_a_difference(tmp_path: Path) -> None:
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 3}
    fake_run(tmp_path / "a", 100.0, seed=0, schedule=None)
    fake_run(tmp_path / "b", 120.0, seed=1, schedule=cosine)
    fake_run(tmp_path / "c", 121.0, seed=0, schedule=cosine | {"T_max": 4})
    table = only_table(tmp_path)
    assert table.keys == ["model.schedule.T_max", "model.schedule"]
    assert sorted(row.values("test/loss") for row in table.rows) == [[100.0], [120.0], [121.0]]
    assert table.repeated == []


def test_equal_settings_are_one_row_and_equal_names_of_two_classes_are_not(tmp_path: Path) -> None:
    for seed, (beta, module) in enumerate(((1, "wide"), (1.0, "wide"), (1, "deep"))):
        fake_run(tmp_path / str(seed), 100.0 + seed, seed, beta=beta, backbone={"_target_": f"{module}.MLP"})
    rows = {row.settings["model.backbone"]: sorted(row.values("test/loss")) for row in only_table(tmp_path).rows}
    assert rows == {"deep.MLP": [102.0], "wide.MLP": [100.0, 101.0]}


def test_each_protocol_has_its_own_table(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", 100.0)
    fake_run(tmp_path / "b", 90.0, pixels="dynamic")
    fake_run(tmp_path / "c", 30.0, likelihood={"_target_": "vae_lightning.models.likelihoods.Gaussian"})
    change_json(fake_run(tmp_path / "d", 99.0) / "metrics.json", image_shape=[3, 32, 32])
    found = tables(find_results([tmp_path])[0])
    assert [table.protocol for table in found] == [
        "MNIST, colour pixels, Bernoulli", "MNIST, dynamic pixels, Bernoulli", "MNIST, grey pixels, Bernoulli",
        "MNIST, grey pixels, Gaussian",
    ]  # fmt: skip
    assert all(len(table.rows) == 1 and table.keys == [] for table in found)


def test_nll_with_other_sample_counts_has_its_own_column(tmp_path: Path) -> None:
    evaluation = {"test/nll": 95.0, "test/nll_stderr": 0.2, "data": "MNIST", "pixels": "grey"}
    for samples in (500, 5000):
        run = fake_run(tmp_path / str(samples), 100.0, latent_dim=samples)
        write_json(run / "evaluation.json", evaluation | {"samples": samples})
    assert only_table(tmp_path).metrics[-2:] == ["test/nll (k=500)", "test/nll (k=5000)"]
    change_json(run / "evaluation.json", pixels="dynamic")
    _, notes = find_results([tmp_path])
    assert notes == [f"left out: {run}: metrics.json and evaluation.json differ in pixels"]


def test_arguments_are_compared_between_runs_with_the_same_class() -> None:
    def config(backbone: dict[str, Any], d: int = 2) -> dict[str, Any]:
        return {"model.latent_dim": d, "seed": d} | {f"model.backbone.{key}": v for key, v in backbone.items()}

    assert differing_keys([config(MLP), config(CONV)]) == ["model.backbone._target_"]
    assert differing_keys([config(MLP), config(MLP | {"hidden": [9]})]) == ["model.backbone.hidden"]
    assert differing_keys([config(MLP), config(CONV), config(CONV | {"channels": [8]}, d=5)]) == [
        "model.latent_dim", "model.backbone._target_", "model.backbone.channels",
    ]  # fmt: skip
    saving = [{"test": test, "trainer": {"checkpoint_every": every}} for test, every in ((True, 3), (False, None))]
    assert differing_keys([flatten(changed) for changed in saving]) == [], "these change no number"


def test_the_later_of_two_equal_runs_is_used(tmp_path: Path) -> None:
    for name, loss, age in (("old", 100.0, 50), ("new", 90.0, 0)):
        run = fake_run(tmp_path / name, loss)
        then = time.time() - age
        os.utime(run / "metrics.json", (then, then))
    table = only_table(tmp_path)
    assert [row.values("test/loss") for row in table.rows] == [[90.0]]
    assert table.repeated == [f"left out: {tmp_path}/old: a later run has the same configuration and seed"]


def test_report_writes_tables_and_figures(report, tmp_path: Path) -> None:
    losses = {("MLP", 2): (150, 152), ("MLP", 20): (100, 101), ("Conv", 2): (145, 146), ("Conv", 20): (95, 99)}
    for (backbone, d), values in losses.items():
        for seed, loss in enumerate(values):
            spec = MLP if backbone == "MLP" else CONV
            fake_run(tmp_path / "sweep" / f"{backbone}_{d}_{seed}", float(loss), seed, latent_dim=d, backbone=spec)
    (fake_run(tmp_path / "sweep" / "unfinished", 1.0) / "metrics.json").unlink()
    (fake_run(tmp_path / "sweep" / "damaged", 1.0) / "metrics.json").write_text('{"test/loss": 1')
    (tmp_path / "sweep" / "MLP_2_0" / "history.csv").write_text("epoch,val/loss\n1,inf\n2,nan\n")
    result = report("sweep", "--to", "out")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "MNIST, grey pixels, Bernoulli"
    assert lines[-1] == "out"
    assert any("Conv" in line and "97.00 ± 2.83" in line for line in lines)
    assert "left out: sweep/unfinished: not finished, it has no metrics.json" in lines
    assert any(line.startswith("left out: sweep/damaged/metrics.json: cannot be read") for line in lines)
    with (tmp_path / "out" / "report.csv").open() as file:
        rows = {(row["model.backbone"], row["model.latent_dim"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4
    for (backbone, d), values in losses.items():
        row = rows[backbone, str(d)]
        assert (float(row["test/loss"]), float(row["test/loss std"])) == pytest.approx((mean(values), stdev(values)))
        assert row["runs"] == "2"
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "model.latent_dim |" in markdown
    assert "\\toprule" in (tmp_path / "out" / "report.tex").read_text()
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"1_test_loss_against_model.latent_dim.png", "1_learning_curves.png", "1_rate_distortion.png"} <= drawn
    assert all(f"({name})" in markdown for name in drawn)
    assert "no figure of reconstructions" in result.out  # these runs have no checkpoints
    for style, first in (("latex", "% MNIST"), ("csv", "protocol,")):
        assert report("sweep/MLP_2_0", "--style", style, "--metrics", "test/kl").out.startswith(first)


def test_one_figure_has_the_same_digits_from_every_run(report, config, tmp_path: Path) -> None:
    for d in (3, 5):
        words = (f"model.latent_dim={d}", "model.backbone.hidden=[16]", "figures.every=0", *BRIEF)
        train(config(*words), tmp_path / "runs" / str(d))
    result = report("runs", "--to", "out")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "1_reconstructions.png").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: no such run directory"),
        (["."], ".: contains no run"),
        (["runs", "--metrics", "test/los"], "metrics=test/los: no run has it; did you mean test/loss?"),
    ],
)
def test_wrong_input_gets_one_clear_line(words: list[str], line: str, report, tmp_path: Path) -> None:
    if "runs" in words:
        fake_run(tmp_path / "runs" / "a", 100.0)
    result = report(*words)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(line)
    assert not (tmp_path / "outputs").exists()
