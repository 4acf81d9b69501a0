"""The seven commands: `python train.py` and `vae-train` call the same function, and so on.

Heavy imports wait until a command runs. `python -m vae_lightning.launch.commands` is `train`, for subprocesses.
"""

from __future__ import annotations

import gc
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Set up the imports of a command: classes in the current directory are found, and garbage collection is off.

    Imports create no garbage, and looking for it takes a fifth of the time to start.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    gc.disable()
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        gc.enable()


def train() -> None:
    """Train a model and leave a run directory; the last line printed is its path."""
    with importing():
        import hydra

        from vae_lightning.launch.cli import CONF, one_line_errors
        from vae_lightning.launch.jobs import run_job, run_worker
        from vae_lightning.launch.sweeps import RUN
    with one_line_errors():
        if RUN in os.environ:
            return run_worker()
        # Hydra takes no option between two settings: model.latent_dim=2 -m seed=0,1
        sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(run_job)()


def evaluate() -> None:
    """Evaluate a trained VAE: print a table, and write evaluation.json to its run directory.

    python evaluate.py run=outputs/vae/2026-11-21_10-00-00-000000
    python evaluate.py run=outputs/… samples=500 split=val

    conf/evaluate.yaml lists the options; docs/numbers.md explains the metrics.
    """
    run_command(evaluate, "vae_lightning.analysis.evaluation:evaluate_run")


def generate() -> None:
    """Write one picture of a trained run to its figures/; the last line printed is the path of the picture.

    python generate.py run=outputs/… what=samples n=100 temperature=0.8
    python generate.py run=outputs/… what=reconstructions images=[3,18,61]
    python generate.py run=outputs/… what=manifold                   # latent_dim=2; else plane=principal or plane=[1,2]
    python generate.py run=outputs/… what=scatter format=pdf
    python generate.py run=outputs/… what=traversals
    python generate.py run=outputs/… what=interpolations
    python generate.py run=outputs/… what=decode z=[0.5,0]
    python generate.py run=outputs/… what=nearest                    # samples above their nearest training images
    python generate.py run=outputs/… what=walk                       # animated GIF

    conf/generate.yaml lists the options.
    """
    print(run_command(generate, "vae_lightning.analysis.generation:generate_run"))


def report() -> None:
    """Compare many runs in one table and plots: the keys that differ, and mean ± standard deviation over seeds.

    python report.py outputs/sweeps/2026-11-21_10-00-00-000000
    python report.py outputs metrics=[test/loss,test/kl] style=markdown
    python report.py outputs/vae outputs/sweeps to=outputs/report style=latex

    Writes report.md, report.csv, report.tex and the plots to `to`; the last line printed is that directory.
    """
    print(run_command(report, "vae_lightning.analysis.reports:report", **take_directories()))


def compare() -> None:
    """Compare evaluated runs with a baseline, image by image: the difference in log likelihood and its 95 % interval.

    python compare.py outputs/sweeps/normal outputs/sweeps/flow    # the first is the baseline; directories of seeds
    python compare.py outputs/sweeps/priors                        # the baseline is that of the sweep's first job
    python compare.py outputs/a outputs/b split=val

    `evaluate.py` must have evaluated each run, with the same number of samples. Writes comparison.md and pictures to
    `to`; the last line printed is that directory. docs/numbers.md explains the numbers.
    """
    print(run_command(compare, "vae_lightning.analysis.comparisons:compare", **take_directories()))


def explore() -> None:
    """Serve a web page that shows the latent space of a trained run: drag, hover, draw a digit.

    pip install -e '.[explore]'
    python explore.py run=outputs/…                # then open http://127.0.0.1:8000
    python explore.py run=outputs/… port=8080
    """
    run_command(explore, "vae_lightning.analysis.explorer:explore_run")


def export() -> None:
    """Export encoder and decoder of a trained run to its export/, as ONNX and safetensors, checked against PyTorch.

    pip install -e '.[export]'
    python export.py run=outputs/…
    """
    print(run_command(export, "vae_lightning.analysis.exporting:export_run"))


def take_directories() -> dict[str, list[str]]:
    """Take the words of the command line that are neither settings nor flags as the option `runs`."""
    runs = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in runs]
    return {"runs": runs} if runs else {}


def run_command(command: Callable[[], None], function: str, **given: Any) -> Any:
    """Call `module:function` with the options in conf/<command>.yaml, changed by the command line and by `given`."""
    with importing():
        from vae_lightning.config import check_arguments
        from vae_lightning.launch.cli import command_line, one_line_errors

        target = pkgutil.resolve_name(function)
    with one_line_errors():
        options = command_line(command.__name__, command.__doc__, given)
        check_arguments(target, options, "")
        return target(**options)


if __name__ == "__main__":
    train()
