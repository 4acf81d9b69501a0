"""Measure how time and memory grow with each size of model and data, with the other sizes fixed.

    python benchmarks/growth.py                     # about ten minutes on two cores
    python benchmarks/growth.py --device cuda
    python benchmarks/growth.py --epochs 200        # instead: memory after each of 200 short epochs

Each point is `train(config)` in a subprocess, with metrics, logging and checkpoints: a first epoch to warm up, and a
second epoch that is timed. Importance sampling is that of vae evaluate. Writes docs/growth.json and its plot,
docs/images/growth.png.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders import ROOT, finish, train_config
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from vae_lightning import figures
from vae_lightning.analysis.evaluation import importance_sampling
from vae_lightning.config import PositiveInt
from vae_lightning.data.module import Labelled
from vae_lightning.data.torchvision_sets import MNISTDataModule
from vae_lightning.models.vae import VAE
from vae_lightning.runs.environment import device_name
from vae_lightning.training.process import steady_cpu
from vae_lightning.training.train import train

SIZES = {
    "batch_size": [10, 30, 100, 300, 1_000, 3_000, 10_000],
    "width": [50, 100, 200, 400, 800, 1_600, 3_200],
    "latent_dim": [2, 5, 20, 50, 200, 500, 2_000],
    "iwae_samples": [1, 2, 5, 10, 20, 50],
    "training_images": [10_000, 30_000, 100_000, 300_000, 1_000_000],
    "importance_samples": [10, 50, 200, 1_000, 5_000],
}
STEPS = 100  # number of timed steps per point


class Repeated(MNISTDataModule):
    """MNIST with its training images repeated up to a given number."""

    def __init__(self, images: PositiveInt = 60_000, **options: Any) -> None:
        super().__init__(**options)
        self.images = images

    def load(self) -> tuple[Labelled, Labelled]:
        (train, labels), test = super().load()
        times = -(-self.images // len(train))
        return (train.repeat(times, 1, 1, 1)[: self.images], labels.repeat(times)[: self.images]), test


class Timed(Callback):
    """Print the seconds of each epoch's steps and the memory in use at its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer, module) -> None:
        finish(trainer.strategy.root_device.type)
        self.seconds.append(time.perf_counter() - self.started)
        self.megabytes.append(memory())
        print(json.dumps({"seconds": self.seconds[-1], "megabytes": self.megabytes[-1]}), flush=True)


def memory() -> float:
    """Return the resident memory of this process in MB, or, on a GPU, the peak memory that PyTorch reserved."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def point(size: str, value: int, device: str) -> None:
    """Train or evaluate with one size, and print seconds and megabytes as lines of JSON."""
    if size == "importance_samples":
        steady_cpu()
        vae = VAE(latent_dim=20, backbone={"_target_": "vae_lightning.models.backbones.MLP", "hidden": [400]}).eval()
        images = torch.randint(256, (100, 1, 28, 28), dtype=torch.uint8, device=device)
        labels = torch.zeros(len(images), dtype=torch.long)
        vae.to(device)
        for _ in range(2):
            started = time.perf_counter()
            importance_sampling(vae, images, labels, value)
            finish(device)
            print(json.dumps({"seconds": time.perf_counter() - started, "megabytes": memory()}), flush=True)
        return
    config = train_config("mlp_20", value if size == "batch_size" else 100, device, "growth.Timed")
    config["trainer"] |= {"max_epochs": 2, "limit_train_batches": STEPS, "limit_test_batches": 1}
    config["figures"] |= {"embedded": 0}
    if size == "width":
        config["model"]["backbone"]["hidden"] = [value, value]
    if size == "latent_dim":
        config["model"]["latent_dim"] = value
    if size == "iwae_samples":
        config["model"]["objective"] = {"_target_": "vae_lightning.models.objectives.IWAE", "samples": value}
    if size == "training_images":
        config["data"] |= {"_target_": "growth.Repeated", "images": value}
    if size == "epochs":
        config["trainer"] |= {"max_epochs": value, "limit_train_batches": 50}
    with tempfile.TemporaryDirectory() as directory:
        train(config, Path(directory) / "run")


def images_timed(size: str, value: int) -> int:
    """Return the number of images that the time of a point covers."""
    return (
        100
        if size == "importance_samples"
        else STEPS * 100
        if size != "batch_size"
        else min(STEPS, -(-60_000 // value)) * value
    )


def measured(size: str, value: int, device: str) -> list[dict[str, float]]:
    """Measure one point in a subprocess, and return the lines that it printed."""
    words = [sys.executable, __file__, "--device", device, "--point", size, str(value)]
    out = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@figures.styled
def plot(results: dict[str, list[dict[str, float]]]) -> Figure:
    """Plot time per image and memory side by side, one row per size."""
    figure = Figure(figsize=(figures.WIDTH, 1.1 * len(results)))
    axes = figure.subplots(len(results), 2, sharex="row", sharey="col")
    for row, (size, points) in zip(axes, results.items(), strict=True):
        values = [p["value"] for p in points]
        for axis, key in zip(row, ("microseconds", "megabytes"), strict=True):
            axis.plot(values, [p[key] for p in points], "o-")
            axis.set(xscale="log", yscale="log" if key == "microseconds" else "linear", xlabel=size.replace("_", " "))
            axis.grid(alpha=0.3)
    axes[0, 0].set_title("µs per image")
    axes[0, 1].set(title="memory, MB", ylim=(0, None))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        point(options.point[0], int(options.point[1]), options.device)
        return
    if options.epochs:
        lines = measured("epochs", options.epochs, options.device)
        for n in sorted({1, 2, 5, 10, 20, 50, 100, 150, options.epochs} & set(range(1, len(lines) + 1))):
            print(f"epoch {n}: {lines[n - 1]['megabytes']:.0f} MB")
        return
    results: dict[str, list[dict[str, float]]] = {}
    for size, values in SIZES.items():
        results[size] = []
        for value in values:
            last = measured(size, value, options.device)[-1]
            microseconds = 1e6 * last["seconds"] / images_timed(size, value)
            results[size].append({"value": value, "microseconds": microseconds, "megabytes": last["megabytes"]})
            print(f"{size}={value}: {microseconds:.1f} µs per image, {last['megabytes']:.0f} MB", flush=True)
    machine = f"{device_name(torch.device(options.device))}, torch {torch.__version__}"
    (ROOT / "docs" / "growth.json").write_text(json.dumps({"machine": machine, **results}) + "\n")
    figures.save(plot(results), ROOT / "docs" / "images" / "growth.png")


if __name__ == "__main__":
    main()
