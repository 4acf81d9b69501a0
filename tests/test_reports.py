"""The command `python report.py …`, and its tables."""

import csv
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from conftest import BRIEF, Finished

from vae_lightning.analysis.reports import differing_keys, find_results, learning_curve, read_result, tables
from vae_lightning.config import flatten
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.training.train import train

BERNOULLI = {"_target_": "vae_lightning.models.likelihoods.Bernoulli"}
MLP = {"_target_": "vae_lightning.models.backbones.MLP", "hidden": [400]}
CONV = {"_target_": "vae_lightning.models.backbones.Conv", "channels": [32, 64]}


@pytest.fixture
def report_py(script: Callable[..., Finished]) -> Callable[..., Finished]:
    return partial(script, "report.py")


def fake_run(directory: Path, loss: float, seed: int = 0, pixels: str = "grey", **model: Any) -> Path:
    """Write the files of a finished run that a report reads."""
    directory.mkdir(parents=True)
    spec = {
        "_target_": "vae_lightning.models.vae.VAE",
        "latent_dim": 2,
        "likelihood": BERNOULLI,
        "backbone": MLP,
        **model,
    }
    config = {"seed": seed, "name": "vae", "model": spec, "data": {"root": str(directory), "pixels": pixels}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"test/loss": loss, "test/elbo": -loss, "test/kl": loss / 4, "test/reconstruction": loss * 3 / 4}
    (directory / "metrics.json").write_text(json.dumps({**metrics, "data": "MNIST", "pixels": pixels, "seed": seed}))
    (directory / "history.csv").write_text(f"epoch,train/loss,val/loss\n1,{2 * loss},{2 * loss}\n2,{loss},{loss}\n")
    return directory


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    losses = {2: [150.0, 151.0, 155.0], 20: [100.0, 102.0, 101.5]}
    for d, values in losses.items():
        for seed, loss in enumerate(values):
            fake_run(tmp_path / f"{d}_{seed}", loss, seed, latent_dim=d)
    (table,) = tables(find_results([tmp_path])[0])
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
    (table,) = tables(find_results([tmp_path])[0])
    assert table.keys == ["model.schedule.T_max", "model.schedule"]
    assert sorted(row.values("test/loss") for row in table.rows) == [[100.0], [120.0], [121.0]]
    assert table.repeated == []


def test_equal_settings_are_one_row_and_equal_names_of_two_classes_are_not(tmp_path: Path) -> None:
    for seed, (beta, module) in enumerate(((1, "wide"), (1.0, "wide"), (1, "deep"))):
        backbone = {"_target_": f"{module}.MLP"}
        fake_run(tmp_path / str(seed), 100.0 + seed, seed, beta=beta, backbone=backbone)
    (table,) = tables(find_results([tmp_path])[0])
    rows = {row.settings["model.backbone"]: sorted(row.values("test/loss")) for row in table.rows}
    assert rows == {"deep.MLP": [102.0], "wide.MLP": [100.0, 101.0]}


def test_long_settings_are_rows_by_number_in_figures(tmp_path: Path) -> None:
    for number, widths in enumerate(([400] * 30, [300] * 30)):
        fake_run(tmp_path / str(number), 100.0, backbone={**MLP, "hidden": widths})
    (table,) = tables(find_results([tmp_path])[0])
    assert [row.label for row in table.rows] == ["row 1", "row 2"]


def test_colour_images_and_a_history_that_is_no_file(tmp_path: Path) -> None:
    run = RunDirectory(fake_run(tmp_path / "a", 100.0))
    metrics = json.loads(run.metrics_file.read_text())
    run.metrics_file.write_text(json.dumps(metrics | {"image_shape": [3, 32, 32]}))
    run.history_file.unlink()
    os.mkfifo(run.history_file)  # reading it would block
    assert read_result(run).protocol == "MNIST, colour pixels, Bernoulli"
    assert learning_curve(run) is None


