"""What `train.py` does: which run the command is about, where it is trained, and how the command ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vae_lightning.config import ConfigError, Interval, check_arguments
from vae_lightning.launch.cli import one_line, plain, print_once, rank
from vae_lightning.launch.search import search
from vae_lightning.launch.sweeps import RUN, note_failure, share_of_machine, train_apart
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.resume import RunPlan, find_run, plan_run, run_config
from vae_lightning.training.history import ConsoleHandler
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train
from vae_lightning.training.trainer import TRAINER_DEFAULTS

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> None:
    """What the configuration that Hydra composed asks for: a run, a job of a sweep, or a search."""
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    with job(hydra, directory):
        if config.get("hparams_search"):
            options = plain(config.hparams_search)
            check_arguments(search, options, "hparams_search", given=("config", "directory"))
            with resumable(directory, "to resume it: the same command"):
                print_once(search(run_config(plain(config)), directory, **options))
            return
        plan = plan_job(plain(config), directory, hydra)
        if plan.finished:
            log.info("%s: finished already; nothing to do", plan.run)
        elif needs_a_process(hydra, TRAINER_DEFAULTS | plan.config["trainer"], config.timeout):
            train_job_apart(plan, config.timeout, hydra)
        else:
            train_here(plan)
        print_once(plan.run)


@contextlib.contextmanager
def job(hydra: HydraConf, directory: Path) -> Iterator[None]:
    """Around a job: removes its directory if it stays empty. A sweep notes the job's error and continues."""
    sweep = hydra.mode == RunMode.MULTIRUN
    try:
        if not os.access(directory, os.W_OK):
            raise ConfigError(f"hydra.{'sweep' if sweep else 'run'}.dir={directory}: cannot be written to")
        yield
    except Exception as error:
        line = one_line(error, "train")
        if sweep:
            reason = line or f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.error("job %s: %s", hydra.job.num, reason)
            note_failure(directory.parent, int(hydra.job.num), hydra.overrides.task, reason)
        if sweep or line is None:
            raise
        print(line, file=sys.stderr)  # here, before Hydra adds a line of its own
        raise SystemExit(2) from None
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            directory.rmdir()


def plan_job(config: dict[str, Any], directory: Path, hydra: HydraConf) -> RunPlan:
    """The run that this command, or this job of a sweep, is about: a new one in `directory`, or one that exists.

    A job of a sweep is known by its configuration: one that the sweep's directory has already is resumed, or skipped if
    it is finished. Raises UserError.
    """
    sweep, auto = hydra.mode == RunMode.MULTIRUN, config["resume"] == "auto"
    given = [re.split("[=@]", word.lstrip("+~"))[0] for word in hydra.overrides.task]
    named = any(word.startswith("hydra.run.dir=") for word in hydra.overrides.hydra)
    others = any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))  # of torchrun or srun
    if others and sweep:
        raise ConfigError("-m: a sweep starts processes itself, and cannot be started by torchrun or srun")
    if others and auto and not named:
        raise ConfigError("resume=auto: with torchrun or srun say hydra.run.dir=… too: each process looks for itself")
    if config["timeout"] is not None and not sweep:
        raise ConfigError(f"timeout={config['timeout']}: is for each job of a sweep; trainer.max_time is for a run")
    if (
        rank() and config["repeat"] is None and config["resume"] in (None, "auto")
    ):  # the first process looks and creates
        run = RunDirectory(directory)
        return RunPlan(run_config(config), run, resume=auto and run.checkpoints.is_dir())
    if not sweep:
        return plan_run(config, directory, given, siblings(directory) if auto and not named else [])
    if config["repeat"] is not None or config["resume"] not in (None, "auto"):
        raise ConfigError("resume is for one run; a sweep is resumed by the same command in the same hydra.sweep.dir")
    # Where job 3 of another sweep is in directory 3, this one's job 3 is in 3_2.
    places = itertools.chain([directory], (directory.with_name(f"{directory.name}_{n}") for n in itertools.count(2)))
    free = (p for p in places if RunDirectory(p).state == "new" or find_run(run_config(config), [p]))
    earlier = sorted(directory.parent.parent.glob("*/*"), reverse=True) if auto else []
    return plan_run(config | {"resume": "auto"}, next(free), given, [*siblings(directory), *earlier])


