"""What is minimised: pure functions on tensors, and the objectives that are made of them.

An objective is called with the model and a batch, and returns per-image terms `[batch]` in nats: `loss`, which is
minimised, and `elbo`, always the lower bound on log p(x) with β = 1. The default one is `VAE.elbo` in vae.py. To add
one, write a class with a `__call__`, and a YAML file in conf/model/objective/ that names it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, Protocol

import torch
from torch import Tensor

from vae_lightning.config import ConfigError, NonNegative, PositiveInt
from vae_lightning.models.posteriors import PosteriorDistribution


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_variance))) ‖ N(0, I)) of each latent dimension, in nats: `[..., latent_dim]`.

    Kingma & Welling 2014, appendix B; sum over the last dimension for the KL of an image.
    """
    return 0.5 * (mean.square() + (log_variance.expm1() - log_variance))  # expm1: never below 0, however near


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """log (1/k) Σᵢ wᵢ from log weights `[k, batch]`: the IWAE bound on log p(x), `[batch]`, in nats.

    k = 1 is the Monte-Carlo ELBO, and it rises towards log p(x) with k (Burda et al. 2016, eq. 8).
    """
    return log_weights.logsumexp(dim=0) - math.log(log_weights.shape[0])


def with_free_bits(kl: Tensor, floor: float) -> Tensor:
    """The KL of which `floor` nats a dimension are free: `[batch]` from `[batch, latent_dim]`.

    A dimension whose mean over the batch lies below the floor counts as the floor, and gets no gradient (Kingma et al.
    2016, eq. 15).
    """
    return torch.where(kl.mean(dim=0) > floor, kl, floor).sum(dim=-1)


def active_units(means: Tensor) -> Tensor:
    """How many latent dimensions have Var_x(E_q[z]) > 0.01, from posterior means `[images, latent_dim]`: a count.

    Burda et al. 2016, section 5.2.
    """
    return (means.var(dim=0) > 0.01).sum()


class LatentVariableModel(Protocol):
    """What an objective may ask of a model: a VAE, whose methods these are."""

    beta: float
    training: bool

    @property
    def has_analytic_kl(self) -> bool: ...
    def encode(self, x: Tensor, labels: Tensor | None = None) -> PosteriorDistribution: ...
    def reparameterize(self, q: PosteriorDistribution, samples: int | None = None) -> Tensor: ...
    def elbo(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        epoch: float = math.inf,
        warmup_epochs: float = 0.0,
        free_bits: float = 0.0,
    ) -> dict[str, Tensor]: ...
    def noise_for(self, q: PosteriorDistribution, samples: int | None = None) -> Tensor: ...
    def sampled_terms(self, x: Tensor, z: Tensor, log_q: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]: ...


class Objective(ABC):
    """What training minimises. `epoch` is how far training is, in epochs and fractions of one."""

    def check(self, vae: LatentVariableModel) -> None:  # noqa: B027 (most are defined for all)
        """Raise ConfigError for a model that this objective is not defined for."""

    @abstractmethod
    def __call__(
        self, vae: LatentVariableModel, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf
    ) -> dict[str, Tensor]:
        """The terms of each image."""


class ELBO(Objective):
    """−ELBO, with the KL weighted by β: reconstruction + β · KL (Kingma & Welling 2014, eq. 3; Higgins et al. 2017).

    `kl="analytic"` takes the closed form of KL(q ‖ p) where there is one, `"monte_carlo"` the sampled
    log q(z|x) − log p(z). The KL's weight rises linearly from 0 over the first `warmup_epochs` (Bowman et al. 2016;
    Sønderby et al. 2016), and `free_bits` nats of each latent dimension's KL cost nothing. `VAE.elbo` computes it.
    """

    def __init__(
        self,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        warmup_epochs: NonNegative = 0.0,
        free_bits: NonNegative = 0.0,
    ) -> None:
        self.kl = kl
        self.warmup_epochs = warmup_epochs
        self.free_bits = free_bits

    def check(self, vae: LatentVariableModel) -> None:
        if self.free_bits and not (self.kl == "analytic" and vae.has_analytic_kl):
            raise ConfigError(
                f"model.objective.free_bits={self.free_bits}: needs the KL of each dimension, which only "
                "model.objective.kl=analytic with model/prior=normal and model/posterior=gaussian has"
            )

    def __call__(
        self, vae: LatentVariableModel, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf
    ) -> dict[str, Tensor]:
        return vae.elbo(x, labels, self.kl, epoch, self.warmup_epochs, self.free_bits)


class IWAE(Objective):
    """−log (1/k) Σᵢ wᵢ with k samples z ~ q(z|x) (Burda et al. 2016). k = 1 is the Monte-Carlo ELBO."""

    def __init__(self, samples: PositiveInt = 5) -> None:
        self.samples = samples

    def check(self, vae: LatentVariableModel) -> None:
        if vae.beta != 1:
            raise ConfigError(f"model.beta={vae.beta}: an importance-weighted bound has no KL to weight; allowed: 1")

    def __call__(
        self, vae: LatentVariableModel, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf
    ) -> dict[str, Tensor]:
        q = vae.encode(x, labels)
        z, log_q = q.transform_and_log_prob(vae.noise_for(q, self.samples))
        terms = vae.sampled_terms(x, z, log_q, labels)
        return {"loss": -importance_weighted_bound(terms.pop("log_weights"))} | terms


class DReG(IWAE):
    """The IWAE bound, with doubly reparameterized gradients for the encoder (Tucker et al. 2019, eq. 8).

    With w̃ᵢ = wᵢ / Σⱼ wⱼ, the decoder's gradient is Σ w̃ᵢ ∇ log wᵢ as in IWAE, and the encoder's Σ w̃ᵢ² (∂ log wᵢ/∂zᵢ)
    ∂zᵢ/∂φ: the same in expectation, without the score term whose noise grows with k.
    """

    def __call__(
        self, vae: LatentVariableModel, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf
    ) -> dict[str, Tensor]:
        q = vae.encode(x, labels)
        z = vae.reparameterize(q, self.samples)
        terms = vae.sampled_terms(x, z, q.detach().log_prob(z), labels)  # φ acts through z alone
        log_weights = terms.pop("log_weights")
        normalized = log_weights.detach().softmax(dim=0)  # w̃, [k, batch]
        if z.requires_grad:
            z.register_hook(lambda gradient: normalized.unsqueeze(-1) * gradient)  # the second factor w̃, for φ only
        bound = importance_weighted_bound(log_weights.detach())
        surrogate = (normalized * log_weights).sum(dim=0)  # has the gradient; the bound has the value
        return {"loss": -(bound + surrogate - surrogate.detach())} | terms
