"""Jobs that train in processes of their own, and what became of those that failed.

A job of a sweep runs apart from the process that started it where several run side by side, where it trains on several
devices, and where it may take only so long. A process that is killed, leaks or hangs then harms no other, and to
Lightning, which starts a command anew for each device, it is a command like any other: `train.py resume=RUN_DIR`.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vae_lightning.config import UserError
from vae_lightning.runs.loading import untrusted
from vae_lightning.runs.resume import RunPlan
from vae_lightning.training.signals import Interrupted, StopRequest

FAILED = "failed"  # in a sweep's directory: a file for each job that is not a finished run
PATIENCE = 60  # seconds between asking a job to stop and killing it


class JobError(UserError):
    """A job that ended without a result; `again` where it was interrupted, and the next time goes on."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def command_for(plan: RunPlan) -> list[str]:
    """What trains, or goes on to train, the run of an assignment; its configuration is written for it to find."""
    trust = ",".join(dict.fromkeys(module for _, _, module in untrusted(plan.config)))
    directory = quoted(plan.run.path)
    return [
        sys.executable,
        "-m",
        "vae_lightning.launch.commands",
        f"resume={directory}",
        f"hydra.run.dir={directory}",
        f"trust=[{trust}]",
    ]


def quoted(path: Path) -> str:
    """A path as a value on Hydra's command line, whatever its characters."""
    # A backslash is one by itself, and has to be doubled only before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), str(path))
    return f"'{escaped}'"


def train_apart(
    plan: RunPlan,
    environment: Mapping[str, str],
    timeout: float | None = None,
    watch: Callable[[], bool] = lambda: False,
    words: Sequence[str] = (),
) -> None:
    """Train the run of `run` in a process of its own, and wait for it; `watch`, looked at now and then, may end it.

    Raises JobError with the reason it gave where it failed, was killed, or took longer than `timeout` seconds, and
    Interrupted where a signal asked this process to stop, which is passed on.
    """
    new = not plan.resume
    if new:
        plan.run.create(plan.config)
    stop = StopRequest()
    with stop.listening(), tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [*command_for(plan), *words],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**own_environment(), **environment},
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            reason = _wait(process, timeout, watch)
        except BaseException:
            _stop(process)
            raise
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode == 0 or reason == "ended":
        return
    if new and process.returncode == 2 and not plan.run.environment_file.exists():
        plan.run.config_file.unlink()  # refused, before anything began
    again = process.returncode < 0 or process.returncode == Interrupted.status
    raise JobError(reason or _reason(process.returncode, lines), again and reason is None)


def own_environment() -> dict[str, str]:
    """This process's environment for a child, which finds the same modules.

    Without Slurm's variables, in which Lightning would take a job for one task of several, and without what
    `one_line_errors` sets.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    kept.pop("HYDRA_FULL_ERROR", None)
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _wait(process: subprocess.Popen[bytes], timeout: float | None, watch: Callable[[], bool]) -> str | None:
    started = time.monotonic()
    while True:
        try:
            process.wait(0.5)
            return None
        except subprocess.TimeoutExpired:
            pass
        if timeout and time.monotonic() - started > timeout:
            _stop(process)
            return f"took longer than timeout={timeout:.0f}s; the next time it goes on from where it was"
        if watch():
            _stop(process)
            return "ended"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(status: int, lines: Sequence[str]) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; the next time it goes on from where it was"
    last = lines[-1] if lines else "without a word"
    return last if status in (2, Interrupted.status) else f"exit status {status}: {last}"


def _end_with_parent() -> None:
    """In the child: have Linux send SIGTERM when the process that waits for it is gone."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def share_of_machine(launcher: str, job: int, devices: Any, cpus: int | None) -> dict[str, str]:
    """Environment of job `job` among others on this machine: its threads, and its GPU, dealt round.

    joblib and Ray tell their workers how many threads each may have; Ray and Slurm deal GPUs themselves.
    """
    environment = {}
    if cpus:
        environment["OMP_NUM_THREADS"] = str(cpus)
    if launcher in ("joblib", "submitit_local") and devices in (1, "auto"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [gpu for gpu in visible.split(",") if gpu] if visible is not None else _gpus()
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
    return environment


def _gpus() -> list[str]:
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def note_failure(sweep: Path, job: int, overrides: Sequence[str], reason: str) -> None:
    """Leave in a sweep's directory that a job failed, and why, for the report at its end."""
    (sweep / FAILED).mkdir(parents=True, exist_ok=True)
    (sweep / FAILED / f"{job}.txt").write_text(f"job {job} ({' '.join(overrides)}): {reason}\n")


def forget_failures(sweep: Path) -> None:
    """Before a sweep is run again."""
    for file in (sweep / FAILED).glob("*.txt"):
        file.unlink()


def failures(sweep: Path) -> list[str]:
    """A line for each job of a sweep that failed: what it was to do, and why it did not."""
    files = sorted((sweep / FAILED).glob("*.txt"), key=lambda file: (len(file.name), file.name))
    return [file.read_text().strip() for file in files]


SWEEP = "VAE_LIGHTNING_SWEEP"  # its directory, for the report at the end


class SweepDirectory(Callback):
    """Hydra's callback that notes where a sweep leaves its runs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        os.environ[SWEEP] = str(directory)
        forget_failures(directory)
        StopRequest().listen()  # jobs that train have their own; this is for the process that waits for them


def report_failures() -> list[str]:
    """What is to be said at the end of a sweep: a line for each job that failed. Nothing where there is no sweep."""
    directory = os.environ.pop(SWEEP, None)
    return failures(Path(directory)) if directory else []
