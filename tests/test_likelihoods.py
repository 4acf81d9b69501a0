import math
from functools import partial

import pytest
import torch
from torch import nn

from vae_lightning.config import ConfigError
from vae_lightning.models.backbones import MLP, Backbone, Conv, ResidualConv
from vae_lightning.models.inputs import ShapeError
from vae_lightning.models.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    ContinuousBernoulliLogits,
    DiscretizedLogistic,
    Gaussian,
    LogisticMixture,
    bits_per_dim,
)
from vae_lightning.models.vae import VAE


@pytest.mark.parametrize("logit", [-100.0, -17.0, 0.0, 17.0, 100.0])
def test_bernoulli_value_and_gradient_are_finite_at_any_logit(logit: float) -> None:
    for pixel in (0.0, 0.3, 1.0):
        logits = torch.full((2, 1, 28, 28), logit, requires_grad=True)
        log_prob = Bernoulli()(logits).log_prob(torch.full_like(logits, pixel))
        log_prob.sum().backward()
        # Each pixel: x·log σ(l) + (1 − x)·log σ(−l), with log σ(l) = −log(1 + e^−l) evaluated in Python's doubles.
        log_sigmoid = [-max(-s * logit, 0) - math.log1p(math.exp(-abs(logit))) for s in (1, -1)]
        expected = 784 * (pixel * log_sigmoid[0] + (1 - pixel) * log_sigmoid[1])
        assert log_prob.tolist() == pytest.approx([expected] * 2, rel=1e-5, abs=1e-4)
        gradient = pixel - 1 / (1 + math.exp(-logit))
        assert logits.grad is not None
        assert logits.grad.flatten()[0].item() == pytest.approx(gradient, abs=1e-6)


def test_bernoulli_sums_to_one_over_all_binary_images() -> None:
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).reshape(16, 1, 2, 2)
    p = Bernoulli()(torch.randn(1, 2, 2))
    assert p.log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [0.5**0.5, 0.1, 2.0])
def test_gaussian_integrates_to_one(scale: float) -> None:
    grid = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    p = Gaussian(scale, mean="identity")(torch.zeros(1, 1, 1, dtype=torch.float64))
    density = p.log_prob(grid.reshape(-1, 1, 1, 1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)


def test_gaussian_of_variance_one_half_is_the_squared_error_plus_a_constant() -> None:
    outputs, x = torch.randn(3, 1, 28, 28), torch.rand(3, 1, 28, 28)
    likelihood = Gaussian()
    p = likelihood(outputs)
    squared_error = (outputs.sigmoid() - x).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(likelihood.metrics(p, x)["squared_error"], squared_error)
    torch.testing.assert_close(-p.log_prob(x), squared_error + 784 / 2 * math.log(math.pi))


def test_log_prob_keeps_leading_axes() -> None:
    for likelihood in (Bernoulli(), Gaussian()):
        assert likelihood(torch.randn(5, 3, 1, 28, 28)).log_prob(torch.rand(3, 1, 28, 28)).shape == (5, 3)


@pytest.mark.parametrize("logit", [-30.0, -3.0, -0.201, -0.199, -1e-3, 0.0, 1e-4, 0.05, 0.199, 0.201, 2.0, 30.0])
def test_continuous_bernoulli_integrates_to_one_and_has_its_mean(logit: float) -> None:
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    p = ContinuousBernoulli()(torch.full((1, 1, 1), logit))
    density = p.log_prob(grid.reshape(-1, 1, 1, 1)).double().exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-5)
    assert p.mean.item() == pytest.approx(torch.trapezoid(grid * density, grid).item(), abs=1e-5)


