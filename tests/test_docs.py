"""docs/configuration.md has the keys and comments of conf/."""

import runpy

from conftest import ROOT


def test_the_configuration_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    pages = runpy.run_path(str(ROOT / "docs" / "write_pages.py"))
    assert written == pages["configuration"](), "write it again with `python docs/write_pages.py`"
