"""Every choice of every configuration group composes, builds and trains."""

from pathlib import Path

import pytest
import torch
from conftest import BRIEF, ROOT

from vae_lightning.training.train import train

CHOICES = [
    f"{group.relative_to(ROOT / 'conf')}={choice.stem}"
    for group in sorted((ROOT / "conf").glob("**/"))
    if group.name not in ("conf", "experiment", "launcher", "logger")  # test_experiments, test_sweeps, test_loggers
    for choice in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains(choice: str, config, tmp_path: Path) -> None:
    smaller = ["model.backbone.channels=[4,8,8]"] if choice == "model/backbone=residual_conv" else []
    metrics = train(config(choice, *smaller, "trainer.fast_dev_run=2", *BRIEF), tmp_path / "run")
    assert metrics["steps"] == 2
    assert torch.tensor(metrics["test/loss"]).isfinite()


@pytest.mark.parametrize(("latent_dim", "backbone"), [(1, "mlp"), (2, "conv")])  # test_readme.py has 2, 5, 20 and 200
def test_latent_dimensions(latent_dim: int, backbone: str, config, tmp_path: Path) -> None:
    metrics = train(config(f"model.latent_dim={latent_dim}", f"model/backbone={backbone}", *BRIEF), tmp_path / "run")
    assert metrics["latent_dim"] == latent_dim
    assert (tmp_path / "run" / "figures" / "manifold.png").exists() == (latent_dim == 2)


@pytest.mark.parametrize("pixels", ["grey", "dynamic", "fixed", "threshold"])
def test_pixel_protocols(pixels: str, config, tmp_path: Path) -> None:
    assert train(config(f"data.pixels={pixels}", *BRIEF), tmp_path / "run")["pixels"] == pixels
