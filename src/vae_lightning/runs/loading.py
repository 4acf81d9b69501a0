"""Load a trained model from its run directory, without unpickling."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from vae_lightning.config import ConfigError, build
from vae_lightning.data.module import ImageDataModule
from vae_lightning.models.base import ImageModel
from vae_lightning.runs.directory import RunDirectory, RunError, StrPath

log = logging.getLogger(__name__)


def load_run(path: StrPath) -> ImageModel:
    """Load the model of a run directory (its best checkpoint) or of one of its checkpoints, in evaluation mode.

    Nothing is unpickled: config.yaml says what to build, a subclass of the part that it stands for, and the checkpoint
    is read as weights only. Classes of your own are imported by their names. `model.config` is the configuration of
    the run. A checkpoint that Lightning's Trainer wrote without train.py needs no config.yaml.
    Raises RunError for an incomplete directory or damaged checkpoint, ConfigError for a wrong configuration.
    """
    run, checkpoint = RunDirectory.locate(path)
    alone = checkpoint == Path(path) and not run.config_file.exists()
    config = {} if alone else run.read_config()
    content = load_checkpoint(checkpoint)
    if alone:
        if not {"_target_", "hyper_parameters"} <= set(content):
            raise RunError(f"{checkpoint}: has no config.yaml beside it; load it with VAE.load_from_checkpoint(path)")
        config = {"model": {"_target_": content["_target_"], **content["hyper_parameters"]}}
    saved = content.get("hyper_parameters", {}) | dict.fromkeys(config["model"])
    of_data = {key: saved[key] for key in ("image_shape", "classes") if saved.get(key) is not None}
    model = build(config["model"], ImageModel, "model", **of_data)
    load_weights(content["state_dict"], model, checkpoint)
    model.needs_images = False
    data = next((value for value in content.values() if isinstance(value, dict) and "data.pixels" in value), {})
    model.protocol = {key: value for key, value in data.items() if key.startswith("data.")}
    model.config = config
    return model.eval()


def load_weights(weights: dict[str, Any], model: ImageModel, checkpoint: Path) -> None:
    """Load `weights` into `model`. Raises RunError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(f"{checkpoint}: its weights do not fit the configured model") from error


def weights_from(path: StrPath, model: ImageModel, strict: bool = True) -> dict[str, Tensor]:
    """Return the weights of a run or checkpoint that fit `model`, and log one line for each tensor that does not.

    Raises ConfigError if a tensor does not fit and `strict` is true, and if none fits; and the errors of
    `load_checkpoint`.
    """
    ours, theirs = model.state_dict(), load_checkpoint(RunDirectory.locate(path)[1])["state_dict"]
    fitting = {name: weight for name, weight in theirs.items() if name in ours and weight.shape == ours[name].shape}
    different = [name for name in {**ours, **theirs} if name not in fitting]
    for name in different:
        shapes = (list(weights[name].shape) if name in weights else "missing" for weights in (ours, theirs))
        log.warning("init: %s is %s here, %s in the other run", name, *shapes)
    if not fitting or (different and strict):
        advice = "; init_strict=false starts them anew" if fitting else ""
        raise ConfigError(f"init={path}: {len(different)} tensors, listed above, do not fit this model{advice}")
    return fitting


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises RunError if it is damaged, or has more than tensors and plain values."""
    if not file.is_file():
        raise RunError(f"{file}: no such checkpoint")
    try:
        with ZipFile(file) as archive:
            if archive.testzip():  # PyTorch does not verify the checksums that it writes
                raise ValueError
        content = torch.load(file, map_location="cpu", weights_only=True)
        content["state_dict"].items()
        return content
    except Exception as error:  # of many types, for damaged and altered files
        raise RunError(f"{file}: damaged, or contains more than weights; it was not loaded") from error


@dataclass
class Run:
    """A trained run: its directory and checkpoint, its model on a device, and its data."""

    directory: RunDirectory
    checkpoint: Path
    model: ImageModel
    data: ImageDataModule


def open_run(path: StrPath, accelerator: str = "auto", data_root: str | None = None) -> Run:
    """Load the model of a run on `accelerator` (auto, cpu or gpu), and its data under the run's pixel protocol.

    `data_root` is the directory of the data on this machine; the default is that of the run.
    Raises the errors of `load_run`, ConfigError if there is no GPU, and DataError for missing or damaged data.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator=gpu: PyTorch finds no GPU on this machine. Allowed: auto, cpu")
    directory, checkpoint = RunDirectory.locate(path)
    directory.read_config()  # raises for a checkpoint that is not of a run, which has no data
    model = load_run(checkpoint)  # not `path`: latest may be another run by now
    model.to("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    spec = model.config["data"] | ({"root": data_root} if data_root else {})
    data = build(spec, ImageDataModule, "data", seed=model.config["seed"])
    for key, own in data.state_dict().items():
        if model.protocol.get(key, own) != own:
            raise RunError(f"{directory.config_file}: has {key}={own}, but its checkpoint {key}={model.protocol[key]}")
    data.setup()
    return Run(directory, checkpoint, model, data)
