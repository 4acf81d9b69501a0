"""p(z): the prior over latents. A module, so that its tensors follow the model to its device."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """N(0, I) over `latent_dim` dimensions (Kingma & Welling 2014)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        # Buffers that no checkpoint needs: they say nothing that latent_dim does not.
        self.register_buffer("mean", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> td.Distribution:
        """The distribution itself; `log_prob(z)` of z `[..., latent_dim]` is `[...]`, in nats."""
        return td.Independent(td.Normal(self.mean, self.scale, validate_args=False), 1, validate_args=False)
