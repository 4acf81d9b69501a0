import csv
import logging
from pathlib import Path

import pytest

from vae_lightning.training.history import History


def test_one_row_per_epoch_with_every_column(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = History(tmp_path / "history.csv", epochs=3)
    with caplog.at_level(logging.INFO):
        history.log_metrics({"train/loss": 3.0, "epoch": 0}, step=9)
        history.log_metrics({"val/loss": 2.5, "epoch": 1}, step=19)  # validation only every second epoch
        history.log_metrics({"train/loss": 2.0, "epoch": 1}, step=19)
        history.log_metrics({"test/loss": 9.0, "epoch": 2}, step=20)
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["step"] for row in rows] == ["10", "20"]
    assert [row["train/loss"] for row in rows] == ["3.0", "2.0"]
    assert [row["val/loss"] for row in rows] == ["", "2.5"]
    assert len(caplog.records) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "history.csv"]
