"""The variational autoencoder (Kingma & Welling 2014, Rezende et al. 2014).

    p(x, z) = p(z) p(x|z)      prior and likelihood: `prior`, `decode`
    q(z|x)                     posterior: `encode`
    log p(x) ≥ E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))      the ELBO: `elbo`, which training maximises

`log_weights` is log p(x,z) − log q(z|x), with the sample axis first: Monte-Carlo ELBO, IWAE bound and NLL are one line
each on top of it. All numbers are in nats per image, and float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor

from vae_lightning.config import ConfigError, ImageShape, NonNegative, Positive, PositiveInt, Spec, build
from vae_lightning.models.backbones import set_output_bias
from vae_lightning.models.base import Array, ImageModel, check_counts
from vae_lightning.models.likelihoods import Likelihood
from vae_lightning.models.objectives import Objective, kl_divergence, with_free_bits
from vae_lightning.models.posteriors import DiagonalGaussian, Gaussian, Posterior, PosteriorDistribution
from vae_lightning.models.priors import Prior


class VAE(ImageModel):
    """Encoder, decoder, reparameterization and ELBO.

    `backbone`, `likelihood`, `prior`, `posterior` and `objective` are specs, as for `ImageModel`. `beta` weights the KL
    in the loss. `data_bias` starts the decoder's output bias where p(x|z) has the mean training image.
    `encode` and `decode` take the batch's labels, which a conditional model of your own may use.
    Raises ConfigError for a spec that does not fit.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Spec = {"_target_": "vae_lightning.models.backbones.MLP"},  # noqa: B006 (read, never written)
        likelihood: Spec = {"_target_": "vae_lightning.models.likelihoods.Bernoulli"},  # noqa: B006
        prior: Spec = {"_target_": "vae_lightning.models.priors.StandardNormal"},  # noqa: B006
        posterior: Spec = {"_target_": "vae_lightning.models.posteriors.Gaussian"},  # noqa: B006
        objective: Spec = {"_target_": "vae_lightning.models.objectives.ELBO"},  # noqa: B006
        beta: NonNegative = 1.0,
        data_bias: bool = False,
        image_shape: ImageShape = (1, 28, 28),
        optimizer: Spec = {"_target_": "torch.optim.Adam"},  # noqa: B006
        schedule: Spec | None = None,
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        decay_biases: bool = True,
    ) -> None:
        q = build(posterior, Posterior, "model.posterior", latent_dim=latent_dim)
        super().__init__(latent_dim, q.encoder_outputs, backbone, image_shape)
        self.save_hyperparameters(logger=False)
        self.beta = beta
        self.data_bias = data_bias
        self.posterior = q
        self.likelihood = build(likelihood, Likelihood, "model.likelihood")
        self.prior = build(prior, Prior, "model.prior", latent_dim=latent_dim, image_shape=image_shape)
        self.objective = build(objective, Objective, "model.objective")
        self.objective.check(self)

    @property
    def has_analytic_kl(self) -> bool:
        """Whether KL(q ‖ p) has a closed form for each dimension: a diagonal Gaussian and a standard normal prior."""
        return type(self.posterior) is Gaussian and self.prior.has_analytic_kl

    def encode(self, x: Array, labels: Tensor | None = None) -> PosteriorDistribution:
        """q(z|x) of images `[batch, *image_shape]` in [0, 1]: its `mean` is `[batch, latent_dim]`.

        Here and below, `x` may also be whatever `images` makes such a batch of, and `z` whatever `latents` takes.
        """
        return self.posterior(self.encoded(self.images(x)))

    def noise_for(self, q: PosteriorDistribution, samples: int | None = None) -> Tensor:
        """ε ~ N(0, I) for one z of each image, `[batch, noise_dim]`, or for several, `[samples, batch, noise_dim]`."""
        sample_axis = () if samples is None else (samples,)
        return self.noise(*sample_axis, *q.batch_shape, q.noise_dim, device=q.mean.device)

    def reparameterize(self, q: PosteriorDistribution, samples: int | None = None) -> Tensor:
        """z = mean + σ ε, differentiable in both: `[batch, latent_dim]`, or `[samples, batch, latent_dim]`."""
        return q.transform(self.noise_for(q, samples))

    def decode(self, z: Array, labels: Tensor | None = None) -> td.Distribution:
        """p(x|z) of latents `[..., latent_dim]`: its `log_prob(x)` is `[...]`, its `mean` `[..., *image_shape]`."""
        return self.likelihood(self.decoded(z))

    def elbo(
        self,
        x: Array,
        labels: Tensor | None = None,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        epoch: float = math.inf,
        warmup_epochs: float = 0.0,
        free_bits: float = 0.0,
    ) -> dict[str, Tensor]:
        """loss, elbo, reconstruction and kl of each image, `[batch]`, in nats, from one sample of z an image.

        loss = reconstruction + β · warm-up · kl, where the KL of each latent dimension is free up to `free_bits` nats.
        The KL has a closed form for a diagonal Gaussian against N(0, I); else, or with `kl="monte_carlo"`, it is
        log q(z|x) − log p(z) at the sample. Raises ConfigError for free bits without a closed form.
        """
        x = self.images(x)
        q = self.encode(x, labels)
        if kl == "analytic" and self.prior.has_analytic_kl and isinstance(q, DiagonalGaussian):
            z = self.reparameterize(q)
            divergence = kl_divergence(q.mean, q.log_variance)  # [batch, latent_dim]
        elif free_bits:
            raise ConfigError(f"model.objective.free_bits={free_bits}: needs a KL in closed form. Allowed: 0")
        else:
            z, log_q = q.transform_and_log_prob(self.noise_for(q))
            divergence = (log_q - self.prior(self.encode).log_prob(z)).unsqueeze(-1)  # [batch, 1]
        p = self.decode(z, labels)
        reconstruction = -p.log_prob(x)
        rate = divergence.sum(dim=-1)
        warmup = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0  # of the KL's weight (Bowman et al. 2016)
        penalty = with_free_bits(divergence, free_bits) if free_bits else rate
        return {
            "loss": reconstruction + self.beta * warmup * penalty,
            "elbo": -(reconstruction + rate),
            "reconstruction": reconstruction,
            "kl": rate,
        } | self.likelihood.metrics(p, x)

    def log_joint(self, x: Array, z: Array, labels: Tensor | None = None) -> Tensor:
        """log p(x, z) of images `[batch, *image_shape]` and latents `[..., batch, latent_dim]`: `[..., batch]`."""
        return self.prior(self.encode).log_prob(self.latents(z)) + self.decode(z, labels).log_prob(self.images(x))

    def log_weights(self, x: Array, k: int, labels: Tensor | None = None) -> Tensor:
        """log p(x,z) − log q(z|x) for k samples z ~ q(z|x) of each image: `[k, batch]`, in nats."""
        check_counts(k=k)
        q = self.encode(x, labels)
        z, log_q = q.transform_and_log_prob(self.noise_for(q, samples=k))
        return self.log_joint(x, z, labels) - log_q

    def sampled_terms(self, x: Tensor, z: Tensor, log_q: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """log_weights `[k, batch]` of samples z `[k, batch, latent_dim]` with log q(z|x) `[k, batch]`.

        Beside them elbo, reconstruction and kl, `[batch]`: means over the same samples, without gradients.
        """
        log_prior, p = self.prior(self.encode).log_prob(z), self.decode(z, labels)
        log_likelihood = p.log_prob(x)
        reconstruction, rate = -log_likelihood.detach().mean(dim=0), (log_q - log_prior).detach().mean(dim=0)
        with torch.no_grad():
            metrics = {name: value.mean(dim=0) for name, value in self.likelihood.metrics(p, x).items()}
        return {
            "log_weights": log_prior + log_likelihood - log_q,
            "elbo": -(reconstruction + rate),
            "reconstruction": reconstruction,
            "kl": rate,
        } | metrics

    def terms(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """What the objective makes of a batch; in training it is told how far training is, for warm-up."""
        return self.objective(self, x, labels, self.epochs_trained() if self.training else math.inf)

    def on_fit_start(self) -> None:
        """Let prior and decoder look at the training images, before the first step of a fresh run."""
        if self.trainer.ckpt_path:  # the checkpoint has what came of it
            return
        images = self.trainer.datamodule.train_images  # type: ignore[attr-defined]
        self.prior.initialize(images.to(self.device))
        if self.data_bias:
            mean = images.float().mean(dim=0).div(255)
            set_output_bias(self.decoder, self.likelihood.outputs_with_mean(mean))

    def codes(self, x: Array, labels: Tensor | None = None) -> Tensor:
        return self.encode(x, labels).mean

    def pictures(self, z: Array, labels: Tensor | None = None) -> Tensor:
        return self.decode(z, labels).mean

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, labels: Tensor | None = None) -> Tensor:
        """n images decoded from the prior, `[n, *image_shape]`: the mean of p(x|z), as pictures usually show.

        `temperature` scales the prior's standard deviations: below 1, images are more typical and less varied.
        """
        check_counts(n=n)
        return self.decode(self.prior(self.encode, temperature).sample((n,)), labels).mean

    @torch.no_grad()
    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, `[latent_dim]` each; from 10,000 samples if it has no formula."""
        p = self.prior(self.encode)
        try:
            return p.mean, p.stddev
        except NotImplementedError:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(0)
                z = p.sample((10_000,))
            return z.mean(dim=0), z.std(dim=0)
