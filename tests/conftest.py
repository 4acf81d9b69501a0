"""Shared fixtures: composed configurations, and commands run in this process."""

from __future__ import annotations

import logging
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
from omegaconf import open_dict

from vae_lightning import figures
from vae_lightning.data.mnist import MNISTDataModule, load_images
from vae_lightning.launch.cli import plain
from vae_lightning.runs import environment
from vae_lightning.runs.resume import run_config
from vae_lightning.training.trainer import TRAINER_DEFAULTS  # noqa: F401 (a part of the configuration, registered there)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
# A run of a few seconds: two training batches, one validation batch, one test batch.
BRIEF = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "figures.embedded=0",
    "figures.samples=[2,2]",
]


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
        patch.setattr(environment, "describe_code", cache(environment.describe_code))
        patch.setattr(figures, "loss_curves", lambda history: torch.zeros(1, 2, 2))
        yield


def composed(*overrides: str) -> dict[str, Any]:
    """Return the configuration that `train.py` passes to `train` for these overrides, on the CPU."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["trainer.accelerator=cpu", *overrides], True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return run_config(plain(config))


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    """`config("model.latent_dim=2", ...)`: the configuration that train.py passes to `train`."""

    return composed


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """`script("report.py", "outputs", ...)`: `python report.py outputs …` in an empty directory, in this process."""

    def run(name: str, *words: object) -> Finished:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        handlers = logging.root.handlers.copy()
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
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
