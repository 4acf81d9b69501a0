"""Train systems of papers that print log likelihoods, estimate them in the same way, and write docs/published.md.

    python benchmarks/published.py                              # all rows, one after the other
    python benchmarks/published.py --jobs 2                     # two at a time: fastest on two cores
    python benchmarks/published.py davidson_2 burda_vae         # only these rows
    python benchmarks/published.py --table                      # only write the tables, from docs/published.json

The runs are in outputs/published/, with one thread each, and their results in docs/published.json, from which the
tables are written. The same command resumes a run that was stopped, and does not repeat a finished one, so rows can be
made in any order. Training does not use the test set (`test=false`): a run reads it once, in its evaluation. Exits with
1 if a run failed, or if a row misses the value that it must reach.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from matplotlib.figure import Figure
from reproduce import ROOT, machine, write_between

from vae_lightning import figures
from vae_lightning.config import UserError
from vae_lightning.files import read_dict, write_json

RUNS = ROOT / "outputs" / "published"
PAGE, RESULTS = ROOT / "docs" / "published.md", ROOT / "docs" / "published.json"
START, END = "<!-- published: written by benchmarks/published.py -->", "<!-- end of published -->"  # around the tables
SAMPLES = 5_000  # importance samples per image
VALUES = ("test/nll", "test/nll_stderr", "test/kl", "test/reconstruction", "test/active_units", "data")


@dataclass(frozen=True)
class Row:
    """A system, and the −log p(x) that others print for it and that it must reach, in nats per image."""

    name: str
    words: str  # overrides of train.py
    printed: float | None = None
    reach: float | None = None
    seeds: tuple[int, ...] = (0,)
    needs_gpu: bool = False
    data: str = "MNIST"

    def directory(self, seed: int) -> Path:
        return RUNS / f"{self.name}_{seed}"

    @property
    def label(self) -> str:
        return f"{self.name} (GPU)" if self.needs_gpu else self.name

    @property
    def settings(self) -> dict[str, Any]:
        """What the file of the experiment sets, so that a recorded result is known to be of these settings."""
        experiment = self.words.split()[0].partition("=")[2]
        settings = yaml.safe_load((ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text())
        return {key: settings[key] for key in ("defaults", "model", "data", "trainer")}


GATED = "experiment=gated_40"
FASHION = "data._target_=fashion.DebianFashionMNIST data.name=FashionMNIST"  # benchmarks/fashion.py
ROWS = [
    *(
        Row(f"davidson_{d}", f"experiment=davidson model.latent_dim={d}", printed, printed, seeds)
        for d, printed, seeds in (
            (2, 135.7, (0,)),
            (5, 110.2, (0,)),
            (10, 93.8, (0, 1, 2)),
            (20, 88.9, (0,)),
            (40, 88.9, (0,)),
        )
    ),
    Row("burda_vae", "experiment=burda model.objective.kl=path", 86.76, 86.8),
    Row("burda_iwae_5", "experiment=burda model/objective=dreg", 85.54, 85.6),
    Row("gated_normal", f"{GATED} model.objective.kl=path", 84.45, 85.3),
    Row("gated_vamp", f"{GATED} model/prior=vamp", 82.43, 83.9),
    Row("gated_flow", f"{GATED} model/prior=flow", 82.09, 82.0, (0, 1, 2)),
    Row("gated_flow_flow", f"{GATED} model/prior=flow model/posterior=flow", 82.09, 81.6),
    Row("residual_iwae", "experiment=residual_iwae", None, 81.08, needs_gpu=True),
    Row("fashion_normal", f"{GATED} model.objective.kl=path {FASHION}", 228.70, data="FashionMNIST"),
    Row("fashion_vamp", f"{GATED} model/prior=vamp {FASHION}", 227.35, data="FashionMNIST"),
    Row("fashion_flow", f"{GATED} model/prior=flow {FASHION}", 226.75, data="FashionMNIST"),
]


def make(row: Row, seed: int) -> dict[str, Any]:
    """Train and evaluate one run, as far as it is not done, and return its result. Raises CalledProcessError."""
    directory, settings = row.directory(seed), row.settings
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    evaluated = directory / "evaluations" / f"test_best_k{SAMPLES}_seed0.json"
    RUNS.mkdir(parents=True, exist_ok=True)

    def run(*words: str) -> None:
        print(f"{row.name}, seed {seed}: {' '.join(words[:2])}", flush=True)
        with directory.with_suffix(".log").open("a") as log:
            command = [sys.executable, *words]
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)

    run("train.py", *row.words.split(), f"seed={seed}", "test=false", f"hydra.run.dir={directory}", "resume=auto")
    if not evaluated.exists():
        words = ("evaluate", str(directory), "--samples", str(SAMPLES), "--no-probes", "--compile")
        run("-m", "vae_lightning", *words)
    evaluation, metrics = read_dict(evaluated), read_dict(directory / "metrics.json")
    return {
        "words": row.words,
        "settings": settings,
        "machine": machine(read_dict(directory / "environment.json")),
        "latent_dim": metrics["latent_dim"],
        "epochs": metrics["epochs"],
        "minutes": metrics["seconds"] / 60,
    } | {key: evaluation[key] for key in VALUES}


def read_results() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the recorded result of each row and seed. Raises FileError."""
    return read_dict(RESULTS) if RESULTS.exists() else {}


