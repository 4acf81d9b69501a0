"""The command `vae`: a function of analysis/ for each word. Its parameters are the options, its docstring the help."""

from __future__ import annotations

import sys

from cyclopts import App, Parameter

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
    overrides = Parameter(allow_leading_hyphen=True, show=False)
    app.command(train_command, name="train", default_parameter=overrides, help_flags=(), version_flags=())
    for name, (target, text) in COMMANDS.items():
        app.command(f"vae_lightning.{target}", name=name, help=None if name == chosen else text)
    app.register_install_completion_command()
    return app


def run() -> None:
    """Run the command line, and print what the command returns."""
    app = make_app(*sys.argv[1:2])
    result = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    if result is not None:
        print(result)


def vae() -> None:
    """Run `vae …`, with an error that the user can fix in one line."""
    main(run)
