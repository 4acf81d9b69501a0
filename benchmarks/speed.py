"""Compare the speed of an epoch of train.py with other ways to train the same VAE.

    python benchmarks/speed.py                                       # every row, three rounds: about half an hour
    python benchmarks/speed.py --rows mlp_200/100 --rounds 10
    python benchmarks/speed.py --contenders plain train.py
    python benchmarks/speed.py --rows tiny_20/100                    # little arithmetic: the overhead
    python benchmarks/speed.py --device cuda

Each contender (contenders.py) is a subprocess. The contenders take turns, so that a slow phase of the machine affects
all of them. Also measures the seconds from the start of `train.py` to its first step, the speed of `vae evaluate`
relative to the decoder's matrix products alone, the runs per hour of a sweep, and the profile of a step.
The results of the measured rows replace those in docs/speed_cpu.json, from which the tables in docs/speed.md and
docs/images/speed_cpu.png are written; with `--device cuda`, those of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from subprocess import PIPE
from typing import Any

import torch
from contenders import CONTENDERS, ROOT, SYSTEMS, finish
from matplotlib.figure import Figure
from reproduce import write_between
from tabulate import tabulate

from vae_lightning import figures
from vae_lightning.analysis.evaluation import importance_sampling
from vae_lightning.models.vae import VAE
from vae_lightning.runs.environment import device_name
from vae_lightning.training.process import steady_cpu

EVERY_ROW = [f"{system}/{batch}" for system in SYSTEMS for batch in (100, 1000)]
ROWS = [row for row in EVERY_ROW if not row.startswith("tiny")]
SLOW = ("textbook", "textbook_4", "pythae")  # these run in the first round only


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
        """Close its input, at which it removes its files and ends."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(row: str, names: list[str], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Measure seconds per epoch and peak memory of every contender that runs here.

    A round starts a new process for each contender and measures its second epoch. On a shared machine, a process can be
    slow for as long as it lives, by the memory that it was given.
    """
    found: dict[str, dict[str, Any]] = {}
    for n in range(rounds):
        for name in names:
            if n and (name in SLOW or name not in found):
                continue
            contender = Contender(name, row, device)
            if contender.epoch() and contender.epoch():
                result = found.setdefault(name, {"seconds": [], "megabytes": 0.0})
                result["seconds"].append(contender.seconds[1])
                result["megabytes"] = max(result["megabytes"], contender.megabytes)
            contender.stop()
    return found


def table(results: dict[str, dict[str, dict[str, Any]]], best: Callable[[list[float]], float]) -> str:
    """Return a table of contenders and rows: seconds per epoch, the ratio to the plain loop, and the most memory."""
    lines = []
    for name in dict.fromkeys(name for found in results.values() for name in found):
        line = [name]
        for found in results.values():
            seconds = best(found[name]["seconds"]) if name in found else None
            ratio = f" ({seconds / best(found['plain']['seconds']):.2f})" if seconds and "plain" in found else ""
            line.append(f"{seconds:.2f}{ratio}" if seconds else "")
        lines.append([*line, f"{max(found[name]['megabytes'] for found in results.values() if name in found):,.0f}"])
    rows = [row.replace("/", ", ") for row in results]
    align = ["left", *["right"] * (len(rows) + 1)]
    return tabulate(lines, ["", *rows, "MB"], "pipe", disable_numparse=True, colalign=align)


SWEEP = ["seed=0,1,2,3", "model.latent_dim=20", "trainer.max_epochs=3", "figures.every=0", "figures.embedded=0"]


def markers(device: str) -> tuple[str, str]:
    """Return the lines of docs/speed.md between which the tables of a device stand."""
    return f"<!-- speed {device}: written by benchmarks/speed.py -->", f"<!-- end of speed {device} -->"


def runs_per_hour(accelerator: str) -> dict[str, float]:
    """Measure a sweep of four short runs, one after the other and by joblib, one thread per run."""
    found = {}
    cores = os.cpu_count() or 1
    for name, words in {
        "one after the other": [],
        f"joblib, {cores} at a time": ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={cores}"],
    }.items():
        with tempfile.TemporaryDirectory() as scratch:
            words = [*SWEEP, *words, f"trainer.accelerator={accelerator}", f"hydra.sweep.dir={scratch}"]
            started = time.perf_counter()
            subprocess.run([sys.executable, "train.py", "-m", *words], cwd=ROOT, check=True, capture_output=True)
            found[name] = 4 * 3_600 / (time.perf_counter() - started)
    return found


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
        finish(device)
        found["evaluate"].append(len(images) * samples / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(len(images) * samples // chunk):
            for layer, x in zip(layers, inputs, strict=True):
                torch.mm(x, layer.weight.T)
        finish(device)
        found["products"].append(len(images) * samples / (time.perf_counter() - started))
    return {name: values[1:] for name, values in found.items()}


@figures.styled
def plot(results: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Plot the images per second of every contender in its fastest round, one group of bars per row."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    figure = Figure(figsize=(2 * figures.WIDTH, 2.8))
    axes = figure.subplots()
    for n, name in enumerate(names):
        rows = [(i, found[name]["seconds"]) for i, found in enumerate(results.values()) if name in found]
        x = [i + (n - len(names) / 2) * 0.8 / len(names) for i, _ in rows]
        axes.bar(x, [60_000 / min(s) for _, s in rows], 0.8 / len(names), label=name, align="edge")
    axes.set_xticks(range(len(results)), [row.replace("/", "\nbatch ") for row in results])
    figures.finish(axes, ylabel="images per second", yscale="log")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=EVERY_ROW)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
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

    print(machine, flush=True)
    results = {}
    for row in options.rows:
        results[row] = measure(row, options.contenders, options.rounds, options.device)
        print(f"\n{table({row: results[row]}, min)}", flush=True)
    accelerator = "cpu" if options.device == "cpu" else "gpu"
    start = first_step(accelerator)
    say(f"\nFrom the start of `python train.py` to its first step: {', '.join(f'{s:.1f}' for s in start)} s.")
    share = evaluation_share(options.device, options.rounds)
    ratios = [100 * a / b for a, b in zip(share["evaluate"], share["products"], strict=True)]
    say(
        f"\nevaluate.py, 784-400-20: {median(share['evaluate']):,.0f} importance samples per second, "
        f"{median(ratios):.0f} % ({min(ratios):.0f} to {max(ratios):.0f}) of the decoder's matrix products alone."
    )
    hourly = runs_per_hour(accelerator)
    say(
        "\nA sweep of four runs of three epochs of 784-400-400-20, in runs per hour: "
        f"{', '.join(f'{rate:.0f} {name}' for name, rate in hourly.items())}."
    )
    profiled = [sys.executable, "benchmarks/profiled.py", "mlp_200/100", options.device]
    say(f"\nA step of {subprocess.run(profiled, cwd=ROOT, check=True, stdout=PIPE, text=True).stdout.strip()}")
    file = ROOT / "docs" / f"speed_{options.device}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get("machine") == machine:
        results = {row: found for row in EVERY_ROW if (found := results.get(row) or before["epochs"].get(row))}
    file.write_text(json.dumps({"machine": machine, "epochs": results}) + "\n")
    tables = [machine]
    for name, best in {"fastest round": min, "median round": median}.items():
        title = f"Seconds per epoch of 60,000 images, and × the plain loop, in the {name}:"
        tables += [f"\n{title}\n", table(results, best)]
    write_between(ROOT / "docs" / "speed.md", *markers(options.device), [*tables, *lines])
    figures.save(plot(results), ROOT / "docs" / "images" / f"speed_{options.device}.png")


if __name__ == "__main__":
    main()
