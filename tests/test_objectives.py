import math

import pytest
import torch
import torch.distributions as td
from linear import SHAPE, linear_vae
from torch import Tensor

from vae_lightning.config import ConfigError
from vae_lightning.models import objectives
from vae_lightning.models.objectives import ELBO, IWAE, DReG, Objective
from vae_lightning.models.posteriors import LOG_VARIANCE_BOUND, DiagonalGaussian, Gaussian
from vae_lightning.models.vae import VAE


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
    estimates = q.log_prob(z) - td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    error = estimates.std().item() / math.sqrt(len(z))
    exact = objectives.kl_divergence(mean, log_variance).sum().item()
    assert abs(estimates.mean().item() - exact) < 4 * error
    assert error < 0.01 * exact


def test_kl_is_zero_only_at_the_prior() -> None:
    zero = torch.zeros(1, 4)
    assert objectives.kl_divergence(zero, zero).sum() == 0
    assert objectives.kl_divergence(zero + 0.1, zero).sum() > 0


def test_importance_weighted_bound() -> None:
    weights = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    bound = objectives.importance_weighted_bound(weights.log())
    assert bound.exp().tolist() == pytest.approx([2.0, 4.0])
    # Far outside what exp() can hold, it is still the logarithm of a mean.
    assert objectives.importance_weighted_bound(torch.tensor([[-5000.0], [-5000.0]])).item() == pytest.approx(-5000)


def test_posterior_log_variance_is_bounded_and_its_gradient_alive() -> None:
    outputs = torch.tensor([[0.0, 0.0, 30.0, -30.0]], requires_grad=True)
    q = Gaussian(2)(outputs)
    assert q.log_variance.abs().max() <= LOG_VARIANCE_BOUND
    (objectives.kl_divergence(q.mean, q.log_variance).sum()).backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, 2] > 0 > outputs.grad[0, 3]  # both are pulled back towards the prior
    extreme = Gaussian(2)(torch.tensor([[0.0, 0.0, 1e30, -1e30]]))
    assert objectives.kl_divergence(extreme.mean, extreme.log_variance).isfinite().all()
    assert extreme.log_prob(torch.zeros(1, 2)).isfinite().all()


def test_posterior_is_nearly_linear_where_posteriors_live() -> None:
    raw = torch.linspace(-3, 3, 7).reshape(1, -1)
    bounded = Gaussian(7)(torch.cat([torch.zeros_like(raw), raw], dim=1)).log_variance
    torch.testing.assert_close(bounded, raw, rtol=0.02, atol=1e-6)


def gradients(vae: VAE, x: Tensor, objective: Objective) -> Tensor:
    vae.zero_grad()
    objective(vae, x)["loss"].mean().backward()
    return torch.cat([p.grad.flatten() for p in vae.encoder.parameters() if p.grad is not None])


def test_iwae_with_one_sample_is_the_monte_carlo_elbo() -> None:
    vae, x = linear_vae(shift=0.5).train(), torch.rand(30, *SHAPE)
    torch.manual_seed(1)
    one = gradients(vae, x, IWAE(samples=1))
    torch.manual_seed(1)
    monte_carlo = gradients(vae, x, ELBO(kl="monte_carlo"))
    torch.testing.assert_close(one, monte_carlo, rtol=1e-4, atol=1e-5)


def test_dreg_has_iwae_s_value_and_expected_gradient_at_lower_variance() -> None:
    vae, x = linear_vae(shift=0.3).train(), torch.rand(20, *SHAPE)
    torch.manual_seed(1)
    value = IWAE(samples=16)(vae, x)["loss"]
    torch.manual_seed(1)
    torch.testing.assert_close(DReG(samples=16)(vae, x)["loss"], value)
    many = x.repeat(50, 1, 1, 1)
    iwae, dreg = (
        torch.stack([gradients(vae, many, objective) for _ in range(200)]) for objective in (IWAE(16), DReG(16))
    )
    error = (iwae.var(0) / 200 + dreg.var(0) / 200).sqrt()
    assert ((iwae.mean(0) - dreg.mean(0)).abs() < 5 * error).all()
    assert iwae.mean(0).abs().max() > 10 * error.max()  # there is a gradient to agree on
    assert (dreg.var(0) < 0.5 * iwae.var(0)).all()


