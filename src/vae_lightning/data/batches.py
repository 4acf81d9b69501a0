"""Batches of images by index on the training device, without worker processes or work per image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vae_lightning.data.mapped import Images, read_batches
from vae_lightning.data.pixels import Share, bernoulli_draw, stream_seed


class DeviceBatches:
    """Batches on `device` from uint8 images `[n, channels, height, width]` on that device, on the CPU or in a file.

    With a `shuffle_seed`, the order depends only on (shuffle_seed, epoch). With `draw`, so does the Bernoulli draw of
    each batch, and with `flip`, which of its images are mirrored horizontally: each with probability 1/2. Batch i over
    all `world_size` processes equals batch i of one process with `world_size` times the batch size; `share` says which
    of its images this process has.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        batch_size: int,
        shuffle_seed: int | None = None,
        draw: bool = False,
        flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or images.device
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.draw = draw
        self.flip = flip
        self.rank = rank
        self.world_size = world_size
        self.joins = False  # whether the last batch is joined to the one before it
        self.epoch = 0
        self.start = 0  # index of the first batch of the next iteration
        self.given = 0  # number of batches in the current iteration so far
        if shuffle_seed is not None:
            self.sampler, self.batch_sampler = self, None  # Lightning looks for set_epoch here

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def join_last(self, at_least: int) -> None:
        """Join the last batch to the one before it if a process has fewer than `at_least` of its images."""
        images, together = len(self.images), self.batch_size * self.world_size
        self.joins = 0 < images % together < at_least * self.world_size and images > together

    def __len__(self) -> int:
        return -(-len(self.images) // (self.batch_size * self.world_size)) - self.joins

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration after the batches that `state` counts."""
        self.start = state["given"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.given, self.start = self.start, 0
        return self._batches(self.given)

    def _batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order().to(self.images.device)
        batches = list(order.split(self.batch_size * self.world_size))
        if self.joins:
            batches[-2:] = [torch.cat(batches[-2:])]
        shares = [Share(len(batch), self.rank, self.world_size) for batch in batches]
        indices = [batch[share.rows] for batch, share in zip(batches, shares, strict=True)]
        for i, images in enumerate(read_batches(self.images, indices[start:]), start):
            self.given = i + 1
            self.share = share = shares[i]
            images = images.to(self.device)
            if self.flip:
                uniform = torch.rand(share.total, generator=self._generator(i, 1), device=self.device)
                images = torch.where(uniform[share.rows, None, None, None] < 0.5, images.flip(-1), images)
            x = bernoulli_draw(images, self._generator(i, 0), share).float() if self.draw else images.float().div_(255)
            yield x, self.labels.index_select(0, indices[i]).to(self.device)

    def _generator(self, batch: int, stream: int) -> torch.Generator:
        seed = stream_seed(self.shuffle_seed or 0, self.epoch, batch, stream)
        return torch.Generator(self.device).manual_seed(seed)

    def _order(self) -> Tensor:
        if self.shuffle_seed is None:
            return torch.arange(len(self.images))
        generator = torch.Generator().manual_seed(stream_seed(self.shuffle_seed, self.epoch))
        return torch.randperm(len(self.images), generator=generator)


def fits(images: Tensor, device: torch.device) -> bool:
    """Return whether images may stay on a device: on a GPU, if they take at most half of its free memory."""
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
