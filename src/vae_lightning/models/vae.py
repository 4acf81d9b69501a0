"""The variational autoencoder (Kingma & Welling 2014, Rezende et al. 2014).

    p(x, z) = p(z) p(x|z)      prior and likelihood: `prior_distribution`, `decode`
    q(z|x)                     posterior: `encode`
    log p(x) ≥ E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))      the ELBO: `elbo`, which training maximises

`log_weights` is log p(x,z) − log q(z|x), with the sample axis first. The Monte-Carlo ELBO, the IWAE bound and the NLL
follow from it in one line each. All numbers are float32, in nats per image. Methods named `…_given` take tensors,
unchecked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor

from vae_lightning.config import ConfigError, ImageShape, NonNegative, Positive, PositiveInt, Spec, build
from vae_lightning.models.backbones import output_bias
from vae_lightning.models.base import ImageModel
from vae_lightning.models.estimators import kl_divergence, with_free_bits
from vae_lightning.models.inputs import Array, ShapeError, check_count
from vae_lightning.models.likelihoods import Likelihood
from vae_lightning.models.posteriors import DiagonalGaussian, Gaussian, Posterior, PosteriorDistribution
from vae_lightning.models.priors import Prior

KL = Literal["analytic", "path", "monte_carlo"]


class VAE(ImageModel):
    """Encoder, decoder, reparameterization and ELBO.

    `backbone`, `likelihood`, `prior`, `posterior` and `objective` are specs, as for `ImageModel`. `beta` weights the KL
    in the loss. `data_bias` initializes the decoder's output bias so that p(x|z) has the mean training image as mean.
    A `conditional` model of images in `classes` classes has p(x|z, y) and q(z|x, y), with labels y (Sohn et al. 2015);
    its numbers are those of p(x|y). Raises ConfigError if a spec is invalid.
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
        conditional: bool = False,
        image_shape: ImageShape = (1, 28, 28),
        classes: PositiveInt | None = None,
        optimizer: Spec = {"_target_": "torch.optim.Adam"},  # noqa: B006
        schedule: Spec | None = None,
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        decay_biases: bool = True,
    ) -> None:
        q = build(posterior, Posterior, "model.posterior", latent_dim=latent_dim)
        if conditional and not classes:
            raise ConfigError("model.conditional=true: needs the number of classes, such as classes=10")
        super().__init__(latent_dim, q.encoder_outputs, backbone, image_shape, classes if conditional else None)
        self.save_hyperparameters(logger=False)
        self.beta = beta
        self.data_bias = data_bias
        self.posterior = q
        self.likelihood = build(likelihood, Likelihood, "model.likelihood")
        self.prior = build(prior, Prior, "model.prior", latent_dim=latent_dim, image_shape=image_shape)
        if conditional and self.prior.encodes_images:
            name = type(self.prior).__name__
            raise ConfigError(f"model.conditional=true: {name} encodes without labels; use another prior")
        if self.prior.encodes_images:
            self.prior.posterior_given = self.posterior_given
        self.objective = build(objective, Objective, "model.objective")
        self.objective.check(self)

    def posterior_given(self, x: Tensor, labels: Tensor | None = None) -> PosteriorDistribution:
        """Return q(z|x) of images `[batch, *image_shape]`, floats in [0, 1], and labels `[batch]`."""
        return self.posterior(self.encoded(x, labels))

    def likelihood_given(self, z: Tensor, labels: Tensor | None = None) -> td.Distribution:
        """Return p(x|z) for z `[..., latent_dim]`, and labels that broadcast to `[...]`."""
        return self.likelihood(self.decoded(z, labels))

    def prior_distribution(self, temperature: float = 1.0) -> td.Distribution:
        """Return p(z). `temperature` scales the standard deviations of samples."""
        return self.prior(temperature)

    def encode(self, x: Array, labels: Array | None = None) -> PosteriorDistribution:
        """Return q(z|x) of images in any format that `as_images` accepts. Its `mean` is `[batch, latent_dim]`."""
        return self.posterior_given(*self.image_inputs(x, labels))

    def decode(self, z: Array, labels: Array | None = None) -> td.Distribution:
        """Return p(x|z) for z `[..., latent_dim]`: `log_prob(x)` is `[...]`, `mean` is `[..., *image_shape]`."""
        return self.likelihood_given(*self.latent_inputs(z, labels))

    def codes_given(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.posterior_given(x, labels).mean

    def pictures_given(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.likelihood_given(z, labels).mean

    def elbo(
        self,
        x: Array,
        labels: Array | None = None,
        kl: KL = "analytic",
        epoch: float = math.inf,
        warmup_epochs: float = 0.0,
        free_bits: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return loss, elbo, reconstruction and kl of each image, `[batch]`, in nats, from one sample of z per image.

        loss = reconstruction + β · warm-up · kl, where the KL of each dimension counts at least `free_bits` nats.
        Without a closed form, or with `kl="path"`, the KL is log q(z|x) − log p(z) at the sample. Its gradient is the
        path derivative, or with `"monte_carlo"` the complete one.

        Raises ConfigError for free bits without a closed form.
        """
        x, labels = self.image_inputs(x, labels)
        return self.negative_elbo(x, labels, kl, epoch, warmup_epochs, free_bits)

    def negative_elbo(
        self, x: Tensor, labels: Tensor | None, kl: KL, epoch: float, warmup_epochs: float, free_bits: float
    ) -> dict[str, Tensor]:
        """Return the terms of `elbo`, for tensors that are not checked."""
        q = self.posterior_given(x, labels)
        if kl == "analytic" and self.prior.has_analytic_kl and isinstance(q, DiagonalGaussian):
            z = self.reparameterize(q)
            divergence = kl_divergence(q.mean, q.log_variance)  # [batch, latent_dim]
        elif free_bits:
            raise ConfigError(f"model.objective.free_bits={free_bits}: needs a closed-form KL; allowed: 0")
        else:
            sample = q.transform_and_log_prob if kl == "monte_carlo" else q.transform_and_path_log_prob
            z, log_q = sample(self.noise_for(q))
            divergence = (log_q - self.prior_distribution().log_prob(z)).unsqueeze(-1)  # [batch, 1]
        p = self.likelihood_given(z, labels)
        reconstruction = -p.log_prob(x)
        rate = divergence.sum(dim=-1)
        warmup = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0  # weight of the KL (Bowman et al. 2016)
        penalty = with_free_bits(divergence, free_bits) if free_bits else rate
        return {
            "loss": reconstruction + self.beta * warmup * penalty,
            "elbo": -(reconstruction + rate),
            "reconstruction": reconstruction,
            "kl": rate,
        } | self.likelihood.metrics(p, x)

    @property
    def has_analytic_kl(self) -> bool:
        """Whether KL(q ‖ p) has a closed form: the posterior is a diagonal Gaussian and the prior is N(0, I)."""
        return type(self.posterior) is Gaussian and self.prior.has_analytic_kl

    def log_joint(self, x: Array, z: Array, labels: Array | None = None) -> Tensor:
        """Return log p(x, z) `[..., batch]` of images `[batch, *image_shape]` and z `[..., batch, latent_dim]`."""
        return self.prior_distribution().log_prob(self.latents(z)) + self.decode(z, labels).log_prob(self.images(x))

    def log_weights(self, x: Array, k: int, labels: Array | None = None) -> Tensor:
        """Return log p(x,z) − log q(z|x) for k samples z ~ q(z|x) of each image: `[k, batch]`, in nats."""
        check_count("k", k)
        x, labels = self.image_inputs(x, labels)
        q = self.posterior_given(x, labels)
        z, log_q = q.transform_and_log_prob(self.noise_for(q, k))
        return self.prior_distribution().log_prob(z) + self.likelihood_given(z, labels).log_prob(x) - log_q

    def terms(self, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        return self.objective(self, x, labels, epoch)

    def on_fit_start(self) -> None:
        """Initialize the prior and the decoder's bias from the training images, unless the run is resumed."""
        super().on_fit_start()
        if self.trainer.ckpt_path:
            return
        images = self.trainer.datamodule.train_images  # type: ignore[attr-defined]
        self.prior.initialize(images)
        if self.data_bias:
            mean, bias = images.float().mean(dim=0).div(255), output_bias(self.decoder)
            if bias.numel() != mean.numel():  # one per channel: for the mean pixel
                mean = mean.mean(dim=(-2, -1), keepdim=True)
            bias.data.copy_(self.likelihood.outputs_with_mean(mean).flatten())

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, labels: Array | None = None) -> Tensor:
        """Decode n samples of the prior: the means of p(x|z), `[n, *image_shape]`.

        `temperature` scales the standard deviations of the prior. Below 1, images are more typical and less varied.
        `labels` is a class of a conditional model, or a list of n; by default the classes in turn, 0, 1, …, 0, 1, ….
        Raises ShapeError for labels of a model without classes, or out of range.
        """
        check_count("n", n)
        if labels is not None and not self.classes and type(self).likelihood_given is VAE.likelihood_given:
            raise ShapeError(f"labels={labels}: the model is not conditional; train one with model.conditional=true")
        if labels is None and self.classes:
            labels = torch.arange(n) % self.classes
        return self.pictures(self.prior_distribution(temperature).sample((n,)), labels)


class Objective(ABC):
    """The loss of a VAE; objectives.py has the subclasses."""

    def check(self, vae: VAE) -> None:  # noqa: B027 (most objectives accept every model)
        """Raise ConfigError if the objective is not defined for this model."""

    @abstractmethod
    def __call__(self, vae: VAE, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        """Return per-image terms `[batch]` in nats: `loss`, which is minimised, `elbo` (β = 1), and others to log.

        x is `[batch, *image_shape]`, labels `[batch]`. `epoch` is the training progress, with fractions of an epoch.
        """
