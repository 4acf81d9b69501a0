"""A hierarchical VAE of photographs, whose levels of latents are the bands of a wavelet transform.

It starts as a Haar transform: the encoder returns coefficients, and the decoder transforms them back, so that detail is
kept from the first step. Networks learn corrections to both, and p(z_l | coarser bands). From the start a coefficient
costs what it tells beyond the coarser ones, as in wavelet codecs. The same idea with normalizing flows is Wavelet Flow
(Yu et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated

import torch
import torch.distributions as td
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle
from torch.optim import Adam

from vae_lightning.config import ConfigError, ImageShape, NonNegative, Part, Positive, PositiveInt
from vae_lightning.models.backbones import Backbone, ResidualBlock, Widths
from vae_lightning.models.base import ENOUGH_IMAGES
from vae_lightning.models.levels import LevelsDistribution, LevelsPosterior
from vae_lightning.models.likelihoods import LogisticMixture
from vae_lightning.models.priors import Prior, StandardNormal
from vae_lightning.models.vae import ELBO, VAE

Shape = tuple[int, int, int]  # channels, height, width
Channels = Annotated[Widths, Field(min_length=2)]


def dct(n: int) -> Tensor:
    """Return the orthogonal matrix `[n, n]` of the discrete cosine transform; its first row is the mean times √n."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * k.outer(k + 0.5))
    return matrix / matrix.norm(dim=1, keepdim=True)


