"""Backbones: an encoder and a decoder network each, independent of the model.

    encoder   images  [batch, *image_shape] → [batch, encoder_outputs]
    decoder   latents [batch, latent_dim]   → [batch, *image_shape]     (logits or means, before any sigmoid)

A likelihood may need more outputs per pixel, such as a scale. With the argument `output_channels`, the decoder returns
[batch, output_channels, height, width]. It is passed only if it differs from the channels of the images.

To add a backbone, write a subclass of `Backbone` and a YAML file in conf/model/backbone/.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeGuard

import torch
from pydantic import Field, SkipValidation
from torch import Tensor, nn

from vae_lightning.config import ConfigError, NonNegativeInt, Part, PositiveInt, build, class_and_arguments, locate

Widths = Annotated[Sequence[PositiveInt], Field(max_length=100)]  # one entry per layer
Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh"]
Networks = Annotated[Part | tuple[nn.Module, nn.Module], SkipValidation]  # or (encoder, decoder)


def activation_layer(name: Activation) -> nn.Module:
    """Return the activation layer of that name. Leaky ReLU has slope 0.2, as is usual for generative models."""
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
    """The base class: a subclass sets `encoder` and `decoder` in its constructor."""

    encoder: nn.Module
    decoder: nn.Module


class Pair(Backbone):
    """An encoder and a decoder of your own, for the shapes above. Raises ConfigError if they do not take them."""

    NOT_STORED = "(encoder, decoder)"  # in place of a spec in the hyperparameters

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        for name, network, shape in [
            ("encoder", self.encoder, (2, *image_shape)),
            ("decoder", self.decoder, (2, latent_dim)),
        ]:
            try:  # with a copy, so that no running statistics change
                with torch.no_grad():
                    deepcopy(network).cpu().eval()(torch.zeros(shape))
            except Exception as error:  # of any type
                reason = " ".join(str(error).split())
                raise ConfigError(f"model.backbone: its {name} does not take shape {shape} ({reason})") from error


def make_backbone(
    part: object, latent_dim: int, encoder_outputs: int, image_shape: Sequence[int], output_channels: int
) -> Backbone:
    """Build the backbone that `part` describes, or wrap a pair `(encoder, decoder)`. Raises ConfigError."""
    if part == Pair.NOT_STORED:
        raise ConfigError(
            "model.backbone: was a pair of modules, which a checkpoint does not store; give it again: "
            "load_from_checkpoint(path, backbone=(encoder, decoder))"
        )
    if is_pair(part):
        return Pair(*part, latent_dim, image_shape)
    given: dict[str, Any] = {"latent_dim": latent_dim, "encoder_outputs": encoder_outputs, "image_shape": image_shape}
    if output_channels != image_shape[0]:
        name, _ = class_and_arguments(part, "model.backbone")
        parameters = inspect.signature(locate(name, Backbone, "model.backbone._target_")).parameters.values()
        if not any(p.name == "output_channels" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise ConfigError(
                f"model.backbone: the likelihood needs {output_channels} decoder outputs per pixel; add an argument "
                f"output_channels to {name}, or use a likelihood with {image_shape[0]}"
            )
        given["output_channels"] = output_channels
    return build(part, Backbone, "model.backbone", **given)


def is_pair(part: object) -> TypeGuard[tuple[nn.Module, nn.Module]]:
    return isinstance(part, tuple | list) and len(part) == 2 and all(isinstance(p, nn.Module) for p in part)


class MLP(Backbone):
    """Fully connected layers of the widths in `hidden`, mirrored in the decoder.

    `gated` layers compute (W h + b) ⊙ σ(V h + c) in place of an activation (Dauphin et al. 2017), as in the VampPrior
    paper. `batch_norm` normalizes each hidden layer before its activation.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        image_shape: Sequence[int] = (1, 28, 28),
        hidden: Widths = (400, 400),
        activation: Activation = "relu",
        gated: bool = False,
        batch_norm: bool = False,
        output_channels: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if gated and activation != "relu":
            raise ConfigError(f"model.backbone.activation={activation}: gated layers have no activation")
        pixels, shape = math.prod(image_shape), (output_channels or image_shape[0], *image_shape[1:])
        encoder = linear_layers([pixels, *hidden, encoder_outputs], activation, gated, batch_norm)
        decoder = linear_layers([latent_dim, *reversed(hidden), math.prod(shape)], activation, gated, batch_norm)
        self.encoder = nn.Sequential(nn.Flatten(), *encoder)
        self.decoder = nn.Sequential(*decoder, nn.Unflatten(1, shape))


