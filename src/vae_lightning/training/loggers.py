"""The config group `logger`: where a run's scalars, settings and pictures go, beside its history.csv.

A logger is any subclass of Lightning's `Logger`. Where its constructor takes them, it receives the run directory as
`save_dir` and, in a resumed run, its former `id` or `run_id`, so that W&B and MLflow continue the same run. A resumed
run removes from TensorBoard's files what was written after the checkpoint, because it is written again.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vae_lightning import figures
from vae_lightning.config import ConfigError, Spec, build, locate
from vae_lightning.files import atomic_write
from vae_lightning.runs.directory import RunDirectory

log = logging.getLogger(__name__)

EXTRAS = ("wandb", "mlflow")  # loggers whose package is an optional extra of the same name


def make_loggers(specs: Mapping[str, Spec], run: RunDirectory, resume: bool) -> dict[str, Logger]:
    """Build the configured loggers; those of a resumed run with their former ids. Raises ConfigError."""
    known = run.read_environment().get("loggers") if resume else None
    ids = known if isinstance(known, dict) else {}
    loggers: dict[str, Logger] = {}
    for name, spec in specs.items():
        offered = {"save_dir": str(run), "id": ids.get(name), "run_id": ids.get(name)}
        try:
            key = f"logger.{name}"
            kind = locate(spec["_target_"], Logger, f"{key}._target_") if "_target_" in spec else Logger
            takes = signature(kind).parameters
            loggers[name] = build(
                spec, Logger, key, **{k: v for k, v in offered.items() if k in takes and k not in spec}
            )
            logger = loggers[name]
            if isinstance(logger, TensorBoardLogger) and Path(logger.log_dir) != run.tensorboard:
                raise ConfigError(f"{key}: writes to {logger.log_dir}; should be {run.tensorboard}, which is resumed")
        except ConfigError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                hint = f"pip install -e '.[{name}]'" if name in EXTRAS else str(error.__cause__)
                raise ConfigError(f"logger={name}: its package is not installed; {hint}") from error
            raise
    return loggers


@contextmanager
def opened(loggers: Mapping[str, Logger], settings: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Open loggers, log the run's settings, yield the logger ids by name, and close the loggers at the end.

    Raises ConfigError for a logger that cannot be opened.
    """
    ids: dict[str, str] = {}
    status, hook = "failed", threading.excepthook
    # On a full disk TensorBoard's thread raises an OSError; the next write in this thread raises the same error.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    try:
        for name, logger in loggers.items():
            try:
                if not isinstance(logger, TensorBoardLogger):  # it gets the settings together with the test metrics
                    logger.log_hyperparams(settings)
                if isinstance(logger.version, str) and logger.version:
                    ids[name] = logger.version
            except Exception as error:  # each logger has its own errors: no account, no network, no database
                said = " ".join(str(error).split())[:300]
                raise ConfigError(f"logger={name}: cannot be opened ({said})") from error
        yield ids
        status = "success"
    finally:
        for logger in loggers.values():
            with suppress(OSError) if status == "failed" else nullcontext():  # a full disk is already reported
                logger.finalize(status)
            if isinstance(logger, WandbLogger) and logger.version in ids.values():
                # Without this, the next run of this process would be added to this W&B run.
                logger.experiment.finish(int(status != "success"))
        threading.excepthook = hook


def log_pictures(trainer: Trainer, pictures: Mapping[str, Tensor | Figure]) -> None:
    """Send image grids and figures to each logger that accepts pictures, in the first process."""
    step = trainer.global_step
    for logger in trainer.loggers:
        for name, picture in pictures.items():
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                (writer.add_figure if isinstance(picture, Figure) else writer.add_image)(name, picture, step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, figures.as_pil(picture), f"{name}/{step}.png")
            elif hasattr(logger, "log_image"):  # W&B and custom loggers
                logger.log_image(name, [figures.as_pil(picture)], step)


def tensorboard_writers(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of all TensorBoard loggers; none except in the first process."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def event_files(directory: Path) -> list[Path]:
    """Return TensorBoard's files in the order of writing: their names contain the time and a counter."""
    files = [file for file in directory.glob("events.out.tfevents.*") if file.is_file() and not file.is_symlink()]
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def event_bytes(trainer: Trainer, run: RunDirectory) -> int:
    """Return how many bytes TensorBoard's files in the run directory have so far."""
    writers = tensorboard_writers(trainer)
    for writer in writers:
        writer.flush()
    return sum(file.stat().st_size for file in event_files(run.tensorboard)) if writers else 0


def rewind_events(directory: Path, size: int) -> None:
    """Keep the first `size` bytes of TensorBoard's files, in one file, and remove its other files, which come later.

    TensorBoard reads files in the order of the times in their names. Time 0 puts this file before the next one even if
    the clock was set back.
    """
    content = b"".join(file.read_bytes() for file in event_files(directory))[:size]
    if len(content) < size:
        log.warning("%s: files are missing or too short; TensorBoard's curves have a gap", directory)
    kept = directory / "events.out.tfevents.0000000000.rewound"
    if content:
        with atomic_write(kept) as partial:
            partial.write_bytes(content)
    written = re.compile(r"events\.out\.tfevents\..*|hparams\.yaml|projector_config\.pbtxt|\d{5,}")  # last: embeddings
    for path in directory.iterdir() if directory.is_dir() else ():
        if not written.fullmatch(path.name) or (path == kept and content):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
