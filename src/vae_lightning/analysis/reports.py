"""Compare runs in tables: where their configurations differ, and their metrics as mean ± standard deviation over seeds.

Runs of different data, pixel protocols or likelihoods are in separate tables, since their numbers cannot be compared.
All likelihoods of 8-bit pixels are in one.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Annotated, Any, Literal, TypeGuard

import torch
from matplotlib.figure import Figure
from pydantic import Field
from tabulate import tabulate

from vae_lightning import figures
from vae_lightning.analysis.evaluation import FEW_SAMPLES, few
from vae_lightning.analysis.generation import first_of_each_digit, select_test_images
from vae_lightning.config import ConfigError, UserError, did_you_mean, flatten
from vae_lightning.data.pixels import described
from vae_lightning.files import read_dict, staging_directory
from vae_lightning.runs.directory import RunDirectory, RunError, find_runs
from vae_lightning.runs.loading import load_run, open_run

EVALUATION_METRICS = (
    *("nll", "bits_per_dim", "active_units", "mutual_information", "knn_accuracy", "linear_accuracy"),
    *("class_accuracy", "marginal_nll"),
)
# The number of importance samples that a metric depends on.
SAMPLES = dict.fromkeys(("nll", "bits_per_dim"), "samples")
SAMPLES |= dict.fromkeys(("marginal_nll", "class_accuracy"), "class_samples")
IGNORED_KEYS = (
    *("seed", "name", "figures.", "logger.", "data.root", "test", "trainer.checkpoint_every"),
    *("trainer.enable_", "trainer.accelerator", "trainer.devices", "trainer.fast_loop"),
)
MAX_RUNS_IN_FIGURE = 10  # figures have ten colours
LONGEST_LABEL = 100  # characters of a row's settings, with their full keys


@dataclass
class Result:
    """A finished run: its configuration, flat, with dotted keys, and its metrics."""

    run: RunDirectory
    config: dict[str, Any]
    metrics: dict[str, float]
    protocol: str
    few: str = ""  # "*" if a few importance samples carry its nll


@dataclass
class Row:
    """Runs that differ only in their seed."""

    settings: dict[str, Any]  # the configuration keys that differ between rows
    results: list[Result]
    label: str = "all runs"  # in figures

    @property
    def names(self) -> str:
        """The settings with the last part of their keys: "latent_dim 20, prior VampPrior"."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items())

    def values(self, metric: str) -> list[float]:
        return [result.metrics[metric] for result in self.results if metric in result.metrics]

    def statistics(self, metric: str) -> tuple[float | None, float | None]:
        """Mean and standard deviation over seeds. The mean needs one value, the deviation two; else they are None."""
        values = self.values(metric)
        return mean(values) if values else None, stdev(values) if len(values) > 1 else None


@dataclass
class Table:
    """Runs of the same protocol, whose numbers can be compared."""

    protocol: str
    keys: list[str]
    metrics: list[str]
    rows: list[Row]
    repeated: list[str]  # notes on older runs with the same configuration and seed

    @property
    def numeric_keys(self) -> list[str]:
        return [key for key in self.keys if all(is_number(row.settings[key]) for row in self.rows)]


