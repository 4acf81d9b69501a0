"""What surrounds a command that trains: which run it is about, its log, its directory, and how it ends.

Where Hydra, the sweep and the processes of one run meet, and the only file that knows of all three.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from vae_lightning.config import ConfigError, Interval
from vae_lightning.launch.cli import MENDABLE, one_line, plain, print_once, rank
from vae_lightning.launch.search import search
from vae_lightning.launch.sweeps import note_failure, quoted, share_of_machine, train_apart
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.resume import RunPlan, find_run, plan_run, run_config
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train
from vae_lightning.training.trainer import TRAINER_DEFAULTS

log = logging.getLogger(__name__)

# Hydra warns that it holds conf/hydra/launcher/ against the fields that a launcher has, which is as it should be.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")

RUN = "VAE_LIGHTNING_RUN"  # what the first process of several tells those that it starts


@contextlib.contextmanager
def job(config_name: str) -> Iterator[Path]:
    """Inside a `@hydra.main` function: the run directory of this job, removed again if nothing came to stand in it.

    In a sweep an error is logged at once, and noted for the end, and the sweep goes on.
    """
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    directory = Path(hydra.runtime.output_dir)
    ours = not any(directory.iterdir())  # made for this job, or as good as
    try:
        if not os.access(directory, os.W_OK):
            raise ConfigError(f"hydra.{'sweep' if sweep else 'run'}.dir={directory}: cannot be written to")
        yield directory
    except Exception as error:
        mendable = isinstance(error, MENDABLE)
        line = one_line(error, config_name) if mendable else f"{type(error).__name__}: {' '.join(str(error).split())}"
        if sweep:
            log.error("job %s: %s", hydra.job.num, line)
            note_failure(directory.parent, hydra.job.num, hydra.overrides.task, line)
        if ours or sweep:
            remove_lonely_log()
        if sweep or not mendable:
            raise
        print(line, file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if ours:
            with contextlib.suppress(OSError):  # it is not empty
                directory.rmdir()


def remove_lonely_log() -> None:
    """Remove the log of a job, and its directory, where there is nothing else in it."""
    for handler in list(logging.root.handlers):
        if isinstance(handler, logging.FileHandler):
            handler.close()
            logging.root.removeHandler(handler)  # a launcher may have something to say after its job
            file = Path(handler.baseFilename)
            if file.parent.is_dir() and [path.name for path in file.parent.iterdir()] == [file.name]:
                file.unlink()
                file.parent.rmdir()


def plan_job(config: dict[str, Any], directory: Path) -> RunPlan:
    """The run that this command, or this job of a sweep, is about: a new one in `directory`, or one that is there.

    A job of a sweep is known by its configuration: one that the sweep's directory has already is gone on with, or left
    alone where it is finished. Raises UserError.
    """
    hydra = HydraConfig.get()
    if launched_from_outside():
        check_launch(hydra.mode, config["autoresume"], hydra.overrides.hydra)
    given = [override.key_or_group for override in OverridesParser.create().parse_overrides(hydra.overrides.task)]
    if config["timeout"] is not None and hydra.mode != RunMode.MULTIRUN:
        raise ConfigError(f"timeout={config['timeout']}: is for each job of a sweep; trainer.max_time is for a run")
    if rank() and RUN in os.environ:  # the first process has decided
        theirs = json.loads(os.environ[RUN])
        plan = RunPlan(theirs["config"], RunDirectory(theirs["directory"]), theirs["resume"])
    elif rank():  # of processes that torchrun or srun started
        there = config["resume"] or config["repeat"]
        plan = plan_run(config, directory, given) if there else RunPlan(run_config(config), RunDirectory(directory))
        plan.resume = plan.resume or (config["autoresume"] and plan.run.checkpoints.is_dir())
    elif hydra.mode == RunMode.MULTIRUN:
        if config["resume"] or config["repeat"]:
            raise ConfigError("resume is for one run; a sweep goes on when it is run again in its hydra.sweep.dir")
        sweep = directory.parent
        others = sweep.parent.glob("*/*") if config["autoresume"] else []
        places = [*siblings(directory), *sorted(others, reverse=True)]
        for n in itertools.count(2):  # job 3 of another sweep is there, and this one's job 3 is something else
            if RunDirectory(directory).state == "new" or find_run(run_config(config), [directory]):
                break
            directory = sweep / f"{hydra.job.num}_{n}"
        plan = plan_run(config | {"autoresume": True}, directory, given, places)
    else:
        looks = config["autoresume"] and not names_directory(hydra.overrides.hydra)
        plan = plan_run(config, directory, given, siblings(directory) if looks else [])
    write_log_to(plan.run)
    if plan.finished:
        log.info("%s: finished already; nothing to do", plan.run)
    else:
        content = {"config": plan.config, "directory": str(plan.run), "resume": plan.resume}
        os.environ[RUN] = json.dumps(content)
    return plan


def launched_from_outside() -> bool:
    """Whether torchrun or srun started several processes of this command."""
    return any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")) and RUN not in os.environ


def check_launch(mode: RunMode | None, autoresume: bool, hydra_overrides: Sequence[str]) -> None:
    """Raise ConfigError for what processes that know nothing of each other would not agree on."""
    if mode == RunMode.MULTIRUN:
        raise ConfigError("-m: a sweep starts processes itself, and cannot be started by torchrun or srun")
    if autoresume and not names_directory(hydra_overrides):
        raise ConfigError(
            "autoresume=true: with torchrun or srun say hydra.run.dir=… too: each process looks for itself"
        )


def names_directory(hydra_overrides: Sequence[str]) -> bool:
    """Whether the command says itself where its run is to be."""
    return any(override.startswith("hydra.run.dir=") for override in hydra_overrides)


def siblings(directory: Path) -> list[Path]:
    """The directories beside `directory`, the latest name first."""
    return sorted(directory.parent.iterdir(), reverse=True) if directory.parent.is_dir() else []


def write_log_to(run: RunDirectory) -> None:
    """Have train.log written in the run's directory, by the first process alone; nothing was written to it yet."""
    run.path.mkdir(parents=True, exist_ok=True)
    for handler in list(logging.root.handlers):
        if isinstance(handler, logging.FileHandler):
            handler.close()
            handler.baseFilename = str(run.log_file)
            if rank():
                logging.root.removeHandler(handler)


