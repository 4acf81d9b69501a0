"""Evaluate a trained VAE: likelihood, rate and distortion, use of the latents, probes. All in nats per image.

Every estimator is a function of the model, images and labels, and asks the model alone for q(z|x), p(x|z) and p(z);
`evaluate` puts them into one flat dictionary.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from vae_lightning import figures
from vae_lightning.config import ConfigError, PositiveInt, Seed
from vae_lightning.data.pixels import described, stream_seed
from vae_lightning.files import read_json, write_json
from vae_lightning.models.estimators import active_units, importance_weighted_bound, kl_divergence
from vae_lightning.models.likelihoods import remark
from vae_lightning.models.posteriors import DiagonalGaussian, PosteriorDistribution
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import open_run


@dataclass
class ImportanceSampling:
    """Per-image figures `[images]`, in nats, from k samples of the posterior each, and the bound's curve in k."""

    log_likelihood: Tensor  # log (1/k) Σ w, the importance-weighted bound on log p(x)
    reconstruction: Tensor  # −mean log p(x|z)
    kl: Tensor  # of each latent dimension in closed form, [images, latent_dim], or else sampled, [images, 1]
    analytic: bool  # whether the KL is in closed form
    deviation: Tensor  # standard deviation of the ELBO with one sample
    effective_samples: Tensor  # (Σ w)² / Σ w²: between 1 and k
    curve: dict[int, float]  # for each k: the mean over images of the bound with the first k samples


@torch.inference_mode()
def posteriors(vae: VAE, images: Tensor, labels: Tensor, batch_size: int = 1_000) -> list[PosteriorDistribution]:
    """q(z|x) of all `images` `[n, …]`, bytes, in batches."""
    parts = zip(images.split(batch_size), labels.to(vae.device).split(batch_size), strict=True)
    return [vae.encode(x, y) for x, y in parts]


@torch.inference_mode()
def importance_sampling(
    vae: VAE,
    images: Tensor,
    labels: Tensor,
    samples: int,
    seed: int = 0,
    batch_size: int = 100,
    chunk: int = 20,
    progress: bool = False,
) -> ImportanceSampling:
    """Importance sampling of log p(x) with the posterior as the proposal (Burda et al. 2016, eq. 8).

    Each image is encoded once, and its noise depends on (seed, image) alone. So neither `batch_size`, the images that
    are decoded together, nor `chunk`, the samples of each, changes anything but memory and speed.
    """
    prior = vae.prior(vae.encode)
    points = curve_points(samples)
    parts: list[tuple[Tensor, ...]] = []
    analytic = True
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=f"{samples} samples", unit="batch", disable=None if progress else True):
        index = range(start, min(start + batch_size, len(images)))
        x, y = vae.images(images[start : index.stop]), labels[start : index.stop].to(vae.device)
        q = vae.encode(x, y)
        noise = torch.stack(list(image_noise(index, (samples, q.noise_dim), seed, vae.device)), dim=1)
        log_weights, log_likelihoods = [], []
        for epsilon in noise.split(chunk):
            z, log_q = q.transform_and_log_prob(epsilon)  # [chunk, batch, latent_dim], [chunk, batch]
            log_likelihood = vae.decode(z, y).log_prob(x)
            log_likelihoods.append(log_likelihood)
            log_weights.append(log_likelihood + prior.log_prob(z) - log_q)
        log_weight, log_likelihood = torch.cat(log_weights), torch.cat(log_likelihoods)  # [samples, batch]
        if analytic := vae.prior.has_analytic_kl and isinstance(q, DiagonalGaussian):
            assert isinstance(q, DiagonalGaussian)
            kl, one_sample = kl_divergence(q.mean, q.log_variance), log_likelihood
        else:
            kl, one_sample = (log_likelihood - log_weight).mean(dim=0).unsqueeze(-1), log_weight
        bounds = torch.logcumsumexp(log_weight.double(), dim=0)
        parts.append(
            (
                importance_weighted_bound(log_weight),
                -log_likelihood.mean(dim=0),
                kl,
                one_sample.std(dim=0, correction=min(1, samples - 1)),
                (1 / log_weight.double().softmax(dim=0).square().sum(dim=0)).clamp(max=samples),
                torch.stack([bounds[k - 1] - math.log(k) for k in points], dim=-1),
            )
        )
    bound, reconstruction, kl, deviation, effective, curves = (torch.cat(part) for part in zip(*parts, strict=True))
    curve = dict(zip(points, curves.mean(dim=0).tolist(), strict=True))
    return ImportanceSampling(bound, reconstruction, kl, analytic, deviation, effective, curve)


