"""Many runs in one table: where their configurations differ, and what came out, mean ± standard deviation over seeds.

Runs of different data, pixel protocols or likelihoods stand in tables of their own: their numbers do not compare.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal, get_args

import torch
from matplotlib.figure import Figure
from pydantic import Field
from tabulate import tabulate

from vae_lightning import figures
from vae_lightning.analysis.generation import first_of_each_digit, select_test_images
from vae_lightning.config import ConfigError, UserError, did_you_mean, flatten
from vae_lightning.data.pixels import Pixels
from vae_lightning.files import read_json, staging_directory
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import load_run, open_run

EVALUATED = ("nll", "active_units", "mutual_information", "knn_accuracy", "linear_accuracy")  # of evaluation.json
NO_DIFFERENCE = ("seed", "name", "figures.", "data.root", "trainer.enable_", "trainer.accelerator", "trainer.devices")
DRAWN = 10  # runs in one picture, as many as there are colours


@dataclass
class Result:
    """A finished run: its configuration, flat, with dotted keys, and its metrics."""

    run: RunDirectory
    config: dict[str, Any]
    metrics: dict[str, float]
    protocol: str

    @property
    def seed(self) -> Any:
        return self.config.get("seed")


@dataclass
class Row:
    """Runs that differ in their seed alone."""

    settings: dict[str, Any]  # the configuration keys that differ between rows
    results: list[Result]

    @property
    def label(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items()) or "all runs"

    def values(self, metric: str) -> list[float]:
        return [result.metrics[metric] for result in self.results if metric in result.metrics]


@dataclass
class Table:
    """Runs whose numbers may be compared."""

    protocol: str
    keys: list[str]
    metrics: list[str]
    rows: list[Row]
    repeated: list[Path] = field(default_factory=list)  # older runs of the very same configuration and seed


# What headings say of a run; a file from elsewhere may hold anything.
PLAIN = {"data": r"[\w .-]{1,60}", "pixels": "|".join(get_args(Pixels))}


def find_results(paths: Iterable[Path]) -> tuple[list[Result], dict[Path, str]]:
    """The finished runs in and below `paths`; and the directories that hold no whole run, with the reason.

    Raises RunError for a path that does not exist.
    """
    results: dict[Path, Result] = {}
    broken: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such directory")
        for folder, below, _ in os.walk(path):
            run = RunDirectory(folder)
            if not run.config_file.is_file():
                continue
            below.clear()  # a run holds no other runs
            try:
                results[run.path.resolve()] = read_result(run)
            except UserError as error:
                broken[Path(folder)] = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    return [results[directory] for directory in sorted(results)], broken


def read_result(run: RunDirectory) -> Result:
    """Configuration and metrics of a run. Raises RunError where one of them is missing."""
    config = run.read_config()
    if not run.metrics_file.exists():
        raise RunError(f"{run}: not finished, it has no {run.metrics_file.name}")
    measured = read_json(run.metrics_file)
    if run.state != "finished":
        raise RunError(
            f"{run}: not finished, its {run.metrics_file.name} is of the first {measured.get('epochs')} epochs"
        )
    for key, allowed in PLAIN.items():
        if not re.fullmatch(allowed, str(measured.get(key))):
            raise RunError(f"{run}: {run.metrics_file.name} says {key}={str(measured.get(key))[:40]!r}")
    metrics = {key: value for key, value in measured.items() if re.fullmatch(r"test/\w+", key) and is_finite(value)}
    if run.evaluation_file.exists():
        evaluated = read_json(run.evaluation_file)
        for key in ("data", "pixels"):
            if evaluated.get(key) != measured.get(key):
                raise RunError(f"{run}: {run.metrics_file.name} and {run.evaluation_file.name} are of different {key}")
        for key, value in evaluated.items():
            name = key.partition("/")[2]
            if name in EVALUATED and is_finite(value):
                metrics[f"{key} (k={evaluated.get('samples')})" if name == "nll" else key] = float(value)
    model = config["model"]
    likelihood = model.get("likelihood")
    kind = likelihood if isinstance(likelihood, dict) else model
    protocol = f"{measured.get('data')}, {measured.get('pixels')} pixels, {short(kind.get('_target_'))}"
    return Result(run, flatten(config), metrics, protocol)


def tables(results: Sequence[Result], metrics: Sequence[str] = ()) -> list[Table]:
    """A table for each protocol, of all metrics or those named. Raises ConfigError for a metric that no run has."""
    known = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    for metric in metrics:
        if metric not in known:
            raise ConfigError(
                f"metrics={metric}: no run has it{did_you_mean(metric, known)} There are: {', '.join(known)}"
            )
    return [
        table(protocol, [result for result in results if result.protocol == protocol], metrics)
        for protocol in sorted({result.protocol for result in results})
    ]


def table(protocol: str, results: Sequence[Result], metrics: Sequence[str]) -> Table:
    """Runs of one protocol in rows, those that differ in the seed alone in one; sorted by what differs."""
    keys = differing_keys([result.config for result in results])
    rows: dict[str, Row] = {}
    repeated = []
    for result in sorted(results, key=lambda result: result.run.metrics_file.stat().st_mtime, reverse=True):
        settings = {key.removesuffix("._target_"): shown(key, result.config.get(key)) for key in keys}
        row = rows.setdefault(str(settings), Row(settings, []))
        if any(other.seed == result.seed for other in row.results):
            repeated.append(result.run.path)
        else:
            row.results.append(result)
    have = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    chosen = [metric for metric in metrics or have if metric in have]
    if not metrics and all(r.metrics.get("test/elbo") == -r.metrics.get("test/loss", 0.0) for r in results):
        chosen = [metric for metric in chosen if metric != "test/elbo"]  # the loss with its sign turned
    names = [key.removesuffix("._target_") for key in keys]
    ordered = sorted(rows.values(), key=lambda row: [sortable(row.settings[name]) for name in names])
    return Table(protocol, names, chosen, ordered, repeated)


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The flat keys in which configurations differ, those apart that cannot change a number.

    Where a `_target_` differs, so do the arguments that its classes take: an argument counts only if it differs between
    configurations with the same class.
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))
    found = []
    for key in keys:
        if key.startswith(NO_DIFFERENCE):
            continue
        parents = [f"{key[:i]}._target_" for i, character in enumerate(key) if character == "."]
        kinds: dict[tuple[Any, ...], set[str]] = {}
        for config in configs:
            if key in config:
                kind = tuple(config.get(parent) for parent in parents if parent != key)
                kinds.setdefault(kind, set()).add(repr(config[key]))
        if any(len(values) > 1 for values in kinds.values()):
            found.append(key)
    return found


def as_rows(table: Table) -> list[list[str]]:
    """The cells of a table as text, its heading first: settings, number of seeds, and mean ± standard deviation."""

    def cell(metric: str, values: list[float]) -> str:
        if not values:
            return ""
        digits = 2 if abs(mean(values)) >= 1 else 4
        if metric.endswith("active_units"):
            digits = 1 if len(values) > 1 else 0  # a count
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    heading = [*map(plain_text, table.keys), "runs", *table.metrics]
    return [heading] + [
        [*map(str, row.settings.values()), str(len(row.results)), *(cell(m, row.values(m)) for m in table.metrics)]
        for row in table.rows
    ]


STYLES = {  # tabulate's name, and how a heading is written
    "terminal": ("simple", "{}"),
    "markdown": ("pipe", "## {}\n"),
    "latex": ("latex_booktabs", "% {}; needs \\usepackage{{booktabs}}"),
}


def as_text(tables: Sequence[Table], style: str) -> str:
    """Tables under their headings, in one of STYLES."""
    kind, head = STYLES[style]
    parts = []
    for table in tables:
        heading, *rows = as_rows(table)
        numbers = [all(is_number(row.settings[key]) for row in table.rows) for key in table.keys]
        align = ["right" if number else "left" for number in numbers] + ["right"] * (1 + len(table.metrics))
        text = tabulate(rows, heading, tablefmt=kind, disable_numparse=True, colalign=align)
        parts.append(f"{head.format(table.protocol)}\n{text}")
    return "\n\n".join(parts) + "\n"


def write_csv(tables: Sequence[Table], file: Path) -> None:
    """Every row of every table, with mean, standard deviation and number of runs of each metric apart."""
    keys = list(dict.fromkeys(key for table in tables for key in table.keys))
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["protocol", *keys, "runs", *(name for m in metrics for name in (m, f"{m} std"))])
        for table in tables:
            for row in table.rows:
                cells: list[Any] = []
                for metric in metrics:
                    values = row.values(metric) if metric in table.metrics else []
                    cells += [mean(values) if values else "", stdev(values) if len(values) > 1 else ""]
                writer.writerow([table.protocol, *(row.settings.get(k, "") for k in keys), len(row.results), *cells])


def plots(table: Table) -> dict[str, Figure]:
    """Pictures of a table by name: each metric against each swept number, learning curves, rate and distortion."""
    drawn: dict[str, Figure] = {}
    numeric = [key for key in table.keys if all(is_number(row.settings[key]) for row in table.rows)]
    for key in numeric:
        others = [other for other in table.keys if other != key]
        for metric in table.metrics[:4]:
            lines: dict[str, list[tuple[float, float, float]]] = {}
            for row in table.rows:
                values = row.values(metric)
                if values:
                    name = ", ".join(str(row.settings[other]) for other in others)
                    point = (row.settings[key], mean(values), stdev(values) if len(values) > 1 else 0.0)
                    lines.setdefault(name, []).append(point)
            if lines and len(lines) <= DRAWN:
                drawn[f"{re.sub('[^a-z0-9=.]+', '_', metric)}_against_{key}"] = figures.against(lines, key, metric)
    best = best_rows(table)
    curves = {row.label: curve for row in best if (curve := learning_curve(row.results[0].run))}
    if curves:
        drawn["learning_curves"] = figures.learning_curves(curves)
    points = {
        row.label: (mean(row.values("test/kl")), mean(row.values("test/reconstruction")))
        for row in best
        if row.values("test/kl") and row.values("test/reconstruction")
    }
    if len(points) > 1:
        drawn["rate_distortion"] = figures.rate_distortion(points)
    return drawn


def best_rows(table: Table) -> list[Row]:
    """As many rows as a picture holds, of lowest test/loss if there are more, in the order of the table."""
    losses = {id(row): mean(row.values("test/loss") or [float("inf")]) for row in table.rows}
    kept = sorted(losses.values())[:DRAWN][-1:]
    return [row for row in table.rows if losses[id(row)] <= kept[0]][:DRAWN]


def learning_curve(run: RunDirectory) -> tuple[str, list[tuple[int, float]]] | None:
    """(metric, points) of a run's history.csv: val/loss an epoch, or train/loss where nothing was held out."""
    try:
        with run.history_file.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for metric in ("val/loss", "train/loss"):
            points = [(int(row["epoch"]), float(row[metric])) for row in rows if row.get(metric)]
            if points and all(abs(value) < 1e9 for _, value in points):
                return metric, points
    except (OSError, KeyError, ValueError, TypeError, csv.Error):
        pass  # a picture less; the table stands
    return None


