"""Load a trained model from its run directory, without unpickling and without running untrusted code."""

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
    """Load the model of a run directory (its best checkpoint) or of one of its checkpoints, in evaluation mode.

    Nothing is unpickled: config.yaml says what to build, and the checkpoint is read as weights only. A configuration
    that names code outside vae_lightning and torch.optim is refused, unless `trust` lists the module or package: a
    backbone of your own in wide.py loads with `trust=["wide"]`. `model.config` is the configuration of the run.
    Raises RunError for an incomplete directory or damaged checkpoint, ConfigError for a wrong configuration.
    """
    return load_located(*RunDirectory.locate(path), trust)


def load_located(run: RunDirectory, checkpoint: Path, trust: Iterable[str] = ()) -> ImageModel:
    """Load the model of a checkpoint of `run`, as `load_run` does."""
    config = trusted_config(run, trust)
    content = load_checkpoint(checkpoint)
    hyperparameters = content.get("hyper_parameters")
    saved = hyperparameters if isinstance(hyperparameters, dict) else {}
    shape, classes = saved.get("image_shape"), saved.get("classes")
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise RunError(f"{checkpoint}: has no image_shape of three positive integers; it was not loaded")
    of_data: dict[str, Any] = {"image_shape": tuple(shape)}
    if config["model"].get("conditional"):
        if type(classes) is not int or classes < 1:
            raise RunError(f"{checkpoint}: is of a conditional model, but has no number of classes; it was not loaded")
        of_data["classes"] = classes
    model = build(config["model"], ImageModel, "model", **of_data)
    load_weights(content["state_dict"], model, checkpoint)
    data = next((value for value in content.values() if isinstance(value, dict) and "data.pixels" in value), {})
    model.protocol = {key: value for key, value in data.items() if key.startswith("data.")}
    model.config = config
    return model.eval()


def load_weights(weights: dict[str, Any], model: ImageModel, checkpoint: Path) -> None:
    """Load `weights` into `model`. Raises RunError if they do not fit, or are not finite."""
    try:
        model.load_state_dict(weights)
        same = all(weights[name].dtype == tensor.dtype for name, tensor in model.state_dict().items())
        finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise RunError(f"{checkpoint}: its weights do not fit the configured model") from error
    if not (same and finite):
        raise RunError(f"{checkpoint}: has weights that are {'NaN or infinite' if same else 'of another type'}")


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises RunError if it is damaged, or has more than tensors and plain values."""
    if not file.is_file():
        raise RunError(f"{file}: no such checkpoint")
    try:
        with ZipFile(file) as archive:  # PyTorch does not verify the checksums that it writes
            # PyTorch writes no compressed entries; a compressed one could expand until the memory is full.
            entries = archive.infolist()
            compressed = any(entry.compress_type != ZIP_STORED for entry in entries)
            # One part of the file could be many entries, which would fill the memory, too.
            overlapping = sum(entry.file_size for entry in entries) > file.stat().st_size
            if compressed or overlapping or archive.testzip():
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


def open_run(path: StrPath, accelerator: str = "auto", trust: Iterable[str] = (), data_root: str | None = None) -> Run:
    """Load the model of a run on `accelerator` (auto, cpu or gpu), and its data under the run's pixel protocol.

    `data_root` is the directory of the data on this machine; the default is that of the run.
    Raises the errors of `load_run`, ConfigError if there is no GPU, and DataError for missing or damaged data.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator=gpu: PyTorch finds no GPU on this machine. Allowed: auto, cpu")
    directory, checkpoint = RunDirectory.locate(path)
    model = load_located(directory, checkpoint, trust)  # not from `path`: latest may be another run by now
    model.to("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    spec = model.config["data"] | ({"root": data_root} if data_root else {})
    data = build(spec, ImageDataModule, "data", seed=model.config["seed"])
    for key, own in data.state_dict().items():
        if model.protocol.get(key, own) != own:
            raise RunError(f"{directory.config_file}: has {key}={own}, but its checkpoint {key}={model.protocol[key]}")
    data.setup()
    return Run(directory, checkpoint, model, data)


# Modules and classes that any run may name: those of this package, optimizers, and callbacks that write no files.
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
    """Read the configuration of a run. Raises RunError if one of its `parts` names code that is not trusted."""
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
            f"{run.config_file}: {key}={target}: not in vae_lightning or torch.optim; loading would run this "
            f"code; if you trust it, trust=[{','.join(modules)}] allows it"
        )
    return config


# Arguments of a logger that are neither a path nor a URL, or that are those of conf/logger/mlflow.yaml.
HARMLESS = re.compile(r"|\w[\w .-]*|(sqlite:///)?outputs/\w+(\.db)?")


def is_harmless_logger(spec: Any) -> bool:
    """Return whether `spec` is one of Lightning's loggers, and none of its arguments is a path or a URL."""
    return (
        isinstance(spec, dict)
        and str(spec.get("_target_")).startswith("lightning.pytorch.loggers.")
        and all(
            value is None or isinstance(value, int | float) or (isinstance(value, str) and HARMLESS.fullmatch(value))
            for value in spec.values()
        )
    )


def _targets(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each `_target_` in a configuration."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        key = f"{path}.{name}".lstrip(".")
        if name == "_target_":
            yield key, value
        yield from _targets(value, key)
