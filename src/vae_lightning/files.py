"""Write files atomically, and read plain values from files of limited size.

A run directory may come from someone else. So nothing is written through a link in it, and a file that would fill the
memory or block the reader is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vae_lightning.config import UserError

PARTIAL = ".vae_lightning-"  # prefix of temporary files
LARGEST = 2_000_000  # bytes of a file; the files of a run have about a hundredth of that
LONGEST = 1_000  # characters of a value that may be a number: reading a number takes quadratic time
DEEPEST = 50  # levels of nested lists and dictionaries
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C, if installed, is ten times faster


class FileError(UserError):
    """A file that cannot be read, or has unexpected content."""


@contextmanager
def atomic_write(path: Path, durable: bool = False, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, which replaces `path` if the block raises no error.

    `durable` waits until the file is on the disk, so that it survives a power cut. `new` raises FileExistsError if
    `path` exists. An OSError without a file name gets that of `path`.
    """
    partial = partial_path(path)
    try:
        with errors_name(path):
            partial.unlink(missing_ok=True)
            yield partial
            if durable:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            (os.link if new else os.replace)(partial, path)  # both are atomic; os.link fails if `path` exists
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Add `path` to an OSError without a file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, whose files are moved into `directory` if the block raises no error."""
    with errors_name(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=partial_path(directory / "-").name) as scratch:
            yield Path(scratch)
            for file in Path(scratch).iterdir():
                os.replace(file, directory / file.name)


def partial_path(path: Path) -> Path:
    """Return the temporary path for `path`, which has the number of this process in its name."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def remove_partial(directory: Path) -> None:
    """Remove temporary files that killed processes left in `directory`, but not in its subdirectories."""
    for path in directory.glob(f"{PARTIAL}*"):
        process = path.name.removeprefix(PARTIAL).partition("-")[0]
        if not process.isdigit() or is_running(int(process)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether another process has this number. In a container, this process may reuse a dead one's number."""
    if process == os.getpid():
        return False
    if sys.platform == "win32":  # os.kill would end the process
        return True
    try:
        os.kill(process, 0)
    except PermissionError:  # a process of another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


class PlainDumper(yaml.SafeDumper):
    """Writes a list that stands in two places twice instead of as an alias, and quotes long texts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if len(data) > LONGEST // 2 else None  # `_load_yaml` refuses long values without quotes
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


PlainDumper.add_representer(str, PlainDumper.represent_str)


def as_yaml(content: dict[str, Any]) -> str:
    """Return `content` as YAML without aliases, which `read_yaml` refuses."""
    return yaml.dump(content, Dumper=PlainDumper, sort_keys=False)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically and wait until it is on the disk."""
    with atomic_write(path, durable=True) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a dictionary of plain values from a JSON file. Raises FileError."""
    return _read(path, json.loads)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a dictionary of plain values from a YAML file. Raises FileError."""
    return _read(path, _load_yaml)


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Read a text file of at most `largest` bytes. Raises FileError for anything else, such as a pipe or a device."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        if path.stat().st_size > largest:
            raise ValueError(f"it has {path.stat().st_size} bytes, and at most {largest} are allowed")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read ({' '.join(str(error).split())[:300]})") from error


def _read(path: Path, load: Any) -> dict[str, Any]:
    text = read_text(path)
    try:
        content = load(text)
        if not isinstance(content, dict):
            raise ValueError("its content is not a dictionary")
        _check_plain(content)
    # The loaders raise many kinds of exceptions for invalid dates and numbers; each of them means a bad file.
    except Exception as error:
        raise FileError(f"{path}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    return content


def _load_yaml(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or isinstance(event, yaml.AliasEvent):  # a few aliases can expand to gigabytes
            raise ValueError("it is nested too deeply, or has aliases")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > LONGEST:
            raise ValueError(f"it has an unquoted value of more than {LONGEST} characters")
    return yaml.load(text, Loader=SafeLoader)


def _check_plain(tree: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(key, str | int):
                raise ValueError(f"the key {key} is neither a string nor an integer")
            _check_plain(value, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            _check_plain(value, depth + 1)
    elif not isinstance(tree, str | int | float | None) or (isinstance(tree, int) and abs(tree) >= 2**63):
        raise ValueError(f"{str(tree)[:30]} is not a plain value")
