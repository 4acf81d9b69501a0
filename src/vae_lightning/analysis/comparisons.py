"""Compare configurations image by image: the mean difference in log likelihood, with paired errors and intervals.

Two models mostly agree on which images are hard. The difference of an image therefore varies much less than its log
likelihood, and its mean over the test set has a smaller error than the two means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from scipy.special import stdtrit
from tabulate import tabulate
from torch import Tensor

from vae_lightning import figures
from vae_lightning.analysis.reports import Result, find_results, make_table
from vae_lightning.config import UserError
from vae_lightning.files import FileError, read_dict, staging_directory
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import open_run

CONDITIONS = ("quantity", "images", "images_sha256")  # keys of an evaluation that must agree


class Estimate(NamedTuple):
    """A mean in nats per image, with its standard error and its 95 % interval."""

    mean: float
    stderr: float
    low: float
    high: float


@dataclass
class Evaluation:
    """Log likelihoods `[images]` of a run and their standard errors, in nats, and the content of their JSON file."""

    run: RunDirectory
    content: dict[str, Any]
    log_likelihood: Tensor
    stderr: Tensor


@dataclass
class Side:
    """The runs of one configuration, which differ in their seeds."""

    label: str
    evaluations: list[Evaluation]

    @property
    def log_likelihood(self) -> Tensor:
        """`[runs, images]`, in nats."""
        return torch.stack([evaluation.log_likelihood for evaluation in self.evaluations])

    @property
    def bias(self) -> float:
        """How much lower the mean estimate is than the log likelihood, in nats per image; NaN for one sample."""
        return torch.stack([evaluation.stderr for evaluation in self.evaluations]).square().mean().item() / 2


def estimate(mean: float, parts: Sequence[tuple[float, int]]) -> Estimate:
    """Return `mean` with the interval of Student's t, given the independent parts of its variance.

    Each part is (variance, degrees of freedom); those of the sum are by Welch and Satterthwaite.
    """
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / n for part, n in parts) if variance else 1.0
    stderr = math.sqrt(variance)
    half = float(stdtrit(freedom, 0.975)) * stderr
    return Estimate(mean, stderr, mean - half, mean + half)


def paired_difference(ours: Tensor, baseline: Tensor) -> tuple[Estimate, Estimate | None]:
    """Estimate the mean of `ours` − `baseline`, both `[runs, images]` in nats, for the same images.

    The first estimate is of these runs: its error is that of a mean over images of the paired differences. The second
    is of the configurations: it adds the variance over seeds of both sides. None if a side has a single run.
    """
    difference = ours.mean(dim=0) - baseline.mean(dim=0)
    mean = difference.mean().item()
    parts = [variance_of_mean(difference)]
    of_runs = estimate(mean, parts)
    if min(len(ours), len(baseline)) < 2:
        return of_runs, None
    return of_runs, estimate(mean, [*parts, *(variance_of_mean(side.mean(dim=1)) for side in (ours, baseline))])


def compare(ours: dict[str, Any] | Tensor, baseline: dict[str, Any] | Tensor) -> Estimate:
    """Estimate the mean of `ours` − `baseline` in log likelihood, in nats per image, with its 95 % interval.

    Both are results of `evaluate`, or log likelihoods `[images]` of the same images in the same order. The error is
    that of a mean over images of the paired differences, so other seeds of training may differ by more. Raises
    UserError if the two cannot be compared.
    """
    if isinstance(ours, dict) and isinstance(baseline, dict):
        for key, advice in (("samples", "the same number"), ("images_sha256", "the same loader, without shuffling")):
            if ours[key] != baseline[key]:
                raise UserError(f"{key}: {ours[key]} and {baseline[key]}; evaluate both models with {advice}")
    pair = [values["log_likelihood"] if isinstance(values, dict) else values for values in (ours, baseline)]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape or len(pair[0]) < 2:
        shapes = " and ".join(str(tuple(values.shape)) for values in pair)
        raise UserError(f"log likelihoods of shape {shapes}: should be two of the same shape [images], at least 2")
    return paired_difference(*(values.double().cpu().unsqueeze(0) for values in pair))[0]


def variance_of_mean(values: Tensor) -> tuple[float, int]:
    """Return the variance of the mean of independent values `[n]`, and its degrees of freedom, n − 1."""
    return values.var().item() / len(values), len(values) - 1


def find_sides(paths: Iterable[Path]) -> tuple[list[tuple[str, list[Result]]], list[str]]:
    """Return the configurations in and below each path, each with a label and its runs; and notes on runs left out.

    The configuration of the first run of a path is its first. Raises RunError for a path without a finished run.
    """
    sides: list[tuple[str, list[Result]]] = []
    notes: list[str] = []
    for path in paths:
        results, left_out = find_results([path])
        table = make_table("", results, ())
        notes += left_out + table.repeated
        for row in table.rows:
            row.results.sort(key=lambda result: str(result.run))
        for row in sorted(table.rows, key=lambda row: str(row.results[0].run)):
            sides.append((f"{path}: {row.names}" if row.settings else str(path), row.results))
    return sides, notes


def evaluations(run: RunDirectory, split: str) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Return the evaluations of the best checkpoint that have values of each image, by their number of samples."""
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for file in (run.evaluation_file, *sorted(run.evaluations.glob("*.json"))):
        if file.with_suffix(".csv").exists():
            content = read_dict(file)
            if content["checkpoint"] == run.best_checkpoint.stem and f"{split}/nll" in content:
                found.setdefault(content["samples"], (file, content))
    return found


