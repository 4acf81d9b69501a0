"""The distributions over 8-bit pixels: sums, an independent reference, gradients, samples, means, exact likelihoods."""

import math

import mpmath
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from vae_lightning.models.likelihoods import Categorical, DiscretizedLogistic, LogisticMixture
from vae_lightning.models.logistic import DiscretizedLogisticLevels, LogisticMixtureLevels

ALL = torch.arange(256) / 255  # as data loaders divide bytes
SCALES = [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]
LOCS = [-3.0, -1e-3, 0.0, 0.5 / 255, 0.3, 0.49999, 128 / 255, 254.5 / 255, 1.0, 1.7]
GRID = torch.cartesian_prod(torch.tensor(LOCS), torch.tensor(SCALES))  # [70, 2]


def on_grid(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return leaf parameters of the grid, `[70, 1]`, which broadcast against ALL."""
    return tuple(p.to(dtype).unsqueeze(-1).requires_grad_() for p in (GRID[:, 0], GRID[:, 1].log()))


def mixture(channels: int, k: int = 3, shape: tuple[int, ...] = (1, 1), spread: float = 1.0) -> LogisticMixtureLevels:
    """Return a mixture with random parameters, of one image."""
    pairs = channels * (channels - 1) // 2
    locs, log_scales = 0.5 + 0.4 * spread * torch.randn(k, channels, *shape), -3 + torch.randn(k, channels, *shape)
    return LogisticMixtureLevels(torch.randn(k, *shape), locs, log_scales, torch.randn(k, pairs, *shape).tanh())


def reference(level: int, loc: float, scale: float) -> mpmath.mpf:
    """Return the log probability of a level: the difference of two values of the CDF, with 400 digits."""
    with mpmath.workdps(400):
        loc, scale = mpmath.mpf(loc), mpmath.mpf(scale)
        below, above = ((mpmath.mpf(2 * level + side) / 510 - loc) / scale for side in (-1, 1))
        lower = 0 if level == 0 else 1 / (1 + mpmath.exp(-below))
        upper = 1 if level == 255 else 1 / (1 + mpmath.exp(-above))
        difference = upper - lower
        return mpmath.log(difference) if difference else mpmath.mpf("-inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_a_pixel_sum_to_one(dtype: torch.dtype) -> None:
    total = DiscretizedLogisticLevels(*on_grid(dtype)).log_prob(ALL.to(dtype)).exp().sum(dim=-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_agrees_with_differences_of_cdfs_in_many_digits() -> None:
    loc, log_scale = on_grid()
    found = DiscretizedLogisticLevels(loc, log_scale).log_prob(ALL)
    for row, (at, scale) in enumerate(zip(loc[:, 0].tolist(), log_scale[:, 0].exp().tolist(), strict=True)):
        nearest = min(255, max(0, round(255 * at)))
        for level in {0, 1, 254, 255, nearest, max(0, nearest - 1), min(255, nearest + 1), 77}:
            expected = float(reference(level, at, scale))
            if math.isfinite(expected):  # 400 digits end at -921
                # 1e-6: where the probability is 1, and its logarithm rounded to 0
                assert found[row, level].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), (at, scale, level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_everywhere(dtype: torch.dtype) -> None:
    loc, log_scale = on_grid(dtype)
    log_prob = DiscretizedLogisticLevels(loc, log_scale).log_prob(ALL.to(dtype))
    gradients = torch.autograd.grad(log_prob.sum(), (loc, log_scale))
    assert all(values.isfinite().all() for values in (log_prob, *gradients))
    moved = torch.autograd.grad(DiscretizedLogisticLevels(loc, log_scale).mean.sum(), (loc, log_scale))
    assert all(values.isfinite().all() for values in moved)


@pytest.mark.parametrize("likelihood", [DiscretizedLogistic("per_pixel"), LogisticMixture(2), Categorical()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_decoder_output(likelihood, dtype: torch.dtype) -> None:
    for size in (0.0, 1.0, 100.0):
        outputs = (size * torch.randn(1, likelihood.channels(3), 8, 32)).requires_grad_()
        x = (torch.randint(0, 256, (1, 3, 8, 32)) / 255).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            p = likelihood(outputs)
            log_prob = p.log_prob(x)
        gradient, of_mean = (torch.autograd.grad(y.sum(), outputs, retain_graph=True)[0] for y in (log_prob, p.mean))
        assert log_prob.dtype == torch.float32
        assert all(values.isfinite().all() for values in (log_prob, gradient, of_mean))


def test_pixels_in_bfloat16_are_the_same_levels() -> None:
    p = DiscretizedLogisticLevels(torch.tensor(0.4), torch.tensor(-4.0))
    torch.testing.assert_close(p.log_prob(ALL.bfloat16()), p.log_prob(ALL), rtol=0, atol=0)


def test_probabilities_of_colours_sum_to_one() -> None:
    """P(red), summed over all greens and blues of the joint, is the mixture of red alone; and that sums to one."""
    p = mixture(channels=3)
    red = LogisticMixtureLevels(
        p.log_weights, p.locs[0].unsqueeze(1), p.log_scales[0].unsqueeze(1), torch.zeros(3, 0, 1, 1)
    )
    marginal = red.log_prob(ALL.reshape(-1, 1, 1, 1)).exp()
    assert marginal.sum().item() == pytest.approx(1, abs=1e-5)
    others = torch.cartesian_prod(ALL, ALL)  # green and blue
    for level in (0, 1, 100, 200, 254, 255):
        values = torch.cat([ALL[level].expand(len(others), 1), others], dim=1).reshape(-1, 3, 1, 1)
        assert p.log_prob(values).exp().sum().item() == pytest.approx(marginal[level].item(), abs=1e-5)


def test_mixture_agrees_with_its_definition() -> None:
    p, x = mixture(channels=3, shape=(2, 2)), torch.randint(0, 256, (3, 2, 2)) / 255
    expected = 0.0
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        r, g, b = x[:, row, column].tolist()
        total = mpmath.mpf(0)
        for k in range(3):
            c = [slope[k, row, column].item() for slope in p.coefficients]
            shifts = [0.0, c[0] * (r - 0.5), c[1] * (r - 0.5) + c[2] * (g - 0.5)]
            log_prob = mpmath.mpf(p.log_weights[k, row, column].item())
            for i, value in enumerate((r, g, b)):
                loc, scale = p.locs[i][k, row, column].item(), p.log_scales[i][k, row, column].exp().item()
                log_prob += reference(round(255 * value), loc + shifts[i], scale)
            total += mpmath.exp(log_prob)
        expected += float(mpmath.log(total))
    assert p.log_prob(x).item() == pytest.approx(expected, rel=1e-4)


def test_frequencies_of_samples() -> None:
    loc, log_scale = torch.tensor([0.02, 0.5, 0.97]), torch.tensor([0.05, 0.01, 0.3]).log()
    p = DiscretizedLogisticLevels(loc, log_scale)
    assert_frequencies(p.sample((200_000,)), p.log_prob(ALL.unsqueeze(1)).exp())


def test_frequencies_of_samples_of_a_mixture() -> None:
    p = mixture(channels=2, spread=0.5)
    assert p.sample((5, 4)).shape == (5, 4, 2, 1, 1)
    drawn = p.sample((200_000,)).reshape(-1, 2)
    pairs = torch.cartesian_prod(ALL, ALL)
    joint = p.log_prob(pairs.reshape(-1, 2, 1, 1)).exp().reshape(256, 256)
    assert_frequencies(drawn, torch.stack([joint.sum(dim=1), joint.sum(dim=0)], dim=1))
    # The dependence, in coarse cells of 16 x 16 levels
    cell = (drawn[:, 0] * 255 // 16 * 16 + drawn[:, 1] * 255 // 16).long()
    coarse = joint.reshape(16, 16, 16, 16).sum(dim=(1, 3)).flatten()
    assert_frequencies((cell / 255).unsqueeze(1), coarse.unsqueeze(1))
    categorical = Categorical()(torch.randn(256, 1, 1))
    assert_frequencies(categorical.sample((200_000,)).reshape(-1, 1), categorical.log_weights.exp().reshape(256, 1))


def assert_frequencies(drawn: Tensor, probabilities: Tensor) -> None:
    """Compare samples `[n, columns]` in [0, 1] with probabilities `[256, columns]`: chi-squared of cells above 5."""
    torch.testing.assert_close(probabilities.sum(dim=0), torch.ones(probabilities.shape[1]))
    for column, expected in zip(drawn.T, probabilities.T.double(), strict=True):
        counts = torch.bincount((255 * column).round().long(), minlength=256).double()
        expected = expected / expected.sum() * len(column)
        large = expected > 5
        pooled = [torch.cat([v[large], v[~large].sum()[None]]) for v in (counts, expected)]
        observed, wanted = (v if pooled[1][-1] > 1 else v[:-1] * len(column) / v[:-1].sum() for v in pooled)
        assert chisquare(observed, wanted).pvalue > 1e-3


def test_mean_is_the_expectation() -> None:
    for channels, images in ((1, ALL.reshape(-1, 1, 1, 1)), (2, torch.cartesian_prod(ALL, ALL).reshape(-1, 2, 1, 1))):
        p = mixture(channels, spread=0.3)
        expected = torch.tensordot(p.log_prob(images).exp(), images, dims=1)
        torch.testing.assert_close(p.mean, expected, rtol=0, atol=2e-3 if channels > 1 else 1e-4)
        best = p.locs[0][p.log_weights.argmax(), 0, 0]  # of the likeliest component: not the mean
        assert (p.mean - best).abs().max() > 0.02
    loc, log_scale = on_grid()
    p = DiscretizedLogisticLevels(loc, log_scale)
    error = (p.mean[:, 0] - (p.log_prob(ALL).exp() * ALL).sum(dim=-1)).abs()
    assert error.max() <= 0.501 / 255
    assert error[GRID[:, 1] >= 1e-3].max() < 2e-4


def test_exactly_solvable_likelihoods() -> None:
    flat = Categorical()(torch.zeros(256, 2, 3))  # 256 channels of one-channel images
    x = torch.randint(0, 256, (5, 1, 2, 3)) / 255
    assert flat.log_prob(x).tolist() == pytest.approx([-6 * math.log(256)] * 5, rel=1e-6)
    # Means half-way between black and white, with a scale near 0: each has probability 1/2, in every component.
    k, shape = 4, (1, 2, 2)
    narrow = LogisticMixtureLevels(
        torch.randn(k, 2, 2), torch.full((k, *shape), 0.5), torch.full((k, *shape), 40.0), torch.zeros(k, 0, 2, 2)
    )
    ends = torch.tensor([0.0, 1.0, 1.0, 0.0]).reshape(shape)
    assert narrow.log_prob(ends).item() == pytest.approx(-4 * math.log(2), rel=1e-5)
    # Of one component and no dependence, a mixture is the product of its channels.
    one = mixture(3, k=1, shape=(4, 4))
    independent = LogisticMixtureLevels(
        torch.zeros(1, 4, 4), *(torch.stack(p, 1) for p in (one.locs, one.log_scales)), torch.zeros(1, 3, 4, 4)
    )
    x = torch.randint(0, 256, (3, 4, 4)) / 255
    product = DiscretizedLogisticLevels(torch.cat(one.locs), torch.cat(one.log_scales)).log_prob(x).sum()
    torch.testing.assert_close(independent.log_prob(x), product)


def test_axes_broadcast() -> None:
    for likelihood in (DiscretizedLogistic("per_pixel"), DiscretizedLogistic(), LogisticMixture(2), Categorical()):
        x = torch.randint(0, 256, (3, 2, 4, 4)) / 255
        p = likelihood(torch.randn(5, 3, likelihood.channels(2), 4, 4))
        assert p.log_prob(x).shape == (5, 3)
        assert p.mean.shape == p.sample().shape == (5, 3, 2, 4, 4)
        assert (255 * p.sample()).frac().isclose(torch.zeros(())).float().mean() > 0.9
        assert likelihood(torch.zeros(likelihood.channels(2), 4, 4)).log_prob(x).shape == (3,)