def siblings(directory: Path) -> list[Path]:
    """The directories beside `directory`, the latest name first."""
    return sorted(directory.parent.iterdir(), reverse=True) if directory.parent.is_dir() else []


def needs_a_process(hydra: HydraConf, trainer: dict[str, Any], timeout: str | None) -> bool:
    """Whether a job of a sweep trains in a process of its own, for one of these reasons.

    - `timeout`: a job that hangs can only be stopped from outside.
    - Several devices: a process group of torch.distributed is there until its process ends.
    - joblib and Ray share worker processes among jobs, and one that is killed takes other jobs along.
    - submitit raises an exception for a job that is killed, and the reasons of the others are lost.
    """
    if hydra.mode != RunMode.MULTIRUN:
        return False
    gpus = 0 if trainer["accelerator"] == "cpu" else torch.cuda.device_count()
    one_device = trainer["devices"] in (1, "1") or (trainer["devices"] == "auto" and gpus < 2)
    one_after_the_other = str(hydra.launcher._target_).endswith(".BasicLauncher")
    return timeout is not None or not one_device or trainer["num_nodes"] > 1 or not one_after_the_other


def train_job_apart(plan: RunPlan, timeout: str | None, hydra: HydraConf) -> None:
    """Train a job's run in a process of its own, with its share of the machine. Raises what `train_apart` does."""
    seconds = Interval.parse(timeout, "timeout", steps=False).seconds
    launcher, devices = hydra.launcher, (TRAINER_DEFAULTS | plan.config["trainer"])["devices"]
    assigns_no_gpus = str(launcher._target_).endswith((".JoblibLauncher", ".LocalLauncher"))
    share = share_of_machine(int(hydra.job.num), devices, launcher.get("cpus_per_task"), assigns_no_gpus)
    train_apart(plan, share, seconds)
    log.info("job %s: finished %s", hydra.job.num, plan.run)


def train_here(plan: RunPlan) -> None:
    """Train a run in this process, and in those that Lightning starts, one a device: they run `train_given`."""
    os.environ[RUN] = str(plan.run.path.absolute())
    try:
        with resumable(plan.run.path):
            train(plan.config, plan.run, plan.resume)
    finally:
        os.environ.pop(RUN, None)


def train_given() -> None:
    """Train the run of a process that `train_apart` or Lightning started: its directory has the configuration."""
    level = logging.ERROR if rank() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", handlers=[ConsoleHandler(sys.stdout)])
    run = RunDirectory(os.environ[RUN])
    train_here(RunPlan(run.read_config(), run, resume=True))


@contextlib.contextmanager
def resumable(directory: Path, how: str = "") -> Iterator[None]:
    """Around training: where a signal asked to stop, say how to resume, and exit with a status of its own."""
    try:
        yield
    except Interrupted as stop:
        if rank():  # Lightning takes another status of a process for a crash, and kills the rest
            raise SystemExit(0) from None
        if not how and RunDirectory(directory).state == "new":
            how = "before anything was written"
        how = how or f"to resume it: python train.py {resume_word(directory)}"
        print(f"{stop}; {how}", file=sys.stderr)
        raise SystemExit(stop.status) from None


def resume_word(directory: Path) -> str:
    """`resume=DIRECTORY` as it is typed, past the shell and past Hydra's grammar."""
    if re.fullmatch(r"[\w./+-]+", str(directory)):
        return f"resume={directory}"
    # A backslash is one by itself, and has to be doubled only before a quote.
    quoted = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), str(directory))
    return shlex.quote(f"resume='{quoted}'")
