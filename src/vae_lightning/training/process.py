"""Settings of the process that trains: floating-point and memory, log and warnings."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm


def steady_cpu() -> None:
    """Keep the speed of training on a CPU constant. Flushing denormal numbers to zero is the only change of results."""
    # Denormal numbers slow arithmetic several times, and small models reach them after a few epochs.
    torch.set_flush_denormal(True)
    # By default glibc returns the memory of each step's gradients to the kernel, which costs page faults.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold, never = -1, -3, 2**31 - 1  # <malloc.h>
        mallopt(m_trim_threshold, never)
        mallopt(m_mmap_threshold, never)
    # Optimizers ask at each step whether there is a GPU. Lightning sets this variable so that PyTorch searches for
    # NVIDIA's library each time, which allows forks. Without a GPU, asking the driver is much faster.
    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def share_log() -> None:
    """Send Lightning's messages to the root logger (console and train.log), and drop irrelevant ones."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.filters.clear()
        logger.addFilter(lambda record: not re.search("Tip:|already configured|`Trainer.fit` stopped", record.msg))
    for message in (
        ".*all_gather is deprecated.*",  # Lightning 2.6 with the newest torch
        ".*LeafSpec.*",  # the same
        "Checkpoint directory .* exists and is not empty",  # expected in a resumed run
        ".*log_every_n_steps.*",  # the models here log per epoch
    ):
        warnings.filterwarnings("ignore", message=message)


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A log handler that prints above a running progress bar, not through it. A closed pipe does not stop training."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(BrokenPipeError):
            tqdm.write(self.format(record), file=self.stream)
            self.flush()


@contextlib.contextmanager
def log_to(file: Path) -> Iterator[None]:
    """Also append log lines of the block to `file`, and the error that ends it, which the console shows later."""
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    logging.root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        handler.emit(logging.makeLogRecord({"msg": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        logging.root.removeHandler(handler)
        handler.close()
