"""Write docs/configuration.md: every configuration key with its type, default and explanation.

    python scripts/configuration.py        # make docs runs this

Keys, defaults and explanations come from the YAML files of conf/, types from the type hints that check the values.
"""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import isclass, signature
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from vae_lightning.analysis.comparisons import compare
from vae_lightning.analysis.evaluation import evaluate_run
from vae_lightning.analysis.explorer import explore_run
from vae_lightning.analysis.exporting import export_run
from vae_lightning.analysis.generation import PICTURES, generate_run
from vae_lightning.analysis.reports import report
from vae_lightning.launch.search import search
from vae_lightning.models.vae import VAE
from vae_lightning.training.callbacks import Figures
from vae_lightning.training.train import Config
from vae_lightning.training.trainer import TRAINER_DEFAULTS, make_trainer

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "configuration.md"

# The functions and classes whose type hints check the keys below a prefix. A `_target_` names its own.
CHECKED_BY: dict[str, dict[str, Callable[..., Any]]] = {
    "train": {"": Config, "model": VAE, "figures": Figures, "trainer": make_trainer, "hparams_search": search},
    "evaluate": {"": evaluate_run},
    "generate": {"": generate_run},
    "report": {"": report},
    "compare": {"": compare},
    "explore": {"": explore_run},
    "export": {"": export_run},
}
COMMANDS = {
    "train": "Train a model, run a sweep (`-m`) or a search.",
    "evaluate": "Evaluate a trained VAE.",
    "generate": "Draw one picture of a trained run.",
    "report": "Write one table and plots of many runs.",
    "compare": "Compare evaluated runs with a baseline, image by image.",
    "explore": "Explore the latent space of a trained run in a browser.",
    "export": "Export encoder and decoder of a trained run as ONNX and safetensors.",
}
GROUPS = {
    "model": "The model to train.",
    "model/backbone": "Encoder and decoder networks.",
    "model/likelihood": "The likelihood p(x|z).",
    "model/prior": "The prior p(z).",
    "model/posterior": "The posterior q(z|x).",
    "model/objective": "The loss of a VAE.",
    "model/optimizer": "The optimizer. `model.learning_rate` and `model.weight_decay` are passed to it.",
    "model/schedule": "The learning-rate schedule; null keeps the learning rate constant.",
    "data": "The data set.",
    "trainer": "Lightning's Trainer.",
    "logger": "Where metrics and pictures go, in addition to `history.csv`. Several: `logger=[tensorboard,csv]`.",
    "experiment": "A published system; it changes the defaults of the other groups.",
    "hparams_search": "A hyperparameter search; null trains one run.",
    "hydra/launcher": "How the jobs of a sweep (`-m`) are started. Plugins of Hydra add choices, such as `joblib`.",
}
# Types of the keys that no type hint checks.
TIME = "a time such as 30s, 10min or 2h"
TYPES = {
    "resume": "path, `auto`, `latest` or null",
    "run": "path or `latest`",
    "runs": "list of paths",
    "to": "path",
    "data_root": "path or null",
    "data.root": "path or null",
    "images": "list of integers ≥ 0, or null",
    "hparams_search.space": "`{low: …, high: …, log: true}` or `{choices: […]}` for each key",
    "trainer.callbacks": "list of `{_target_: class, argument: value}`",
    "trainer.checkpoint_every": f"number of steps, {TIME}, or null",
    "model.schedule.interval": "one of `epoch`, `step`",
    "model.schedule.T_max": "positive integer",
}
# Explanations of keys whose comment only lists the choices.
EXPLANATIONS = {
    "accelerator": "device",
    "split": "images to evaluate on",
    "what": "the picture to draw, see below",
}
# Only these keys of the `hydra` section are for users.
HYDRA = {
    "hydra.run.dir": "directory of a run or search",
    "hydra.sweep.dir": "directory of a sweep",
    "hydra.sweep.subdir": "directory of a job in the directory of its sweep",
}

HEADER = """# Configuration

Every configuration key of all commands, with its type, its default and an explanation. `make docs` writes this list
from the YAML files in `conf/` and from the type hints that check the values.

```
python train.py model.latent_dim=2                  # set a key
python train.py model/backbone=conv                 # choose a file of a group, here conf/model/backbone/conv.yaml
python train.py "model.backbone.hidden=[500, 200]"  # a list
python train.py +model.optimizer.amsgrad=true       # an argument of the class that has no key yet
```

A wrong key, type or value stops the command with one line, before anything is written. A key with the default `???`
must be given on the command line. `${…}` takes the value of another key.
"""
LIGHTNING = """#### Other arguments of Lightning's Trainer

[Lightning's documentation](https://lightning.ai/docs/pytorch/stable/common/trainer.html) explains them. Two arguments
are set elsewhere: `logger` by the group `logger`, `default_root_dir` by `hydra.run.dir`.
"""


class Key(NamedTuple):
    """A key of a YAML file, its default as written, its value, and the comment behind it."""

    name: str
    default: str
    value: Any
    comment: str


