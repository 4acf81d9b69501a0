from pathlib import Path

import pytest

from vae_lightning.files import FileError, atomic_write, read_dict, staging_directory, write_json


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.yaml", "[1, 2]"), ("x.yaml", ""), ("x.yaml", "a: ["), ("x.yaml", "x: !!python/object:os.system {}"),
     ("x.json", "3"), ("x.json", "{"), ("x.json", "\xff")],
)  # fmt: skip
def test_invalid_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=rf"{name}: cannot be read") as error:
        read_dict(tmp_path / name)
    assert "\n" not in str(error.value)


def test_writes_are_atomic(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, "ü", None, True]})

    def fails(context, name: str) -> None:
        with context as partial:
            (partial / name).write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails(atomic_write(path), "")
    assert read_dict(path) == {"a": [1, 2.5, "ü", None, True]}
    with pytest.raises(RuntimeError):
        fails(staging_directory(tmp_path / "folder"), "a")
    assert list((tmp_path / "folder").iterdir()) == []
    with staging_directory(tmp_path / "folder") as scratch:
        (scratch / "a").write_text("a")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["a"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "x.json"]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*x\.json"), atomic_write(tmp_path / "x.json"):
        raise OSError(28, "No space left on device")
