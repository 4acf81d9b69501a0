"""A LightningDataModule for images in one uint8 tensor on the training device, with splits and pixel protocols."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt
from vae_lightning.data.batches import DeviceBatches, fits
from vae_lightning.data.checks import Labelled as Labelled
from vae_lightning.data.checks import check_loaded
from vae_lightning.data.mapped import DataError as DataError  # part of this module's interface
from vae_lightning.data.mapped import Images, part
from vae_lightning.data.pixels import Pixels, evaluation_pixels


class ImageDataModule(LightningDataModule, ABC):
    """Base class of data sets: splits images, applies the pixel protocol, and serves batches from the training device.

    A subclass defines `load`, and may set `class_names`, which figures and the explorer show in place of the labels.
    The last `val_size` training images are held out for validation; 0 trains on all of them. With `flip`, half of the
    training images are mirrored horizontally, others in each epoch.
    Batches are `(images [batch, channels, height, width] in [0, 1], labels [batch])`. Each process of a run sees its
    own share of the images. Raises DataError if `load` returns anything else than it should, and ConfigError if
    `val_size` leaves no image to train on.
    """

    class_names: Sequence[str] | None = None  # of label 0, 1, …

    def __init__(
        self,
        pixels: Pixels = "grey",
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        seed: NonNegativeInt = 0,
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # saved in the checkpoint, with the pixel protocol
        self.pixels = pixels
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = seed
        self.flip = flip
        self.ready = False

    @abstractmethod
    def load(self) -> tuple[Labelled, Labelled]:
        """Return training and test images, uint8 `[n, channels, height, width]`, each with labels `[n]` or None."""

    def prepare_data(self) -> None:
        """Download missing files, once per machine."""
        if not self.ready:
            self.load()

    def setup(self, stage: str | None = None) -> None:
        if not self.ready:  # called by train, and by Lightning for fit and test
            self._load()
        # Not in train_dataloader: Lightning patches DataLoader while that runs, and an error would leave it patched.
        if stage == "fit" and self._normalizes_batches():
            images, processes = len(self.train_images), getattr(self.trainer, "world_size", 1)
            if min(images // processes, self.batch_size) < 2:
                raise ConfigError(
                    f"data.batch_size={self.batch_size}: batch normalization needs 2 images or more per batch and "
                    f"process, and there are {images} training images for {processes} processes"
                )

    def _load(self) -> None:
        loaded, source = self.load(), f"{type(self).__name__}.load()"
        (train, train_labels), (test, test_labels) = check_loaded(loaded, source, self.class_names)
        if self.val_size >= len(train):
            raise ConfigError(
                f"data.val_size={self.val_size}: leaves no image to train on; "
                f"there are {len(train)}, so 0 to {len(train) - 1} are allowed"
            )
        split = len(train) - self.val_size
        evaluated = evaluation_pixels(train, self.pixels)
        self.train_images = part(train if self.pixels == "dynamic" else evaluated, 0, split)
        self.val_images = part(evaluated, split, len(train))
        self.test_images = evaluation_pixels(test, self.pixels)
        self.train_labels, self.val_labels, self.test_labels = train_labels[:split], train_labels[split:], test_labels
        self.ready = True

    @property
    def dataset(self) -> str:
        """The name of the data set in results: by default, that of the class."""
        return type(self).__name__

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape `(channels, height, width)` of an image, after `setup`."""
        return tuple(self.train_images.shape[1:])

    @property
    def classes(self) -> int:
        """The number of classes of a conditional model, after `setup`: 1 + the largest label. Raises ConfigError."""
        labels = torch.cat([self.train_labels, self.val_labels, self.test_labels])
        if labels.min() < 0:
            raise ConfigError(f"model.conditional=true: images of {self.dataset} have no label; each should have one")
        return int(labels.max()) + 1

    def class_name(self, label: int) -> str:
        """Return the name of a class, by default its label; an empty string for -1, an image without a label."""
        return "" if label < 0 else self.class_names[label] if self.class_names else str(label)

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 checksum of each split's images, after the pixel protocol.

        That of a memory map is of its shape and of 100 images, evenly spread.
        """
        images = {"train": self.train_images, "val": self.val_images, "test": self.test_images}
        return {split: checksum(x) for split, x in images.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the data set and pixel protocol, which a checkpoint stores."""
        return {"data.name": self.dataset, "data.pixels": self.pixels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ConfigError if the checkpoint is of another data set or pixel protocol."""
        for key, own in self.state_dict().items():
            theirs = state_dict.get(key, own)
            if theirs != own:
                raise ConfigError(
                    f"{key}={own}: the checkpoint is of {key}={theirs}, and results of the two cannot be compared. "
                    f"Allowed: {theirs}"
                )

    def train_dataloader(self) -> DeviceBatches:
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # Lightning's option: the same batches each epoch
        shuffle_seed = None if overfit else self.seed
        draw = self.pixels == "dynamic"
        batches = self._batches(self.train_images, self.train_labels, shuffle_seed, draw, self.flip)
        if self._normalizes_batches():
            batches.join_last(at_least=2)
        return batches

    def _normalizes_batches(self) -> bool:
        """Return whether the model that is trained has batch normalization, which cannot train on one image."""
        model = getattr(self.trainer, "lightning_module", None) or nn.Identity()
        return any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in model.modules())

    def val_dataloader(self) -> DeviceBatches | list[DeviceBatches]:
        return self._batches(self.val_images, self.val_labels) if self.val_size else []

    def test_dataloader(self) -> DeviceBatches:
        return self._batches(self.test_images, self.test_labels)

    def _batches(
        self,
        images: Images,
        labels: Tensor,
        shuffle_seed: int | None = None,
        draw: bool = False,
        flip: bool = False,
    ) -> DeviceBatches:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if isinstance(images, Tensor) and fits(images, device):
            images, labels = images.to(device), labels.to(device)
        return DeviceBatches(images, labels, self.batch_size, shuffle_seed, draw, flip, rank, world_size, device)


def checksum(images: Images) -> str:
    """Return the SHA-256 checksum of images, or of the shape and a sample of a memory map."""
    if isinstance(images, Tensor):
        return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
    return hashlib.sha256(str(list(images.shape)).encode() + images.sample(100).numpy().tobytes()).hexdigest()
