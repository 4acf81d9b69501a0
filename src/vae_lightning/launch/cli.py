"""What the command line shows when something is wrong: one clear line, no traceback, a non-zero exit."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_lightning.config import ConfigError, UserError, did_you_mean, out_of_memory
from vae_lightning.launch.sweeps import report_failures
from vae_lightning.training.signals import Interrupted

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]
CONF = CHECKOUT / "conf" if (CHECKOUT / "conf" / "train.yaml").exists() else PACKAGE / "conf"

# Groups whose choices come with an optional package, and the extra that installs it.
EXTRAS = {"joblib": "launchers", "submitit_local": "launchers", "submitit_slurm": "launchers", "ray": "ray"}
# Arguments of Lightning's Trainer that are set elsewhere.
ELSEWHERE = {"trainer.logger": "logger=csv", "trainer.default_root_dir": "hydra.run.dir=DIRECTORY"}


@contextlib.contextmanager
def one_line_errors(config_name: str) -> Iterator[None]:
    """Around a command: turn what the user can mend into one line on stderr and exit status 2.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    if os.environ.get("HYDRA_FULL_ERROR") not in (None, "", "0"):
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them over many lines
    try:
        check_words()
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # of `… --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Interrupted as stop:  # of a sweep, while its jobs were trained elsewhere
        print(f"{stop}; to resume it: the same command, in the same hydra.sweep.dir", file=sys.stderr)
        raise SystemExit(stop.status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        line = one_line(error, config_name)
        for reason in report_failures() or ([line] if line else []):
            print(reason, file=sys.stderr)
        if line is None:
            raise
        raise SystemExit(2) from None
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def check_words() -> None:
    """Raise ConfigError for a command line that Hydra would take in another sense, or whose paths cannot be written."""
    for word in sys.argv[1:]:
        if re.match(r"(-cn|--config-name)\b", word):
            raise ConfigError(f"{word}: each command has a configuration of its own; conf/train.yaml is train.py's")
    if re.search("[\udc80-\udcff]", " ".join([os.getcwd(), *sys.argv])):
        raise ConfigError("a path has letters that this locale cannot write: set PYTHONUTF8=1")


def one_line(error: Exception, config_name: str) -> str | None:
    """What the user can mend, in one line: the key, what was given, what is allowed, the nearest match. None: a bug."""
    said = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and choice in EXTRAS:
            return f"{group}={choice}: is not installed; pip install -e '.[{EXTRAS[choice]}]' installs it"
        # Of a list of choices Hydra does not say what is allowed.
        files = [file for place in config_directories() for file in (place / group).glob("*.yaml")]
        options = error.options if error.options is not None else sorted(file.stem for file in files)
        if options:
            return f"{group}={choice}: no such choice{did_you_mean(choice, options)} Allowed: {', '.join(options)}"
    unknown = re.match(r"Could not override '([^']+)'", said)
    if isinstance(error, ConfigCompositionException) and unknown:
        return unknown_key(unknown[1], config_name)
    if isinstance(error, OSError) and error.filename:
        where = [word for word in sys.argv[1:] if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
        what = f"{where[-1]}: cannot write" if where else "cannot read or write"
        return f"{what} {error.filename} ({error.strerror})"
    if isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError):
        return said + choice_meant()
    if out_of_memory(error):
        return f"out of memory: {said[:200]}"
    if isinstance(error, ValueError) and said.startswith("Config group override"):  # Hydra has no class for model=null
        groups = [word for word in sys.argv[1:] if word.endswith("=null")]
        return f"{groups[-1] if groups else said}: a group needs one of its choices"
    return None


def choice_meant() -> str:
    """What to say after an error, where a word such as model.backbone=conv gives a choice of a group as a value."""
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        group = key.replace(".", "/")
        if "." in key and any((place / group / f"{value}.yaml").is_file() for place in config_directories()):
            return f" Say {group}={value}"
    return ""


def unknown_key(key: str, config_name: str) -> str:
    """The line for an override whose key (`model.latent_dmi`) or group (`model/bakbone`) does not exist."""
    given = next((word for word in sys.argv[1:] if word.lstrip("+~").partition("=")[0] == key), key)
    if key in ELSEWHERE:
        return f"{given}: say {ELSEWHERE[key]} instead"
    places = config_directories()
    groups = sorted({str(path.relative_to(place)) for place in places for path in place.rglob("*") if path.is_dir()})
    if "/" in key:
        return f"{given}: no such group of configurations{did_you_mean(key, groups)} Allowed: {', '.join(groups)}"
    removed = [word for word in sys.argv[1:] if word.startswith("~")]
    config = composed(config_name, [*(word for word in sys.argv[1:] if word.partition("=")[0] in groups), *removed])
    taken = [word for word in removed if f"{key}.".startswith(f"{word[1:].partition('=')[0].replace('/', '.')}.")]
    if taken:
        return f"{given}: {taken[0]} takes it away"
    parent = key
    while parent and not isinstance(OmegaConf.select(config, parent), DictConfig):
        parent = parent.rpartition(".")[0]
    siblings = [str(name) for name in (OmegaConf.select(config, parent) if parent else config)]
    near = did_you_mean(key, [*([] if parent else siblings), *all_keys(config)])
    return f"{given}: no such key{near} Allowed{f' under {parent}' if parent else ''}: {', '.join(siblings)}"


def config_directories() -> list[Path]:
    """Where configurations are looked up: ours, and those that --config-dir or hydra.searchpath add."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    known, words = parser.parse_known_args(sys.argv[1:])
    added = [known.config_dir] if known.config_dir else []
    for word in words:
        if word.lstrip("+").startswith("hydra.searchpath=["):
            added += [part.strip().removeprefix("file://") for part in word.partition("[")[2].rstrip("]").split(",")]
    return [CONF, *map(Path, added)]


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration that `overrides` lead to, or the default one where they do not compose."""
    places = f"hydra.searchpath=[{','.join(f'file://{place.absolute()}' for place in config_directories()[1:])}]"
    for words in ([*overrides, places], []):
        GlobalHydra.instance().clear()
        with contextlib.suppress(HydraException), initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(config_name, words)
    raise AssertionError("the default configuration composes")


def all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration."""
    keys: list[str] = []
    for key in map(str, config):
        keys.append(f"{prefix}{key}")
        child = None if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key) else config[key]
        if isinstance(child, DictConfig):
            keys += all_keys(child, f"{prefix}{key}.")
    return keys


def command_line(config_name: str, documentation: str | None, given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The overrides of this command composed with conf/<config_name>.yaml, and `given`: no run directory, no logging.

    `--help` prints the documentation and stops. Raises what `one_line_errors` turns into a line.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(inspect.cleandoc(documentation or ""))
        raise SystemExit
    bare = [word for word in sys.argv[1:] if "=" not in word and not word.startswith(("-", "~"))]
    if bare:
        raise ConfigError(f"{bare[0]}: say run={bare[0]}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name, sys.argv[1:])
    config = cast(DictConfig, OmegaConf.merge(config, given))
    missing = [str(key) for key in OmegaConf.missing_keys(config)]
    if missing:
        raise ConfigError(f"{missing[0]}: missing; say {missing[0]}=…")
    return plain(config)


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration, interpolations resolved, as dictionaries, lists, numbers and strings."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def rank() -> int:
    """Which of several processes this is: 0 is the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


@rank_zero_only
def print_once(line: object) -> None:
    """Print, in one process of many."""
    print(line)
