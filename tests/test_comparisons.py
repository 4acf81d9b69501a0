"""The command `vae compare …`: paired differences between configurations, and refusals."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BRIEF, Finished
from helpers import change_json, fake_run
from matplotlib.figure import Figure
from torch import Tensor

from vae_lightning.analysis.comparisons import paired_difference
from vae_lightning.analysis.evaluation import evaluate_run, write_evaluation
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.train import train


@pytest.fixture
def compare(script: Callable[..., Finished]) -> Callable[..., Finished]:
    return partial(script, "vae", "compare")


def evaluated(
    directory: Path, values: list[float], seed: int = 0, samples: int = 5, split: str = "test", **changed: Any
) -> Path:
    """A finished run with an evaluation of images with these log likelihoods, and standard errors of 0.1."""
    pixels = changed.pop("pixels", "grey")
    model = changed.pop("model", {})
    if not directory.exists():
        fake_run(directory, 100.0, seed, pixels, **model)
    content = {
        f"{split}/nll": -sum(values) / len(values),
        "samples": samples,
        "seed": 0,
        "checkpoint": "best",
        "split": split,
    }
    content |= {"data": "MNIST", "pixels": pixels, "quantity": "log density", "images": len(values)}
    table = torch.tensor([[value, 0.1] for value in values])
    run = RunDirectory(directory)
    write_evaluation(run, content | {"images_sha256": "a1"} | changed, table, Figure())
    return directory


def runs_of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_paired_standard_error_is_that_of_the_differences() -> None:
    baseline = runs_of([[-80.0, -300.0, -20.0, -150.0]])
    of_runs, of_configurations = paired_difference(baseline + runs_of([[1.0, 2.0, 3.0, 4.0]]), baseline)
    assert of_configurations is None
    assert (of_runs.mean, of_runs.stderr) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    half = 3.182446 * of_runs.stderr  # Student's t with 3 degrees of freedom
    assert (of_runs.low, of_runs.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert paired_difference(baseline, baseline)[0] == (0, 0, 0, 0)


def test_two_seeds_a_side_add_the_variance_over_seeds() -> None:
    images = runs_of([[-80.0, -300.0, -20.0, -150.0]])
    of_runs, of_configurations = paired_difference(images + runs_of([[10.0], [12.0]]), images + runs_of([[5.0], [7.0]]))
    assert of_runs == pytest.approx((5, 0, 5, 5))  # each image differs by 5
    t = 4.302653  # of 2 degrees of freedom: the variances of the two means, 1 and 1, have one each
    assert of_configurations == pytest.approx((5, math.sqrt(2), 5 - t * math.sqrt(2), 5 + t * math.sqrt(2)))


def test_configurations_of_a_sweep_are_compared_with_that_of_its_first_job(compare, tmp_path: Path) -> None:
    images = [-80.0, -300.0, -20.0, -150.0]
    for job, (d, seed, gain) in enumerate([(20, 0, 0.0), (20, 1, 1.0), (2, 0, 4.0), (2, 1, 6.0)]):
        values = [value + gain + (job > 1) * n / 10 for n, value in enumerate(images)]
        evaluated(tmp_path / "sweep" / str(job), values, seed, model={"latent_dim": d})
    result = compare("sweep", "--to", "out")
    assert result.code == 0, result.err
    heading, *lines, last = result.out.splitlines()
    assert heading == "MNIST, grey pixels: log density of 4 test images, 5 importance samples, nats per image"
    baseline, other = (line.split() for line in lines[2:4])
    assert baseline == ["sweep:", "latent_dim", "20", "2", "-137.00", "±", "0.71"]
    assert other[:9] == ["sweep:", "latent_dim", "2", "2", "-132.35", "±", "1.41", "+4.650", "0.065"]
    assert other[-2:] == ["100", "%"]
    assert last == "out"
    assert any(line.startswith("no figures: ") for line in lines)  # these runs have no checkpoints
    assert not any("one seed" in line for line in lines)
    assert "| sweep: latent_dim 2" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_largest_common_number_of_samples_is_used(compare, tmp_path: Path) -> None:
    for samples, gain in ((5, 0.0), (50, 9.0)):
        evaluated(tmp_path / "a", [-80.0 + gain, -90.0], samples=samples)
    evaluated(tmp_path / "b", [-79.0, -89.0])
    result = compare("a", "b")
    assert result.code == 0, result.err
    assert "5 importance samples" in result.out
    assert "+1.000" in result.out
    assert "one seed on a side" in result.out
    evaluated(tmp_path / "b", [-72.0, -91.0], samples=50)
    (tmp_path / "b" / "evaluation.csv").write_text("log_likelihood,stderr\n-72,2\n-91,2\n")
    assert "estimates are low by about 0.005 (a) and 2.000 (b)" in compare("a", "b").out
    (tmp_path / "b" / "evaluation.csv").write_text("log_likelihood,stderr\n-72,nan\n-91,nan\n")
    assert "one importance sample: estimates are low by an unknown amount" in compare("a", "b").out


B = [-79.0, -89.0]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"pixels": "dynamic"}, "b: MNIST, dynamic pixels, but a: MNIST, grey pixels; the two cannot be compared"),
        ({"quantity": "negative cross-entropy"}, "b: quantity=negative cross-entropy, but a has quantity=log density"),
        ({"data": "KMNIST"}, "b: KMNIST, grey pixels, but a: MNIST, grey pixels; the two cannot be compared"),
        ({"values": [*B, -9.0]}, "b: images=3, but a has images=2; the two cannot be compared"),
        ({"images_sha256": "b2"}, "b: images_sha256=b2, but a has images_sha256=a1; the two cannot be compared"),
        ({"samples": 3}, "b: no log likelihoods of each test image with 5 importance samples, as for the others; "
                         "run vae evaluate b --samples 5"),
        ({"split": "val"}, "b: no log likelihoods of each test image with 5 importance samples"),
        ({"checkpoint": "last"}, "b: no log likelihoods of each test image with 5 importance samples"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused(changed: dict[str, Any], line: str, compare, tmp_path: Path) -> None:
    evaluated(tmp_path / "a", [-80.0, -90.0])
    evaluated(tmp_path / "b", **{"values": B, **changed})
    if "data" in changed:
        change_json(tmp_path / "b" / "metrics.json", data=changed["data"])
    result = compare("a", "b")
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert result.err.startswith(line)
    assert not (tmp_path / "outputs").exists()


def test_conditional_runs_with_different_likelihoods_can_be_compared(compare, tmp_path: Path) -> None:
    gaussian = {"_target_": "vae_lightning.models.likelihoods.Gaussian"}
    evaluated(tmp_path / "a", [-80.0, -90.0], model={"conditional": True})
    evaluated(tmp_path / "b", B, model={"conditional": True, "likelihood": gaussian})
    assert compare("a", "b").out.startswith("MNIST, grey pixels, given the label: log density of 2 test images")


def test_runs_without_an_evaluation_get_the_commands_to_run(compare, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fake_run(tmp_path / name, 100.0)
    wanted = "run vae evaluate a b --split val\n"
    assert compare("a", "b", "--split", "val").err == f"a, b: no log likelihoods of each val image; {wanted}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("-79.0,0.1\n", "should have 2 rows, at least 2, and has 1"),
        ("-79.0,0.1\nx,0.1\n", "could not convert string 'x'"),
        ("-79.0,0.1\n-98.0,0.1\n", "its mean nll is 88.500000, but that in evaluation.json is 84.000000"),
    ],
)
def test_a_damaged_file_of_values_is_refused(text: str, line: str, compare, tmp_path: Path) -> None:
    for name in ("a", "b"):
        evaluated(tmp_path / name, B)
    (tmp_path / "b" / "evaluation.csv").write_text(f"log_likelihood,stderr\n{text}")
    result = compare("a", "b")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(f"b/evaluation.csv: cannot be used ({line}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: no such run directory"),
        (["a"], "a: one configuration only; name the baseline first, then the runs to compare"),
        (["a", "empty"], "empty: contains no run"),
    ],
)
def test_wrong_input_gets_one_clear_line(words: list[str], line: str, compare, tmp_path: Path) -> None:
    evaluated(tmp_path / "a", B)
    (tmp_path / "empty").mkdir()
    result = compare(*words)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(line)


def test_evaluated_runs_get_a_figure(compare, config, tmp_path: Path) -> None:
    train(config("model.latent_dim=3", "model.backbone.hidden=[16]", "data.val_size=60", *BRIEF), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    nll = [
        evaluate_run(tmp_path / name, split="val", samples=3, seed=seed, probes=False, accelerator="cpu")["val/nll"]
        for seed, name in enumerate("ab")
    ]
    result = compare("a", "b", "a", "--split", "val", "--to", "out")
    assert result.code == 0, result.err
    assert "negative cross-entropy of 60 val images" in result.out
    assert f"{nll[0] - nll[1]:+.3f}" in result.out
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"comparison_1.png", "comparison_2.png"}
    assert "(comparison_2.png)" in (tmp_path / "out" / "comparison.md").read_text()