def test_each_protocol_has_its_own_table(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", 100.0)
    fake_run(tmp_path / "b", 90.0, pixels="dynamic")
    fake_run(tmp_path / "c", 30.0, likelihood={"_target_": "vae_lightning.models.likelihoods.Gaussian"})
    found = tables(find_results([tmp_path])[0])
    assert [table.protocol for table in found] == [
        "MNIST, dynamic pixels, Bernoulli", "MNIST, grey pixels, Bernoulli", "MNIST, grey pixels, Gaussian",
    ]  # fmt: skip
    assert all(len(table.rows) == 1 and table.keys == [] for table in found)


def test_nll_with_other_sample_counts_has_its_own_column(tmp_path: Path) -> None:
    for name, samples in (("a", 500), ("b", 5000)):
        run = fake_run(tmp_path / name, 100.0, latent_dim=samples)
        evaluation = {"test/nll": 95.0, "test/nll_stderr": 0.2, "samples": samples, "data": "MNIST", "pixels": "grey"}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
    (table,) = tables(find_results([tmp_path])[0])
    assert table.metrics[-2:] == ["test/nll (k=500)", "test/nll (k=5000)"]
    run = tmp_path / "a"
    (run / "evaluation.json").write_text(
        json.dumps({"test/nll": 95.0, "samples": 500, "data": "MNIST", "pixels": "dynamic"})
    )
    with pytest.raises(RunError, match=r"metrics.json and evaluation.json differ in pixels"):
        read_result(RunDirectory(run))


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


def test_damaged_files_do_not_stop_a_report(report_py, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for n in range(3):
        fake_run(runs / f"good_{n}", 100.0 + n, n)
    damaged_files = {
        "nan": ("metrics.json", '{"test/loss": NaN, "data": "MNIST", "pixels": "grey"}'),
        "deep": ("metrics.json", "[" * 100_000),
        "likelihood": ("config.yaml", "{seed: 7, data: {}, model: {likelihood: [1], latent_dim: 2, x: $\\frac$}}"),
        "date": ("config.yaml", "{seed: 7, data: {}, model: {}, x: 2020-99-99}"),
        "huge": ("evaluation.json", f'{{"data": "MNIST", "pixels": "grey", "test/nll": {10**400}}}'),
        "history": ("history.csv", "epoch,val/loss\n1,1e308\n2,-1e308\n"),
        "short": ("history.csv", "val/loss,epoch\n1.0\n"),
        "long": ("history.csv", f"epoch,val/loss\n1,{'1' * 200_000}\n"),
    }
    for n, (name, (file, content)) in enumerate(damaged_files.items()):
        fake_run(runs / name, 200.0 + n, 10 + n, latent_dim=3 + n)
        (runs / name / file).write_text(content)
    result = report_py(runs, f"to={tmp_path / 'out'}")
    assert result.code == 0, result.err
    assert "101.00 ± 1.00" in result.out
    for name in ("deep", "date", "huge"):
        assert f"left out: {runs / name}: " in result.out


def test_figures_of_an_earlier_report_are_removed(report_py, tmp_path: Path) -> None:
    for n in range(2):
        fake_run(tmp_path / "runs" / str(n), 100.0 + n, latent_dim=2 + n)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.png").touch()
    assert report_py(tmp_path / "runs", f"to={tmp_path / 'out'}").code == 0
    assert (tmp_path / "out" / "1_rate_distortion.png").exists()
    assert report_py(tmp_path / "runs" / "0", f"to={tmp_path / 'out'}").code == 0
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"mine.png", "1_learning_curves.png"}


def test_the_later_of_two_equal_runs_is_used(tmp_path: Path) -> None:
    for name, loss, age in (("old", 100.0, 50), ("new", 90.0, 0)):
        run = fake_run(tmp_path / name, loss)
        then = time.time() - age
        os.utime(run / "metrics.json", (then, then))
    (table,) = tables(find_results([tmp_path])[0])
    assert [row.values("test/loss") for row in table.rows] == [[90.0]]
    assert [directory.name for directory in table.repeated] == ["old"]


def test_report_writes_tables_and_pictures(report_py, tmp_path: Path) -> None:
    losses = {("MLP", 2): (150, 152), ("MLP", 20): (100, 101), ("Conv", 2): (145, 146), ("Conv", 20): (95, 99)}
    for (backbone, d), values in losses.items():
        for seed, loss in enumerate(values):
            spec = MLP if backbone == "MLP" else CONV
            fake_run(tmp_path / "sweep" / f"{backbone}_{d}_{seed}", float(loss), seed, latent_dim=d, backbone=spec)
    (tmp_path / "sweep" / "unfinished").mkdir()
    (tmp_path / "sweep" / "unfinished" / "config.yaml").write_text("{model: {latent_dim: 3}, data: {}, seed: 0}\n")
    damaged = fake_run(tmp_path / "sweep" / "damaged", 1.0)
    (damaged / "metrics.json").write_text('{"test/loss": 1')
    result = report_py("sweep", "to=out")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "MNIST, grey pixels, Bernoulli"
    assert lines[-1] == "out"
    assert any("98.00" not in line and "Conv" in line and "97.00 ± 2.83" in line for line in lines)
    assert any(line.startswith("left out: sweep/unfinished: not finished") for line in lines)
    assert any(line.startswith("left out: sweep/damaged: metrics.json: cannot be read") for line in lines)
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
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"1_test_loss_against_model.latent_dim.png", "1_learning_curves.png", "1_rate_distortion.png"} <= pictures
    assert all(f"({name})" in markdown for name in pictures)
    assert "no picture of reconstructions" in result.out  # these runs have no checkpoints
    for style in ("latex", "csv"):
        assert report_py("sweep/MLP_2_0", "to=out", f"style={style}", "metrics=[test/kl]").code == 0


