"""Errors that the user can fix, in one line: Hydra's own message, and the nearest match."""

from __future__ import annotations

import os
import re
import shlex
import traceback
from pathlib import Path

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
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        near, allowed = did_you_mean(choice, error.options), ", ".join(error.options)
        return f"{group}={choice}: no such choice{near} Allowed: {allowed}"
    if isinstance(error, OverrideParseException) and "=" in error.override:
        key, _, value = error.override.partition("=")
        return f"{error.override}: Hydra cannot read this; quote text with special characters: {quoted(key, value)}"
    if isinstance(error, HydraException) and (unknown := re.match(r"Could not override '([^']+)'\.", text)):
        node = getattr(error.__cause__, "parent_node", None)  # of the configuration, where the key was looked up
        path = unknown[1].rpartition(".")[0]
        keys = [f"{path}.{key}".lstrip(".") for key in node or () if key != "hydra"]
        groups = [str(folder.relative_to(CONF)) for folder in CONF.rglob("*/")]
        near, allowed = did_you_mean(unknown[1], [*keys, *groups]), ", ".join(keys or groups)
        return f"{unknown[0].rstrip('.')}{near} Allowed: {allowed}"
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
    if re.fullmatch(r"[\w./+-]+", value, re.ASCII):
        return f"{key}={value}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    word = f"{key}='{escaped}'"
    return shlex.quote(word) if re.search(r'["$`!\\]', word) else f'"{word}"'
