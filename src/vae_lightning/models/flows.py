"""Normalizing flows as prior and posterior: coupling layers (Dinh et al. 2017), on zuko's univariate transformations.

A coupling layer leaves one half of the dimensions as it is, and transforms each dimension of the other half by a
monotonic function whose parameters a network computes from the first half. So both directions are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.distributions as td
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

from vae_lightning.config import ConfigError, PositiveInt
from vae_lightning.models.backbones import linear_layers
from vae_lightning.models.posteriors import DiagonalGaussian, Posterior, PosteriorDistribution, diagonal_gaussian
from vae_lightning.models.priors import Prior

# When it is imported, zuko switches off the validation of all torch.distributions. This is PyTorch's default again.
td.Distribution.set_default_validate_args(__debug__)

Kind = Literal["affine", "spline"]
Hidden = Annotated[Sequence[PositiveInt], Field(min_length=1, max_length=100)]  # one entry per layer
Transform = Callable[..., tuple[Tensor, Tensor]]  # (x, context, inverse) → y, log |det dy/dx|
BINS = 8  # of a spline (Durkan et al. 2019)
MEAN_SAMPLES = 64


class Coupling(nn.Module):
    """Transform one half of `dim` dimensions, given the other half and a context of `context` dimensions.

    `affine`: y = x · exp(s) + t. `spline`: a monotonic rational-quadratic spline on [−5, 5] (Durkan et al. 2019). The
    last weights start at zero, so the layer is the identity at first.
    """

    def __init__(self, dim: int, context: int, hidden: Sequence[int], kind: Kind, flipped: bool) -> None:
        super().__init__()
        self.halves = [dim // 2, dim - dim // 2]
        self.flipped = flipped
        self.kind = kind
        self.sizes = [1, 1] if kind == "affine" else [BINS, BINS, BINS - 1]  # parameters of a dimension
        fixed, moved = reversed(self.halves) if flipped else self.halves
        self.network = nn.Sequential(*linear_layers([fixed + context, *hidden, moved * sum(self.sizes)], "relu"))
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return y, of the shape of x `[..., dim]`, and log |det dy/dx| `[...]`; `context` is `[..., context]`."""
        first, second = x.split(self.halves, dim=-1)
        fixed, moved = (second, first) if self.flipped else (first, second)
        given = fixed if context is None else torch.cat([fixed, context.expand(*fixed.shape[:-1], -1)], dim=-1)
        parameters = self.network(given).float().unflatten(-1, (-1, sum(self.sizes))).split(self.sizes, dim=-1)
        if self.kind == "affine":
            transform = MonotonicAffineTransform(*(p.squeeze(-1) for p in parameters))
        else:
            transform = MonotonicRQSTransform(*parameters)
        moved, log_scale = (transform.inv if inverse else transform).call_and_ladj(moved)
        halves = [moved, fixed] if self.flipped else [fixed, moved]
        return torch.cat(halves, dim=-1), log_scale.sum(dim=-1)


class Flow(nn.ModuleList):
    """Coupling layers in a row, which transform the two halves alternately. Raises ConfigError for one dimension."""

    def __init__(self, latent_dim: int, context: int, layers: int, hidden: Sequence[int], kind: Kind, key: str) -> None:
        if latent_dim == 1:
            raise ConfigError(f"{key}=flow: a coupling layer needs model.latent_dim of at least 2, given 1")
        super().__init__(Coupling(latent_dim, context, hidden, kind, flipped=n % 2 == 1) for n in range(layers))

    def forward(self, x: Tensor, context: Tensor | None = None, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return y, of the shape of x `[..., dim]`, and log |det dy/dx| `[...]`; `context` is `[..., context]`."""
        total = x.new_zeros(x.shape[:-1])
        for layer in reversed(self) if inverse else self:
            x, log_scale = layer(x, context, inverse)
            total = total + log_scale
        return x, total


class FlowDistribution(PosteriorDistribution):
    """The distribution of z = f(z₀) with z₀ ~ `base`: log q(z) = log q₀(z₀) − log |det df/dz₀|.

    `transform` is f, `context` `[*batch_shape, …]` its context, and `noise` `[n, latent_dim]` the noise for `mean`.
    """

    has_rsample = True

    def __init__(
        self, base: DiagonalGaussian, transform: Transform, context: Tensor | None = None, noise: Tensor | None = None
    ) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.flow, self.context, self.noise = base, transform, context, noise

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        start, log_start = self.base.transform_and_log_prob(noise)
        z, log_scale = self.flow(start, self.context)
        return z, log_start - log_scale

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return self.transform(torch.randn(shape, device=self.base.mean.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density `[..., batch]`, in nats, of z `[..., batch, latent_dim]`."""
        start, log_scale = self.flow(value, self.context, inverse=True)
        return self.base.log_prob(start) + log_scale

    @property
    def mean(self) -> Tensor:
        """The mean of samples from fixed noise, `[batch, latent_dim]`. Raises NotImplementedError without noise."""
        if self.noise is None:
            raise NotImplementedError
        noise = self.noise.reshape(len(self.noise), *(1 for _ in self.batch_shape), -1)
        return self.transform(noise.expand(-1, *self.batch_shape, -1)).mean(dim=0)

    def detach(self) -> FlowDistribution:
        assert isinstance(self.flow, nn.Module)
        module, frozen = self.flow, {name: p.detach() for name, p in self.flow.named_parameters()}
        context = None if self.context is None else self.context.detach()

        def flow(*arguments: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
            return functional_call(module, frozen, arguments, options)

        return FlowDistribution(self.base.detach(), flow, context, self.noise)


class FlowPrior(Prior):
    """N(0, I), transformed by `layers` coupling layers (RealNVP, Dinh et al. 2017).

    `hidden` are the widths of each layer's network, and `kind` is its transformation. Raises ConfigError for one
    latent dimension.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        image_shape: Sequence[int] = (),
        layers: PositiveInt = 4,
        hidden: Hidden = (128, 128),
        kind: Kind = "affine",
    ) -> None:
        super().__init__()
        self.flow = Flow(latent_dim, 0, layers, hidden, kind, "model/prior")
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    def forward(self, temperature: float = 1.0) -> FlowDistribution:
        assert isinstance(self.zeros, Tensor)
        return FlowDistribution(DiagonalGaussian(self.zeros, self.zeros).scaled(temperature), self.flow)


class FlowPosterior(Posterior):
    """A diagonal Gaussian, transformed by `layers` coupling layers that see `context` more outputs of the encoder.

    A conditional flow (Rezende & Mohamed 2015). The code of an image, the posterior mean, is that of 64 samples with
    fixed noise. Raises ConfigError for one latent dimension.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        layers: PositiveInt = 2,
        hidden: Hidden = (128, 128),
        kind: Kind = "affine",
        context: PositiveInt = 64,
    ) -> None:
        super().__init__(latent_dim, encoder_outputs=2 * latent_dim + context)
        self.flow = Flow(latent_dim, context, layers, hidden, kind, "model/posterior")
        half = torch.randn(MEAN_SAMPLES // 2, latent_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", torch.cat([half, -half]), persistent=False)

    def forward(self, outputs: Tensor) -> FlowDistribution:
        assert isinstance(self.noise, Tensor)
        gaussian, context = outputs.float().tensor_split([2 * self.latent_dim], dim=-1)
        return FlowDistribution(diagonal_gaussian(gaussian), self.flow, context, self.noise)
