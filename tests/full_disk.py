"""Run one command on a full disk: python full_disk.py DIRECTORY SIZES WORD…

Files are limited to SIZE bytes. Everything is imported once; each size runs in a fork of this process. Prints one line
of JSON per size: exit status, standard error, and the remaining files.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path

from conftest import DATA

from vae_lightning.data.torchvision_sets import load_images
from vae_lightning.launch import commands, jobs  # noqa: F401 (imported once for all sizes)


def attempt(directory: Path, size: int, words: list[str]) -> dict:
    """Run the command with files limited to `size` bytes."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        sys.argv = ["train.py", *words, f"hydra.run.dir={directory / str(size)}"]
        os.chdir(directory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        status = 1
        try:
            commands.train()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as errors:
        said = errors.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    files = sorted(str(path.relative_to(directory / str(size))) for path in (directory / str(size)).rglob("*.*"))
    return {"size": size, "status": status, "stderr": said, "files": files}


if __name__ == "__main__":
    load_images("MNIST", DATA.resolve())
    for size in sys.argv[2].split(","):
        print(json.dumps(attempt(Path(sys.argv[1]), int(size), sys.argv[3:])), flush=True)
