"""Axes to explore latent space along: the latent dimensions, most active first, and the principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vae_lightning.analysis.generation import latent_center_and_deviation
from vae_lightning.models.estimators import active_units
from vae_lightning.models.latents import principal_directions
from vae_lightning.runs.loading import Run

DIMENSIONS, DIRECTIONS = 500, 20  # most latent dimensions and principal components to choose from
SHORTEST = 1e-6  # length of an axis along which the codes do not vary


@dataclass
class Axes:
    """Orthogonal axes of latent space, each one standard deviation long."""

    center: Tensor  # [latent_dim]
    axes: Tensor  # [n, latent_dim]
    names: list[str]
    values: list[float]  # of each axis: KL, variance or share of the variance
    about: str  # the axes and their values, for people

    def coordinates(self, z: Tensor, chosen: list[int]) -> Tensor:
        """Return the coordinates of latents `[n, latent_dim]` on the chosen axes, `[n, len(chosen)]`."""
        axes = self.axes[chosen]
        return (z - self.center) @ (axes / axes.square().sum(dim=1, keepdim=True)).T

    def described(self) -> dict[str, Any]:
        """Return the axes for the page. Of each, only the entries that are not 0: an axis of `dimensions` has one."""
        entries = [axis.nonzero()[:, 0] for axis in self.axes]
        axes = [{"at": at.tolist(), "by": rounded(axis[at])} for axis, at in zip(self.axes, entries, strict=True)]
        return {"center": rounded(self.center), "axes": axes} | {
            name: getattr(self, name) for name in ("names", "values", "about")
        }


def latent_axes(run: Run, codes: Tensor, kl: Tensor | None) -> dict[str, Axes]:
    """Return the axes to choose from: latent dimensions, and principal components of more than two of them."""
    center, deviation = latent_center_and_deviation(run)
    d = codes.shape[1]
    variances = codes.var(dim=0)
    values, what = (variances, "variance of the codes") if kl is None else (kl, "KL in nats per image")
    # The map of two dimensions is the latent space.
    order = [0, 1] if d == 2 else values.argsort(descending=True)[:DIMENSIONS].tolist()
    shown = "" if d == len(order) else f", the first {len(order)} shown"
    axes = {
        "dimensions": Axes(
            center,
            functional.one_hot(torch.tensor(order, device=deviation.device), d) * deviation.clamp_min(SHORTEST),
            [f"z{dimension + 1}" for dimension in order],
            rounded(values[order]),
            f"{d} latent dimensions, {active_units(codes)} active{shown}; {what}",
        )
    }
    if d > 2:
        directions, deviations = principal_directions(codes, DIRECTIONS)
        shares = 100 * deviations.square() / variances.sum().clamp_min(SHORTEST)
        axes["principal components"] = Axes(
            codes.mean(dim=0),
            directions * deviations.clamp_min(SHORTEST)[:, None],
            [f"PC {i + 1}" for i in range(len(directions))],
            rounded(shares),
            "principal components of the codes; % of their variance",
        )
    return axes


def rounded(values: Tensor) -> Any:
    """Return numbers as nested lists, short as text."""
    return values.double().round(decimals=7).tolist()
