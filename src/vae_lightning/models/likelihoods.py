"""Likelihoods p(x|z): from decoder outputs to a `torch.distributions` object over images.

`log_prob(x)` is in nats per image, summed over pixels, normalizing constant included. `mean` is the image to show. To
add one, write a subclass of `Likelihood` and a YAML file in conf/model/likelihood/.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from vae_lightning.config import ConfigError, Positive, PositiveInt
from vae_lightning.models.inputs import ShapeError
from vae_lightning.models.logistic import (
    LEVELS,
    TOP,
    CategoricalLevels,
    DiscretizedLogisticLevels,
    LogisticMixtureLevels,
)

T = TypeVar("T", float, Tensor)
IMAGE_DIMS = 3  # channels, height, width: log_prob sums over them
CROSS_ENTROPY = (
    "grey pixels with a Bernoulli likelihood: loss, nll, elbo and reconstruction are cross-entropies, not likelihoods; "
    "compare them with tutorials only; discretized_logistic and logistic_mixture are likelihoods of 8-bit pixels"
)
LOG_SCALE_FLOOR = -6.0  # of a learnt Gaussian scale, which could otherwise shrink towards 0
GAUSSIAN_LOG_SCALES = -6.0, 2.0  # bounds of log scales that a decoder returns
LOGISTIC_LOG_SCALES = -9.0, 4.0


class Likelihood(nn.Module, ABC):
    """Maps decoder outputs `[..., channels, height, width]` to p(x|z), with `log_prob(x)` of shape `[...]`.

    `binary` is True if it is a distribution over binary images, for which grey pixels give a cross-entropy, and
    `eight_bit` if it is one over the 256 levels k/255. A module with `needs_images` is given training images by
    `initialize`.
    """

    binary = False
    eight_bit = False
    needs_images = False

    @abstractmethod
    def forward(self, outputs: Tensor) -> td.Distribution:
        """Return p(x|z)."""

    def channels(self, image_channels: int) -> int:
        """Return the number of channels of the decoder's outputs, for images of `image_channels`."""
        return image_channels

    def learnt_scale(self) -> Tensor | None:
        """Return the learnt scale that all pixels share, on the scale of pixels in [0, 1]; None without one."""
        return None

    def check_images(self, x: Tensor) -> None:
        """Raise ShapeError for images `[batch, …]` in [0, 1] that p(x|z) is not defined for; of the first batch."""
        if not self.eight_bit:
            return
        name, levels = type(self).__name__, TOP * x.float()
        if ((x == 0) | (x == 1)).all():
            raise ShapeError(
                f"binary images: {name} is a likelihood of 8-bit pixels; use data.pixels=grey, or "
                "model/likelihood=bernoulli for binary pixels"
            )
        if x.dtype == torch.float32 and (levels - levels.round()).abs().max() > 1e-3:
            raise ShapeError(f"pixels between the levels k/255: {name} is a likelihood of 8-bit pixels, without noise")

    def initialize(self, images: Tensor) -> None:
        """Initialize before training, from training images `[n, channels, height, width]`, uint8 on the CPU."""

    def initialize_bias(self, bias: nn.Parameter, images: Tensor) -> None:
        """Set the decoder's last `bias` so that p(x|z) has the mean of `images` `[n, …]`, uint8, as its mean."""
        mean = images.float().mean(dim=0).div(255)
        if bias.numel() != mean[0].numel() * self.channels(len(mean)):  # one per channel: for the mean pixel
            mean = mean.mean(dim=(-2, -1), keepdim=True)
        bias.data.copy_(self.outputs_with_mean(mean).flatten())

    def spread(self, outputs: Tensor) -> Tensor:
        """Return decoder outputs with a mean that increases with `outputs` `[..., channels, height, width]`."""
        return outputs

    def outputs_around(self, image: Tensor) -> Tensor:
        """Return decoder outputs whose mean is about `image` `[..., channels, height, width]`, differentiably.

        By default for means that are a sigmoid of the outputs.
        """
        return self.spread(image.clamp(1e-3, 1 - 1e-3).logit())

    @torch.no_grad()
    def outputs_with_mean(self, mean: Tensor) -> Tensor:
        """Find decoder outputs with p(x|z) of mean image `mean` `[channels, height, width]`, by bisection in `spread`.

        It stays within ±6.9, the log odds of 0.999, where a sigmoid still has a gradient. Raises ConfigError for a
        likelihood with more outputs and without `spread`.
        """
        high = torch.full_like(mean, math.log(999), dtype=torch.float64)
        low = -high
        for _ in range(60):
            middle = (low + high) / 2
            found = self(self.spread(middle)).mean
            if found.shape != mean.shape:
                raise ConfigError(
                    f"model.data_bias=true: {type(self).__name__} needs one output per pixel or a method `spread`; "
                    "allowed: false"
                )
            low, high = torch.where(found < mean, middle, low), torch.where(found < mean, high, middle)
        return self.spread((low + high) / 2).to(mean.dtype)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """Return more per-image metrics `[...]` that are usual for this likelihood."""
        return {}


