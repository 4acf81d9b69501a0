import math

import pytest
import torch
from linear import SHAPE, exact_log_likelihood, linear_vae
from torch import Tensor

from vae_lightning.analysis.evaluation import (
    aggregate_posterior,
    curve_points,
    evaluate_images,
    importance_sampling,
    posteriors,
    probe_accuracy,
)
from vae_lightning.models.estimators import importance_weighted_bound, kl_divergence
from vae_lightning.models.posteriors import DiagonalGaussian

LABELS = torch.arange(40) % 10


@pytest.fixture
def images() -> Tensor:
    """Return 40 images as bytes."""
    return torch.randint(256, (40, *SHAPE), dtype=torch.uint8)


def test_at_the_true_posterior_every_weight_is_the_exact_likelihood() -> None:
    vae, x = linear_vae(), torch.rand(40, *SHAPE)
    exact = exact_log_likelihood(vae, x)
    with torch.no_grad():
        weights = vae.log_weights(x, k=50)
        elbo = vae.elbo(x, kl="monte_carlo")["elbo"]
    torch.testing.assert_close(weights.double(), exact.expand(50, -1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(elbo.double(), exact, rtol=1e-5, atol=1e-4)


def test_at_a_wrong_posterior_the_bound_rises_to_the_exact_likelihood() -> None:
    vae, x = linear_vae(shift=0.6), torch.rand(20, *SHAPE)
    exact = exact_log_likelihood(vae, x).mean().item()
    with torch.no_grad():
        weights = vae.log_weights(x, k=200_000)
        elbos = [vae.elbo(x)["elbo"].mean().item() for _ in range(50)]
    # The bound at k, averaged over disjoint groups of k samples: an estimate of its expectation.
    groups = {k: weights[: 200_000 // k * k].unflatten(0, (-1, k)) for k in (1, 5, 50, 1_000)}
    bounds = [importance_weighted_bound(group.transpose(0, 1)).mean().item() for group in groups.values()]
    assert bounds[0] < bounds[1] < bounds[2] < bounds[3] < exact + 0.005
    assert bounds[3] == pytest.approx(exact, abs=0.01)
    assert bounds[0] < exact - 0.1
    assert sum(elbos) / 50 == pytest.approx(bounds[0], abs=0.05)


def test_evaluate_finds_the_exact_likelihood(images: Tensor) -> None:
    for shift in (0.0, 0.4):
        vae = linear_vae(shift)
        exact = exact_log_likelihood(vae, images / 255)
        results, sampled, _ = evaluate_images(vae, images, LABELS, samples=20_000, chunk=2_000)
        torch.testing.assert_close(sampled.log_likelihood.double(), exact, rtol=0, atol=0.05)
        assert results["nll"] == pytest.approx(-exact.mean().item(), abs=0.01)
        assert results["nll_stderr"] == pytest.approx(exact.std().item() / math.sqrt(40), rel=0.02)
        assert -results["elbo"] >= results["nll"] - 0.01
        assert results["reconstruction"] + results["kl"] == pytest.approx(-results["elbo"], rel=1e-6)
        if shift == 0:
            assert results["ess_min"] == pytest.approx(20_000, rel=1e-3)
            assert sampled.effective_samples.max() <= 20_000
        else:
            assert 1 <= results["ess_min"] < 19_000


def test_batches_and_chunks_change_no_number(images: Tensor) -> None:
    vae = linear_vae(shift=0.5)
    reference = importance_sampling(vae, images, LABELS, samples=100, batch_size=40, chunk=100)
    for batch_size, chunk in ((1, 100), (40, 1), (7, 9)):
        parts = importance_sampling(vae, images, LABELS, samples=100, batch_size=batch_size, chunk=chunk)
        for name in ("log_likelihood", "kl", "reconstruction", "effective_samples", "deviation"):
            torch.testing.assert_close(getattr(parts, name), getattr(reference, name), rtol=1e-4, atol=1e-4)
        assert list(parts.curve.values()) == pytest.approx(list(reference.curve.values()), abs=1e-4)
    again = importance_sampling(vae, images, LABELS, samples=100, seed=1)
    assert not torch.allclose(again.log_likelihood, reference.log_likelihood, atol=1e-4)


@pytest.mark.proof
def test_a_compiled_likelihood_changes_rounding_only(images: Tensor) -> None:
    vae, labels = linear_vae(shift=0.3).eval(), torch.zeros(20, dtype=torch.long)
    plain = importance_sampling(vae, images[:20], labels, 100, chunk=10)
    compiled = importance_sampling(vae, images[:20], labels, 100, chunk=10, compile=True)
    torch.testing.assert_close(compiled.log_likelihood, plain.log_likelihood, rtol=1e-5, atol=1e-5)


def test_the_curve_ends_at_the_estimate_and_uses_the_first_samples(images: Tensor) -> None:
    vae = linear_vae(shift=0.5)
    many, few = (importance_sampling(vae, images, LABELS, samples=k) for k in (50, 10))
    assert list(many.curve) == [1, 2, 5, 10, 20, 50]
    assert many.curve[50] == pytest.approx(many.log_likelihood.mean().item(), abs=1e-4)
    assert few.curve[10] == pytest.approx(few.log_likelihood.mean().item(), abs=1e-4)


def test_curve_points() -> None:
    assert curve_points(1) == [1]
    assert curve_points(30) == [1, 2, 5, 10, 20, 30]


def test_mutual_information_of_posteriors_far_apart_is_log_n() -> None:
    vae = linear_vae()
    n = 50
    apart = DiagonalGaussian(100 * torch.arange(float(n)).repeat(2, 1).T, torch.zeros(n, 2))
    information, _ = aggregate_posterior(vae, [apart])
    assert information == pytest.approx(math.log(n), abs=1e-3)


def test_mutual_information_of_equal_posteriors_is_zero() -> None:
    vae = linear_vae()
    same = DiagonalGaussian(torch.full((2_000, 2), 0.5), torch.full((2_000, 2), -0.7))
    information, marginal = aggregate_posterior(vae, [same])
    exact = kl_divergence(same.mean, same.log_variance).sum(-1).mean().item()
    assert information == pytest.approx(0, abs=1e-4)
    assert marginal == pytest.approx(exact, abs=0.1)


def test_information_and_marginal_kl_add_up_to_the_kl() -> None:
    vae = linear_vae()
    images = torch.randint(256, (3_000, *SHAPE), dtype=torch.uint8)
    (q,) = posteriors(vae, images, torch.zeros(3_000), batch_size=3_000)
    information, marginal = aggregate_posterior(vae, posteriors(vae, images, torch.zeros(3_000)))
    assert (information, marginal) == pytest.approx(aggregate_posterior(vae, [q]), abs=1e-4), "for any batch size"
    assert information > 0
    assert marginal > 0
    assert information + marginal == pytest.approx(kl_divergence(q.mean, q.log_variance).sum(-1).mean().item(), abs=0.1)


def test_probe_accuracy_of_separable_codes_and_of_noise() -> None:
    labels = torch.arange(200) % 4
    means = torch.nn.functional.one_hot(labels).float() + 0.01 * torch.randn(200, 4)
    assert probe_accuracy(means, labels, means, labels) == {"knn_accuracy": 1.0, "linear_accuracy": 1.0}
    assert probe_accuracy(means, labels * 0, means, labels * 0) == {}, "one class"
    some = torch.where(torch.arange(len(labels)) % 3 == 0, -1, labels)  # a third has no label
    assert probe_accuracy(means, some, means, some) == {"knn_accuracy": 1.0, "linear_accuracy": 1.0}
    noise = probe_accuracy(torch.randn(200, 4), labels, torch.randn(200, 4), labels)
    assert max(noise.values()) < 0.5
