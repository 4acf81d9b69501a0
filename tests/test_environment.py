"""The code that environment.json names: commit, uncommitted changes, and files that git does not track."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MLP

from vae_lightning.models.vae import VAE
from vae_lightning.runs import environment


def test_commit_and_uncommitted_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *author, *words], check=True, capture_output=True)

    def code() -> dict:
        data = SimpleNamespace(seed=0, checksums=dict)
        return environment.describe_environment(VAE(backbone=MLP), torch.device("cpu"), data)

    monkeypatch.setattr(environment, "_git", environment._git.__wrapped__)  # conftest.py keeps its results
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "model.py"))
    (tmp_path / "model.py").write_text("beta = 1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*words)
    committed = code()
    assert (len(committed["git_commit"]), committed["git_clean"], committed["git_diff"]) == (40, True, "")
    (tmp_path / "model.py").write_text("beta = 2\n")
    (tmp_path / "wide.py").touch()
    changed = code()
    assert (changed["git_clean"], changed["git_untracked"]) == (False, ["wide.py"])
    assert "+beta = 2" in changed["git_diff"]
