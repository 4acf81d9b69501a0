"""Build the documentation site from docs/ into site/, and fail on a broken link.

    python scripts/site.py        # make docs runs this

The pages are copied to build/docs/, which also gets docs/tutorial.py as a page and a reference page for each folder of
the package. Zensical makes HTML of them. Every link, picture and anchor of that HTML is then checked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vae_lightning"
FOLDERS = {
    "data": "Data sets, pixel protocols and batches.",
    "models": "The VAE, the autoencoder and their parts.",
    "runs": "Run directories, and loading a trained model.",
    "training": "Training: the trainer, callbacks, checkpoints and loggers.",
    "analysis": "Evaluation, figures, reports, the explorer and export.",
}


PACKAGE_PAGE = """# Package

These names can be imported from `vae_lightning`:

- [`VAE`][vae_lightning.models.vae.VAE]
- [`Autoencoder`][vae_lightning.models.autoencoder.Autoencoder]
- [`MNISTDataModule`][vae_lightning.data.mnist.MNISTDataModule]
- [`load_run`][vae_lightning.runs.loading.load_run]

::: vae_lightning.config

::: vae_lightning.figures

::: vae_lightning.files
"""


def tutorial(script: str) -> str:
    """The page of a script in `# %%` cells: comments of Markdown cells as text, the other cells as code."""
    _, *cells = re.split(r"^# %%(.*)\n", script, flags=re.M)
    page = []
    for kind, cell in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in kind:
            page.append(re.sub(r"^# ?", "", cell, flags=re.M).strip())
        else:
            page.append(f"```python\n{cell.strip()}\n```")
    return "\n\n".join(page) + "\n"


def for_the_site(text: str, folder: Path) -> str:
    """A page of `folder` with a link to the tutorial's page, and without links to files that the site does not have."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        path = (folder / target.partition("#")[0]).resolve()
        if path == ROOT / "docs" / "tutorial.py":
            return f"[{words}]({target.removesuffix('.py')}.md)"
        return match[0] if path.is_relative_to(ROOT / "docs") else words

    return re.sub(r"(?<!!)\[([^\[\]]+)\]\((?!\w+:)([^)\s]+)\)", link, text)


def reference(folder: str, purpose: str) -> str:
    """The reference page of a folder of the package: the docstrings of its modules."""
    modules = sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__")
    return f"# {folder}\n\n{purpose}\n" + "".join(f"\n::: vae_lightning.{folder}.{name}\n" for name in modules)


def write_pages(pages: Path) -> None:
    """Write all pages of the site as Markdown into `pages`."""
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("*.py", "*.json"))
    for page in pages.rglob("*.md"):
        folder = ROOT / "docs" / page.relative_to(pages).parent
        page.write_text(for_the_site(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    script = (ROOT / "docs" / "tutorial.py").read_text(encoding="utf-8")
    (pages / "tutorial.md").write_text(for_the_site(tutorial(script), ROOT / "docs"), encoding="utf-8")
    (pages / "reference").mkdir()
    (pages / "reference" / "package.md").write_text(PACKAGE_PAGE, encoding="utf-8")
    for name, purpose in FOLDERS.items():
        (pages / "reference" / f"{name}.md").write_text(reference(name, purpose), encoding="utf-8")


def pages_of(navigation: list[object]) -> Iterator[str]:
    """The pages that a navigation of zensical.toml names."""
    for entry in navigation:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(page, list):
                yield from pages_of(page)
            else:
                yield str(page)


class Page(HTMLParser):
    """The anchors, links and loaded files of an HTML page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := attributes.get(key))}
        target = attributes.get("href") or attributes.get("src")
        if target and tag == "a":
            self.links.append(target)
        elif target and attributes.get("rel") != "canonical":
            self.loaded.append(target)


def problems(site: Path) -> Iterator[str]:
    """Links and anchors of a built site that do not exist, and files that a page loads from elsewhere."""
    pages = {file: Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    for file, page in pages.items():
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    yield f"{file.relative_to(site)}: loads {target} from another server"
                continue
            linked = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not linked.exists():
                yield f"{file.relative_to(site)}: {target} does not exist"
            elif parts.fragment and linked in pages and unquote(parts.fragment) not in pages[linked].anchors:
                yield f"{file.relative_to(site)}: {target} has no such anchor"


def main() -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    pages, site = ROOT / config["docs_dir"], ROOT / config["site_dir"]
    write_pages(pages)
    listed, written = set(pages_of(config["nav"])), {str(p.relative_to(pages)) for p in pages.rglob("*.md")}
    if listed != written:
        raise SystemExit(f"zensical.toml: nav and the pages of docs/ differ: {', '.join(sorted(listed ^ written))}")
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}).returncode:
        raise SystemExit(1)
    found = list(problems(site))
    if found:
        raise SystemExit("\n".join(found))
    print(site / "index.html")


if __name__ == "__main__":
    main()
