"""Train a run in a subprocess, and report the failed jobs at the end of a sweep."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vae_lightning.config import UserError
from vae_lightning.launch.cli import TRACEBACK
from vae_lightning.runs.resume import RunPlan
from vae_lightning.training.signals import Interrupted, StopRequest

RUN = "VAE_LIGHTNING_RUN"  # environment variable: the run directory that a subprocess trains, see jobs.run_worker
FAILED = "failed"  # in a sweep's directory: one file for each failed job
PATIENCE = 60  # seconds between SIGTERM and SIGKILL


class JobError(UserError):
    """A run that ended without a result. `interrupted` if it can be resumed."""

    def __init__(self, reason: str, interrupted: bool = False) -> None:
        super().__init__(reason)
        self.interrupted = interrupted


def train_in_subprocess(
    plan: RunPlan,
    variables: Mapping[str, str],
    timeout: float | None = None,
    watch: Callable[[], bool] = lambda: False,
) -> bool:
    """Train a run in a subprocess, wait for it, and return whether `watch` stopped it.

    `variables` are added to its environment. `watch` is called twice a second, and returns True to stop the run.
    Raises JobError with the subprocess's last line of error output if it failed, was killed, or ran longer than
    `timeout` seconds. Raises Interrupted if a signal asked this process to stop; the subprocess is stopped too.
    """
    (plan.run.write_config if plan.resume else plan.run.create)(plan.config)
    # With SLURM_* Lightning would act as one of several tasks. The subprocess reports an error in its last line.
    dropped = ("SLURM_", "HYDRA_FULL_ERROR", TRACEBACK)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), RUN: str(plan.run.path.absolute())}
    end, stopped = time.monotonic() + (timeout or float("inf")), False
    with StopRequest().listening(), tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "vae_lightning.launch.commands"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**inherited, **own, **variables},
            preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None and not (stopped := watch()):
                if time.monotonic() > end:
                    raise JobError(f"took longer than timeout={timeout:.0f}s and was stopped")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        errors.seek(0)
        last_line = (errors.read().strip().splitlines() or ["no error output"])[-1]
    status = process.returncode
    if stopped or status == 0:
        return stopped
    if status == 2 and not plan.resume and not plan.run.environment_file.exists():
        plan.run.config_file.unlink()  # the configuration was refused, and nothing else was written
    if status < 0:
        raise JobError(f"killed by {signal.Signals(-status).name}; it can be resumed", interrupted=True)
    known = status in (2, Interrupted.status)
    raise JobError(last_line if known else f"exit status {status}: {last_line}", status == Interrupted.status)


def _stop_with_parent() -> None:
    """Make Linux send SIGTERM to this subprocess when the process that waits for it ends."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def job_variables(job: int, devices: Any, cpus: int | None, assign_gpu: bool) -> dict[str, str]:
    """Return the environment variables of one of several jobs on this machine: its number of threads and its GPU.

    `assign_gpu` assigns the GPUs in turn, for launchers that do not assign them. A job of several devices gets all.
    """
    variables = {"OMP_NUM_THREADS": str(cpus)} if cpus else {}
    if assign_gpu and devices in (1, "auto"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        gpus = [gpu for gpu in visible.split(",") if gpu]
        if len(gpus) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
    return variables


def note_failure(sweep: Path, job: int, overrides: Sequence[str], reason: str) -> None:
    """Write the reason of a failed job into the sweep's directory, for the report at the end."""
    (sweep / FAILED).mkdir(parents=True, exist_ok=True)
    (sweep / FAILED / f"{job}.txt").write_text(f"job {job} ({' '.join(overrides)}): {reason}\n", encoding="utf-8")


class SweepDirectory(Callback):
    """Hydra callback: print one line for each failed job at the end of a sweep, and exit with status 2."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for file in failures(config):  # of an earlier start
            file.unlink()
        StopRequest().listen()  # for the process that waits; jobs install their own handlers

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        files = failures(config)
        for file in files:
            print(file.read_text(encoding="utf-8").strip(), file=sys.stderr)
        if files:
            raise SystemExit(2)


def failures(config: DictConfig) -> list[Path]:
    """Return the files that `note_failure` wrote into a sweep's directory, in the order of the jobs."""
    return sorted(Path(config.hydra.sweep.dir).rglob(f"{FAILED}/*.txt"), key=lambda file: int(file.stem))
