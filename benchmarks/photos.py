"""Likelihoods of 8-bit pixels on photographs, in bits per dimension; writes the table of docs/colour.md.

    pip install scikit-image                  # five of the photographs; the others come with scikit-learn
    python benchmarks/photos.py               # 30 minutes on two cores
    python benchmarks/photos.py --steps 200   # a trial, which leaves the page as it is
    python benchmarks/photos.py --time        # seconds per step of a Gaussian and of mixtures, in turns

The images are patches of 32×32 pixels. Training patches come from any place of five photographs, mirrored and with
their colours exchanged at random; test patches tile two other photographs. All likelihoods have the same model and
training: `Pyramid`. The references are no VAEs: independent pixels with the frequencies of the training patches, and
lossless codecs, which get each patch as a file of its own, header included.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torch.distributions as td
from lightning import Trainer, seed_everything
from PIL import Image
from reproduce import ROOT, write_between
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.special import log_ndtr
from torch.utils.data import DataLoader, TensorDataset

from vae_lightning import (
    VAE,
    DiscretizedLogistic,
    GaussianLikelihood,
    LogisticMixture,
    Pyramid,
    ResidualConv,
    figures,
)
from vae_lightning.models.estimators import importance_weighted_bound

SIDE = 32
DIMS = 3 * SIDE * SIDE
BATCH, STEPS, PATCHES = 32, 1_500, 40_000
SAMPLES = 20  # importance samples per test patch
TRAINING = ("china.jpg", "astronaut", "chelsea", "rocket", "stereo_motorcycle")
TEST = ("flower.jpg", "coffee")
START, END = "<!-- photos: written by benchmarks/photos.py -->", "<!-- end of photos -->"


class BinnedNormal(td.Normal):
    """The probabilities of the 256 levels under a normal density, its tails in the first and last bin."""

    def log_prob(self, value: Tensor) -> Tensor:
        level = (255 * value.double()).round()
        lower = ((level - 0.5) / 255 - self.loc) / self.scale
        upper = ((level + 0.5) / 255 - self.loc) / self.scale
        lower, upper = lower.masked_fill(level == 0, -math.inf), upper.masked_fill(level == 255, math.inf)
        right = lower > 0  # there, mirrored: both distribution functions would round to 1
        lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
        return log_ndtr(upper) + torch.log1p(-(log_ndtr(lower) - log_ndtr(upper)).exp())


class BinnedGaussian(GaussianLikelihood):
    """A Gaussian that is trained by its density, as usual, and evaluated on the bins of 8-bit pixels.

    A learnt scale starts at that of the reconstructions. From the deviation of the data, training discards all detail.
    """

    def initialize(self, images: Tensor) -> None:
        pass

    def forward(self, outputs: Tensor) -> td.Distribution:
        p = super().forward(outputs)
        normal: Any = p.base_dist  # type: ignore[attr-defined]
        return p if self.training else td.Independent(BinnedNormal(normal.loc.double(), normal.scale.double()), 3)


LIKELIHOODS = {
    "Gaussian, one learnt scale": partial(BinnedGaussian, scale=4 / 255, learn_scale=True),
    "Gaussian, scale per pixel": partial(BinnedGaussian, scale="per_pixel"),
    "discretized logistic, scale per pixel": partial(DiscretizedLogistic, scale="per_pixel"),
    "mixture of 5 logistics": partial(LogisticMixture, components=5),
}


def photograph(name: str) -> Tensor:
    """Load a photograph that scikit-learn or scikit-image ships: uint8, `[3, height, width]`."""
    import skimage.data

    if name.endswith(".jpg"):
        pixels = load_sample_image(name)
    else:
        found = getattr(skimage.data, name)()
        pixels = found[0] if isinstance(found, tuple) else found  # of a stereo pair, the left one
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def training_patches() -> Tensor:
    """Cut patches at random places, as many of a photograph as its size deserves: uint8, `[n, 3, 32, 32]`."""
    generator = torch.Generator().manual_seed(0)
    photographs = [photograph(name) for name in TRAINING]
    areas = torch.tensor([float(photo[0].numel()) for photo in photographs])
    patches = []
    for index in torch.multinomial(areas, PATCHES, replacement=True, generator=generator):
        photo = photographs[index]
        top, left = (int(torch.randint(size - SIDE + 1, (), generator=generator)) for size in photo.shape[1:])
        colours = torch.randperm(3, generator=generator)
        patch = photo[colours, top : top + SIDE, left : left + SIDE]
        patches.append(patch.flip(-1) if torch.rand((), generator=generator) < 0.5 else patch)
    return torch.stack(patches)


def test_patches() -> Tensor:
    """Cut the test photographs into patches side by side: uint8, `[n, 3, 32, 32]`."""
    tiles = [photograph(name).unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE) for name in TEST]
    return torch.cat([tile.permute(1, 2, 0, 3, 4).flatten(0, 1) for tile in tiles])


def train(likelihood: Any, patches: Tensor, steps: int) -> VAE:
    seed_everything(0, verbose=False)
    schedule = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "auto", "interval": "step"}
    vae = Pyramid(likelihood=likelihood, schedule=schedule)
    loader = DataLoader(TensorDataset(patches), BATCH, shuffle=True, drop_last=True)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1_000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(vae, loader)
    return vae.eval()


@torch.no_grad()
def nats(vae: VAE, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return −log p(x), −ELBO and KL of each patch `[n]`, in nats."""
    parts = []
    for x in patches.split(BATCH):
        log_weights = vae.log_weights(x, SAMPLES)
        parts.append((-importance_weighted_bound(log_weights), -log_weights.mean(dim=0), vae.elbo(x)["kl"]))
    nll, elbo, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll, elbo, kl


