"""docs/configuration.md is up to date, and scripts/site.py converts pages and finds broken links."""

import re
import runpy
from importlib.metadata import version

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
