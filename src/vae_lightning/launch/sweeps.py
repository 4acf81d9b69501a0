"""Train a run in a process of its own, and report at the end of a sweep which of its jobs failed."""

from __future__ import annotations

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
from vae_lightning.runs.resume import RunPlan
from vae_lightning.training.signals import Interrupted, StopRequest

RUN = "VAE_LIGHTNING_RUN"  # the run directory that a process is to train: see jobs.train_given
SWEEP = "VAE_LIGHTNING_SWEEP"  # a sweep's directory, for the report at its end
FAILED = "failed"  # in a sweep's directory: a file for each job that is not a finished run
PATIENCE = 60  # seconds between asking a process to stop and killing it


class JobError(UserError):
    """A run that ended without a result; `interrupted` if it can be resumed."""

    def __init__(self, reason: str, interrupted: bool = False) -> None:
        super().__init__(reason)
        self.interrupted = interrupted


def train_apart(
    plan: RunPlan,
    environment: Mapping[str, str],
    timeout: float | None = None,
    watch: Callable[[], bool] = lambda: False,
) -> bool:
    """Train a run in a process of its own, and wait for it. Returns whether `watch`, called twice a second, ended it.

    Raises JobError with the last line that the process printed where it failed, was killed, or took longer than
    `timeout` seconds, and Interrupted where a signal asked this process to stop, which is passed on.
    """
    (plan.run.write_config if plan.resume else plan.run.create)(plan.config)
    with StopRequest().listening(), tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "vae_lightning.launch.commands"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=child_environment() | {RUN: str(plan.run.path.absolute()), **environment},
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            ended = _wait(process, timeout, watch)
        finally:
            _stop(process)
        errors.seek(0)
        lines = errors.read().strip().splitlines() or ["without a word"]
    status = process.returncode
    if ended or status == 0:
        return ended
    if status == 2 and not plan.resume and not plan.run.environment_file.exists():
        plan.run.config_file.unlink()  # refused before anything was written
    if status < 0:
        raise JobError(f"killed by {signal.Signals(-status).name}; the next time it is resumed", interrupted=True)
    known = status in (2, Interrupted.status)
    raise JobError(lines[-1] if known else f"exit status {status}: {lines[-1]}", status == Interrupted.status)


def child_environment() -> dict[str, str]:
    """The environment of a process that trains; it finds the same modules.

    Without Slurm's variables, from which Lightning would conclude that it is one of several tasks, without
    HYDRA_FULL_ERROR, which would have it print a traceback in place of its reason, and without the sweep's directory,
    where it would find the reasons of other jobs.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    for name in ("HYDRA_FULL_ERROR", SWEEP):
        environment.pop(name, None)
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _wait(process: subprocess.Popen[bytes], timeout: float | None, watch: Callable[[], bool]) -> bool:
    end = time.monotonic() + (timeout or float("inf"))
    while True:
        try:
            process.wait(0.5)
            return False
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                raise JobError(f"took longer than timeout={timeout:.0f}s; the next time it is resumed") from None
            if watch():
                return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    """In the child: have Linux send SIGTERM when the process that waits for it is gone."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def share_of_machine(job: int, devices: Any, cpus: int | None, gpus_in_turn: bool) -> dict[str, str]:
    """Environment of job `job` among others on this machine: its number of threads, and one of several GPUs.

    `gpus_in_turn` is for launchers that assign no GPUs themselves; a job of several devices chooses them itself.
    """
    environment = {"OMP_NUM_THREADS": str(cpus)} if cpus else {}
    if gpus_in_turn and devices in (1, "auto"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        gpus = [gpu for gpu in visible.split(",") if gpu]
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
    return environment


def note_failure(sweep: Path, job: int, overrides: Sequence[str], reason: str) -> None:
    """Write down in a sweep's directory that a job failed, and why, for the report at its end."""
    (sweep / FAILED).mkdir(parents=True, exist_ok=True)
    (sweep / FAILED / f"{job}.txt").write_text(f"job {job} ({' '.join(overrides)}): {reason}\n", encoding="utf-8")


class SweepDirectory(Callback):
    """Hydra's callback at the start of a sweep: notes its directory, and removes the failures of the time before."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        os.environ[SWEEP] = str(directory)
        for file in (directory / FAILED).glob("*.txt"):
            file.unlink()
        StopRequest().listen()  # jobs that train have their own; this is for the process that waits for them


def report_failures() -> list[str]:
    """At the end of a sweep: a line for each job that failed, what it was to do and why it did not. Else nothing."""
    files = list((Path(os.environ.pop(SWEEP, os.devnull)) / FAILED).glob("*.txt"))
    return [file.read_text(encoding="utf-8").strip() for file in sorted(files, key=lambda file: int(file.stem))]
