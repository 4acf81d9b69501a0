"""The six commands: `python train.py` and `vae-train` are the same function, and so on.

Nothing heavy is imported here before a command runs. `python -m vae_lightning.launch.commands` is the first of them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def starting() -> Iterator[None]:
    """Around a command's imports: classes in the current directory can be named, and garbage collection waits.

    None of what imports make is garbage; looking for it takes a fifth of the time to start.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if enabled:
            gc.enable()


def train() -> None:
    """Train a model and leave a run directory; the last line printed is its path."""
    with starting():
        import hydra

        from vae_lightning.launch.cli import CONF, one_line_errors
        from vae_lightning.launch.jobs import run_job, train_given
        from vae_lightning.launch.sweeps import RUN
    with one_line_errors("train"):
        if RUN in os.environ:
            return train_given()
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(run_job)()


def evaluate() -> None:
    """Evaluate a trained VAE; print a table and write evaluation.json into its run directory.

    python evaluate.py run=outputs/vae/2026-11-21_10-00-00-000000
    python evaluate.py run=outputs/… samples=500 split=val

    conf/evaluate.yaml lists the options, docs/numbers.md explains the numbers.
    """
    with starting():
        from vae_lightning.analysis.evaluation import evaluate_run
    run_command("evaluate", evaluate_run, evaluate.__doc__)


def generate() -> None:
    """Draw one picture of a trained run into its figures/; the last line printed is the picture's path.

    python generate.py run=outputs/… what=samples n=100 temperature=0.8
    python generate.py run=outputs/… what=reconstructions images=[3,18,61]
    python generate.py run=outputs/… what=manifold                   # latent_dim=2; else plane=principal or plane=[1,2]
    python generate.py run=outputs/… what=scatter format=pdf
    python generate.py run=outputs/… what=traversals
    python generate.py run=outputs/… what=interpolations
    python generate.py run=outputs/… what=decode z=[0.5,0]
    python generate.py run=outputs/… what=nearest                    # samples above their nearest training images
    python generate.py run=outputs/… what=walk                       # an animated GIF

    conf/generate.yaml lists the options.
    """
    with starting():
        from vae_lightning.analysis.generation import generate_run
    print(run_command("generate", generate_run, generate.__doc__))


def report() -> None:
    """Make one table and plots of many runs: where their configurations differ, mean ± standard deviation over seeds.

    python report.py outputs/sweeps/2026-11-21_10-00-00-000000
    python report.py outputs metrics=[test/loss,test/kl] style=markdown
    python report.py outputs/vae outputs/sweeps to=outputs/report style=latex

    report.md, report.csv, report.tex and the pictures go into `to`; the last line printed is that directory.
    """
    with starting():
        from vae_lightning.analysis.reports import report as write_report
    runs = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in runs]
    print(run_command("report", write_report, report.__doc__, **({"runs": runs} if runs else {})))


def explore() -> None:
    """Serve a page on which to walk through the latent space of a trained run: drag, hover, draw a digit.

    pip install -e '.[explore]'
    python explore.py run=outputs/…                # then open http://127.0.0.1:8000
    python explore.py run=outputs/… port=8080
    """
    with starting():
        from vae_lightning.analysis.explorer import explore_run
    run_command("explore", explore_run, explore.__doc__)


def export() -> None:
    """Write encoder and decoder of a trained run as ONNX and safetensors into its export/, checked against PyTorch.

    pip install -e '.[export]'
    python export.py run=outputs/…
    """
    with starting():
        from vae_lightning.analysis.exporting import export_run
    print(run_command("export", export_run, export.__doc__))


def run_command(name: str, function: Callable[..., Any], documentation: str | None, **given: Any) -> Any:
    """Call `function` with the options of conf/NAME.yaml as the command line changes them, and with `given`."""
    with starting():
        from vae_lightning.config import check_arguments
        from vae_lightning.launch.cli import command_line, one_line_errors
    with one_line_errors(name):
        options = command_line(name, documentation, given)
        check_arguments(function, options, "")
        return function(**options)


if __name__ == "__main__":
    train()
