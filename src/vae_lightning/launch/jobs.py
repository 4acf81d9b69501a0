"""The job of `train.py`: which run the command is about, in which process it is trained, and how the command ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from vae_lightning.config import ConfigError, Interval, check_arguments
from vae_lightning.launch.cli import error_line, plain
from vae_lightning.launch.search import search
from vae_lightning.launch.sweeps import RUN, job_variables, note_failure, train_in_subprocess
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.resume import RunPlan, find_run, plan_run, run_config
from vae_lightning.training.process import ConsoleHandler
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import Config, train
from vae_lightning.training.trainer import TRAINER_DEFAULTS

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> None:
    """Run the job that Hydra composed, and report its error: in a sweep in the log and at the end of the sweep.

    The job's directory is removed if it stays empty.
    """
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    sweep = hydra.mode == RunMode.MULTIRUN
    try:
        search_or_train(plain(config), directory, hydra)
    except Exception as error:
        line = error_line(error)
        if sweep:  # the other jobs go on
            reason = line or f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.error("job %s: %s", hydra.job.num, reason, exc_info=line is None)
            note_failure(directory.parent, int(hydra.job.num), hydra.overrides.task, reason)
        elif line is None:
            raise
        else:
            print(line, file=sys.stderr)  # here, because Hydra would add a line of its own
            raise SystemExit(2) from None
    finally:
        with contextlib.suppress(OSError):  # the directory is not empty
            directory.rmdir()


def search_or_train(config: dict[str, Any], directory: Path, hydra: HydraConf) -> None:
    """Search hyperparameters or train one run, and print the directory of the best or only run. Raises UserError."""
    check_arguments(Config, run_config(config), "")
    if options := config.get("hparams_search"):
        check_arguments(search, options, "hparams_search", given=("config", "directory"))
        for key in ("resume", "repeat", "timeout"):
            if config[key] is not None:
                raise ConfigError(
                    f"{key}={config[key]}: is not for a search; the same command resumes it, and "
                    "hparams_search.timeout limits each trial"
                )
        print(search(run_config(config), directory, **options))
        return
    plan = plan_job(config, directory, hydra)
    if plan.finished:
        log.info("%s: finished already; nothing to do", plan.run)
    elif plan.run.path.exists() and not os.access(plan.run, os.W_OK):
        raise ConfigError(f"{plan.run}: cannot be written to; choose another hydra.run.dir or hydra.sweep.dir")
    elif needs_subprocess(plan.config["trainer"], config["timeout"], hydra):
        launcher, devices = hydra.launcher, plan.config["trainer"].get("devices", "auto")
        assign_gpu = str(launcher._target_).endswith((".JoblibLauncher", ".LocalLauncher"))
        variables = job_variables(int(hydra.job.num), devices, launcher.get("cpus_per_task"), assign_gpu)
        train_in_subprocess(plan, variables, Interval.parse(config["timeout"], "timeout", steps=False).seconds)
        log.info("job %s: finished %s", hydra.job.num, plan.run)
    else:
        train_in_this_process(plan)
    rank_zero_only(print)(plan.run)


def plan_job(config: dict[str, Any], directory: Path, hydra: HydraConf) -> RunPlan:
    """Return the run of this command or of this job of a sweep: a new one in `directory`, or an existing one.

    A job of a sweep is identified by its configuration. If the sweep's directory has a run of it, that run is resumed,
    or skipped if it is finished. Raises UserError.
    """
    for key in ("resume", "repeat"):
        if hydra.job.chdir and isinstance(config[key], str) and config[key] not in ("", "auto", "latest"):
            config[key] = os.path.join(hydra.runtime.cwd, config[key])
    sweep, resume, auto = hydra.mode == RunMode.MULTIRUN, config["resume"], config["resume"] == "auto"
    given = [re.split("[=@]", word.lstrip("+~"))[0] for word in hydra.overrides.task]
    named = any(word.startswith("hydra.run.dir=") for word in hydra.overrides.hydra)
    others = any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))  # of torchrun or srun
    if others and sweep:
        raise ConfigError("-m: a sweep starts its processes itself, and cannot be started by torchrun or srun")
    if others and auto and not named:
        raise ConfigError("resume=auto: with torchrun or srun set hydra.run.dir too, so that all processes use one run")
    if config["timeout"] is not None and not sweep:
        raise ConfigError(f"timeout={config['timeout']}: is for the jobs of a sweep; trainer.max_time is for a run")
    if sweep and (config["repeat"] is not None or resume not in (None, "auto")):
        raise ConfigError("resume is for one run; a sweep is resumed by the same command in the same hydra.sweep.dir")
    if rank() and config["repeat"] is None and resume in (None, "auto"):  # process 0 creates the directory
        run = RunDirectory(directory)
        return RunPlan(run_config(config), run, resume=auto and run.checkpoints.is_dir())
    siblings = sorted(directory.parent.glob("*"), reverse=True)
    if not sweep:
        return plan_run(config, directory, given, siblings if auto and not named else [])
    # If directory 3 has the run of another configuration, job 3 gets directory 3_2.
    names = itertools.chain([directory.name], (f"{directory.name}_{n}" for n in itertools.count(2)))
    places = map(directory.with_name, names)
    free = (place for place in places if RunDirectory(place).state == "new" or find_run(run_config(config), [place]))
    earlier = sorted(directory.parent.parent.glob("*/*"), reverse=True) if auto else []
    return plan_run(config | {"resume": "auto"}, next(free), given, [*siblings, *earlier])


def needs_subprocess(trainer: dict[str, Any], timeout: str | None, hydra: HydraConf) -> bool:
    """Whether a job of a sweep is trained in a subprocess, for one of these reasons.

    - `timeout`: a job that hangs can only be stopped from outside.
    - Several devices: torch.distributed keeps its process group until the process ends.
    - joblib and Ray share worker processes among jobs: a job that is killed would stop others.
    - submitit raises an exception for a job that is killed, and the errors of the others are lost.
    """
    trainer = TRAINER_DEFAULTS | trainer
    gpus = 0 if trainer["accelerator"] == "cpu" else torch.cuda.device_count()
    one_device = trainer["devices"] in (1, "1") or (trainer["devices"] == "auto" and gpus < 2)
    simple = one_device and trainer["num_nodes"] == 1 and str(hydra.launcher._target_).endswith(".BasicLauncher")
    return hydra.mode == RunMode.MULTIRUN and (timeout is not None or not simple)


def train_in_this_process(plan: RunPlan) -> None:
    """Train a run here, and in the processes that Lightning starts for more devices: they call `run_worker`.

    If a signal stops the run, print how to resume it and exit with status 75.
    """
    os.environ[RUN] = str(plan.run.path.absolute())
    try:
        train(plan.config, plan.run, plan.resume)
    except Interrupted as stop:
        if rank():  # Lightning takes any other status of a process for a crash and kills the rest
            raise SystemExit(0) from None
        new = plan.run.state == "new"
        how = "nothing was written" if new else f"to resume it: python train.py {resume_override(plan.run.path)}"
        print(f"{stop}; {how}", file=sys.stderr)
        raise SystemExit(stop.status) from None
    finally:
        os.environ.pop(RUN, None)


def run_worker() -> None:
    """Train the run named by the environment variable RUN, in a process that this package or Lightning started."""
    level = logging.ERROR if rank() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", handlers=[ConsoleHandler(sys.stdout)])
    run = RunDirectory(os.environ[RUN])
    train_in_this_process(RunPlan(run.read_config(), run, resume=True))


def rank() -> int:
    """Return the number of this process among several; process 0 writes the files."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def resume_override(directory: Path) -> str:
    """Return `resume=DIRECTORY`, quoted for the shell and for Hydra's grammar where needed."""
    if re.fullmatch(r"[\w./+-]+", str(directory)):
        return f"resume={directory}"
    return shlex.quote(f"resume={QuotedString(str(directory), Quote.single).with_quotes()}")
