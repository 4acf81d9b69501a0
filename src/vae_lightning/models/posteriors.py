"""q(z|x): from an encoder's outputs to a distribution over latents.

A posterior says how many outputs it wants of the encoder, and turns them into a distribution that makes z from standard
normal noise, together with log q(z|x). To add one, write a `Posterior`, and a YAML file in conf/model/posterior/.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.distributions as td
from torch import Tensor, nn

from vae_lightning.config import ConfigError, PositiveInt

LOG_VARIANCE_BOUND = 15.0  # variances between 3e-7 and 3e6: wider than any posterior needs, and exp() stays finite


class PosteriorDistribution(td.Distribution, ABC):
    """q(z|x) of a batch of images: batch_shape `[batch]`, event_shape `[latent_dim]`.

    `mean` `[batch, latent_dim]` is the code that stands for an image. `log_prob(z)` of z `[..., batch, latent_dim]` is
    `[..., batch]`, in nats; where it has no closed form it may raise NotImplementedError.
    """

    @property
    def noise_dim(self) -> int:
        """Dimensions of the noise that one z is made from."""
        return self.event_shape[-1]

    @abstractmethod
    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """z `[..., batch, latent_dim]` and log q(z|x) `[..., batch]` from noise ε ~ N(0, I) `[..., batch, noise_dim]`.

        Differentiable in the parameters: the reparameterization (Kingma & Welling 2014, section 2.4).
        """

    def transform(self, noise: Tensor) -> Tensor:
        """z alone, where log q(z|x) is not needed."""
        return self.transform_and_log_prob(noise)[0]

    def detach(self) -> PosteriorDistribution:
        """The same distribution, with no gradient to its parameters. Raises ConfigError where there is none."""
        raise ConfigError(f"model.objective: DReG needs a posterior with `detach`, and {type(self).__name__} has none")

    def mixture(self, temperature: float = 1.0) -> td.Distribution:
        """(1/N) Σ q(z|xₙ) over the batch, with standard deviations scaled by `temperature`."""
        raise NotImplementedError


class DiagonalGaussian(PosteriorDistribution, td.Independent[td.Normal]):
    """N(mean, diag(exp(log_variance))), both `[batch, latent_dim]`."""

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        self.log_variance = log_variance
        normal = td.Normal(mean, torch.exp(0.5 * log_variance), validate_args=False)
        super().__init__(normal, reinterpreted_batch_ndims=1, validate_args=False)

    @property
    def stddev(self) -> Tensor:
        stddev: Tensor = self.base_dist.stddev  # td.Independent would take the root of its square
        return stddev

    def transform(self, noise: Tensor) -> Tensor:
        """z = mean + σ ε."""
        return self.mean + self.stddev * noise

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.transform(noise)
        return z, self.log_prob(z)

    def detach(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean.detach(), self.log_variance.detach())

    def mixture(self, temperature: float = 1.0) -> GaussianMixture:
        if temperature == 1:
            return GaussianMixture(self)
        return GaussianMixture(DiagonalGaussian(self.mean, self.log_variance + 2 * math.log(temperature)))


class GaussianMixture(td.MixtureSameFamily):
    """(1/K) Σₖ N(z; μₖ, diag σₖ²), whose `log_prob` costs two matrix products, not a tensor `[..., K, latent_dim]`.

    (z − μ)²/σ² is expanded to z²/σ² − 2zμ/σ² + μ²/σ². Where σ is small those terms are large and cancel, so they are
    summed in float64 (float32 on Apple's GPUs, which have no other).
    """

    def __init__(self, components: DiagonalGaussian) -> None:
        logits = torch.zeros(len(components.mean), device=components.mean.device)
        even = td.Categorical(logits=logits, validate_args=False)  # a GPU would be waited for to look at them
        super().__init__(even, components, validate_args=False)
        self.components = components

    def log_prob(self, value: Tensor) -> Tensor:
        """`[...]` of latents `[..., latent_dim]`, in nats."""
        exact = torch.float32 if value.device.type == "mps" else torch.float64
        z, mean, log_variance = value.to(exact), self.components.mean.to(exact), self.components.log_variance.to(exact)
        precision = torch.exp(-log_variance)
        constant = (mean.square() * precision + log_variance + math.log(2 * math.pi)).sum(-1)  # [K]
        distance = z.square() @ precision.T - 2 * z @ (mean * precision).T + constant  # [..., K]
        return (torch.logsumexp(-0.5 * distance, dim=-1) - math.log(len(mean))).to(value.dtype)


class Posterior(nn.Module, ABC):
    """From encoder outputs `[batch, encoder_outputs]` to q(z|x) over `latent_dim` dimensions."""

    def __init__(self, latent_dim: PositiveInt, encoder_outputs: PositiveInt) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder_outputs = encoder_outputs

    @abstractmethod
    def forward(self, outputs: Tensor) -> PosteriorDistribution:
        """q(z|x), in float32 whatever the training precision."""


class Gaussian(Posterior):
    """A diagonal Gaussian: a mean and a log variance for each latent dimension (Kingma & Welling 2014, eq. 9)."""

    def __init__(self, latent_dim: PositiveInt) -> None:
        super().__init__(latent_dim, encoder_outputs=2 * latent_dim)

    def forward(self, outputs: Tensor) -> DiagonalGaussian:
        # The log variance is bounded smoothly, by a scaled tanh. Outside a hard bound its gradient would be zero, and a
        # dimension that strayed there could never come back.
        mean, raw = outputs.float().chunk(2, dim=-1)
        return DiagonalGaussian(mean, LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND))