class Conv(Backbone):
    """3×3 convolutions of stride 2, then fully connected layers; the decoder mirrors them with transposed convolutions.

    `channels` are the output channels of the convolutions and `padding` their padding. `batch_norm` lists the
    convolutions, counted from 1, that are followed by batch normalization. `hidden` are the widths of the linear layers
    between feature maps and latents. The output padding of each transposed convolution restores the size of its mirror,
    so every image shape works. Raises ConfigError if the image is too small for the number of convolutions.
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
        output_channels: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        image_channels, *size = image_shape
        paddings = [padding] * len(channels) if isinstance(padding, int) else padding
        if len(paddings) != len(channels):
            raise ConfigError(
                f"model.backbone.padding={padding}: should have {len(channels)} entries, one per entry of channels"
            )
        if any(layer > len(channels) for layer in batch_norm):
            raise ConfigError(f"model.backbone.batch_norm={batch_norm}: should be from 1 to {len(channels)}")

        down: list[nn.Module] = []
        up: list[nn.Module] = []  # built in reverse order
        widths = [image_channels, *channels]
        for layer, ((ins, outs), pad) in enumerate(zip(pairwise(widths), paddings, strict=True), start=1):
            smaller = [(n + 2 * pad - 3) // 2 + 1 for n in size]
            if min(smaller) < 1:
                raise ConfigError(
                    f"model.backbone.channels={channels}: too many convolutions of stride 2 for "
                    f"{'×'.join(map(str, image_shape[1:]))} pixels; at most {layer - 1}"
                )
            missing = [n - ((m - 1) * 2 - 2 * pad + 3) for n, m in zip(size, smaller, strict=True)]
            norm = layer in batch_norm
            down += [
                nn.Conv2d(ins, outs, 3, 2, pad),
                *([nn.BatchNorm2d(outs)] if norm else []),
                activation_layer(activation),
            ]
            # The decoder normalizes the same feature map: before the layer that mirrors this one.
            up = [
                *([nn.BatchNorm2d(outs)] if norm else []),
                activation_layer(activation),
                nn.ConvTranspose2d(
                    outs, ins if up else output_channels or ins, 3, 2, pad, output_padding=(missing[0], missing[1])
                ),
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


class ResidualConv(Backbone):
    """Residual convolutions, for images of 28 to 64 pixels per side.

    Each entry of `channels` is one resolution, half of the one before, with `blocks` residual blocks (pre-activation,
    He et al. 2016). `groups` above 0 adds group normalization (Wu & He 2018). With `spatial`, the latents are feature
    maps of the last resolution, which convolutions read and write in place of linear layers: `latent_dim` is then
    maps · height · width. Raises ConfigError if the sides of the image cannot be halved that often, or if
    `groups` or `latent_dim` do not fit.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        image_shape: Sequence[int] = (1, 28, 28),
        channels: Annotated[Widths, Field(min_length=1)] = (32, 64, 64),
        blocks: PositiveInt = 2,
        groups: NonNegativeInt = 0,
        spatial: bool = False,
        output_channels: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        image_channels, height, breadth = image_shape
        shrink = 2 ** (len(channels) - 1)
        if height % shrink or breadth % shrink:
            raise ConfigError(
                f"model.backbone.channels={list(channels)}: needs sides divisible by {shrink}; the images have "
                f"{height}×{breadth} pixels"
            )
        if groups and any(width % groups for width in channels):
            raise ConfigError(f"model.backbone.groups={groups}: should divide all of channels={list(channels)}")
        small = (channels[-1], height // shrink, breadth // shrink)
        positions = small[1] * small[2]
        if spatial and (latent_dim % positions or encoder_outputs % positions):
            raise ConfigError(
                f"model.backbone.spatial=true: latent_dim, plus the classes of a conditional model, is {latent_dim}; "
                f"it should be a multiple of {small[1]}·{small[2]}, the positions of the last resolution"
            )
        down: list[nn.Module] = [nn.Conv2d(image_channels, channels[0], 3, padding=1)]
        up: list[nn.Module] = [nn.Linear(latent_dim, math.prod(small)), nn.Unflatten(1, small)]
        if spatial:
            maps = latent_dim // positions
            up = [nn.Unflatten(1, (maps, *small[1:])), nn.Conv2d(maps, channels[-1], 3, padding=1)]
        for resolution, width in enumerate(channels):
            if resolution:
                down.append(nn.Conv2d(channels[resolution - 1], width, 3, stride=2, padding=1))
            down += [ResidualBlock(width, groups) for _ in range(blocks)]
        for resolution, width in reversed(list(enumerate(channels))):
            up += [ResidualBlock(width, groups) for _ in range(blocks)]
            if resolution:
                up.append(nn.ConvTranspose2d(width, channels[resolution - 1], 3, 2, padding=1, output_padding=1))
        codes: list[nn.Module] = [nn.Flatten(), nn.Linear(math.prod(small), encoder_outputs)]
        if spatial:
            codes = [nn.Conv2d(channels[-1], encoder_outputs // positions, 3, padding=1), nn.Flatten()]
        self.encoder = nn.Sequential(*down, *normalized_elu(channels[-1], groups), *codes)
        last = nn.Conv2d(channels[0], output_channels or image_channels, 3, padding=1)
        self.decoder = nn.Sequential(*up, *normalized_elu(channels[0], groups), last)


def normalized_elu(channels: int, groups: int) -> list[nn.Module]:
    """Return an ELU, after group normalization if `groups` is not 0."""
    return [*([nn.GroupNorm(groups, channels)] if groups else []), nn.ELU()]


class ResidualBlock(nn.Module):
    """h + conv(ELU(conv(ELU(h)))), of the same shape. It is the identity at first: the last weights start at zero."""

    def __init__(self, channels: int, groups: int = 0) -> None:
        super().__init__()
        last, first = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(last.weight)
        self.residual = nn.Sequential(*normalized_elu(channels, groups), first, *normalized_elu(channels, groups), last)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.residual(h)


class GatedLinear(nn.Module):
    """A linear layer with a gate for each output: (W h + b) ⊙ σ(V h + c), `[batch, outs]`."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.both = nn.Linear(ins, 2 * outs)

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.glu(self.both(h))


def linear_layers(
    widths: Sequence[int], activation: Activation, gated: bool = False, batch_norm: bool = False
) -> list[nn.Module]:
    """Return linear layers from `widths[0]` to `widths[-1]`, the last one without normalization and activation."""
    layers: list[nn.Module] = []
    for ins, outs in pairwise(widths[:-1]):
        layers.append(GatedLinear(ins, outs) if gated else nn.Linear(ins, outs))
        if batch_norm:
            layers.append(nn.BatchNorm1d(outs))
        if not gated:
            layers.append(activation_layer(activation))
    return [*layers, nn.Linear(widths[-2], widths[-1])]


def output_bias(decoder: nn.Module) -> nn.Parameter:
    """Return the last bias of the decoder: one per pixel of a linear layer, or one per channel of a convolution."""
    return [parameter for name, parameter in decoder.named_parameters() if name.endswith("bias")][-1]
