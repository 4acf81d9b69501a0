"""A run directory: the files, lock, configuration and state of one training run."""

from __future__ import annotations

import csv
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from vae_lightning.config import UserError
from vae_lightning.files import PARTIAL, FileError, atomic_write, read_dict, write_json

StrPath = str | os.PathLike[str]


class RunError(UserError):
    """A run directory that is incomplete or cannot be used."""


def runs_in(directory: Path) -> list[Path]:
    """Return the run directories up to four levels below `directory`, sorted from oldest to newest."""
    found = [file for depth in ("*", "*/*", "*/*/*", "*/*/*/*") for file in directory.glob(f"{depth}/config.yaml")]
    return [file.parent for file in sorted(found, key=lambda file: file.stat().st_mtime)]


def find_runs(path: StrPath) -> list[Path]:
    """Return `path` if it is a run, a checkpoint or `latest`, or else the runs below it. Raises RunError for none."""
    run, _ = RunDirectory.locate(path)
    if run.config_file.exists():
        return [run.path if str(path) == "latest" else Path(path)]
    if not (found := runs_in(Path(path))):
        raise RunError(f"{path}: {'contains no run' if Path(path).is_dir() else 'no such run directory'}")
    return found


class RunDirectory:
    """The paths, lock, configuration and state of one run. The constructor does not access the disk."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.history_file = self.path / "history.csv"
        self.metrics_file = self.path / "metrics.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.evaluation_values = self.path / "evaluation.csv"
        self.log_file = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.best_checkpoint = self.checkpoints / "best.ckpt"
        self.tensorboard = self.path / "tensorboard"
        self.figures = self.path / "figures"
        self.export = self.path / "export"
        self.evaluations = self.path / "evaluations"

    def __str__(self) -> str:
        return str(self.path)

    __fspath__ = __str__

    @classmethod
    def locate(cls, path: StrPath) -> tuple[RunDirectory, Path]:
        """Return the run directory and checkpoint for `path`, which is a run directory, a checkpoint or `latest`.

        The checkpoint of a directory is the best one, or the last one if there is no best one yet.
        """
        path = Path(path)
        if str(path) == "latest":
            if not (runs := runs_in(Path("outputs"))):
                raise RunError("latest: no run found in outputs/")
            path = runs[-1]
        if path.suffix == ".ckpt" and not path.is_dir():
            return cls(path.absolute().parent.parent), path
        run = cls(path)
        no_best = run.last_checkpoint.exists() and not run.best_checkpoint.exists()
        return run, run.last_checkpoint if no_best else run.best_checkpoint

    @property
    def state(self) -> Literal["new", "unfinished", "finished"]:
        """The state of the run: config.yaml is written first, metrics.json last; resuming marks it as unfinished."""
        if not self.config_file.exists():
            return "new"
        try:
            metrics = read_dict(self.metrics_file)
        except FileError:
            return "unfinished"
        return "finished" if metrics and not metrics.get("unfinished") else "unfinished"

    def create(self, config: dict[str, Any]) -> None:
        """Write config.yaml into the new, locked run. Raises RunError if the directory already has something else."""
        advice = "choose another hydra.run.dir"
        if self.config_file.exists():
            raise RunError(f"{self}: already contains a run; resume={self} continues it, or {advice}")
        files = vars(self).values()
        others = [p.name for p in self.path.iterdir() if p in files or (p.is_dir() and not p.name.startswith("."))]
        if others:
            raise RunError(f"{self}: contains {min(others)}; a run needs a directory of its own: {advice}")
        self.write_config(config)

    def discard(self) -> None:
        """Remove the files of the run; other files in the directory stay."""
        for path in (path for name, path in vars(self).items() if name != "path"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def reopen(self, config: dict[str, Any]) -> None:
        """Mark the run as unfinished, with `config`.

        Its metrics are kept until there are new ones. Its evaluations, which are of earlier weights, are renamed: they
        get the number of epochs of the finished run in their names.
        """
        metrics = read_dict(self.metrics_file) if self.state == "finished" else {}
        ending = f"{metrics['epochs']}_epochs" if "epochs" in metrics else "unfinished"
        for path in (self.evaluation_file, self.evaluation_values, self.evaluations):
            if path.exists():
                renamed = path.with_stem(f"{path.stem}_{ending}")
                shutil.rmtree(renamed, ignore_errors=True)
                os.replace(path, renamed)
        if metrics:
            write_json(self.metrics_file, metrics | {"unfinished": True})
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.yaml."""
        with atomic_write(self.config_file) as partial:
            partial.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def read_config(self) -> dict[str, Any]:
        """Read the configuration of the run. Raises RunError if there is none."""
        try:
            config = read_dict(self.config_file)
        except FileError as error:
            runs = runs_in(self.path)
            reason = f"it contains {len(runs)} runs; the newest is {runs[-1]}" if runs else str(error)
            raise RunError(f"{self}: not a run directory ({reason})") from error
        for key, kind in (("model", dict), ("data", dict), ("seed", int)):
            if not isinstance(config.get(key), kind):
                raise RunError(f"{self.config_file}: is not the configuration of a run: {key}={config.get(key)}")
        return config

    def read_environment(self) -> dict[str, Any]:
        """Read environment.json; {} if it does not exist. Raises FileError."""
        return read_dict(self.environment_file) if self.environment_file.exists() else {}

    def read_history(self) -> list[dict[str, float]]:
        """Read history.csv, without empty cells and values that are not finite; [] if it does not exist."""
        text = self.history_file.read_text(encoding="utf-8") if self.history_file.exists() else ""
        rows = [{key: float(cell or "nan") for key, cell in row.items()} for row in csv.DictReader(text.splitlines())]
        return [{key: value for key, value in row.items() if math.isfinite(value)} for row in rows]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory if needed, and lock it until the block or the process ends.

        Removes temporary files that killed processes left. Raises RunError if another process has locked it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows: no locks
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self}: is being trained by another process") from None
            except OSError:  # the file system has no locks
                pass
            for partial in self.checkpoints.glob(f"{PARTIAL}*"):
                partial.unlink()
            yield
        finally:
            os.close(descriptor)
            with suppress(OSError):  # it is not empty
                self.path.rmdir()
