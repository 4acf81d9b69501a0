"""The pages that docs/write_pages.py makes, and the navigation of the documentation site."""

import re
import runpy

from conftest import ROOT

DOCS = ROOT / "docs"
PAGES = runpy.run_path(str(DOCS / "write_pages.py"))


def test_the_configuration_page_is_up_to_date() -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == PAGES["configuration"](), "write it again with `python docs/write_pages.py`"


def test_the_tutorial_becomes_a_page() -> None:
    page = PAGES["tutorial"]()
    assert page.startswith("# What a variational autoencoder learns\n")
    assert "\n```python\nimport os\n" in page
    assert "# %%" not in page


def test_the_site_lists_every_page() -> None:  # its builder reports neither a missing page nor an unlisted one
    listed = re.findall(r'"([\w/]+\.md)"', (DOCS / "zensical.toml").read_text(encoding="utf-8"))
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | {"tutorial.md"}
    assert sorted(listed) == sorted(written)
