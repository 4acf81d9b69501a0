import math

import pytest
import torch
import torch.distributions as td

from vae_lightning import objectives
from vae_lightning.posterior import LOG_VARIANCE_BOUND, DiagonalGaussian, diagonal_gaussian
from vae_lightning.priors import StandardNormal


def test_kl_agrees_with_torch_distributions() -> None:
    mean, log_variance = torch.randn(50, 7), torch.randn(50, 7) * 2
    ours = objectives.kl_divergence(mean, log_variance)
    theirs = td.kl_divergence(td.Normal(mean, (log_variance / 2).exp()), td.Normal(0.0, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours >= 0).all()


def test_kl_agrees_with_a_monte_carlo_estimate() -> None:
    mean, log_variance = torch.tensor([[0.7, -1.2, 0.0]]), torch.tensor([[-1.0, 0.5, 0.0]])
    q = DiagonalGaussian(mean, log_variance)
    z = q.rsample((400_000,))
    estimates = q.log_prob(z) - StandardNormal(3)().log_prob(z)
    error = estimates.std().item() / math.sqrt(len(z))
    exact = objectives.kl_divergence(mean, log_variance).sum().item()
    assert abs(estimates.mean().item() - exact) < 4 * error
    assert error < 0.01 * exact


def test_kl_is_zero_only_at_the_prior() -> None:
    zero = torch.zeros(1, 4)
    assert objectives.kl_divergence(zero, zero).sum() == 0
    assert objectives.kl_divergence(zero + 0.1, zero).sum() > 0


def test_elbo_has_beta_one_whatever_the_loss_has() -> None:
    terms = objectives.elbo(reconstruction=torch.tensor([80.0]), kl=torch.tensor([20.0]), beta=4.0)
    assert terms["loss"].item() == 160
    assert terms["elbo"].item() == -100
    assert (terms["reconstruction"].item(), terms["kl"].item()) == (80, 20)


def test_importance_weighted_bound() -> None:
    weights = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    bound = objectives.importance_weighted_bound(weights.log())
    assert bound.exp().tolist() == pytest.approx([2.0, 4.0])
    # Far outside what exp() can hold, it is still the logarithm of a mean.
    assert objectives.importance_weighted_bound(torch.tensor([[-5000.0], [-5000.0]])).item() == pytest.approx(-5000)


def test_posterior_log_variance_is_bounded_and_its_gradient_alive() -> None:
    outputs = torch.tensor([[0.0, 0.0, 30.0, -30.0]], requires_grad=True)
    q = diagonal_gaussian(outputs)
    assert q.log_variance.abs().max() <= LOG_VARIANCE_BOUND
    (objectives.kl_divergence(q.mean, q.log_variance).sum()).backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, 2] > 0 > outputs.grad[0, 3]  # both are pulled back towards the prior
    extreme = diagonal_gaussian(torch.tensor([[0.0, 0.0, 1e30, -1e30]]))
    assert objectives.kl_divergence(extreme.mean, extreme.log_variance).isfinite().all()
    assert extreme.log_prob(torch.zeros(1, 2)).isfinite().all()


def test_posterior_is_nearly_linear_where_posteriors_live() -> None:
    raw = torch.linspace(-3, 3, 7).reshape(1, -1)
    bounded = diagonal_gaussian(torch.cat([torch.zeros_like(raw), raw], dim=1)).log_variance
    torch.testing.assert_close(bounded, raw, rtol=0.02, atol=1e-6)


def test_prior_is_normalized() -> None:
    grid = torch.linspace(-10, 10, 2001)
    plane = torch.cartesian_prod(grid, grid)
    density = StandardNormal(2)().log_prob(plane).exp().sum() * (20 / 2000) ** 2
    assert density.item() == pytest.approx(1, abs=1e-3)
