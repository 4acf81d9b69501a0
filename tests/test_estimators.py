import math

import pytest
import torch
import torch.distributions as td

from vae_lightning.models.estimators import (
    active_units,
    closed_form_kl,
    importance_weighted_bound,
    importance_weighted_stderr,
    kl_divergence,
    with_free_bits,
)
from vae_lightning.models.posteriors import DiagonalGaussian
from vae_lightning.models.priors import MixturePrior, StandardNormal


def test_kl_agrees_with_torch_distributions() -> None:
    mean, log_variance = torch.randn(50, 7), torch.randn(50, 7) * 2
    ours = kl_divergence(mean, log_variance)
    theirs = td.kl_divergence(td.Normal(mean, (log_variance / 2).exp()), td.Normal(0.0, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours >= 0).all()


def test_the_closed_form_is_that_of_the_registry() -> None:
    q = DiagonalGaussian(torch.randn(50, 7), torch.randn(50, 7) * 2)
    assert torch.equal(closed_form_kl(q, StandardNormal(7)()), kl_divergence(q.mean, q.log_variance))
    p = td.Independent(td.Normal(torch.randn(7), torch.rand(7) + 0.1), 1)
    theirs = td.kl_divergence(td.Normal(q.mean, q.stddev), p.base_dist)
    torch.testing.assert_close(closed_form_kl(q, p), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(td.kl_divergence(q, p), theirs.sum(dim=-1), rtol=1e-4, atol=1e-5)
    assert closed_form_kl(q, MixturePrior(7)()) is None
    assert closed_form_kl(q, td.Independent(td.StudentT(5.0, torch.zeros(7)), 1)) is None


class Vague(td.MultivariateNormal):
    """A distribution of one's own."""


def test_a_registered_formula_is_used() -> None:
    p, q = StandardNormal(3)(), Vague(torch.randn(5, 3), torch.eye(3))
    assert closed_form_kl(q, p) is None
    td.register_kl(Vague, td.Independent)(lambda q, p: 0.5 * q.mean.square().sum(dim=-1))
    torch.testing.assert_close(closed_form_kl(q, p), 0.5 * q.mean.square().sum(dim=-1, keepdim=True))


def test_importance_weighted_bound() -> None:
    weights = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    bound = importance_weighted_bound(weights.log())
    assert bound.exp().tolist() == pytest.approx([2.0, 4.0])
    # Far outside what exp() can hold, it is still the logarithm of a mean.
    assert importance_weighted_bound(torch.tensor([[-5000.0], [-5000.0]])).item() == pytest.approx(-5000)


def test_the_standard_error_and_bias_of_the_bound_are_those_of_many_repetitions() -> None:
    k, scale = 400, 0.8
    log_weights = scale * torch.randn(k, 5_000, dtype=torch.float64) - scale**2 / 2 - 80  # the mean weight is e⁻⁸⁰
    bound, stderr = importance_weighted_bound(log_weights), importance_weighted_stderr(log_weights)
    assert stderr.mean().item() == pytest.approx(bound.std().item(), rel=0.05)
    assert stderr.mean().item() == pytest.approx(math.sqrt(math.expm1(scale**2) / k), rel=0.05)
    assert -80 - bound.mean().item() == pytest.approx(stderr.square().mean().item() / 2, abs=0.003)
    assert importance_weighted_stderr(torch.zeros(3, 1)).item() == 0
    assert importance_weighted_stderr(torch.zeros(1, 1)).isnan()


def test_iwae_gradient_weights_the_best_sample_most() -> None:
    log_weights = torch.tensor([[0.0], [-20.0]], requires_grad=True)
    (-importance_weighted_bound(log_weights)).sum().backward()
    assert log_weights.grad is not None
    assert log_weights.grad.flatten().tolist() == pytest.approx([-1, 0], abs=1e-6)


def test_free_bits_stop_the_gradient_below_the_floor() -> None:
    kl = torch.tensor([[0.1, 3.0], [0.3, 1.0]], requires_grad=True)
    penalty = with_free_bits(kl, floor=0.5)
    assert penalty.mean().item() == pytest.approx(0.5 + 2.0)
    penalty.mean().backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [[0.0, 0.5], [0.0, 0.5]]


def test_active_units() -> None:
    means = torch.stack([torch.randn(1_000), 0.01 * torch.randn(1_000), torch.full((1_000,), 5.0)], dim=1)
    assert active_units(means) == 1


def test_kl_is_never_negative() -> None:
    log_variance = torch.cat([sign * torch.logspace(-12, 0, 2_000) for sign in (-1, 1)])
    assert (kl_divergence(torch.zeros_like(log_variance), log_variance) >= 0).all()
