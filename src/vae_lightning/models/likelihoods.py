"""p(x|z): each likelihood turns decoder outputs into a `torch.distributions` object over whole images.

Its `log_prob(x)` is in nats per image, summed over pixels, normalizing constants included; its `mean` is the image to
show. To add one, write a class with a `forward`, and a YAML file in conf/model/likelihood/ that names it.
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

IMAGE_DIMS = 3  # channels, height, width: the dimensions that one log_prob sums over
CROSS_ENTROPY = (
    "pixels between 0 and 1 with a Bernoulli likelihood: loss, nll, elbo and reconstruction are cross-entropies, not "
    "likelihoods; they compare with tutorials, not with log likelihoods"
)
LOG_SCALE_FLOOR = -6.0  # of a learnt Gaussian scale, which would else shrink without end on images that fit exactly


class Likelihood(nn.Module, ABC):
    """From decoder outputs `[..., channels, height, width]` to p(x|z), with `log_prob(x)` of shape `[...]`.

    `binary` says that it is a probability of binary images, which grey ones are not.
    """

    binary = False

    @abstractmethod
    def forward(self, outputs: Tensor) -> td.Distribution:
        """p(x|z)."""

    @torch.no_grad()
    def outputs_with_mean(self, mean: Tensor) -> Tensor:
        """Decoder outputs `[channels, height, width]` whose p(x|z) has the mean image `mean`, by bisection.

        They stay within ±6.9, the log odds of 0.999, beyond which a sigmoid has hardly a gradient. Raises ConfigError
        for a likelihood that does not take one output for each pixel.
        """
        high = torch.full_like(mean, math.log(999), dtype=torch.float64)
        low = -high
        for _ in range(60):
            middle = (low + high) / 2
            found = self(middle).mean
            if found.shape != mean.shape:
                raise ConfigError(f"model.data_bias=true: {type(self).__name__} has no output for each pixel's mean")
            low, high = torch.where(found < mean, middle, low), torch.where(found < mean, high, middle)
        return ((low + high) / 2).to(mean.dtype)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """Further per-image figures `[...]` that this likelihood is usually judged by."""
        return {}


def remark(likelihood: Likelihood, pixels: str) -> str:
    """What must be said of numbers under this likelihood and pixel protocol; nothing, where they are what they seem."""
    return CROSS_ENTROPY if likelihood.binary and pixels == "grey" else ""


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, on logits: finite, gradients included, however large the logits are.

    On grey pixels (x between 0 and 1) its negative log_prob is a cross-entropy and no likelihood, as in every tutorial.
    """

    binary = True

    def forward(self, outputs: Tensor) -> td.Distribution:
        return BinaryImages(outputs)


class BinaryImages(td.Independent[td.Bernoulli]):
    """Independent Bernoulli pixels with `logits` `[..., channels, height, width]`; `log_prob` takes grey ones, too."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(td.Bernoulli(logits=logits, validate_args=False), IMAGE_DIMS, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        # td.Bernoulli's own takes its sign from every pixel before they are summed: two passes more, there and back.
        logits, value = torch.broadcast_tensors(self.logits, value)
        cross_entropy = binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -cross_entropy.flatten(-IMAGE_DIMS).sum(dim=-1)


class ContinuousBernoulli(Likelihood):
    """Independent continuous Bernoulli pixels in [0, 1], on logits (Loaiza-Ganem & Cunningham 2019).

    The density that makes the cross-entropy of grey pixels a likelihood: p(x) = C(λ) λˣ (1 − λ)¹⁻ˣ.
    """

    def forward(self, outputs: Tensor) -> td.Distribution:
        return td.Independent(ContinuousBernoulliLogits(outputs), IMAGE_DIMS, validate_args=False)


class ContinuousBernoulliLogits(td.Distribution):
    """The continuous Bernoulli with λ = σ(l), written in the logit l, where it is finite and smooth everywhere.

    With x = l/2, log C = log(l / tanh(l/2)) = log 2 + log(x / tanh x), and E[x] = 1/(1 − e⁻ˡ) − 1/l. Near l = 0, where
    both are 0/0, the first terms of their series stand in. torch's own works on probabilities, and loses both.
    """

    arg_constraints = {}  # noqa: RUF012 (torch.distributions' own form)
    NEAR_ZERO = 0.2

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        logits, value = torch.broadcast_tensors(self.logits, value)
        return self.log_normalizer() - binary_cross_entropy_with_logits(logits, value, reduction="none")

    def log_normalizer(self) -> Tensor:
        """log C, the shape of the logits. It is even in them."""
        near = self.logits.abs() < self.NEAR_ZERO
        square = self.logits.square()
        series = math.log(2) + square / 12 - 7 * square.square() / 1440
        size = torch.where(near, 1.0, self.logits.abs())  # where() must not meet an infinite gradient on either side
        return torch.where(near, series, size.log() - torch.tanh(size / 2).log())

    @property
    def mean(self) -> Tensor:
        near = self.logits.abs() < self.NEAR_ZERO
        series = 0.5 + self.logits / 12 - self.logits**3 / 720
        size = torch.where(near, 1.0, self.logits.abs())
        below = 1 / size + torch.exp(-size) / torch.expm1(-size)  # at −|l|, where nothing overflows
        return torch.where(near, series, torch.where(self.logits < 0, below, 1 - below))


class Gaussian(Likelihood):
    """Independent Gaussian pixels with one standard deviation `scale` for all, fixed or learnt from there.

    `mean` says how decoder outputs become the mean: `sigmoid` keeps it a pixel value, `identity` leaves it free.
    scale² = 1/2 makes −log p(x|z) the summed squared error plus a constant, (pixels / 2) · log π; a learnt scale finds
    the balance of reconstruction and KL by itself (σ-VAE, Rybkin et al. 2021).
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
                raise ConfigError(f"model.likelihood.scale={scale}: one that is learnt stays above e⁻⁶ = 0.0025")
            start = LOG_SCALE_FLOOR + math.log(math.expm1(start - LOG_SCALE_FLOOR))  # where `scale` makes it `scale`
        self.log_scale = nn.Parameter(torch.tensor(start), requires_grad=learn_scale)
        self.mean: nn.Module = nn.Sigmoid() if mean == "sigmoid" else nn.Identity()

    @property
    def scale(self) -> Tensor:
        """The standard deviation, no smaller than e⁻⁶, with a gradient everywhere."""
        if not self.log_scale.requires_grad:
            return self.log_scale.exp()
        return (LOG_SCALE_FLOOR + softplus(self.log_scale - LOG_SCALE_FLOOR)).exp()

    def forward(self, outputs: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(self.mean(outputs), self.scale, validate_args=False), IMAGE_DIMS, False)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """`squared_error`: summed over the pixels of an image, with z drawn from the posterior."""
        return {"squared_error": (p.mean - x).square().sum(dim=(-3, -2, -1))}