def test_dreg_leaves_the_decoder_s_gradient_as_it_is() -> None:
    vae, x = linear_vae(shift=0.3).train(), torch.rand(20, *SHAPE)
    found = []
    for objective in (IWAE(8), DReG(8)):
        torch.manual_seed(2)
        gradients(vae, x, objective)
        found.append(vae.decoder[0].weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_iwae_weights_its_best_samples_most() -> None:
    log_weights = torch.tensor([[0.0], [-20.0]], requires_grad=True)
    (-objectives.importance_weighted_bound(log_weights)).sum().backward()
    assert log_weights.grad is not None
    assert log_weights.grad.flatten().tolist() == pytest.approx([-1, 0], abs=1e-6)


def test_free_bits_stop_the_gradient_below_the_floor() -> None:
    kl = torch.tensor([[0.1, 3.0], [0.3, 1.0]], requires_grad=True)
    penalty = objectives.with_free_bits(kl, floor=0.5)
    assert penalty.mean().item() == pytest.approx(0.5 + 2.0)
    penalty.mean().backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [[0.0, 0.5], [0.0, 0.5]]


def test_warm_up_weights_the_kl_in_training_alone() -> None:
    vae, x = linear_vae(beta=2.0), torch.rand(10, *SHAPE)
    objective = ELBO(warmup_epochs=10)
    for epoch, weight in ((0.0, 0.0), (2.5, 0.25), (10.0, 1.0), (99.0, 1.0), (math.inf, 1.0)):
        terms = objective(vae, x, epoch=epoch)
        torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 2 * weight * terms["kl"])
        torch.testing.assert_close(terms["elbo"], -terms["reconstruction"] - terms["kl"])


def test_active_units() -> None:
    means = torch.stack([torch.randn(1_000), 0.01 * torch.randn(1_000), torch.full((1_000,), 5.0)], dim=1)
    assert objectives.active_units(means) == 1


def test_objectives_refuse_models_that_they_are_not_defined_for() -> None:
    with pytest.raises(ConfigError, match=r"model\.beta=2\.0: .* allowed: 1"):
        linear_vae(beta=2.0, objective={"_target_": "vae_lightning.models.objectives.IWAE"})
    free = {"_target_": "vae_lightning.models.objectives.ELBO", "free_bits": 0.5, "kl": "monte_carlo"}
    with pytest.raises(ConfigError, match=r"model\.objective\.free_bits=0\.5"):
        linear_vae(objective=free)
    with pytest.raises(ConfigError, match=r"free_bits=0\.5: needs a KL in closed form"):
        linear_vae().elbo(torch.rand(1, *SHAPE), kl="monte_carlo", free_bits=0.5)


def test_the_default_loss_is_reconstruction_and_weighted_kl_with_free_bits() -> None:
    vae, x = linear_vae(beta=3.0), torch.rand(10, *SHAPE)
    terms = vae.elbo(x, epoch=1.0, warmup_epochs=4.0, free_bits=0.2)
    kl = objectives.kl_divergence(vae.encode(x).mean, vae.encode(x).log_variance)
    floored = torch.where(kl.mean(dim=0) > 0.2, kl, torch.tensor(0.2)).sum(dim=-1)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 3 * 0.25 * floored)
    torch.testing.assert_close(terms["kl"], kl.sum(dim=-1))


def test_a_kl_is_never_below_zero() -> None:
    log_variance = torch.cat([sign * torch.logspace(-12, 0, 2_000) for sign in (-1, 1)])
    assert (objectives.kl_divergence(torch.zeros_like(log_variance), log_variance) >= 0).all()


@pytest.mark.parametrize("objective", [IWAE(7), DReG(7)], ids=["iwae", "dreg"])
@pytest.mark.parametrize("training", [True, False])
def test_elbo_reconstruction_and_kl_are_of_the_same_samples(objective: IWAE, training: bool) -> None:
    vae, x = linear_vae(shift=0.3).train(training), torch.rand(9, *SHAPE)
    terms = objective(vae, x)
    assert torch.equal(terms["elbo"], -(terms["reconstruction"] + terms["kl"]))
    assert (-terms["loss"] > terms["elbo"]).all()
    torch.manual_seed(0)
    expected = vae.log_weights(x, 7)
    torch.manual_seed(0)
    torch.testing.assert_close(objective(vae, x)["elbo"], expected.mean(dim=0))
