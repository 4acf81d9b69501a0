"""Every experiment composes, trains and has the expected number of parameters."""

import json
from pathlib import Path

import pytest
from conftest import BRIEF, ROOT

from vae_lightning.training.train import train

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(experiment: str, config, tmp_path: Path) -> None:
    composed = config(f"experiment={experiment}", *BRIEF)
    assert composed["name"] == experiment
    tutorial = composed["data"]["pixels"] == "grey"  # the tutorials train on all 60,000 images
    assert (composed["data"]["val_size"] == 0) == tutorial
    metrics = train(composed, tmp_path / "run")
    assert metrics["steps"] == 2
    assert metrics["checkpoint"] == ("last" if tutorial else "best")
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        ("leaky_mlp_200", 1_189_984),
        ("deep_bayes_32", 187_648),
        ("relu_mlp_20", 652_824),
        ("squared_error_20", 652_824),
        ("pytorch_examples_20", 652_824),
    ],
)
def test_parameter_counts(experiment: str, parameters: int, config, tmp_path: Path) -> None:
    train(config(f"experiment={experiment}", "trainer.fast_dev_run=true"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["parameters"] == parameters


def test_a_misspelt_experiment_gets_the_nearest_name(command) -> None:
    refused = command("experiment=deep_bays")
    assert refused.code == 2
    assert "did you mean deep_bayes_32?" in refused.err