def band_shapes(image_shape: Sequence[int], bands: int) -> list[Shape]:
    """Return the shape of each band, from fine to coarse; the last one includes the means.

    Raises ConfigError if the sides of the image cannot be halved that often.
    """
    channels, height, width = image_shape
    if height % 2**bands or width % 2**bands:
        raise ConfigError(
            f"model.channels: {bands} bands need sides divisible by {2**bands}; the images have {height}×{width} pixels"
        )
    details = [(3 * channels, height // 2**n, width // 2**n) for n in range(1, bands + 1)]
    return [*details[:-1], (4 * channels, *details[-1][1:])]


def analyse(x: Tensor, bands: int) -> list[Tensor]:
    """Transform images `[..., channels, height, width]` into bands, from fine to coarse; orthogonal.

    Colours become a mean and differences; then each block of 2×2 pixels a mean, which the next band transforms, and
    three differences.
    """
    haar, result = torch.kron(dct(2), dct(2)).to(x), []
    x = torch.einsum("ij,...jhw->...ihw", dct(x.shape[-3]).to(x), x)
    for _ in range(bands):
        blocks = torch.einsum("ij,...jhw->...ihw", haar, pixel_unshuffle(x, 2).unflatten(-3, (-1, 4)))
        x = blocks[..., 0, :, :]
        result.append(blocks[..., 1:, :, :].flatten(-4, -3))
    return [*result[:-1], torch.cat([x, result[-1]], dim=-3)]


def synthesise(bands: Sequence[Tensor]) -> Tensor:
    """Transform bands back into images: the inverse of `analyse`."""
    channels = bands[-1].shape[-3] // 4
    x, coarsest = bands[-1].split([channels, 3 * channels], dim=-3)
    haar = torch.kron(dct(2), dct(2)).to(x)
    for details in [coarsest, *reversed(bands[:-1])]:
        blocks = torch.cat([x.unsqueeze(-3), details.unflatten(-3, (channels, 3))], dim=-3)
        x = pixel_shuffle(torch.einsum("ij,...ihw->...jhw", haar, blocks).flatten(-4, -3), 2)
    return torch.einsum("ij,...ihw->...jhw", dct(channels).to(x), x)


def flat(bands: Sequence[Tensor]) -> Tensor:
    """Join bands `[..., channels, height, width]` into latents `[..., latent_dim]`."""
    return torch.cat([band.flatten(-3) for band in bands], dim=-1)


def unflat(z: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Split latents `[..., latent_dim]` into bands of these shapes."""
    parts = z.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


class CoarseToFine(nn.Module):
    """From bands, fine to coarse, to features of each `[batch, channels[l], height, width]`, which see coarser ones."""

    def __init__(self, shapes: Sequence[Shape], channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(s[0], c, 3, padding=1) for s, c in zip(shapes, channels, strict=True))
        self.coarser = nn.ModuleList(nn.Conv2d(outs, ins, 3, padding=1) for ins, outs in pairwise(channels))
        self.blocks = nn.ModuleList(nn.Sequential(*(ResidualBlock(c) for _ in range(blocks))) for c in channels)

    def forward(self, bands: Sequence[Tensor]) -> list[Tensor]:
        features: list[Tensor] = []
        for n in reversed(range(len(bands))):
            h = self.inputs[n](bands[n])
            if features:
                h = h + self.coarser[n](interpolate(features[0], scale_factor=2))
            features.insert(0, self.blocks[n](h))
        return features


class Head(nn.Sequential):
    """The last convolution of a network. Its outputs are small at first."""

    def __init__(self, ins: int, outs: int) -> None:
        last = nn.Conv2d(ins, outs, 3, padding=1)
        for parameter in last.parameters():
            parameter.data.mul_(0.1)
        super().__init__(nn.ELU(), last)


class Encoder(nn.Module):
    """From images to mean and raw log variance of each coefficient: those of the transform, corrected by a network.

    Coefficients are normalized with the mean and deviation of their map over the training images. The first standard
    deviation of the posterior is `noise` of the 256 levels.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shapes: Sequence[Shape], channels: Sequence[int], blocks: int, noise: float) -> None:
        super().__init__()
        self.shapes, self.noise = shapes, noise
        dim = sum(map(math.prod, shapes))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.features = CoarseToFine(shapes, channels, blocks)
        self.heads = nn.ModuleList(Head(c, 2 * s[0]) for s, c in zip(shapes, channels, strict=True))

    def initialize(self, images: Tensor) -> None:
        """Measure mean and deviation in `images` `[n, channels, height, width]`, uint8."""
        bands = analyse(images.float() / 255, len(self.shapes))
        maps = [(band.mean(dim=(0, 2, 3)), band.std(dim=(0, 2, 3)).clamp_min(1 / 255)) for band in bands]
        for buffer, values in zip((self.mean, self.scale), zip(*maps, strict=True), strict=True):
            parts = zip(values, self.shapes, strict=True)
            buffer.copy_(flat([value.reshape(-1, 1, 1).expand(shape) for value, shape in parts]))

    def forward(self, x: Tensor) -> Tensor:
        z = (flat(analyse(x, len(self.shapes))) - self.mean) / self.scale
        features = zip(self.heads, self.features(unflat(z, self.shapes)), strict=True)
        outputs = [head(h).chunk(2, dim=1) for head, h in features]
        mean, raw = (flat(part) for part in zip(*outputs, strict=True))
        start = 2 * (self.noise / 255 / self.scale).log().clamp_max(0)
        return torch.cat([z + mean, start + 4 * raw], dim=-1)  # 4: variances change as fast as means

    def image(self, z: Tensor) -> Tensor:
        """Transform latents `[..., latent_dim]` back into images."""
        return synthesise(unflat(self.mean + self.scale * z, self.shapes))


class Decoder(nn.Module):
    """From latents to corrections of the likelihood's parameters."""

    def __init__(self, shapes: Sequence[Shape], channels: Sequence[int], blocks: int, output_channels: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.features = CoarseToFine(shapes, channels, blocks)
        self.head = Head(channels[0], 4 * output_channels)

    def forward(self, z: Tensor) -> Tensor:
        return pixel_shuffle(self.head(self.features(unflat(z, self.shapes))[0]), 2)


class Wavelets(Backbone):
    """The networks of `Pyramid`."""

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        image_shape: Sequence[int],
        channels: Widths,
        blocks: PositiveInt,
        noise: Positive,
        output_channels: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        shapes = band_shapes(image_shape, len(channels))
        self.encoder = Encoder(shapes, channels, blocks, noise)
        self.decoder = Decoder(shapes, channels, blocks, output_channels or image_shape[0])


class Prediction(nn.Module):
    """From the coarser bands, flat `[..., dim]`, to mean and raw log variance of the next finer one."""

    def __init__(self, shapes: Sequence[Shape], channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.shapes = shapes  # of the finer band, and of those that are given
        self.features = CoarseToFine(shapes, channels, blocks)
        self.head = Head(channels[0], 2 * shapes[0][0])

    def forward(self, coarser: Tensor) -> Tensor:
        given = unflat(coarser.reshape(-1, coarser.shape[-1]), self.shapes[1:])
        outputs = self.head(self.features([coarser.new_zeros(len(given[0]), *self.shapes[0]), *given])[0])
        return outputs.flatten(1).reshape(*coarser.shape[:-1], -1)


class WaveletPrior(Prior):
    """The prior of `Pyramid`: N(0, I) for the coarsest band, and Gaussians that depend on the coarser bands."""

    def __init__(
        self, latent_dim: PositiveInt, image_shape: Sequence[int], channels: Widths, blocks: PositiveInt
    ) -> None:
        super().__init__()
        shapes = band_shapes(image_shape, len(channels))
        self.levels = [*map(math.prod, shapes)]
        self.top = StandardNormal(self.levels[-1])
        self.networks = nn.ModuleList(
            Prediction(shapes[level:], channels[level:], blocks) for level in range(len(shapes) - 1)
        )

    def forward(self, temperature: float = 1.0) -> LevelsDistribution:
        return LevelsDistribution(self.top(temperature), list(self.networks), self.levels, temperature)


class Pyramid(VAE):
    """A VAE of several levels, each half as large as the one before: the bands of a Haar transform.

    `channels` are the feature maps of each band's networks, from fine to coarse, and `blocks` their residual blocks.
    The posterior's standard deviation starts at `noise` of the 256 levels. `latent_dim` is the number of pixels. Raises
    ConfigError if the sides of the image cannot be halved as often as there are bands.
    """

    encoder: Encoder

    def __init__(
        self,
        channels: Channels = (48, 64, 64),
        blocks: PositiveInt = 1,
        noise: Positive = 3.0,
        likelihood: Part = LogisticMixture,
        objective: Part = ELBO,
        beta: NonNegative = 1.0,
        image_shape: ImageShape = (3, 32, 32),
        optimizer: Part = Adam,
        schedule: Part | None = None,
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        decay_biases: bool = True,
    ) -> None:
        levels = [*map(math.prod, band_shapes(image_shape, len(channels)))]
        super().__init__(
            latent_dim=sum(levels),
            backbone=partial(Wavelets, channels=channels, blocks=blocks, noise=noise),
            likelihood=likelihood,
            prior=partial(WaveletPrior, channels=channels, blocks=blocks),
            posterior=partial(LevelsPosterior, levels=levels, context=0),
            objective=objective,
            beta=beta,
            image_shape=image_shape,
            optimizer=optimizer,
            schedule=schedule,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            decay_biases=decay_biases,
        )
        self.needs_images = True

    def initialize(self, images: Tensor) -> None:
        super().initialize(images)
        self.encoder.initialize(images[:ENOUGH_IMAGES])

    def likelihood_given(self, z: Tensor, labels: Tensor | None = None) -> td.Distribution:
        return self.likelihood(self.likelihood.outputs_around(self.encoder.image(z)) + self.decoded(z, labels))
