"""Files: what is written is there whole or not at all, and what is read is plain values of a sensible size.

A run directory may come from someone else. So nothing is written through a link that lies in it, and a file that would
fill the memory or hang its reader is refused.
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

PARTIAL = ".vae_lightning-"  # how the names of files begin that are still being written
LARGEST = 2_000_000  # bytes of a file of ours: a hundred times what they have
LONGEST = 1_000  # letters of a word that may be a number, which take time in proportion to their square
DEEPEST = 50  # lists and dictionaries in each other
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it was built so: ten times quicker


class FileError(UserError):
    """A file that is not what it should be."""


@contextmanager
def atomic_write(path: Path, durable: bool = False, new: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path`, with its suffix; it replaces `path` when the block ends without an error.

    `durable` waits for the disk first, so that the file survives a power cut. `new` raises FileExistsError instead of
    replacing a file. An OSError that names no file gets the name of `path`.
    """
    partial = partial_path(path)
    try:
        with errors_name(path):
            partial.unlink(missing_ok=True)
            yield partial
            if durable:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            (os.link if new else os.replace)(partial, path)  # each is one step, and link fails if the file exists
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, such as that of a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory; its files move into `directory` when the block ends without an error."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=partial_path(directory / "-").name) as scratch:
        yield Path(scratch)
        for file in Path(scratch).iterdir():
            os.replace(file, directory / file.name)


def partial_path(path: Path) -> Path:
    """The name under which this process writes `path`: one that nobody else would choose."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def remove_partial(directory: Path) -> None:
    """Remove what processes that were killed were writing into `directory` itself."""
    for path in directory.glob(f"{PARTIAL}*"):
        process = path.name.removeprefix(PARTIAL).partition("-")[0]
        if not process.isdigit() or is_running(int(process)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether another process has this number. This one's own may have been a dead one's, in a container."""
    if process == os.getpid():
        return False
    if sys.platform == "win32":  # where there is no asking
        return True
    try:
        os.kill(process, 0)
    except PermissionError:  # a process of another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def as_yaml(content: dict[str, Any]) -> str:
    """Return `content` as YAML without aliases, which `read_yaml` refuses."""
    copied = json.loads(json.dumps(content))  # a list that stands in two places becomes two lists
    return yaml.safe_dump(copied, sort_keys=False)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path, durable=True) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A dictionary of plain values. Raises FileError for anything else."""
    return _read(path, json.loads)


def read_yaml(path: Path) -> dict[str, Any]:
    """A dictionary of plain values. Raises FileError for anything else."""
    return _read(path, _load_yaml)


def _read(path: Path, load: Any) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ValueError("no such file")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes are not a file of this kind")
        content = load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
        _check_plain(content)
    # The loaders have errors of many kinds for values that are none (dates, numbers), and none of them is a bug here.
    except Exception as error:
        raise FileError(f"{path}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    return content


def _load_yaml(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or isinstance(event, yaml.AliasEvent):  # a few aliases can stand for gigabytes
            raise ValueError("it nests too deeply, or has aliases")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > LONGEST:
            raise ValueError("it has a number of thousands of digits")
    return yaml.load(text, Loader=SafeLoader)


def _check_plain(tree: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError("it nests too deeply")
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise ValueError(f"{key} is no name")
            _check_plain(value, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            _check_plain(value, depth + 1)
    elif not isinstance(tree, str | int | float | None) or (isinstance(tree, int) and abs(tree) >= 2**63):
        raise ValueError(f"{str(tree)[:30]} is no plain value")
