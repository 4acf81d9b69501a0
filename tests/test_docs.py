"""docs/configuration.md is up to date, and scripts/site.py converts pages and finds broken links."""

import re
import runpy
from importlib.metadata import version
from pathlib import Path

from conftest import ROOT

CONFIGURATION = runpy.run_path(str(ROOT / "scripts" / "configuration.py"))
SITE = runpy.run_path(str(ROOT / "scripts" / "site.py"))


def test_the_configuration_page_is_up_to_date() -> None:
    texts = [(ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), CONFIGURATION["page"]()]
    (pinned,) = re.findall(r"^lightning==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    if version("lightning") != pinned:  # other versions have other Trainer arguments
        texts = [re.sub(r"#### Other arguments of Lightning.*?\n### ", "", text, flags=re.S) for text in texts]
    written, expected = texts
    assert written == expected, "write it again with `python scripts/configuration.py`"


def test_the_tutorial_as_a_page() -> None:
    script = (
        "# ---\n# jupyter: {}\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # one\n\n# %%\ny = 2\n"
    )
    page = "# Title\n\nText.\n\n```python\nx = 1  # one\n```\n\n```python\ny = 2\n```\n"
    assert SITE["tutorial"](script) == page
    assert SITE["tutorial"]((ROOT / "docs" / "tutorial.py").read_text(encoding="utf-8")).startswith("# ")


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
