"""Pure functions: KL divergence, free bits, importance-weighted bound and its error, active units."""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor


def closed_form_kl(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    """Return KL(q ‖ p) in nats by the formula that is registered for `torch.distributions.kl_divergence`, or None.

    It is `[batch, latent_dim]`, of each dimension, if both are a `td.Independent`, whose `base_dist` then need a
    formula; otherwise `[batch, 1]`. `td.register_kl` adds one.
    """
    try:
        if isinstance(q, td.Independent) and isinstance(p, td.Independent):
            return td.kl_divergence(q.base_dist, p.base_dist)
        return td.kl_divergence(q, p).unsqueeze(-1)
    except NotImplementedError:
        return None


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, diag(exp(log_variance))) ‖ N(0, I)) of each latent dimension, in nats: `[..., latent_dim]`.

    The sum over the last dimension is the KL of an image (Kingma & Welling 2014, appendix B).
    """
    return 0.5 * (mean.square() + (log_variance.expm1() - log_variance))  # expm1: never negative by rounding


def with_free_bits(kl: Tensor, floor: float) -> Tensor:
    """Return the KL of each image, `[batch]`, with at least `floor` nats per dimension; `kl` is `[batch, latent_dim]`.

    A dimension with a batch mean below the floor counts as the floor and gets no gradient (Kingma et al. 2016, eq. 15).
    """
    return torch.where(kl.mean(dim=0) > floor, kl, floor).sum(dim=-1)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Return log (1/k) Σᵢ wᵢ, the IWAE bound on log p(x), in nats: `[batch]` from log weights `[k, batch]`.

    k = 1 gives the Monte-Carlo ELBO. The bound rises towards log p(x) with k (Burda et al. 2016, eq. 8).
    """
    return log_weights.logsumexp(dim=0) - math.log(log_weights.shape[0])


def importance_weighted_stderr(log_weights: Tensor) -> Tensor:
    """Return the standard error of `importance_weighted_bound`, in nats: `[batch]` from log weights `[k, batch]`.

    By the delta method it is √((k Σ w̃² − 1) / (k − 1)), with normalized weights w̃; NaN for k = 1. The bound is below
    log p(x) by about half its square. Both are too small if a few weights dominate.
    """
    k = log_weights.shape[0]
    squares = log_weights.double().softmax(dim=0).square().sum(dim=0)
    return ((k * squares - 1).clamp(min=0) / (k - 1)).sqrt()


def active_units(means: Tensor) -> Tensor:
    """Count the latent dimensions with Var_x(E_q[z]) > 0.01, given posterior means `[images, latent_dim]`.

    Burda et al. 2016, section 5.2.
    """
    return (means.var(dim=0) > 0.01).sum()
