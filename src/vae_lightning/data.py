"""MNIST, and the sets of its shape, as one uint8 tensor on the device that trains.

There are no worker processes and no per-image work: a batch is an index look-up on the device. A set that would take
more than half of a GPU's free memory stays in this machine's, and batches go over as bytes. Which images the numbers
are measured on is decided by the pixel protocol, `pixels` (`p` = byte / 255):

    grey        p itself. With a Bernoulli likelihood the "reconstruction" is a cross-entropy, not a likelihood.
    dynamic     Bernoulli(p), drawn anew each time a training image is used; validation and test: the fixed draw.
    fixed       Bernoulli(p), drawn once for all time (seed 777).
    threshold   p > 0.5.

Numbers under different protocols cannot be compared.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt, UserError

Name = Literal["MNIST", "FashionMNIST", "KMNIST", "EMNIST-letters", "EMNIST-balanced", "EMNIST-digits"]
Labelled = tuple[Tensor, Tensor]  # images [n, channels, height, width], uint8, and labels [n]
Pixels = Literal["grey", "dynamic", "fixed", "threshold"]
FIXED_DRAW_SEED = 777


class DataError(UserError):
    """A data file that is missing, cut short or altered."""


class MNISTDataModule(LightningDataModule):
    """torchvision's MNIST or a set of its shape, split, binarized by protocol, and served from the training device.

    The last `val_size` training images are held out for validation; 0 trains on all of them. Batches are
    `(images [batch, 1, 28, 28] in [0, 1], labels [batch])`. Across processes each one sees its own share of the images.
    Raises DataError for files that are not what they should be, ConfigError for a `val_size` that leaves nothing.
    """

    def __init__(
        self,
        name: Name = "MNIST",
        root: str = "data",
        pixels: Pixels = "grey",
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # into the checkpoint: the protocol goes where the weights go
        self.name = name
        self.root = Path(root)
        self.pixels = pixels
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = seed
        self.ready = False

    def load(self) -> tuple[Labelled, Labelled]:
        """Training and test images with their labels. Your own data set overrides this, and nothing else."""
        return load_images(self.name, self.root.resolve())

    def prepare_data(self) -> None:
        """Fetch what is not there yet, once a machine. The bundled MNIST needs no network."""
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
        """What results say these images are: MNIST or another set's name, or the class of a data set of your own."""
        return str(self.name) if type(self) is MNISTDataModule else type(self).__name__

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


class DeviceBatches:
    """Batches by index, on `device`, from images `[n, 1, 28, 28]`, uint8, that already lie there, or else on the CPU.

    With a `shuffle_seed` the order depends on (shuffle_seed, epoch) and on nothing else, and so does the Bernoulli draw
    of each batch where `draw` is set: an epoch is the same whatever came before it. Batch i of `world_size` processes
    together is what a single process would see with `world_size` times the batch size; `share` says which of its images
    this process has.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shuffle_seed: int | None = None,
        draw: bool = False,
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
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0  # the batch that the next iteration begins with
        self.given = 0  # batches of the running one
        if shuffle_seed is not None:
            self.sampler, self.batch_sampler = self, None  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.images) // (self.batch_size * self.world_size))

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where another one was."""
        self.start = state["given"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.given, self.start = self.start, 0
        return self._batches(self.given)

    def _batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order().to(self.images.device)
        for i, batch in enumerate(order.split(self.batch_size * self.world_size)):
            if i < start:
                continue
            self.given = i + 1
            self.share = share = Share(len(batch), self.rank, self.world_size)
            index = batch[share.rows]
            images = self.images.index_select(0, index).to(self.device)
            if self.draw:
                seed = stream_seed(self.shuffle_seed or 0, self.epoch, i, 0)
                generator = torch.Generator(self.device).manual_seed(seed)
                x = bernoulli_draw(images, generator, share).float()
            else:
                x = images.float().div_(255)
            yield x, self.labels.index_select(0, index).to(self.device)

    def _order(self) -> Tensor:
        if self.shuffle_seed is None:
            return torch.arange(len(self.images))
        generator = torch.Generator().manual_seed(stream_seed(self.shuffle_seed, self.epoch))
        return torch.randperm(len(self.images), generator=generator)


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether images may lie on a device for good: not if a GPU would have less than half of its free memory left."""
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2


def stream_seed(*key: int) -> int:
    """A seed for the random stream named by `key`; streams of different keys are independent."""
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
    for file, checksum in checksums.items():
        if (raw / file).exists():
            _compare(raw / file, checksum)
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
        _keep(
            [path for path in work.iterdir() if not path.is_symlink() and path.name in (checksums or {path.name})], raw
        )
    (train, test) = ((s.data.unsqueeze(1).contiguous(), s.targets) for s in sets)
    return train, test


def _compare(path: Path, checksum: str) -> None:
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != checksum:
        raise DataError(
            f"{path}: cut short or altered ({len(content)} bytes with MD5 {found}, expected MD5 {checksum}); "
            "restore it with `git checkout -- data`, or delete it to have it downloaded again"
        )


def _keep(downloaded: list[Path], raw: Path) -> None:
    """Move new files into `raw`, each one under its name only when whole. A read-only `raw` keeps nothing."""
    try:
        raw.mkdir(parents=True, exist_ok=True)
        for path in downloaded:
            partial = raw / f".{path.name}.{os.getpid()}"
            shutil.move(path, partial)
            os.replace(partial, raw / path.name)
    except OSError:
        return
