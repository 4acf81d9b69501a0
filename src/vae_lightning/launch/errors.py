"""Errors that the user can fix, in one line: Hydra's own message, and the nearest match."""

from __future__ import annotations

import os
import re
import shlex
import traceback
from pathlib import Path

from cyclopts import CycloptsError
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from vae_lightning.config import UserError, did_you_mean
from vae_lightning.launch import TRACEBACK

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]
CONF = CHECKOUT / "conf" if (CHECKOUT / "conf" / "train.yaml").exists() else PACKAGE / "conf"


def error_line(error: Exception) -> str | None:
    """Return a user-fixable error in one line. None for a bug, or if the user wants a traceback."""
    text = " ".join(str(error).split())
    if os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, CycloptsError):
        invalid = getattr(error.__cause__, "errors", None)  # of pydantic, over many lines
        return f"{text.partition('. ')[0]}: {invalid()[0]['msg']}" if invalid else text
    if isinstance(error, MissingConfigException):
        choice = (error.missing_cfg_file or "").rpartition("/")[2]
        return text.partition(" Config search path:")[0] + did_you_mean(choice, error.options or ())
    if isinstance(error, OverrideParseException) and "=" in error.override:
        key, _, value = error.override.partition("=")
        return f"{error.override}: Hydra cannot read this; quote text with special characters: {quoted(key, value)}"
    if isinstance(error, HydraException) and (unknown := re.match(r"Could not override '([^']+)'\.", text)):
        node = getattr(error.__cause__, "parent_node", None)  # of the configuration, where the key was looked up
        path = unknown[1].rpartition(".")[0]
        keys = [f"{path}.{key}".lstrip(".") for key in node or () if key != "hydra"]
        groups = [str(folder.relative_to(CONF)) for folder in CONF.rglob("*/")]
        near = did_you_mean(unknown[1], [*keys, *groups])
        return f"{unknown[0].rstrip('.')}{near} Allowed: {', '.join(keys or groups)}"
    if isinstance(error, UserError | HydraException | OmegaConfBaseException | MisconfigurationException | OSError):
        return text
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if isinstance(error, ValueError | RuntimeError) and frame.f_globals["__name__"].startswith("lightning."):
        return text  # Lightning has more checks of arguments, with these exceptions
    # PyTorch has no exception class for the memory of a CPU.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in text:
        advice = "lower data.batch_size, with trainer.accumulate_grad_batches for the same steps, or the model's width"
        return f"out of memory: {advice} ({text})"
    return None


def quoted(key: str, value: str) -> str:
    """Return `key=value`, quoted for Hydra's grammar and for the shell where needed."""
    return f"{key}={value}" if re.fullmatch(r"[\w./+-]+", value, re.ASCII) else shlex.quote(f'{key}="{value}"')
