"""MNIST and torchvision's data sets of its shape."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vae_lightning.config import NonNegativeInt, PositiveInt
from vae_lightning.data.module import DataError, ImageDataModule, Labelled
from vae_lightning.data.pixels import Pixels
from vae_lightning.files import atomic_write

Name = Literal["MNIST", "FashionMNIST", "KMNIST", "EMNIST-letters", "EMNIST-balanced", "EMNIST-digits"]
CHECKOUT = Path(__file__).resolve().parents[3] / "data"  # MNIST's original files, in a checkout
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae_lightning"


class MNISTDataModule(ImageDataModule):
    """torchvision's MNIST or a data set of its shape.

    `root` is the directory that holds or receives the files; by default the checkout's data/, or, where the package was
    installed without one, ~/.cache/vae_lightning. The rest is as for `ImageDataModule`.
    """

    def __init__(
        self,
        name: Name = "MNIST",
        root: str | None = None,
        pixels: Pixels = "grey",
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(pixels, batch_size, val_size, seed)
        self.save_hyperparameters(logger=False)
        self.name = name
        self.root = Path(root) if root is not None else CHECKOUT if CHECKOUT.is_dir() else CACHE

    def load(self) -> tuple[Labelled, Labelled]:
        return load_images(self.name, self.root.resolve())

    @property
    def dataset(self) -> str:
        return str(self.name) if type(self) is MNISTDataModule else type(self).__name__


@lru_cache(maxsize=1)  # a sweep's jobs share one copy; nothing here writes to it
def load_images(name: Name, root: Path) -> tuple[Labelled, Labelled]:
    """Training and test images with their labels, read by torchvision.

    torchvision unpacks its archives before reading them, and takes any unpacked file for a good one. So it works in a
    scratch directory of its own, on links to archives whose checksums were compared first: processes that start
    together do not meet, a read-only `root` does, and nothing half-written is ever found. What it had to download is
    then moved into `root`, each file whole. Raises DataError.
    """
    from torchvision import datasets  # slow to import, and needed by nothing else

    family, _, subset = name.partition("-")
    dataset_class = getattr(datasets, family)
    options = {"split": subset} if subset else {}
    raw = root / family / "raw"
    checksums = dict(vars(dataset_class).get("resources", []))  # EMNIST has none of its own: it is unpacked once
    for file in (raw / name for name in checksums if (raw / name).exists()):
        if not datasets.utils.check_integrity(file, checksums[file.name]):
            raise DataError(
                f"{file}: cut short or altered ({file.stat().st_size} bytes, expected MD5 {checksums[file.name]}); "
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
        # torchvision has errors of many kinds for files that are not what their names say (EMNIST's have no checksums).
        except Exception as error:
            raise DataError(
                f"{raw}: {name} is not there whole and cannot be downloaded ({' '.join(str(error).split())}); "
                "where it lies is data.root=…, or, for a run that is finished, data_root=…"
            ) from error
        with suppress(OSError):  # a read-only `root` keeps nothing
            raw.mkdir(parents=True, exist_ok=True)
            for path in work.iterdir():
                if not path.is_symlink() and (path.name in checksums or not checksums):
                    with atomic_write(raw / path.name) as partial:
                        shutil.move(path, partial)
    train, test = ((s.data.unsqueeze(1).contiguous(), s.targets) for s in sets)
    return train, test
