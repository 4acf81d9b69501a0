"""Discrete codes: posteriors that choose one of K vectors at each position, and the uniform prior over these.

z `[..., latent_dim]` holds n vectors of D entries, flat in the order [D, n], which is that of feature maps with D
channels and n = height · width positions. q(z|x) is a point mass, so that the ELBO is log p(x|z) + log p(z): with the
uniform prior, log p(x|z) − n log K. It is a bound on log p(x) = log Σ p(z) p(x|z), a sum over all code maps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import torch.distributed as dist
import torch.distributions as td
from pydantic import Field
from torch import Tensor

from vae_lightning.config import ConfigError, NonNegative, PositiveInt
from vae_lightning.models.posteriors import Posterior, PosteriorDistribution
from vae_lightning.models.priors import Encode, Prior


class PointMass(PosteriorDistribution):
    """All mass at `mean` `[batch, latent_dim]`. Its log q(z|x) is the log probability of a discrete z: 0."""

    noise_dim = 0

    def __init__(self, mean: Tensor, loss_terms: dict[str, Tensor] | None = None) -> None:
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)
        self.z, self.terms = mean, loss_terms or {}

    @property
    def mean(self) -> Tensor:
        return self.z

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.z.expand(*noise.shape[:-1], -1)
        return z, z.new_zeros(z.shape[:-1])

    def detach(self) -> None:
        return None

    def loss_terms(self) -> dict[str, Tensor]:
        return self.terms


class Quantizer(Posterior):
    """The base of discrete posteriors: `code_dim` entries and `codes` possible vectors at each position.

    The gradient of z is passed to the encoder outputs as it is (straight-through, Bengio et al. 2013). Raises
    ConfigError if `code_dim`, which the argument `key` sets, does not divide `latent_dim`.
    """

    discrete = True

    def __init__(self, latent_dim: int, code_dim: int, codes: int, key: str) -> None:
        super().__init__(latent_dim, encoder_outputs=latent_dim)
        if latent_dim % code_dim:
            raise ConfigError(f"model.posterior.{key}: {code_dim} entries of a code do not divide {latent_dim=}")
        self.code_dim, self.codes, self.positions = code_dim, codes, latent_dim // code_dim

    def split(self, z: Tensor) -> Tensor:
        """Return the vector of each position, `[..., positions, code_dim]`, of z `[..., latent_dim]`."""
        return z.unflatten(-1, (self.code_dim, self.positions)).transpose(-2, -1)

    def join(self, vectors: Tensor) -> Tensor:
        """Return z `[..., latent_dim]`: the inverse of `split`."""
        return vectors.transpose(-2, -1).flatten(-2)

    @abstractmethod
    def numbers(self, z: Tensor) -> Tensor:
        """Return the number of the code at each position, from 0 to codes − 1: `[..., positions]`."""

    @abstractmethod
    def vectors(self, numbers: Tensor) -> Tensor:
        """Return z `[..., latent_dim]` of codes with `numbers` `[..., positions]`."""

    def summary(self, z: Tensor) -> dict[str, Tensor]:
        """Return the perplexity of the codes: exp of the entropy of their frequencies, from 1 to `codes`."""
        frequencies = self.numbers(z).flatten().bincount(minlength=self.codes).double()
        return {"perplexity": td.Categorical(probs=frequencies, validate_args=False).entropy().exp().float()}


class VectorQuantizer(Quantizer):
    """VQ-VAE (van den Oord et al. 2017): the nearest vector of a codebook.

    The codebook follows the encoder by exponential moving averages with `decay` (appendix A.1), and starts at outputs
    of the first batch. A code that is used less than `restart` times as often as the mean starts again at an output.
    `commitment` weights the squared distance between outputs and codes in the loss (eq. 3).
    """

    codebook: Tensor
    uses: Tensor
    sums: Tensor

    def __init__(
        self,
        latent_dim: PositiveInt,
        code_dim: PositiveInt = 16,
        codes: Annotated[int, Field(ge=2)] = 512,
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.99,
        commitment: NonNegative = 0.25,
        restart: Annotated[float, Field(ge=0, lt=1)] = 0.03,
    ) -> None:
        super().__init__(latent_dim, code_dim, codes, "code_dim")
        self.decay, self.commitment, self.restart = decay, commitment, restart
        self.register_buffer("codebook", torch.randn(codes, code_dim))
        self.register_buffer("uses", torch.zeros(codes))  # mean number per batch
        self.register_buffer("sums", torch.zeros(codes, code_dim))  # of the outputs nearest to each code

    def forward(self, outputs: Tensor) -> PointMass:
        found = self.split(outputs.float())
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self.restart_rare_codes(found.detach().flatten(0, 1))
        numbers = self.nearest(found.detach())
        chosen = self.codebook[numbers]
        if learns:
            self.follow(found.detach().flatten(0, 1), numbers.flatten())
        distance = (found - chosen).square().sum(dim=(-2, -1))
        return PointMass(self.join(found + (chosen - found).detach()), {"commitment": self.commitment * distance})

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the number of the code nearest to each of `vectors` `[..., code_dim]`."""
        with torch.autocast(vectors.device.type, enabled=False):  # ‖v − e‖² without ‖v‖²
            return (self.codebook.square().sum(dim=1) - 2 * vectors @ self.codebook.T).argmin(dim=-1)

    @torch.no_grad()
    def restart_rare_codes(self, found: Tensor) -> None:
        """Move rare codes to outputs `found` `[m, code_dim]`, drawn at random. At first, all codes are rare."""
        start = found[torch.randint(len(found), (self.codes,), device=found.device)]
        usual = torch.full_like(self.uses, len(found) / self.codes)
        if several_processes():
            dist.broadcast(start, 0)
            dist.broadcast(usual, 0)
        rare = self.uses <= self.restart * usual
        self.uses.copy_(torch.where(rare, usual, self.uses))
        self.codebook.copy_(torch.where(rare[:, None], start, self.codebook))
        self.sums.copy_(self.codebook * self.uses[:, None])

    @torch.no_grad()
    def follow(self, found: Tensor, numbers: Tensor) -> None:
        """Move each code to the moving average of outputs `found` `[m, code_dim]` that are nearest to it."""
        uses = torch.zeros_like(self.uses).index_add_(0, numbers, torch.ones_like(numbers, dtype=torch.float))
        sums = torch.zeros_like(self.sums).index_add_(0, numbers, found)
        if several_processes():
            for total in (uses, sums):
                dist.all_reduce(total)
                total /= dist.get_world_size()
        self.uses.lerp_(uses, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.sums / self.uses.clamp_min(1e-6)[:, None])

    def numbers(self, z: Tensor) -> Tensor:
        return self.nearest(self.split(z))

    def vectors(self, numbers: Tensor) -> Tensor:
        return self.join(self.codebook[numbers])


