"""The examples of docs/guides.md run as they stand there."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, ROOT
from PIL import Image
from torchvision import datasets

from vae_lightning.runs.loading import load_run

GUIDES = (ROOT / "docs" / "guides.md").read_text()
FILES = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", GUIDES, flags=re.M | re.S))
COMMANDS = re.findall(r"^python train.py (.*)$", GUIDES, flags=re.M)


class FakeCIFAR:
    """60 coloured images in the form of torchvision's CIFAR10."""

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        self.data = np.random.default_rng(train).integers(256, size=(60, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(60)]


def write_images(root: Path) -> None:
    for split, many in (("train", 40), ("test", 12)):
        for i in range(many):
            folder = root / "images" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(256, size=(40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


def test_every_guide_is_short_and_has_its_command() -> None:
    assert {name for name in FILES if name.endswith(".py")} == {
        *("folder.py", "cifar.py", "laplace.py", "capacity.py", "triangular.py", "conditional.py", "lion.py"),
        "square_root.py",
        "lines.py",
    }
    assert all(len(code.splitlines()) < 40 for code in FILES.values())
    assert len(COMMANDS) == 9


@pytest.mark.parametrize("line", COMMANDS)
def test_guides(line: str, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n{code}")
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(datasets, "CIFAR10", FakeCIFAR)
    write_images(tmp_path)
    own = ["data.root=images"] if "data=folder" in line else []
    own += ["data.val_size=20"] if "data=cifar" in line else []
    words = [*shlex.split(line), f"hydra.searchpath=[file://{tmp_path}/conf]", *BRIEF]
    result = command(*words, *own)
    assert result.code == 0, result.err
    directory = result.out.splitlines()[-1]
    module = re.search(r"[=,](folder|cifar|laplace|capacity|triangular|conditional|lion|square_root|lines)", line)
    assert module
    data = json.loads((tmp_path / directory / "metrics.json").read_text())["data"]
    assert data == {"folder": "Folder", "cifar": "CIFAR"}.get(module[1], "MNIST")
    if module[1] == "lines":
        lines = [json.loads(line) for line in (tmp_path / directory / "log.jsonl").read_text().splitlines()]
        assert lines[0]["model.latent_dim"] == 20
        assert "test/elbo" in lines[-1]
        assert (tmp_path / directory / "test_samples.png").exists()
    vae = load_run(directory, trust=[module[1]])
    x = torch.rand(3, *vae.image_shape)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.log_weights(x, k=2).isfinite().all()
