"""Train the systems of conf/experiment/ and hold their numbers against what is expected of them: docs/results.md.

    python benchmarks/reproduce.py                          # all of them: about 20 minutes on two cores
    python benchmarks/reproduce.py relu_mlp_20 deep_bayes_32
    python benchmarks/reproduce.py trainer.accelerator=gpu  # overrides go to every run

A system whose run directory under outputs/reproduce/ is finished is not trained again. Exits with 1 if a number is
outside its band.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

START, END = "<!-- results: written by make reproduce -->", "<!-- end of results -->"  # around the table in README.md
ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "outputs" / "reproduce"

# experiment, metric, expected, tolerance: as its YAML says. A tolerance of 0 is a count that must match.
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

# What the documents show, in docs/results.md: title, experiment, picture, width.
PICTURES = [
    ("Test digits above their reconstructions, 200 latent dimensions", "leaky_mlp_200", "reconstructions", 480),
    ("The same, 20 latent dimensions", "relu_mlp_20", "reconstructions", 480),
    ("The same, 5 latent dimensions", "relu_mlp_5", "reconstructions", 480),
    ("The same, an autoencoder with 3", "mlp_autoencoder_3", "reconstructions", 480),
    ("25 test digits, each row above its reconstructions", "deep_bayes_32", "reconstructions", 300),
    ("Samples from the prior", "deep_bayes_32", "samples", 480),
    ("Posterior means of the test digits, two latent dimensions", "relu_mlp_2", "scatter", 480),
    ("The decoded manifold", "relu_mlp_2", "manifold", 560),
    ("z = [0.5, 0] and z = [2, 0], decoded", "relu_mlp_2", "points", 120),
]


def trained(name: str, words: list[str]) -> dict[str, Any]:
    """metrics.json and environment.json of a finished run, trained now if it is not there."""
    directory = RUNS / name
    if not (directory / "metrics.json").exists():
        shutil.rmtree(directory, ignore_errors=True)  # a run that was interrupted
        command = [sys.executable, "train.py", *words, f"hydra.run.dir={directory}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((directory / "environment.json").read_text()) | json.loads(
        (directory / "metrics.json").read_text()
    )


def machine(run: dict[str, Any]) -> str:
    threads = "one thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return f"{run['device']}, {threads}, torch {run['versions']['torch']}"


def write_between(path: Path, start: str, end: str, lines: list[str]) -> None:
    """Put `lines` into a file, between two marks."""
    head, _, rest = path.read_text().partition(start)
    _, _, tail = rest.partition(end)
    path.write_text("\n".join([head + start, *lines, end]) + tail)


def shown(value: float, tolerance: float) -> str:
    return f"{value:,.0f}" if tolerance == 0 else f"{value:.3f}" if tolerance < 0.1 else f"{value:.2f}"


def show_pictures() -> str:
    """Copy the pictures that the documents show to docs/images, and return the Markdown that shows them."""
    lines = []
    for title, experiment, picture, width in PICTURES:
        source = RUNS / experiment / "figures" / f"{picture}.png"
        if source.exists():
            copy = Path("images") / f"{experiment}_{picture}.png"
            (ROOT / "docs" / copy).parent.mkdir(exist_ok=True)
            with Image.open(source) as image:
                small = image.convert("RGB").resize((width, image.height * width // image.width))
                small.quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs" / copy, optimize=True)
            lines.append(f"\n{title} (`experiment={experiment}`):\n\n![{title}]({copy})\n")
    return "".join(lines)


def main() -> int:
    names = [word for word in sys.argv[1:] if "=" not in word] or list(dict.fromkeys(row[0] for row in EXPECTED))
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
    text = f"""# Results

Written by `make reproduce`, which trains each system and reads its `metrics.json`. MNIST test set, grey pixels, nats
per image (`mse`: per pixel, on [−1, 1]), trained on all 60,000 images, one seed. Where an expected number comes from
stands in `conf/experiment/`. With a Bernoulli likelihood on grey pixels the loss is a cross-entropy plus KL: it
compares with the tutorials' numbers, and not with log likelihoods in papers.

Seconds are of training, on a shared machine: {"; ".join(sorted(devices))}.

"""
    (ROOT / "docs" / "results.md").write_text(text + "\n".join(lines) + "\n" + show_pictures())
    write_between(ROOT / "README.md", START, END, lines)
    print("\n".join(lines))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