def several_processes() -> bool:
    """Return whether this is one of several processes that train a model together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class FiniteScalarQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2024): each entry of a code is one of a few numbers from −1 to 1.

    `levels` are their counts, and their product is the number of codes. There is no codebook to learn, and no term in
    the loss.
    """

    def __init__(
        self,
        latent_dim: PositiveInt,
        levels: Annotated[Sequence[Annotated[int, Field(ge=2)]], Field(min_length=1)] = (8, 8, 8),
    ) -> None:
        super().__init__(latent_dim, len(levels), math.prod(levels), "levels")
        self.levels = tuple(levels)

    def forward(self, outputs: Tensor) -> PointMass:
        found = self.split(outputs.float())
        steps = found.new_tensor(self.levels) - 1
        places = steps * torch.sigmoid(2 * found)  # from 0 to levels − 1; the sigmoid of 2h is (1 + tanh h)/2
        rounded = places + (places.round() - places).detach()
        return PointMass(self.join(2 * rounded / steps - 1))

    def numbers(self, z: Tensor) -> Tensor:
        places = ((self.split(z) + 1) / 2 * (z.new_tensor(self.levels) - 1)).round().long()
        return (places * self.strides(places)).sum(dim=-1)

    def vectors(self, numbers: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=numbers.device)
        places = numbers.unsqueeze(-1) // self.strides(numbers) % levels
        return self.join(2 * places / (levels - 1) - 1)

    def strides(self, like: Tensor) -> Tensor:
        """Return the products of the levels before each entry: `[code_dim]`."""
        return torch.tensor([math.prod(self.levels[:i]) for i in range(self.code_dim)], device=like.device)


class UniformOverCodes(td.Distribution):
    """Each of K codes with probability 1/K at each of n positions. `log_prob` takes z that consist of codes.

    `vectors` maps numbers of codes `[..., n]` to z `[..., latent_dim]`.
    """

    def __init__(self, latent_dim: int, shares: Tensor, positions: int, vectors: Callable[[Tensor], Tensor]) -> None:
        super().__init__(event_shape=torch.Size([latent_dim]), validate_args=False)
        self.shares, self.positions, self.vectors = shares, positions, vectors

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_full(value.shape[:-1], -self.positions * math.log(len(self.shares)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, self.positions)
        return self.vectors(torch.randint(len(self.shares), shape, device=self.shares.device))


class UniformCodes(Prior):
    """p(z) = K⁻ⁿ for the n codes of a discrete posterior. `temperature` changes nothing.

    Raises ConfigError for a posterior that is not a Quantizer.
    """

    discrete = True
    shares: Tensor

    def __init__(self, latent_dim: PositiveInt, image_shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def connect(self, posterior: Posterior, posterior_given: Encode) -> None:
        if not isinstance(posterior, Quantizer):
            raise ConfigError(f"model/prior=codes: {type(posterior).__name__} has no codes to number; use vq or fsq")
        self.positions, self.vectors = posterior.positions, posterior.vectors
        self.register_buffer("shares", torch.full((posterior.codes,), 1 / posterior.codes), persistent=False)

    def forward(self, temperature: float = 1.0) -> UniformOverCodes:
        return UniformOverCodes(self.latent_dim, self.shares, self.positions, self.vectors)
