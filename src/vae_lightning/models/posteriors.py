"""q(z|x): the diagonal Gaussian that an encoder's outputs parametrize."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor

LOG_VARIANCE_BOUND = 15.0  # variances between 3e-7 and 3e6: wider than any posterior needs, and exp() stays finite


class DiagonalGaussian(td.Independent[td.Normal]):
    """N(mean, diag(exp(log_variance))), both `[batch, latent_dim]`; `log_prob(z)` is `[..., batch]`, in nats."""

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        self.log_variance = log_variance
        normal = td.Normal(mean, torch.exp(0.5 * log_variance), validate_args=False)
        super().__init__(normal, reinterpreted_batch_ndims=1, validate_args=False)

    @property
    def stddev(self) -> Tensor:
        stddev: Tensor = self.base_dist.stddev  # td.Independent would take the root of its square
        return stddev

    def detach(self) -> DiagonalGaussian:
        """The same distribution, with no gradient to its parameters."""
        return DiagonalGaussian(self.mean.detach(), self.log_variance.detach())


def diagonal_gaussian(encoder_outputs: Tensor) -> DiagonalGaussian:
    """The posterior from encoder outputs `[batch, 2 · latent_dim]`, in float32 whatever the training precision.

    The log variance is bounded smoothly, by a scaled tanh, and not cut off: outside a hard bound its gradient would be
    zero, and a dimension that strayed there could never come back.
    """
    mean, raw = encoder_outputs.float().chunk(2, dim=-1)
    return DiagonalGaussian(mean, LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND))
