"""`make new NAME=my_project` creates a project that trains and passes its tests."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BRIEF, ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of all files tracked by git."""
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def make_new(copy: Path, name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, copy / "scripts" / "new_project.py", name]
    return subprocess.run(command, capture_output=True, text=True, cwd=copy)


def run(copy: Path, *words: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{copy / 'src'}:{copy / 'tests'}"}
    return subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)


def test_a_new_project_has_its_own_name(copy: Path) -> None:
    made = make_new(copy, "shape_study")
    assert made.returncode == 0, made.stderr
    for command in (["check", "."], ["format", "--check", "."]):
        linted = run(copy, "-m", "ruff", *command)
        assert linted.returncode == 0, linted.stdout
    pages = "".join(page.read_text() for page in copy.glob("docs/**/*.md"))
    assert [image for image in (copy / "docs" / "images").iterdir() if image.name not in pages] == []
    removed = ('ROOT / "benchmarks"', 'ROOT / "scripts"')
    assert [test for test in copy.glob("tests/*.py") if any(place in test.read_text() for place in removed)] == []
    left = [path for path in copy.rglob("*") if path.is_file() and path.suffix in (".py", ".yaml", ".toml", ".md")]
    assert [path for path in left if "vae_lightning" in path.read_text()] == []


@pytest.mark.proof
def test_a_new_project_trains_and_passes_all_its_tests(copy: Path) -> None:
    assert make_new(copy, "shape_study").returncode == 0
    trained = run(copy, "train.py", *BRIEF, "model.backbone.hidden=[8]", "trainer.accelerator=cpu")
    assert trained.returncode == 0, trained.stderr
    assert list(copy.glob("outputs/vae/*/metrics.json"))
    tested = run(copy, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout[-3000:]


@pytest.mark.parametrize("name", ["", "My", "2d", "a-b", "class", "torch", "vae_lightning", "json"])
def test_an_invalid_name_is_refused(name: str) -> None:
    check = runpy.run_path(str(ROOT / "scripts" / "new_project.py"))["check"]
    with pytest.raises(SystemExit, match=f"^NAME={name}: .*, such as NAME=my_project$"):
        check(name, ROOT)
