"""The rows of docs/published.md: their commands, and the page that is written from the recorded results."""

import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, composed

sys.path.insert(0, str(ROOT / "benchmarks"))
from published import END, PAGE, ROWS, START, Result, read_results, tables
from release_models import FILES, pack


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_valid_command(row) -> None:
    config = composed(*row.words.split(), "test=false")
    assert config["data"]["pixels"] == "dynamic", "log likelihoods of other pixels cannot be compared"


def test_the_page_has_the_recorded_results() -> None:
    results = [Result.of(row, read_results()) for row in ROWS]
    _, _, rest = PAGE.read_text().partition(f"{START}\n")
    assert rest.partition(f"\n{END}")[0].splitlines() == tables(results)


def test_an_archive_has_the_files_of_a_run_without_the_user(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for file in FILES:
        (tmp_path / "run" / file).write_text(file)
    with tarfile.open(pack(tmp_path / "run", tmp_path)) as archive:
        assert archive.getnames() == [f"run/{file}" for file in FILES]
        assert {(member.uid, member.uname) for member in archive} == {(0, "")}