class Section(NamedTuple):
    """A YAML file: the comment at its top, its keys, and the class that its `_target_` names."""

    title: str
    keys: list[Key]
    targets: dict[str, str]


def read(file: Path) -> Section:
    """Read the keys of a configuration file with their comments."""
    text = file.read_text(encoding="utf-8")
    head = [line[1:].strip() for line in re.match(r"(?:#.*\n)*", text)[0].splitlines()]  # type: ignore[index]
    package = next((line.split()[1] for line in head if line.startswith("@package")), None)
    if package is None:
        package = ".".join(file.relative_to(CONF).parent.parts)
    prefix = "" if package == "_global_" else package
    keys = list(walk(text, yaml.compose(text), prefix))
    targets = {key.name.rpartition(".")[0]: str(key.value) for key in keys if key.name.endswith("_target_")}
    title = "\n".join(line for line in head if not line.startswith("@package"))
    return Section(first_sentence(title), [key for key in keys if not key.name.endswith("_target_")], targets)


def walk(text: str, node: yaml.Node, prefix: str) -> Iterator[Key]:
    """The keys below a node. The entries of the defaults list are keys with a slash: `model/backbone`."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        name = f"{prefix}.{key.value}".lstrip(".")
        if key.value == "defaults":
            for entry in value.value:
                if isinstance(entry, yaml.MappingNode):
                    (group, choice), *_ = entry.value
                    comment = comment_after(text, choice)
                    yield Key("/".join([*prefix.split("."), group.value]).lstrip("/"), choice.value, None, comment)
        elif isinstance(value, yaml.MappingNode) and not value.flow_style and name not in TYPES:
            yield from walk(text, value, name)
        else:
            data = yaml.safe_load(yaml.serialize(value))
            written = text[value.start_mark.index : value.end_mark.index].strip()
            yield Key(name, written if "\n" not in written else "", data, comment_after(text, key, value))


def comment_after(text: str, *nodes: yaml.Node) -> str:
    """The `#` comment on the line of a key and its value."""
    one_line = nodes[-1].start_mark.line == nodes[-1].end_mark.line
    rest = text[(nodes[-1] if one_line else nodes[0]).end_mark.index :].partition("\n")[0]
    return rest.partition("# ")[2].strip()


def first_sentence(text: str) -> str:
    """The text up to the first full stop, or up to a line end before a capital letter."""
    sentence = re.split(r"(?<!et al)(?<!\b0\d)\.\s|(?<![.,:;])\n(?=[A-Z])", text)[0]
    return " ".join(sentence.split()).rstrip(".")


def one_of(allowed: Sequence[Any]) -> str:
    return ("one of " if len(allowed) > 1 else "") + ", ".join(f"`{choice}`" for choice in allowed)


def reader_type(hint: Any, plural: bool = False) -> str:
    """A type hint in words: "positive integer", "list of numbers", "one of `relu`, `tanh`"."""
    limits: dict[str, Any] = {}
    while get_origin(hint) is Annotated:  # nested Annotated types are flattened by Python
        for field in hint.__metadata__:
            for limit in field.metadata:
                limits |= {name: getattr(limit, name) for name in LIMITS if hasattr(limit, name)}
        hint = hint.__origin__
    origin, arguments = get_origin(hint), get_args(hint)
    ending = "s" if plural else ""
    if origin is Literal:
        return one_of(arguments)
    if origin in (Union, types.UnionType):
        members = dict.fromkeys(reader_type(member, plural) for member in arguments)
        return " or ".join(members)
    if isclass(origin) and issubclass(origin, Sequence):
        least, most = limits.get("min_length"), limits.get("max_length")
        count = f"{least} " if least == most and least is not None else ""
        return f"list{ending} of {count}{reader_type(arguments[0], True)}"
    if hint in (int, float):
        return number(limits, "integer" if hint is int else "number", ending)
    names = {bool: "true or false", str: f"string{ending}", types.NoneType: "null"}
    return names.get(hint, "any value")


LIMITS = ("gt", "ge", "le", "min_length", "max_length")


def number(limits: Mapping[str, Any], kind: str, ending: str) -> str:
    """ "positive integer", "integer from 1 to 65535", "number ≥ -1"."""
    low, high = limits.get("ge"), limits.get("le")
    if low is not None and high is not None:
        return f"{kind}{ending} from {low} to {high}"
    if limits.get("gt") == 0 or (low == 1 and kind == "integer"):
        return f"positive {kind}{ending}"
    return f"{kind}{ending}" if low is None else f"{kind}{ending} ≥ {low}"


def type_of_value(value: Any, plural: bool = False) -> str:
    """The type of a default, for arguments of classes of other packages."""
    if isinstance(value, list) and value:
        return f"list of {type_of_value(value[0], True)}"
    return "list" if isinstance(value, list) else "" if value is None else reader_type(type(value), plural)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if isclass(function) else function
    return get_type_hints(target, include_extras=True)


def type_of(key: Key, command: str, section: Section) -> str:
    """The type of a key: by its class or function if that is ours, otherwise by its comment or default."""
    parent, _, name = key.name.rpartition(".")
    if key.name in TYPES:
        return TYPES[key.name]
    if "/" in key.name or key.name in GROUPS:
        return f"choice of [{key.name}](#{key.name.replace('/', '')})"
    checked_by = CHECKED_BY[command].get(parent)
    if parent in section.targets and section.targets[parent].startswith("vae_lightning."):
        module, _, class_name = section.targets[parent].rpartition(".")
        checked_by = getattr(importlib.import_module(module), class_name)
    hint = hints_of(checked_by).get(name) if checked_by else None
    if hint is not None:
        return reader_type(hint)
    if command == "generate" and not parent:
        pictures = [hints_of(picture)[name] for picture in PICTURES.values() if name in hints_of(picture)]
        words = dict.fromkeys(reader_type(hint).removesuffix(" or null") for hint in pictures)
        return " or ".join([*words, *(["null"] if words else [])])
    listed = CHOICES.search(key.comment)
    if listed and isinstance(key.value, str | None):
        return one_of(listed[0].split(" | "))
    return type_of_value(key.value)


CHOICES = re.compile(r"[\w-]+(?: \| [\w-]+)+")


def explanation(key: Key, kind: str) -> str:
    """The comment of a key without the choices that its type lists, or else the one in EXPLANATIONS."""
    if key.name in HYDRA:
        return HYDRA[key.name]
    if key.name in GROUPS:
        return GROUPS[key.name].partition(". ")[0].rstrip(".")
    text, listed = key.comment, CHOICES.search(key.comment)
    if listed and kind.startswith("one of"):
        before, after = text[: listed.start()].rstrip(" :|,"), text[listed.end() :].lstrip(" :;,")
        text = "; ".join(part for part in (before, after) if part)
    return text or EXPLANATIONS.get(key.name.rpartition(".")[2], "")


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: commands and overrides as code, the rest escaped."""
    text = text.replace("|", "\\|")
    code = r"(`[^`]*`|pip install -e '[^']*'|[\w./]+=(?:\[[^\]]*\]|[\w./…]*\w[\w/…]*|…))"
    parts = re.split(code, text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part.strip('`')}`"
        else:
            parts[i] = re.sub(r"\*|(?<!\w)_|_(?!\w)", r"\\\g<0>", part.replace("<", "&lt;"))
    return "".join(parts)


def listing(header: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def keys_table(section: Section, command: str) -> str:
    """The keys of a section as a table. Raises SystemExit for a key without an explanation."""
    rows = []
    for key in section.keys:
        parent, _, name = key.name.rpartition(".")
        hidden = re.match(r"hydra\.(?!launcher)", key.name) and key.name not in HYDRA
        if hidden or key.name.startswith("override ") or f"{parent}/{name}" in GROUPS:
            continue
        kind = type_of(key, command, section)
        said = explanation(key, kind)
        if not said:
            raise SystemExit(f"conf/: {key.name} has no comment that explains it")
        default = f"`{key.default}`" if key.default else "see the file"
        rows.append([f"`{key.name}`", cell(kind), default, cell(said)])
    return listing("key | type | default | explanation", rows) if rows else ""


def group_section(group: str) -> Iterator[str]:
    """The choices of a group, and the keys of each choice."""
    sections = {file.stem: read(file) for file in sorted((CONF / group).glob("*.yaml"))}
    yield f"### {group}\n"
    yield GROUPS[group] + "\n"
    yield listing("choice | explanation", [[f"`{group}={name}`", cell(s.title)] for name, s in sections.items()])
    if group == "experiment":
        return
    for name, section in sections.items():
        keys = keys_table(section, "train")
        if keys:
            yield f"#### {group}={name}\n"
            yield keys
    if group == "trainer":
        listed = {key.name for key in sections["default"].keys}
        rest = {name: value for name, value in TRAINER_DEFAULTS.items() if f"trainer.{name}" not in listed}
        yield LIGHTNING
        yield listing("key | default", [[f"`trainer.{name}`", f"`{as_yaml(value)}`"] for name, value in rest.items()])


def as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value)).removesuffix("\n...\n").strip()


def pictures_table() -> str:
    """The pictures of generate.py with the options that each takes, and their defaults."""
    rows = []
    for name, picture in PICTURES.items():
        parameters = [p for p in signature(picture).parameters.values() if p.name != "run"]
        options = [p.name if p.default is p.empty else f"{p.name}={as_yaml(p.default)}" for p in parameters]
        rows.append([f"`what={name}`", ", ".join(f"`{o}`" for o in options), cell(first_line(picture))])
    return listing("picture | options | explanation", rows)


def first_line(function: Callable[..., Any]) -> str:
    return first_sentence((function.__doc__ or "").partition("\n\n")[0])


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [HEADER]
    for command, sentence in COMMANDS.items():
        parts += [f"## {command}.py\n", sentence + "\n", keys_table(read(CONF / f"{command}.yaml"), command)]
        if command == "generate":
            parts.append(pictures_table())
        if command == "train":
            parts += [part for group in GROUPS for part in group_section(group)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
