"""Every choice of every configuration group composes, builds and trains."""

from pathlib import Path

import pytest
import torch
from conftest import BRIEF, ROOT
from helpers import write_pictures

from vae_lightning.training.train import train

# The choices that the default configuration makes; `model=vae` trains it.
DEFAULT = (
    *("data=mnist", "model/backbone=mlp", "model/likelihood=bernoulli", "model/prior=normal", "trainer=default"),
    *("model/posterior=gaussian", "model/objective=elbo", "model/optimizer=adam"),
)
CHOICES = [
    name
    for group in sorted((ROOT / "conf").glob("**/"))
    if group.name not in ("conf", "experiment", "launcher", "logger", "hparams_search")
    for choice in sorted(group.glob("*.yaml"))
    if (name := f"{group.relative_to(ROOT / 'conf')}={choice.stem}") not in DEFAULT
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains(choice: str, config, tmp_path: Path) -> None:
    smaller = ["model.backbone.channels=[4,8,8]"] if choice == "model/backbone=residual_conv" else []
    if choice == "data=folder":
        write_pictures(tmp_path / "photos")
        smaller = [f"data.root={tmp_path / 'photos'}", "data.size=16", "data.batch_size=10"]
    smaller += ["model.channels=[4,4]"] if choice == "model=pyramid" else []
    smaller += ["model.backbone.channels=[4,4,4]"] if choice == "model=vq" else []
    discrete = choice in ("model/posterior=vq", "model/posterior=fsq")
    smaller += ["model/prior=codes", "model.latent_dim=48"] if discrete else []
    smaller += ["model/posterior=fsq", "model.latent_dim=3"] if choice == "model/prior=codes" else []
    smaller += ["model.backbone.hidden=[8]"] if choice == "model/likelihood=categorical" else []
    metrics = train(config(choice, *smaller, "trainer.fast_dev_run=2", *BRIEF), tmp_path / "run")
    assert metrics["steps"] == 2
    assert torch.tensor(metrics["test/loss"]).isfinite()


def test_one_latent_dimension(config, tmp_path: Path) -> None:  # test_readme.py has 2, 5, 20 and 200
    assert train(config("model.latent_dim=1", *BRIEF), tmp_path / "run")["latent_dim"] == 1
    assert not (tmp_path / "run" / "figures" / "manifold.png").exists()
