"""docs/tutorial.py runs from start to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT


@pytest.mark.proof
def test_the_tutorial_runs(tmp_path: Path) -> None:
    for name in ("train.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    limits = ["trainer.limit_train_batches=20", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    words = [*limits, f"data.root={DATA}", "figures.every=0", "figures.embedded=0", "model.backbone.hidden=[32]"]
    command = [sys.executable, ROOT / "docs" / "tutorial.py"]
    environment = os.environ | {"EPOCHS": "1", "OVERRIDES": " ".join(words)}
    (tmp_path / "docs").mkdir()  # a notebook runs in the directory of its file
    finished = subprocess.run(command, cwd=tmp_path / "docs", env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    drawn = sorted((tmp_path / "outputs" / "tutorial").glob("1_epochs*/*.png"))
    assert len(drawn) == 11
    assert all(str(figure.relative_to(tmp_path)) in finished.stdout for figure in drawn)
    assert "dimensions with more than 0.01 nats" in finished.stdout
    bounds = [float(line.rpartition(":")[2]) for line in finished.stdout.splitlines() if line.startswith("k = ")]
    assert len(bounds) == 4
    assert bounds == sorted(bounds)
