"""Compare the speed of an epoch of train.py with other ways to train the same VAE.

    python benchmarks/speed.py                                       # every row, five rounds: about half an hour
    python benchmarks/speed.py --rows mlp_200/100 --rounds 10
    python benchmarks/speed.py --contenders plain train.py
    python benchmarks/speed.py --rows tiny_20/100                    # little arithmetic: the overhead
    python benchmarks/speed.py --device cuda

Each contender (contenders.py) is a subprocess that waits for its turn. A round is one epoch of each, so that a slow
phase of the machine affects all of them. Ratios are computed per round. Also measures the seconds from the start of
`train.py` to its first step, and the speed of evaluate.py relative to the decoder's matrix products alone. Writes the
tables in docs/speed.md, docs/speed.json and docs/images/speed.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from subprocess import PIPE
from typing import Any

import torch
from contenders import CONTENDERS, ROOT, SYSTEMS
from matplotlib.figure import Figure
from reproduce import write_between
from tabulate import tabulate

from vae_lightning import figures
from vae_lightning.analysis.evaluation import importance_sampling
from vae_lightning.models.vae import VAE
from vae_lightning.runs.environment import device_name
from vae_lightning.training.train import steady_cpu

EVERY_ROW = [f"{system}/{batch}" for system in SYSTEMS for batch in (100, 1000)]
ROWS = [row for row in EVERY_ROW if not row.startswith("tiny")]
SLOW = ("textbook", "textbook_4", "pythae")  # these run in the first two rounds only


class Contender:
    """A subprocess that trains one epoch per request."""

    def __init__(self, name: str, row: str, device: str) -> None:
        system, batch = row.split("/")
        command = [sys.executable, ROOT / "benchmarks" / "contenders.py", name, system, batch, device]
        self.process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        self.seconds: list[float] = []
        self.megabytes = 0.0

    def epoch(self) -> bool:
        """Train one epoch. Return False if the contender is not installed or does not support this row."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write("epoch\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            while line and not line.startswith("{"):  # output of other libraries
                line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            found = json.loads(line)
            self.seconds.append(found["seconds"])
            self.megabytes = found["megabytes"]
        return bool(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(row: str, names: list[str], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Measure seconds per epoch and peak memory of every contender that runs here, after one epoch to warm up."""
    contenders = {name: Contender(name, row, device) for name in names}
    contenders = {name: contender for name, contender in contenders.items() if contender.epoch()}
    for contender in contenders.values():
        contender.seconds.clear()
    for n in range(rounds):
        for name, contender in contenders.items():
            if name not in SLOW or n < 2:
                contender.epoch()
    for contender in contenders.values():
        contender.stop()
    return {name: {"seconds": c.seconds, "megabytes": c.megabytes} for name, c in contenders.items()}


def summary(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return one row per contender: seconds, images per second, ratio to the plain loop in each round, memory."""
    lines = []
    plain = found.get("plain", {}).get("seconds", [])
    for name, figures_of in found.items():
        seconds = figures_of["seconds"]
        ratios = [s / p for s, p in zip(seconds, plain, strict=False)]
        lines.append(
            [name]
            + [f"{f(seconds):.2f}" for f in (min, median, max)]
            + [f"{60_000 / median(seconds):,.0f}"]
            + ([f"{f(ratios):.2f}" for f in (min, median, max)] if ratios else [""] * 3)
            + [f"{figures_of['megabytes']:,.0f}"]
        )
    return lines


START, END = "<!-- speed: written by make benchmark -->", "<!-- end of speed -->"
ALIGN = ["left", *["right"] * 8]
HEADING = ["contender", "min s", "median s", "max s", "images/s", "min ×", "median ×", "max ×", "MB"]


def first_step(accelerator: str, times: int = 3) -> list[float]:
    """Measure the seconds from the start of `python train.py` to the end of its first step."""
    found = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as scratch:
            words = ["trainer.callbacks=[{_target_: contenders.FirstStep}]", f"hydra.run.dir={scratch}/run"]
            command = [sys.executable, "train.py", *words, f"trainer.accelerator={accelerator}"]
            path = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
            started = time.time()
            finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        found.append(float(finished.stdout.partition("first step ")[2].split()[0]) - started)
    return found


@torch.inference_mode()
def evaluation_share(device: str, rounds: int) -> dict[str, list[float]]:
    """Measure importance samples per second of a 784-400-20 VAE, and of its decoder's matrix products alone."""
    vae = (
        VAE(latent_dim=20, backbone={"_target_": "vae_lightning.models.backbones.MLP", "hidden": [400]})
        .eval()
        .to(device)
    )
    images = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8, device=device)
    labels, samples, chunk = torch.zeros(len(images), dtype=torch.long), 500, 1_000
    layers = [layer for layer in vae.decoder if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(chunk, layer.in_features, device=device) for layer in layers]
    found: dict[str, list[float]] = {"evaluate": [], "products": []}
    for _ in range(rounds + 1):
        started = time.perf_counter()
        importance_sampling(vae, images, labels, samples)
        found["evaluate"].append(len(images) * samples / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(len(images) * samples // chunk):
            for layer, x in zip(layers, inputs, strict=True):
                torch.mm(x, layer.weight.T)
        found["products"].append(len(images) * samples / (time.perf_counter() - started))
    return {name: values[1:] for name, values in found.items()}


def plot(results: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Plot the median images per second of every contender, one group of bars per row."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for n, (name, colour) in enumerate(zip(names, figures.COLOURS, strict=False)):
        rows = [(i, found[name]["seconds"]) for i, found in enumerate(results.values()) if name in found]
        x = [i + (n - len(names) / 2) * 0.8 / len(names) for i, _ in rows]
        axes.bar(x, [60_000 / median(s) for _, s in rows], 0.8 / len(names), label=name, color=colour, align="edge")
    axes.set_xticks(range(len(results)), [row.replace("/", "\nbatch ") for row in results], fontsize="small")
    figures.finish(axes, ylabel="images per second", yscale="log")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=EVERY_ROW)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()

    steady_cpu()
    machine = (
        f"{device_name(torch.device(options.device))}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say(machine)
    results = {}
    for row in options.rows:
        results[row] = measure(row, options.contenders, options.rounds, options.device)
        say(f"\n{row.replace('/', ', batch ')}: seconds per epoch of 60,000 images, and × the plain loop\n")
        say(tabulate(summary(results[row]), HEADING, tablefmt="pipe", disable_numparse=True, colalign=ALIGN))
    start = first_step("cpu" if options.device == "cpu" else "gpu")
    say(f"\nFrom the start of `python train.py` to its first step: {', '.join(f'{s:.1f}' for s in start)} s.")
    share = evaluation_share(options.device, options.rounds)
    ratios = [100 * a / b for a, b in zip(share["evaluate"], share["products"], strict=True)]
    say(
        f"\nevaluate.py, 784-400-20: {median(share['evaluate']):,.0f} importance samples per second, "
        f"{median(ratios):.0f} % ({min(ratios):.0f} to {max(ratios):.0f}) of the decoder's matrix products alone."
    )
    if options.rows == ROWS:
        write_between(ROOT / "docs" / "speed.md", START, END, lines)
        content = {"machine": machine, "epochs": results, "first_step": start, "evaluation": share}
        (ROOT / "docs" / "speed.json").write_text(json.dumps(content) + "\n")
        figures.save(plot(results), ROOT / "docs" / "images" / "speed.png")


if __name__ == "__main__":
    main()
