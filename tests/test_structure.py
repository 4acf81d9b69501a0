"""The structure of the package: order of imports, no circular imports, light imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from conftest import FILES, PACKAGE

ORDER = ["config", "files", "figures", "data", "models", "runs", "training", "analysis", "launch"]


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


def test_importing_the_package_is_light_and_has_no_side_effects() -> None:
    code = """
import atexit, gc, sys
before = gc.isenabled(), gc.get_freeze_count(), atexit._ncallbacks()
import vae_lightning
assert not {"torch", "lightning", "hydra"} & set(sys.modules)
assert before == (gc.isenabled(), gc.get_freeze_count(), atexit._ncallbacks())
from vae_lightning import VAE, Autoencoder, MNISTDataModule, load_run
assert not {"hydra", "sklearn", "optuna"} & set(sys.modules), "needed only for commands"
assert gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_run_directory_names_the_files_of_a_run() -> None:
    files = ("config.yaml", "metrics.json", "history.csv", "environment.json", "train.log", ".ckpt")
    files += ("evaluation.json", "evaluation.csv")
    names = re.compile("|".join([*(name.replace(".", r"\.", 1) for name in files), "^checkpoints$"]))
    found = set()
    for module, file in FILES.items():
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        strings = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
        found |= {module for string in strings if names.search(str(string))}
    assert found == {"runs.directory"}
