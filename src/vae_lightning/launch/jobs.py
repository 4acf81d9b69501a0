"""The job of `train.py`: train the run that the command is about, or search; and list the failed jobs of a sweep."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from vae_lightning.config import ConfigError, check_arguments
from vae_lightning.launch.errors import error_line, quoted
from vae_lightning.launch.plan import plan_run
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.signals import Interrupted, StopRequest

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> None:
    """Run the job that Hydra composed. A failed job of a sweep is logged and noted, and the other jobs go on."""
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    if getattr(rank_zero_only, "rank", 0):  # the first process writes the log
        logging.root.setLevel(logging.ERROR)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        rank_zero_only(print)(search_or_train(plain, directory, hydra))
    except Exception as error:
        line = error_line(error)
        if hydra.mode == RunMode.MULTIRUN:
            text = f"{directory.name}: {line or repr(error)}"
            log.error("%s", text, exc_info=line is None)
            with FailedJobs.file(hydra).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
        elif line is None:
            raise
        else:
            print(line, file=sys.stderr)  # here, because Hydra would add a line of its own
            raise SystemExit(2) from None
    finally:
        with contextlib.suppress(OSError):  # Hydra created it; here it is not empty
            directory.rmdir()


def search_or_train(config: dict[str, Any], directory: Path, hydra: HydraConf) -> Path:
    """Search hyperparameters, or train one run; return the directory of the best or only run. Raises UserError."""
    resume, options = config.pop("resume"), config.pop("hparams_search", None)
    sweep, named = hydra.mode == RunMode.MULTIRUN, resume not in (None, "auto")
    if named and (sweep or options):
        raise ConfigError(f"resume={resume}: is for one run; the same command resumes a sweep or a search")
    if config["init"] is None:
        del config["init"], config["init_strict"]  # runs of earlier versions do not have them
    elif config["init"] == "latest":
        config["init"] = str(RunDirectory.locate("latest")[0].path.resolve())
    else:
        config["init"] = os.path.join(hydra.runtime.cwd, config["init"])
    if sweep or options:
        resume = "auto"
        use_one_device(config["trainer"], hydra.job.num if sweep else 0)
    if options:
        try:
            from vae_lightning.launch.search import search
        except ModuleNotFoundError:
            advice = "is not installed; pip install -e '.[optuna]' installs it"
            raise ConfigError(f"hparams_search=optuna: {advice}") from None
        check_arguments(search, options, "hparams_search", given=("config", "directory"))
        return search(config, directory, **options)
    if sweep:
        if directory in FailedJobs.started:
            raise ConfigError(f"{directory}: another job of this sweep has the same overrides")
        FailedJobs.started.add(directory)
        torch.set_num_threads(hydra.launcher.get("cpus_per_task") or torch.get_num_threads())
    if named and resume != "latest":
        resume = os.path.join(hydra.runtime.cwd, str(resume))  # hydra.job.chdir may have changed the directory
    plan = plan_run(config, directory, hydra.overrides.task, resume)
    try:
        plan.carry_out()
    except Interrupted as stop:
        if "submitit" in getattr(signal.getsignal(signal.SIGUSR2), "__module__", ""):
            signal.raise_signal(signal.SIGUSR2)  # submitit queues the job again
        if sweep:
            raise
        if getattr(rank_zero_only, "rank", 0):  # Lightning takes another status for a crash and kills the other ranks
            raise SystemExit(0) from None
        print(f"{stop}; to resume it: python train.py {quoted('resume', str(plan.run.path))}", file=sys.stderr)
        raise SystemExit(stop.status) from None
    return plan.run.path


def use_one_device(trainer: dict[str, Any], number: int) -> None:
    """Let one of several runs of a process use one device: the GPU of that number, if the launcher assigned none.

    Raises ConfigError for several devices, since torch.distributed serves one run of a process.
    """
    if trainer["devices"] not in (1, "1", "auto") or trainer["num_nodes"] != 1 or "WORLD_SIZE" in os.environ:
        advice = "a job of a sweep or search trains on one device; start runs on more one by one, with resume=auto"
        raise ConfigError(f"trainer.devices={trainer['devices']}: {advice}")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


class FailedJobs(Callback):
    """Hydra callback: list the failed jobs at the end of a sweep, and exit with status 2."""

    started: ClassVar[set[Path]] = set()  # directories of the jobs of this process

    @staticmethod
    def file(hydra: HydraConf) -> Path:
        return Path(hydra.sweep.dir) / "failed.txt"

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.file(config.hydra).unlink(missing_ok=True)  # of an earlier start
        self.started.clear()
        StopRequest().listen()  # for the process that waits; jobs install their own handlers

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.file(config.hydra).exists():
            print(self.file(config.hydra).read_text(encoding="utf-8").strip(), file=sys.stderr)
            raise SystemExit(2)
