"""The package as a library: an installed wheel, used from another repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MINE = """
from vae_lightning.models.backbones import MLP


class Mine(MLP):
    def __init__(self, latent_dim, encoder_outputs, image_shape, width: int = 8):
        super().__init__(latent_dim, encoder_outputs, image_shape, hidden=[width])
"""
SQUARES = """
import torch

from vae_lightning.data.module import ImageDataModule


class Squares(ImageDataModule):
    def load(self):
        images = torch.zeros(300, 1, 28, 28, dtype=torch.uint8)
        for n, image in enumerate(images):
            image[:, n % 20 : n % 20 + 8, n % 13 : n % 13 + 8] = 255
        return (images[:200], torch.arange(200) % 10), (images[200:], torch.arange(100) % 10)
"""
# Run each command of the installed package in one process, like its console script.
DRIVER = """
import contextlib, io, sys
from importlib.metadata import distribution
from pathlib import Path
from hydra.core.global_hydra import GlobalHydra

scripts = {e.name: e for e in distribution("vae-lightning").entry_points if e.group == "console_scripts"}
assert list(scripts) == ["vae"]

def run(*words):
    GlobalHydra.instance().clear()
    sys.argv = ["vae", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            scripts["vae"].load()()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()

brief = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "data.val_size=20", "figures.embedded=0"]
mine = ["--config-dir", "my_conf", "data=squares", "model/backbone=mine", *brief]
code, out, err = run("train", *mine, "hydra.run.dir=outputs/run")
assert code == 0, err
assert out.splitlines()[-1].endswith("outputs/run")
code, _, err = run("train", *mine, "model.backbone.widht=3")
assert code == 2 and "did you mean model.backbone.width?" in err, err
code, _, err = run("train", *mine, "model/backbone=mni")
assert code == 2 and "conv gated_mlp mine mlp residual_conv; did you mean mine?" in err, err
for words in [
    "evaluate outputs/run --samples 3 --no-probes",
    "generate samples outputs/run",
    "report outputs",
    "compare --help",
    "explore --help",
    "export --help",
]:
    code, out, err = run(*words.split())
    assert code == 0, (words, err)
assert Path("outputs/run/evaluation.json").exists() and Path("outputs/report/report.md").exists()

import vae_lightning.analysis
from vae_lightning import MNISTDataModule
assert Path(vae_lightning.analysis.__file__).with_name("explorer.html").exists()
assert str(MNISTDataModule().root).endswith("cache/vae_lightning"), "no data beside the package"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed wheel, built from a copy of the checkout."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "dist", copy], check=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    return target


@pytest.mark.proof
def test_the_wheel_works_without_its_checkout(site: Path, tmp_path: Path) -> None:
    (tmp_path / "my_conf" / "model" / "backbone").mkdir(parents=True)
    (tmp_path / "my_conf" / "data").mkdir()
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "squares.py").write_text(SQUARES)
    (tmp_path / "my_conf" / "model" / "backbone" / "mine.yaml").write_text("_target_: mine.Mine\nwidth: 16\n")
    (tmp_path / "my_conf" / "data" / "squares.yaml").write_text(
        "_target_: squares.Squares\npixels: grey\nbatch_size: 50\nval_size: 50\n"
    )
    environment = os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
