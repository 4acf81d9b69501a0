"""Length and results of README.md, and the table of parts; commands and links are tested in test_pages.py."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()
GUIDES = (ROOT / "docs" / "guides" / "index.md").read_text()
CONF = ROOT / "conf"
HYDRA = {"basic", "joblib"}  # launchers that come with Hydra and its plugins


def section(page: str, title: str) -> str:
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_parts_has_every_choice() -> None:
    parts = section(GUIDES, "Parts to choose from")
    for group, cell in re.findall(r"^\| [a-z]+ \| `([\w/]+)=` \| (.*) \|$", parts, flags=re.M):
        choices = {file.stem for file in (CONF / group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", cell)) == choices | (HYDRA if group == "hydra/launcher" else set()), group
    groups = {str(path.relative_to(CONF)) for path in CONF.rglob("*") if any(path.glob("*.yaml"))}
    assert groups - {"data", "experiment"} == set(re.findall(r"`([\w/]+)=`", parts))


def test_it_is_short() -> None:
    assert len(README.split()) <= 900


def test_its_results_are_those_of_the_complete_tables() -> None:
    tables = (ROOT / "docs" / "results.md").read_text() + (ROOT / "docs" / "published.md").read_text()
    row = r"^\| `(experiment=[^`]+`).*?\| .* \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(row, section(README, "Results"), flags=re.M)
    assert len(rows) == 6
    for experiment, expected, obtained in rows:
        numbers = [re.findall(r"[\d.]+", line) for line in tables.splitlines() if experiment in line]
        assert any({expected, obtained} <= set(line) for line in numbers), experiment