def test_one_figure_has_the_same_digits_from_every_run(report_py, config, tmp_path: Path) -> None:
    for d in (3, 5):
        train(config(f"model.latent_dim={d}", "model.backbone.hidden=[16]", "figures.every=0", *BRIEF),
              tmp_path / "runs" / str(d))  # fmt: skip
    result = report_py("runs", "to=out")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "1_reconstructions.png").exists()
    assert "latent_dim" in result.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["."], ".: no finished run found"),
        ([], "runs: missing; say report.py outputs"),
        (["runs", "metrics=[test/los]"], "metrics=test/los: no run has it; did you mean test/loss?"),
        (["runs", "style=excel"], "style=excel: should be 'terminal', 'markdown', 'csv' or 'latex'"),
        (["runs", "stile=csv"], "stile=csv: no such key; did you mean style?"),
    ],
)
def test_wrong_input_gets_one_clear_line(words: list[str], line: str, report_py, tmp_path: Path) -> None:
    if "runs" in words:
        fake_run(tmp_path / "runs" / "a", 100.0)
    result = report_py(*words)
    assert result.code == 2
    assert result.err.startswith(line)
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_hundreds_of_runs_take_seconds(tmp_path: Path) -> None:
    for i in range(200):
        run = fake_run(tmp_path / str(i // 20) / str(i), 100.0 + i, seed=i % 5, latent_dim=1 + i // 5)
        (run / "history.csv").unlink()
    started = time.monotonic()
    results, notes = find_results([tmp_path])
    (table,) = tables(results)
    assert (len(results), len(table.rows), notes) == (200, 40, [])
    assert time.monotonic() - started < 6  # half a second on two cores


def test_text_from_the_files_of_a_run_is_harmless(report_py, tmp_path: Path) -> None:
    for seed in (0, 1):
        evil = {
            "_target_": "a.MLP",
            "hidden": f"<script>{seed}</script> [x](http://evil) `rm` |",
            f"../$x{{{seed}": seed,
            "activation": f"=HYPERLINK(www.evil.org/{seed})",
        }
        likelihood = {"_target_": "a.Bernoulli\n\\input{x} <script>"}
        run = fake_run(
            tmp_path / "runs" / f"{seed}", 100.0, seed, backbone=evil, likelihood=likelihood, **{"../$": seed}
        )
        evaluation = {"test/nll": 9.0, "<script>/nll": 9.0, "samples": "<script>", "data": "MNIST", "pixels": "grey"}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
    forged = fake_run(tmp_path / "runs" / "forged", 1.0)
    metrics = json.loads((forged / "metrics.json").read_text())
    (forged / "metrics.json").write_text(json.dumps(metrics | {"data": "MNIST\n\n# Won", "test/[x](y)": 1.0}))
    report = report_py(tmp_path / "runs", "style=markdown")
    assert report.code == 0, report.err
    text = (tmp_path / "outputs" / "report" / "report.md").read_text()
    assert "metrics.json: data=" in text
    assert "1_test_loss_against_model..._.png" in text
    assert not [mark for mark in ("<script", "](http", "`rm`", "# Won", "\\input", "$", "www.") if mark in text]
    assert ",'=HYPERLINK(" in (tmp_path / "outputs" / "report" / "report.csv").read_text()
    assert "\\input" not in (tmp_path / "outputs" / "report" / "report.tex").read_text()


def test_a_reason_in_an_error_message_is_harmless(report_py, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "runs", 1.0)
    (run / "metrics.json").write_text(json.dumps({"epochs": "\x1b[31m", "unfinished": True}))
    report = report_py("runs")
    assert report.code == 2
    assert report.err.startswith("runs: no finished run found; left out: runs: not finished, ")
    assert "\x1b" not in report.err
