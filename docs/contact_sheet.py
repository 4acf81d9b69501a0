"""Draw every picture of the project on a contact sheet: outputs/contact_sheet/light.png and dark.png.

python docs/contact_sheet.py    # four minutes on one core; later starts use the same runs again
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from vae_lightning import figures
from vae_lightning.analysis import generation, reports
from vae_lightning.analysis.evaluation import evaluate_run
from vae_lightning.models.standard_figures import standard_figures
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.loading import open_run

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "outputs" / "contact_sheet"
SHORT = ["trainer.max_epochs=6", "trainer.limit_train_batches=100", "figures.every=0", "logger=none"]
WIDTH = 4_200  # of a sheet, in pixels
Picture = Tensor | Figure


def trained(name: str, *words: str) -> RunDirectory:
    """Return the run of that name. Trains it first if it is not finished."""
    run = RunDirectory(HERE / "runs" / name)
    command = [sys.executable, "train.py", *SHORT, *words, f"hydra.run.dir={run}", "resume=auto"]
    if run.state != "finished":
        subprocess.run(command, cwd=ROOT, check=True)
    return run


def of_a_run(run: RunDirectory, what: list[str]) -> dict[str, Picture]:
    """Return what a run saves at its end, and figures of `vae generate`."""
    opened = open_run(run, "cpu")
    images, labels, class_name = opened.data.test_images, opened.data.test_labels, opened.data.class_name
    drawn = standard_figures(opened.model, images, labels, class_name=class_name)
    drawn["loss_curves"] = figures.loss_curves(run.read_history())
    for name in what:
        options = {"z": [0.5] * opened.model.latent_dim} if name == "decode" else {}
        picture = generation.FIGURES[name](opened, **options)
        drawn[f"generate {name}"] = picture[0] if isinstance(picture, list) else picture  # the first frame of a walk
    return drawn


def of_many_runs(runs: list[RunDirectory]) -> dict[str, Picture]:
    """Return the figures of `vae report`, `vae evaluate` and `vae compare`."""
    found = [evaluate_run(run, samples=10, probes=False, accelerator="cpu") for run in runs]
    (table,) = reports.tables(reports.find_results([run.path for run in runs])[0])
    drawn: dict[str, Picture] = dict(reports.plots(table))
    if picture := reports.reconstructions(table):
        drawn["report reconstructions"] = picture
    curve = {int(k): -nll for k, nll in found[0]["test/nll_curve"].items()}
    drawn["nll_curve"] = figures.nll_curve(curve, f"cross-entropy, {found[0]['protocol']}")
    ours, baseline = (np.loadtxt(run.evaluation_values, delimiter=",", skiprows=1)[:, 0] for run in (runs[-1], runs[0]))
    images = open_run(runs[0], "cpu").data.test_images
    drawn["compare"] = figures.differences(
        torch.from_numpy(ours - baseline), images, "latent_dim 20\nminus latent_dim 2"
    )
    return drawn


def of_the_benchmarks() -> dict[str, Picture]:
    """Return the figures of benchmarks/, of the numbers in docs/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    growth, speed, published = (
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")) for name in ("growth", "speed", "published")
    )
    sizes = json.loads((ROOT / "docs" / "growth.json").read_text())
    sizes.pop("machine")
    recorded = published["read_results"]()
    rows = [published["Result"].of(row, recorded) for row in published["ROWS"]]
    return {
        "growth": growth["plot"](sizes),
        "speed": speed["plot"](json.loads((ROOT / "docs" / "speed_cpu.json").read_text())["epochs"]),
        "published": published["plot"]([r for r in rows if r.row.data == "MNIST" and r.runs and r.nll < 100]),
    }


def sheet(pictures: dict[str, Picture], dark: bool) -> Image.Image:
    """Return pictures at their own size under their names, in rows."""
    ground, text = ("#15171c", "white") if dark else ("white", "black")
    shown = {name: figures.as_pil(picture) for name, picture in pictures.items()}
    result = Image.new("RGB", (WIDTH, sum(image.height + 40 for image in shown.values())), ground)
    x, y, of_row = 0, 0, 0
    for name, image in sorted(shown.items(), key=lambda item: item[1].height):
        if x + max(image.width, 300) > WIDTH:
            x, y, of_row = 0, y + of_row, 0
        ImageDraw.Draw(result).text((x + 10, y + 5), name, text, font_size=20)
        result.paste(image, (x, y + 35))
        x, of_row = x + max(image.width, 300) + 30, max(of_row, image.height + 60)  # a name needs 300
    return result.crop((0, 0, WIDTH, y + of_row))


def main() -> None:
    words = [(f"{d}_{seed}", f"model.latent_dim={d}", f"seed={seed}") for d in (2, 20) for seed in (0, 1)]
    runs = [trained(*run) for run in words]
    conditional = trained("conditional", "model.conditional=true", "model.latent_dim=2")
    autoencoder = trained("autoencoder", "model=autoencoder", "model.latent_dim=3", "data.val_size=0")
    every = [name for name in generation.FIGURES if name != "analogies"]  # of conditional models
    for name, dark in (("light", False), ("dark", True)):
        number = count(1)
        with style.context("vae_lightning.dark") if dark else nullcontext(), torch.inference_mode():
            drawn = [of_a_run(runs[0], ["overview", "decode"]), of_a_run(runs[-1], every)]
            drawn += [
                of_a_run(conditional, ["overview", "analogies"]),
                of_a_run(autoencoder, ["overview", "traversals"]),
            ]
            drawn += [of_many_runs(runs), of_the_benchmarks()]
        pictures = {f"{next(number)}. {key}": picture for part in drawn for key, picture in part.items()}
        file = HERE / f"{name}.png"
        sheet(pictures, dark).save(file)
        print(f"{file}: {len(pictures)} pictures")


if __name__ == "__main__":
    main()
