"""Posteriors q(z|x): from encoder outputs to a distribution over latents.

A posterior sets the number of encoder outputs. Its distribution makes z and log q(z|x) from standard normal noise. To
add one, write a subclass of `Posterior` and a YAML file in conf/model/posterior/.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.distributions as td
from torch import Tensor, nn

from vae_lightning.config import ConfigError, PositiveInt
from vae_lightning.models.estimators import kl_divergence

LOG_VARIANCE_BOUND = 15.0  # variances from 3e-7 to 3e6: wider than any posterior needs, and exp() stays finite


class PosteriorDistribution(td.Distribution, ABC):
    """q(z|x) of a batch of images: batch_shape `[batch]`, event_shape `[latent_dim]`.

    `mean`, `[batch, latent_dim]`, is the code of an image. `log_prob(z)` of z `[..., batch, latent_dim]` is
    `[..., batch]`, in nats; it may raise NotImplementedError if it has no closed form.
    """

    levels: tuple[int, ...] = ()  # their dimensions, if there are several

    @property
    def noise_dim(self) -> int:
        """The dimension of the noise from which one z is made."""
        return self.event_shape[-1]

    @abstractmethod
    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return z `[..., batch, latent_dim]` and log q(z|x) `[..., batch]` for ε ~ N(0, I) `[..., batch, noise_dim]`.

        Both are differentiable in the parameters: the reparameterization (Kingma & Welling 2014, section 2.4).
        """

    def transform(self, noise: Tensor) -> Tensor:
        """Return z without log q(z|x)."""
        return self.transform_and_log_prob(noise)[0]

    @abstractmethod
    def detach(self) -> PosteriorDistribution | None:
        """Return the distribution without gradients to its parameters; None if it has no `log_prob`."""

    def transform_and_path_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and log q(z|x) like `transform_and_log_prob`, but log q(z|x) has gradients through z alone.

        The gradient of a Monte-Carlo ELBO is then the path derivative (Roeder et al. 2017). It leaves out the score
        ∂ log q(z|x)/∂φ, with expectation zero, so that its variance vanishes where q(z|x) is exact. It is unbiased for
        a loss that is linear in log q(z|x). If `detach` returns None, the score is included.
        """
        detached = self.detach()
        if detached is None:
            return self.transform_and_log_prob(noise)
        z = self.transform(noise)
        return z, detached.log_prob(z)

    def transform_and_kl(self, noise: Tensor, p: td.Distribution, path: bool = True) -> tuple[Tensor, Tensor]:
        """Return z, and log q(z|x) − log p(z): an estimate of KL(q ‖ p) without a closed form, `[..., batch, 1]`.

        With `path`, its gradient is the path derivative. If q and p have several `levels`,
        it is the KL of each given those above it, `[..., batch, levels]`.
        """
        z, log_q = self.transform_and_path_log_prob(noise) if path else self.transform_and_log_prob(noise)
        return z, (log_q - p.log_prob(z)).unsqueeze(-1)

    def loss_terms(self) -> dict[str, Tensor]:
        """Return terms that training adds to the loss of each image, by name: `[batch]`, in nats."""
        return {}

    def mixture(self, temperature: float = 1.0) -> td.Distribution:
        """Return (1/N) Σ q(z|xₙ) over the batch. `temperature` scales the standard deviations.

        Raises ConfigError if not implemented.
        """
        raise ConfigError(f"model/prior=vamp: needs a posterior with `mixture`; {type(self).__name__} has none")


class Factors(td.Normal):
    """The factors N(meanⱼ, exp(log_varianceⱼ)) of a diagonal Gaussian."""

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        self.log_variance = log_variance
        super().__init__(mean, torch.exp(0.5 * log_variance), validate_args=False)


@td.register_kl(Factors, td.Normal)  # type: ignore[untyped-decorator]
def _kl_of_factors(q: Factors, p: td.Normal) -> Tensor:
    # Shifted and scaled so that p becomes N(0, 1), which changes no KL.
    return kl_divergence((q.mean - p.mean) / p.stddev, q.log_variance - 2 * p.stddev.log())


class DiagonalGaussian(PosteriorDistribution, td.Independent[Factors]):
    """N(mean, diag(exp(log_variance))), both `[batch, latent_dim]`."""

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        self.log_variance = log_variance
        super().__init__(Factors(mean, log_variance), reinterpreted_batch_ndims=1, validate_args=False)

    @property
    def stddev(self) -> Tensor:
        stddev: Tensor = self.base_dist.stddev  # td.Independent would compute the square root of the variance
        return stddev

    def transform(self, noise: Tensor) -> Tensor:
        """Return z = mean + σ ε."""
        return self.mean + self.stddev * noise

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.transform(noise)
        return z, self.log_prob(z)

    def detach(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean.detach(), self.log_variance.detach())

    def scaled(self, factor: float) -> DiagonalGaussian:
        """Return the distribution with `factor` times the standard deviations."""
        return DiagonalGaussian(self.mean, self.log_variance + 2 * math.log(factor))

    def mixture(self, temperature: float = 1.0) -> GaussianMixture:
        return GaussianMixture(self.scaled(temperature))


class FullGaussian(PosteriorDistribution, td.MultivariateNormal):
    """N(mean, L Lᵀ) with a lower triangular L, `scale_tril` `[batch, latent_dim, latent_dim]`."""

    def __init__(self, mean: Tensor, scale_tril: Tensor) -> None:
        super().__init__(mean, scale_tril=scale_tril, validate_args=False)

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = mean + L ε, and log q(z|x) = log N(ε; 0, I) − log |L|."""
        with torch.autocast(noise.device.type, enabled=False):  # a rounded z would not have this density
            z = self.mean + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        return z, -0.5 * (noise.square() + math.log(2 * math.pi)).sum(dim=-1) - log_scale

    def detach(self) -> FullGaussian:
        return FullGaussian(self.mean.detach(), self.scale_tril.detach())

    def mixture(self, temperature: float = 1.0) -> td.Distribution:
        uniform = td.Categorical(logits=torch.zeros(len(self.mean), device=self.mean.device), validate_args=False)
        components = FullGaussian(self.mean, temperature * self.scale_tril)
        return td.MixtureSameFamily(uniform, components, validate_args=False)


