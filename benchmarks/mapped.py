"""Train on a file of images that may be larger than memory: resident memory, throughput, and exact resuming.

    python benchmarks/mapped.py                             # 20 GB, or twice the free memory, if the disk has the room
    python benchmarks/mapped.py --gigabytes 2 --directory /scratch

The images, 64×64 in colour, are noise. Throughput is that of batches alone and of training, each from the first
gigabyte of the file, which is then in the system's cache, and from the same images in memory. Takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import ROOT, train_config
from growth import Timed
from lightning.pytorch import Callback

from vae_lightning.config import PositiveInt
from vae_lightning.data.batches import DeviceBatches
from vae_lightning.data.mapped import MappedImages
from vae_lightning.data.module import ImageDataModule, Labelled
from vae_lightning.training.process import steady_cpu
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train

SHAPE = (3, 64, 64)
BYTES = 3 * 64 * 64
CACHED = 10**9 // BYTES  # images of one gigabyte
BATCH = 256
__all__ = ["Timed"]  # a callback of the runs


class Generated(ImageDataModule):
    """The first `images` of a file, in the file or in memory. The last 10,000 are the test set."""

    def __init__(self, file: str, images: PositiveInt, in_memory: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.file, self.images, self.in_memory = file, images, in_memory

    def load(self) -> tuple[Labelled, Labelled]:
        images: Any = np.load(self.file, mmap_mode="r")
        train, test = images[: self.images - 10_000], images[self.images - 10_000 : self.images]
        return ((np.array(train), None), (np.array(test), None)) if self.in_memory else ((train, None), (test, None))


class StopsOnce(Callback):
    """Send this process SIGTERM at one step, the first time."""

    done = False

    def on_train_batch_start(self, trainer, *rest) -> None:
        if trainer.global_step == 130 and not StopsOnce.done:
            StopsOnce.done = True
            os.kill(os.getpid(), signal.SIGTERM)


def generate(file: Path, images: int) -> None:
    """Write noise, 100 MB of it again and again with the bytes rotated."""
    noise = np.random.default_rng(0).integers(256, size=100 * 2**20, dtype=np.uint8)
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(images, *SHAPE))
    header = out.offset
    del out
    with file.open("r+b") as raw:
        raw.seek(header)
        left = images * BYTES
        while left:
            left -= raw.write(np.roll(noise, left % 8191)[:left].data)


def configuration(file: Path, images: int, in_memory: bool, callback: str = "mapped.Timed") -> dict[str, Any]:
    config = train_config("mlp_20", BATCH, "cpu", callback)
    config["data"] = {"_target_": "mapped.Generated", "file": str(file), "images": images, "in_memory": bool(in_memory)}
    config["data"] |= {"batch_size": BATCH, "val_size": 5_000, "flip": True}
    config["model"]["backbone"]["hidden"] = [64]
    config["trainer"] |= {"max_epochs": 1}
    config["figures"] |= {"every": 0, "embedded": 0}
    return config


def batches(file: Path) -> None:
    """Print images per second of batches from the file and from memory, the best of five epochs each, in turns."""
    steady_cpu()
    first = np.load(file, mmap_mode="r")[:CACHED]
    labels, best = torch.zeros(len(first)).long(), [0.0, 0.0]
    for _ in range(5):
        for i, images in enumerate((MappedImages(first), torch.from_numpy(np.array(first)))):
            started = time.perf_counter()
            for _batch in DeviceBatches(images, labels, BATCH, shuffle_seed=0):
                pass
            best[i] = max(best[i], len(first) / (time.perf_counter() - started))
    print(json.dumps({"file": best[0], "memory": best[1]}))


def training(file: Path, images: int, in_memory: bool, epochs: int) -> None:
    """Train, and print the seconds of each epoch and the peak of resident memory."""
    config = configuration(file, images, in_memory)
    config["trainer"]["max_epochs"] = epochs
    with tempfile.TemporaryDirectory() as directory:
        train(config, Path(directory) / "run")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"peak_megabytes": int(status["VmHWM"].split()[0]) / 1024}))


def resuming(file: Path, images: int) -> None:
    """Print whether a run that was stopped in its second epoch and resumed has the weights of an uninterrupted one."""
    config = configuration(file, images, False, "mapped.StopsOnce")
    config["trainer"] |= {"max_epochs": 2, "limit_train_batches": 100}
    config["data"]["pixels"] = "dynamic"
    with tempfile.TemporaryDirectory() as directory:
        stopped, whole = Path(directory) / "stopped", Path(directory) / "whole"
        try:
            train(config, stopped)
        except Interrupted:
            train(config, stopped, resume=True)
        train(config, whole)
        weights = [
            torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (stopped, whole)
        ]
    print(json.dumps({"exact": all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())}))


def measured(*words: object) -> list[dict[str, Any]]:
    """Run one of the functions above in a subprocess, and return the lines that it printed."""
    command = [sys.executable, __file__, "--point", *map(str, words)]
    out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--point", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        name, file, *numbers = options.point
        {"batches": batches, "training": training, "resuming": resuming}[name](Path(file), *map(int, numbers))
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = options.gigabytes * 1e9 if options.gigabytes else min(20e9, 2 * free)
    size = min(size, 0.9 * shutil.disk_usage(options.directory).free)
    images = int(size // BYTES)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        file = Path(directory) / "images.npy"
        generate(file, images)
        print(f"{images} images, {size / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free", flush=True)
        [rates] = measured("batches", file)
        print("batches alone: {file:.0f} images/s from the file, {memory:.0f} from memory".format(**rates), flush=True)
        peaks = {}
        for name, words in {
            "1 GB in memory": (CACHED, 1, 2),
            "1 GB of the file": (CACHED, 0, 2),
            "the whole file": (images, 0, 1),
        }.items():
            *epochs, last = measured("training", file, *words)
            rate = (words[0] - 15_000) / min(epoch["seconds"] for epoch in epochs)
            peaks[name] = last["peak_megabytes"]
            print(f"training, {name}: {rate:.0f} images/s, peak of resident memory {peaks[name]:.0f} MB", flush=True)
        [resumed] = measured("resuming", file, images)
        print(f"stopped and resumed on the whole file: the same weights: {resumed['exact']}")


if __name__ == "__main__":
    main()
