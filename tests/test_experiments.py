"""Every experiment builds, trains and has the expected number of parameters."""

from pathlib import Path
from typing import Any

import pytest
from conftest import BRIEF, ROOT

from vae_lightning.config import build
from vae_lightning.models.base import ImageModel
from vae_lightning.runs.environment import count_parameters
from vae_lightning.training.train import train

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
COLOUR = ("cifar10", "photos")


# From the published systems.
PARAMETERS = {
    "leaky_mlp_200": 1_189_984,
    "deep_bayes_32": 187_648,
    "relu_mlp_20": 652_824,
    "squared_error_20": 652_824,
    "pytorch_examples_20": 652_824,
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds(experiment: str, config) -> None:
    composed = config(f"experiment={experiment}")
    assert composed["name"] == experiment
    assert (composed["data"]["val_size"] == 0) == is_tutorial(composed)
    model = build(
        composed["model"], ImageModel, "model", image_shape=(3, 32, 32) if experiment in COLOUR else (1, 28, 28)
    )
    if experiment in PARAMETERS:
        assert count_parameters(model) == PARAMETERS[experiment]


@pytest.mark.proof
@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in COLOUR])  # whose data are here
def test_every_experiment_trains(experiment: str, config, tmp_path: Path) -> None:
    # Samples of each image take memory; some validate every fifth epoch only.
    composed = config(f"experiment={experiment}", *BRIEF, "data.batch_size=4", "trainer.check_val_every_n_epoch=1")
    metrics = train(composed, tmp_path / "run")
    assert metrics["steps"] == 2
    assert metrics["checkpoint"] == ("last" if is_tutorial(composed) else "best")
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def is_tutorial(composed: dict[str, Any]) -> bool:
    """Return whether it is a system of a tutorial: these train on all 60,000 images."""
    return bool(composed["data"]["pixels"] == "grey" and composed["name"] not in COLOUR)
