"""What is minimised, as pure per-example functions on tensors. Everything is in nats per image."""

from __future__ import annotations

import math

from torch import Tensor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_variance))) ‖ N(0, I)) of each latent dimension, in nats: `[..., latent_dim]`.

    Kingma & Welling 2014, appendix B; sum over the last dimension for the KL of an image.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def elbo(reconstruction: Tensor, kl: Tensor, beta: float = 1.0) -> dict[str, Tensor]:
    """The evidence lower bound and its two terms, each `[batch]`, in nats per image.

    `reconstruction` = −log p(x|z) with z ~ q(z|x), the distortion; `kl` = KL(q(z|x) ‖ p(z)), the rate.
    `elbo` is always log p(x)'s lower bound, β = 1 (Kingma & Welling 2014, eq. 3); `loss`, which is minimised, weights
    the KL by `beta` (Higgins et al. 2017).
    """
    return {
        "loss": reconstruction + beta * kl,
        "elbo": -(reconstruction + kl),
        "reconstruction": reconstruction,
        "kl": kl,
    }


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """log (1/k) Σᵢ wᵢ from log weights `[k, batch]`: the IWAE bound on log p(x), `[batch]`, in nats.

    k = 1 is the Monte-Carlo ELBO, and it rises towards log p(x) with k (Burda et al. 2016, eq. 8).
    """
    return log_weights.logsumexp(dim=0) - math.log(log_weights.shape[0])
