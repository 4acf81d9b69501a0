"""The config group `logger`: where a run's scalars, settings and figures go, beside its history.csv.

A logger is any subclass of Lightning's `Logger`. Where its constructor takes them, it receives the run directory as
`save_dir` and, in a resumed run, its former `id` or `run_id`, so that W&B and MLflow continue the same run. TensorBoard
gets the step of the checkpoint as `purge_step`, and hides what was written after it, because it is written again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vae_lightning import figures
from vae_lightning.config import ConfigError, Spec, build, locate
from vae_lightning.runs.directory import RunDirectory


def make_loggers(
    specs: Mapping[str, Spec], run: RunDirectory, resume: bool, checkpoint: dict[str, Any] | None
) -> dict[str, Logger]:
    """Build the configured loggers; those of a run that is resumed from `checkpoint` with their former ids.

    Raises ConfigError, also for a logger whose package is not installed.
    """
    ids = run.read_environment().get("loggers", {}) if resume else {}
    loggers: dict[str, Logger] = {}
    for name, spec in specs.items():
        offered = {"save_dir": str(run), "id": ids.get(name), "run_id": ids.get(name)}
        kind = locate(spec.get("_target_"), Logger, f"logger.{name}._target_")
        given = {key: value for key, value in offered.items() if key in signature(kind).parameters and key not in spec}
        if issubclass(kind, TensorBoardLogger):
            given["purge_step"] = (checkpoint["progress"]["purge_step"] if checkpoint else 0) if resume else None
        try:
            loggers[name] = build(spec, Logger, f"logger.{name}", **given)
        except ModuleNotFoundError as error:
            raise ConfigError(f"logger={name}: its package is not installed ({error})") from error
    return loggers


@contextmanager
def opened(loggers: Mapping[str, Logger], settings: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Log the run's settings, which opens the loggers, and yield the logger ids by name. Lightning closes the loggers.

    Raises ConfigError for a logger that cannot be opened.
    """
    ids: dict[str, str] = {}
    failed, hook = True, threading.excepthook
    # On a full disk TensorBoard's thread raises an OSError; the next write in this thread raises the same error.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    try:
        for name, logger in loggers.items():
            try:
                logger.log_hyperparams(settings)
                if isinstance(logger.version, str) and logger.version:
                    ids[name] = logger.version
            except Exception as error:  # each logger has its own errors: no account, no network, no database
                raise ConfigError(f"logger={name}: cannot be opened ({' '.join(str(error).split())})") from error
        yield ids
        failed = False
    finally:
        for logger in loggers.values():
            if isinstance(logger, WandbLogger) and logger.version in ids.values():
                # Without this, the next run of this process would be added to this W&B run.
                logger.experiment.finish(int(failed))
        threading.excepthook = hook


def log_figures(trainer: Trainer, drawn: Mapping[str, Tensor | Figure], step: int) -> None:
    """Send image grids and figures to each logger that accepts figures, in the first process."""
    for logger in trainer.loggers:
        for name, figure in drawn.items():
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                (writer.add_figure if isinstance(figure, Figure) else writer.add_image)(name, figure, step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, figures.as_pil(figure), f"{name}/{step}.png")
            elif hasattr(logger, "log_image"):  # W&B and custom loggers
                logger.log_image(name, [figures.as_pil(figure)], step)


def tensorboard_writers(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of all TensorBoard loggers; none except in the first process."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []
