"""Evaluate a trained VAE: likelihood, rate and distortion, use of the latents, probes. In nats per image.

The estimators take q(z|x), p(x|z) and p(z) from the model and nothing else; `evaluate` returns their results for the
images of any loader in one flat dictionary.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from vae_lightning import figures
from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt, Seed, UserError, takes_options_of
from vae_lightning.data.mapped import Images
from vae_lightning.data.pixels import described, evaluation_pixels, stream_seed
from vae_lightning.files import atomic_write, read_dict, write_json
from vae_lightning.models.estimators import (
    active_units,
    closed_form_kl,
    importance_weighted_bound,
    importance_weighted_stderr,
)
from vae_lightning.models.inputs import check_count
from vae_lightning.models.likelihoods import bits_per_dim, remark
from vae_lightning.models.posteriors import PosteriorDistribution
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory, RunError, StrPath, find_runs
from vae_lightning.runs.loading import open_run

log = logging.getLogger(__name__)


@dataclass
class ImportanceSampling:
    """Estimates for each image `[images]`, in nats, from k samples of its posterior; and the mean bound for each k."""

    log_likelihood: Tensor  # log (1/k) Σ w, the importance-weighted bound on log p(x)
    stderr: Tensor  # standard error of log_likelihood
    reconstruction: Tensor  # −mean log p(x|z)
    kl: Tensor  # [images, latent_dim or 1] in closed form, [images, levels or 1] by Monte Carlo
    analytic: bool  # whether the KL is in closed form
    deviation: Tensor  # standard deviation of the ELBO with one sample
    effective_samples: Tensor  # (Σ w)² / Σ w², between 1 and k
    curve: dict[int, float]  # number of samples, mean over images of the bound with the first of the k samples


@torch.inference_mode()
def posteriors(vae: VAE, images: Images, labels: Tensor | None, batch_size: int = 1_000) -> list[PosteriorDistribution]:
    """Return q(z|x) of `images` `[n, …]`, bytes or floats in [0, 1], in batches."""
    starts = range(0, len(images), batch_size)
    return [vae.encode(images[i : i + batch_size], rows(labels, i, i + batch_size, vae)) for i in starts]


def rows(labels: Tensor | None, start: int, stop: int, vae: VAE) -> Tensor | None:
    """Return some of the labels, on the device of the model."""
    return None if labels is None else labels[start:stop].to(vae.device)


@torch.inference_mode()
def importance_sampling(
    vae: VAE,
    images: Images,
    labels: Tensor | None,
    samples: int,
    seed: int = 0,
    batch_size: int = 100,
    chunk: int = 10,
    compile: bool = False,
) -> ImportanceSampling:
    """Estimate log p(x) by importance sampling with the posterior as the proposal (Burda et al. 2016, eq. 8).

    `batch_size` images with `chunk` samples each are decoded together. Each image is encoded once, and its noise
    depends on (seed, image) alone, so both change memory and speed but no number. `compile` compiles the likelihood.
    """

    def log_likelihood_of(x: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        return vae.likelihood_given(z, labels).log_prob(x)

    score: Callable[..., Tensor] = log_likelihood_of
    if compile:
        from vae_lightning.training.compiled import Compiled

        score = Compiled(log_likelihood_of, vae.device)
    prior = vae.prior_distribution()
    samples = 1 if vae.posterior.discrete else samples  # of a point mass, all are the same
    points = curve_points(samples)
    parts: list[dict[str, Tensor]] = []
    analytic = False
    generator = torch.Generator(vae.device)
    starts = range(0, len(images), batch_size)  # the bar is shown in a terminal only
    for start in tqdm(starts, desc=f"{samples} samples", unit="batch", disable=None):
        index = range(start, min(start + batch_size, len(images)))
        x, y = vae.images(images[start : index.stop]), rows(labels, start, index.stop, vae)
        q = vae.encode(x, y)
        noise = []
        for image in index:
            generator.manual_seed(stream_seed(seed, 0, image))
            noise.append(torch.randn(samples, q.noise_dim, generator=generator, device=vae.device))
        log_weights, log_likelihoods, of_levels = [], [], []
        for epsilon in torch.stack(noise, dim=1).split(chunk):
            z, log_q = q.transform_and_log_prob(epsilon)  # [chunk, batch, latent_dim], [chunk, batch]
            log_likelihood = score(x, z, y)
            log_likelihoods.append(log_likelihood)
            log_weights.append(log_likelihood + prior.log_prob(z) - log_q)
            if q.levels:
                of_levels.append(q.transform_and_kl(epsilon, prior)[1])  # [chunk, batch, levels]
        log_weight, log_likelihood = torch.cat(log_weights), torch.cat(log_likelihoods)  # [samples, batch]
        closed = closed_form_kl(q, prior)
        analytic = closed is not None
        if closed is not None:
            kl, one_sample = closed, log_likelihood
        elif of_levels:
            kl, one_sample = torch.cat(of_levels).mean(dim=0), log_weight
        else:
            kl, one_sample = (log_likelihood - log_weight).mean(dim=0).unsqueeze(-1), log_weight
        bounds = torch.logcumsumexp(log_weight.double(), dim=0)
        parts.append(
            {
                "log_likelihood": importance_weighted_bound(log_weight),
                "stderr": importance_weighted_stderr(log_weight),
                "reconstruction": -log_likelihood.mean(dim=0),
                "kl": kl,
                "deviation": one_sample.std(dim=0, correction=min(1, samples - 1)),
                "effective_samples": (1 / log_weight.double().softmax(dim=0).square().sum(dim=0)).clamp(max=samples),
                "curve": torch.stack([bounds[k - 1] - math.log(k) for k in points], dim=-1),
            }
        )
    estimates = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    curve = dict(zip(points, estimates.pop("curve").mean(dim=0).tolist(), strict=True))
    return ImportanceSampling(**estimates, analytic=analytic, curve=curve)


@torch.inference_mode()
def aggregate_posterior(
    vae: VAE, parts: Sequence[PosteriorDistribution], seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """Return the mutual information I_q(x; z) and KL(q(z) ‖ p(z)), in nats, with q(z) = (1/N) Σ q(z|x) over N images.

    Their sum is the mean KL(q(z|x) ‖ p(z)) (Hoffman & Johnson 2016). Estimated with one sample z per image; I_q is at
    most log N. None for a posterior without `mixture`.
    """
    try:
        mixtures = [q.mixture() for q in parts]
    except ConfigError:
        return None, None
    sizes = [len(q.mean) for q in parts]
    device = parts[0].mean.device
    generator = torch.Generator(device).manual_seed(stream_seed(seed, 1))
    noise = torch.randn(sum(sizes), parts[0].noise_dim, generator=generator, device=device).split(sizes)
    pairs = [q.transform_and_log_prob(part) for q, part in zip(parts, noise, strict=True)]
    z, log_conditional = torch.cat([z for z, _ in pairs]), torch.cat([log_q for _, log_q in pairs])
    log_shares = torch.tensor(sizes, device=device).log().unsqueeze(1) - math.log(sum(sizes))  # of the parts in q(z)
    log_aggregate = torch.cat(
        [
            (log_shares + torch.stack([mixture.log_prob(part) for mixture in mixtures])).logsumexp(dim=0)
            for part in z.split(1_000)
        ]
    )
    log_prior = vae.prior_distribution().log_prob(z)
    return (log_conditional - log_aggregate).mean().item(), (log_aggregate - log_prior).mean().item()


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Return the accuracy of classification from posterior means: 5 nearest neighbours, logistic regression.

    Images without a label, -1, are left out. Empty for a data set with one class, or with fewer than five training
    images.
    """
    train, train_labels, test, test_labels = (
        part for x, y in ((train, train_labels), (test, test_labels)) for part in (x[(y >= 0).to(x.device)], y[y >= 0])
    )
    if len(train) < 5 or len(train_labels.unique()) < 2:
        return {}
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, x_test, y_test = (t.cpu().numpy() for t in (train, train_labels, test, test_labels))
    neighbours = KNeighborsClassifier(5).fit(x, y).score(x_test, y_test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(x, y).score(x_test, y_test)
    return {"knn_accuracy": float(neighbours), "linear_accuracy": float(linear)}


@torch.inference_mode()
def bayes_classifier(
    vae: VAE,
    images: Images,
    labels: Tensor,
    train_labels: Tensor,
    samples: int,
    seed: int = 0,
    batch_size: int = 100,
    chunk: int = 10,
) -> dict[str, float]:
    """Classify images with a conditional model by Bayes' rule, p(y|x) = p(y) p(x|y) / p(x).

    p(x|y) is estimated for every class y with the same noise, and p(y) are the frequencies of `train_labels`. Return
    the accuracy, and the mean of −log p(x) = −log Σ p(y) p(x|y) in nats, which compares to models without labels.
    """
    of_classes = [torch.full((len(images),), y) for y in range(vae.classes)]
    sampled = [importance_sampling(vae, images, y, samples, seed, batch_size, chunk).log_likelihood for y in of_classes]
    frequencies = torch.bincount(train_labels, minlength=vae.classes).to(vae.device) / len(train_labels)
    log_joint = torch.stack(sampled, dim=1).double() + frequencies.log()  # log p(x, y), [images, classes]
    accuracy = (log_joint.argmax(dim=1) == labels.to(vae.device)).double().mean().item()
    return {"class_accuracy": accuracy, "marginal_nll": -log_joint.logsumexp(dim=1).mean().item()}


def evaluate(
    vae: VAE,
    loader: Iterable[Any],
    samples: int = 5_000,
    seed: int = 0,
    batch_size: int = 100,
    chunk: int = 10,
) -> dict[str, Any]:
    """Evaluate a VAE on the images of a loader: a dictionary of numbers, in nats per image.

    `nll` is estimated with `samples` importance samples per image; docs/numbers.md explains the keys. `log_likelihood`
    are those of each image, `[images]`, in the order of the loader: `compare` takes two such dictionaries. `batch_size`
    images with `chunk` samples each are decoded together; both change memory and speed, but no number. The images of
    the loader are held in memory. Raises ShapeError for batches that the model does not accept.
    """
    check_count("samples", samples)
    batches = [vae.prepared(batch, "evaluate") for batch in loader]
    if not batches:
        raise UserError("loader: has no batch")
    images = torch.cat([x.cpu() for x, _ in batches])
    labels = None if batches[0][1] is None else torch.cat([y.cpu() for _, y in batches if y is not None])
    was_training = vae.training
    results, sampled, _ = evaluate_images(vae, images, labels, samples, seed, batch_size, chunk)
    vae.train(was_training)
    grey = bool(((images > 0) & (images < 1)).any())
    return results | {
        "samples": samples,
        "images": len(images),
        "images_sha256": hashlib.sha256(images.contiguous().numpy().data).hexdigest(),
        "remark": remark(vae.likelihood, "grey" if grey else "binary"),
        "log_likelihood": sampled.log_likelihood.cpu(),
    }


@torch.inference_mode()
def evaluate_images(
    vae: VAE,
    images: Images,
    labels: Tensor | None,
    samples: int = 5_000,
    seed: int = 0,
    batch_size: int = 100,
    chunk: int = 10,
    compile: bool = False,
) -> tuple[dict[str, Any], ImportanceSampling, Tensor]:
    """Return the results for images, bytes or floats in [0, 1], in a flat dictionary; all but the probes.

    Also return the estimates for each image, and the posterior means. The keys are explained in docs/numbers.md.
    """
    vae.eval()
    parts = posteriors(vae, images, labels)
    codes = torch.cat([q.mean for q in parts])
    sampled = importance_sampling(vae, images, labels, samples, seed, batch_size, chunk, compile)
    information, marginal = aggregate_posterior(vae, parts, seed)
    nll = -sampled.log_likelihood.double()
    reconstruction = sampled.reconstruction.double().mean().item()
    dimension_kl = sampled.kl.mean(dim=0)
    kl = dimension_kl.sum().item()
    per_dimension = sampled.analytic and len(dimension_kl) == vae.latent_dim
    results = {
        "nll": nll.mean().item(),
        "nll_stderr": nll.std().item() / math.sqrt(len(images)),
        "elbo": -reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "kl_per_dimension": sorted(dimension_kl.tolist(), reverse=True) if per_dimension else None,
        "active_units": int(active_units(codes)),
        "mutual_information": information,
        "marginal_kl": marginal,
        "ess": sampled.effective_samples.median().item(),
        "ess_min": sampled.effective_samples.min().item(),
    } | {name: value.item() for name, value in vae.posterior.summary(codes).items()}
    if vae.posterior.discrete:  # there are no weights, and nll is −elbo
        del results["ess"], results["ess_min"]
    if not sampled.analytic and len(dimension_kl) > 1:
        results |= {f"kl_{level}": value for level, value in enumerate(dimension_kl.tolist(), start=1)}
    bits = bits_per_dim(vae.likelihood, nll.mean().item(), vae.image_shape)
    results |= {} if bits is None else {"bits_per_dim": bits}
    return results, sampled, codes


def check_elbo(run: RunDirectory, checkpoint: Path, config: dict[str, Any], elbo: float, deviation: Tensor) -> None:
    """Compare the ELBO of an evaluation with that of the run's own test, which was computed by `terms`.

    Both are means over the test set with different noise; `deviation` `[images]` is the standard deviation with one
    sample. Raises RunError if they differ by more than six standard errors plus the precision of the arithmetic.
    """
    tested = read_dict(run.metrics_file) if run.state == "finished" else {}
    trainer = config.get("trainer", {})
    full_test = str(trainer.get("limit_test_batches")) in ("None", "1.0") and not trainer.get("fast_dev_run")
    if not full_test or checkpoint.resolve() != run.best_checkpoint.resolve() or "test/elbo" not in tested:
        return  # the run's own test used other images or another checkpoint
    error = deviation.double().square().sum().sqrt().item() / len(deviation)
    full_precision = str(trainer.get("precision") or "32").startswith(("32", "64")) and error > 0
    tolerance = 6 * math.sqrt(2) * error + (1e-3 if full_precision else 2e-2) * abs(elbo)
    if abs(elbo - tested["test/elbo"]) > tolerance:
        raise RunError(
            f"{run}: elbo={elbo:.2f}, but {run.metrics_file.name} has {tested['test/elbo']:.2f}: more than sampling "
            f"noise and rounding ({tolerance:.2f}); nothing was written. In your own model, terms and log_weights "
            "must use the same posterior_given, likelihood_given and prior_distribution"
        )


def evaluate_run(
    run: StrPath,
    *,
    split: Literal["test", "val"] = "test",
    samples: PositiveInt = 5_000,
    seed: Seed = 0,
    batch_size: PositiveInt = 100,
    chunk: PositiveInt = 10,
    probes: bool = True,
    compile: bool = False,
    class_samples: NonNegativeInt = 20,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    data_root: str | None = None,
) -> dict[str, Any]:
    """Evaluate a trained VAE, and write evaluation.json to its run directory. Returns the content of that file.

    A finished run that has this evaluation already is not evaluated again; its file is read. `run` is a run directory,
    one of its checkpoints, or latest. `evaluate_runs` explains the options.

    Raises UserError if the run or its data cannot be opened or evaluated.
    """
    directory, checkpoint = RunDirectory.locate(run)
    stem = checkpoint.stem + ("" if directory.state == "finished" else "_unfinished")  # before it is read
    settings: dict[str, Any] = {"split": split, "checkpoint": stem, "samples": samples, "seed": seed}
    settings |= {"probes": probes, "class_samples": class_samples}
    file = evaluation_file(directory, settings)
    if directory.state == "finished" and file.exists() and (content := read_dict(file)).items() >= settings.items():
        log.info("%s: evaluated already", directory)
        return content
    opened = open_run(checkpoint, accelerator, data_root)
    vae, data = opened.model, opened.data
    if split == "val" and not data.val_size:
        raise ConfigError("split=val: the run has no validation split (data.val_size=0); allowed: test")
    if not isinstance(vae, VAE):
        raise ConfigError(f"{run}: its model, {type(vae).__name__}, has no likelihood; should be a VAE")
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{run}: no permission to write there; evaluate a copy of the run")
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")

    started = time.monotonic()
    results, sampled, codes = evaluate_images(vae, images, labels, samples, seed, batch_size, chunk, compile)
    if split == "test":
        check_elbo(directory, checkpoint, vae.config, results["elbo"], sampled.deviation)
    if probes:
        train = evaluation_pixels(data.train_images, data.pixels)  # drawn as those of the test images
        results |= probe_accuracy(vae.all_codes(train, data.train_labels), data.train_labels, codes, labels)
    if vae.classes and class_samples:
        results |= bayes_classifier(vae, images, labels, data.train_labels, class_samples, seed, batch_size, chunk)
    warning = remark(vae.likelihood, data.pixels)
    kind = "log probability of 8-bit pixels" if vae.likelihood.eight_bit else "log density"
    quantity = "negative cross-entropy" if warning else "log probability" if vae.likelihood.binary else kind
    quantity += " given the label" if vae.classes else ""
    given = "given the label, " if vae.classes else ""
    protocol = f"{given}{described(data.pixels, data.image_shape[0])} pixels"
    content = {f"{split}/{key}": value for key, value in results.items()} | {
        f"{split}/nll_curve": {str(k): -bound for k, bound in sampled.curve.items()},
        **settings,
        "pixels": data.pixels,
        "protocol": protocol,
        "data": data.dataset,
        "quantity": quantity,
        "images": len(images),
        "images_sha256": data.checksums()[split],
        "seconds": round(time.monotonic() - started, 3),
        "remark": warning,
    }
    values = torch.stack([sampled.log_likelihood, sampled.stderr], dim=-1)
    curve = figures.nll_curve(sampled.curve, f"{'cross-entropy' if warning else '−log p(x)'}, {protocol}")
    try:
        return write_evaluation(directory, content, values, curve)
    except OSError:  # a full disk must not lose the results
        print(format_evaluation(content), flush=True)
        raise


FEW = 10  # effective samples, below which an estimate of log p(x) depends on a few samples and is too low
FEW_SAMPLES = f"* few samples carry this estimate (median ess below {FEW}): it is too high by more than its error says"
FEW_SAMPLES += "; evaluate with more --samples"
TABLE = ("nll", "nll_stderr", "bits_per_dim", "elbo", "reconstruction", "kl", "active_units", "ess")
IN_NATS = ("nll", "nll_stderr", "elbo", "reconstruction", "kl", "marginal_nll")


@takes_options_of(evaluate_run)
def evaluate_runs(runs: Annotated[Sequence[str], Field(min_length=1)], **options: Any) -> str:
    """Evaluate trained VAEs: log likelihood, rate and distortion, active units, probes; in nats per image.

    Writes evaluation.json into each run directory. A finished run that has the same evaluation already is not
    evaluated again. docs/numbers.md explains the numbers.

        vae evaluate outputs/vae/2026-11-21_10-00-00-000000
        vae evaluate outputs/sweeps/priors --samples 500 --split val

    Args:
        runs: run directories, directories that contain runs, checkpoints, or latest
        split: images to evaluate on
        samples: importance samples per image
        seed: of the samples; the same seed gives the same numbers
        batch_size: images decoded together; changes memory and speed, but no number
        chunk: samples per image decoded together; likewise
        probes: classify the images from their posterior means
        compile: compile the likelihood, which is a fifth faster after 10 s; changes rounding only
        class_samples: of a conditional model, importance samples per image and class to classify images; 0 does not
        accelerator: device
        data_root: directory of the data on this machine, if it differs from the run's

    Raises:
        UserError: if no run could be evaluated
    """
    paths = sorted({str(path) for run in runs for path in find_runs(run)})
    evaluated: dict[str, dict[str, Any]] = {}
    failed: list[UserError] = []
    for path in paths:
        try:
            evaluated[path] = evaluate_run(path, **options)
        except UserError as error:
            failed.append(error)
    if not evaluated:
        raise failed[0]
    if len(paths) == 1:
        content = evaluated[paths[0]]
        return f"{format_evaluation(content)}\n{evaluation_file(RunDirectory.locate(paths[0])[0], content)}"
    names = [name for name in TABLE if any(f"{c['split']}/{name}" in c for c in evaluated.values())]
    rows = [
        [path, *(content.get(f"{content['split']}/{name}") for name in names), content["remark"] + few(content)]
        for path, content in evaluated.items()
    ]
    formats = [".3f" if name == "bits_per_dim" else ".2f" for name in names]
    table = tabulate(rows, ["run", *names, ""], floatfmt=["", *formats, ""])
    notes = [FEW_SAMPLES] if any(map(few, evaluated.values())) else []
    return "\n".join([table, *notes, *(f"left out: {error}" for error in failed)])


def few(content: dict[str, Any]) -> str:
    """Return the mark `*` for an evaluation whose importance weights are carried by a few samples; otherwise ""."""
    return "*" if content.get(f"{content.get('split')}/ess", FEW) < FEW else ""


def evaluation_file(run: RunDirectory, content: dict[str, Any]) -> Path:
    """Return the path of an evaluation with these settings; a .csv and a .png file are beside it."""
    return run.evaluations / "{split}_{checkpoint}_k{samples}_seed{seed}.json".format(**content)


def write_evaluation(run: RunDirectory, content: dict[str, Any], values: Tensor, curve: Figure) -> dict[str, Any]:
    """Write `content` to its `evaluation_file`, and return it.

    The CSV file has `values` `[images, 2]`, the log likelihood of each image and its standard error. evaluation.json,
    evaluation.csv and figures/nll_curve.png are written too for the best checkpoint on the test set, unless they have
    more samples. Earlier results of the file that `content` lacks, such as probes, are kept.
    """
    file = evaluation_file(run, content)
    file.parent.mkdir(exist_ok=True)
    content = (read_dict(file) if file.exists() else {}) | content
    write_values(file.with_suffix(".csv"), values)
    write_json(file, content)
    figures.save(curve, file.with_suffix(".png"))
    # A run that is still trained will have another best checkpoint; its name here is best_unfinished.
    if (content["split"], content["checkpoint"]) == ("test", run.best_checkpoint.stem):
        current = read_dict(run.evaluation_file)["samples"] if run.evaluation_file.exists() else 0
        if content["samples"] >= current:
            write_values(run.evaluation_values, values)
            write_json(run.evaluation_file, content)
            figures.save(curve, run.figures / "nll_curve.png")
    return content


def write_values(path: Path, values: Tensor) -> None:
    """Write `values` `[images, 2]`, in nats, as CSV with one row per image in the order of the data."""
    with atomic_write(path) as partial:
        np.savetxt(partial, values.cpu().numpy(), "%.6f", ",", header="log_likelihood,stderr", comments="")


def format_evaluation(content: dict[str, Any]) -> str:
    """Return an evaluation as text: a heading, and one result per line."""
    split, warning = content["split"], content["remark"]
    heading = f"{split} set, {content['protocol']}, {content['samples']} samples"
    lines = [heading + (f"; {warning}" if warning else "")]
    bits = content.get(f"{split}/bits_per_dim", 0.0) / content[f"{split}/nll"]  # per nat
    for key, value in content.items():
        name = key.removeprefix(f"{split}/")
        if name == key or isinstance(value, dict):
            continue
        if isinstance(value, float):
            label = f"{name} (cross-entropy)" if warning and name in ("nll", "elbo", "reconstruction") else name
            beside = f" nats, {bits * value:8.4f} bits per dimension" if bits and name in IN_NATS else ""
            lines.append(f"  {label:32} {value:10.4f}{beside}")
        elif isinstance(value, int):
            lines.append(f"  {name:32} {value:10d}")
        elif value is None:
            lines.append(f"  {name:32} not available for this prior and posterior")
        else:
            lines.append(f"  {name:32} {' '.join(f'{v:.2f}' for v in value[:12])}{' …' if len(value) > 12 else ''}")
    return "\n".join([*lines, *([FEW_SAMPLES] if few(content) else [])])


def curve_points(samples: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, … up to `samples`, which is the last."""
    points = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return [*(k for k in points if k < samples), samples]
