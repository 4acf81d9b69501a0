"""The commands: `python evaluate.py …` and `vae-evaluate …` call the same function, and so on.

Heavy imports wait until a command runs.
"""

from __future__ import annotations

import gc
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vae_lightning.launch import TRACEBACK
from vae_lightning.training.signals import Interrupted


def main(command: Callable[[], None]) -> None:
    """Run a command. An error that the user can fix takes one line on stderr, and the exit status is 2.

    HYDRA_FULL_ERROR=1 shows its traceback instead.
    """
    sys.path.insert(0, os.getcwd())  # for the user's own classes
    gc.disable()  # imports create no garbage, and looking for it takes a fifth of the time to start
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
    finally:
        os.environ["HYDRA_FULL_ERROR"] = os.environ.pop(TRACEBACK)
    print(line, file=sys.stderr)
    raise SystemExit(status)


def train_command() -> None:
    """Train what conf/train.yaml and the command line say."""
    import hydra

    from vae_lightning.launch.errors import CONF
    from vae_lightning.launch.jobs import run_job

    gc.enable()
    # Hydra takes no option between two settings: model.latent_dim=2 -m seed=0,1
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(run_job)()


def analysis_command(name: str, function: str) -> None:
    """Call `function` of analysis/ with the options of conf/<name>.yaml, changed by the command line."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from vae_lightning.config import ConfigError, check_arguments
    from vae_lightning.launch.errors import CONF

    target = pkgutil.resolve_name(f"vae_lightning.analysis.{function}")
    gc.enable()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(inspect.getdoc(target))
        return
    runs = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, [word for word in sys.argv[1:] if word not in runs])
    if runs:
        several = "runs" in config.keys()  # noqa: SIM118 (`in config` is false for a missing value)
        config["runs" if several else "run"] = runs if several else runs[0]
    if missing := OmegaConf.missing_keys(config):
        raise ConfigError(f"{min(missing)}: missing")
    options: Any = OmegaConf.to_container(config, resolve=True)
    check_arguments(target, options, "")
    result = target(**options)
    if isinstance(result, str | Path):
        print(result)


train = partial(main, train_command)
evaluate = partial(main, partial(analysis_command, "evaluate", "evaluation:evaluate_run"))
generate = partial(main, partial(analysis_command, "generate", "generation:generate_run"))
report = partial(main, partial(analysis_command, "report", "reports:report"))
compare = partial(main, partial(analysis_command, "compare", "comparisons:compare"))
explore = partial(main, partial(analysis_command, "explore", "explorer:explore_run"))
export = partial(main, partial(analysis_command, "export", "exporting:export_run"))
