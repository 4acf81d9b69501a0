"""Priors p(z) over latents.

A prior is a module. Its `forward` returns a `torch.distributions` object: `log_prob(z)` of z `[..., latent_dim]` is
`[...]`, in nats. To add one, write a subclass of `Prior` and a YAML file in conf/model/prior/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor, nn

from vae_lightning.config import PositiveInt
from vae_lightning.models.posteriors import DiagonalGaussian, GaussianMixture, Posterior, PosteriorDistribution

Encode = Callable[[Tensor], PosteriorDistribution]  # images `[batch, *image_shape]` → q(z|x)


class Prior(nn.Module, ABC):
    """The base class. `encodes_images` is True for a mixture of posteriors, which a conditional model cannot use.

    `discrete` is True if p(z) is the probability of a discrete z. The posterior must be of the same kind.
    """

    encodes_images = False
    discrete = False

    @abstractmethod
    def forward(self, temperature: float = 1.0) -> td.Distribution:
        """Return p(z). `temperature` scales the standard deviations of samples; 1 gives the prior."""

    def connect(self, posterior: Posterior, posterior_given: Encode) -> None:
        """Keep what the prior needs of the model, which calls it when it is built: posterior, or q(z|x) of images."""

    def initialize(self, images: Tensor) -> None:
        """Initialize before training, from the training images `[n, channels, height, width]`, uint8 on the CPU."""


class StandardNormal(Prior):
    """N(0, I) over `latent_dim` dimensions (Kingma & Welling 2014)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: PositiveInt, image_shape: Sequence[int] = ()) -> None:
        super().__init__()
        # Not saved in checkpoints: latent_dim determines them.
        self.register_buffer("mean", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, temperature: float = 1.0) -> td.Distribution:
        scale = temperature * self.scale
        return td.Independent(td.Normal(self.mean, scale, validate_args=False), 1, validate_args=False)


class VampPrior(Prior):
    """The mixture of posteriors (1/K) Σₖ q(z|uₖ) at K learnt pseudo-inputs uₖ (Tomczak & Welling 2018, eq. 9).

    `start` initializes the pseudo-inputs: `images` at K random training images, `mean` at the mean image plus noise.
    They are clamped to [0, 1], with the gradient of the identity (straight-through, Bengio et al. 2013): a clamp has no
    gradient outside, so that black pixels, which start at the bound, would stay black.
    """

    encodes_images = True

    def __init__(
        self,
        latent_dim: PositiveInt,
        image_shape: Sequence[int] = (1, 28, 28),
        pseudo_inputs: PositiveInt = 500,
        start: Literal["images", "mean"] = "images",
    ) -> None:
        super().__init__()
        self.start = start
        self.pseudo_inputs = nn.Parameter(torch.rand(pseudo_inputs, *image_shape))

    def connect(self, posterior: Posterior, posterior_given: Encode) -> None:
        self.posterior_given = posterior_given

    def initialize(self, images: Tensor) -> None:
        k = len(self.pseudo_inputs)
        if self.start == "images":
            chosen = images[torch.randint(len(images), (k,))].float() / 255
        else:
            mean = images.float().mean(dim=0, keepdim=True) / 255
            chosen = mean + 0.01 * torch.randn(k, *mean.shape[1:])
        self.pseudo_inputs.data.copy_(chosen)

    def forward(self, temperature: float = 1.0) -> td.Distribution:
        u = self.pseudo_inputs
        bounded = u.clamp(0, 1).detach() + (u - u.detach())
        return self.posterior_given(bounded).mixture(temperature)


class MixturePrior(Prior):
    """A learnt mixture of `components` diagonal Gaussians. The first means are from N(0, I), the first variances 1."""

    def __init__(self, latent_dim: PositiveInt, image_shape: Sequence[int] = (), components: PositiveInt = 100) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(components, latent_dim))
        self.log_variances = nn.Parameter(torch.zeros(components, latent_dim))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self, temperature: float = 1.0) -> td.Distribution:
        return GaussianMixture(DiagonalGaussian(self.means, self.log_variances).scaled(temperature), self.logits)
