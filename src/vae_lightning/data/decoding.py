"""Decode pictures once, in parallel, into a memory-mapped file of bytes, and find that file again at the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from vae_lightning.data.mapped import DataError
from vae_lightning.files import atomic_write, read_dict, write_json

log = logging.getLogger(__name__)

Channels = Literal[1, 3]
TOGETHER = 1_024  # pictures that are decoded in parallel, before the next ones start


def cache_directory() -> Path:
    """Return ~/.cache/vae_lightning, or the directory of that name in $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae_lightning"


def decode(
    root: Path, files: Sequence[str], size: int, channels: Channels, crop: int | None = None, cache: Path | None = None
) -> tuple[np.memmap, dict[str, str]]:
    """Return pictures as a memory map, uint8 `[n, channels, size, size]`, and the unreadable ones with the reasons.

    `files` are paths below `root`. The map has those that can be read, in the same order. It is in the directory
    `cache`, in a file named by paths, sizes and modification times of the pictures and by the settings, and is written
    only if there is no such file. Raises DataError if the disk is full or no picture can be read.
    """
    cache = cache or cache_directory()
    key = hashlib.sha256(json.dumps([size, channels, crop]).encode())
    for file in files:
        status = (root / file).stat()
        key.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    path = cache / f"{root.name}-{size}x{size}x{channels}-{key.hexdigest()[:16]}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        needed, free = len(files) * channels * size * size, shutil.disk_usage(cache).free
        if needed > free:
            raise DataError(
                f"{cache}: {len(files)} pictures take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; set "
                "another directory with data.cache=…, or a smaller data.size"
            )
        log.info("decoding %d pictures of %s into %s", len(files), root, path)
        _write(path, root, files, size, channels, crop)
    broken: dict[str, str] = read_dict(path.with_suffix(".json"))
    if len(broken) == len(files):
        raise DataError(f"{root}: none of {len(files)} pictures can be read; the first: {next(iter(broken.items()))}")
    return np.load(path, mmap_mode="r"), broken


def _write(path: Path, root: Path, files: Sequence[str], size: int, channels: Channels, crop: int | None) -> None:
    """Decode into `path`; the names and errors of unreadable files go into a JSON file beside it, which is first."""

    def read(file: str) -> bytes | str:
        try:
            return square(root / file, size, channels, crop)
        except Exception as error:  # Pillow raises many types for damaged files
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

    def read_all() -> Iterator[bytes | str]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without Python's lock
            for start in range(0, len(files), TOGETHER):
                yield from threads.map(read, files[start : start + TOGETHER])

    broken: dict[str, str] = {}
    with atomic_write(path) as partial:
        with partial.open("wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), channels, size, size)}
            np.lib.format.write_array_header_1_0(out, header)
            for file, content in zip(tqdm(files, "decoding", unit="picture", disable=None), read_all(), strict=True):
                if isinstance(content, bytes):
                    out.write(content)
                else:
                    broken[file] = content
            out.seek(0)  # NumPy leaves room in the header for any number of images
            header["shape"] = (len(files) - len(broken), channels, size, size)
            np.lib.format.write_array_header_1_0(out, header)
        write_json(path.with_suffix(".json"), broken)


def square(path: Path, size: int, channels: Channels, crop: int | None = None) -> bytes:
    """Return the central square of a picture, or of its central `crop` pixels, as bytes `[channels, size, size]`."""
    with Image.open(path) as picture:
        if picture.mode in ("I", "F"):
            raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bits")
        picture.draft(picture.mode, (2 * size, 2 * size))  # a JPEG file is decoded at a fraction of its size
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        upright = upright.convert("RGB" if channels == 3 else "L")
        if crop:
            left, top = (upright.width - crop) // 2, (upright.height - crop) // 2
            upright = upright.crop((left, top, left + crop, top + crop))
        pixels = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
    return np.moveaxis(pixels.reshape(size, size, channels), 2, 0).tobytes()
