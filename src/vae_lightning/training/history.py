"""One row an epoch: `history.csv` in the run directory, and one line in the log."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from vae_lightning.files import atomic_write

log = logging.getLogger(__name__)


class History(Logger):
    """Gathers what a model logs in an epoch, train and validation, into one row of `history.csv`."""

    def __init__(self, path: Path, epochs: int | None) -> None:
        super().__init__()
        self.path = path
        self.epochs = epochs
        self.rows: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}
        self.started = time.monotonic()

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the running epoch's row. The training means come last, and complete it."""
        self.row |= {
            key: value for key, value in metrics.items() if key.startswith(("train/", "val/", "health/", "lr-"))
        }
        if any(key.startswith("train/") for key in metrics):
            terms = dict(sorted(self.row.items(), key=lambda item: not item[0].startswith("train/")))  # train first
            self.rows.append(
                {"epoch": int(metrics["epoch"]) + 1, "step": (step or 0) + 1, "seconds": self.seconds} | terms
            )
            self.row = {}
            self._write()
            log.info("%s", epoch_line(self.rows[-1], self.epochs))

    @rank_zero_only
    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))  # not every epoch need have validation
        with atomic_write(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    @property
    def seconds(self) -> float:
        """Spent so far, in all sittings."""
        return round(time.monotonic() - self.started, 3)

    def saved(self) -> dict[str, Any]:
        """Rows and time so far, for a checkpoint."""
        return {"rows": [dict(row) for row in self.rows], "row": dict(self.row), "seconds": self.seconds}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint has."""
        self.rows, self.row = saved["rows"], saved["row"]
        self.started = time.monotonic() - saved["seconds"]
        if self.rows:
            self._write()


def epoch_line(row: dict[str, Any], epochs: int | None) -> str:
    """One epoch in one line: `epoch 3/30  12.3 s  train: loss 110.21 …  val: loss 112.00 …`."""
    words = [f"epoch {row['epoch']}" + (f"/{epochs}" if epochs and epochs > 0 else ""), f"{row['seconds']:.1f} s"]
    for split in ("train", "val"):
        terms = {key.partition("/")[2]: value for key, value in row.items() if key.startswith(f"{split}/")}
        if terms:
            words.append(f"{split}: {format_terms(terms)}")
    return "  ".join(words)


def format_terms(terms: dict[str, float]) -> str:
    """`loss 110.21  reconstruction 90.10 …`: nats to two decimals, errors per pixel to four digits.

    `elbo` is left out where it is no more than the loss with its sign turned.
    """
    return "  ".join(
        f"{name} {value:.4g}" if terms.get("mse") == value else f"{name} {value:.2f}"
        for name, value in terms.items()
        if name != "elbo" or value != -terms["loss"]
    )


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints log lines above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()