def remark(likelihood: Likelihood, pixels: str) -> str:
    """Return the remark that belongs to numbers under this likelihood and pixel protocol, or an empty string."""
    return CROSS_ENTROPY if likelihood.binary and pixels == "grey" else ""


def bits_per_dim(likelihood: Likelihood, nats: T, image_shape: Sequence[int]) -> T | None:
    """Return −log₂ p(x) / (channels · height · width) of `nats` per image; None if pixels are not of 8 bits."""
    return nats / (math.prod(image_shape) * math.log(2)) if likelihood.eight_bit else None


def bounded(raw: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Map decoder outputs to log scales within `bounds`: 0 to their middle, with slope 1, and a gradient everywhere."""
    low, high = bounds
    return low + (high - low) * torch.sigmoid(4 / (high - low) * raw)


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
    """Independent Gaussian pixels with standard deviation `scale`.

    `mean` maps decoder outputs to the mean: `sigmoid` keeps it in [0, 1], `identity` leaves it unbounded. With
    scale² = 1/2, −log p(x|z) is the summed squared error plus the constant (pixels / 2) · log π. With `learn_scale`,
    the scale is learnt and balances reconstruction and KL (σ-VAE, Rybkin et al. 2021). It starts at the standard
    deviation of the training images, or at `scale` without them. With `scale="per_pixel"`, the decoder returns it.
    """

    def __init__(
        self,
        scale: Positive | Literal["per_pixel"] = 0.5**0.5,
        learn_scale: bool = False,
        mean: Literal["sigmoid", "identity"] = "sigmoid",
    ) -> None:
        super().__init__()
        self.mean: nn.Module = nn.Sigmoid() if mean == "sigmoid" else nn.Identity()
        self.learn_scale = self.needs_images = learn_scale
        self.per_pixel = scale == "per_pixel"
        if isinstance(scale, str):
            if learn_scale:
                raise ConfigError("model.likelihood.learn_scale=true: a scale per pixel is learnt already; use false")
            return
        if learn_scale and math.log(scale) <= LOG_SCALE_FLOOR:
            raise ConfigError(f"model.likelihood.scale={scale}: a learnt scale should be above e⁻⁶ = 0.0025")
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=learn_scale)
        self.set_scale(scale)

    def set_scale(self, scale: float) -> None:
        start = math.log(scale)
        if self.learn_scale:
            start = LOG_SCALE_FLOOR + math.log(math.expm1(start - LOG_SCALE_FLOOR))  # the inverse of `scale` below
        self.log_scale.data.fill_(start)

    def initialize(self, images: Tensor) -> None:
        if self.learn_scale:
            self.set_scale(max(deviation(images), 2 * math.exp(LOG_SCALE_FLOOR)))

    @property
    def scale(self) -> Tensor:
        """The standard deviation: above e⁻⁶ if learnt, with a gradient everywhere."""
        if not self.learn_scale:  # requires_grad also changes when a model is frozen
            return self.log_scale.exp()
        return (LOG_SCALE_FLOOR + softplus(self.log_scale - LOG_SCALE_FLOOR)).exp()

    def learnt_scale(self) -> Tensor | None:
        return self.scale if self.learn_scale else None

    def channels(self, image_channels: int) -> int:
        return (2 if self.per_pixel else 1) * image_channels

    def spread(self, outputs: Tensor) -> Tensor:
        return torch.cat([outputs, torch.zeros_like(outputs)], dim=-3) if self.per_pixel else outputs

    def outputs_around(self, image: Tensor) -> Tensor:
        return self.spread(image) if isinstance(self.mean, nn.Identity) else super().outputs_around(image)

    def forward(self, outputs: Tensor) -> td.Distribution:
        if self.per_pixel:
            outputs, raw = outputs.chunk(2, dim=-3)
            scale = bounded(raw, GAUSSIAN_LOG_SCALES).exp()
        else:
            scale = self.scale
        return td.Independent(td.Normal(self.mean(outputs), scale, validate_args=False), IMAGE_DIMS, False)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """Return `squared_error`, summed over the pixels of an image, with z drawn from the posterior."""
        return {"squared_error": (p.mean - x).square().sum(dim=(-3, -2, -1))}


GaussianLikelihood = Gaussian  # its name in the package, where the posterior is GaussianPosterior


class DiscretizedLogistic(Likelihood):
    """Independent pixels of 256 levels: logistic distributions, integrated over the bins (Kingma et al. 2016).

    An output of 0 is the location 1/2, and ±1 are the locations of black and white. The scale is learnt: one for all
    pixels, which starts at the standard deviation of the training images, or with `scale="per_pixel"` a second output.
    """

    eight_bit = True

    def __init__(self, scale: Literal["shared", "per_pixel"] = "shared") -> None:
        super().__init__()
        self.needs_images = scale == "shared"
        if self.needs_images:
            self.raw_scale = nn.Parameter(torch.zeros(()))

    def initialize(self, images: Tensor) -> None:
        if self.needs_images:
            low, high = LOGISTIC_LOG_SCALES
            log_scale = math.log(max(deviation(images), 1e-3) * math.sqrt(3) / math.pi)
            share = (log_scale - low) / (high - low)
            self.raw_scale.data.fill_((high - low) / 4 * math.log(share / (1 - share)))  # the inverse of `bounded`

    def learnt_scale(self) -> Tensor | None:
        return bounded(self.raw_scale, LOGISTIC_LOG_SCALES).exp() if self.needs_images else None

    def channels(self, image_channels: int) -> int:
        return (1 if self.needs_images else 2) * image_channels

    def spread(self, outputs: Tensor) -> Tensor:
        return outputs if self.needs_images else torch.cat([outputs, torch.zeros_like(outputs)], dim=-3)

    def outputs_around(self, image: Tensor) -> Tensor:
        return self.spread(2 * image - 1)

    def forward(self, outputs: Tensor) -> td.Distribution:
        outputs, raw = (outputs, self.raw_scale) if self.needs_images else outputs.chunk(2, dim=-3)
        levels = DiscretizedLogisticLevels((1 + outputs) / 2, bounded(raw, LOGISTIC_LOG_SCALES))
        return td.Independent(levels, IMAGE_DIMS, validate_args=False)


class LogisticMixture(Likelihood):
    """Pixels of 256 levels: a mixture of discretized logistics for each pixel (PixelCNN++, Salimans et al. 2017).

    The colours of a pixel depend on each other: they share the component, and within it the location of green is
    linear in red, and that of blue in both. The decoder returns one weight, and a location and a scale per channel, for
    each component; and the slopes.
    """

    eight_bit = True

    def __init__(self, components: PositiveInt = 10) -> None:
        super().__init__()
        self.components = components

    def channels(self, image_channels: int) -> int:
        return self.components * (image_channels + 1) * (image_channels + 2) // 2

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Split outputs into weights `[..., K, 1, h, w]`, locations and scales `[..., K, c, h, w]`, and slopes."""
        outputs = outputs.unflatten(-3, (self.components, -1))
        c = (math.isqrt(1 + 8 * outputs.shape[-3]) - 3) // 2  # the inverse of `channels`
        return outputs.split([1, c, c, c * (c - 1) // 2], dim=-3)

    def spread(self, outputs: Tensor) -> Tensor:
        c = outputs.shape[-3]
        zeros = torch.zeros_like(outputs[..., :1, :, :])
        others = [zeros] * (self.channels(c) // self.components - c - 1)
        return torch.cat([zeros, outputs, *others] * self.components, dim=-3)

    def outputs_around(self, image: Tensor) -> Tensor:
        return self.spread(2 * image - 1)

    def forward(self, outputs: Tensor) -> td.Distribution:
        logits, locs, raw, slopes = self.split(outputs)
        log_scales = bounded(raw, LOGISTIC_LOG_SCALES)
        return LogisticMixtureLevels(logits.squeeze(-3), (1 + locs) / 2, log_scales, slopes.tanh())


class Categorical(Likelihood):
    """Independent pixels of 256 levels, each with its own probability: 256 outputs per channel."""

    eight_bit = True

    def channels(self, image_channels: int) -> int:
        return LEVELS * image_channels

    def spread(self, outputs: Tensor) -> Tensor:
        tilt = torch.linspace(-16, 16, LEVELS, dtype=outputs.dtype, device=outputs.device)
        return (tilt.reshape(-1, 1, 1, 1) * outputs.unsqueeze(-4)).flatten(-4, -3)

    def outputs_around(self, image: Tensor) -> Tensor:
        levels = torch.linspace(0, 1, LEVELS, dtype=image.dtype, device=image.device).reshape(-1, 1, 1, 1)
        return (-0.5 * (32 * (levels - image.unsqueeze(-4))).square()).flatten(-4, -3)  # a deviation of 8 levels

    def forward(self, outputs: Tensor) -> td.Distribution:
        return CategoricalLevels(outputs.unflatten(-3, (LEVELS, -1)))


def deviation(images: Tensor) -> float:
    """Return the standard deviation of the pixels of up to 10,000 images `[n, …]`, uint8, on the scale [0, 1]."""
    return images[:10_000].float().std().item() / 255