@torch.inference_mode()
def aggregate_posterior(
    vae: VAE, parts: Sequence[PosteriorDistribution], seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """Mutual information I_q(x; z) and KL(q(z) ‖ p(z)), in nats, with q(z) = (1/N) Σ q(z|x) over the N images given.

    Hoffman & Johnson 2016: their sum is the mean KL(q(z|x) ‖ p(z)). One sample z of each image; I_q stays below log N.
    None for a posterior that has no `mixture`.
    """
    sizes = [len(q.mean) for q in parts]
    generator = torch.Generator(parts[0].mean.device).manual_seed(stream_seed(seed, 1))
    noise = torch.randn(sum(sizes), parts[0].noise_dim, generator=generator, device=parts[0].mean.device)
    pairs = [q.transform_and_log_prob(part) for q, part in zip(parts, noise.split(sizes), strict=True)]
    z, log_conditional = torch.cat([z for z, _ in pairs]), torch.cat([log_q for _, log_q in pairs])
    try:
        mixtures = [q.mixture() for q in parts]
    except NotImplementedError:
        return None, None
    weights = torch.tensor(sizes, device=z.device).log() - math.log(sum(sizes))  # of the parts in q(z)
    log_aggregate = torch.cat(
        [
            torch.stack(
                [weight + mixture.log_prob(part) for weight, mixture in zip(weights, mixtures, strict=True)]
            ).logsumexp(dim=0)
            for part in z.split(1_000)
        ]
    )
    log_prior = vae.prior(vae.encode).log_prob(z)
    return (log_conditional - log_aggregate).mean().item(), (log_aggregate - log_prior).mean().item()


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """How well digits are read off posterior means: by 5 nearest neighbours, and by a linear classifier."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, x_test, y_test = (t.cpu().numpy() for t in (train, train_labels, test, test_labels))
    neighbours = KNeighborsClassifier(5).fit(x, y).score(x_test, y_test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(x, y).score(x_test, y_test)
    return {"knn_accuracy": float(neighbours), "linear_accuracy": float(linear)}


@torch.inference_mode()
def evaluate(
    vae: VAE,
    images: Tensor,
    labels: Tensor,
    samples: int = 5_000,
    seed: int = 0,
    batch_size: int = 100,
    chunk: int = 20,
    progress: bool = False,
) -> tuple[dict[str, Any], ImportanceSampling, Tensor]:
    """Everything about `images` but probes: a flat dictionary, what it was computed from, and the codes.

    nll and its standard error over images, the smallest and median effective sample size, elbo, reconstruction, kl and
    kl of each dimension, active units, mutual information and marginal KL.
    """
    vae.eval()
    parts = posteriors(vae, images, labels)
    codes = torch.cat([q.mean for q in parts])
    sampled = importance_sampling(vae, images, labels, samples, seed, batch_size, chunk, progress)
    information, marginal = aggregate_posterior(vae, parts, seed)
    dimension_kl = sampled.kl.mean(dim=0)
    kl = dimension_kl.sum().item()
    figures = {
        "nll": -mean(sampled.log_likelihood),
        "nll_stderr": sampled.log_likelihood.double().std().item() / math.sqrt(len(images)),
        "elbo": -mean(sampled.reconstruction) - kl,
        "reconstruction": mean(sampled.reconstruction),
        "kl": kl,
        "kl_per_dimension": sorted(dimension_kl.tolist(), reverse=True) if sampled.analytic else None,
        "active_units": int(active_units(codes)),
        "mutual_information": information,
        "marginal_kl": marginal,
        "effective_samples_median": sampled.effective_samples.median().item(),
        "effective_samples_min": sampled.effective_samples.min().item(),
    }
    return figures, sampled, codes


def check_elbo(run: RunDirectory, checkpoint: Path, config: dict[str, Any], elbo: float, deviation: Tensor) -> None:
    """Compare an evaluation's ELBO with that of the run's own test, which went through `terms`.

    Both are means over the test set with noise of their own; `deviation` `[images]` is that of one sample. Raises
    RunError where they differ by more than six standard errors and the precision of the arithmetic.
    """
    tested = read_json(run.metrics_file) if run.state == "finished" else {}
    trainer = config.get("trainer", {})
    limit = trainer.get("limit_test_batches")
    whole_set = (limit is None or (limit == 1.0 and isinstance(limit, float))) and not trainer.get("fast_dev_run")
    if not whole_set or checkpoint != run.best_checkpoint or "test/elbo" not in tested:
        return  # the run has tested other images, another checkpoint, or none
    error = deviation.double().square().sum().sqrt().item() / len(deviation)
    full_precision = str(trainer.get("precision") or "32").startswith(("32", "64")) and error > 0
    if abs(elbo - tested["test/elbo"]) > 6 * math.sqrt(2) * error + (1e-3 if full_precision else 2e-2) * abs(elbo):
        raise RunError(
            f"{run}: its elbo is {elbo:.2f} here and was {tested['test/elbo']:.2f} in its own test; sampling explains "
            f"{6 * error:.2f}. Nothing was written. If the model is your own, its elbo and log_weights should go "
            "through the same encode, decode and prior"
        )


def evaluate_run(
    run: str,
    split: Literal["test", "val"] = "test",
    samples: PositiveInt = 5_000,
    seed: Seed = 0,
    batch_size: PositiveInt = 100,
    chunk: PositiveInt = 10,
    probes: bool = True,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    data_root: str | None = None,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a run directory: print a table, write what `write_evaluation` says, and return the numbers.

    Raises UserError for a run or data that do not fit.
    """
    opened = open_run(run, accelerator, trust, data_root)
    vae, data = opened.model, opened.data
    if split == "val" and not data.val_size:
        raise ConfigError("split=val: this run held no images out (data.val_size=0); allowed: test")
    if not isinstance(vae, VAE):
        raise ConfigError(f"run={run}: its model, {type(vae).__name__}, has no likelihood to measure")
    if not os.access(opened.directory, os.W_OK):
        raise ConfigError(f"run={run}: cannot be written to, and the evaluation belongs there")
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")

    started = time.monotonic()
    results, sampled, codes = evaluate(vae, images, labels, samples, seed, batch_size, chunk, progress=True)
    if split == "test":
        check_elbo(opened.directory, opened.checkpoint, vae.config, results["elbo"], sampled.deviation)
    if probes:
        train = vae.all_codes(data.train_images, data.train_labels)
        results |= probe_accuracy(train, data.train_labels, codes, labels)
    caution = remark(vae.likelihood, data.pixels)
    content = {f"{split}/{key}": value for key, value in results.items()} | {
        f"{split}/nll_curve": {str(k): -bound for k, bound in sampled.curve.items()},
        "samples": samples,
        "pixels": data.pixels,
        "data": data.dataset,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 3),
        "checkpoint": opened.checkpoint.stem,
        "remark": caution,
    }
    heading = f"{split} set, {described(data.pixels, data.image_shape[0])} pixels, {samples} samples"
    print(table(results, heading, caution), flush=True)  # first: it took minutes, and a disk can be full
    unit = "cross-entropy" if caution else "−log p(x)"
    curve = figures.nll_curve(sampled.curve, f"{unit}, {described(data.pixels, data.image_shape[0])} pixels")
    print(write_evaluation(opened.directory, opened.checkpoint, split, content, curve))
    return content