def test_continuous_bernoulli_agrees_with_torch_where_torch_is_accurate() -> None:
    logits, x = torch.linspace(-6, 6, 41, dtype=torch.float64), torch.rand(41, dtype=torch.float64)
    theirs = torch.distributions.ContinuousBernoulli(logits=logits, lims=(0.4999, 0.5001))
    torch.testing.assert_close(ContinuousBernoulliLogits(logits).log_prob(x), theirs.log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logit", [-100.0, -17.0, -1e-6, 0.0, 0.2, 17.0, 100.0])
def test_continuous_bernoulli_value_and_gradient_are_finite(logit: float) -> None:
    logits = torch.full((2, 1, 2, 2), logit, requires_grad=True)
    log_prob = ContinuousBernoulli()(logits).log_prob(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert logits.grad is not None
    # d/dl log p(x) = x − E[x]
    mean = ContinuousBernoulliLogits(torch.tensor(logit, dtype=torch.float64)).mean.item()
    assert logits.grad[:, 0, 0, 0].tolist() == pytest.approx([-mean, 1 - mean], abs=1e-5)


def test_learnt_scale_converges_to_the_root_mean_squared_error() -> None:
    likelihood = Gaussian(scale=1.0, learn_scale=True, mean="identity")
    outputs, x = torch.zeros(50, 1, 8, 8), 0.3 * torch.randn(50, 1, 8, 8)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-likelihood(outputs).log_prob(x).mean()).backward()
        optimizer.step()
    assert likelihood.scale.item() == pytest.approx(x.square().mean().sqrt().item(), rel=0.01)


def test_learnt_scale_stays_above_its_floor_on_exact_reconstructions() -> None:
    likelihood = Gaussian(learn_scale=True, mean="identity")
    likelihood.log_scale.data.fill_(-50.0)
    exact = torch.zeros(1, 1, 8, 8)
    loss = -likelihood(exact).log_prob(exact).sum()
    loss.backward()
    assert loss.isfinite()
    assert likelihood.scale.item() == pytest.approx(math.exp(-6))


def test_fixed_scale_is_not_learnt() -> None:
    assert not [p for p in Gaussian().parameters() if p.requires_grad]
    assert Gaussian(scale=0.3).scale.item() == pytest.approx(0.3)


def test_learnt_scale_starts_at_scale() -> None:
    for scale in (0.003, 0.1, 1.0, 5.0):
        likelihood = Gaussian(scale, learn_scale=True)
        assert likelihood.scale.item() == pytest.approx(scale, rel=1e-4)
        assert likelihood.requires_grad_(False).scale.item() == pytest.approx(scale, rel=1e-4), "frozen"
    with pytest.raises(ConfigError, match=r"model\.likelihood\.scale=0\.001: a learnt scale should be above"):
        Gaussian(0.001, learn_scale=True)


@pytest.mark.parametrize("logit", [-1e4, -120.0, -89.0, -50.0, -1.0, 50.0, 120.0, 1e4])
def test_continuous_bernoulli_mean_has_a_gradient_everywhere(logit: float) -> None:
    logits = torch.tensor(logit, requires_grad=True)
    mean = ContinuousBernoulliLogits(logits).mean
    mean.backward()
    size = abs(logit)
    below = 1 / size - (math.exp(-size) / -math.expm1(-size))
    assert mean.item() == pytest.approx(below if logit < 0 else 1 - below, rel=1e-6)
    variance = 1 / size**2 - math.exp(-size) / math.expm1(-size) ** 2
    assert logits.grad is not None
    assert logits.grad.item() == pytest.approx(variance, rel=1e-3)


@pytest.mark.parametrize("logit", [-1e20, 1e20])
def test_continuous_bernoulli_gradients_do_not_overflow(logit: float) -> None:
    logits = torch.tensor(logit, requires_grad=True)
    p = ContinuousBernoulliLogits(logits)
    for value in (p.mean, p.log_prob(torch.tensor(0.5))):
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite()


ONE_OUTPUT = [Bernoulli(), ContinuousBernoulli(), Gaussian(), Gaussian(mean="identity"), DiscretizedLogistic()]
EIGHT_BIT = [DiscretizedLogistic(), LogisticMixture(3), Categorical()]
SCALED_PARTS = [partial(part, scale="per_pixel") for part in (Gaussian, DiscretizedLogistic)]
SCALED_PARTS += [partial(LogisticMixture, components=3), Categorical]
SCALED = [part() for part in SCALED_PARTS]


@pytest.mark.parametrize("likelihood", [*ONE_OUTPUT, *SCALED], ids=repr)
def test_outputs_with_mean_of_every_likelihood(likelihood) -> None:
    for shape in ((1, 3, 4), (3, 2, 2)):
        mean = torch.linspace(0.16, 0.84, 12).reshape(shape)
        outputs = likelihood.outputs_with_mean(mean)
        assert outputs.shape == (likelihood.channels(shape[0]), *shape[1:])
        torch.testing.assert_close(likelihood(outputs).mean, mean)
    if likelihood in ONE_OUTPUT:
        assert likelihood.outputs_with_mean(torch.zeros(1, 2, 2)).abs().max() <= math.log(999) + 1e-5


@pytest.mark.parametrize("part", SCALED_PARTS, ids=repr)
@pytest.mark.parametrize("backbone", [partial(MLP, hidden=[4]), partial(Conv, channels=[4]), ResidualConv])
def test_backbones_have_the_outputs_that_a_likelihood_needs(part, backbone) -> None:
    images = torch.randint(100, 156, (20, 3, 8, 8), dtype=torch.uint8)
    vae = VAE(2, backbone, part, data_bias=True, image_shape=(3, 8, 8))
    for parameter in vae.decoder.parameters():
        nn.init.zeros_(parameter)
    vae.initialize(images)
    mean = images.float().mean(dim=0) / 255
    mean = mean if isinstance(backbone, partial) and backbone.func is MLP else mean.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(vae.decode_images(torch.zeros(1, 2))[0], mean.expand(3, 8, 8), rtol=0, atol=1e-4)
    assert vae.elbo(images)["loss"].isfinite().all()
    assert vae.log_weights(images, 2).shape == (2, 20)


class Old(Backbone):
    """A backbone of someone else, with the signature of before."""

    def __init__(self, latent_dim, encoder_outputs, image_shape) -> None:
        super().__init__()
        own = MLP(latent_dim, encoder_outputs, image_shape, hidden=[4])
        self.encoder, self.decoder = own.encoder, own.decoder


def test_a_backbone_without_the_argument_works_with_one_output_per_pixel() -> None:
    for likelihood in (Bernoulli, Gaussian, DiscretizedLogistic):
        VAE(2, Old, likelihood, image_shape=(3, 8, 8)).elbo(torch.rand(2, 3, 8, 8))
    words = "needs 60 decoder outputs per pixel; add an argument output_channels to .*Old.*, or use a likelihood with 3"
    with pytest.raises(ConfigError, match=words):
        VAE(2, Old, partial(LogisticMixture, components=6), image_shape=(3, 8, 8))
    pair = (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, (1, 8, 8))))
    vae = VAE(2, pair, Gaussian, image_shape=(1, 8, 8))
    vae.elbo(torch.rand(3, 1, 8, 8))
    vae = VAE(2, pair, partial(Gaussian, scale="per_pixel"), image_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=r"its decoder returns \[3, 1, 8, 8\] .* should be \[3, 2, 8, 8\]"):
        vae.elbo(torch.rand(3, 1, 8, 8))


