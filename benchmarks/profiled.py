"""Profile one epoch of `train.py` with torch.profiler, and print the time of each group of operations.

    python benchmarks/profiled.py                   # mlp_200 at batch 100
    python benchmarks/profiled.py conv_20/100
    python benchmarks/profiled.py mlp_200/100 cuda  # times on the GPU

The profiler adds time to every operation, so the shares of short operations are upper bounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from contenders import train_config
from lightning.pytorch import Callback
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from vae_lightning.training.train import train

GROUPS = {  # an operation belongs to the first group that has the end of its name
    "matrix products": ("::mm", "::addmm", "::bmm", "onvolution", "onvolution_backward", "mkldnn_convolution"),
    "Adam, all parameters in one kernel": ("_fused_adam_",),
    "Adam, in Python": ("Adam.step", "::_foreach_add_"),
    "cross-entropy and its gradient": ("log_sigmoid_forward", "log_sigmoid_backward", "sigmoid", "::rsub"),
    "images by index, as floats": ("::index_select", "::index", "::copy_", "::_to_copy", "::to", "::div_"),
    "activations and their gradients": ("relu", "relu_", "relu_backward", "threshold_backward"),
    "noise": ("::normal_", "::randn", "::bernoulli_", "::random_"),
    "sums": ("::sum", "::mean"),
}


class OneEpoch(Callback):
    """Profile the second epoch, after the warm-up."""

    table = ""

    def on_train_epoch_start(self, trainer, module) -> None:
        if trainer.current_epoch == 1:
            on_gpu = trainer.strategy.root_device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self.profiler = profile(activities=activities)
            self.profiler.__enter__()
            self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer, module) -> None:
        if trainer.current_epoch == 1:
            seconds = time.perf_counter() - self.started
            self.profiler.__exit__(None, None, None)
            OneEpoch.table = grouped(self.profiler, seconds, int(trainer.num_training_batches))


def grouped(profiler: profile, seconds: float, steps: int) -> str:
    """Return a table with the milliseconds per step of each group and its share of the epoch."""
    times = dict.fromkeys([*GROUPS, "other operations"], 0.0)
    for event in profiler.key_averages():
        fits = [group for group, ends in GROUPS.items() if event.key.endswith(ends)]
        microseconds = event.self_device_time_total if torch.cuda.is_initialized() else event.self_cpu_time_total
        times[fits[0] if fits else "other operations"] += microseconds / 1e6
    times["Python, Lightning, and work once per epoch"] = seconds - sum(times.values())
    rows = [[name, f"{1e3 * t / steps:.2f}", f"{100 * t / seconds:.0f} %"] for name, t in times.items()]
    return tabulate(rows, ["", "ms per step", "share"], tablefmt="pipe", colalign=["left", "right", "right"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", default="mlp_200/100")
    parser.add_argument("device", nargs="?", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    system, batch = options.row.split("/")
    config = train_config(system, int(batch), options.device, "profiled.OneEpoch")
    config["trainer"]["max_epochs"] = 2
    with tempfile.TemporaryDirectory() as directory:
        train(config, Path(directory) / "run")
    from profiled import OneEpoch as profiled  # the configuration imported this file a second time, under its own name

    print(f"\n{system}, batch {batch}, {torch.get_num_threads()} threads\n\n{profiled.table}")


if __name__ == "__main__":
    main()
