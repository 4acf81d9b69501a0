"""Paths and directions in latent space: pure functions on latents `[..., latent_dim]`."""

from __future__ import annotations

import torch
from torch import Tensor


def line(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` points on the straight line between latents `[..., d]`, both ends included: `[steps, ..., d]`."""
    return start + fractions(start, steps) * (end - start)


def arc(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` points between latents `[..., d]`, turning at an even pace: `[steps, ..., d]` (White 2016).

    A straight line between two draws of N(0, I) cuts through the middle, where the prior puts almost nothing when d is
    large; the arc keeps their distance from it, going evenly from one length to the other. Where the two lie on one
    ray, or opposite, or one at 0, there is no arc between them, and it is the line.
    """
    t = fractions(start, steps)
    lengths = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    a, b = start / lengths[0].clamp_min(1e-12), end / lengths[1].clamp_min(1e-12)
    angle = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1).arccos()
    sine = angle.sin()
    direction = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    straight = (sine < 1e-4) | (torch.minimum(*lengths) < 1e-6)
    return torch.where(straight, line(start, end, steps), direction * torch.lerp(*lengths, t))


def fractions(start: Tensor, steps: int) -> Tensor:
    """0 to 1 in `steps` steps, ready to multiply latents of the shape of `start`: `[steps, 1, …]`."""
    return torch.linspace(0, 1, steps, device=start.device).reshape(-1, *[1] * start.ndim)


def principal_directions(means: Tensor) -> tuple[Tensor, Tensor]:
    """The principal components of posterior means `[n, d]`: directions `[d, d]`, a unit vector a row, widest first,
    and the standard deviation along each `[d]`.

    The sign is the one that makes the largest entry of a row positive, so that pictures come out the same everywhere.
    """
    values, vectors = torch.linalg.eigh(means.T.cov().reshape(means.shape[1], -1).double().cpu())
    directions = vectors.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return (directions * largest.sign()).to(means), values.flip(0).clamp_min(0).sqrt().to(means)


def by_activity(means: Tensor) -> list[int]:
    """The latent dimensions, that of the largest Var_x(E_q[z]) first, from posterior means `[n, d]`."""
    return means.var(dim=0).argsort(descending=True).tolist()
