"""Paths, directions and moments in latent space: pure functions on latents `[..., latent_dim]`."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor


def line(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return `steps` points on the straight line between latents `[..., d]`, ends included: `[steps, ..., d]`."""
    return start + fractions(start, steps) * (end - start)


def arc(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return `steps` points of spherical interpolation between latents `[..., d]`: `[steps, ..., d]` (White 2016).

    For large d, the straight line between two samples of N(0, I) passes near 0, where the prior has almost no mass. The
    arc turns at constant angular speed and interpolates the norm linearly. If the two are parallel, opposite or 0, the
    result is the straight line.
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
    """Return `steps` numbers from 0 to 1, which broadcast against `start`: `[steps, 1, …]`."""
    return torch.linspace(0, 1, steps, device=start.device).reshape(-1, *[1] * start.ndim)


def principal_directions(means: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first k principal components of posterior means `[n, d]`, or all if there are fewer, largest first.

    They are unit vectors, one per row, `[k, d]`, and the standard deviation along each, `[k]`. The largest entry of
    each row is positive, so that figures do not depend on the machine. For more than 1,024 dimensions, they are those
    of a randomized algorithm (Halko et al. 2011), which needs no covariance.
    """
    n, d = means.shape
    if d <= 1_024:
        values, vectors = torch.linalg.eigh(means.T.cov().reshape(d, -1).double().cpu())
        directions, deviations = vectors.T.flip(0)[:k], values.flip(0)[:k].clamp_min(0).sqrt()
    else:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            _, singular, vectors = torch.pca_lowrank(means.cpu(), q=min(k + 10, n, d), niter=4)
        directions, deviations = vectors.T[:k], singular[:k] / max(n - 1, 1) ** 0.5
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return (directions * largest.sign()).to(means), deviations.to(means)


def by_activity(means: Tensor) -> list[int]:
    """Return the latent dimensions sorted by Var_x(E_q[z]), largest first, from posterior means `[n, d]`."""
    return means.var(dim=0).argsort(descending=True).tolist()


@torch.no_grad()
def moments(p: td.Distribution) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each dimension, `[latent_dim]`; without a formula, of samples.

    They are 10,000 samples, or fewer of more than 1,000 dimensions.
    """
    try:
        return p.mean.detach(), p.stddev.detach()
    except NotImplementedError:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            n = min(10_000, max(100, 10**7 // p.event_shape.numel()))
            z = torch.cat([p.sample((100,)) for _ in range(0, n, 100)])
        return z.mean(dim=0), z.std(dim=0)
