"""Every configuration composes, builds and takes a step."""

import json
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, ROOT

from vae_lightning.training.train import train

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
CHOICES = [
    f"{group.relative_to(ROOT / 'conf')}={choice.stem}"
    for group in sorted((ROOT / "conf").glob("**/"))
    if group.name not in ("conf", "experiment")
    for choice in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains(choice: str, config, tmp_path: Path) -> None:
    smaller = ["model.backbone.channels=[4,8,8]"] if choice == "model/backbone=residual_conv" else []
    metrics = train(config(choice, *smaller, *BRIEF), tmp_path / "run")
    assert metrics["steps"] == 2
    assert torch.tensor(metrics["test/loss"]).isfinite()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(experiment: str, config, tmp_path: Path) -> None:
    composed = config(f"experiment={experiment}", *BRIEF)
    assert composed["name"] == experiment
    tutorial = composed["data"]["pixels"] == "grey"  # those train on all 60,000 images
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


@pytest.mark.parametrize(("latent_dim", "backbone"), [(1, "mlp"), (2, "conv")])  # test_readme.py has 2, 5, 20 and 200
def test_latent_dimensions(latent_dim: int, backbone: str, config, tmp_path: Path) -> None:
    metrics = train(config(f"model.latent_dim={latent_dim}", f"model/backbone={backbone}", *BRIEF), tmp_path / "run")
    assert metrics["latent_dim"] == latent_dim
    assert (tmp_path / "run" / "figures" / "manifold.png").exists() == (latent_dim == 2)


@pytest.mark.parametrize("pixels", ["grey", "dynamic", "fixed", "threshold"])
def test_pixel_protocols(pixels: str, config, tmp_path: Path) -> None:
    assert train(config(f"data.pixels={pixels}", *BRIEF), tmp_path / "run")["pixels"] == pixels
