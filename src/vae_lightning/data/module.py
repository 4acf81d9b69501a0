"""Images as one uint8 tensor on the device that trains, split and served by a LightningDataModule."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt, UserError
from vae_lightning.data.batches import DeviceBatches, fits
from vae_lightning.data.pixels import Pixels, evaluation_pixels

Labelled = tuple[Tensor, Tensor]  # images [n, channels, height, width], uint8, and labels [n]


class DataError(UserError):
    """A data file that is missing, cut short or altered."""


class ImageDataModule(LightningDataModule, ABC):
    """Images held in memory, split, binarized by protocol, and served from the training device.

    A data set is a subclass with a `load`. The last `val_size` training images are held out for validation; 0 trains
    on all of them. Batches are `(images [batch, channels, height, width] in [0, 1], labels [batch])`. Across processes
    each one sees its own share of the images. Raises ConfigError for a `val_size` that leaves no image to train on.
    """

    def __init__(
        self,
        pixels: Pixels = "grey",
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # into the checkpoint: the protocol goes where the weights go
        self.pixels = pixels
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = seed
        self.ready = False

    @abstractmethod
    def load(self) -> tuple[Labelled, Labelled]:
        """Training and test images, uint8 `[n, channels, height, width]`, with their labels `[n]`."""

    def prepare_data(self) -> None:
        """Download what is missing, once per machine."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        if self.ready:  # Lightning calls this for fit and again for test
            return
        (train, train_labels), (test, test_labels) = self.load()
        if self.val_size >= len(train):
            raise ConfigError(
                f"data.val_size={self.val_size}: leaves no image to train on; "
                f"there are {len(train)}, so 0 to {len(train) - 1} are allowed"
            )
        split = len(train) - self.val_size
        evaluated = evaluation_pixels(train, self.pixels)
        self.train_images = train[:split] if self.pixels == "dynamic" else evaluated[:split]
        self.val_images = evaluated[split:]
        self.test_images = evaluation_pixels(test, self.pixels)
        self.train_labels, self.val_labels, self.test_labels = train_labels[:split], train_labels[split:], test_labels
        self.ready = True

    @property
    def dataset(self) -> str:
        """The name of these images in results: by default the class's own."""
        return type(self).__name__

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(channels, height, width)` of the images, after `setup`."""
        return tuple(self.train_images.shape[1:])

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the images' bytes as they are trained on and tested on."""
        images = {"train": self.train_images, "val": self.val_images, "test": self.test_images}
        return {split: hashlib.sha256(x.contiguous().numpy().data).hexdigest() for split, x in images.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the numbers in it: they are about these pixels of this data set."""
        return {"data.name": self.dataset, "data.pixels": self.pixels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ConfigError where a checkpoint is to be trained on, or tested, under another protocol than its own."""
        for key, own in self.state_dict().items():
            theirs = state_dict.get(key, own)
            if theirs != own:
                raise ConfigError(
                    f"{key}={own}: the checkpoint is of {key}={theirs}, and numbers under the two cannot be "
                    f"compared. Allowed: {theirs}"
                )

    def train_dataloader(self) -> DeviceBatches:
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # Lightning's: the same batches each epoch
        shuffle_seed = None if overfit else self.seed
        return self._batches(self.train_images, self.train_labels, shuffle_seed, draw=self.pixels == "dynamic")

    def val_dataloader(self) -> DeviceBatches | list[DeviceBatches]:
        return self._batches(self.val_images, self.val_labels) if self.val_size else []

    def test_dataloader(self) -> DeviceBatches:
        return self._batches(self.test_images, self.test_labels)

    def _batches(
        self, images: Tensor, labels: Tensor, shuffle_seed: int | None = None, draw: bool = False
    ) -> DeviceBatches:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        home = device if fits(images, device) else torch.device("cpu")
        return DeviceBatches(
            images.to(home), labels.to(home), self.batch_size, shuffle_seed, draw, rank, world_size, device
        )
