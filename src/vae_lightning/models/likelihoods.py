"""Likelihoods p(x|z): from decoder outputs to a `torch.distributions` object over images.

`log_prob(x)` is in nats per image, summed over pixels, normalizing constant included. `mean` is the image to show. To
add one, write a subclass of `Likelihood` and a YAML file in conf/model/likelihood/.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from vae_lightning.config import ConfigError, Positive

IMAGE_DIMS = 3  # channels, height, width: log_prob sums over them
CROSS_ENTROPY = (
    "grey pixels with a Bernoulli likelihood: loss, nll, elbo and reconstruction are cross-entropies, not likelihoods; "
    "compare them with tutorials only"
)
LOG_SCALE_FLOOR = -6.0  # of a learnt Gaussian scale, which could otherwise shrink towards 0


class Likelihood(nn.Module, ABC):
    """Maps decoder outputs `[..., channels, height, width]` to p(x|z), with `log_prob(x)` of shape `[...]`.

    `binary` is True if it is a distribution over binary images, for which grey pixels give a cross-entropy.
    """

    binary = False

    @abstractmethod
    def forward(self, outputs: Tensor) -> td.Distribution:
        """Return p(x|z)."""

    def initialize(self, bias: nn.Parameter, images: Tensor) -> None:
        """Set the decoder's last `bias` so that p(x|z) has the mean of `images` `[n, …]`, uint8, as its mean."""
        mean = images.float().mean(dim=0).div(255)
        if bias.numel() != mean.numel():  # one per channel: for the mean pixel
            mean = mean.mean(dim=(-2, -1), keepdim=True)
        bias.data.copy_(self.outputs_with_mean(mean).flatten())

    @torch.no_grad()
    def outputs_with_mean(self, mean: Tensor) -> Tensor:
        """Find decoder outputs `[channels, height, width]` with p(x|z) of mean image `mean`, by bisection.

        They stay within ±6.9, the log odds of 0.999, where a sigmoid still has a gradient. Raises ConfigError for a
        likelihood that does not have one output per pixel.
        """
        high = torch.full_like(mean, math.log(999), dtype=torch.float64)
        low = -high
        for _ in range(60):
            middle = (low + high) / 2
            found = self(middle).mean
            if found.shape != mean.shape:
                raise ConfigError(
                    f"model.data_bias=true: {type(self).__name__} needs one output per pixel; allowed: false"
                )
            low, high = torch.where(found < mean, middle, low), torch.where(found < mean, high, middle)
        return ((low + high) / 2).to(mean.dtype)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """Return more per-image metrics `[...]` that are usual for this likelihood."""
        return {}


def remark(likelihood: Likelihood, pixels: str) -> str:
    """Return the remark that belongs to numbers under this likelihood and pixel protocol, or an empty string."""
    return CROSS_ENTROPY if likelihood.binary and pixels == "grey" else ""


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, computed from logits. Values and gradients are finite for logits of any size.

    On grey pixels, x between 0 and 1, the negative log_prob is a cross-entropy, as in tutorials, and not a likelihood.
    """

    binary = True

    def forward(self, outputs: Tensor) -> td.Distribution:
        return BinaryImages(outputs)


class BinaryImages(td.Independent[td.Bernoulli]):
    """Independent Bernoulli pixels with `logits` `[..., channels, height, width]`; `log_prob` accepts grey pixels."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(td.Bernoulli(logits=logits, validate_args=False), IMAGE_DIMS, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        # td.Bernoulli negates every pixel before the sum, which takes two more passes over memory.
        logits, value = torch.broadcast_tensors(self.logits, value)
        cross_entropy = binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -cross_entropy.flatten(-IMAGE_DIMS).sum(dim=-1)


class ContinuousBernoulli(Likelihood):
    """Independent continuous Bernoulli pixels in [0, 1], computed from logits (Loaiza-Ganem & Cunningham 2019).

    p(x) = C(λ) λˣ (1 − λ)¹⁻ˣ: the constant C(λ) turns the cross-entropy of grey pixels into a likelihood.
    """

    def forward(self, outputs: Tensor) -> td.Distribution:
        return td.Independent(ContinuousBernoulliLogits(outputs), IMAGE_DIMS, validate_args=False)


