"""A folder of pictures as a data set: any format that Pillow reads, of any size, with or without classes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from vae_lightning.config import NonNegativeInt, PositiveInt
from vae_lightning.data.checks import Labelled
from vae_lightning.data.decoding import Channels, decode
from vae_lightning.data.mapped import DataError
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import Pixels

log = logging.getLogger(__name__)


class FolderDataModule(ImageDataModule):
    """Pictures below `root`: their central squares, resized to `size` pixels a side, grey (1 channel) or RGB (3).

    With `root/train` and `root/test`, these are the training and test images; otherwise a tenth of all is the test set,
    always the same. Subdirectories, if there are any, are the classes. `val_size` defaults to a tenth of the training
    images. Raises DataError for pictures that cannot be read, unless `skip_broken` leaves them out.
    """

    def __init__(
        self,
        root: str,
        size: PositiveInt = 64,
        channels: Channels = 3,
        skip_broken: bool = False,
        cache: str | None = None,
        pixels: Pixels = "grey",
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt | None = None,
        seed: NonNegativeInt = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(pixels, batch_size, val_size or 0, seed, flip)
        self.save_hyperparameters(logger=False)
        self.root = Path(root).expanduser().resolve()
        self.size, self.channels, self.skip_broken = size, channels, skip_broken
        self.cache = Path(cache) if cache else None
        self.holds_out_a_tenth = val_size is None

    @property
    def dataset(self) -> str:
        return self.root.name

    def load(self) -> tuple[Labelled, Labelled]:
        train, test, depth = split(self.root, find_pictures(self.root))
        images, broken = decode(self.root, [*train, *test], self.size, self.channels, cache=self.cache)
        if broken:
            some = ", ".join(f"{file} ({error})" for file, error in list(broken.items())[:5])
            found = f"{self.root}: {len(broken)} of {len(train) + len(test)} pictures cannot be read: {some}"
            found += ", …" if len(broken) > 5 else ""
            if not self.skip_broken:
                raise DataError(f"{found}; remove them, or leave them out with data.skip_broken=true")
            log.warning("%s; they are left out", found)
        train, test = ([file for file in files if file not in broken] for files in (train, test))
        if self.holds_out_a_tenth:
            self.val_size = len(train) // 10
        folders = [file.split("/")[depth:-1] for file in (*train, *test)]
        self.class_names = sorted({folder[0] for folder in folders if folder}) or None
        number = {name: label for label, name in enumerate(self.class_names or ())}
        labels = torch.tensor([number[folder[0]] if folder else -1 for folder in folders])
        return (images[: len(train)], labels[: len(train)]), (images[len(train) :], labels[len(train) :])


def find_pictures(root: Path) -> list[str]:
    """Return the paths below `root`, with forward slashes, of all files with a suffix that Pillow reads.

    They are in the order of their hashes, which is the same on every machine and mixes the classes. Hidden files and
    directories are left out. Raises DataError if there are none.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for directory, below_it, names in os.walk(root, followlinks=True):
        below_it[:] = [name for name in below_it if name[0] != "."]  # such as .ipynb_checkpoints
        below = Path(directory).relative_to(root)
        found += [
            (below / name).as_posix() for name in names if name[0] != "." and Path(name).suffix.lower() in suffixes
        ]
    if not found:
        problem = "contains no pictures" if root.is_dir() else "no such directory"
        raise DataError(f"{root}: {problem}; set it with data.root=…, or with data_root=… for a finished run")
    return sorted(found, key=lambda file: hashlib.sha256(file.encode()).digest())


def split(root: Path, files: Sequence[str]) -> tuple[list[str], list[str], int]:
    """Return training files, test files, and how many folders lead to the classes. Raises DataError if one is empty."""
    parts = [name for name in ("train", "test") if (root / name).is_dir()]
    if not parts:
        tenth = max(1, len(files) // 10)
        return list(files[tenth:]), list(files[:tenth]), 0
    train, test = ([file for file in files if file.startswith(f"{name}/")] for name in ("train", "test"))
    if not (train and test):
        raise DataError(f"{root}: train/ has {len(train)} pictures, and test/ {len(test)}; should both have some")
    if others := len(files) - len(train) - len(test):
        log.warning("%s: %d pictures outside train/ and test/ are not used", root, others)
    return train, test, 1