class GaussianMixture(td.MixtureSameFamily):
    """Σₖ πₖ N(z; μₖ, diag σₖ²), with π = softmax(logits), or 1/K without `logits` `[K]`.

    `log_prob` takes two matrix products and no tensor `[..., K, latent_dim]`.

    (z − μ)²/σ² is expanded to z²/σ² − 2zμ/σ² + μ²/σ². For small σ these terms are large and cancel, so they are summed
    in float64 (float32 on MPS, which has no float64).
    """

    def __init__(self, components: DiagonalGaussian, logits: Tensor | None = None) -> None:
        if logits is None:
            logits = torch.zeros(len(components.mean), device=components.mean.device)
        shares = td.Categorical(logits=logits, validate_args=False)  # validation would synchronize a GPU
        super().__init__(shares, components, validate_args=False)
        self.components = components

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density `[...]`, in nats, of latents `[..., latent_dim]`."""
        exact = torch.float32 if value.device.type == "mps" else torch.float64
        z, mean, log_variance = value.to(exact), self.components.mean.to(exact), self.components.log_variance.to(exact)
        precision = torch.exp(-log_variance)
        constant = (mean.square() * precision + log_variance + math.log(2 * math.pi)).sum(-1)  # [K]
        distance = z.square() @ precision.T - 2 * z @ (mean * precision).T + constant  # [..., K]
        log_shares = self.mixture_distribution.logits.to(exact)  # normalized by td.Categorical
        return torch.logsumexp(log_shares - 0.5 * distance, dim=-1).to(value.dtype)


class Posterior(nn.Module, ABC):
    """Maps encoder outputs `[batch, encoder_outputs]` to q(z|x) over `latent_dim` dimensions.

    `discrete` is True if q(z|x) is the probability of a discrete z. The prior must be of the same kind.
    """

    discrete = False

    def __init__(self, latent_dim: PositiveInt, encoder_outputs: PositiveInt) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder_outputs = encoder_outputs

    @abstractmethod
    def forward(self, outputs: Tensor) -> PosteriorDistribution:
        """Return q(z|x), in float32 at any training precision."""

    def summary(self, z: Tensor) -> dict[str, Tensor]:
        """Return metrics of the latents of many images, `[n, latent_dim]`: numbers by name."""
        return {}


class Gaussian(Posterior):
    """A diagonal Gaussian with a mean and a log variance per latent dimension (Kingma & Welling 2014, eq. 9)."""

    def __init__(self, latent_dim: PositiveInt) -> None:
        super().__init__(latent_dim, encoder_outputs=2 * latent_dim)

    def forward(self, outputs: Tensor) -> DiagonalGaussian:
        return diagonal_gaussian(outputs)


GaussianPosterior = Gaussian  # its name in the package, where the likelihood is GaussianLikelihood


class FullCovarianceGaussian(Posterior):
    """A Gaussian with covariance L Lᵀ: the encoder gives the mean and the Cholesky factor L."""

    def __init__(self, latent_dim: PositiveInt) -> None:
        super().__init__(latent_dim, encoder_outputs=2 * latent_dim + latent_dim * (latent_dim - 1) // 2)

    def forward(self, outputs: Tensor) -> FullGaussian:
        diagonal, below = outputs.float().tensor_split([2 * self.latent_dim], dim=-1)
        q = diagonal_gaussian(diagonal)
        # No buffer: averaged weights would average it, too.
        row, column = torch.tril_indices(self.latent_dim, self.latent_dim, -1, device=outputs.device)
        factor = torch.diag_embed(q.stddev)
        factor[..., row, column] = below
        return FullGaussian(q.mean, factor)


def diagonal_gaussian(outputs: Tensor) -> DiagonalGaussian:
    """Return the diagonal Gaussian with the mean and log variance in `outputs` `[batch, 2 · latent_dim]`.

    A scaled tanh bounds the log variance. Beyond a hard bound the gradient would be zero, and a dimension could not
    return.
    """
    mean, raw = outputs.float().chunk(2, dim=-1)
    return DiagonalGaussian(mean, LOG_VARIANCE_BOUND * torch.tanh(raw / LOG_VARIANCE_BOUND))
