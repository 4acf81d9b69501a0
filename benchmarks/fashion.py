"""FashionMNIST (Xiao et al. 2017) from Debian's package dataset-fashion-mnist, without a download.

    sudo apt install dataset-fashion-mnist
    PYTHONPATH=benchmarks python train.py data._target_=fashion.DebianFashionMNIST data.name=FashionMNIST

The package has the images of torchvision's FashionMNIST, compressed again, so that their checksums differ.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from vae_lightning.data.module import DataError, Labelled
from vae_lightning.data.torchvision_sets import MNISTDataModule

DIRECTORY = Path("/usr/share/datasets/fashion-mnist")


class DebianFashionMNIST(MNISTDataModule):
    """FashionMNIST from the files of the package."""

    def load(self) -> tuple[Labelled, Labelled]:
        train, test = (
            (idx_file(f"{split}-images-idx3-ubyte.gz").unsqueeze(1), idx_file(f"{split}-labels-idx1-ubyte.gz").long())
            for split in ("train", "t10k")
        )
        return train, test

    @property
    def dataset(self) -> str:
        return "FashionMNIST"


def idx_file(name: str) -> Tensor:
    """Read a compressed IDX file of bytes: a header of four bytes, a size of four bytes per axis, and the values."""
    path = DIRECTORY / name
    if not path.exists():
        raise DataError(f"{path}: no such file; install the Debian package dataset-fashion-mnist")
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = struct.unpack_from(f">{content[3]}I", content, 4)
        return torch.frombuffer(bytearray(content[4 + 4 * len(sizes) :]), dtype=torch.uint8).reshape(sizes)
    except (OSError, EOFError, zlib.error, IndexError, struct.error, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
