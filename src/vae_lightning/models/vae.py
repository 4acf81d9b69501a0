"""The variational autoencoder (Kingma & Welling 2014, Rezende et al. 2014).

    p(x, z) = p(z) p(x|z)      prior and likelihood: `prior`, `decode`
    q(z|x)                     posterior: `encode`
    log p(x) ≥ E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))      the ELBO: `elbo`, which training maximises

`log_weights` is log p(x,z) − log q(z|x), with the sample axis first: Monte-Carlo ELBO, IWAE bound and NLL are one line
each on top of it (objectives.py, evaluation.py). All numbers are in nats per image, and float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributions as td
from torch import Tensor, nn

from vae_lightning.config import ImageShape, NonNegative, Positive, PositiveInt, Spec, build
from vae_lightning.models.backbones import Backbone, set_output_bias
from vae_lightning.models.base import Array, ImageModel, check_counts
from vae_lightning.models.likelihoods import Likelihood
from vae_lightning.models.objectives import Objective, kl_divergence
from vae_lightning.models.posteriors import DiagonalGaussian, diagonal_gaussian
from vae_lightning.models.priors import Prior


class VAE(ImageModel):
    """Encoder, decoder, reparameterization and ELBO.

    `backbone`, `likelihood`, `prior` and `objective` are specs, `{"_target_": class, argument: value}`: plain values,
    so that a checkpoint holds all that is needed to rebuild the model. `beta` weights the KL in the loss.
    `data_bias` starts the decoder's output bias at the log odds of the mean training image.
    Raises ConfigError for a spec that does not fit.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Spec = {"_target_": "vae_lightning.models.backbones.MLP"},  # noqa: B006 (read, never written)
        likelihood: Spec = {"_target_": "vae_lightning.models.likelihoods.Bernoulli"},  # noqa: B006
        prior: Spec = {"_target_": "vae_lightning.models.priors.StandardNormal"},  # noqa: B006
        objective: Spec = {"_target_": "vae_lightning.models.objectives.ELBO"},  # noqa: B006
        beta: NonNegative = 1.0,
        data_bias: bool = False,
        image_shape: ImageShape = (1, 28, 28),
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        schedule: Spec | None = None,
    ) -> None:
        super().__init__(image_shape, learning_rate, weight_decay, schedule)
        self.save_hyperparameters(logger=False)
        self.latent_dim = latent_dim
        self.beta = beta
        self.data_bias = data_bias
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
        self.prior = build(prior, Prior, "model.prior", latent_dim=latent_dim, image_shape=image_shape)
        self.objective = build(objective, Objective, "model.objective")
        self.objective.check(self)

    def encode(self, x: Array) -> DiagonalGaussian:
        """q(z|x) of images, `[batch, *image_shape]` in [0, 1]: `mean` and `log_variance` are `[batch, latent_dim]`.

        Here and below, `x` may also be whatever `images` makes such a batch of, and `z` whatever `latents` takes.
        """
        return diagonal_gaussian(self.encoder(self.images(x)))

    def reparameterize(self, posterior: DiagonalGaussian, samples: int | None = None) -> Tensor:
        """z = mean + σ ε with ε ~ N(0, I), differentiable in both: `[batch, latent_dim]`, or `[samples, batch, …]`."""
        sample_axis = () if samples is None else (samples,)
        noise = self.noise(*sample_axis, *posterior.mean.shape, device=posterior.mean.device)
        return posterior.mean + posterior.stddev * noise

    def decode(self, z: Array) -> td.Distribution:
        """p(x|z) of latents `[..., latent_dim]`: its `log_prob(x)` is `[...]`, its `mean` `[..., *image_shape]`."""
        z = self.latents(z)
        outputs = self.decoder(z.reshape(-1, self.latent_dim)).float()
        return self.likelihood(outputs.reshape(*z.shape[:-1], *outputs.shape[1:]))

    def elbo(
        self, x: Array, analytic_kl: bool = True, penalty: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """elbo, reconstruction and kl of each image, `[batch]`, with one sample of z an image; and the loss.

        The KL is in closed form where `analytic_kl` and the prior allow it, else log q(z|x) − log p(z) at the sample.
        `penalty` says what the loss makes of it, `[batch, latent_dim]` or, sampled, `[batch, 1]`; by default the sum.
        """
        x = self.images(x)
        posterior = self.encode(x)
        z = self.reparameterize(posterior)
        likelihood = self.decode(z)
        reconstruction = -likelihood.log_prob(x)
        if analytic_kl and self.prior.has_analytic_kl:
            kl = kl_divergence(posterior.mean, posterior.log_variance)
        else:
            kl = (posterior.log_prob(z) - self.prior(self.encode).log_prob(z)).unsqueeze(-1)
        rate = kl.sum(dim=-1)
        return {
            "loss": reconstruction + (rate if penalty is None else penalty(kl)),
            "elbo": -(reconstruction + rate),
            "reconstruction": reconstruction,
            "kl": rate,
        } | self.likelihood.metrics(likelihood, x)

    def log_joint(self, x: Array, z: Array) -> Tensor:
        """log p(x, z) of images `[batch, *image_shape]` and latents `[..., batch, latent_dim]`: `[..., batch]`."""
        return self.prior(self.encode).log_prob(self.latents(z)) + self.decode(z).log_prob(self.images(x))

    def log_weights(self, x: Array, k: int) -> Tensor:
        """log p(x,z) − log q(z|x) for k samples z ~ q(z|x) of each image: `[k, batch]`, in nats."""
        check_counts(k=k)
        posterior = self.encode(x)
        z = self.reparameterize(posterior, samples=k)
        return self.log_joint(x, z) - posterior.log_prob(z)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """What the objective makes of a batch; in training it is told how far training is, for warm-up."""
        if not self.training:
            return self.objective(self, x)
        return self.objective(self, x, epoch=self.epochs_trained())

    def on_fit_start(self) -> None:
        """Let prior and decoder look at the training images, before the first step of a fresh run."""
        if self.trainer.ckpt_path:  # the checkpoint has what came of it
            return
        images = self.trainer.datamodule.train_images  # type: ignore[attr-defined]
        self.prior.initialize(images.to(self.device))
        if self.data_bias:
            mean = images.float().mean(dim=0).div(255).clamp(1e-3, 1 - 1e-3)
            set_output_bias(self.decoder, mean.logit())

    def codes(self, x: Array) -> Tensor:
        return self.encode(x).mean

    def pictures(self, z: Array) -> Tensor:
        return self.decode(z).mean

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        """n images decoded from the prior, `[n, *image_shape]`: the mean of p(x|z), as pictures usually show.

        `temperature` scales the prior's standard deviations: below 1, images are more typical and less varied.
        """
        check_counts(n=n)
        return self.decode(self.prior(self.encode, temperature).sample((n,))).mean
