"""Distributions over images of 256 levels per channel, k/255: the discretized logistic, and mixtures of it.

A level has the probability of its bin under a logistic distribution: (k ± ½)/255, where the bins of levels 0 and 255
extend to −∞ and ∞, so that the probabilities of a pixel sum to one. Locations and scales are in units of pixels in
[0, 1]. Values, and their gradients, are finite for scales from 1e-5 to 10 and any location.
"""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor
from torch.nn.functional import softplus

LEVELS = 256
TOP = LEVELS - 1
Shape = torch.Size | list[int] | tuple[int, ...]  # as in torch.distributions


def levels_of(value: Tensor, like: Tensor) -> Tensor:
    """Return the levels 0 … 255 of pixels in [0, 1], in the precision of `like`; exact also for pixels in bfloat16."""
    return (TOP * value.to(like.dtype)).round()


def log_mass(level: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability of levels under discretized logistics, in nats; the three shapes broadcast.

    With the edges l < u of a bin, in units of the scale, σ(u) − σ(l) = σ(u) σ(−l) (1 − exp(l − u)): a product, which
    does not cancel where both are near 0 or 1.
    """
    pixel = level / TOP
    rest = (level - LEVELS * pixel + pixel) / TOP  # rounding error of `pixel`, exactly: it exceeds the smallest scales
    distance, inverse = pixel - loc + rest, torch.exp(-log_scale)
    below = softplus((distance - 0.5 / TOP) * inverse)  # −log σ(−l)
    above = softplus((-0.5 / TOP - distance) * inverse)  # −log σ(u)
    width = torch.log(-torch.expm1(-inverse / TOP))
    first, last = level == 0, level == TOP
    return torch.where(first | last, 0.0, width) - torch.where(first, 0.0, below) - torch.where(last, 0.0, above)


def clipped_mean(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return the mean of a logistic distribution that is clipped to [0, 1].

    It differs from that of the discretized one by less than 2e-4 for scales from 1e-3, and by half a level at most: it
    is the integral of P(x > t) over t, and the other is the sum over the edges of the bins.
    """
    scale = log_scale.exp()
    return scale * (softplus(loc / scale) - softplus((loc - 1) / scale))


def draw(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Draw from discretized logistics: round draws of the logistic distribution to levels, in [0, 1]."""
    uniform = torch.rand_like(loc).clamp(torch.finfo(loc.dtype).tiny, 1 - torch.finfo(loc.dtype).eps)
    return (TOP * (loc + log_scale.exp() * uniform.logit())).round().clamp(0, TOP) / TOP


class DiscretizedLogisticLevels(td.Distribution):
    """A discretized logistic for each entry of `loc` and `log_scale` (Kingma et al. 2016)."""

    arg_constraints = {}  # noqa: RUF012 (as in torch.distributions)

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        super().__init__(self.loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return log_mass(levels_of(value, self.loc), self.loc, self.log_scale)

    @property
    def mean(self) -> Tensor:
        """The mean before rounding: see `clipped_mean`."""
        return clipped_mean(self.loc, self.log_scale)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return draw(self.loc.expand(shape), self.log_scale.expand(shape))


class LogisticMixtureLevels(td.Distribution):
    """A mixture of K discretized logistics per pixel, with linear dependence of channels (Salimans et al. 2017).

    `logits` are `[..., K, height, width]`; `locs` and `log_scales` `[..., K, channels, height, width]`. Given the
    component, the location of channel i is locs[i] + Σ c[i, j] (x[j] − ½) over the channels j < i of the pixel, with
    `coefficients` c[1, 0], c[2, 0], c[2, 1], … `[..., K, channels (channels − 1) / 2, height, width]`.
    """

    arg_constraints = {}  # noqa: RUF012 (as in torch.distributions)

    def __init__(self, logits: Tensor, locs: Tensor, log_scales: Tensor, coefficients: Tensor) -> None:
        self.log_weights = logits.log_softmax(dim=-3)
        self.locs, self.log_scales, self.coefficients = (p.unbind(dim=-3) for p in (locs, log_scales, coefficients))
        super().__init__(logits.shape[:-3], locs.shape[-3:], validate_args=False)

    def loc_given(self, channel: int, previous: list[Tensor]) -> Tensor:
        """Return the locations of a channel `[..., K, height, width]`, given the pixels of the channels before it."""
        loc, start = self.locs[channel], channel * (channel - 1) // 2
        for x, coefficient in zip(previous, self.coefficients[start : start + channel], strict=True):
            loc = loc + coefficient * (x - 0.5)
        return loc

    def log_prob(self, value: Tensor) -> Tensor:
        return self.pixel_log_prob(value).flatten(-2).sum(dim=-1)

    def pixel_log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of each pixel, of all its channels together: `[..., height, width]`."""
        levels = levels_of(value, self.log_weights).unsqueeze(-4).unbind(dim=-3)  # each [..., 1, height, width]
        log_joint = self.log_weights
        for i, (level, log_scale) in enumerate(zip(levels, self.log_scales, strict=True)):
            loc = self.loc_given(i, [other / TOP for other in levels[:i]])
            log_joint = log_joint + log_mass(level, loc, log_scale)
        return log_joint.logsumexp(dim=-3)

    @property
    def mean(self) -> Tensor:
        """E[x], `[..., channels, height, width]`: the weighted mean over components, with the means before rounding.

        The mean of a channel within a component is that given the means of the channels before it. This is exact as
        long as clipping to [0, 1] does not matter; with random parameters, the median error is below 1e-3.
        """
        means: list[Tensor] = []  # within each component
        for i, log_scale in enumerate(self.log_scales):
            means.append(clipped_mean(self.loc_given(i, means), log_scale))
        return (self.log_weights.exp().unsqueeze(-3) * torch.stack(means, dim=-3)).sum(dim=-4)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw the component of each pixel, then its channels one after the other."""
        log_weights = self.log_weights.expand(*sample_shape, *self.log_weights.shape)
        component = td.Categorical(logits=log_weights.movedim(-3, -1)).sample().unsqueeze(-3)  # [..., 1, h, w]

        drawn: list[Tensor] = []
        for i, log_scale in enumerate(self.log_scales):
            loc = self.loc_given(i, drawn).expand(log_weights.shape).gather(-3, component)
            drawn.append(draw(loc, log_scale.expand(log_weights.shape).gather(-3, component)))
        return torch.cat(drawn, dim=-3)


class CategoricalLevels(td.Distribution):
    """A categorical distribution over the 256 levels, with `logits` `[..., 256, channels, height, width]`."""

    arg_constraints = {}  # noqa: RUF012 (as in torch.distributions)

    def __init__(self, logits: Tensor) -> None:
        self.log_weights = logits.log_softmax(dim=-4)
        super().__init__(logits.shape[:-4], logits.shape[-3:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        level = levels_of(value, self.log_weights).long().unsqueeze(-4)
        shape = torch.broadcast_shapes(level.shape[:-4], self.batch_shape)
        log_weights = self.log_weights.expand(*shape, *self.log_weights.shape[-4:])
        return log_weights.gather(-4, level.expand(*shape, *level.shape[-4:])).flatten(-4).sum(dim=-1)

    @property
    def mean(self) -> Tensor:
        values = torch.linspace(0, 1, LEVELS, dtype=self.log_weights.dtype, device=self.log_weights.device)
        return torch.tensordot(self.log_weights.exp().movedim(-4, -1), values, dims=1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        level = td.Categorical(logits=self.log_weights.movedim(-4, -1)).sample(torch.Size(sample_shape))
        return level.to(self.log_weights.dtype) / TOP
