"""Shared by the tests: small configurations, commands run in this process, and the results of runs."""

from __future__ import annotations

import csv
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from vae_lightning import figures
from vae_lightning.data.torchvision_sets import MNISTDataModule, load_images
from vae_lightning.launch import TRACEBACK, jobs  # noqa: F401 (jobs registers parts of the configuration)
from vae_lightning.launch.vae import vae
from vae_lightning.runs import environment

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
PACKAGE = ROOT / "src" / "vae_lightning"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}
# A run of a few seconds: two training batches, one validation batch, one test batch.
BRIEF = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "figures.embedded=0",
    "figures.samples=[2,2]",
]
# A run of two epochs of a small model, whose steps take as long as those of BRIEF.
SMALL = [
    *("model.backbone.hidden=[16]", "data.val_size=500", "trainer.max_epochs=2", "trainer.limit_train_batches=23"),
    *("trainer.limit_test_batches=1", "trainer.enable_model_summary=false"),
    *("figures.every=0", "figures.embedded=0", "figures.samples=[2,2]"),
]
MLP = {"_target_": "vae_lightning.models.backbones.MLP", "hidden": [16]}
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}  # events to read: all


@dataclass
class Finished:
    """Exit status and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.manual_seed(0)
    handlers = logging.root.handlers.copy()
    yield
    GlobalHydra.instance().clear()
    logging.root.handlers[:] = handlers  # Hydra's handlers write to this test's streams and run directory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep decoded pictures out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _quick_ends_of_runs() -> Iterator[None]:
    """Do once what each run does in the same way, and takes longer than two steps of training."""
    checksums: dict[tuple[object, ...], dict[str, str]] = {}
    original = MNISTDataModule.checksums

    def remembered(self: MNISTDataModule) -> dict[str, str]:
        if type(self) is not MNISTDataModule or self.pixels != "grey":
            return original(self)
        key = (self.dataset, self.root, *(len(x) for x in (self.train_images, self.val_images, self.test_images)))
        if key not in checksums:
            checksums[key] = original(self)
        return checksums[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MNISTDataModule, "checksums", remembered)
        patch.setattr(environment, "_git", cache(environment._git))
        # Of one second, TensorBoard reads the tenth file of a process before the ninth, and would purge in that order.
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1_000))
        patch.setattr(figures, "loss_curves", lambda history: torch.zeros(1, 2, 2))
        patch.setattr(figures, "overview", lambda *_: torch.zeros(1, 2, 2))
        yield


def composed(*overrides: str) -> dict[str, Any]:
    """Return the configuration that `train.py` passes to `train` for these overrides, on the CPU."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["trainer.accelerator=cpu", *overrides], True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"], config["resume"]
    return OmegaConf.to_container(config, resolve=True)


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    """`config("model.latent_dim=2", ...)`: the configuration that train.py passes to `train`."""

    return composed


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """`script("vae", "report", ...)`: `vae report …` in an empty directory, in this process; or "train.py" likewise."""

    def run(name: str, *words: object) -> Finished:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        handlers = logging.root.handlers.copy()
        os.environ.pop(TRACEBACK, None)  # of an earlier command in this process
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", ""))
                vae() if name == "vae" else runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0) if isinstance(stop.code, int | None) else 1
        logging.root.handlers[:] = handlers  # Hydra's handlers write to streams of this command
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def command(script: Callable[..., Any]) -> Callable[..., Any]:
    """`command("model.latent_dim=2", ...)`: `python train.py …` in an empty directory."""

    def run(*words: str) -> Any:
        return script("train.py", *words)

    return run


@pytest.fixture(scope="session")
def mnist() -> torch.Tensor:
    """The first 500 test images, [500, 1, 28, 28] in [0, 1]."""
    _, (images, _) = load_images("MNIST", DATA)
    return images[:500].float() / 255


def history(directory: Path) -> list[dict[str, str]]:
    """Return the rows of a run's history.csv, without their times."""
    with (directory / "history.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def events(directory: Path) -> EventAccumulator:
    """Return what TensorBoard shows of a run."""
    return EventAccumulator(str(directory / "tensorboard"), EVERYTHING).Reload()


def checkpoint(directory: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(directory / "checkpoints" / f"{name}.ckpt", weights_only=True)


def read_results(directory: Path) -> dict[str, Any]:
    """Return all results of a run, without times and paths."""
    found: dict[str, Any] = {"history": history(directory)}
    for name in ("last", "best"):
        found[name] = checkpoint(directory, name)
        progress = found[name].pop("progress")
        found[name] |= {key: progress[key] for key in ("random", "means", "logged")}
        for key, state in found[name]["callbacks"].items():
            state.pop("current_score", None)  # Lightning saves it, does not restore it, and does not use it
            found[name]["callbacks"][key] = without(state.get("dirpath", "-"), state)
    metrics = json.loads((directory / "metrics.json").read_text())
    found["metrics"] = {key: value for key, value in metrics.items() if key != "seconds"}
    board = events(directory)
    tags = board.Tags()
    found["scalars"] = {tag: sorted((e.step, e.value) for e in board.Scalars(tag)) for tag in tags["scalars"]}
    found["images"] = {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    found["histograms"] = {
        tag: [(e.step, e.histogram_value) for e in board.Histograms(tag)] for tag in tags["histograms"]
    }
    names = (str(path.relative_to(directory)) for path in directory.rglob("*.*"))
    found["files"] = sorted(name for name in names if "tensorboard" not in name)
    return found


def without(prefix: str, tree: Any) -> Any:
    """Return a copy of nested dictionaries with `prefix` removed from keys and values."""
    if isinstance(tree, dict):
        return {without(prefix, key): without(prefix, value) for key, value in tree.items()}
    return tree.replace(prefix, "") if isinstance(tree, str) else tree


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places where two nested results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [place for key in a.keys() | b.keys() for place in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for n, pair in enumerate(zip(a, b, strict=True)) for place in differences(*pair, f"{where}.{n}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [where]
