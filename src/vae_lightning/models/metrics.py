"""Exact epoch means of per-image terms: means over images, never means of batch means; and which values are better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vae_lightning.config import ConfigError, did_you_mean

# Whether lower (min) or higher (max) values of a metric are better, in every split.
BETTER = {"loss": "min", "reconstruction": "min", "squared_error": "min", "mse": "min", "elbo": "max"}
BETTER |= {"bits_per_dim": "min", "active_units": "max", "skipped": "min"}
MONITOR = "val/loss"  # chooses the best checkpoint, and the best trial of a search


def better(metric: str, mode: str | None = None, key: str = "", validates: bool = True) -> str:
    """Return `mode`, by default that of BETTER: `min` if lower values of `metric` are better, `max` if higher ones are.

    Raises ConfigError, which names the `key` of the monitor, for a mode that contradicts BETTER, for a metric that has
    no mode, and for one of the validation in a run without it.
    """
    split, _, term = metric.rpartition("/")
    if split == "val" and not validates:
        raise ConfigError(f"{key}.monitor={metric}: no images are validated (data.val_size, trainer.limit_val_batches)")
    known = BETTER.get(term) if split else None
    if known and mode not in (None, known):
        raise ConfigError(f"{key}.mode={mode}: {metric} has better values at its {known}imum. Allowed: {known}")
    if not known and not mode:
        near = did_you_mean(metric, [f"{part}/{term}" for part in ("train", "val") for term in BETTER])
        raise ConfigError(f"{key}.monitor={metric}: a metric of your own needs {key}.mode, min or max{near}")
    return mode or str(known)


ROWS = 1_024  # initial rows of `sums`


class EpochMeans(Metric):
    """The mean of each term over all images since `reset`; terms are a dictionary of `[batch]` tensors.

    Each batch adds a row to `sums`, on the device and in float64 (float32 on MPS, which has no float64). So an update
    takes microseconds without synchronization, and the batch with the first NaN can be found later. Sums and counts are
    added over processes before the division, so uneven batches are weighted correctly.
    """

    full_state_update = False
    sums: Tensor  # [at least updates, terms]
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.terms: tuple[str, ...] = ()
        self.updates = 0
        self.leave_out_non_finite = False

    def update(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack(list(terms.values()))  # [terms, batch]; torchmetrics has switched gradients off
        if not self.terms:
            self._start(tuple(terms), values.device)
        if self.leave_out_non_finite and not values.isfinite().all():
            values = values[:, :0]
        if self.updates == len(self.sums):
            self.sums = torch.cat([self.sums, torch.zeros_like(self.sums)])
        torch.sum(values, dim=-1, dtype=self.sums.dtype, out=self.sums[self.updates])
        self.count.add_(values.shape[-1])
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each term, in nats per image: 0-dimensional tensors."""
        # Only the rows in use: the order of summation must not depend on the number of unused rows.
        return dict(zip(self.terms, self.sums[: self.updates].sum(dim=0) / self.count, strict=True))

    def reset(self) -> None:
        super().reset()
        self.updates = 0

    def saved(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the sums of every process, stacked by `gather`, for a checkpoint."""
        if not self.updates:
            return {}
        sums, count = gather(self.sums[: self.updates]).cpu(), gather(self.count).cpu()
        return {"terms": list(self.terms), "updates": self.updates, "sums": sums, "count": count}

    def restore(self, saved: dict[str, Any], rank: int, device: torch.device) -> None:
        """Restore the sums of process `rank` from a checkpoint."""
        if not saved:
            return
        self._start(tuple(saved["terms"]), device)
        self.updates = saved["updates"]
        sums = saved["sums"].reshape(-1, self.updates, len(self.terms))[rank]
        self.sums = torch.cat([sums.to(self.sums), torch.zeros_like(self.sums)])
        self.count.copy_(saved["count"].reshape(-1)[rank])

    def first_not_finite(self) -> tuple[str, int] | None:
        """Return the first NaN or infinite term and its update, counted from 0; None if all are finite."""
        if not self.updates:
            return None
        finite = self.sums[: self.updates].isfinite()
        if finite.all():
            return None
        first = int(finite.all(dim=1).int().argmin())
        bad = [term for term, is_finite in zip(self.terms, finite[first].tolist(), strict=True) if not is_finite]
        # "loss" and "elbo" contain the other terms, so name another one if there is one.
        return next((t for t in bad if t not in ("loss", "elbo")), bad[0]), first

    def _start(self, terms: tuple[str, ...], device: torch.device) -> None:
        self.terms = terms
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(ROWS, len(terms), dtype=dtype, device=device), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=dtype, device=device), dist_reduce_fx="sum")
