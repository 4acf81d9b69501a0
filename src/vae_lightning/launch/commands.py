"""`python train.py …`, and errors of any command in one line. Heavy imports wait until a command runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

from vae_lightning.launch import TRACEBACK
from vae_lightning.training.signals import Interrupted


def main(command: Callable[[], None]) -> None:
    """Run a command. An error that the user can fix takes one line on stderr, and the exit status is 2.

    HYDRA_FULL_ERROR=1 shows its traceback instead.
    """
    sys.path.insert(0, os.getcwd())  # for the user's own classes
    os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", ""))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them over many lines
    try:
        command()
        return
    except Interrupted as stop:
        line, status = f"{stop}; to resume it: the same command, in the same directory", stop.status
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except Exception as error:
        from vae_lightning.launch.errors import error_line

        if (found := error_line(error)) is None:
            raise
        line, status = found, 2
    print(line, file=sys.stderr)
    raise SystemExit(status)


def train_command(*overrides: str) -> None:
    """Train a model: the same as `python train.py`."""
    gc.disable()  # imports create no garbage, and looking for it takes a fifth of the time to start
    import hydra
    from omegaconf import DictConfig

    from vae_lightning.launch.errors import CONF
    from vae_lightning.launch.jobs import run_job

    gc.enable()
    command_line = sys.argv[1:]

    def job(config: DictConfig) -> None:
        sys.argv[1:] = command_line  # further processes of the run are started with it
        run_job(config)

    # Hydra reads sys.argv, and takes no option between two settings: model.latent_dim=2 -m seed=0,1
    sys.argv[1:] = sorted(overrides, key=lambda word: word not in ("-m", "--multirun"))
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()


def train() -> None:
    """Run `python train.py …`."""
    main(lambda: train_command(*sys.argv[1:]))