def read_evaluations(runs: Sequence[RunDirectory], split: str) -> list[Evaluation]:
    """Read an evaluation of each run: those with the largest number of samples that all runs have in common.

    Raises RunError if there is none, with the commands that evaluate the runs, or if the evaluations are of different
    conditions; FileError for a damaged file.
    """
    found = {run.path: evaluations(run, split) for run in runs}
    common = set.intersection(*(set(of_run) for of_run in found.values()))
    if not common:
        samples = max((k for of_run in found.values() for k in of_run), default=None)
        missing = [path for path, of_run in found.items() if samples not in of_run]
        options = (" --split val" if split == "val" else "") + (f" --samples {samples}" if samples else "")
        number = f" with {samples} importance samples, as for the others" if samples else ""
        raise RunError(
            f"{', '.join(map(str, missing))}: no log likelihoods of each {split} image{number}; run "
            f"vae evaluate {' '.join(map(str, missing))}{options}"
        )
    chosen = [(run, *found[run.path][max(common)]) for run in runs]
    first, _, reference = chosen[0]
    for run, _, content in chosen:
        for key in CONDITIONS:
            if (ours := content[key]) != (theirs := reference[key]):
                raise RunError(f"{run}: {key}={ours}, but {first} has {key}={theirs}; the two cannot be compared")
    return [Evaluation(run, content, *read_values(file, content, split)) for run, file, content in chosen]


def read_values(file: Path, content: dict[str, Any], split: str) -> tuple[Tensor, Tensor]:
    """Read log likelihoods and standard errors `[images]` from the CSV file that belongs to an evaluation.

    Raises FileError if it is damaged, or of another evaluation than `content`, which is in `file`: a killed process may
    have written one of the two only.
    """
    images, nll, table = content["images"], content[f"{split}/nll"], file.with_suffix(".csv")
    try:
        log_likelihood, stderr = torch.from_numpy(np.loadtxt(table, delimiter=",", skiprows=1, ndmin=2)).T
        if not len(stderr) == images > 1:
            raise ValueError(f"should have {images} rows, at least 2, and has {len(stderr)}")
        if not math.isclose(mean := -log_likelihood.mean().item(), nll, rel_tol=1e-6, abs_tol=1e-5):
            raise ValueError(f"its mean nll is {mean:.6f}, but that in {file.name} is {nll:.6f}")
    except ValueError as error:
        raise FileError(f"{table}: cannot be used ({error}); evaluate the run again") from error
    return log_likelihood, stderr


