"""Write files atomically, and read dictionaries from JSON and YAML files."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vae_lightning.config import UserError

PARTIAL = ".partial-"  # prefix of temporary files


class FileError(UserError):
    """A file that cannot be read."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path`, on the disk, if the block raises no error."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, whose files are moved into `directory` if the block raises no error."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=PARTIAL) as scratch:
        yield Path(scratch)
        for file in Path(scratch).iterdir():
            os.replace(file, directory / file.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_dict(path: Path) -> dict[str, Any]:
    """Read a dictionary from a JSON or YAML file. Raises FileError."""
    load = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return dict(load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: not a dictionary
        raise FileError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