def test_learnt_scales_start_at_the_deviation_of_the_training_images() -> None:
    images = (128 + 20 * torch.randn(100, 3, 8, 8)).to(torch.uint8)
    for part in (partial(Gaussian, learn_scale=True), DiscretizedLogistic):
        vae = VAE(2, partial(MLP, hidden=[4]), part, image_shape=(3, 8, 8))
        assert vae.needs_images
        vae.initialize(images)
        p = vae.likelihood(torch.zeros(3, 8, 8))
        drawn = p.sample((200,))
        assert drawn.std().item() == pytest.approx(images.float().std().item() / 255, rel=0.05)
    fixed = VAE(2, partial(MLP, hidden=[4]), Gaussian, image_shape=(3, 8, 8))
    assert not fixed.needs_images
    with pytest.raises(ConfigError, match=r"learn_scale=true: a scale per pixel is learnt already"):
        Gaussian("per_pixel", learn_scale=True)


def test_gaussian_scale_per_pixel() -> None:
    outputs = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    p = Gaussian("per_pixel", mean="identity")(torch.cat([outputs, 100 * outputs], dim=1))
    assert p.mean.equal(outputs)
    assert p.stddev.min().item() == pytest.approx(math.exp(-6), rel=1e-3)
    assert p.stddev.max().item() == pytest.approx(math.exp(2), rel=1e-3)


@pytest.mark.parametrize("likelihood", EIGHT_BIT, ids=repr)
def test_images_that_are_not_of_eight_bits_are_refused(likelihood) -> None:
    likelihood.check_images(torch.randint(0, 256, (2, 1, 4, 4)) / 255)
    with pytest.raises(ShapeError, match=r"binary images: .* use data.pixels=grey, or model/likelihood=bernoulli"):
        likelihood.check_images(torch.randint(0, 2, (2, 1, 4, 4)).float())
    with pytest.raises(ShapeError, match="pixels between the levels k/255"):
        likelihood.check_images(torch.rand(2, 1, 4, 4))


def test_bits_per_dimension() -> None:
    uniform = Categorical()
    nats = -uniform(torch.zeros(768, 4, 4)).log_prob(torch.zeros(3, 4, 4)).item()
    assert bits_per_dim(uniform, nats, (3, 4, 4)) == pytest.approx(8)
    assert bits_per_dim(Gaussian(), nats, (3, 4, 4)) is None