def compare_runs(
    runs: Annotated[Sequence[str], Field(min_length=1)],
    *,
    split: Literal["test", "val"] = "test",
    to: str = "outputs/report",
) -> str:
    """Compare evaluated runs with a baseline, image by image: the difference in log likelihood and its 95 % interval.

    `vae evaluate` must have evaluated each run, with the same number of samples; docs/numbers.md explains the numbers.
    Writes comparison.md and a figure per comparison to the directory `to`; returns the text to print.

        vae compare outputs/sweeps/normal outputs/sweeps/flow    # the first is the baseline; directories of seeds
        vae compare outputs/sweeps/priors                        # the baseline is that of the first run in it

    Args:
        runs: the baseline, then others: run directories, or directories that contain the seeds of a run
        split: images of the evaluations
        to: directory for the files

    Raises:
        UserError: for runs that cannot be compared
    """
    found, notes = find_sides(map(Path, runs))
    if len(found) < 2:
        raise RunError(f"{', '.join(runs)}: one configuration only; name the baseline first, then the runs to compare")
    every = [result for _, results in found for result in results]
    protocols = {result.protocol.rpartition(", ")[0]: result.run for result in reversed(every)}  # without likelihoods
    if len(protocols) > 1:
        (protocol, run), (other, second) = list(protocols.items())[:2]
        raise RunError(f"{run}: {protocol}, but {second}: {other}; the two cannot be compared")
    read = iter(read_evaluations([result.run for result in every], split))
    baseline, *others = [Side(label, [next(read) for _ in results]) for label, results in found]
    content = baseline.evaluations[0].content
    heading = (
        f"{next(iter(protocols))}: {content['quantity']} of {content['images']} {split} images, "
        f"{content['samples']} importance samples, nats per image"
    )
    rows = [side_cells(baseline, split)]
    drawn: list[Figure] = []
    for side in others:
        rows.append(side_cells(side, split) | difference_cells(side, baseline))
        notes += remarks(side, baseline)
    try:
        images = evaluated_images(baseline.evaluations[0], split)
        for side in others:
            difference = side.log_likelihood.mean(dim=0) - baseline.log_likelihood.mean(dim=0)
            drawn.append(figures.differences(difference, images, f"{side.label}\nminus {baseline.label}"))
    except UserError as error:
        notes.append(f"no figures: {error}")

    destination = Path(to)
    markdown_file = destination / "comparison.md"
    with staging_directory(destination) as scratch:
        markdown = f"## {heading}\n\n{as_table(rows, 'pipe')}\n"
        for number, figure in enumerate(drawn, start=1):
            figures.save(figure, scratch / f"comparison_{number}.png")
            markdown += f"\n![differences](comparison_{number}.png)\n"
        lines = [markdown, *(f"- {note}" for note in dict.fromkeys(notes))]
        (scratch / markdown_file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join([heading, as_table(rows, "simple"), *dict.fromkeys(notes), str(destination)])


def side_cells(side: Side, split: str) -> dict[str, str]:
    """Return the cells of a row: label, number of runs, mean ± standard deviation over seeds, in nats and in bits."""
    bits = [e.content[f"{split}/bits_per_dim"] for e in side.evaluations if f"{split}/bits_per_dim" in e.content]
    of_pixels = {"bits_per_dim": f"{np.mean(bits):.3f}"} if bits else {}
    means = side.log_likelihood.mean(dim=1)
    spread = f" ± {means.std().item():.2f}" if len(means) > 1 else ""
    return {"": side.label, "runs": str(len(means)), "mean": f"{means.mean().item():.2f}{spread}"} | of_pixels


def difference_cells(side: Side, baseline: Side) -> dict[str, str]:
    """Return the further cells of a row: the paired difference to the baseline, and the share of images that gained."""
    of_runs, of_configurations = paired_difference(side.log_likelihood, baseline.log_likelihood)
    gained = (side.log_likelihood.mean(dim=0) > baseline.log_likelihood.mean(dim=0)).double()
    return {
        "difference": f"{of_runs.mean:+.3f}",
        "stderr": f"{of_runs.stderr:.3f}",
        "95 % interval": interval(of_runs),
        "95 % over seeds": interval(of_configurations) if of_configurations else "",
        "gained": f"{100 * gained.mean().item():.0f} %",
    }


def interval(estimate: Estimate) -> str:
    return f"{estimate.low:+.3f} to {estimate.high:+.3f}"


def remarks(side: Side, baseline: Side) -> list[str]:
    """Return what a reader must know to interpret a difference: missing seeds, and the bias of importance sampling."""
    found = []
    if min(len(side.evaluations), len(baseline.evaluations)) < 2:
        found.append("one seed on a side: the interval is of these runs, and other seeds may differ by more")
    of_runs, _ = paired_difference(side.log_likelihood, baseline.log_likelihood)
    if math.isnan(side.bias + baseline.bias):
        found.append("one importance sample: estimates are low by an unknown amount; evaluate both with more samples")
    elif abs(side.bias - baseline.bias) > of_runs.stderr:
        found.append(
            f"too few importance samples: estimates are low by about {baseline.bias:.3f} ({baseline.label}) and "
            f"{side.bias:.3f} ({side.label}); evaluate both with more samples"
        )
    return found


def evaluated_images(evaluation: Evaluation, split: str) -> Tensor:
    """Return the images of an evaluation, as bytes. Raises UserError if they are missing or not the same."""
    data = open_run(evaluation.run, "cpu").data
    if data.checksums()[split] != evaluation.content["images_sha256"]:
        raise RunError(f"{evaluation.run}: its {split} images on this machine are not the evaluated ones")
    images: Tensor = getattr(data, f"{split}_images")
    return images


def as_table(rows: Sequence[dict[str, str]], style: str) -> str:
    align = ["left"] + ["right"] * (len(rows[-1]) - 1)
    return tabulate(rows, "keys", tablefmt=style, disable_numparse=True, colalign=align)
