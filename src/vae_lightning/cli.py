"""What the command line shows when something is wrong: one clear line, no traceback, a non-zero exit."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_lightning.checkpoints import last_checkpoint
from vae_lightning.config import ConfigError, UserError, did_you_mean, out_of_memory
from vae_lightning.resuming import Assignment, assign, find_run, run_config
from vae_lightning.stepping import Every
from vae_lightning.stopping import Interrupted
from vae_lightning.sweeps import failures, forget_failures, note_failure, share_of_machine, train_apart

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[2] / "conf"


MENDABLE = (UserError, HydraException, OmegaConfBaseException, OSError)  # what gets one line; the rest are bugs


@contextlib.contextmanager
def one_line_errors(config_name: str) -> Iterator[None]:
    """Around a `@hydra.main` function: turn what the user can mend into one line on stderr and exit status 2.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them over many lines
    try:
        yield
    except MENDABLE as error:
        print("\n".join(report_failures() or [one_line(error, config_name)]), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        line = f"out of memory: {' '.join(str(error).split())[:200]}"
        print("\n".join(report_failures() or [line]), file=sys.stderr)
        raise SystemExit(2) from None
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # model=null: Hydra has no class of its own for it
            raise
        groups = [word for word in sys.argv[1:] if word.endswith("=null")]
        print(f"{groups[-1] if groups else error}: a group needs one of its choices", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def assigned(config: dict[str, Any], directory: Path) -> Assignment:
    """The run that this command, or this job of a sweep, is about: a new one in `directory`, or one that is there.

    A job of a sweep is known by its configuration: one that the sweep's directory has already is gone on with, or left
    alone where it is finished. Raises UserError.
    """
    hydra = HydraConfig.get()
    if launched_from_outside():
        check_launch(hydra.mode, config["autoresume"], hydra.overrides.hydra)
    given = [override.key_or_group for override in OverridesParser.create().parse_overrides(hydra.overrides.task)]
    if rank() and RUN in os.environ:  # the first process has decided
        theirs = json.loads(os.environ[RUN])
        run = Assignment(theirs["config"], Path(theirs["directory"]), theirs["resume"])
    elif rank():  # of processes that torchrun or srun started
        there = config["resume"] or config["repeat"]
        run = assign(config, directory, given) if there else Assignment(run_config(config), directory)
        run.resume = run.resume or (config["autoresume"] and last_checkpoint(directory) is not None)
    elif hydra.mode == RunMode.MULTIRUN:
        if config["resume"] or config["repeat"]:
            raise ConfigError("resume is for one run; a sweep goes on when it is run again in its hydra.sweep.dir")
        sweep = directory.parent
        others = sweep.parent.glob("*/*") if config["autoresume"] else []
        places = [*siblings(directory), *sorted(others, reverse=True)]
        for n in itertools.count(2):  # job 3 of another sweep is there, and this one's job 3 is something else
            if not (directory / "config.yaml").exists() or find_run(run_config(config), [directory]):
                break
            directory = sweep / f"{hydra.job.num}_{n}"
        run = assign(config | {"autoresume": True}, directory, given, places)
    else:
        run = assign(config, directory, given, siblings(directory) if config["autoresume"] else [])
    write_log_to(run.directory)
    if run.finished:
        log.info("%s: finished already; nothing to do", run.directory)
    else:
        content = {"config": run.config, "directory": str(run.directory), "resume": run.resume}
        os.environ[RUN] = json.dumps(content)
    return run


def launched_from_outside() -> bool:
    """Whether torchrun or srun started several processes of this command."""
    return any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")) and RUN not in os.environ


def check_launch(mode: RunMode | None, autoresume: bool, hydra_overrides: Sequence[str]) -> None:
    """Raise ConfigError for what processes that know nothing of each other would not agree on."""
    if mode == RunMode.MULTIRUN:
        raise ConfigError("-m: a sweep starts processes itself, and cannot be started by torchrun or srun")
    if autoresume and not any(override.startswith("hydra.run.dir=") for override in hydra_overrides):
        raise ConfigError(
            "autoresume=true: with torchrun or srun say hydra.run.dir=… too: each process looks for itself"
        )


RUN = "VAE_LIGHTNING_RUN"  # what the first process of several tells those that it starts


def siblings(directory: Path) -> list[Path]:
    """The directories beside `directory`, the latest name first."""
    return sorted(directory.parent.iterdir(), reverse=True) if directory.parent.is_dir() else []


def write_log_to(directory: Path) -> None:
    """Have train.log written in the run's directory, by the first process alone; nothing was written to it yet."""
    directory.mkdir(parents=True, exist_ok=True)
    for handler in list(logging.root.handlers):
        if isinstance(handler, logging.FileHandler):
            handler.close()
            handler.baseFilename = str(directory / "train.log")
            if rank():
                logging.root.removeHandler(handler)


@contextlib.contextmanager
def resumable(directory: Path, by: str = "python train.py resume={}") -> Iterator[None]:
    """Around training: where a signal asked to stop, say how to go on, and exit with a status of its own."""
    try:
        yield
    except Interrupted as stop:
        if rank():  # Lightning takes another status of a process for a crash, and kills the rest
            raise SystemExit(0) from None
        there = any((directory / name).exists() for name in ("config.yaml", "search.yaml"))
        what = f"to go on: {by.format(directory)}" if there else "before anything was written"
        print(f"{stop}; {what}", file=sys.stderr)
        raise SystemExit(stop.status) from None


def runs_apart(run: Assignment, timeout: str | None) -> bool:
    """Whether a job of a sweep needs a process of its own."""
    hydra = HydraConfig.get()
    trainer = run.config["trainer"]
    many = trainer["devices"] not in (1, "auto", "1") or trainer["num_nodes"] > 1
    side_by_side = hydra.runtime.choices.get("hydra/launcher") != "basic"
    return hydra.mode == RunMode.MULTIRUN and (many or side_by_side or timeout is not None)


def train_job_apart(run: Assignment, timeout: str | None) -> None:
    """Train a job's run in a process of its own, with its share of the machine. Raises what `train_apart` does."""
    hydra = HydraConfig.get()
    seconds = Every.parse(timeout, "timeout", steps=False).seconds
    launcher = str(hydra.runtime.choices.get("hydra/launcher"))
    share = share_of_machine(
        launcher, hydra.job.num, run.config["trainer"]["devices"], hydra.launcher.get("cpus_per_task")
    )
    train_apart(run, share, seconds)
    log.info("job %s: finished %s", hydra.job.num, run.directory)


def report_failures() -> list[str]:
    """What is to be said at the end of a sweep: the jobs that failed, each in a line. Nothing where there was none."""
    directory = os.environ.pop(SWEEP, None)
    return failures(Path(directory)) if directory else []


SWEEP = "VAE_LIGHTNING_SWEEP"  # its directory, for the report at the end


class SweepDirectory(HydraCallback):
    """Notes where a sweep leaves its runs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        os.environ[SWEEP] = str(directory)
        forget_failures(directory)


@contextlib.contextmanager
def job(config_name: str) -> Iterator[Path]:
    """Inside a `@hydra.main` function: the run directory of this job, removed again if nothing came to stand in it.

    In a sweep an error is logged at once, and noted for the end, and the sweep goes on.
    """
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    directory = Path(hydra.runtime.output_dir)
    ours = not any(directory.iterdir())  # made for this job, or as good as
    try:
        if not os.access(directory, os.W_OK):
            raise ConfigError(f"hydra.{'sweep' if sweep else 'run'}.dir={directory}: cannot be written to")
        yield directory
    except Exception as error:
        mendable = isinstance(error, MENDABLE)
        line = one_line(error, config_name) if mendable else f"{type(error).__name__}: {' '.join(str(error).split())}"
        if sweep:
            log.error("job %s: %s", hydra.job.num, line)
            note_failure(directory.parent, hydra.job.num, hydra.overrides.task, line)
        if ours or sweep:
            remove_lonely_log()
        if sweep or not mendable:
            raise
        print(line, file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if ours:
            with contextlib.suppress(OSError):  # it is not empty
                directory.rmdir()


def remove_lonely_log() -> None:
    """Remove the log of a job, and its directory, where there is nothing else in it."""
    for handler in logging.root.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
            file = Path(handler.baseFilename)
            if file.parent.is_dir() and [path.name for path in file.parent.iterdir()] == [file.name]:
                file.unlink()
                file.parent.rmdir()


def command_line(config_name: str, documentation: str | None) -> dict[str, Any]:
    """The overrides of this command composed with conf/<config_name>.yaml: no run directory, no logging.

    `--help` prints the documentation and stops. Raises what `one_line_errors` turns into a line.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(documentation)
        raise SystemExit
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name, sys.argv[1:])
    missing = [str(key) for key in OmegaConf.missing_keys(config)]
    if missing:
        raise ConfigError(f"{missing[0]}: missing; say {missing[0]}=…")
    return plain(config)


def rank() -> int:
    """Which of several processes this is: 0 is the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


@rank_zero_only
def print_once(line: object) -> None:
    """Print, in one process of many."""
    print(line)


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration, interpolations resolved, as dictionaries, lists, numbers and strings."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def one_line(error: Exception, config_name: str) -> str:
    """The error in one line: the key, what was given, what is allowed, the nearest match."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return (
            f"{group}={choice}: no such choice{did_you_mean(choice, error.options)} Allowed: {', '.join(error.options)}"
        )
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return unknown_key(unknown[1], config_name)
    plugin = re.search(r"hydra_plugins\.hydra_(\w+?)_launcher", str(error))
    if plugin and "Error locating target" in str(error):
        extra = "ray" if plugin[1] == "ray" else "launchers"
        return f"hydra/launcher: {plugin[1]} is not installed; pip install -e '.[{extra}]' brings it"
    if isinstance(error, OSError) and error.filename:
        where = [word for word in sys.argv[1:] if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
        what = f"{where[-1]}: cannot write" if where else "cannot read or write"
        return f"{what} {error.filename} ({error.strerror})"
    return " ".join(str(error).split())


def unknown_key(key: str, config_name: str) -> str:
    """The line for an override whose key (`model.latent_dmi`) or group (`model/bakbone`) does not exist."""
    given = next((word for word in sys.argv[1:] if word.lstrip("+~").partition("=")[0] == key), key)
    groups = sorted(str(p.relative_to(CONF)) for p in CONF.rglob("*") if p.is_dir())
    if "/" in key:
        return f"{given}: no such group of configurations{did_you_mean(key, groups)} Allowed: {', '.join(groups)}"
    config = composed(config_name, [word for word in sys.argv[1:] if word.partition("=")[0] in groups])
    parent = key
    while parent and not isinstance(OmegaConf.select(config, parent), DictConfig):
        parent = parent.rpartition(".")[0]
    siblings = [str(name) for name in (OmegaConf.select(config, parent) if parent else config)]
    near = did_you_mean(key, all_keys(config)) if parent else did_you_mean(key, [*siblings, *all_keys(config)])
    return f"{given}: no such key{near} Allowed{f' under {parent}' if parent else ''}: {', '.join(siblings)}"


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration that `overrides` lead to, or the default one where they do not compose."""
    for words in (overrides, []):
        GlobalHydra.instance().clear()
        with contextlib.suppress(HydraException), initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(config_name, words)
    raise AssertionError("the default configuration composes")


def all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration."""
    keys: list[str] = []
    for key in map(str, config):
        keys.append(f"{prefix}{key}")
        if isinstance(child := config._get_node(key), DictConfig) and not child._is_none():
            keys += all_keys(child, f"{prefix}{key}.")
    return keys
