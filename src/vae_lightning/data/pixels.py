"""Pixel protocols (`data.pixels`): which images the numbers are measured on, with p = byte / 255.

    grey        p itself. With a Bernoulli likelihood the "reconstruction" is a cross-entropy, not a likelihood.
    dynamic     Bernoulli(p), drawn anew each time a training image is used; validation and test: the fixed draw.
    fixed       Bernoulli(p), drawn once for all time (seed 777).
    threshold   p > 0.5.

Numbers under different protocols cannot be compared.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Pixels = Literal["grey", "dynamic", "fixed", "threshold"]
FIXED_DRAW_SEED = 777


def described(pixels: Pixels, channels: int) -> str:
    """The pixel protocol in words: `grey` of colour images is `colour`."""
    return "colour" if pixels == "grey" and channels > 1 else pixels


class Share(NamedTuple):
    """Of a batch of `total` images that `world_size` processes work on together, the images of process `rank`.

    Where there are fewer images than processes, those without one take the first, and it does not count.
    """

    total: int
    rank: int = 0
    world_size: int = 1

    @property
    def counts(self) -> bool:
        return self.rank < self.total

    @property
    def rows(self) -> slice:
        return slice(self.rank, None, self.world_size) if self.counts else slice(0, 1)


def stream_seed(*key: int) -> int:
    """A seed for the random stream named by `key`; streams of different keys are independent."""
    key = (*key, 1)  # NumPy fills keys up with zeros, so that (3,) and (3, 0) would be one
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def bernoulli_draw(images: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    """Bernoulli(byte / 255) for each pixel, exactly: of the 255 equally likely integers, `byte` lie below it.

    `images` are a process's `share`, and the draw is for the images of all.
    """
    shape = (share.total, *images.shape[1:])
    uniform = torch.randint(255, shape, generator=generator, device=images.device, dtype=torch.uint8)
    return uniform[share.rows] < images


def evaluation_pixels(images: Tensor, pixels: Pixels) -> Tensor:
    """The bytes that `images` `[n, …]`, uint8, are evaluated on under a protocol: themselves, or only 0 and 255."""
    if pixels == "grey":
        return images
    if pixels == "threshold":
        return (images > 127).to(torch.uint8) * 255
    # NumPy promises that RandomState's streams never change: the same draw for everyone, on every version and device.
    uniform = np.random.RandomState(FIXED_DRAW_SEED).randint(0, 255, size=tuple(images.shape), dtype=np.uint8)
    return (torch.from_numpy(uniform) < images).to(torch.uint8) * 255
