"""A run directory: the files that a training run leaves behind, and who may write them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vae_lightning.config import UserError
from vae_lightning.files import FileError, as_yaml, read_json, whole


class RunError(UserError):
    """A run directory that cannot be written, or is not whole."""


def start_run(directory: Path, config: dict[str, Any]) -> None:
    """Create `directory` with its config.yaml. Raises RunError if it already holds a run."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f".config.{os.getpid()}.yaml"
    file.write_text(as_yaml(config))
    try:
        os.link(file, directory / "config.yaml")  # whole, and only once: of two jobs that choose it, one wins
    except FileExistsError:
        raise RunError(f"{directory}: already holds a run; choose another hydra.run.dir") from None
    finally:
        file.unlink(missing_ok=True)


def reopen_run(directory: Path, config: dict[str, Any]) -> None:
    """Let `directory` say that its run goes on, with `config`. What was measured so far is kept under its epochs."""
    if (directory / "metrics.json").exists():
        try:
            epochs = read_json(directory / "metrics.json").get("epochs")
        except FileError:
            epochs = "some"
        for file in directory.glob("evaluation.json"):
            os.replace(file, directory / f"evaluation_{epochs}_epochs.json")
        (directory / "metrics.json").unlink()
    with whole(directory / "config.yaml") as partial:
        partial.write_text(as_yaml(config))


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep the run at `directory` to this process until it ends, however it ends. Raises RunError if another has it."""
    with _locked(directory) as ours:
        if not ours:
            raise RunError(f"{directory}: is being trained by another process")
        yield


def is_held(directory: Path) -> bool:
    """Whether a process trains the run at `directory`."""
    with _locked(directory) as ours:
        return not ours


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory until the end, or until the process dies: whether it was free."""
    try:
        import fcntl
    except ImportError:  # Windows: two jobs in one directory are not told apart
        yield True
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        except OSError:  # a file system that knows no locks
            ours = True
        yield ours
    finally:
        os.close(descriptor)
