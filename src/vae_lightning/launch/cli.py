"""Compose the configuration of a command, and show its errors: one line, no traceback, exit status 2."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_lightning.config import ConfigError, UserError, did_you_mean, flatten, out_of_memory
from vae_lightning.training.signals import Interrupted

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]
CONF = CHECKOUT / "conf" if (CHECKOUT / "conf" / "train.yaml").exists() else PACKAGE / "conf"

# Launchers of optional packages, and the extra that installs them.
EXTRAS = {"joblib": "launchers", "submitit_local": "launchers", "submitit_slurm": "launchers", "ray": "ray"}
TRACEBACK = "VAE_LIGHTNING_TRACEBACK"  # environment variable: HYDRA_FULL_ERROR as the user has set it
# Options of Hydra that begin with two dashes.
HYDRA_FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-dir", "--experimental-rerun"),
)
# Arguments of Lightning's Trainer that are set by another key.
ELSEWHERE = {"trainer.logger": "logger=csv", "trainer.default_root_dir": "hydra.run.dir=DIRECTORY"}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Report user-fixable errors of a command in one line on stderr, with exit status 2.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", ""))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them over many lines
    logging.raiseExceptions = False  # no traceback for each line that a closed pipe does not take
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale without such letters must not end a command
    try:
        check_command_line()
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, such as in `… --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Interrupted as stop:  # a sweep or a search; a single run reports its own interruption
        print(f"{stop}; to resume it: the same command, in the same directory", file=sys.stderr)
        raise SystemExit(stop.status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        os.environ["HYDRA_FULL_ERROR"] = os.environ.pop(TRACEBACK)


def check_command_line() -> None:
    """Raise ConfigError for an option that Hydra would misunderstand, and for paths that cannot be encoded."""
    for word in sys.argv[1:]:
        if re.match(r"(-cn|--config-name|-cp|--config-path)\b", word):
            raise ConfigError(f"{word}: each command has its own configuration; --config-dir adds a directory to conf/")
        if word == "=":
            raise ConfigError("=: write an override without spaces, such as model.latent_dim=3")
        if word.startswith("--") and word.partition("=")[0] not in HYDRA_FLAGS:
            raise ConfigError(f"{word}: no such option; settings are key=value, such as model.latent_dim=2")
    if {"-m", "--multirun"} & {*sys.argv[1:]} and (shown := {"--cfg", "-c", "--info", "-i"} & {*sys.argv[1:]}):
        raise ConfigError(f"{min(shown)}: is for one run; leave out -m")
    if re.search("[\udc80-\udcff]", " ".join([os.getcwd(), *sys.argv])):
        raise ConfigError("a path has characters that the encoding of this locale does not have: set PYTHONUTF8=1")


def error_line(error: Exception) -> str | None:
    """Return a user-fixable error in one line: key, value, what is allowed, the nearest match.

    None for a bug, or if the user wants a traceback.
    """
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        return None
    words = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "?" for c in words)  # a run may name classes with control characters
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and choice in EXTRAS:
            return f"{group}={choice}: is not installed; pip install -e '.[{EXTRAS[choice]}]' installs it"
        # Hydra gives no options for a list of choices.
        files = [file for directory in config_directories() for file in (directory / group).glob("*.yaml")]
        options = error.options or sorted(file.stem for file in files)
        if options:
            return f"{group}={choice}: no such choice{did_you_mean(choice, options)} Allowed: {', '.join(options)}"
    unknown = re.match(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and unknown:
        return unknown_key(unknown[1], error.__cause__)
    if isinstance(error, OSError) and error.filename:
        directories = [word for word in sys.argv[1:] if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
        problem = f"{directories[-1]}: cannot write" if directories else "cannot read or write"
        return f"{problem} {error.filename} ({error.strerror})"
    if text.startswith("Error merging override") and error.__cause__:
        return f"{text}: {' '.join(str(error.__cause__).splitlines()[:1])}"
    if isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError):
        for word in sys.argv[1:]:  # a choice of a group given as a value, such as model.backbone=conv
            key, _, value = word.partition("=")
            choice = f"{key.replace('.', '/')}={value}"
            file = f"{choice.replace('=', '/')}.yaml"
            if "." in key and any((directory / file).is_file() for directory in config_directories()):
                return f"{text} Say {choice}"
        return text
    if out_of_memory(error):
        return f"out of memory: {text[:200]}"
    if isinstance(error, ValueError) and text.startswith("Config group override"):  # Hydra's error for model=null
        groups = [word for word in sys.argv[1:] if word.endswith("=null")]
        return f"{groups[-1] if groups else text}: a group needs one of its choices"
    return None


def unknown_key(key: str, cause: BaseException | None) -> str:
    """Return the error line of an override whose key (`model.latent_dmi`) or group (`model/bakbone`) does not exist.

    `cause` is OmegaConf's error, which has the part of the configuration where the key was looked up.
    """
    given = next((word for word in sys.argv[1:] if word.lstrip("+~").partition("=")[0] == key), key)
    if key in ELSEWHERE:
        return f"{given}: say {ELSEWHERE[key]} instead"
    if fitting := [group for group in config_groups() if group.rpartition("/")[2] == key and group != key]:
        return f"{given}: no such key; say {fitting[0]}={given.partition('=')[2]}"
    if "/" in key or not isinstance(cause, OmegaConfBaseException):
        near, allowed = did_you_mean(key, config_groups()), ", ".join(config_groups())
        return f"{given}: no such group of configurations{near} Allowed: {allowed}"
    for word in sys.argv[1:]:
        if word.startswith("~") and f"{key}.".startswith(f"{word[1:].partition('=')[0].replace('/', '.')}."):
            return f"{given}: {word} removes this key"
    *path, _ = str(cause.full_key).split(".")
    root = cause.parent_node
    with contextlib.suppress(OmegaConfBaseException):  # raised when there is no parent
        while True:
            root = OmegaConf.select(root, "..")
    known = plain(root, resolve=False)
    known.pop("hydra", None)
    siblings = [str(name) for name in cause.parent_node if name != "hydra"]
    near = did_you_mean(key, [*(".".join([*path, name]) for name in siblings), ".".join(path), *flatten(known)])
    under = f" under {'.'.join(path)}" if path else ""
    return f"{given}: no such key{near} Allowed{under}: {', '.join(siblings) or 'none'}"


def config_groups() -> list[str]:
    """Return the groups of configurations, such as `model/backbone`."""
    return sorted({str(d.relative_to(place)) for place in config_directories() for d in place.rglob("*/")})


def config_directories() -> list[Path]:
    """Return conf/ and the directories that --config-dir and hydra.searchpath add."""
    lines = "\n".join(sys.argv[1:])
    added = re.findall(r"^(?:--config-dir|-cd)[=\n](.+)$", lines, re.M)
    for paths in re.findall(r"^\+*hydra\.searchpath=\[(.*)\]$", lines, re.M):
        added += [path.strip().removeprefix("file://") for path in paths.split(",")]
    return [CONF, *map(Path, added)]


def command_line(config_name: str, documentation: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Compose conf/<config_name>.yaml with the overrides of this command and `given`.

    Creates no run directory and sets up no logging. `--help` prints the documentation and stops. Raises errors that
    `error_line` knows.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(inspect.cleandoc(documentation or ""))
        raise SystemExit
    bare = [word for word in sys.argv[1:] if "=" not in word and not word.startswith(("-", "~"))]
    if bare:
        raise ConfigError(f"{bare[0]}: say run={bare[0]}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = cast(DictConfig, OmegaConf.merge(compose(config_name, sys.argv[1:]), given))
    missing = [str(key) for key in OmegaConf.missing_keys(config)]
    if missing:
        example = f"{config_name}.py outputs" if missing[0] == "runs" else f"{missing[0]}=…"
        raise ConfigError(f"{missing[0]}: missing; say {example}")
    return plain(config)


def plain(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Return a composed configuration as dictionaries, lists, numbers and strings, with interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))
