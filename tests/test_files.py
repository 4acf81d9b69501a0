import json
import os
import subprocess
from pathlib import Path

import pytest

from vae_lightning.files import (
    FileError,
    as_yaml,
    atomic_write,
    read_json,
    read_yaml,
    remove_partial,
    staging_directory,
    write_json,
)


def test_plain_values_round_trip(tmp_path: Path) -> None:
    shared = [1, 2.5, "ü", None, True]
    content = {"a": shared, "b": {"c": shared, "d": {}}, "long": "word " * 500}
    (tmp_path / "x.yaml").write_text(as_yaml(content))
    write_json(tmp_path / "x.json", content)
    assert read_yaml(tmp_path / "x.yaml") == read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]", "", "x: 2020-99-99", "x: 2020-01-01", "x: !!int abc", "x: !!python/object:os.system {}", "1.5: 2",
        f"x: {10**30}", "x: &m {a: *m}", "x: &a [1]\ny: *a", "x: " + "[" * 100_000 + "]" * 100_000,
        "x: " + "[" * 60 + "]" * 60, "x: '" + "a" * 2_000_000 + "'", "x: 0x_",
    ],
)  # fmt: skip
def test_invalid_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(FileError, match=r"x\.yaml: cannot be read"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{", f'{{"a": {10**400}}}', '{"a": ' + "[" * 60 + "]" * 60 + "}"]
)
def test_invalid_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError, match=r"x\.json: cannot be read"):
        read_json(tmp_path / "x.json")


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "missing"):
        with pytest.raises(FileError, match="no such file"):
            read_yaml(tmp_path / name)


def test_writes_are_atomic(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fails(context, name: str) -> None:
        with context as partial:
            (partial / name).write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails(atomic_write(path), "")
    assert path.read_text() == "old"
    with pytest.raises(FileExistsError), atomic_write(path, new=True) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"
    with pytest.raises(RuntimeError):
        fails(staging_directory(tmp_path / "folder"), "a")
    assert list((tmp_path / "folder").iterdir()) == []
    with staging_directory(tmp_path / "folder") as scratch:
        (scratch / "a").write_text("a")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["a"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "x.json"]


def test_links_are_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "x.json").symlink_to(victim)
    write_json(tmp_path / "x.json", {"a": 1})
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_only_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive = os.getppid()
    theirs = [".thesis.2026.txt", ".env.2.json", f".config.{dead.pid}.yaml", f".vae_lightning-{alive}-last.ckpt"]
    theirs += [f"notes/.vae_lightning-{dead.pid}-last.ckpt", ".vae_lightning-x-last.ckpt"]
    ours = [f".vae_lightning-{dead.pid}-last.ckpt", f".vae_lightning-{os.getpid()}-config.yaml"]
    for name in [*theirs, *ours]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / f".vae_lightning-{dead.pid}--abc").mkdir()  # of staging_directory
    remove_partial(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(theirs)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["notes"]