class ContinuousBernoulliLogits(td.Distribution):
    """The continuous Bernoulli with λ = σ(l), as a function of the logit l, finite and smooth everywhere.

    With x = l/2, log C = log(l / tanh(l/2)) = log 2 + log(x / tanh x), and E[x] = 1/(1 − e⁻ˡ) − 1/l. Both are 0/0 at
    l = 0, so their series are used near it. torch's class computes from probabilities and is inaccurate near 0 and 1.
    """

    arg_constraints = {}  # noqa: RUF012 (as in torch.distributions)
    NEAR_ZERO = 0.2

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        logits, value = torch.broadcast_tensors(self.logits, value)
        return self.log_normalizer() - binary_cross_entropy_with_logits(logits, value, reduction="none")

    def log_normalizer(self) -> Tensor:
        """Return log C, in the shape of the logits. It is an even function of them."""
        near = self.logits.abs() < self.NEAR_ZERO
        square = torch.where(near, self.logits, 0.0).square()  # without an overflow in the branch not taken
        series = math.log(2) + square / 12 - 7 * square.square() / 1440
        size = torch.where(near, 1.0, self.logits.abs())  # keeps the gradient of the branch not taken finite
        return torch.where(near, series, size.log() - torch.tanh(size / 2).log())

    @property
    def mean(self) -> Tensor:
        near = self.logits.abs() < self.NEAR_ZERO
        small = torch.where(near, self.logits, 0.0)
        series = 0.5 + small / 12 - small**3 / 720
        size = torch.where(near, 1.0, self.logits.abs())
        below = 1 / size + torch.exp(-size) / torch.expm1(-size)  # the mean at −|l|, which does not overflow
        return torch.where(near, series, torch.where(self.logits < 0, below, 1 - below))


class Gaussian(Likelihood):
    """Independent Gaussian pixels with one standard deviation `scale`, fixed, or learnt from that initial value.

    `mean` maps decoder outputs to the mean: `sigmoid` keeps it in [0, 1], `identity` leaves it unbounded. With
    scale² = 1/2, −log p(x|z) is the summed squared error plus the constant (pixels / 2) · log π. A learnt scale
    balances reconstruction and KL (σ-VAE, Rybkin et al. 2021).
    """

    def __init__(
        self,
        scale: Positive = 0.5**0.5,
        learn_scale: bool = False,
        mean: Literal["sigmoid", "identity"] = "sigmoid",
    ) -> None:
        super().__init__()
        start = math.log(scale)
        if learn_scale:
            if start <= LOG_SCALE_FLOOR:
                raise ConfigError(f"model.likelihood.scale={scale}: a learnt scale should be above e⁻⁶ = 0.0025")
            start = LOG_SCALE_FLOOR + math.log(math.expm1(start - LOG_SCALE_FLOOR))  # the inverse of `scale` below
        self.learn_scale = learn_scale
        self.log_scale = nn.Parameter(torch.tensor(start), requires_grad=learn_scale)
        self.mean: nn.Module = nn.Sigmoid() if mean == "sigmoid" else nn.Identity()

    @property
    def scale(self) -> Tensor:
        """The standard deviation: above e⁻⁶ if learnt, with a gradient everywhere."""
        if not self.learn_scale:  # requires_grad also changes when a model is frozen
            return self.log_scale.exp()
        return (LOG_SCALE_FLOOR + softplus(self.log_scale - LOG_SCALE_FLOOR)).exp()

    def forward(self, outputs: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(self.mean(outputs), self.scale, validate_args=False), IMAGE_DIMS, False)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """Return `squared_error`, summed over the pixels of an image, with z drawn from the posterior."""
        return {"squared_error": (p.mean - x).square().sum(dim=(-3, -2, -1))}


GaussianLikelihood = Gaussian  # its name in the package, where the posterior is GaussianPosterior
