"""Write the two pages of docs/ that are made from other files; make docs runs this.

configuration.md lists the keys of conf/ with the comments of its YAML files. tutorial.md is tutorial.py as a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

DOCS = Path(__file__).resolve().parent
CONF = DOCS.parent / "conf"

FIRST = (
    *("model.latent_dim", "model/backbone", "model/prior", "model.beta", "model.learning_rate"),
    *("data.name", "data.pixels", "data.batch_size", "trainer.max_epochs", "seed"),
)
# The sections of the page. All but `run` and `hydra` are groups, which have a folder in conf/.
SECTIONS = {
    "run": "Name, seed and figures of a run.",
    "model": "The model to train.",
    "model/backbone": "Encoder and decoder networks.",
    "model/likelihood": "The likelihood p(x|z).",
    "model/prior": "The prior p(z).",
    "model/posterior": "The posterior q(z|x).",
    "model/objective": "The loss of a VAE.",
    "model/optimizer": "The optimizer. It gets `model.learning_rate` and `model.weight_decay`.",
    "model/schedule": "The learning-rate schedule. Without one, the learning rate is constant.",
    "data": "The data set.",
    "trainer": """Lightning's Trainer. Its other arguments are keys too, with
[Lightning's defaults](https://lightning.ai/docs/pytorch/stable/common/trainer.html): `trainer.precision=bf16-mixed`,
`trainer.devices=2`, `trainer.gradient_clip_val=1`. Two arguments are set elsewhere: `logger` by the group `logger`,
`default_root_dir` by `hydra.run.dir`.""",
    "logger": "Where metrics and figures go, in addition to `history.csv`. Several: `logger=[tensorboard,csv]`.",
    "experiment": "Published systems. They set keys of the other sections.",
    "hparams_search": "A hyperparameter search. Without one, the command trains one run.",
    "hydra": "Directories of runs and sweeps.",
    "hydra/launcher": "How the jobs of a sweep (`-m`) are started. Plugins of Hydra add choices, such as `joblib`.",
}
HEADER = """# Configuration

The keys that you can set on the command line of `train.py`, with their defaults. The explanations are the
comments in `conf/`. A key of the first table is not repeated below.

```
python train.py model.latent_dim=2                  # set a key
python train.py model/backbone=conv                 # choose a file of a group, here conf/model/backbone/conv.yaml
python train.py "model.backbone.hidden=[500, 200]"  # a list
python train.py +model.optimizer.amsgrad=true       # an argument of the class that has no key yet
```

A wrong key, type or value stops the command with one line, before anything is written. `${…}` takes the value of
another key. The column `choice` names the choices of a group that have the key.

## Ten keys to change first
"""


class Key(NamedTuple):
    """A key of a configuration file, its default as written, and the comment behind it."""

    name: str
    default: str
    comment: str


def keys_of(file: Path) -> list[Key]:
    """Return the keys of a configuration file, without the choices of its defaults list."""
    text = file.read_text(encoding="utf-8")
    package = re.match(r"# @package (\S+)", text)
    prefix = package[1] if package else ".".join(file.relative_to(CONF).parent.parts)
    return list(walk(text, yaml.compose(text), prefix.removeprefix("_global_")))


def walk(text: str, node: yaml.Node | None, prefix: str) -> Iterator[Key]:
    """Yield the keys below a node. A mapping with a comment behind its key is one key."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        name = f"{prefix}.{key.value}".lstrip(".")
        comment = text.splitlines()[key.start_mark.line].partition(" # ")[2]
        if isinstance(value, yaml.MappingNode) and not comment:
            yield from walk(text, value, name)
        elif key.value not in ("defaults", "_target_") and name.replace(".", "/") not in SECTIONS:
            written = text[value.start_mark.index : value.end_mark.index].strip()
            yield Key(name, "" if "\n" in written else written, comment)


def default_choices() -> dict[str, str]:
    """Return the choice of each group that has one by default: `{"model/backbone": "mlp", …}`."""
    chosen = {"hydra/launcher": "basic"}
    for file, prefix in ((CONF / "train.yaml", ""), (CONF / "model" / "vae.yaml", "model/")):
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]:
            if isinstance(entry, dict):
                chosen |= {prefix + group: choice for group, choice in entry.items() if choice}
    return chosen


def title(file: Path) -> str:
    """Return the first line of the comment at the top of a file."""
    lines = re.findall(r"^# (?!@package)(.*)", file.read_text(encoding="utf-8"), flags=re.M)
    return str(lines[0]).rstrip(".")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, without columns that are empty in all rows."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line[i].replace("|", "\\|") for i in kept) + " |\n" for line in lines)


def code(words: str) -> str:
    return f"`{words}`" if words else ""


def first_keys() -> dict[str, Key]:
    """Return the keys in FIRST by their names. A group among them is explained in its own section."""
    files = [CONF / name for name in ("train.yaml", "model/vae.yaml", "data/mnist.yaml", "trainer/default.yaml")]
    keys = {key.name: key for file in files for key in keys_of(file)}
    for group, choice in default_choices().items():
        if group in SECTIONS:
            keys[group] = Key(group, choice, f"[{SECTIONS[group].rstrip('.')}](#{group.replace('/', '')})")
    return {name: keys[name] for name in FIRST}


def keys_in(files: Sequence[Path], section: str) -> dict[Key, list[str]]:
    """Return the keys of a section, each with the choices of the group that have it.

    Raises SystemExit for a key without an explanation, except for those that are Hydra's own.
    """
    first = first_keys().values()
    choices: dict[Key, list[str]] = {}
    for file in files:
        for key in keys_of(file):
            of_hydra = key.name.startswith("hydra.")
            if not key.comment and not of_hydra:
                raise SystemExit(f"{file}: {key.name} has no comment that explains it")
            elsewhere = file.name == "train.yaml" and of_hydra != (section == "hydra")
            if key.comment and key not in first and not elsewhere:
                choices.setdefault(key, []).append(code(file.stem))
    return choices


def section_of(name: str, default: str | None) -> str:
    """Return a section: a table of the choices of its group and of their keys."""
    files = sorted((CONF / name).glob("*.yaml"))
    rows = [[code(f"{name}={file.stem}"), "", "yes" * (file.stem == default), title(file)] for file in files]
    if name != "experiment":
        for key, choices in keys_in(files or [CONF / "train.yaml"], name).items():
            shown = ", ".join(choices) if len(files) > 1 else ""
            rows.append([code(key.name), shown, code(key.default) or "in the file", key.comment])
    heading = f"{'###' if '/' in name else '##'} {name}\n\n{SECTIONS[name]}\n\n"
    return heading + table(["setting", "choice", "default", "explanation"], rows)


def configuration() -> str:
    """Return the text of configuration.md."""
    default = default_choices()
    rows = [[code(key.name), code(key.default), key.comment] for key in first_keys().values()]
    sections = [section_of(name, default.get(name)) for name in SECTIONS]
    return "\n".join([HEADER, table(["setting", "default", "explanation"], rows), *sections])


def tutorial() -> str:
    """Return the text of tutorial.md: comments of Markdown cells as text, the other cells as code."""
    _, *cells = re.split(r"^# %%(.*)\n", (DOCS / "tutorial.py").read_text(encoding="utf-8"), flags=re.M)
    page = []
    for kind, cell in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in kind:
            page.append(re.sub(r"^# ?", "", cell, flags=re.M).strip())
        else:
            page.append(f"```python\n{cell.strip()}\n```")
    return "\n\n".join(page) + "\n"


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration(), encoding="utf-8")
    (DOCS / "tutorial.md").write_text(tutorial(), encoding="utf-8")
