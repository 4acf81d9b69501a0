"""Several levels of latents: exactness, the KL of each level, and the gradients."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributions as td
from helpers import close_in_expectation, grid
from linear import LATENT_DIM, SCALE, SHAPE, Linear

from vae_lightning import MLP, VAE, FlowPrior, GaussianLikelihood, VampPrior
from vae_lightning.config import ConfigError
from vae_lightning.models.estimators import importance_weighted_bound
from vae_lightning.models.levels import LevelsPosterior, LevelsPrior
from vae_lightning.models.objectives import DReG

LEVELS = {"levels": [3, 2], "hidden": [8]}


def two_level(top: object = None, **options) -> VAE:
    prior = partial(LevelsPrior, **LEVELS, **({"top": top} if top else {}))
    return VAE(5, partial(MLP, hidden=(8,)), prior=prior, posterior=partial(LevelsPosterior, **LEVELS), **options)


def test_log_weights_of_the_exact_posterior_are_log_p() -> None:
    """z2 ~ N(0, 1), z1 ~ N(0.8 z2 + 0.3, 0.36), x ~ N(1.5 z1 - 0.2, 0.25): all posteriors are linear Gaussians."""
    vae = VAE(
        latent_dim=2,
        backbone=partial(MLP, hidden=()),
        likelihood=partial(GaussianLikelihood, scale=0.5, mean="identity"),
        prior=partial(LevelsPrior, levels=[1, 1], hidden=()),
        posterior=partial(LevelsPosterior, levels=[1, 1], hidden=(), context=1),
        image_shape=(1, 1, 1),
    )
    a, b, s1, w, c, s = 0.8, 0.3, 0.36, 1.5, -0.2, 0.25

    def log_variance(value: float) -> float:  # of the output before its bound
        return 15 * torch.atanh(torch.tensor(value).log() / 15).item()

    def linear(layer: torch.nn.Linear, weight: list[list[float]], bias: list[float]) -> None:
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)

    linear(vae.prior.networks[0][-1], [[a], [0.0]], [b, log_variance(s1)])
    linear(vae.decoder[0], [[w, 0.0]], [c])
    # x = w a z2 + w b + c + noise of variance v
    v = w**2 * s1 + s
    gain, precision = w * a / v, 1 + (w * a) ** 2 / v
    mean = [gain / precision, -gain / precision * (w * b + c)]
    linear(vae.encoder[1], [[mean[0]], [0.0], [1.0]], [mean[1], log_variance(1 / precision), 0.0])
    # p(z1 | x, z2), from inputs (x, z2)
    p1 = 1 / s1 + w**2 / s
    weight = [w / s / p1, a / s1 / p1]
    linear(vae.posterior.networks[0][-1], [weight, [0.0, 0.0]], [(b / s1 - w * c / s) / p1, log_variance(1 / p1)])
    x = torch.rand(6, 1, 1, 1)
    exact = td.Normal(w * b + c, ((w * a) ** 2 + v) ** 0.5).log_prob(x).flatten()
    torch.testing.assert_close(vae.log_weights(x, 4), exact.expand(4, -1), atol=1e-5, rtol=0)


def test_the_bounds_of_two_levels_are_those_of_quadrature() -> None:
    levels: dict[str, Any] = {"levels": [1, 1], "hidden": [8], "gated": False}
    vae = VAE(
        LATENT_DIM,
        Linear,
        partial(GaussianLikelihood, scale=SCALE, mean="identity"),
        prior=partial(LevelsPrior, **levels),
        posterior=partial(LevelsPosterior, context=4, **levels),
        image_shape=SHAPE,
    )
    vae.requires_grad_(False)
    for module in (vae.prior, vae.posterior, vae.decoder):
        for weights in module.parameters():
            weights.mul_(1.5)  # so that the levels depend on each other, and the posterior is wrong
    x = torch.rand(3, *SHAPE)
    points, log_area = grid(12, 401)  # 1e-4 of the prior is outside
    z = points.unsqueeze(1).expand(-1, len(x), -1)
    q = vae.encode(x)
    log_q = q.log_prob(z)
    log_joint = vae.log_joint(x, z)
    log_likelihood = log_joint.logsumexp(dim=0) + log_area
    elbo = ((log_q + log_area).exp() * (log_joint - log_q)).sum(dim=0)
    for log_density in (vae.prior_distribution().log_prob(points), log_q):
        total = (log_density + log_area).exp().sum(dim=0)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-3, rtol=0)
    assert (log_likelihood - elbo > 1).all()  # there is a gap to close

    log_weights = vae.log_weights(x, 2**17)
    assert close_in_expectation(log_weights, elbo)
    assert close_in_expectation(vae.elbo(x.repeat(5_000, 1, 1, 1))["elbo"].unflatten(0, (-1, len(x))), elbo)
    groups = [log_weights.unflatten(0, (-1, k)).movedim(1, 0) for k in (1, 4, 32, 2**17)]
    bounds = [importance_weighted_bound(group).mean(dim=0) for group in groups]
    assert all((low < high).all() for low, high in itertools.pairwise(bounds))
    torch.testing.assert_close(bounds[-1], log_likelihood, atol=0.02, rtol=0)
    samples = vae.prior_distribution().sample((100_000,))
    density = (vae.prior_distribution().log_prob(points) + log_area).exp().unsqueeze(1)
    assert close_in_expectation(samples, (density * points).sum(dim=0))
    assert close_in_expectation(samples.prod(dim=1), (density * points.prod(dim=1, keepdim=True)).sum())


@pytest.mark.parametrize("top", [None, partial(FlowPrior, layers=2, hidden=(8,)), partial(VampPrior, pseudo_inputs=7)])
def test_the_kl_of_the_levels_is_that_of_their_samples(top: object) -> None:
    torch.manual_seed(0)
    vae, x = two_level(top).eval(), torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        q, p = vae.encode(x), vae.prior_distribution()
        noise = torch.randn(20_000, 2, 5)
        z, kl = q.transform_and_kl(noise, p)
        difference = kl.sum(dim=-1) - (q.log_prob(z) - p.log_prob(z))
    assert kl.shape == (20_000, 2, 2)
    assert (difference.mean(dim=0).abs() < 4 * difference.std(dim=0) / len(difference) ** 0.5).all()
    torch.testing.assert_close(z, q.transform_and_log_prob(noise)[0])
    assert p.sample((4,)).shape == vae.prior_distribution(0.5).sample((4,)).shape == (4, 5)
    terms = vae.elbo(x)
    torch.testing.assert_close(terms["kl_1"] + terms["kl_2"], terms["kl"])


def test_each_level_is_drawn_given_those_above() -> None:
    torch.manual_seed(0)
    p = two_level().prior_distribution()
    z = p.sample((50_000,))
    standard = (z[:, :3] - p.given(0, z[:, 3:]).mean) / p.given(0, z[:, 3:]).stddev
    torch.testing.assert_close(standard.std(0), torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(standard.T.cov(), torch.eye(3), atol=0.03, rtol=0)
    cold = two_level().prior_distribution(0.5).sample((50_000,))[:, 3:]
    torch.testing.assert_close(cold.std(0), torch.full((2,), 0.5), atol=0.01, rtol=0)


def test_detached_levels_have_gradients_through_z_alone() -> None:
    vae = two_level(objective=DReG)
    q = vae.encode(torch.rand(2, 1, 28, 28))
    z = torch.randn(4, 2, 5, requires_grad=True)
    detached = q.detach().log_prob(z)
    torch.testing.assert_close(detached, q.log_prob(z))
    detached.sum().backward()
    assert z.grad is not None
    assert all(parameter.grad is None for parameter in vae.parameters())
    vae.objective(vae, torch.rand(2, 1, 28, 28))["loss"].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.posterior.parameters())


def test_levels_must_sum_to_the_latent_dimension() -> None:
    with pytest.raises(ConfigError, match=r"model\.posterior\.levels=\[3, 2\]: should sum to model\.latent_dim=6"):
        VAE(6, MLP, posterior=partial(LevelsPosterior, **LEVELS))


def test_a_posterior_with_levels_suits_a_prior_without() -> None:
    vae = VAE(5, MLP, posterior=partial(LevelsPosterior, **LEVELS))
    assert "kl_1" not in vae.elbo(torch.rand(2, 1, 28, 28))
