"""Turn a fresh clone into a project of your own: make new NAME=my_project.

The package, its commands and every reference to them get the new name. What belongs to this template alone goes: the
reproduced systems, their results, the benchmarks, the release files and this script.
"""

from __future__ import annotations

import keyword
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLD = "vae_lightning"
DROPPED = [
    *("docs/index.md", "docs/guides/project.md"),
    *("benchmarks", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "conf/experiment", "docs/results.md"),
    *("docs/published.md", "docs/speed.md", "tests/test_experiments.py", "tests/test_readme.py"),
    *("docs/published.json", "docs/speed_cpu.json", "docs/growth.json"),
    *("tests/test_new_project.py", "scripts", "zensical.toml", "docs/configuration.md", "docs/site.css"),
    *("tests/test_docs.py", "tests/test_published.py", ".github/workflows/docs.yml", ".github/ISSUE_TEMPLATE"),
    ".github/pull_request_template.md",
]
TARGETS = (
    "reproduce",
    "published",
    "release-models",
    "benchmark",
    "docs",
    "new",
)  # of the Makefile, which go with the files that they run
README = """# {title}

A research project on variational autoencoders, made from vae-lightning.

    make train                      # train the default VAE on MNIST; ARGS="model.latent_dim=2" passes overrides
    make test                       # lint, types and tests

The science is in src/{name}/models/, the configuration in conf/. To add a part, see docs/guides/index.md; to use the
commands, docs/quickstart.md and docs/running.md; to compare numbers, docs/numbers.md.
"""


def check(name: str, root: Path) -> None:
    """Exit with a line for a name that cannot be a package's, or a tree with changes that could be lost."""
    reason = None
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,29}", name) or keyword.iskeyword(name):
        reason = "should be a Python package name: 2 to 30 lower-case letters, digits and underscores"
    elif name in (*sys.stdlib_module_names, "torch", "lightning", "hydra", "numpy", "tests", "train", OLD):
        reason = "is the name of another package"
    if reason:
        raise SystemExit(f"NAME={name}: {reason}, such as NAME=my_project")
    status = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True)
    if status.returncode == 0 and status.stdout.strip():
        raise SystemExit(f"{root}: has uncommitted changes; commit them first, so that nothing is lost")


def rename(root: Path, name: str) -> None:
    """Rename the package and every reference to it in the files of `root`."""
    (root / "src" / OLD).rename(root / "src" / name)
    commands = ("train", "evaluate", "generate", "report", "compare", "explore", "export")
    dashed, title = name.replace("_", "-"), name.replace("_", " ").capitalize()
    replaced = {
        OLD: name,
        OLD.upper(): name.upper(),
        OLD.replace("_", "-"): dashed,
        **{f"vae-{command}": f"{dashed}-{command}" for command in commands},
    }
    pattern = re.compile("|".join(sorted(map(re.escape, replaced), key=len, reverse=True)))
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if not path.is_file() or {".git", ".venv", "outputs", "data"} & set(parts[:1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        new = pattern.sub(lambda match: replaced[match[0]], text)
        if new != text:
            path.write_text(new, encoding="utf-8")
    (root / "README.md").write_text(README.format(name=name, title=title))


def drop(root: Path) -> None:
    """Remove what belongs to the template alone, from the files that name it too."""
    for path in (root / name for name in DROPPED):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    linked = "".join(page.read_text(encoding="utf-8") for page in (root / "docs").rglob("*.md"))
    for image in (root / "docs" / "images").iterdir():
        if image.name not in linked:
            image.unlink()
    guides = root / "docs" / "guides" / "index.md"
    guides.write_text(re.sub(r"^.*\(project\.md\).*\n", "", guides.read_text(), flags=re.M))
    makefile = (root / "Makefile").read_text()
    for target in TARGETS:
        makefile = re.sub(rf"^{target}:.*\n(\t.*\n)*\n?", "", makefile, flags=re.M)
        makefile = makefile.replace(f" {target}", "", 1)
    (root / "Makefile").write_text(makefile)
    train = root / "conf" / "train.yaml"
    train.write_text(re.sub(r"^  - experiment: null.*\n", "", train.read_text(), flags=re.M))
    pyproject = root / "pyproject.toml"
    pyproject.write_text(
        re.sub(r'^(benchmark|docs) = .*\n|^"benchmarks/\*" = .*\n', "", pyproject.read_text(), flags=re.M)
    )


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    check(name, root)
    drop(root)
    rename(root, name)
    for words in (["check", "--fix", "--quiet"], ["format", "--quiet"]):  # line breaks change with the name's length
        subprocess.run([sys.executable, "-m", "ruff", *words, str(root)], check=False)
    print(f"{name} is ready: look at `git status`, commit, and run `make test`")


if __name__ == "__main__":
    main()
