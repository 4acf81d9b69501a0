"""The pyramid of wavelet bands: the transform, the first bound, and its likelihoods."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from vae_lightning import (
    VAE,
    DiscretizedLogistic,
    GaussianLikelihood,
    LogisticMixture,
    Pyramid,
)
from vae_lightning.config import ConfigError
from vae_lightning.models.likelihoods import Bernoulli, Categorical
from vae_lightning.models.pyramid import analyse, dct, synthesise

LIKELIHOODS = (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    partial(DiscretizedLogistic, scale="per_pixel"),
    partial(GaussianLikelihood, scale=0.01),
    partial(GaussianLikelihood, scale="per_pixel"),
    partial(GaussianLikelihood, mean="identity"),
    partial(LogisticMixture, components=3),
)


def smooth(n: int, channels: int = 3, side: int = 16) -> torch.Tensor:
    """Images of slopes and edges, uint8 `[n, channels, side, side]`."""
    coarse = torch.randint(256, (n, channels, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").round().byte()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 24), (2, 5, 4, 8, 8)])
def test_the_transform_is_orthogonal_and_inverted(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64)
    bands = analyse(x, 2)
    torch.testing.assert_close(synthesise(bands), x)
    torch.testing.assert_close(sum(band.square().sum() for band in bands), x.square().sum())
    torch.testing.assert_close(dct(3) @ dct(3).T, torch.eye(3, dtype=torch.float64))
    flat = analyse(torch.full(shape, 0.5), 2)
    assert all(band.abs().max() < 1e-6 for band in flat[:-1])  # a grey image has no differences
    torch.testing.assert_close(flat[-1][..., 0, :, :].mean().item(), 0.5 * 4 * math.sqrt(shape[-3]))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_reconstructions_are_close_before_training(likelihood: object) -> None:
    images = smooth(8)
    vae = Pyramid(channels=(8, 8), likelihood=likelihood, noise=1.0, image_shape=(3, 16, 16)).eval()
    vae.initialize(images)
    found, x = vae.reconstruct(images), images / 255
    assert ((found - 0.5) * (x - 0.5)).sum() / (found - 0.5).norm() / (x - 0.5).norm() > 0.98
    assert vae.sample(2).shape == (2, 3, 16, 16)


def test_training_lowers_the_bound_and_the_levels_add_up() -> None:
    torch.manual_seed(0)
    images = smooth(16)
    vae = Pyramid(channels=(8, 8), likelihood=partial(LogisticMixture, components=2), image_shape=(3, 16, 16))
    vae.initialize(images)
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        terms = vae.objective(vae, images / 255)
        losses.append(terms["loss"].mean().item())
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    torch.testing.assert_close(terms["kl_1"] + terms["kl_2"], terms["kl"])
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in vae.parameters())


def test_the_prior_predicts_finer_bands_from_coarser_ones() -> None:
    vae = Pyramid(channels=(8, 8, 8), image_shape=(3, 16, 16))
    p = vae.prior_distribution()
    z = p.sample((2, 3))
    below, above = z[..., : p.levels[0]], z[..., p.levels[0] :]
    middle, coarsest = p.split(z)[1]
    expected = p.top.log_prob(coarsest) + p.given(1, coarsest).log_prob(middle) + p.given(0, above).log_prob(below)
    torch.testing.assert_close(p.log_prob(z), expected)
    torch.testing.assert_close(p.given(0, above).mean[1, 2], p.given(0, above[1, 2]).mean)


def test_a_checkpoint_rebuilds_the_model(tmp_path) -> None:
    from lightning import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    vae = Pyramid(channels=(8, 8), image_shape=(3, 16, 16))
    trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(vae, DataLoader(TensorDataset(smooth(8)), 4))
    assert vae.encoder.scale.unique().numel() > 2  # measured in the training images
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Pyramid.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu", weights_only=True)
    assert isinstance(again, VAE)
    z = torch.randn(2, 768)
    torch.testing.assert_close(again.decode_images(z), vae.eval().decode_images(z))


def test_sides_must_be_halved_as_often_as_there_are_bands() -> None:
    with pytest.raises(ConfigError, match=r"3 bands need sides divisible by 8; the images have 28×28 pixels"):
        Pyramid(channels=(8, 8, 8), image_shape=(1, 28, 28))
