"""The content of environment.json: code, versions, machine and data of a run."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae_lightning.data.module import ImageDataModule
from vae_lightning.models.base import ImageModel

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy")
LONGEST_DIFF = 100_000  # characters of uncommitted changes


def describe_environment(model: ImageModel, device: torch.device, data: ImageDataModule) -> dict[str, Any]:
    """Describe what is needed to repeat a run: code, versions, machine, command, data and model size."""
    status = _git("status", "--porcelain")
    return {
        "command": shlex.join(sys.argv),
        "seed": data.seed,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": None if status is None else not status,
        "git_diff": (_git("diff", "HEAD") or "")[:LONGEST_DIFF],
        "git_untracked": [line[3:] for line in (status or "").splitlines() if line.startswith("?? ")],
        "data_checksums": data.checksums(),
        "parameters": count_parameters(model),
        "encoder_parameters": count_parameters(model.encoder),
        "decoder_parameters": count_parameters(model.decoder),
    }


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters of `module`."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def device_name(device: torch.device) -> str:
    """Return the name of the device, such as "NVIDIA H100" or "AMD EPYC (2 cores)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{'' if device.type == 'cpu' else f'{device.type}, '}{model} ({os.cpu_count()} cores)"


def _git(*arguments: str) -> str | None:
    """Return the output of git for this package; None if it is not in a checkout, or git is not installed."""
    try:
        # Without locks: if git were killed, a lock would stay and block the next `git commit`.
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        ran = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
        return ran.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
