"""Flows: densities that sum to one, exact inverses, and posteriors that close the gap to log p(x)."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from linear import SCALE, SHAPE, exact_log_likelihood
from torch import Tensor

from vae_lightning.config import ConfigError
from vae_lightning.models.flows import Flow, FlowPosterior, FlowPrior
from vae_lightning.models.objectives import IWAE, DReG
from vae_lightning.models.posteriors import LOG_VARIANCE_BOUND
from vae_lightning.models.vae import VAE

FLOW = {"_target_": "vae_lightning.models.flows.FlowPosterior", "hidden": [32]}
FULL = {"_target_": "vae_lightning.models.posteriors.FullCovarianceGaussian"}
W = torch.tensor([[0.8, 0.6], [-0.5, -0.3], [0.3, 0.5], [0.4, 0.1], [0.9, 0.7], [-0.7, -0.8]])  # columns correlate
EXACT_COVARIANCE = torch.linalg.inv(torch.eye(2) + W.T @ W / SCALE**2)  # of p(z|x), for every x


def perturbed(flow: Flow, size: float = 0.3) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow


def correlated_vae(posterior: dict) -> VAE:
    """A linear VAE with p(x) in closed form, whose exact posterior is a Gaussian with correlated dimensions."""
    likelihood = {"_target_": "vae_lightning.models.likelihoods.Gaussian", "scale": SCALE, "mean": "identity"}
    vae = VAE(2, {"_target_": "linear.Linear"}, likelihood, posterior=posterior, image_shape=SHAPE)
    assert isinstance(vae.decoder[0], torch.nn.Linear)
    with torch.no_grad():
        vae.decoder[0].weight.copy_(W)
        vae.decoder[0].bias.zero_()
        towards = EXACT_COVARIANCE @ W.T / SCALE**2  # the exact posterior mean is linear in x
        factor = torch.linalg.cholesky(EXACT_COVARIANCE)
        mean_field = 1 / torch.linalg.inv(EXACT_COVARIANCE).diagonal()  # the variances closest in KL(q ‖ p)
        variances = factor.diagonal().square() if posterior is FULL else mean_field
        vae.encoder[1].weight.zero_()
        vae.encoder[1].bias.zero_()
        vae.encoder[1].weight[:2] = towards
        vae.encoder[1].bias[2:4] = LOG_VARIANCE_BOUND * torch.atanh(variances.log() / LOG_VARIANCE_BOUND)
        if posterior is FULL:
            vae.encoder[1].bias[4] = factor[1, 0]
    return vae


def gap(vae: VAE, x: Tensor) -> float:
    """log p(x) − ELBO, in nats, with 2,000 samples per image."""
    with torch.no_grad():
        return (exact_log_likelihood(vae, x) - vae.log_weights(x, 2_000).double().mean(dim=0)).mean().item()


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_the_density_of_a_flow_sums_to_one(kind: str) -> None:
    prior = FlowPrior(2, hidden=(16,), kind=kind)
    perturbed(prior.flow, 0.1)
    side = torch.linspace(-10, 10, 401)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = prior().log_prob(grid).double().exp()
        standard = FlowPrior(2)().log_prob(grid)  # the identity at first
    assert (density - standard.double().exp()).abs().max() > 0.005
    assert (density.sum() * (side[1] - side[0]) ** 2).item() == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(standard, td.Independent(td.Normal(torch.zeros(2), torch.ones(2)), 1).log_prob(grid))


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_the_inverse_undoes_a_flow(kind: str) -> None:
    flow = perturbed(Flow(7, 3, 4, (16,), kind, "model/prior"), 0.1)
    x, context = torch.randn(50, 7), torch.randn(50, 3)
    y, log_scale = flow(x, context)
    back, log_scale_back = flow(y, context, inverse=True)
    assert (y - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_scale_back, -log_scale, atol=1e-4, rtol=1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda one: flow(one, context[0])[0], x[0])
    torch.testing.assert_close(log_scale[0], jacobian.slogdet().logabsdet, atol=1e-4, rtol=1e-4)


def test_temperature_scales_the_samples_of_a_flow_prior() -> None:
    prior = FlowPrior(3)
    assert prior(0.5).sample((4_000,)).std().item() == pytest.approx(0.5, rel=0.05)


def test_one_latent_dimension_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model/posterior=flow: .* at least 2, given 1"):
        FlowPosterior(1)


def test_full_covariance_closes_the_gap_of_the_mean_field_posterior() -> None:
    x = torch.rand(20, *SHAPE)
    precision = torch.linalg.inv(EXACT_COVARIANCE)
    mean_field = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()  # KL(q ‖ p(z|x)) in closed form
    assert mean_field > 0.3
    diagonal = {"_target_": "vae_lightning.models.posteriors.Gaussian"}
    assert gap(correlated_vae(diagonal), x) == pytest.approx(mean_field, abs=0.02)
    assert gap(correlated_vae(FULL), x) == pytest.approx(0, abs=1e-4)
    assert gap(correlated_vae(FLOW), x) == pytest.approx(mean_field, abs=0.02)  # it starts as the diagonal Gaussian


@pytest.mark.parametrize("posterior", [FULL, FLOW])
def test_a_trained_posterior_closes_the_gap(posterior: dict) -> None:
    vae = correlated_vae(dict(posterior))  # a copy: it starts as the mean-field posterior
    x = torch.rand(20, *SHAPE)
    parameters = [*vae.encoder.parameters(), *vae.posterior.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        (-vae.log_weights(torch.rand(100, *SHAPE), 1)).mean().backward()
        optimizer.step()
        schedule.step()
    assert -0.01 < gap(vae, x) < 0.02


@pytest.mark.parametrize("posterior", [FLOW, FULL])
def test_dreg_has_the_expected_gradient_of_iwae(posterior: dict) -> None:
    vae = correlated_vae(dict(posterior)).train()
    if posterior is FLOW:
        perturbed(vae.posterior.flow, 0.2)
    x = torch.rand(1, *SHAPE).repeat(2_000, 1, 1, 1)
    found = []
    for objective in (IWAE(8), DReG(8)):
        sums = []
        for _ in range(10):
            parameters = [*vae.encoder.parameters(), *vae.posterior.parameters()]
            gradients = torch.autograd.grad(objective(vae, x)["loss"].mean(), parameters)
            sums.append(torch.cat([g.flatten() for g in gradients]))
        found.append(torch.stack(sums))
    iwae, dreg = found
    error = (iwae.var(0) / 10 + dreg.var(0) / 10).sqrt()
    distance = (iwae.mean(0) - dreg.mean(0)).abs() / error.clamp(min=1e-9)
    used = error > 1e-7
    assert (distance[used] < 6).all()
    assert (iwae.mean(0).abs() > 10 * error)[used].any()  # there is a gradient to agree on
