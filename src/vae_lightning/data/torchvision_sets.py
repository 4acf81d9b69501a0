"""torchvision's data sets: MNIST and those of its shape, and the colour sets CIFAR10, SVHN and CelebA."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from vae_lightning.config import NonNegativeInt, PositiveInt
from vae_lightning.data.checks import Labelled
from vae_lightning.data.decoding import cache_directory, decode
from vae_lightning.data.mapped import DataError
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import Pixels
from vae_lightning.files import atomic_write

Name = Literal[
    "MNIST", "FashionMNIST", "KMNIST", "EMNIST-letters", "EMNIST-balanced", "EMNIST-digits", "CIFAR10", "SVHN", "CelebA"
]  # fmt: skip
CHECKOUT = Path(__file__).resolve().parents[3] / "data"  # MNIST's original files, if this is a checkout
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class TorchvisionDataModule(ImageDataModule):
    """One of torchvision's data sets, downloaded once.

    `root` is the directory of the files, in torchvision's layout. The default is data/ of the checkout, or
    ~/.cache/vae_lightning if the package was installed without one. The other arguments are those of `ImageDataModule`.
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
        if type(self) is TorchvisionDataModule:  # another class may have other labels
            self.class_names = class_names(name)

    def load(self) -> tuple[Labelled, Labelled]:
        return load_images(self.name, self.root.resolve())

    @property
    def dataset(self) -> str:
        return str(self.name) if type(self) is TorchvisionDataModule else type(self).__name__


MNISTDataModule = TorchvisionDataModule


def class_names(name: Name) -> list[str] | None:
    """Return the names of the classes; None for digits, and for CelebA, which has no labels here."""
    if name in ("MNIST", "SVHN", "CelebA"):
        return None
    if name == "CIFAR10":
        return CIFAR10_CLASSES
    from torchvision import datasets  # slow to import

    family, _, subset = name.partition("-")
    return list(datasets.EMNIST.classes_split_dict[subset] if subset else getattr(datasets, family).classes)


@lru_cache(maxsize=1)  # the jobs of a sweep share one copy, which is never changed
def load_images(name: Name, root: Path) -> tuple[Labelled, Labelled]:
    """Load training and test images with their labels through torchvision. Raises DataError."""
    if name == "CelebA":
        return load_celeba(root)
    return load_colour(name, root) if name in ("CIFAR10", "SVHN") else load_like_mnist(name, root)


def load_celeba(root: Path) -> tuple[Labelled, Labelled]:
    """Load CelebA's aligned faces: the central 148×148 pixels, resized to 64×64 (Larsen et al. 2016), without labels.

    The official validation images are the last 19,867 training ones. Raises DataError.
    """
    directory = root / "celeba"
    partition = directory / "list_eval_partition.txt"
    if not (partition.exists() and (directory / "img_align_celeba").is_dir()):
        download("CelebA", root, split="all", target_type=[])
    rows = [line.split() for line in partition.read_text(encoding="utf-8").splitlines()]
    train, test = ([file for file, part in rows if part in parts] for parts in ("01", "2"))
    images, broken = decode(directory / "img_align_celeba", [*train, *test], 64, 3, crop=148)
    if broken:
        raise DataError(f"{directory}: {len(broken)} files cannot be read, such as {min(broken)}; unpack them again")
    return (images[: len(train)], None), (images[len(train) :], None)


def load_colour(name: Name, root: Path) -> tuple[Labelled, Labelled]:
    """Load CIFAR10 or SVHN, whose files torchvision verifies by their checksums. Raises DataError."""
    if name == "CIFAR10":
        cifar = [download(name, root, train=train) for train in (True, False)]
        train, test = ((torch.from_numpy(s.data).movedim(3, 1).contiguous(), torch.tensor(s.targets)) for s in cifar)
    else:
        svhn = [download(name, root, split=split) for split in ("train", "test")]
        train, test = ((s.data, s.labels) for s in svhn)
    return train, test


def download(name: str, root: Path, named: Path | None = None, **options: Any) -> Any:
    """Return torchvision's data set below `root`, downloaded if it is not there. Raises DataError, of `named`."""
    from torchvision import datasets  # slow to import, and not needed elsewhere

    try:
        return getattr(datasets, name)(root, download=True, **options)
    except Exception as error:  # of many types, for files with the wrong content
        raise DataError(
            f"{named or root}: {name} is incomplete and cannot be downloaded ({' '.join(str(error).split())}); "
            "set its directory with data.root=…, or with data_root=… for a finished run"
        ) from error


def load_like_mnist(name: Name, root: Path) -> tuple[Labelled, Labelled]:
    """Load MNIST or a data set of its shape. Raises DataError.

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
        sets = [download(family, Path(scratch), raw, train=train, **options) for train in (True, False)]
        with suppress(OSError):  # if `root` is read-only, they are not kept
            raw.mkdir(parents=True, exist_ok=True)
            for path in work.iterdir():
                if not path.is_symlink() and (path.name in checksums or not checksums):
                    with atomic_write(raw / path.name) as partial:
                        shutil.move(path, partial)
    train, test = ((s.data.unsqueeze(1).contiguous(), s.targets) for s in sets)
    return train, test
