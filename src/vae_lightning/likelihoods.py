"""p(x|z): each likelihood turns decoder outputs into a `torch.distributions` object over whole images.

Its `log_prob(x)` is in nats per image, summed over pixels, normalizing constants included; its `mean` is the image to
show. To add one, write a class with a `forward`, and a YAML file in conf/model/likelihood/ that names it.
"""

from __future__ import annotations

from typing import Literal

import torch.distributions as td
from torch import Tensor, nn

from vae_lightning.config import Positive

IMAGE_DIMS = 3  # channels, height, width: the dimensions that one log_prob sums over


class Likelihood(nn.Module):
    """From decoder outputs `[..., channels, height, width]` to p(x|z), with `log_prob(x)` of shape `[...]`."""

    def forward(self, outputs: Tensor) -> td.Distribution:
        raise NotImplementedError

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """Further per-image figures `[...]` that this likelihood is usually judged by."""
        return {}


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, on logits: finite, gradients included, however large the logits are.

    On grey pixels (x between 0 and 1) its negative log_prob is a cross-entropy and no likelihood, as in every tutorial.
    """

    def forward(self, outputs: Tensor) -> td.Distribution:
        return td.Independent(td.Bernoulli(logits=outputs, validate_args=False), IMAGE_DIMS, validate_args=False)


class Gaussian(Likelihood):
    """Independent Gaussian pixels with one fixed standard deviation `scale`.

    `mean` says how decoder outputs become the mean: `sigmoid` keeps it a pixel value, `identity` leaves it free.
    scale² = 1/2 makes −log p(x|z) the summed squared error plus a constant, (pixels / 2) · log π.
    """

    def __init__(self, scale: Positive = 0.5**0.5, mean: Literal["sigmoid", "identity"] = "sigmoid") -> None:
        super().__init__()
        self.scale = scale
        self.mean: nn.Module = nn.Sigmoid() if mean == "sigmoid" else nn.Identity()

    def forward(self, outputs: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(self.mean(outputs), self.scale, validate_args=False), IMAGE_DIMS, False)

    def metrics(self, p: td.Distribution, x: Tensor) -> dict[str, Tensor]:
        """`squared_error`: summed over the pixels of an image, with z drawn from the posterior."""
        return {"squared_error": (p.mean - x).square().sum(dim=(-3, -2, -1))}
