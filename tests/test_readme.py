"""The README's commands and examples run as they stand there."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import BRIEF, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
TRAIN = [line.removeprefix("python train.py ") for _, code in BLOCKS for line in code.splitlines()
         if line.startswith("python train.py ")]  # fmt: skip


def example(name: str) -> str:
    """The block of code that begins with a comment naming its file."""
    (code,) = [code for _, code in BLOCKS if code.startswith(f"# {name}\n")]
    return code


def test_there_are_commands_to_test() -> None:
    assert len(TRAIN) >= 8


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.proof) if "2,5,20,200" in line else line for line in TRAIN]
)
def test_train_commands(line: str, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    if "trainer.accelerator=gpu" in words:  # there may be none here: the command is then refused, and names the key
        words[words.index("trainer.accelerator=gpu")] = "trainer.accelerator=auto"
    if "data.name=FashionMNIST" in words:  # would be downloaded: read MNIST's files in its place
        from vae_lightning.data import mnist

        load = mnist.load_images
        monkeypatch.setattr(mnist, "load_images", lambda name, root: load("MNIST", root))
    if words[0].startswith("resume="):  # there is a run to go on with, and a little longer
        assert command(f"hydra.run.dir={words[0].removeprefix('resume=')}", *BRIEF).code == 0
        result = command(*words, *([] if len(words) == 1 else ["trainer.max_epochs=2"]))
    else:
        result = command(*words, *BRIEF)
    assert result.code == 0, result.err
    if "--cfg" in words:
        assert "latent_dim: 20" in result.out
    else:
        assert list((tmp_path / "outputs").rglob("metrics.json"))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make (\w+)", README)) | {
        line.split()[1] for _, code in BLOCKS for line in code.splitlines() if line.startswith("make ")
    }
    assert {"train", "test", "help", "reproduce"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.M), target


def test_linked_files_and_pictures_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = link[0] or link[1]
        assert path.startswith("https://") or (ROOT / path).exists(), path


def test_the_layout_names_every_folder() -> None:
    package = ROOT / "src" / "vae_lightning"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(re.findall(r"^    (\w+)/ ", README, flags=re.M))


@pytest.mark.parametrize(
    ("module", "yaml", "group", "words"),
    [
        ("wide.py", "conf/model/backbone/wide.yaml", "model/backbone", ["model.backbone.width=30"]),
        ("squares.py", "conf/data/squares.yaml", "data", []),
    ],
)
def test_examples_of_ones_own(
    module: str, yaml: str, group: str, words: list[str], command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / module).write_text(example(module))
    (tmp_path / yaml).parent.mkdir(parents=True)
    (tmp_path / yaml).write_text(example(yaml))
    monkeypatch.syspath_prepend(tmp_path)
    name = Path(module).stem
    monkeypatch.delitem(sys.modules, name, raising=False)
    where = f"hydra.searchpath=[file://{tmp_path}/conf]"
    result = command(f"{group}={name}", *words, where, *BRIEF)
    assert result.code == 0, result.err
    if words:
        refused = command(f"{group}={name}", "model.backbone.width=wide", where, *BRIEF)
        assert (refused.code, refused.err) == (2, "model.backbone.width=wide: should be a valid integer.\n")


def test_loading_example(command, tmp_path: Path, mnist) -> None:
    (code,) = [code for _, code in BLOCKS if "load_run(" in code]
    directory = command(*BRIEF).out.splitlines()[-1]
    code = re.sub(r'load_run\(".*?"\)', f"load_run({directory!r})", code)
    names: dict = {}
    exec(code, names)
    sizes = {"batch": 64, "latent_dim": 20}
    said = re.findall(r"(vae\.\S.*?)  # .*?\[([\w, ]+)\]", code)
    assert len(said) == 3
    for expression, shape in said:
        assert list(eval(expression, names).shape) == [sizes.get(n) or int(n) for n in shape.split(", ")]
