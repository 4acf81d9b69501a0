import math

import pytest
import torch

from vae_lightning.likelihoods import Bernoulli, Gaussian


@pytest.mark.parametrize("logit", [-100.0, -17.0, 0.0, 17.0, 100.0])
def test_bernoulli_is_finite_at_any_logit_and_so_are_its_gradients(logit: float) -> None:
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
    p = Gaussian(scale, "identity")(torch.zeros(1, 1, 1, dtype=torch.float64))
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
