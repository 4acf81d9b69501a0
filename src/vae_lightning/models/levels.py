"""Several levels of latents (Rezende et al. 2014; with two levels, Tomczak & Welling 2018, section 3).

    p(z) = p(z_L) Π p(z_l | z_{l+1}, …, z_L)            the prior: any at the top, Gaussians below
    q(z|x) = q(z_L | x) Π q(z_l | x, z_{l+1}, …, z_L)   the posterior: Gaussians

z is (z₁, …, z_L), and the decoder gets all of it. So whatever takes a z works with one level and with several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import torch.distributions as td
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from vae_lightning.config import ConfigError, NonNegativeInt, Part, PositiveInt, build
from vae_lightning.models.backbones import Widths, linear_layers
from vae_lightning.models.estimators import closed_form_kl
from vae_lightning.models.posteriors import DiagonalGaussian, Posterior, PosteriorDistribution, diagonal_gaussian
from vae_lightning.models.priors import Encode, Prior, StandardNormal

Levels = Annotated[Sequence[PositiveInt], Field(min_length=2, max_length=20)]  # dimensions of z₁, …, z_L
Network = Callable[[Tensor], Tensor]  # levels above `[..., dim]` → mean and log variance of a level `[..., 2 · dim]`


class LevelsDistribution(td.Distribution):
    """The distribution of z = (z₁, …, z_L): `top` for z_L, then a Gaussian for each level, given all above it.

    `networks[l]` maps (z_{l+1}, …, z_L) to the Gaussian's parameters. `temperature` scales its standard deviation.
    """

    def __init__(
        self, top: td.Distribution, networks: Sequence[Network], levels: Sequence[int], temperature: float = 1.0
    ) -> None:
        super().__init__(top.batch_shape, torch.Size([sum(levels)]), validate_args=False)
        self.top, self.networks, self.levels, self.temperature = top, networks, tuple(levels), temperature

    def given(self, level: int, above: Tensor) -> DiagonalGaussian:
        """Return the distribution of a level, counted from 0, given those above it `[..., dim]`."""
        return diagonal_gaussian(self.networks[level](above)).scaled(self.temperature)

    def split(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split z into (z_l, those above it) for each level."""
        ends = [sum(self.levels[: level + 1]) for level in range(len(self.levels))]
        return [(z[..., end - dim : end], z[..., end:]) for dim, end in zip(self.levels, ends, strict=True)]

    def log_prob(self, value: Tensor) -> Tensor:
        *below, (top, _) = self.split(value)
        return self.top.log_prob(top) + sum(
            self.given(level, above).log_prob(z) for level, (z, above) in enumerate(below)
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        z = self.top.sample(torch.Size(sample_shape))
        for level in reversed(range(len(self.networks))):
            z = torch.cat([self.given(level, z).sample(), z], dim=-1)
        return z


class LevelsPosteriorDistribution(LevelsDistribution, PosteriorDistribution):
    """q(z|x), all of Gaussians. The code of an image has the mean of each level, given the means of those above it."""

    top: DiagonalGaussian
    networks: Sequence[WithContext | Constant]
    levels: tuple[int, ...]

    @property
    def mean(self) -> Tensor:
        return self.transform(self.top.mean.new_zeros(self.batch_shape + self.event_shape))

    def transform(self, noise: Tensor) -> Tensor:
        *below, (top, _) = self.split(noise)
        z = self.top.transform(top)
        for level, (part, _) in reversed(list(enumerate(below))):
            z = torch.cat([self.given(level, z).transform(part), z], dim=-1)
        return z

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.transform(noise)
        return z, self.log_prob(z)

    def transform_and_kl(self, noise: Tensor, p: td.Distribution, path: bool = True) -> tuple[Tensor, Tensor]:
        """Return z, and the KL of each level given those above it: `[..., batch, levels]`.

        It is the closed form, except for a top of p without one: there it is log q − log p at the sample. With a p that
        has not the same levels, it is that of all levels together, `[..., batch, 1]`.
        """
        if not isinstance(p, LevelsDistribution) or p.levels != self.levels:
            return super().transform_and_kl(noise, p, path)
        z = self.transform(noise)
        *below, (top, _) = self.split(z)
        kl = [td.kl_divergence(self.given(n, above), p.given(n, above)) for n, (_, above) in enumerate(below)]
        closed = closed_form_kl(self.top, p.top)
        if closed is not None:
            kl.append(closed.sum(dim=-1).expand(z.shape[:-1]))
        else:
            q = self.top.detach() if path else self.top
            kl.append(q.log_prob(top) - p.top.log_prob(top))
        return z, torch.stack(kl, dim=-1)

    def detach(self) -> LevelsPosteriorDistribution:
        networks = [network.detach() for network in self.networks]
        return LevelsPosteriorDistribution(self.top.detach(), networks, self.levels)


class WithContext:
    """A network whose inputs are `context` `[batch, …]` and the levels above."""

    def __init__(self, network: Network, context: Tensor) -> None:
        self.network, self.context = network, context

    def __call__(self, above: Tensor) -> Tensor:
        return self.network(torch.cat([self.context.expand(*above.shape[:-1], -1), above], dim=-1))

    def detach(self) -> WithContext:
        """Return the same without gradients to parameters and context."""
        assert isinstance(self.network, nn.Module)
        module, frozen = self.network, {name: p.detach() for name, p in self.network.named_parameters()}
        return WithContext(lambda inputs: functional_call(module, frozen, inputs), self.context.detach())


class Constant:
    """A network whose outputs `[batch, …]` do not depend on the levels above."""

    def __init__(self, outputs: Tensor) -> None:
        self.outputs = outputs

    def __call__(self, above: Tensor) -> Tensor:
        return self.outputs.expand(*above.shape[:-1], -1)

    def detach(self) -> Constant:
        return Constant(self.outputs.detach())


class LevelsPrior(Prior):
    """p(z) of the levels z₁, …, z_L, whose dimensions are `levels`; `top` is the prior of the last.

    `hidden` are the widths of the networks between them, `gated` or with ReLU. Raises ConfigError if `levels` do not
    sum to `latent_dim`.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        image_shape: Sequence[int] = (1, 28, 28),
        levels: Levels = (10, 10),
        top: Part = StandardNormal,
        hidden: Widths = (300,),
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.top = build(top, Prior, "model.prior.top", latent_dim=levels[-1], image_shape=image_shape)
        self.networks = networks("model.prior", levels, latent_dim, 0, hidden, gated)
        self.encodes_images = self.top.encodes_images

    def initialize(self, images: Tensor) -> None:
        self.top.initialize(images)

    def connect(self, posterior: Posterior, posterior_given: Encode) -> None:
        self.posterior_given = posterior_given
        self.top.connect(posterior, self.top_given)

    def top_given(self, x: Tensor) -> PosteriorDistribution:
        """Return q(z_L|x), of which a VampPrior at the top is a mixture."""
        q = self.posterior_given(x)
        assert isinstance(q, LevelsPosteriorDistribution)
        return q.top

    def forward(self, temperature: float = 1.0) -> LevelsDistribution:
        return LevelsDistribution(self.top(temperature), list(self.networks), self.levels, temperature)


class LevelsPosterior(Posterior):
    """q(z|x) of the levels z₁, …, z_L. The encoder gives q(z_L|x), and `context` features for the levels below.

    `hidden` are the widths of the network of each of these, `gated` or with ReLU. With a `context` of 0 there are no
    such networks: the encoder gives q(z_l|x) of each level. Raises ConfigError if `levels` do not sum to `latent_dim`.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        levels: Levels = (10, 10),
        context: NonNegativeInt = 300,
        hidden: Widths = (300,),
        gated: bool = True,
    ) -> None:
        super().__init__(latent_dim, encoder_outputs=2 * levels[-1] + context if context else 2 * latent_dim)
        self.levels = tuple(levels)
        if context:
            self.networks = networks("model.posterior", levels, latent_dim, context, hidden, gated)
        else:
            check_sum("model.posterior", levels, latent_dim)
            self.networks = nn.ModuleList()

    def forward(self, outputs: Tensor) -> LevelsPosteriorDistribution:
        if not self.networks:
            halves = (half.split(self.levels, dim=-1) for half in outputs.float().chunk(2, dim=-1))
            *constants, last = (torch.cat(parts, dim=-1) for parts in zip(*halves, strict=True))
            return LevelsPosteriorDistribution(diagonal_gaussian(last), [*map(Constant, constants)], self.levels)
        top, context = outputs.float().tensor_split([2 * self.levels[-1]], dim=-1)
        below = [WithContext(network, context) for network in self.networks]
        return LevelsPosteriorDistribution(diagonal_gaussian(top), below, self.levels)


def networks(
    key: str, levels: Sequence[int], latent_dim: int, context: int, hidden: Sequence[int], gated: bool
) -> nn.ModuleList:
    """Return the network of each level but the top: from `context` inputs and the levels above to 2 · dim outputs."""
    check_sum(key, levels, latent_dim)
    ins = [context + sum(levels[level + 1 :]) for level in range(len(levels) - 1)]
    return nn.ModuleList(
        nn.Sequential(*linear_layers([n, *hidden, 2 * dim], "relu", gated)) for n, dim in zip(ins, levels, strict=False)
    )


def check_sum(key: str, levels: Sequence[int], latent_dim: int) -> None:
    if sum(levels) != latent_dim:
        raise ConfigError(f"{key}.levels={list(levels)}: should sum to model.latent_dim={latent_dim}")
