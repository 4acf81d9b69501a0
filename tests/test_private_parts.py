"""The private parts of libraries that the package uses; CONTRIBUTING.md lists them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, FILES, composed
from hydra import compose, initialize
from hydra.errors import ConfigCompositionException
from lightning.pytorch import Trainer

from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.fast_loop import FastLoop
from vae_lightning.training.train import train
from vae_lightning.training.trainer import TRAINER_DEFAULTS, make_trainer


def test_private_names_are_used_in_three_files() -> None:
    found = set()
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]\w*[^_]$", node.attr):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                found |= set() if owner in ("self", "cls") else {module}
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("vae_lightning"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                found |= {module} if private or "._" in (node.module or "") else set()
    assert found == {"training.fast_loop", "training.compiled", "training.checkpoints"}


def test_the_fast_loop_fits_these_versions() -> None:
    trainer = make_trainer(RunDirectory("."), [], [], **TRAINER_DEFAULTS | {"accelerator": "cpu"})
    assert type(trainer.fit_loop.epoch_loop) is FastLoop


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("private") / "run"
    train(composed(*BRIEF, "model.backbone.hidden=[8]"), directory)
    return torch.load(RunDirectory(directory).last_checkpoint, weights_only=True)


def test_the_counters_in_a_checkpoint_stand_where_they_are_corrected(checkpoint: dict) -> None:
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    assert progress["total"]["ready"] == progress["current"]["ready"] == 2
    assert progress["is_last_batch"] is True
    assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == 2
    assert loops["epoch_progress"]["current"]["started"] == 1
    assert [loader["given"] for loader in loops["state_dict"]["combined_loader"]] == [2]


def test_model_checkpoint_saves_its_current_score(checkpoint: dict) -> None:
    (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint")]
    assert state["current_score"] == state["best_model_score"]
    assert Path(state["dirpath"]).name == "checkpoints"


def test_a_loop_knows_that_it_is_resumed() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert trainer.fit_loop.restarting is trainer.fit_loop._restarting is False
    trainer.fit_loop._restarting = True
    assert trainer.fit_loop.restarting is True


def test_callback_metrics_can_be_restored() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.callback_metrics["val/loss"] = torch.tensor(1.0)
    assert trainer.callback_metrics["val/loss"] == 1.0


def test_hydra_says_what_we_look_for() -> None:
    refused = pytest.raises(ConfigCompositionException, match=r"^Could not override 'model.latent_dmi'\.")
    with initialize("../conf", version_base="1.3"), refused:
        compose("train", ["model.latent_dmi=2"])
