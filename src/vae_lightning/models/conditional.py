"""Conditional models: the networks of any backbone, with the label as a further input.

encoder   images  [batch, *image_shape], one-hot labels [batch, classes] → [batch, encoder_outputs]
decoder   latents [batch, latent_dim],   one-hot labels [batch, classes] → [batch, *image_shape]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConditionalEncoder(nn.Module):
    """Add a learnt image of the class, zero at first, to the input of `network`.

    Before a linear layer this equals concatenating the one-hot label. It suits convolutions, too.
    """

    def __init__(self, network: nn.Module, classes: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.label_images = nn.Parameter(torch.zeros(classes, *image_shape))

    def forward(self, x: Tensor, one_hot: Tensor) -> Tensor:
        return self.network(x + torch.tensordot(one_hot, self.label_images, dims=1))


class ConditionalDecoder(nn.Module):
    """Concatenate the one-hot label to the input of `network`, which has `latent_dim` + `classes` inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, one_hot: Tensor) -> Tensor:
        return self.network(torch.cat([z, one_hot], dim=-1))
