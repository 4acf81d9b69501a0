"""A run directory: what a training run leaves behind, and how a trained model is read back from it.

config.yaml        the whole resolved configuration: enough to rebuild the run
environment.json   versions, commit, device, command line, parameter counts
metrics.json       the test metrics and what they were measured on
history.csv, train.log, checkpoints/, figures/, tensorboard/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from torch import nn

from vae_lightning.config import ConfigError, UserError, build
from vae_lightning.data import MNISTDataModule
from vae_lightning.model import ImageModel

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy")


SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it was built so: ten times quicker


class RunError(UserError):
    """A run directory that cannot be written, or is not whole."""


def start_run(directory: Path, config: dict[str, Any]) -> None:
    """Create `directory` with its config.yaml. Raises RunError if it already holds a run."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with (directory / "config.yaml").open("x") as file:  # "x": of two jobs that choose one directory, one wins
            yaml.safe_dump(config, file, sort_keys=False)
    except FileExistsError:
        raise RunError(f"{directory}: already holds a run; choose another hydra.run.dir") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, so that `path` holds the old text or the new one and never a part of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def describe_environment(model: ImageModel, device: torch.device, seed: int) -> dict[str, Any]:
    """What a reader needs to judge or repeat a run: code, versions, machine, command and model size."""
    return {
        "command": " ".join(sys.argv),
        "seed": seed,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": {None: None, "": True}.get(_git("status", "--porcelain"), False),
        "parameters": count_parameters(model),
        "encoder_parameters": count_parameters(model.encoder),
        "decoder_parameters": count_parameters(model.decoder),
    }


def count_parameters(module: nn.Module) -> int:
    """The number of trained values in `module`."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def device_name(device: torch.device) -> str:
    """The device in words, such as "NVIDIA H100" or "AMD EPYC (2 cores)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{'' if device.type == 'cpu' else f'{device.type}, '}{model} ({os.cpu_count()} cores)"


def load_run(path: str | Path, trust: Iterable[str] = ()) -> ImageModel:
    """The trained model of a run directory (its best checkpoint) or of one checkpoint in it, in evaluation mode.

    Nothing is unpickled: config.yaml says what to build, and the checkpoint is read as weights only. A configuration
    that names code outside vae_lightning and torch is refused, unless `trust` has the module or package: a backbone of
    your own in wide.py loads with `trust=["wide"]`. The whole configuration of the run is `model.config`.
    Raises RunError for a directory or checkpoint that is not whole, ConfigError for a configuration that does not fit.
    """
    directory = run_directory(path)
    checkpoint = Path(path) if Path(path).suffix == ".ckpt" else directory / "checkpoints" / "best.ckpt"
    config = load_config(path, trust)
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except OSError as error:
        raise RunError(f"{checkpoint}: no whole run is there ({error.strerror})") from error
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{checkpoint}: damaged, or holds more than weights; it was not loaded") from error
    model = build(config["model"], ImageModel, "model")
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(f"{checkpoint}: not the weights of the model in {directory / 'config.yaml'}") from error
    model.config = config
    return model.eval()


@dataclass
class Run:
    """A trained run, opened for use: where it lies, its model on a device, and its data."""

    directory: Path
    model: ImageModel
    data: MNISTDataModule


def open_run(
    path: str | Path, accelerator: str = "auto", trust: Iterable[str] = (), data_root: str | None = None
) -> Run:
    """The model of a run, on `accelerator` (auto, cpu or gpu), with the data that it was trained on, of its protocol.

    `data_root` says where the data lie on this machine, if not where the run found them.
    Raises what `load_run` does, ConfigError where there is no GPU, and DataError for data that are not whole.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator=gpu: PyTorch finds none on this machine. Allowed: auto, cpu")
    model = load_run(path, trust)
    model.to("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    spec = model.config["data"] | ({"root": data_root} if data_root else {})
    data = build(spec, MNISTDataModule, "data", seed=model.config["seed"])
    data.setup()
    return Run(run_directory(path), model, data)


def run_directory(path: str | Path) -> Path:
    """The run directory that `path` is, or that a checkpoint at `path` belongs to."""
    path = Path(path)
    return path.resolve().parent.parent if path.suffix == ".ckpt" else path


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration of the run at `path`. Raises RunError where there is none."""
    file = run_directory(path) / "config.yaml"
    try:
        config = yaml.load(file.read_text(), Loader=SafeLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: no whole run is there ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise RunError(f"{file}: is not the configuration of a run")
    return config


def load_config(path: str | Path, trust: Iterable[str] = ()) -> dict[str, Any]:
    """The configuration of the run at `path`, to build things from. Raises RunError if it names code not trusted."""
    config = read_config(path)
    allowed = ("vae_lightning", "torch", *trust)
    for key, target in _targets({name: config.get(name) for name in ("model", "data")}):
        if not any(f"{target}.".startswith(f"{name}.") for name in allowed):
            module = str(target).rpartition(".")[0] or target
            raise RunError(
                f"{run_directory(path) / 'config.yaml'}: {key}={target}: not in vae_lightning or torch, so to load "
                f"it is to run code that was named by the run; where you know it, trust=[{module}] allows it"
            )
    return config


def _targets(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a configuration, with its dotted key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        key = f"{path}.{name}".lstrip(".")
        if name == "_target_":
            yield key, value
        yield from _targets(value, key)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the code that runs; None where it is no checkout, or git is not there."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
