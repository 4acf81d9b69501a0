"""docs/configuration.md is up to date, and scripts/site.py converts pages and finds broken links."""

import re
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import pytest
from conftest import ROOT
from pydantic import Field

from vae_lightning.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Seed

CONFIGURATION = runpy.run_path(str(ROOT / "scripts" / "configuration.py"))
SITE = runpy.run_path(str(ROOT / "scripts" / "site.py"))


def test_the_configuration_page_is_up_to_date() -> None:
    texts = [(ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), CONFIGURATION["page"]()]
    (pinned,) = re.findall(r"^lightning==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    if version("lightning") != pinned:  # other versions have other Trainer arguments
        texts = [re.sub(r"#### Other arguments of Lightning.*?\n### ", "", text, flags=re.S) for text in texts]
    written, expected = texts
    assert written == expected, "write it again with `python scripts/configuration.py`"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (PositiveInt, "positive integer"),
        (NonNegativeInt, "integer ≥ 0"),
        (Positive, "positive number"),
        (NonNegative, "number ≥ 0"),
        (Seed, "integer from 0 to 4294967295"),
        (bool, "true or false"),
        (str | None, "string or null"),
        (Literal["relu", "tanh"], "one of `relu`, `tanh`"),
        (Literal["principal"] | list[int], "`principal` or list of integers"),
        (list[PositiveInt], "list of positive integers"),
        (Annotated[list[PositiveInt], Field(min_length=2, max_length=2)], "list of 2 positive integers"),
        (tuple[tuple[float, ...], ...], "list of lists of numbers"),
    ],
)
def test_types_in_words(hint: object, words: str) -> None:
    assert CONFIGURATION["reader_type"](hint) == words


def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> tuple:
    """A configuration file of the group model/prior, as scripts/configuration.py reads it."""
    monkeypatch.setitem(CONFIGURATION["read"].__globals__, "CONF", tmp_path)
    file = tmp_path / "model" / "prior" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return CONFIGURATION["read"](file)


def test_keys_and_comments_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '# A prior (Kingma et al. 2014). More.\n\n_target_: mine.Mine\na: "x # y"   # says # why\nb: {c: [1, 2]}\n'
    title, keys, targets = read(tmp_path, monkeypatch, text)
    assert title == "A prior (Kingma et al. 2014)"
    assert targets == {"model.prior": "mine.Mine"}
    assert [tuple(key) for key in keys] == [
        ("model.prior.a", '"x # y"', "x # y", "says # why"),
        ("model.prior.b", "{c: [1, 2]}", {"c": [1, 2]}, ""),
    ]


def test_a_key_without_an_explanation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = read(tmp_path, monkeypatch, "unexplained: 1\n")
    with pytest.raises(SystemExit, match=r"model\.prior\.unexplained"):
        CONFIGURATION["keys_table"](section, "train")


def test_the_tutorial_as_a_page() -> None:
    script = (
        "# ---\n# jupyter: {}\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # one\n\n# %%\ny = 2\n"
    )
    page = "# Title\n\nText.\n\n```python\nx = 1  # one\n```\n\n```python\ny = 2\n```\n"
    assert SITE["tutorial"](script) == page
    assert SITE["tutorial"]((ROOT / "docs" / "tutorial.py").read_text(encoding="utf-8")).startswith("# ")


def test_links_of_the_site() -> None:
    text = (
        "[a](../tutorial.py) [b](../../README.md#top) [c](../numbers.md#nll) [d](https://x.org) ![e](../images/x.png)"
    )
    changed = "[a](../tutorial.md) b [c](../numbers.md#nll) [d](https://x.org) ![e](../images/x.png)"
    assert SITE["for_the_site"](text, ROOT / "docs" / "guides") == changed


def test_pages_of_a_navigation() -> None:
    navigation = [{"Home": "index.md"}, {"Guides": ["guides/index.md", {"Prior": "guides/prior.md"}]}]
    assert list(SITE["pages_of"](navigation)) == ["index.md", "guides/index.md", "guides/prior.md"]


def test_every_folder_of_the_package_has_a_reference_page() -> None:
    folders = {path.parent.name for path in (ROOT / "src" / "vae_lightning").glob("*/__init__.py")}
    assert set(SITE["FOLDERS"]) == folders - {"launch"}  # the command line: configuration.md
    assert "\n::: vae_lightning.models.vae\n" in SITE["reference"]("models", "Models.")


def test_broken_links_of_a_built_site_are_found(tmp_path: Path) -> None:
    good = '<h1 id="top">a</h1><a href="b.html#top"></a><a href="#top"></a><a href="https://x.org"></a>'
    (tmp_path / "b.html").write_text(good)
    (tmp_path / "a.html").write_text(
        f'{good}<a href="none.html"></a><a href="b.html#none"></a><img src="none.png">'
        '<script src="https://x.org/x.js"></script><link rel="canonical" href="https://x.org">'
    )
    assert list(SITE["problems"](tmp_path)) == [
        "a.html: none.html does not exist",
        "a.html: b.html#none has no such anchor",
        "a.html: none.png does not exist",
        "a.html: loads https://x.org/x.js from another server",
    ]
