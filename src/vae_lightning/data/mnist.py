"""MNIST and torchvision's data sets of the same shape."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vae_lightning.config import NonNegativeInt, PositiveInt
from vae_lightning.data.decoding import cache_directory
from vae_lightning.data.module import DataError, ImageDataModule, Labelled
from vae_lightning.data.pixels import Pixels
from vae_lightning.files import atomic_write

Name = Literal["MNIST", "FashionMNIST", "KMNIST", "EMNIST-letters", "EMNIST-balanced", "EMNIST-digits"]
CHECKOUT = Path(__file__).resolve().parents[3] / "data"  # MNIST's original files, if this is a checkout


class MNISTDataModule(ImageDataModule):
    """torchvision's MNIST, or a data set of the same shape.

    `root` is the directory of the files. The default is data/ of the checkout, or ~/.cache/vae_lightning if the package
    was installed without one. The other arguments are those of `ImageDataModule`.
    """

    def __init__(
        self,
        name: Name = "MNIST",
        root: str | None = None,
        pixels: Pixels = "grey",
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        seed: NonNegativeInt = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(pixels, batch_size, val_size, seed, flip)
        self.save_hyperparameters(logger=False)
        self.name = name
        self.root = Path(root) if root is not None else CHECKOUT if CHECKOUT.is_dir() else cache_directory()

    def load(self) -> tuple[Labelled, Labelled]:
        return load_images(self.name, self.root.resolve())

    @property
    def dataset(self) -> str:
        return str(self.name) if type(self) is MNISTDataModule else type(self).__name__


@lru_cache(maxsize=1)  # the jobs of a sweep share one copy, which is never changed
def load_images(name: Name, root: Path) -> tuple[Labelled, Labelled]:
    """Load training and test images with their labels through torchvision. Raises DataError.

    torchvision unpacks its archives beside them and trusts any unpacked file. So it works in a temporary directory, on
    links to archives with the right checksums. This allows a read-only `root`, and processes that load at the same
    time. Downloaded files are then moved into `root` atomically.
    """
    from torchvision import datasets  # slow to import, and not needed elsewhere

    family, _, subset = name.partition("-")
    dataset_class = getattr(datasets, family)
    options = {"split": subset} if subset else {}
    raw = root / family / "raw"
    checksums = dict(vars(dataset_class).get("resources", []))  # EMNIST has none: its unpacked files are kept
    for file, checksum in checksums.items():
        path = raw / file
        if path.exists() and not datasets.utils.check_integrity(path, checksum):
            raise DataError(
                f"{path}: truncated or altered ({path.stat().st_size} bytes, expected MD5 {checksum}); "
                "restore it with `git checkout -- data`, or delete it to have it downloaded again"
            )
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / family / "raw"
        work.mkdir(parents=True)
        for path in raw.iterdir() if raw.is_dir() else ():
            if path.name in checksums or not checksums:
                (work / path.name).symlink_to(path.resolve())
        try:
            sets = [dataset_class(scratch, train=train, download=True, **options) for train in (True, False)]
        except Exception as error:  # of many types, for files with the wrong content
            raise DataError(
                f"{raw}: {name} is incomplete and cannot be downloaded ({' '.join(str(error).split())}); "
                "set its directory with data.root=…, or with data_root=… for a finished run"
            ) from error
        with suppress(OSError):  # if `root` is read-only, they are not kept
            raw.mkdir(parents=True, exist_ok=True)
            for path in work.iterdir():
                if not path.is_symlink() and (path.name in checksums or not checksums):
                    with atomic_write(raw / path.name) as partial:
                        shutil.move(path, partial)
    train, test = ((s.data.unsqueeze(1).contiguous(), s.targets) for s in sets)
    return train, test