def find_results(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """Return the finished runs in and below `paths`, and a note on each other run directory, with the reason.

    Raises RunError for a path without runs, and if none is finished.
    """
    results: dict[Path, Result] = {}
    notes: list[str] = []
    for run in (RunDirectory(found) for path in paths for found in find_runs(path)):
        try:
            results[run.path.resolve()] = read_result(run)
        except UserError as error:
            notes.append(f"left out: {error}")
    if not results:
        raise RunError("; ".join([f"{', '.join(map(str, paths))}: no finished run found", *notes[:1]]))
    return [results[directory] for directory in sorted(results)], list(dict.fromkeys(notes))


def read_result(run: RunDirectory) -> Result:
    """Read the configuration and metrics of a run. Raises RunError or FileError if they are missing or damaged."""
    config, file = run.read_config(), run.metrics_file.name
    if not run.metrics_file.exists():
        raise RunError(f"{run}: not finished, it has no {file}")
    measured = read_dict(run.metrics_file)
    if run.state != "finished":
        raise RunError(f"{run}: not finished, its {file} is of the first {measured.get('epochs')} epochs")
    metrics = {key: value for key, value in measured.items() if key.startswith("test/") and is_number(value)}
    evaluated = read_dict(run.evaluation_file) if run.evaluation_file.exists() else {}
    for key in ("data", "pixels") if evaluated else ():
        if evaluated.get(key) != measured.get(key):
            raise RunError(f"{run}: {file} and {run.evaluation_file.name} differ in {key}")
    for name in EVALUATION_METRICS:
        if is_number(value := evaluated.get(f"test/{name}")):
            count = SAMPLES.get(name)
            column = f"{name} (k={evaluated.get(count)})" if count else name
            metrics[f"test/{column}"] = float(value)
    model = config["model"]
    given = ", given the label" if model.get("conditional") else ""
    pixels = described(measured["pixels"], measured["image_shape"][0])
    eight_bit = "test/bits_per_dim" in measured
    likelihood = "8-bit likelihood" if eight_bit else class_name((model.get("likelihood") or model)["_target_"])
    protocol = f"{measured['data']}, {pixels} pixels{given}, {likelihood}"
    protocol += " tanh" if model.get("output") == "tanh" else ""  # pixels from -1 to 1: four times the squared error
    return Result(run, flatten(config), metrics, protocol, few(evaluated))


def tables(results: Sequence[Result], metrics: Sequence[str] = ()) -> list[Table]:
    """Return a table per protocol, with all metrics or the given ones. Raises ConfigError if no run has a metric."""
    known = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    for metric in metrics:
        if metric not in known:
            near = did_you_mean(metric, known)
            raise ConfigError(f"metrics={metric}: no run has it{near} Allowed: {', '.join(known)}")
    return [
        make_table(protocol, [result for result in results if result.protocol == protocol], metrics)
        for protocol in sorted({result.protocol for result in results})
    ]


def make_table(protocol: str, results: Sequence[Result], metrics: Sequence[str]) -> Table:
    """Return the table of the runs of one protocol, one row per configuration, sorted by the settings that differ."""
    keys = differing_keys([result.config for result in results])
    cells = {key: cell_values(key, [result.config.get(key) for result in results]) for key in keys}
    rows: dict[str, Row] = {}
    repeated = []
    for result in sorted(results, key=lambda result: result.run.metrics_file.stat().st_mtime, reverse=True):
        values = {key: comparable(result.config.get(key)) for key in keys}
        settings = {key.removesuffix("._target_"): cells[key][value] for key, value in values.items()}
        row = rows.setdefault(str(values), Row(settings, []))
        if any(other.config["seed"] == result.config["seed"] for other in row.results):
            repeated.append(f"left out: {result.run}: a later run has the same configuration and seed")
        else:
            row.results.append(result)
    known = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    if not metrics and all(r.metrics.get("test/elbo") == -r.metrics.get("test/loss", 0.0) for r in results):
        known.remove("test/elbo")  # the negative loss
    shown = [metric for metric in metrics or known if metric in known]
    # Numbers by value, before text.
    ordered = sorted(rows.values(), key=lambda row: [(not is_number(v), v) for v in row.settings.values()])
    for number, row in enumerate(ordered, start=1):
        if row.settings:
            row.label = row.names
        if any(len(str(other.settings)) > LONGEST_LABEL for other in ordered):
            row.label = f"row {number}"  # of the table: longer names leave a figure no room
    return Table(protocol, list(ordered[0].settings), shown, ordered, repeated)


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the flat keys in which configurations differ, without those that change no number.

    An argument of a class counts only if it differs between configurations with that class. Another class has other
    arguments, and its `_target_` differs already. A part that is null in one configuration lacks its `_target_` there.
    """
    found = []
    for key in dict.fromkeys(key for config in configs for key in config):
        if key.startswith(IGNORED_KEYS):
            continue
        parts = key.split(".")
        targets = [".".join([*parts[:depth], "_target_"]) for depth in range(1, len(parts))]
        values: dict[tuple[str, ...], set[str]] = {}  # by the classes that the key belongs to
        for config in configs:
            if key in config or parts[-1] == "_target_":
                classes = tuple(str(config.get(target)) for target in targets if target != key)
                values.setdefault(classes, set()).add(comparable(config.get(key)))
        if any(len(group) > 1 for group in values.values()):
            found.append(key)
    return found


STYLES = {  # tabulate's name, and the heading
    "terminal": ("simple", "{}"),
    "markdown": ("pipe", "## {}\n"),
    "latex": ("latex_booktabs", "% {}; needs \\usepackage{{booktabs}}"),
}


def as_text(tables: Sequence[Table], style: str) -> str:
    """Return tables under their headings, in one of STYLES: settings, number of runs, mean ± standard deviation."""
    kind, heading = STYLES[style]
    parts = []
    for table in tables:
        rows = [
            [*row.settings.values(), len(row.results), *(format_metric(row, metric) for metric in table.metrics)]
            for row in table.rows
        ]
        align = ["right" if key in table.numeric_keys else "left" for key in table.keys]
        align += ["right"] * (1 + len(table.metrics))
        heads = [*table.keys, "runs", *table.metrics]
        text = tabulate(rows, heads, tablefmt=kind, disable_numparse=True, colalign=align)
        parts.append(f"{heading.format(table.protocol)}\n{text}")
    return "\n\n".join(parts) + "\n"


def format_metric(row: Row, metric: str) -> str:
    average, deviation = row.statistics(metric)
    if average is None:
        return ""
    digits = 3 if "bits_per_dim" in metric else 2 if abs(average) >= 1 else 4
    if metric.endswith("active_units"):  # a count
        digits = 0 if deviation is None else 1
    sampled = metric.startswith(("test/nll", "test/bits_per_dim ("))
    mark = max((result.few for result in row.results), default="") if sampled else ""
    return f"{average:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}") + mark


def write_csv(tables: Sequence[Table], file: Path) -> None:
    """Write all rows of all tables, with the mean and the standard deviation of each metric in separate columns."""
    keys = list(dict.fromkeys(key for table in tables for key in table.keys))
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    columns = ["protocol", *keys, "runs", *(name for metric in metrics for name in (metric, f"{metric} std"))]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        for table in tables:
            for row in table.rows:
                cells = row.settings | {"protocol": table.protocol, "runs": len(row.results)}
                for metric in table.metrics:
                    cells[metric], cells[f"{metric} std"] = row.statistics(metric)
                writer.writerow(cells)


def plots(table: Table) -> dict[str, Figure]:
    """Return figures by name: metrics against each numeric setting, learning curves, distortion against rate."""
    drawn: dict[str, Figure] = {}
    terms = [metric.removeprefix("test/") for row in table.rows for result in row.results for metric in result.metrics]
    for key in table.numeric_keys:
        for metric in table.metrics[:4]:
            unit = figures.unit(metric.removeprefix("test/"), terms)
            lines: dict[str, list[tuple[float, Sequence[float]]]] = {}
            for row in table.rows:
                if values := row.values(metric):
                    name = ", ".join(str(value) for other, value in row.settings.items() if other != key)
                    lines.setdefault(name, []).append((row.settings[key], values))
            if lines and len(lines) <= MAX_RUNS_IN_FIGURE:
                name = re.sub("[^A-Za-z0-9._-]+", "_", f"{metric}_against_{key}")
                drawn[name] = figures.against(lines, key, ", ".join(filter(None, (metric, unit))))
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    points: dict[str, list[tuple[float, float]]] = {}
    shown = set()
    for row in best_rows(table):
        for result in row.results:
            if curve := learning_curve(result.run):
                shown.add(curve[0])
                curves.setdefault(row.label, []).append(curve[1])
            if {"test/kl", "test/reconstruction"} <= result.metrics.keys():
                point = result.metrics["test/kl"], result.metrics["test/reconstruction"]
                points.setdefault(row.label, []).append(point)
    if curves:
        ylabel = f"{' or '.join(sorted(shown))}, {figures.unit('loss', terms)}"
        drawn["learning_curves"] = figures.learning_curves(curves, ylabel)
    if len(points) > 1:
        drawn["rate_distortion"] = figures.rate_distortion(points)
    return drawn


def best_rows(table: Table) -> list[Row]:
    """Return the rows that one figure shows: those of lowest test/loss, in the order of the table."""
    losses = [mean(row.values("test/loss") or [math.inf]) for row in table.rows]
    best = sorted(range(len(losses)), key=losses.__getitem__)[:MAX_RUNS_IN_FIGURE]
    return [table.rows[index] for index in sorted(best)]


def learning_curve(run: RunDirectory) -> tuple[str, list[tuple[int, float]]] | None:
    """Return (metric, points) from history.csv: val/loss per epoch, or train/loss without a validation split.

    None for a run without either; values that are not finite are left out.
    """
    for metric in ("val/loss", "train/loss"):
        if points := [(int(row["epoch"]), row[metric]) for row in run.read_history() if metric in row]:
            return metric, points
    return None


@torch.inference_mode()
def reconstructions(table: Table) -> Figure | None:
    """Draw the same test digits as reconstructed by each run, below the originals. None for a table of one row."""
    rows = best_rows(table)
    if len(rows) < 2:
        return None
    run = open_run(rows[0].results[0].run, "cpu")
    x, labels = select_test_images(run, first_of_each_digit(run)[:10])
    drawn = [load_run(row.results[0].run).reconstruct(x, labels) for row in rows]
    return figures.labelled_rows(
        torch.stack([x, *drawn]), ["test images", *(figures.verbatim(fill(row.label, 24)) for row in rows)]
    )


def report_runs(
    runs: Annotated[Sequence[str], Field(min_length=1)],
    *,
    metrics: Sequence[str] = (),
    style: Literal["terminal", "markdown", "csv", "latex"] = "terminal",
    to: str = "outputs/report",
) -> str:
    """Compare many runs in one table and plots: the keys that differ, and mean ± standard deviation over seeds.

    Writes report.md, report.csv, report.tex and figures to the directory `to`; returns the text to print.

        vae report outputs/sweeps/2026-11-21_10-00-00-000000
        vae report outputs --metrics test/loss test/kl --style markdown

    Args:
        runs: run directories, directories that contain runs, or latest
        metrics: columns; default: all
        style: of the printed table
        to: directory for the files

    Raises:
        UserError: if there is no finished run, or no run has a metric
    """
    results, notes = find_results([Path(path) for path in runs])
    compared = tables(results, metrics)
    notes += [note for table in compared for note in table.repeated]
    if any(result.few for result in results):
        notes.append(FEW_SAMPLES)
    markdown = as_text(compared, "markdown")
    destination = Path(to)
    markdown_file, csv_file = destination / "report.md", destination / "report.csv"
    with staging_directory(destination) as scratch:
        (scratch / "report.tex").write_text(as_text(compared, "latex"), encoding="utf-8")
        write_csv(compared, scratch / csv_file.name)
        for number, table in enumerate(compared, start=1):
            drawn = plots(table)
            try:
                if figure := reconstructions(table):
                    drawn["reconstructions"] = figure
            except UserError as error:
                notes.append(f"no figure of reconstructions: {error}")
            for name, figure in drawn.items():
                file = f"{number}_{name}.png"
                figures.save(figure, scratch / file)
                markdown += f"\n![{table.protocol}: {name}]({file})\n"
        lines = [markdown, *(f"- {note}" for note in notes)]
        (scratch / markdown_file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = csv_file.read_text(encoding="utf-8") if style == "csv" else as_text(compared, style)
    return "\n".join([text.rstrip(), *notes, str(destination)])


def comparable(value: Any) -> str:
    """Return text that is equal for equal settings: 1 and 1.0 are, 1 and true are not."""
    return repr(float(value) if is_number(value) else value)


def cell_values(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the settings of a key as a table shows them, numbers or text, by `comparable` value.

    A class is shown without its module, unless the table has another class of the same name.
    """
    shown = {comparable(value): "null" if value is None else value for value in values}
    if key.endswith("_target_"):
        names = [class_name(target) for target in shown.values()]
        if len({*names}) == len(names):
            shown = dict(zip(shown, names, strict=True))
    return {value: cell if is_number(cell) else str(cell) for value, cell in shown.items()}


def class_name(target: object) -> str:
    return str(target).rpartition(".")[2]


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
