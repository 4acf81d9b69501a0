"""The structure of the package: order of imports, no circular imports, light imports, private names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FILES, PACKAGE

ORDER = ["config", "files", "figures", "data", "models", "runs", "training", "analysis", "launch", "__main__"]


def imports(file: Path) -> set[str]:
    """Return the modules of this package that a file imports, such as `models.vae`, also for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vae_lightning"):
            base = (node.module or "").split(".")[1:]
            for alias in node.names:
                name = ".".join([*base, alias.name])
                path = PACKAGE / name.replace(".", "/")
                found.add(name if path.with_suffix(".py").exists() or path.is_dir() else ".".join(base))
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("vae_lightning.")}
    return found


GRAPH = {name.removesuffix(".__init__"): imports(path) for name, path in FILES.items()}


def test_folders_import_only_from_folders_above() -> None:
    assert {name.partition(".")[0] for name in GRAPH} == set(ORDER)
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if ORDER.index(other.partition(".")[0]) > ORDER.index(name.partition(".")[0])
    ]
    assert wrong == []


def test_no_circular_imports() -> None:
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in finished:
            for other in GRAPH.get(name, ()):
                visit(other, (*path, name))
            finished.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        ("__doc__", {"torch", "lightning", "hydra"}),
        pytest.param("VAE, Autoencoder, MNISTDataModule, load_run", {"hydra", "sklearn"}, marks=pytest.mark.proof),
    ],
)
def test_importing_the_package_is_light_and_has_no_side_effects(names: str, heavy: set[str]) -> None:
    code = f"""
import gc, sys
before = gc.isenabled(), gc.get_freeze_count()
from vae_lightning import {names}
assert before == (gc.isenabled(), gc.get_freeze_count())
assert not {heavy} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_private_names_are_used_in_three_files() -> None:
    found = set()
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]\w*[^_]$", node.attr):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                found |= set() if owner in ("self", "cls") else {module}
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("vae_lightning"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                found |= {module} if private or "._" in (node.module or "") else set()
    assert found == {"training.fast_loop", "training.compiled", "training.checkpoints"}


def test_only_run_directory_names_the_files_of_a_run() -> None:
    names = re.compile(r"(config\.yaml|(metrics|environment|evaluation)\.json|evaluation\.csv|train\.log|\.ckpt)$")
    found = set()
    for module, file in FILES.items():
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        strings = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
        found |= {module for string in strings if names.search(str(string))}
    assert found == {"runs.directory"}
