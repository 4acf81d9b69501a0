"""Shared by some of the tests: files of finished runs, a small data set, and the blocks of a page."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import MLP, ROOT
from PIL import Image
from torch import Tensor

from vae_lightning.data.torchvision_sets import MNISTDataModule

COMMAND = r"python|make|pip|source|torchrun|srun|[\w-]+-(train|evaluate|generate|report|compare|explore|export)"
BERNOULLI = {"_target_": "vae_lightning.models.likelihoods.Bernoulli"}


class Few(MNISTDataModule):
    """500 training images and 100 test images of MNIST."""

    def load(self):
        (train, labels), (test, test_labels) = super().load()
        return (train[:500], labels[:500]), (test[:100], test_labels[:100])


class Colours(MNISTDataModule):
    """Smooth 8×8 colour images: 200 to train on, 40 for the test."""

    def load(self):
        generator = torch.Generator().manual_seed(0)
        small = torch.rand(240, 3, 2, 2, generator=generator)
        images = (255 * torch.nn.functional.interpolate(small, size=(8, 8), mode="bilinear")).to(torch.uint8)
        return (images[:200], torch.arange(200) % 3), (images[200:], torch.arange(40) % 3)


def fake_run(directory: Path, loss: float, seed: int = 0, pixels: str = "grey", **model: Any) -> Path:
    """Write the files of a finished run that a report reads."""
    directory.mkdir(parents=True)
    spec = {"_target_": "vae_lightning.models.vae.VAE", "latent_dim": 2, "likelihood": BERNOULLI, "backbone": MLP}
    config = {"seed": seed, "name": "vae", "model": spec | model, "data": {"root": str(directory), "pixels": pixels}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"test/loss": loss, "test/elbo": -loss, "test/kl": loss / 4, "test/reconstruction": loss * 3 / 4}
    metrics |= {"data": "MNIST", "pixels": pixels, "image_shape": [1, 28, 28], "seed": seed}
    (directory / "metrics.json").write_text(json.dumps(metrics))
    (directory / "history.csv").write_text(f"epoch,train/loss,val/loss\n1,{2 * loss},{2 * loss}\n2,{loss},{loss}\n")
    return directory


def write_pictures(root: Path, many: int = 50) -> None:
    """Write pictures of two classes and of different sizes, cat/0.png, dog/1.png, …, with noise."""
    for i in range(many):
        path = root / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def change_json(file: Path, **changed: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@dataclass
class Block:
    """A fenced block of a page: its language, and its text."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block shows, named in a comment at its top."""
        found = re.match(r"(?:# @package _global_\n)?# ([\w./]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def session(self) -> tuple[str, str] | None:
        """A command after `$` and its output, which may be cut by an ellipsis."""
        found = re.match(r"\$ (.*)\n(.*?)…?\n", self.text)
        return (found[1], found[2]) if found else None

    @property
    def commands(self) -> list[str]:
        """The commands of a block without a language or in bash, without their comments."""
        if self.language not in ("", "bash") or self.session:
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        words = (shlex.split(line, comments=True) for line in lines)
        return [shlex.join(w) for w in words if w and re.fullmatch(COMMAND, w[0])]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, such as docs/running.md."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
    return [Block(*block) for block in found]


def grid(side: float, steps: int) -> tuple[Tensor, float]:
    """Points of a square grid, `[steps², 2]`, and the logarithm of the area of one."""
    line = torch.linspace(-side, side, steps)
    return torch.cartesian_prod(line, line), 2 * math.log(2 * side / (steps - 1))


def close_in_expectation(samples: Tensor, expected: Tensor) -> bool:
    """Whether the mean over the first axis is within five standard errors of `expected`."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    return bool(((samples.mean(dim=0) - expected).abs() < 5 * error + 1e-4).all())
