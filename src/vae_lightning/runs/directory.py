"""A run directory: the files of one training run, who may write them, and how far the run is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from vae_lightning.config import UserError
from vae_lightning.files import FileError, as_yaml, atomic_write, read_json, read_yaml, remove_partial, write_json

StrPath = str | os.PathLike[str]
UNFINISHED = "unfinished"  # in metrics.json: the run has been resumed since


class RunError(UserError):
    """A run directory that is incomplete, or that cannot be written."""


def runs_in(directory: Path) -> list[Path]:
    """The run directories below, in sweeps too, the newest last."""
    found = [file for depth in ("*", "*/*", "*/*/*") for file in directory.glob(f"{depth}/config.yaml")]
    return [file.parent for file in sorted(found, key=lambda file: file.stat().st_mtime)]


def newest_run(directory: Path) -> Path:
    """The run directory that `latest` means. Raises RunError where there is none."""
    runs = runs_in(directory)
    if not runs:
        raise RunError(f"latest: there is no run in {directory}/ here")
    return runs[-1]


class RunDirectory:
    """The paths, lock, configuration and state of one run. To make one touches no file."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.history_file = self.path / "history.csv"
        self.metrics_file = self.path / "metrics.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.log_file = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.best_checkpoint = self.checkpoints / "best.ckpt"
        self.previous_checkpoint = self.checkpoints / "previous.ckpt"
        self.tensorboard = self.path / "tensorboard"
        self.figures = self.path / "figures"
        self.export = self.path / "export"
        self.evaluations = self.path / "evaluations"

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def locate(cls, path: StrPath) -> tuple[RunDirectory, Path]:
        """The run directory that `path` is, or that a checkpoint at `path` belongs to, and the checkpoint.

        Of a directory that is the best one, or the last where there is no best one yet.
        """
        path = newest_run(Path("outputs")) if str(path) == "latest" else Path(path)
        if path.suffix == ".ckpt" and not path.is_dir():
            run = cls(path.absolute().parent.parent)  # checkpoints/ may be a link, and so may the file itself
            return run if run.config_file.exists() else cls(path.resolve().parent.parent), path
        run = cls(path)
        no_best = run.last_checkpoint.exists() and not run.best_checkpoint.exists()
        return run, run.last_checkpoint if no_best else run.best_checkpoint

    @property
    def state(self) -> Literal["new", "unfinished", "finished"]:
        """A run begins with its config.yaml and ends with its metrics.json, until it is made longer."""
        if not self.config_file.exists():
            return "new"
        try:
            metrics = read_json(self.metrics_file)
        except FileError:
            return "unfinished"
        return "finished" if metrics and not metrics.get(UNFINISHED) else "unfinished"

    def create(self, config: dict[str, Any]) -> None:
        """Create the directory with its config.yaml. Raises RunError if it already holds a run, or directories."""
        self.path.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]
        around = self.path.resolve() in (here := Path.cwd(), *here.parents) and any(self.path.iterdir())
        if self.state == "new" and (others or around):
            what = f"holds {sorted(others)[0]}/" if others else "is the current directory, or one above it"
            raise RunError(f"{self.path}: {what}; a run needs a directory of its own: choose another hydra.run.dir")
        try:
            self.write_config(config, new=True)  # of two jobs that choose the same directory, one fails
        except FileExistsError:
            raise RunError(f"{self}: already holds a run; choose another hydra.run.dir") from None

    def reopen(self, config: dict[str, Any]) -> None:
        """Mark the run as unfinished, with `config`. What was measured is kept: its metrics until there are new ones.

        Evaluations are kept under the number of the epochs before.
        """
        if self.state == "finished":
            metrics = read_json(self.metrics_file)
            write_json(self.metrics_file, metrics | {UNFINISHED: True})
            for path in (self.evaluation_file, self.evaluations):
                if path.exists():
                    os.replace(path, path.with_stem(f"{path.stem}_{metrics.get('epochs')}_epochs"))
        self.write_config(config)

    def remove_partial(self) -> None:
        """Remove what processes that were killed were writing into this run."""
        for folder in (self.path, self.checkpoints, self.figures, self.export, self.evaluations):
            remove_partial(folder)

    def write_config(self, config: dict[str, Any], new: bool = False) -> None:
        """Write the configuration of the run; `new` raises FileExistsError if there is one."""
        with atomic_write(self.config_file, new=new) as partial:
            partial.write_text(as_yaml(config), encoding="utf-8")

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run. Raises RunError where there is none."""
        try:
            config = read_yaml(self.config_file)
        except FileError as error:
            if runs := runs_in(self.path):
                raise RunError(f"{self}: holds {len(runs)} runs, and is none; the newest is {runs[-1]}") from error
            raise RunError(f"{self}: not a run directory ({error})") from error
        for key, kind in (("model", dict), ("data", dict), ("seed", int)):
            if not isinstance(config.get(key), kind):
                raise RunError(f"{self.config_file}: is not the configuration of a run: {key}={config.get(key)}")
        return config

    def read_environment(self) -> dict[str, Any]:
        """The content of environment.json, or {} before there is one. Raises FileError."""
        return read_json(self.environment_file) if self.environment_file.exists() else {}

    def subdirectory(self, path: Path) -> Path:
        """Create a directory of the run, such as `figures`. Raises RunError for a link, which may lead anywhere."""
        if path.is_symlink():
            raise RunError(f"{path}: is a link; nothing is written through it")
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Reserve the run for this process until the block ends or the process dies. Raises RunError if it is taken."""
        try:
            import fcntl
        except ImportError:  # Windows: two jobs in one directory are not told apart
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self}: is being trained by another process") from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether a process is training the run."""
        try:
            with self.locked():
                return False
        except RunError:
            return True
