"""Exact epoch means of per-image terms: means over images, never means of batch means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

STATES = ("total", "count", "finite_updates")


class EpochMeans(Metric):
    """The mean over all images seen since `reset` of each term in a dictionary of `[batch]` tensors.

    Sums stay on the device in float64 (float32 on MPS, which has no other), so an update costs microseconds and no
    synchronization; across processes the sums and counts are added before dividing, so uneven batches weigh right.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    finite_updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.terms: tuple[str, ...] = ()
        self.updates = 0
        self.leave_out_non_finite = False

    def update(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack([value.detach() for value in terms.values()])  # [terms, batch]
        if not self.terms:
            self._start(tuple(terms), values.device)
        if self.leave_out_non_finite and not values.isfinite().all():
            return
        self.total += values.sum(dim=-1, dtype=self.total.dtype)
        self.count += values.shape[-1]
        # A sum that was once NaN or infinite never becomes finite again: this counts the updates before that.
        self.finite_updates += self.total.isfinite()
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """The mean of each term, in nats per image: 0-dimensional tensors."""
        return dict(zip(self.terms, self.total / self.count, strict=True))

    def reset(self) -> None:
        super().reset()
        self.updates = 0

    def saved(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The sums so far of every process, which `gather` puts on top of each other, for a checkpoint."""
        if not self.terms:
            return {}
        sums = {name: gather(getattr(self, name)).cpu() for name in STATES}
        return {"terms": list(self.terms), "updates": self.updates} | sums

    def restore(self, saved: dict[str, Any], rank: int, device: torch.device) -> None:
        """Go on from the sums that a checkpoint has of process `rank`."""
        if not saved:
            return
        self._start(tuple(saved["terms"]), device)
        for name in STATES:
            state = getattr(self, name)
            state.copy_(saved[name].reshape(-1, *state.shape)[rank])
        self.updates = saved["updates"]

    def first_not_finite(self) -> tuple[str, int] | None:
        """The term that first became NaN or infinite, and at which update (from 0); None while all are finite."""
        if not self.updates or bool((self.finite_updates == self.updates).all()):
            return None
        # "loss" and "elbo" contain the other terms: of those that went bad together, name the one at the bottom.
        first = int(self.finite_updates.min())
        bad = [t for t, n in zip(self.terms, self.finite_updates.tolist(), strict=True) if n == first]
        return next((t for t in bad if t not in ("loss", "elbo")), bad[0]), first

    def _start(self, terms: tuple[str, ...], device: torch.device) -> None:
        self.terms = terms
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("total", torch.zeros(len(terms), dtype=dtype, device=device), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=dtype, device=device), dist_reduce_fx="sum")
        self.add_state("finite_updates", torch.zeros(len(terms), dtype=torch.long, device=device), dist_reduce_fx="min")
