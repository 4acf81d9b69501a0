"""The command `vae`: a function of analysis/ for each word. Its parameters are the options, its docstring the help."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from vae_lightning.launch.commands import main, train_command

COMMANDS = {
    "evaluate": ("analysis.evaluation:evaluate_runs", "Log likelihood, rate and distortion, active units of runs."),
    "generate": ("launch.generate:app", "Draw a figure from a run: samples, reconstructions, the latent space, …"),
    "report": ("analysis.reports:report_runs", "One table and plots of many runs, mean ± std over seeds."),
    "compare": ("analysis.comparisons:compare_runs", "The difference between evaluated runs, image by image."),
    "explore": ("analysis.explorer:explore_run", "The latent space of a run, live in a browser."),
    "export": ("analysis.exporting:export_run", "Encoder and decoder of a run as ONNX and safetensors."),
}


def make_app(chosen: str = "") -> App:
    """Return the command line. Only the function of the `chosen` command is imported, for its own help."""
    parameter = Parameter(consume_multiple=True, negative_iterable=(), negative_none=())
    app = App("vae", help="Train and examine variational autoencoders.", default_parameter=parameter)
    app.command(train, help_flags=(), version_flags=())
    for name, (target, text) in COMMANDS.items():
        app.command(f"vae_lightning.{target}", name=name, help=None if name == chosen else text)
    app.register_install_completion_command()
    return app


def train(*overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Train a model: the same as `python train.py`."""
    train_command(*overrides)


def run() -> None:
    """Run the command line. Raises UserError for wrong options."""
    try:
        app = make_app(*sys.argv[1:2])
        command, bound, _ = app.parse_args(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        from vae_lightning.config import UserError

        text = " ".join(str(error).split())
        if invalid := getattr(error.__cause__, "errors", None):  # of pydantic, over many lines
            text = f"{text.partition('. ')[0]}: {invalid()[0]['msg']}"
        raise UserError(text) from None
    gc.enable()
    result: Any = command(*bound.args, **bound.kwargs)
    if isinstance(result, str | Path):
        print(result)


def vae() -> None:
    """Run the command, with an error that the user can fix in one line."""
    main(run)
