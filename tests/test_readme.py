"""What README.md alone promises; its commands, examples and links are tested with the other pages in test_pages.py."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()
CONF = ROOT / "conf"
HYDRA = {"basic", "joblib"}  # launchers that come with Hydra and its plugins


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_contents_has_every_choice() -> None:
    for group, cell in re.findall(r"^\| [a-z]+ \| `([\w/]+)=` \| (.*) \|$", section("Contents"), flags=re.M):
        choices = {file.stem for file in (CONF / group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", cell)) == choices | (HYDRA if group == "hydra/launcher" else set()), group
    groups = {str(path.relative_to(CONF)) for path in CONF.rglob("*") if any(path.glob("*.yaml"))}
    assert groups - {"data", "experiment"} == set(re.findall(r"`([\w/]+)=`", section("Contents")))


def test_its_results_are_those_of_the_complete_tables() -> None:
    tables = (ROOT / "docs" / "results.md").read_text() + (ROOT / "docs" / "published.md").read_text()
    rows = re.findall(r"^\| `(experiment=[^`]+`).*?\| .* \| ([\d.]+) \| ([\d.]+) \|$", section("Results"), flags=re.M)
    assert len(rows) == 6
    for experiment, expected, obtained in rows:
        numbers = [re.findall(r"[\d.]+", line) for line in tables.splitlines() if experiment in line]
        assert any({expected, obtained} <= set(line) for line in numbers), experiment
