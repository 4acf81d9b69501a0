"""Seconds an epoch: `train.py`'s own path, everything on, beside the best plain loop, in turn in one process.

    python benchmarks/speed.py                 # leaky_mlp_200, five rounds of each
    python benchmarks/speed.py --rounds 10

The plain loop is what one would write by hand: the images in memory, index look-ups, fused Adam, no logging. The other
trains `experiment=leaky_mlp_200` with metrics, TensorBoard, history and a checkpoint each epoch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback
from omegaconf import open_dict
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from vae_lightning.cli import plain
from vae_lightning.data import load_images
from vae_lightning.training import steady_cpu, train

ROOT = Path(__file__).resolve().parents[1]
BATCH = 100


class Stopwatch(Callback):
    """Seconds from the start of one epoch to the start of the next, checkpoints and logging included."""

    epochs: ClassVar[list[float]] = []

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started = time.perf_counter()

    def on_fit_end(self, trainer, module) -> None:
        self.epochs.append(time.perf_counter() - self.started)


class PlainVAE(nn.Module):
    """784-400-400-(200,200) / 200-400-400-784, leaky ReLU 0.2."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.2)
        self.encoder = nn.Sequential(nn.Linear(784, 400), act, nn.Linear(400, 400), act, nn.Linear(400, 400))
        self.decoder = nn.Sequential(nn.Linear(200, 400), act, nn.Linear(400, 400), act, nn.Linear(400, 784))

    def loss(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        reconstruction = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + log_variance - mean.square() - log_variance.exp())
        return (reconstruction + kl) / len(x)


def plain_epoch(model: PlainVAE, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    started = time.perf_counter()
    for index in torch.randperm(len(images)).split(BATCH):
        loss = model.loss(images[index].float().div_(255))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


def template_epoch() -> float:
    with tempfile.TemporaryDirectory() as directory:
        overrides = ["experiment=leaky_mlp_200", "trainer.max_epochs=1", "figures.every=0", "trainer.accelerator=cpu"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("train", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        config = plain(composed)
        config["data"]["root"] = str(ROOT / "data")
        config["trainer"]["callbacks"] = [{"_target_": "__main__.Stopwatch"}]
        config["trainer"]["enable_progress_bar"] = False
        train(config, Path(directory) / "run")
    return Stopwatch.epochs[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    steady_cpu()  # for both
    (images, _), _ = load_images("MNIST", (ROOT / "data").resolve())
    model = PlainVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    pixels = images.flatten(1)
    plain_epoch(model, optimizer, pixels)  # warm-up
    pairs = [(plain_epoch(model, optimizer, pixels), template_epoch()) for _ in range(rounds)]
    plain, template = zip(*pairs, strict=True)
    for name, values in (("plain loop", plain), ("train.py", template), ("ratio", [t / p for p, t in pairs])):
        print(f"{name:12}  min {min(values):6.3f}  median {statistics.median(values):6.3f}  max {max(values):6.3f}")


if __name__ == "__main__":
    main()
