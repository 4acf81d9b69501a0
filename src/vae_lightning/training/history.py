"""One row per epoch in `history.csv`, and one line per epoch in the log."""

from __future__ import annotations

import csv
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from vae_lightning.files import atomic_write

log = logging.getLogger(__name__)


class History(Logger):
    """A logger that writes the training and validation metrics of each epoch as one row of `history.csv`."""

    name = "history"
    version = ""

    def __init__(self, path: Path, epochs: int | None) -> None:
        super().__init__()
        self.path = path
        self.epochs = epochs
        self.rows: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}  # of the current epoch
        self.started = time.monotonic()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the current row. The means of training are logged last and complete it."""
        self.row |= {
            key: value for key, value in metrics.items() if key.startswith(("train/", "val/", "health/", "lr-"))
        }
        if "train/loss" in metrics:  # a model or callback may log its own train/… at each step
            terms = dict(sorted(self.row.items(), key=lambda item: not item[0].startswith("train/")))  # train first
            self.rows.append(
                {"epoch": int(metrics["epoch"]) + 1, "step": (step or 0) + 1, "seconds": self.seconds} | terms
            )
            self.row = {}
            self.write()
            log.info("%s", epoch_line(self.rows[-1], self.epochs))

    def write(self) -> None:
        """Write history.csv; without rows, remove it."""
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))  # an epoch may have no validation
        with atomic_write(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return round(time.monotonic() - self.started, 3)

    def saved(self) -> dict[str, Any]:
        """Return rows and seconds for a checkpoint."""
        return {"rows": [dict(row) for row in self.rows], "row": dict(self.row), "seconds": self.seconds}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `saved` returned. Does not write the file."""
        self.rows, self.row = saved["rows"], saved["row"]
        self.started = time.monotonic() - saved["seconds"]


def epoch_line(row: dict[str, Any], epochs: int | None) -> str:
    """Format a row: `epoch 3/30  12.3 s  0:01:51 left  train: loss 110.21 …  val: loss 112.00 …`."""
    done, seconds = row["epoch"], row["seconds"]
    words = [f"epoch {done}", f"{seconds:.1f} s"]
    if epochs and epochs > 0:
        words[0] += f"/{epochs}"
        words.append(f"{timedelta(seconds=round(seconds / done * max(0, epochs - done)))} left")
    for split in ("train", "val"):
        terms = {key.partition("/")[2]: value for key, value in row.items() if key.startswith(f"{split}/")}
        if terms:
            words.append(f"{split}: {format_terms(terms)}")
    return "  ".join(words)


def format_terms(terms: dict[str, float]) -> str:
    """Format terms as `loss 110.21  kl 2.013 …`: two decimals, or four digits of numbers below ten.

    Leaves out `elbo` where it is the negative of the loss.
    """
    return "  ".join(
        f"{name} {value:.2f}" if abs(value) >= 10 else f"{name} {value:.4g}"
        for name, value in terms.items()
        if name != "elbo" or value != -terms["loss"]
    )
