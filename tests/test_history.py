import csv
import logging
from pathlib import Path

import pytest

from vae_lightning.training.history import History, epoch_line


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


def test_epoch_line() -> None:
    row = {"epoch": 2, "step": 9, "seconds": 1.23, "train/loss": 101.234, "train/elbo": -101.234, "val/loss": 99.0}
    assert epoch_line(row, 30) == "epoch 2/30  1.2 s  train: loss 101.23  val: loss 99.00"
    assert epoch_line(row | {"train/elbo": -90.0}, None) == (
        "epoch 2  1.2 s  train: loss 101.23  elbo -90.00  val: loss 99.00"
    )
    assert epoch_line({"epoch": 1, "seconds": 1.0, "train/loss": 0.01234, "train/mse": 0.01234}, 1) == (
        "epoch 1/1  1.0 s  train: loss 0.01234  mse 0.01234"
    )
