"""Read a trained model back from its run directory. Nothing is unpickled, and only trusted code is run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch

from vae_lightning.config import ConfigError, build
from vae_lightning.data.module import ImageDataModule
from vae_lightning.models.base import ImageModel
from vae_lightning.runs.directory import RunDirectory, RunError, StrPath


def load_run(path: StrPath, trust: Iterable[str] = ()) -> ImageModel:
    """The trained model of a run directory (its best checkpoint) or of one checkpoint in it, in evaluation mode.

    Nothing is unpickled: config.yaml says what to build, and the checkpoint is read as weights only. A configuration
    that names code outside vae_lightning and torch.optim is refused, unless `trust` has the module or package: a
    backbone of your own in wide.py loads with `trust=["wide"]`. The whole configuration of the run is `model.config`.
    Raises RunError for a directory or checkpoint that is not whole, ConfigError for a configuration that does not fit.
    """
    run, checkpoint = RunDirectory.locate(path)
    config = trusted_config(run, trust)
    content = load_checkpoint(checkpoint)
    hyperparameters = content.get("hyper_parameters")
    shape = hyperparameters.get("image_shape") if isinstance(hyperparameters, dict) else None
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise RunError(f"{checkpoint}: says no image_shape of three numbers; it was not loaded")
    model = build(config["model"], ImageModel, "model", image_shape=tuple(shape))
    load_weights(content["state_dict"], model, checkpoint)
    data = next((value for value in content.values() if isinstance(value, dict) and "data.pixels" in value), {})
    model.protocol = {key: value for key, value in data.items() if key.startswith("data.")}
    model.config = config
    return model.eval()


def load_weights(weights: dict[str, Any], model: ImageModel, checkpoint: Path) -> None:
    """Load `weights` into `model`. Raises RunError where they are not its own, or not finite."""
    try:
        model.load_state_dict(weights)
        same = all(weights[name].dtype == tensor.dtype for name, tensor in model.state_dict().items())
        finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise RunError(f"{checkpoint}: not the weights of the model that is configured") from error
    if not (same and finite):
        raise RunError(f"{checkpoint}: has weights that are {'NaN or infinite' if same else 'of another type'}")


def load_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises RunError for a file that is damaged, or holds anything but tensors and plain values.
    """
    if not file.is_file():
        raise RunError(f"{file}: no such checkpoint")
    try:
        with ZipFile(file) as archive:  # PyTorch does not look at the checksums that it writes
            # PyTorch compresses nothing; what is compressed may be made to fill the memory.
            if any(file.compress_type != ZIP_STORED for file in archive.infolist()) or archive.testzip():
                raise ValueError
        content = torch.load(file, map_location="cpu", weights_only=True)
        content["state_dict"].items()
        return content
    # Both have errors of many kinds for a file that was altered, and none of them is a bug here.
    except Exception as error:
        raise RunError(f"{file}: damaged, or holds more than weights; it was not loaded") from error


@dataclass
class Run:
    """A trained run, opened for use: where it lies, its model on a device, and its data."""

    directory: RunDirectory
    checkpoint: Path
    model: ImageModel
    data: ImageDataModule


def open_run(path: StrPath, accelerator: str = "auto", trust: Iterable[str] = (), data_root: str | None = None) -> Run:
    """The model of a run, on `accelerator` (auto, cpu or gpu), with the data that it was trained on, of its protocol.

    `data_root` says where the data lie on this machine, if not where the run found them.
    Raises what `load_run` does, ConfigError where there is no GPU, and DataError for data that are not whole.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator=gpu: PyTorch finds none on this machine. Allowed: auto, cpu")
    directory, checkpoint = RunDirectory.locate(path)
    model = load_run(path, trust)
    model.to("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    spec = model.config["data"] | ({"root": data_root} if data_root else {})
    data = build(spec, ImageDataModule, "data", seed=model.config["seed"])
    for key, own in data.state_dict().items():
        if model.protocol.get(key, own) != own:
            raise RunError(f"{directory.config_file}: says {key}={own}, and its checkpoint {key}={model.protocol[key]}")
    data.setup()
    return Run(directory, checkpoint, model, data)


# Code that a run may name: what builds models and data, and Lightning's callbacks that write no files of their own.
TRUSTED = (
    "vae_lightning",
    "torch.optim",
    "lightning.pytorch.callbacks.EMAWeightAveraging",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.StochasticWeightAveraging",
    "lightning.pytorch.callbacks.Timer",
)


def trusted_config(
    run: RunDirectory, trust: Iterable[str] = (), parts: Sequence[str] = ("model", "data")
) -> dict[str, Any]:
    """The configuration of a run, to build `parts` from. Raises RunError if it names code that is not trusted."""
    config = run.read_config()
    if isinstance(trust, str):
        raise ConfigError(f"trust={trust}: should be a list of modules, [{trust}]")
    trust = [str(name) for name in trust]
    named = {name: config.get(name) for name in parts}
    if isinstance(loggers := named.get("logger"), dict):
        named["logger"] = {name: spec for name, spec in loggers.items() if not is_harmless_logger(spec)}
    unknown = {
        key: str(target)
        for key, target in _targets(named)
        if not any(f"{target}.".startswith(f"{name}.") for name in (*TRUSTED, *trust))
    }
    if unknown:
        key, target = next(iter(unknown.items()))
        modules = dict.fromkeys([*trust, *(target.rpartition(".")[0] or target for target in unknown.values())])
        raise RunError(
            f"{run.config_file}: {key}={target}: not in vae_lightning or torch.optim; loading would run code "
            f"named by the run; if you know it, trust=[{','.join(modules)}] allows it"
        )
    return config


# Values of a logger's arguments that are neither a path nor an address; and those in conf/logger/mlflow.yaml.
HARMLESS = re.compile(r"|\w[\w .-]*|lightning\.pytorch\.loggers\.\w+|(sqlite:///)?outputs/\w+(\.db)?")


def is_harmless_logger(spec: Any) -> bool:
    """Whether this is one of Lightning's loggers, and none of its arguments names a path or an address."""
    return (
        isinstance(spec, dict)
        and str(spec.get("_target_")).startswith("lightning.pytorch.loggers.")
        and all(
            value is None or isinstance(value, int | float) or (isinstance(value, str) and HARMLESS.fullmatch(value))
            for value in spec.values()
        )
    )


def _targets(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a configuration, with its dotted key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        key = f"{path}.{name}".lstrip(".")
        if name == "_target_":
            yield key, value
        yield from _targets(value, key)
