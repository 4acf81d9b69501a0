"""A VAE that can be solved by hand: linear decoder, Gaussian pixels (probabilistic PCA, Tipping & Bishop 1999).

x = W z + b + s ε with orthogonal columns of W, so that p(x) = N(b, W Wᵀ + s² I) and the true posterior is a diagonal
Gaussian, which the encoder is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vae_lightning.models.backbones import Backbone
from vae_lightning.models.posteriors import LOG_VARIANCE_BOUND
from vae_lightning.models.vae import VAE

SHAPE, LATENT_DIM, SCALE = (1, 2, 3), 2, 0.7


class Linear(Backbone):
    def __init__(self, latent_dim: int, encoder_outputs: int, image_shape: list[int]) -> None:
        super().__init__()
        pixels = math.prod(image_shape)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, encoder_outputs))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, pixels), nn.Unflatten(1, tuple(image_shape)))


def linear_vae(shift: float = 0.0, **options: object) -> VAE:
    """The VAE with its true posterior, or with one whose means are off by `shift`."""
    likelihood = {"_target_": "vae_lightning.models.likelihoods.Gaussian", "scale": SCALE, "mean": "identity"}
    vae = VAE(LATENT_DIM, {"_target_": "linear.Linear"}, likelihood, image_shape=SHAPE, **options)
    w = torch.zeros(6, LATENT_DIM)
    w[:3, 0], w[3:, 1] = torch.tensor([0.8, -0.5, 0.3]), torch.tensor([0.4, 0.9, -0.7])
    b = torch.linspace(-0.3, 0.6, 6)
    variance = 1 / (1 + w.square().sum(dim=0) / SCALE**2)
    towards = variance.unsqueeze(1) * w.T / SCALE**2
    raw = LOG_VARIANCE_BOUND * torch.atanh(variance.log() / LOG_VARIANCE_BOUND)
    with torch.no_grad():
        vae.decoder[0].weight.copy_(w)
        vae.decoder[0].bias.copy_(b)
        vae.encoder[1].weight.copy_(torch.cat([towards, torch.zeros_like(towards)]))
        vae.encoder[1].bias.copy_(torch.cat([-towards @ b + shift, raw]))
    return vae


def exact_log_likelihood(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) of images `[batch, *SHAPE]`, in closed form: `[batch]`."""
    w, b = vae.decoder[0].weight.detach().double(), vae.decoder[0].bias.detach().double()
    covariance = w @ w.T + SCALE**2 * torch.eye(6, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(b, covariance).log_prob(x.flatten(1).double())