@torch.inference_mode()
def reconstructions(table: Table, trust: Iterable[str] = (), digits: int = 10) -> Figure | None:
    """The same test digits as each run of a table reconstructs them, originals on top; None where nothing differs."""
    rows = best_rows(table)
    if len(rows) < 2:
        return None
    run = open_run(rows[0].results[0].run, "cpu", trust)
    x, labels = select_test_images(run, first_of_each_digit(run)[:digits])
    pictures = [load_run(row.results[0].run, trust).reconstruct(x, labels) for row in rows]
    return figures.labelled_rows(torch.stack([x, *pictures]), ["test images", *(row.label for row in rows)])


def report(
    runs: Annotated[Sequence[str], Field(min_length=1)],
    metrics: Sequence[str] = (),
    style: Literal["terminal", "markdown", "csv", "latex"] = "terminal",
    to: str = "outputs/report",
    trust: Sequence[str] = (),
) -> str:
    """Write report.md, .csv, .tex and pictures of all runs in and below `runs` into `to`; return the text to print.

    Raises UserError where there is no finished run, or a metric that none has.
    """
    destination = Path(to)
    results, broken = find_results(map(Path, runs))
    if not results:
        reason = next((f"; {directory}: {reason}" for directory, reason in broken.items()), "")
        raise RunError(f"{', '.join(runs)}: no finished run is there{reason}")
    found = tables(results, metrics)
    notes = [f"left out: {plain_text(directory)}: {plain_text(reason)}" for directory, reason in broken.items()]
    repeated = [directory for table in found for directory in table.repeated]
    notes += [f"left out: {directory}: a later run has the same configuration and seed" for directory in repeated]
    markdown = as_text(found, "markdown")
    stale = pictures_of(destination / "report.md")
    with staging_directory(destination) as scratch:
        (scratch / "report.tex").write_text(as_text(found, "latex"), encoding="utf-8")
        write_csv(found, scratch / "report.csv")
        for number, table in enumerate(found, start=1):
            drawn = plots(table)
            try:
                picture = reconstructions(table, trust)
                drawn |= {"reconstructions": picture} if picture else {}
            except UserError as error:
                notes.append(f"no picture of reconstructions: {plain_text(error)}")
            for name, figure in drawn.items():
                file = f"{number}_{name}.png"
                figures.save(figure, scratch / file)
                markdown += f"\n![{table.protocol}: {name}]({file})\n"
        (scratch / "report.md").write_text(
            "\n".join([markdown, *(f"- {note}" for note in notes)]) + "\n", encoding="utf-8"
        )
        stale = [old for old in stale if not (scratch / old.name).exists()]
        text = (scratch / "report.csv").read_text(encoding="utf-8") if style == "csv" else as_text(found, style)
    for old in stale:
        old.unlink(missing_ok=True)
    return "\n".join([text.rstrip(), *notes, str(destination)])


def pictures_of(markdown: Path) -> list[Path]:
    """The pictures that an earlier report in the same place shows."""
    text = markdown.read_text(encoding="utf-8") if markdown.exists() else ""
    return [markdown.parent / name for name in re.findall(r"\]\(([^/()]+\.png)\)", text)]


def shown(key: str, value: Any) -> Any:
    """A setting in a table: a number, or text on one line that no reader of Markdown or LaTeX takes for a command."""
    value = short(value) if key.endswith("_target_") else "" if value is None else value
    return value if is_number(value) else plain_text(value)


def plain_text(text: object) -> str:
    """Text from a run's files without what Markdown, HTML, LaTeX or a terminal would act on, and not too long."""
    text = re.sub(r"[^\w\s.,:;=+()\[\]{}'/-]", "?", " ".join(str(text).split()))[:200]
    return text.replace("](", "] (").replace("://", ": //")


def is_finite(value: object) -> bool:
    return is_number(value) and abs(value) < float("inf")  # type: ignore[arg-type]


def short(target: object) -> str:
    """A class by its own name."""
    return str(target).rpartition(".")[2]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sortable(value: Any) -> tuple[bool, Any]:
    """Numbers in their order, before all else as text."""
    return (False, value) if is_number(value) else (True, str(value))
