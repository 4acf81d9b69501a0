"""Train the systems of conf/experiment/, compare them with their expected numbers, and write docs/results.md.

    python benchmarks/reproduce.py                              # all of them: about 20 minutes on two cores
    python benchmarks/reproduce.py relu_mlp_20 deep_bayes_32    # only these; the page stays as it is
    python benchmarks/reproduce.py trainer.accelerator=gpu      # overrides apply to every run

Finished run directories under outputs/reproduce/ are not trained again. Exits with 1 if a number is outside its
tolerance.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

START, END = "<!-- results: written by benchmarks/reproduce.py -->", "<!-- end of results -->"  # around the tables
ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "outputs" / "reproduce"

# experiment, metric, expected value and tolerance, as in its YAML file. A tolerance of 0 is for exact counts.
EXPECTED: list[tuple[str, str, float, float]] = [
    ("leaky_mlp_200", "test/loss", 100.5, 1.0),
    ("leaky_mlp_200", "parameters", 1_189_984, 0),
    ("deep_bayes_32", "test/loss", 111.1, 1.0),
    ("deep_bayes_32", "parameters", 187_648, 0),
    ("relu_mlp_20", "test/loss", 102.6, 1.0),
    ("relu_mlp_20", "parameters", 652_824, 0),
    ("relu_mlp_5", "test/loss", 122.0, 2.0),
    ("relu_mlp_2", "test/loss", 149.3, 3.0),
    ("squared_error_20", "test/squared_error", 17.0, 0.5),
    ("squared_error_20", "test/kl", 12.2, 0.5),
    ("mlp_autoencoder_3", "test/mse", 0.129, 0.01),
    ("conv_autoencoder_4", "encoder_parameters", 43_428, 0),
    ("pytorch_examples_20", "test/loss", 105.6, 0.5),
]

# Figures in docs/results.md: title, experiment, file, width in pixels, and a description for those who cannot see it.
PAIRS = "Rows of test digits, each above the row of their reconstructions: "
FIGURES = [
    ("Reconstructions, 200 latent dimensions", "leaky_mlp_200", "reconstructions", 660, PAIRS + "nearly the same"),
    ("Reconstructions, 20 latent dimensions", "relu_mlp_20", "reconstructions", 660, PAIRS + "nearly the same"),
    (
        "Reconstructions, 5 latent dimensions",
        "relu_mlp_5",
        "reconstructions",
        660,
        PAIRS + "blurred, some another digit",
    ),
    (
        *("Reconstructions, autoencoder with 3 latent dimensions", "mlp_autoencoder_3", "reconstructions", 660),
        PAIRS + "blurred, some another digit",
    ),
    ("Reconstructions, 32 latent dimensions", "deep_bayes_32", "reconstructions", 660, PAIRS + "nearly the same"),
    (
        "Samples from the prior",
        "deep_bayes_32",
        "samples",
        480,
        "A grid of samples: most are digits, some are between two",
    ),
    (
        *("Posterior means of the test digits, two latent dimensions", "relu_mlp_2", "scatter", 660),
        "Points around the origin, one colour per digit: 1 and 7 lie apart, 4 and 9 overlap, as do 3, 5 and 8",
    ),
    (
        *("Decoded latent plane", "relu_mlp_2", "manifold", 660),
        "A grid of decoded digits with the coordinates of z on both axes; each digit changes gradually into the next",
    ),
    ("Decoded z = [0.5, 0] and z = [2, 0]", "relu_mlp_2", "points", 120, "Two decoded digits"),
]


def trained(name: str, words: list[str]) -> dict[str, Any]:
    """The content of metrics.json and environment.json of a run. Trains it first if it is not finished."""
    directory = RUNS / name
    if not (directory / "metrics.json").exists():
        shutil.rmtree(directory, ignore_errors=True)  # an interrupted run, perhaps of another configuration
        command = [sys.executable, "train.py", *words, f"hydra.run.dir={directory}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((directory / "environment.json").read_text()) | json.loads(
        (directory / "metrics.json").read_text()
    )


def machine(run: dict[str, Any]) -> str:
    """Device, threads and torch version of a run, for a line under a table."""
    threads = "one thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return f"{run['device']}, {threads}, torch {run['versions']['torch']}"


def write_between(path: Path, start: str, end: str, lines: list[str]) -> None:
    """Replace the text between two markers of a file by `lines`."""
    head, _, rest = path.read_text().partition(start)
    _, _, tail = rest.partition(end)
    path.write_text("\n".join([head + start, *lines, end]) + tail)


def shown(value: float, tolerance: float) -> str:
    return f"{value:,.0f}" if tolerance == 0 else f"{value:.3f}" if tolerance < 0.1 else f"{value:.2f}"


def show_figures() -> list[str]:
    """Copy the figures of docs/results.md to docs/images, and return their Markdown."""
    lines = []
    for title, experiment, figure, width, description in FIGURES:
        source = RUNS / experiment / "figures" / f"{figure}.png"
        if source.exists():
            copy = Path("images") / f"{experiment}_{figure}.png"
            (ROOT / "docs" / copy).parent.mkdir(exist_ok=True)
            with Image.open(source) as image:
                small = image.convert("RGB").resize((width, image.height * width // image.width))
                small.quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs" / copy, optimize=True)
            lines += ["", f"{title} (`experiment={experiment}`):", "", f"![{description}]({copy})"]
    return lines


def main() -> int:
    every = list(dict.fromkeys(row[0] for row in EXPECTED))
    names = [word for word in sys.argv[1:] if "=" not in word] or every
    if unknown := set(names) - set(every):
        sys.exit(f"{', '.join(sorted(unknown))}: no such experiment. Allowed: {', '.join(every)}")
    overrides = [word for word in sys.argv[1:] if "=" in word]
    lines = [
        "| command | metric | expected | obtained | within | epochs | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    devices: set[str] = set()
    missed = 0
    for experiment, metric, expected, tolerance in EXPECTED:
        if experiment not in names:
            continue
        run = trained(experiment, [f"experiment={experiment}", *overrides])
        obtained = float(run[metric])
        within = abs(obtained - expected) <= tolerance
        missed += not within
        band = f" ± {tolerance}" if tolerance else ""
        devices.add(machine(run))
        lines.append(
            f"| `python train.py experiment={experiment}` | {metric} | {shown(expected, tolerance)}{band} "
            f"| {shown(obtained, tolerance)} | {'yes' if within else '**no**'} | {run['epochs']} "
            f"| {run['seconds']:.0f} |"
        )
    if names == every:
        written = [*lines, "", f"Machine: {'; '.join(sorted(devices))}.", *show_figures()]
        write_between(ROOT / "docs" / "results.md", START, END, written)
    print("\n".join(lines))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
