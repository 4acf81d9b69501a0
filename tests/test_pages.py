"""README.md and the pages of docs/ and .github/: their commands and examples run, and their links exist.

The blocks of a page run in order in one empty directory, as a reader would copy them. Blocks that show a file are first
written to that file. `train.py` gets overrides that shorten it to a few seconds.
"""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, DATA, ROOT, composed
from helpers import blocks, write_pictures
from torch.nn.functional import pad

from vae_lightning.data import torchvision_sets
from vae_lightning.launch.vae import make_app
from vae_lightning.runs.directory import runs_in
from vae_lightning.runs.loading import load_run

LINKED = sorted(
    str(path.relative_to(ROOT)) for place in ("*.md", ".github/*.md", "docs/**/*.md") for path in ROOT.glob(place)
)
PAGES = [page for page in LINKED if page != "docs/changelog.md"]  # old entries name commands of their time
WORKED_OUT = ("transformer", "second_stage")  # guides to whole models, which take more lines than a part
# Run by make proof.
LONG = (
    *("docs/quickstart.md", "docs/running.md", "docs/resume.md", "docs/guides/conditional.md"),
    "docs/guides/two_level.md",
    *(f"docs/guides/{name}.md" for name in WORKED_OUT),
)
GENERATED = ("docs/configuration.md", "docs/tutorial.md")  # by docs/write_pages.py; commands are checked but not run

# Commands that are only checked for their keys, files and targets, with the reason: a pattern in the command.
NOT_RUN = {
    r"^(source|pip install) ": "changes the environment",
    r"-m pytest": "runs these tests",
    r"^make ": "builds an environment; make test runs this test",
    r"^(torchrun|srun) ": "needs several machines; test_distributed.py starts several processes",
    r"trainer\.devices=": "starts several processes; test_distributed.py",
    r"hydra/launcher=": "starts a process per job; test_sweeps.py",
    r"hparams_search=": "trains many runs; test_search.py",
    r"2,5,20,200": "trains eight runs or more",
    r"sweeps/widths": "needs one of these sweeps",
    r"vae compare ": "needs evaluated runs; test_comparisons.py",
    r"vae report outputs$": "takes five seconds; test_reports.py",
    r"vae explore ": "serves a page until it is stopped; test_explorer.py",
    r"vae export ": "takes ten seconds; test_exporting.py",
    r"docs/tutorial\.py": "takes minutes; test_tutorial.py",
    r"benchmarks/": "takes hours",
    r"experiment=cifar10": "takes minutes without a GPU; test_experiments.py",
    r"generate walk ": "takes ten seconds; test_generation.py",
    r"\$\{": "needs variables of the shell script around it",
}

COLOUR = {"CIFAR10", "SVHN", "CelebA"}

# Further overrides that make a command quick, or its check sharper, by a pattern in it.
QUICKER = {
    r"vae evaluate": ["--batch-size=500", "--chunk=3", "--no-probes", "--class-samples=1"],
    r"model/backbone=wide": ["model.backbone.width=30"],
    r"model/backbone=transformer": ["model.backbone.width=16"],
    r"dir=outputs/(first|second)": ["model.backbone.batch_norm=true"],  # the second stage keeps its statistics too
}


def text(page: str) -> str:
    return (ROOT / page).read_text()


def commands(page: str) -> list[str]:
    """The commands in a page's blocks."""
    return [command for block in blocks(page) for command in block.commands]


def inline_commands(page: str) -> list[str]:
    """The commands in a page's tables and sentences."""
    return re.findall(r"`((?:python|make|vae) [^`]+)`", re.sub(r"^```.*?^```", "", text(page), flags=re.M | re.S))


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


def script_and_words(command: str) -> tuple[str, list[str]]:
    """`python train.py a=1` and `vae train a=1` are both `("train.py", ["a=1"])`."""
    first, *words = shlex.split(command)
    if first == "vae" and words[0] != "train":
        return first, words
    return "train.py" if first == "vae" else words[0], words[1:]


