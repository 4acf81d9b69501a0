"""Encoder and decoder networks. Nothing here knows what a VAE is.

A backbone holds two networks, and is told the sizes where they meet the model:

    encoder   images  [batch, *image_shape] → [batch, encoder_outputs]
    decoder   latents [batch, latent_dim]   → [batch, *image_shape]     (logits or means, before any sigmoid)

To add one: a class like those below, and a YAML file in conf/model/backbone/ that names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt

Widths = Sequence[PositiveInt]
Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh"]


def activation_layer(name: Activation) -> nn.Module:
    """The elementwise nonlinearity of that name. Leaky ReLU has slope 0.2, as generative models use it."""
    layers: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "softplus": nn.Softplus,
        "tanh": nn.Tanh,
    }
    return nn.LeakyReLU(0.2) if name == "leaky_relu" else layers[name]()


class Backbone(nn.Module):
    encoder: nn.Module
    decoder: nn.Module


class MLP(Backbone):
    """Fully connected layers of the widths in `hidden`, mirrored in the decoder."""

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        image_shape: Sequence[int] = (1, 28, 28),
        hidden: Widths = (400, 400),
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        pixels = math.prod(image_shape)
        self.encoder = nn.Sequential(nn.Flatten(), *linear_layers([pixels, *hidden, encoder_outputs], activation))
        self.decoder = nn.Sequential(
            *linear_layers([latent_dim, *reversed(hidden), pixels], activation), nn.Unflatten(1, tuple(image_shape))
        )


class Conv(Backbone):
    """3×3 convolutions of stride 2, then fully connected layers; the decoder mirrors them, transposed.

    `channels` are the convolutions' output channels, `padding` theirs, `batch_norm` the ones (counted from 1) that are
    followed by batch normalization, `hidden` the widths of the linear layers between feature maps and latents.
    Each transposed convolution gets the output padding that brings it back to its mirror's size, so that every image
    shape works. Raises ConfigError where the image is too small for so many convolutions.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        image_shape: Sequence[int] = (1, 28, 28),
        channels: Annotated[Widths, Field(min_length=1)] = (32, 64),
        hidden: Widths = (256,),
        activation: Activation = "relu",
        padding: NonNegativeInt | Sequence[NonNegativeInt] = 1,
        batch_norm: Widths = (),
    ) -> None:
        super().__init__()
        image_channels, *size = image_shape
        paddings = [padding] * len(channels) if isinstance(padding, int) else padding
        if len(paddings) != len(channels):
            raise ConfigError(
                f"model.backbone.padding={padding}: should have one entry for each of the {len(channels)} channels"
            )
        if any(layer > len(channels) for layer in batch_norm):
            raise ConfigError(f"model.backbone.batch_norm={batch_norm}: there are {len(channels)} convolutions")

        down: list[nn.Module] = []
        up: list[nn.Module] = []  # built back to front
        widths = [image_channels, *channels]
        for layer, ((ins, outs), pad) in enumerate(zip(pairwise(widths), paddings, strict=True), start=1):
            smaller = [(n + 2 * pad - 3) // 2 + 1 for n in size]
            if min(smaller) < 1:
                raise ConfigError(
                    f"model.backbone.channels={channels}: {len(channels)} convolutions of stride 2 are too many for "
                    f"{'×'.join(map(str, image_shape[1:]))} pixels; {layer - 1} fit"
                )
            missing = [n - ((m - 1) * 2 - 2 * pad + 3) for n, m in zip(size, smaller, strict=True)]
            norm = layer in batch_norm
            down += [
                nn.Conv2d(ins, outs, 3, 2, pad),
                *([nn.BatchNorm2d(outs)] if norm else []),
                activation_layer(activation),
            ]
            # Batch normalization stands at the same feature map on the way up: before the layer that mirrors this one.
            up = [
                *([nn.BatchNorm2d(outs)] if norm else []),
                activation_layer(activation),
                nn.ConvTranspose2d(outs, ins, 3, 2, pad, output_padding=(missing[0], missing[1])),
                *up,
            ]
            size = smaller

        features = channels[-1] * math.prod(size)
        linear = [features, *hidden]
        self.encoder = nn.Sequential(*down, nn.Flatten(), *linear_layers([*linear, encoder_outputs], activation))
        self.decoder = nn.Sequential(
            *linear_layers([latent_dim, *reversed(linear)], activation),
            nn.Unflatten(1, (channels[-1], *size)),
            *up,
        )


def linear_layers(widths: Sequence[int], activation: Activation) -> list[nn.Module]:
    """Linear layers from `widths[0]` to `widths[-1]`, with the activation between them and none at the end."""
    layers: list[nn.Module] = []
    for ins, outs in pairwise(widths):
        layers += [nn.Linear(ins, outs), activation_layer(activation)]
    return layers[:-1]
