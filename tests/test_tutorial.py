"""docs/tutorial.py runs from start to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.proof
def test_the_tutorial_runs(tmp_path: Path) -> None:
    environment = os.environ | {"EPOCHS": "1", "BATCHES": "20"}
    command = [sys.executable, ROOT / "docs" / "tutorial.py"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    drawn = sorted((tmp_path / "outputs" / "tutorial").glob("1_epochs*/*.png"))
    assert len(drawn) == 11
    assert all(str(figure.relative_to(tmp_path)) in finished.stdout for figure in drawn)
    assert "dimensions with more than 0.01 nats" in finished.stdout
    bounds = [float(line.rpartition(":")[2]) for line in finished.stdout.splitlines() if line.startswith("k = ")]
    assert len(bounds) == 4
    assert bounds == sorted(bounds)