def brief(command: str) -> tuple[str, list[str]]:
    """A command with overrides that make it a run of seconds."""
    script, words = script_and_words(command)
    if script == "train.py" and not {"--cfg", "--info"} & set(words):
        longer = any(word.startswith("resume=") for word in words) and "trainer.max_epochs=60" in words
        words = [word for word in words if not word.startswith("trainer.max_epochs=")]
        words += [*BRIEF, *(["trainer.max_epochs=2"] if longer else [])]
    words = ["3" if before == "--samples" else word for before, word in pairwise(["", *words])]
    words = ["trainer.accelerator=auto" if word == "trainer.accelerator=gpu" else word for word in words]
    return script, words + [word for pattern, more in QUICKER.items() if re.search(pattern, command) for word in more]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory with what the pages expect around them: a folder of images, and data sets to download."""
    (train, labels), (test, test_labels) = torchvision_sets.load_images("MNIST", DATA)
    grey = (train[:12_000], labels[:12_000]), (test[:1_000], test_labels[:1_000])
    colour = tuple((pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1), y) for x, y in grey)

    def load_images(name: str, root: object) -> object:  # nothing is downloaded
        return colour if name in COLOUR else grey

    monkeypatch.setattr(torchvision_sets, "load_images", load_images)
    write_pictures(tmp_path / "photos")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def read(page: str, reader: Path, script) -> None:
    """Do what a page says."""
    for block in blocks(page):
        if block.file:
            (reader / block.file).parent.mkdir(parents=True, exist_ok=True)
            (reader / block.file).write_text(block.text)
    added = [f"hydra.searchpath=[file://{reader}/conf]"] if (reader / "conf").exists() else []
    for block in blocks(page):
        for command in filter(is_run, block.commands):
            name, words = brief(command)
            if "latest" in command and not runs_in(reader / "outputs"):  # the page starts with a trained run
                assert script("train.py", *BRIEF).code == 0
            result = script(name, *words, *(added if name == "train.py" and "--config-dir" not in words else []))
            assert result.code == 0, f"{page}: {command}\n{result.err}"
            assert "--cfg" not in words or "latent_dim: 20" in result.out
        if block.session:
            command, output = block.session
            name, words = script_and_words(command)
            assert script(name, *words).err.startswith(output.rstrip()), command
        if block.language == "python" and not block.file:
            run_python(quick(block.text))


def quick(code: str) -> str:
    """An example that takes a second to train or evaluate."""
    options = "accelerator='cpu', logger=False, enable_progress_bar=False, limit_train_batches=2"
    limits = "limit_val_batches=1, limit_test_batches=1, limit_predict_batches=1"
    code = re.sub(r"\bTrainer\(max_epochs=\d+", f"Trainer(max_epochs=1, {options}, {limits}", code)
    return re.sub(r"\bsamples=\d+", "samples=2", code)


def run_python(code: str) -> None:
    """Run an example; `vae.f(x)  # [64, latent_dim]` must have that shape."""
    names: dict = {}
    exec(code, names)
    for expression, shape in re.findall(r"^\s*(?:\w+ = )?(vae\.\S.*?)  # .*?\[([\w, ]+)\]", code, flags=re.M):
        wanted = [names["vae"].latent_dim if n == "latent_dim" else int(n) for n in shape.split(", ")]
        found = eval(expression, names)
        assert list(found.shape) == wanted, expression


def check_logger(runs: list[Path]) -> None:
    lines = [json.loads(line) for line in (runs[-1] / "log.jsonl").read_text().splitlines()]
    assert lines[0]["model.latent_dim"] == 20
    assert "test/elbo" in lines[-1]
    assert (runs[-1] / "test_samples.png").exists()


def check_second_stage(runs: list[Path]) -> None:
    first, second = (load_run(run).state_dict() for run in runs)
    shared = first.keys() & second.keys()
    assert shared == {name for name in second if not name.startswith("prior.")}
    assert all(torch.equal(first[name], second[name]) for name in shared)


# What the runs of a page must show, beside that they load.
CHECKS = {
    "logger.md": check_logger,
    "second_stage.md": check_second_stage,
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.proof if page in LONG else ())
        for page in PAGES
        if any(map(is_run, commands(page))) and page not in GENERATED
    ],
)
def test_commands_and_examples_run(page: str, reader: Path, script) -> None:
    read(page, reader, script)
    runs = runs_in(reader / "outputs")
    assert runs
    CHECKS.get(Path(page).name, lambda runs: None)(runs)
    modules = [Path(block.file).stem for block in blocks(page) if (block.file or "").endswith(".py")]
    for run in runs if modules else ():
        model = load_run(run)
        x = torch.rand(3, *model.image_shape)
        labels = torch.zeros(3, dtype=torch.long)
        assert model.reconstruct(x, labels).shape == x.shape
        assert not hasattr(model, "log_weights") or model.log_weights(x, 2, labels).isfinite().all()
    if page.endswith("guides/backbone.md"):
        words = ["model/backbone=wide", "model.backbone.width=wide", f"hydra.searchpath=[file://{reader}/conf]"]
        assert script("train.py", *words).err == "model.backbone.width=wide: should be a valid integer.\n"


@pytest.mark.parametrize("name", ["python", "semisupervised", "missing"])
def test_guides_without_commands_run(name: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    for block in blocks(f"docs/guides/{name}.md"):
        if block.language == "python":
            run_python(quick(block.text))


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_are_valid(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
    checked = [command for command in commands(page) if page in GENERATED or not is_run(command)]
    checked += inline_commands(page)
    for command in dict.fromkeys(checked):
        first, *words = shlex.split(command)
        if first == "make":
            assert words[0] in targets, command
            words = shlex.split(" ".join(words).partition("ARGS=")[2]) if words[0] == "train" else []
            check_keys("train", words)
        elif first == "pip":
            assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras), command
        elif first == "vae" and words[0] != "train" and words[1:] and "…" not in command:
            make_app().parse_args(
                words, exit_on_error=False, print_error=False
            )  # raises an exception for a wrong option
        elif first == "python" and words[0] != "-m" and not re.search("[…&]", command):
            assert (ROOT / words[0]).is_file(), command
            check_keys(Path(words[0]).stem, words[1:])


def check_keys(name: str, words: list[str]) -> None:
    """Raise for keys that conf/train.yaml does not have."""
    words = [re.sub(r"^([\w./]+=[^,\[{(]*),.*", r"\1", word) for word in words if "=" in word]  # a sweep's first value
    if words and name == "train":
        composed(*words)


@pytest.mark.parametrize("page", LINKED)
def test_linked_pages_and_figures_exist(page: str) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text(page)):
        target = ((ROOT / page).parent / (link[0] or link[1])).resolve()
        outside = (link[0] or link[1]).startswith("https://")
        assert outside or target.exists() or str(target.relative_to(ROOT)) in GENERATED, link