def write_evaluation(run: RunDirectory, checkpoint: Path, split: str, content: dict[str, Any], curve: Figure) -> Path:
    """Keep an evaluation beside the run's others, by split, checkpoint, samples and seed.

    evaluation.json and figures/nll_curve.png are that of the best checkpoint on the test set, with most samples.
    """
    name = f"{split}_{checkpoint.stem}_k{content['samples']}_seed{content['seed']}"
    file = run.subdirectory(run.evaluations) / f"{name}.json"
    same = read_json(file) if file.exists() else {}  # which has the probes, where these left them out
    write_json(file, same | content)
    figures.save(curve, file.with_suffix(".png"))
    first = read_json(run.evaluation_file) if run.evaluation_file.exists() else {}
    if (
        split == "test"
        and checkpoint.stem == run.best_checkpoint.stem
        and content["samples"] >= first.get("samples", 0)
    ):
        write_json(run.evaluation_file, same | content)
        figures.save(curve, run.subdirectory(run.figures) / "nll_curve.png")
    return file


def table(results: dict[str, Any], heading: str, caution: str) -> str:
    """The results as lines of text, below the protocol."""
    lines = [heading + (f"; {caution}" if caution else "")]
    for name, value in results.items():
        if isinstance(value, float):
            label = f"{name} (cross-entropy)" if caution and name in ("nll", "elbo", "reconstruction") else name
            lines.append(f"  {label:32} {value:10.4f}")
        elif isinstance(value, int):
            lines.append(f"  {name:32} {value:10d}")
        elif value is not None:
            lines.append(f"  {name:32} {' '.join(f'{v:.2f}' for v in value[:12])}{' …' if len(value) > 12 else ''}")
    return "\n".join(lines)


def mean(values: Tensor) -> float:
    """The mean over images, summed in float64."""
    return values.double().mean().item()


def image_noise(images: Iterable[int], shape: tuple[int, ...], seed: int, device: torch.device) -> Iterator[Tensor]:
    """Standard normal noise of `shape` for each image, from a stream of its own."""
    generator = torch.Generator(device)
    for image in images:
        generator.manual_seed(stream_seed(seed, 0, image))
        yield torch.randn(shape, generator=generator, device=device)


def curve_points(samples: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to and with `samples`."""
    points = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return [*(k for k in points if k < samples), samples]
