"""`vae generate FIGURE RUN`: one command per figure, with its own options."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

from cyclopts import App, Parameter

from vae_lightning.analysis.generation import FIGURES, generate_run
from vae_lightning.config import takes_options_of
from vae_lightning.runs.directory import StrPath

app = App("generate", help="Draw a figure from a run, and save it in the run's figures/.")
OPTIONS = """

Args:
    run: run directory, one of its checkpoints, or latest
    n: number of samples, images, pairs of images, points or latent dimensions
    columns: samples or points in a row, sides of a manifold, steps of a traversal, frames between two images
    images: indices of test images
    plane: two latent dimensions, counted from 1
    label: a class of a conditional model
    z: coordinates of latents to decode
    temperature: of the prior; lower values give more typical, less varied samples
    seed: of the samples
    format: of the file
    dark: on a dark background
    accelerator: device
    data_root: directory of the data on this machine, if it differs from the run's
"""


def command(figure: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that saves the figure of a run, with the options of `generate_run` and of `figure`."""

    @takes_options_of(figure, generate_run)
    def generate(run: StrPath, **options: Any) -> Any:
        return generate_run(run, figure.__name__, **options)

    hints = generate.__annotations__
    if "n" in hints:
        hints["n"] = Annotated[hints.pop("n"), Parameter(alias="-n")]
    generate.__doc__ = cleandoc(figure.__doc__ or "") + OPTIONS
    return generate


for name, figure in FIGURES.items():
    app.command(command(figure), name=name)
