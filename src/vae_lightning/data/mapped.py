"""Images in a memory-mapped file, which may be larger than memory: read by index, never as a whole."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_lightning.config import UserError

Array = np.ndarray[Any, Any]


class DataError(UserError):
    """Data that are missing, damaged or of another form than a model takes."""


class MappedImages:
    """uint8 images `[n, channels, height, width]` of a memory map, with the used part of a tensor's interface.

    `images[index]`, with any index of the first axis, reads these images into a tensor. If `change` is set, such as a
    pixel protocol, they become `change(images, rows)`, where `rows` are their indices in the file. Images are read from
    the file and not through the map, whose pages would count as memory of this process.
    """

    device = torch.device("cpu")
    dtype = torch.uint8

    def __init__(self, array: np.memmap[Any, Any]) -> None:
        self.array = array
        self.rows = np.arange(len(array))
        self.change: Callable[[Tensor, Array], Tensor] | None = None
        whole: Any = array
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        self.start = whole.offset + array.ctypes.data - whole.ctypes.data  # of the first image in the file
        steps = zip(array.shape[1:], array.strides[1:], strict=True)
        self.span = array.itemsize + sum((n - 1) * stride for n, stride in steps)  # bytes of an image
        readable = array.mode != "c" and min(array.strides) > 0 and hasattr(os, "preadv")  # not on Windows
        self.file = open(whole.filename, "rb") if readable else None  # noqa: SIM115 (open as long as this object)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.array.shape[1:]))

    def __getitem__(self, index: Any) -> Tensor:
        rows = self.rows[index.cpu().numpy() if isinstance(index, Tensor) else index]
        images = torch.from_numpy(self.read(rows))
        return self.change(images, rows) if self.change else images

    def read(self, rows: Array) -> Array:
        """Read the images with those rows from the file: `[*rows.shape, channels, height, width]`."""
        if not self.file:
            return np.take(np.asarray(self.array), rows, axis=0)
        content, shape = np.empty((rows.size, self.span), np.uint8), self.array.shape[1:]
        for image, row in zip(content, rows.ravel().tolist(), strict=True):
            if os.preadv(self.file.fileno(), [image], self.start + row * self.array.strides[0]) < self.span:
                raise DataError(f"{self.file.name}: has become shorter while it was read")
        strides = (self.span, *self.array.strides[1:])
        images = np.ndarray((rows.size, *shape), self.array.dtype, content, strides=strides)
        return np.ascontiguousarray(images).reshape(*rows.shape, *shape)

    def part(self, start: int, stop: int) -> MappedImages:
        """Return the images from `start` to `stop`, without reading them."""
        part = copy(self)
        part.rows = self.rows[start:stop]
        return part

    def changed(self, change: Callable[[Tensor, Array], Tensor]) -> MappedImages:
        """Return the images as `change` makes them."""
        images = copy(self)
        images.change = change
        return images

    def split(self, size: int) -> Iterator[Tensor]:
        """Read all images in parts of `size`, one at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def sample(self, most: int) -> Tensor:
        """Read up to `most` images, evenly spread over the file."""
        return self[spread(len(self), most)]


Images = Tensor | MappedImages


def read_batches(images: Images, indices: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the images of each index; a thread reads those of a file one batch ahead."""
    if isinstance(images, Tensor):
        yield from (images.index_select(0, index) for index in indices)
        return
    with ThreadPoolExecutor(1) as thread:
        ahead: deque[Future[Tensor]] = deque()
        for index in indices:
            ahead.append(thread.submit(images.__getitem__, index))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)


def spread(n: int, most: int) -> Array:
    """Return up to `most` indices, evenly spread from 0 to n − 1."""
    return np.linspace(0, n - 1, min(most, n)).astype(int)


def part(images: Images, start: int, stop: int) -> Images:
    """Return the images from `start` to `stop` without a copy."""
    return images[start:stop] if isinstance(images, Tensor) else images.part(start, stop)


def sampled(images: Images, most: int = 10_000) -> Tensor:
    """Return the images; of a memory map, up to `most` of them, evenly spread."""
    return images if isinstance(images, Tensor) else images.sample(most)