@contextlib.contextmanager
def resumable(directory: Path, by: str = "python train.py resume={}") -> Iterator[None]:
    """Around training: where a signal asked to stop, say how to go on, and exit with a status of its own."""
    try:
        yield
    except Interrupted as stop:
        if rank():  # Lightning takes another status of a process for a crash, and kills the rest
            raise SystemExit(0) from None
        there = RunDirectory(directory).state != "new" or (directory / "search.yaml").exists()
        what = f"to go on: {by.format(shell_word(directory))}" if there else "before anything was written"
        print(f"{stop}; {what}", file=sys.stderr)
        raise SystemExit(stop.status) from None


def shell_word(directory: Path) -> str:
    """A directory as it is typed behind `resume=`, past the shell and past Hydra's grammar."""
    plain = re.fullmatch(r"[\w./+-]+", str(directory))
    return str(directory) if plain else shlex.quote(quoted(directory))


def runs_apart(plan: RunPlan, timeout: str | None) -> bool:
    """Whether a job of a sweep needs a process of its own."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return False
    trainer = TRAINER_DEFAULTS | plan.config["trainer"]
    one = trainer["accelerator"] == "cpu" or torch.cuda.device_count() < 2  # where "auto" is not several
    many = trainer["devices"] not in ((1, "1", "auto") if one else (1, "1")) or trainer["num_nodes"] > 1
    side_by_side = hydra.runtime.choices.get("hydra/launcher") != "basic"
    return many or side_by_side or timeout is not None


def train_job_apart(plan: RunPlan, timeout: str | None) -> None:
    """Train a job's run in a process of its own, with its share of the machine. Raises what `train_apart` does."""
    hydra = HydraConfig.get()
    seconds = Interval.parse(timeout, "timeout", steps=False).seconds
    launcher = str(hydra.runtime.choices.get("hydra/launcher"))
    devices = (TRAINER_DEFAULTS | plan.config["trainer"])["devices"]
    share = share_of_machine(launcher, hydra.job.num, devices, hydra.launcher.get("cpus_per_task"))
    train_apart(plan, share, seconds)
    log.info("job %s: finished %s", hydra.job.num, plan.run)


def run_job(config: DictConfig) -> None:
    """What `train.py` does with the configuration that Hydra composed: a run, a job of a sweep, or a search."""
    with job("train") as directory:
        if options := config.get("hparams_search"):
            with resumable(directory, "the same command"):
                print_once(search(run_config(plain(config)), plain(options), directory))
            return
        plan = plan_job(plain(config), directory)
        if not plan.finished:
            with resumable(plan.run.path):
                if runs_apart(plan, config.timeout):
                    train_job_apart(plan, config.timeout)
                else:
                    train(plan.config, plan.run, plan.resume)
        print_once(plan.run)
