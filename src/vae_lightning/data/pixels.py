"""Pixel protocols (`data.pixels`): the values of the pixels in training and evaluation, with p = byte / 255.

    grey        p itself. With a Bernoulli likelihood, the reconstruction term is a cross-entropy, not a likelihood.
    dynamic     Bernoulli(p), drawn again each time a training image is used; validation and test use the fixed draw.
    fixed       Bernoulli(p), drawn once (seed 777).
    threshold   p > 0.5.

Results under different protocols cannot be compared. The fixed draw of images in memory is one draw of all of them.
In a memory map each image has its own draw, seeded with its row, so that a batch can be drawn without the others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_lightning.data.mapped import Array, Images, MappedImages

Pixels = Literal["grey", "dynamic", "fixed", "threshold"]
FIXED_DRAW_SEED = 777


def described(pixels: Pixels, channels: int) -> str:
    """Return the name of the pixel protocol for people: `grey` of colour images is `colour`."""
    return "colour" if pixels == "grey" and channels > 1 else pixels


class Share(NamedTuple):
    """The images of process `rank` in a batch of `total` images that `world_size` processes share.

    If there are fewer images than processes, a process without an image takes the first one, which does not count.
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
    """Return the seed of the random stream with that key; streams with different keys are independent."""
    key = (*key, 1)  # NumPy pads keys with zeros, which would make (3,) and (3, 0) equal
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def bernoulli_draw(images: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    """Draw exactly from Bernoulli(byte / 255) for each pixel: `byte` of the 255 equally likely integers are below it.

    `images` are the `share` of one process; the random numbers are drawn for the batch of all processes.
    """
    shape = (share.total, *images.shape[1:])
    uniform = torch.randint(255, shape, generator=generator, device=images.device, dtype=torch.uint8)
    return uniform[share.rows] < images


def evaluation_pixels(images: Images, pixels: Pixels) -> Images:
    """Return uint8 images `[n, …]` for evaluation under a protocol: unchanged for grey, otherwise only 0 and 255."""
    if pixels == "grey":
        return images
    if isinstance(images, MappedImages):
        return images.changed(threshold if pixels == "threshold" else fixed_draw)
    if pixels == "threshold":
        return threshold(images)
    # NumPy guarantees that RandomState's streams never change, so all versions and devices get the same draw.
    uniform = np.random.RandomState(FIXED_DRAW_SEED).randint(0, 255, size=tuple(images.shape), dtype=np.uint8)
    return (torch.from_numpy(uniform) < images).to(torch.uint8) * 255


def threshold(images: Tensor, rows: Array | None = None) -> Tensor:
    """Return 255 where uint8 images are above one half, otherwise 0."""
    return (images > 127).to(torch.uint8) * 255


def fixed_draw(images: Tensor, rows: Array) -> Tensor:
    """Return the fixed draw of uint8 images `[*rows.shape, channels, height, width]` of a memory map."""
    uniform, random = np.empty(images.shape, np.uint8), np.random.RandomState(0)
    for place, row in np.ndenumerate(rows):
        random.seed([FIXED_DRAW_SEED, row])  # faster than a new generator
        uniform[place] = random.randint(0, 255, size=images.shape[-3:], dtype=np.uint8)
    return (torch.from_numpy(uniform) < images).to(torch.uint8) * 255
