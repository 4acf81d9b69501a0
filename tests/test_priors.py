import copy
import math

import pytest
import torch
import torch.distributions as td
from linear import SHAPE, linear_vae

from vae_lightning.models.estimators import kl_divergence
from vae_lightning.models.latents import moments
from vae_lightning.models.posteriors import DiagonalGaussian
from vae_lightning.models.priors import StandardNormal, VampPrior
from vae_lightning.models.vae import VAE

VAMP = {"_target_": "vae_lightning.models.priors.VampPrior", "pseudo_inputs": 7}


def density_over_the_plane(prior) -> float:
    axis = torch.linspace(-8, 8, 801)
    plane = torch.cartesian_prod(axis, axis)
    return prior.log_prob(plane).exp().sum().item() * (16 / 800) ** 2


def test_priors_are_normalized() -> None:
    vae = linear_vae(prior=VAMP)
    with torch.no_grad():
        assert density_over_the_plane(StandardNormal(2)()) == pytest.approx(1, abs=1e-3)
        assert density_over_the_plane(vae.prior_distribution()) == pytest.approx(1, abs=1e-3)


def test_vamp_is_the_mean_of_its_posteriors() -> None:
    vae, z = linear_vae(prior=VAMP), torch.randn(5, 3, 2)
    q = vae.encode(vae.prior.pseudo_inputs)
    each = torch.stack([td.Normal(m, s).log_prob(z).sum(-1) for m, s in zip(q.mean, q.stddev, strict=True)])
    expected = each.logsumexp(0) - math.log(7)
    found = vae.prior_distribution().log_prob(z)
    assert found.shape == (5, 3)
    torch.testing.assert_close(found, expected)


def test_the_mixture_is_exact_for_narrow_components_far_from_the_origin() -> None:
    mean, log_variance = 20 + 5 * torch.randn(50, 40), torch.empty(50, 40).uniform_(-15, 3)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn(50, 40)
    each = torch.stack(
        [
            td.Normal(m, torch.exp(0.5 * v)).log_prob(z.double()).sum(-1)
            for m, v in zip(mean.double(), log_variance.double(), strict=True)
        ]
    )
    found = DiagonalGaussian(mean, log_variance).mixture().log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), each.logsumexp(0) - math.log(50), atol=1e-4, rtol=0)


def test_vamp_initializes_at_training_images_or_their_mean() -> None:
    images = torch.randint(256, (50, *SHAPE), dtype=torch.uint8)
    prior = VampPrior(2, SHAPE, pseudo_inputs=9)
    prior.initialize(images)
    rows = {tuple((image.flatten().float() / 255).tolist()) for image in images}
    assert all(tuple(u.flatten().tolist()) in rows for u in prior.pseudo_inputs)
    prior = VampPrior(2, SHAPE, pseudo_inputs=9, start="mean")
    prior.initialize(images)
    torch.testing.assert_close(prior.pseudo_inputs.mean(0), images.float().mean(0) / 255, atol=0.02, rtol=0)
    assert prior.pseudo_inputs.requires_grad


def test_pseudo_inputs_outside_of_the_range_of_pixels_get_gradients() -> None:
    vae = linear_vae(prior=VAMP)
    vae.prior.pseudo_inputs.data.copy_(
        torch.linspace(-1, 5, vae.prior.pseudo_inputs.numel()).view_as(vae.prior.pseudo_inputs)
    )
    p = vae.prior_distribution()
    clamped = vae.encode(vae.prior.pseudo_inputs.detach().clamp(0, 1)).mixture()
    z = torch.randn(5, 2)
    torch.testing.assert_close(p.log_prob(z), clamped.log_prob(z))
    p.log_prob(z).sum().backward()
    assert (vae.prior.pseudo_inputs.grad != 0).all()


def test_a_copy_of_the_model_makes_its_prior_from_its_own_encoder() -> None:
    vae, z = linear_vae(prior=VAMP), torch.randn(5, 2)
    twin = copy.deepcopy(vae)
    assert set(vae.state_dict()) == {*vae.encoder.state_dict(prefix="encoder."), "prior.pseudo_inputs"} | {
        key for key in vae.state_dict() if key.startswith(("decoder.", "likelihood."))
    }
    torch.testing.assert_close(twin.prior_distribution().log_prob(z), vae.prior_distribution().log_prob(z))
    before = vae.prior_distribution().log_prob(z)
    torch.nn.init.zeros_(twin.encoder[1].weight)
    assert torch.equal(vae.prior_distribution().log_prob(z), before)
    assert not torch.allclose(twin.prior_distribution().log_prob(z), before)


def test_the_model_samples_from_its_prior() -> None:
    vae = linear_vae(prior=VAMP)
    vae.prior.initialize(torch.full((1, *SHAPE), 255, dtype=torch.uint8))  # all components at one place
    q = vae.encode(torch.ones(1, *SHAPE))
    z = vae.prior_distribution().sample((20_000,))
    torch.testing.assert_close(z.mean(0), q.mean[0], atol=0.03, rtol=0)
    expected = vae.decode(q.mean[0]).mean.detach()
    torch.testing.assert_close(vae.sample(20_000).mean(0), expected, atol=0.03, rtol=0)


def test_sampled_kl_agrees_with_the_closed_form_and_is_not_negative() -> None:
    x = torch.rand(1, *SHAPE).expand(100_000, *SHAPE)
    for options in ({}, {"prior": VAMP}):
        vae = linear_vae(**options)
        with torch.no_grad():
            sampled = vae.elbo(x, kl="monte_carlo")["kl"]
            closed = vae.elbo(x[:1])["kl"].item()
            exact = kl_divergence(vae.encode(x[:1]).mean, vae.encode(x[:1]).log_variance).sum().item()
        error = sampled.std().item() / math.sqrt(len(x))
        assert sampled.mean().item() > -4 * error
        if not options:
            assert closed == pytest.approx(exact)
            assert abs(sampled.mean().item() - exact) < 4 * error


class Shifted(StandardNormal):
    """A prior whose distribution has no formula for its moments."""

    def forward(self, temperature: float = 1.0) -> td.Distribution:
        normal = super().forward(temperature)
        return td.TransformedDistribution(normal, td.AffineTransform(15.0, 3.0))


def test_prior_moments() -> None:
    def found(vae: VAE) -> tuple[torch.Tensor, torch.Tensor]:
        return moments(vae.prior_distribution())

    assert [moment.tolist() for moment in found(linear_vae())] == [[0, 0], [1, 1]]
    center, spread = found(linear_vae(prior={"_target_": "test_priors.Shifted"}))
    torch.testing.assert_close(center, torch.full((2,), 15.0), atol=0.2, rtol=0)
    torch.testing.assert_close(spread, torch.full((2,), 3.0), atol=0.1, rtol=0)
    vae = linear_vae(prior=VAMP)
    z = vae.prior_distribution().sample((20_000,))
    for moment, expected in zip(found(vae), (z.mean(0), z.std(0)), strict=True):
        torch.testing.assert_close(moment, expected, atol=0.05, rtol=0)