def codec(patch: Tensor, name: str, **options: Any) -> float:
    """Return the length of a patch as a file, in nats."""
    file = io.BytesIO()
    Image.fromarray(patch.permute(1, 2, 0).numpy()).save(file, name, **options)
    return 8 * len(file.getvalue()) * math.log(2)


def independent(patches: Tensor, training: Tensor) -> Tensor:
    """Return −log p of patches with independent pixels, all of the same categorical distribution, in nats."""
    counts = torch.bincount(training.flatten().long(), minlength=256) + 1.0
    return -(counts / counts.sum()).log()[patches.long()].flatten(1).sum(dim=1)


def bits(values: Tensor) -> str:
    """Format the mean of nats per patch in bits per dimension, with its standard error over patches."""
    per_dim = values.double() / (DIMS * math.log(2))
    return f"{per_dim.mean():.3f} ± {per_dim.std() / len(per_dim) ** 0.5:.3f}"


def time_steps(rounds: int = 10) -> None:
    """Print the seconds of the fastest step of each likelihood: 64 images, the default `residual_conv`, 20 latents."""
    images = torch.rand(64, 3, SIDE, SIDE)
    parts = {"Gaussian": GaussianLikelihood} | {f"K = {k}": partial(LogisticMixture, components=k) for k in (5, 10, 20)}
    models = {
        name: VAE(20, ResidualConv, likelihood, image_shape=(3, SIDE, SIDE)) for name, likelihood in parts.items()
    }
    fastest = dict.fromkeys(models, math.inf)
    for name, vae in rounds * [*models.items()]:
        optimizer = torch.optim.Adam(vae.parameters())
        started = time.perf_counter()
        vae.objective(vae, images.mul(255).round() / 255)["loss"].mean().backward()
        optimizer.step()
        fastest[name] = min(fastest[name], time.perf_counter() - started)
        optimizer.zero_grad()
    for name, seconds in fastest.items():
        print(f"{name}: {seconds:.3f} s, {seconds / fastest['Gaussian']:.2f} × the Gaussian")


def row(name: str, steps: int) -> tuple[str, Tensor, Tensor]:
    """Train a VAE; return its row of the table, its reconstructions of ten test patches, and ten samples."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    vae = train(LIKELIHOODS[name], training_patches(), steps)
    minutes = (time.perf_counter() - started) / 60
    test = test_patches()
    text = f"| {name} | {' | '.join(map(bits, nats(vae, test)))} | {minutes:.0f} |"
    print(text, flush=True)
    torch.manual_seed(0)
    return text, vae.reconstruct(shown(test)), vae.sample(10)


def shown(test: Tensor) -> Tensor:
    return test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:10]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    if options.time:
        return time_steps()
    steps = options.steps
    training, test = training_patches(), test_patches()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # a process per core
        results = [*pool.map(row, LIKELIHOODS, repeat(steps))]
    rows, reconstructions, samples = map(list, zip(*results, strict=True))
    names = (name.replace(", ", ",\n") for name in LIKELIHOODS)
    images = {"original": shown(test) / 255} | dict(zip(names, reconstructions, strict=True))
    images["samples of\nthe mixture"] = samples[-1]
    for name, values in {
        "no VAE: independent pixels": independent(test, training),
        "no VAE: PNG": torch.tensor([codec(patch, "PNG", optimize=True) for patch in test]),
        "no VAE: WebP, lossless": torch.tensor([codec(patch, "WEBP", lossless=True, quality=100) for patch in test]),
    }.items():
        rows.append(f"| {name} | {bits(values)} | | | |")
        print(rows[-1], flush=True)
    picture = figures.labelled_rows(torch.stack([*images.values()]).clamp(0, 1), list(images))
    if steps != STEPS:
        figures.save(picture, ROOT / "outputs" / "photos.png")
        return
    figures.as_pil(picture).quantize(256).save(ROOT / "docs" / "images" / "photos.png", optimize=True)
    head = [
        f"{len(test)} test patches, {steps:,} steps of {BATCH}, {SAMPLES} importance samples, one seed, one core each;",
        "bits per dimension with the standard error over patches:",
        "",
        "| model | −log p(x) | −ELBO | KL | minutes |",
        "|---|--:|--:|--:|--:|",
    ]
    write_between(ROOT / "docs" / "colour.md", START, END, [*head, *rows])


if __name__ == "__main__":
    main()
