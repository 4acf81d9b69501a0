"""Objectives: the loss that training minimises, computed from a VAE and a batch.

The default one, ELBO, is in vae.py. To add an objective, write a class with a `__call__` and a YAML file in
conf/model/objective/.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae_lightning.config import ConfigError, PositiveInt
from vae_lightning.models.estimators import importance_weighted_bound
from vae_lightning.models.vae import ELBO, VAE, Objective  # noqa: F401 (configurations name it as one of this module)


class IWAE(Objective):
    """The negative IWAE bound, −log (1/k) Σᵢ wᵢ with k samples z ~ q(z|x) (Burda et al. 2016).

    k = 1 is the Monte-Carlo ELBO.
    """

    def __init__(self, samples: PositiveInt = 5) -> None:
        self.samples = samples

    def check(self, vae: VAE) -> None:
        if vae.beta != 1:
            raise ConfigError(f"model.beta={vae.beta}: an importance-weighted bound has no KL to weight; allowed: 1")
        if vae.posterior.discrete:
            names = type(self).__name__, type(vae.posterior).__name__
            raise ConfigError(f"model.objective={names[0]}: all samples of a {names[1]} are the same; allowed: ELBO")

    def __call__(self, vae: VAE, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        q = vae.posterior_given(x, labels)
        z, log_q = q.transform_and_log_prob(vae.noise_for(q, self.samples))
        log_weights, terms = importance_terms(vae, x, z, log_q, labels)
        return {"loss": -importance_weighted_bound(log_weights)} | terms


class DReG(IWAE):
    """The IWAE bound with doubly reparameterized gradients for the encoder (Tucker et al. 2019, eq. 8).

    With w̃ᵢ = wᵢ / Σⱼ wⱼ, the gradient of the decoder is Σ w̃ᵢ ∇ log wᵢ, as for IWAE. The gradient of the encoder is
    Σ w̃ᵢ² (∂ log wᵢ/∂zᵢ) ∂zᵢ/∂φ: equal in expectation, without the score term, whose variance grows with k.
    """

    def __call__(self, vae: VAE, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        q = vae.posterior_given(x, labels)
        detached = q.detach()  # φ acts through z alone
        if detached is None:
            raise ConfigError(f"model.objective: DReG needs a posterior with `detach`; {type(q).__name__} has none")
        z = vae.reparameterize(q, self.samples)
        log_weights, terms = importance_terms(vae, x, z, detached.log_prob(z), labels)
        normalized = log_weights.detach().softmax(dim=0)  # w̃, [k, batch]
        if z.requires_grad:
            z.register_hook(lambda gradient: normalized.unsqueeze(-1) * gradient)  # the second factor w̃, for φ only
        bound = importance_weighted_bound(log_weights.detach())
        surrogate = (normalized * log_weights).sum(dim=0)  # gives the gradient; the bound gives the value
        return {"loss": -(bound + surrogate - surrogate.detach())} | terms


def importance_terms(
    vae: VAE, x: Tensor, z: Tensor, log_q: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log weights `[k, batch]` of samples z, and elbo, reconstruction and kl `[batch]`, all in nats.

    z is `[k, batch, latent_dim]` and log_q, log q(z|x), is `[k, batch]`. The terms are means over these samples and
    carry no gradients.
    """
    log_prior, p = vae.prior_distribution().log_prob(z), vae.likelihood_given(z, labels)
    log_likelihood = p.log_prob(x)
    reconstruction, rate = -log_likelihood.detach().mean(dim=0), (log_q - log_prior).detach().mean(dim=0)
    with torch.no_grad():
        metrics = {name: value.mean(dim=0) for name, value in vae.likelihood.metrics(p, x).items()}
    terms = {"elbo": -(reconstruction + rate), "reconstruction": reconstruction, "kl": rate}
    return log_prior + log_likelihood - log_q, terms | metrics
