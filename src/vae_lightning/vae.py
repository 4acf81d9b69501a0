"""The variational autoencoder (Kingma & Welling 2014, Rezende et al. 2014).

    p(x, z) = p(z) p(x|z)      prior and likelihood: `decode`
    q(z|x)                     posterior: `encode`
    log p(x) ≥ E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))      the ELBO: `elbo`, which training maximises

`log_weights` is log p(x,z) − log q(z|x), with the sample axis first: ELBO, IWAE bound and NLL all follow from it.
All numbers are in nats per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor, nn

from vae_lightning import objectives
from vae_lightning.backbones import Backbone
from vae_lightning.config import NonNegative, Positive, PositiveInt, Spec, build
from vae_lightning.likelihoods import Likelihood
from vae_lightning.model import ImageModel
from vae_lightning.posterior import DiagonalGaussian, diagonal_gaussian
from vae_lightning.priors import StandardNormal


class VAE(ImageModel):
    """Encoder, decoder, reparameterization and ELBO.

    `backbone` and `likelihood` are specs, `{"_target_": class, argument: value}`: plain values, so that a checkpoint
    holds all that is needed to rebuild the model. `kl="analytic"` uses the closed form of KL(q ‖ p), `"monte_carlo"`
    the sampled log q(z|x) − log p(z). Raises ConfigError for a spec that does not fit.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Spec = {"_target_": "vae_lightning.backbones.MLP"},  # noqa: B006 (read, never written)
        likelihood: Spec = {"_target_": "vae_lightning.likelihoods.Bernoulli"},  # noqa: B006
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        beta: NonNegative = 1.0,
        image_shape: Sequence[PositiveInt] = (1, 28, 28),
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        schedule: Spec | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, schedule)
        self.save_hyperparameters(logger=False)
        self.latent_dim = latent_dim
        self.kl = kl
        self.beta = beta
        networks = build(
            backbone,
            Backbone,
            "model.backbone",
            latent_dim=latent_dim,
            encoder_outputs=2 * latent_dim,  # a mean and a log variance for each latent dimension
            image_shape=image_shape,
        )
        self.encoder: nn.Module = networks.encoder
        self.decoder: nn.Module = networks.decoder
        self.likelihood = build(likelihood, Likelihood, "model.likelihood")
        self.prior = StandardNormal(latent_dim)
        self.example_input_array = torch.zeros(1, *image_shape)  # for the model summary

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) of images in [0, 1], `[batch, *image_shape]`: `mean` and `log_variance` are `[batch, latent_dim]`."""
        return diagonal_gaussian(self.encoder(x))

    def reparameterize(self, posterior: DiagonalGaussian, samples: int | None = None) -> Tensor:
        """z = mean + σ ε with ε ~ N(0, I), differentiable in both: `[batch, latent_dim]`, or `[samples, batch, …]`."""
        sample_axis = () if samples is None else (samples,)
        noise = torch.randn(*sample_axis, *posterior.mean.shape, device=posterior.mean.device)
        return posterior.mean + posterior.stddev * noise

    def decode(self, z: Tensor) -> td.Distribution:
        """p(x|z) of latents `[..., latent_dim]`: its `log_prob(x)` is `[...]`, its `mean` `[..., *image_shape]`."""
        outputs = self.decoder(z.reshape(-1, self.latent_dim)).float()
        return self.likelihood(outputs.unflatten(0, z.shape[:-1]))

    def elbo(self, x: Tensor) -> dict[str, Tensor]:
        """loss, elbo, reconstruction and kl of each image, `[batch]`, with one sample of z an image."""
        posterior = self.encode(x)
        z = self.reparameterize(posterior)
        likelihood = self.decode(z)
        if self.kl == "analytic":
            kl = objectives.kl_divergence(posterior.mean, posterior.log_variance).sum(dim=-1)
        else:
            kl = posterior.log_prob(z) - self.prior().log_prob(z)
        terms = objectives.elbo(reconstruction=-likelihood.log_prob(x), kl=kl, beta=self.beta)
        return terms | self.likelihood.metrics(likelihood, x)

    def log_weights(self, x: Tensor, k: int) -> Tensor:
        """log p(x,z) − log q(z|x) for k samples z ~ q(z|x) of each image: `[k, batch]`, in nats."""
        posterior = self.encode(x)
        z = self.reparameterize(posterior, samples=k)
        log_joint = self.prior().log_prob(z) + self.decode(z).log_prob(x)
        return log_joint - posterior.log_prob(z)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        return self.elbo(x)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of images `[batch, *image_shape]`, decoded from the posterior mean: the same shape."""
        return self.decode(self.encode(x).mean).mean

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n images decoded from the prior, `[n, *image_shape]`: the mean of p(x|z), as pictures usually show."""
        return self.decode(self.prior().sample((n,))).mean