@dataclass
class Result:
    """The results of a row, one for each seed."""

    row: Row
    runs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, row: Row, recorded: dict[str, dict[str, dict[str, Any]]]) -> Result:
        """Take the recorded results of a row, without those of earlier settings."""
        runs, wanted = recorded.get(row.name, {}), (row.words, row.settings)
        return cls(row, {seed: run for seed, run in runs.items() if (run["words"], run["settings"]) == wanted})

    def values(self, key: str) -> list[Any]:
        return [run[key] for run in self.runs.values()]

    def mean(self, key: str) -> float:
        return mean(self.values(key))

    @property
    def nll(self) -> float:
        return self.mean("test/nll") if self.runs else math.nan

    @property
    def missed(self) -> bool:
        return bool(self.runs) and self.row.reach is not None and self.nll > self.row.reach

    def line(self) -> str:
        """Return the row of the table."""
        row, runs = self.row, self.runs
        printed, reach = ("—" if value is None else f"{value:.2f}" for value in (row.printed, row.reach))
        head = f"| {row.label} | {printed} | {reach} |"
        if not runs:
            return f"{head} not run yet | | | | | | | | `{row.words}` |"
        bold = "**" if self.missed else ""
        spread = f", spread {stdev(self.values('test/nll')):.2f}" if len(runs) > 1 else ""
        rate, distortion = self.mean("test/kl"), self.mean("test/reconstruction")
        return (
            f"{head} {bold}{self.nll:.2f} ± {self.mean('test/nll_stderr'):.2f}{bold} | {len(runs)}{spread} "
            f"| {rate + distortion:.2f} | {rate:.2f} | {distortion:.2f} "
            f"| {self.mean('test/active_units'):.0f} of {self.values('latent_dim')[0]} "
            f"| {self.mean('epochs'):.0f} | {self.mean('minutes'):.0f} | `{row.words}` |"
        )


@figures.styled
def plot(results: list[Result]) -> Figure:
    """Plot −log p(x) against the minutes of training, one point per row, and each printed value as a line."""
    figure = Figure(figsize=(2 * figures.WIDTH, 4.4))
    axes = figure.subplots()
    points = [(result.mean("minutes"), result.nll) for result in results]
    longest = max(minutes for minutes, _ in points)
    printed: dict[float, list[str]] = {}
    for result, (x, y) in zip(results, points, strict=True):
        marker = "s" if result.row.needs_gpu else "o"
        axes.errorbar(x, y, result.mean("test/nll_stderr"), fmt=marker, color=figures.colour(0), zorder=3)
        close = [abs(minutes - x) < longest / 10 and abs(nll - y) < 0.3 for minutes, nll in points]
        near = [other.row.label for other, is_close in zip(results, close, strict=True) if is_close]
        if near[0] == result.row.label:  # close points share a label
            right = max(minutes for (minutes, _), is_close in zip(points, close, strict=True) if is_close)
            axes.annotate(", ".join(near), (right, y), (6, 0), textcoords="offset points", va="center", fontsize=7)
        if result.row.printed:
            printed.setdefault(result.row.printed, []).append(result.row.name)
    for value, names in printed.items():
        axes.axhline(value, color="0.6", linewidth=1, linestyle="--")
        label = f" {value:.2f} {', '.join(names)}"
        axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), va="center", fontsize=7, color="0.5")
    labels = {"xlabel": "minutes of training, one thread or one GPU", "ylabel": "−log p(x), nats per image"}
    figures.finish(axes, **labels, xlim=(0, 1.2 * longest))
    return figure


def table(results: list[Result]) -> list[str]:
    """Return the table of the rows of a data set."""
    return [
        "| row | printed | to reach | −log p(x) | seeds | −ELBO | rate | distortion | active | epochs | minutes "
        "| `train.py …` |",
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|---|",
        *(result.line() for result in results),
    ]


def tables(results: list[Result]) -> list[str]:
    """Return the generated lines of docs/published.md: a table per data set, and the machines."""
    lines: list[str] = []
    for data in dict.fromkeys(result.row.data for result in results):
        lines += ["", f"{data}:", "", *table([result for result in results if result.row.data == data])]
    machines = {name for result in results for name in result.values("machine")}
    return [*lines, "", f"Machine: {'; '.join(sorted(machines)) or 'none yet'}."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="all but those that need a GPU, if none is given")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_intermixed_args()  # rows on both sides of --jobs
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: should be at least 1")
    names = options.rows or [row.name for row in ROWS if not row.needs_gpu]
    if unknown := set(names) - {row.name for row in ROWS}:
        parser.error(f"{', '.join(sorted(unknown))}: no such row. Allowed: {', '.join(row.name for row in ROWS)}")
    read_results()  # a damaged file is reported before the training, not after it

    failed = False
    runs = [(row, seed) for row in ROWS if row.name in names and not options.table for seed in row.seeds]
    runs.sort(key=lambda run: run[0].seeds.index(run[1]))  # one run of each row comes before further seeds
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(make, row, seed): (row, seed) for row, seed in runs}
        try:
            for job in as_completed(jobs):
                row, seed = jobs[job]
                if error := job.exception():
                    failed = True
                    log = row.directory(seed).with_suffix(".log")
                    print(f"{row.name}, seed {seed}: {error}; see {log}", file=sys.stderr)
                else:
                    recorded = read_results()  # another process may have finished a row
                    recorded.setdefault(row.name, {})[str(seed)] = job.result()
                    write_json(RESULTS, recorded)
        except KeyboardInterrupt:  # the running ones have received it, too
            pool.shutdown(cancel_futures=True)
            print("stopped; the same command resumes the runs", file=sys.stderr)
            return 130
    recorded = read_results()
    results = [Result.of(row, recorded) for row in ROWS]
    write_between(PAGE, START, END, tables(results))
    # Rows of two and five latents are far above the others.
    shown = [result for result in results if result.row.data == "MNIST" and result.runs and result.nll < 100]
    if shown:
        figures.save(plot(shown), ROOT / "docs" / "images" / "published.png")
    print("\n".join(tables(results)))
    return int(failed or any(result.missed for result in results))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
