"""Train one run that is killed many times: python killed.py DIRECTORY KILLS SEED OVERRIDE…

Everything is imported once. Each attempt is a fork of this process, killed by SIGKILL at a random time; the next one
resumes the run. The last attempt finishes. Prints the saved step after each attempt.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import DATA, composed

from vae_lightning.data.torchvision_sets import load_images
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.loading import load_checkpoint
from vae_lightning.training.train import train


def start(config: dict, directory: Path) -> int:
    """Start a process that trains, and return its id."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = 1
    try:
        torch.set_num_threads(1)
        train(config, directory, resume=(directory / "config.yaml").exists())
        status = 0
    finally:
        os._exit(status)


def wait_for_saves(file: Path, times: int, process: int) -> tuple[int, float]:
    """Wait until `file` was written `times` times or the process has ended; return the count and the last interval."""
    seen, saves, last, pause = file.stat().st_mtime_ns if file.exists() else 0, 0, 0.0, 0.1
    while saves < times and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
        now = file.stat().st_mtime_ns if file.exists() else 0
        if now != seen:
            pause = time.monotonic() - last if saves else 0.03
            seen, saves, last = now, saves + 1, time.monotonic()
    return saves, pause


def main() -> None:
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    run, config = RunDirectory(directory), composed(*sys.argv[4:])
    moments = random.Random(seed)
    load_images("MNIST", DATA.resolve())  # once, for all attempts
    os.waitpid(start(config, directory.with_name("uninterrupted")), 0)
    for _ in range(kills):
        process = start(config, directory)
        saves, pause = wait_for_saves(run.last_checkpoint, moments.randint(0, 2), process)
        time.sleep(moments.uniform(0, 1.5) * pause)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        step = load_checkpoint(run.last_checkpoint)["global_step"] if run.last_checkpoint.exists() else 0
        print(f"{saves} saves, step {step}", flush=True)
        if run.state == "finished":
            break
    while run.state != "finished":
        process = start(config, directory)
        if os.waitpid(process, 0)[1]:
            raise SystemExit("the last attempt failed")


if __name__ == "__main__":
    main()
