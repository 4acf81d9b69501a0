"""The group `logger`: where a run's scalars, settings and pictures go, beside its history.csv.

A logger is any class that inherits from Lightning's `Logger`. It is given the run directory as `save_dir`, and in a
resumed run the `id` or `run_id` that it had, where it takes them: W&B and MLflow then add to the same run. What
TensorBoard wrote after the last checkpoint is cut off when a run is resumed, for it will be written again.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import threading
import time
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
from vae_lightning.runs.directory import RunDirectory, RunError

log = logging.getLogger(__name__)

EVENTS = "events.out.tfevents."
EXTRAS = ("wandb", "mlflow")  # loggers that need a package of this extra


def make_loggers(specs: Mapping[str, Spec], run: RunDirectory, ids: Mapping[str, str]) -> dict[str, Logger]:
    """The loggers that a configuration names; `ids` are those of a resumed run. Raises ConfigError."""
    loggers: dict[str, Logger] = {}
    for name, spec in specs.items():
        offered = {"save_dir": str(run), "id": ids.get(name), "run_id": ids.get(name)}
        try:
            known = isinstance(spec, Mapping) and "_target_" in spec  # else `build` says what is wrong
            takes = signature(locate(spec["_target_"], Logger, f"logger.{name}._target_")).parameters if known else ()
            given = {key: value for key, value in offered.items() if key in takes and key not in spec}
            loggers[name] = build(spec, Logger, f"logger.{name}", **given)
        except ConfigError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                hint = f"pip install -e '.[{name}]'" if name in EXTRAS else str(error.__cause__)
                raise ConfigError(f"logger={name}: its package is not installed; {hint}") from error
            raise
    return loggers


@contextmanager
def opened(loggers: Mapping[str, Logger], settings: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Open loggers and tell them the run's settings, yield the ids that they gave it, and close them in any case.

    Raises ConfigError for one that cannot be opened.
    """
    ids: dict[str, str] = {}
    status, hook = "failed", threading.excepthook
    # A full disk in TensorBoard's thread: the next write, in this thread, raises the same error.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    try:
        for name, logger in loggers.items():
            try:
                if not isinstance(logger, TensorBoardLogger):  # which takes them together with the results
                    logger.log_hyperparams(settings)
                if isinstance(logger.version, str) and logger.version:
                    ids[name] = logger.version
            except Exception as error:  # each has errors of its own: no account, no network, no such database
                said = " ".join(str(error).split())[:300]
                raise ConfigError(f"logger={name}: cannot be opened ({said})") from error
        yield ids
        status = "success"
    finally:
        for logger in loggers.values():
            with suppress(OSError) if status == "failed" else nullcontext():  # a full disk is reported already
                logger.finalize(status)
            if isinstance(logger, WandbLogger) and logger.version in ids.values():
                # Or the next run of this process would be added to this one.
                logger.experiment.finish(int(status != "success"))
        threading.excepthook = hook


def log_pictures(trainer: Trainer, pictures: Mapping[str, Tensor | Figure]) -> None:
    """Give grids and figures to the loggers that take pictures."""
    step = trainer.global_step
    for logger in trainer.loggers if trainer.is_global_zero else ():
        for name, picture in pictures.items():
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                (writer.add_figure if isinstance(picture, Figure) else writer.add_image)(name, picture, step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, figures.as_pil(picture), f"{name}/{step}.png")
            elif hasattr(logger, "log_image"):  # W&B's, and the way for one of your own
                logger.log_image(name, [figures.as_pil(picture)], step)


def boards(trainer: Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers, of the one process that writes."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def event_sizes(trainer: Trainer, run: RunDirectory) -> dict[str, int]:
    """TensorBoard's files in the run directory, and how many bytes of each there are so far."""
    for writer in boards(trainer):
        writer.flush()
    return {path.name: path.stat().st_size for path in run.tensorboard.glob(f"{EVENTS}*")} if boards(trainer) else {}


def event_files(board: Path, sizes: Mapping[str, int]) -> dict[Path, int]:
    """The files that a checkpoint has noted, and their sizes; one may have got other seconds in its name since.

    Raises RunError for a name that is none of TensorBoard's.
    """
    found = {}
    for name, size in sizes.items():
        if not re.fullmatch(rf"{re.escape(EVENTS)}[^/\\]+", name):
            raise RunError(f"{board.parent}: its checkpoint names a TensorBoard file {name}")
        rest = name.removeprefix(EVENTS).partition(".")[2]
        paths = (board / name, *board.glob(f"{EVENTS}*.{glob.escape(rest)}"))
        path = next((path for path in paths if path.is_file() and not path.is_symlink()), None)
        if path:
            found[path] = size
    return found


def rewind_events(board: Path, sizes: Mapping[str, int]) -> None:
    """Cut TensorBoard's files to the sizes that a checkpoint has noted, and remove the others."""
    files = event_files(board, sizes)
    for path in sorted(board.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # emptied before
        elif path not in files:
            path.unlink()
    for path, size in files.items():
        if path.stat().st_size < size:
            log.warning("%s: shorter than it was; TensorBoard's curves have a gap", path)
        else:
            os.truncate(path, size)
    # TensorBoard reads its files in the order of the seconds in their names. Where the clock was set back since, or
    # this second is not over, the next one would come before these.
    now = int(time.time())
    for n, path in enumerate(sorted(files, reverse=True)):
        seconds, _, rest = path.name.removeprefix(EVENTS).partition(".")
        if seconds.isdigit() and int(seconds) >= now - n:
            os.replace(path, board / f"{EVENTS}{now - n - 1:010d}.{rest}")
