"""The variational autoencoder (Kingma & Welling 2014, Rezende et al. 2014).

    p(x, z) = p(z) p(x|z)      prior and likelihood: `prior_distribution`, `decode`
    q(z|x)                     posterior: `encode`
    log p(x) ≥ E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))      the bound that training maximises: `ELBO`

`log_weights`, log p(x,z) − log q(z|x) with the sample axis first, gives the Monte-Carlo ELBO, the IWAE bound and the
NLL in one line each. All numbers are float32, in nats per image. Methods named `…_given` take tensors, unchecked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributions as td
from torch import Tensor
from torch.optim import Adam

from vae_lightning.config import ConfigError, ImageShape, NonNegative, Part, Positive, PositiveInt, build
from vae_lightning.models.backbones import MLP, Networks, output_bias
from vae_lightning.models.base import ImageModel
from vae_lightning.models.estimators import closed_form_kl, with_free_bits
from vae_lightning.models.inputs import Array, ShapeError, check_count, check_image_shape
from vae_lightning.models.likelihoods import Bernoulli, Likelihood, bits_per_dim
from vae_lightning.models.posteriors import Gaussian, Posterior, PosteriorDistribution
from vae_lightning.models.priors import Prior, StandardNormal

KL = Literal["analytic", "path", "monte_carlo"]


class Objective(ABC):
    """The loss of a VAE; objectives.py has more of them."""

    def check(self, vae: VAE) -> None:  # noqa: B027 (most objectives accept every model)
        """Raise ConfigError if the objective is not defined for this model."""

    def kl_weight(self, vae: VAE, epoch: float) -> float | None:
        """Return the weight of the KL in the loss after `epoch` epochs, which is logged; None without such a weight."""
        return None

    @abstractmethod
    def __call__(self, vae: VAE, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        """Return per-image terms `[batch]` in nats: `loss`, which is minimised, `elbo` (β = 1), and others to log.

        x is `[batch, *image_shape]`, labels `[batch]`; `epoch` is the training progress, with fractions.
        """


class ELBO(Objective):
    """The negative ELBO: reconstruction + β · warm-up · KL, with one sample of z per image (Higgins et al. 2017).

    `kl="analytic"` uses the closed form of the KL if there is one, and `"path"` otherwise: log q(z|x) − log p(z) at the
    sample, with the path derivative (Roeder et al. 2017). `"monte_carlo"` has the complete gradient of the same value,
    of higher variance. The weight of the KL rises from 0 over `warmup_epochs` (Bowman et al. 2016). The KL of each
    latent dimension counts at least `free_bits` nats.
    """

    def __init__(self, kl: KL = "analytic", warmup_epochs: NonNegative = 0.0, free_bits: NonNegative = 0.0) -> None:
        self.kl, self.warmup_epochs, self.free_bits = kl, warmup_epochs, free_bits

    def check(self, vae: VAE) -> None:
        # With an example. PyTorch remembers the formula that it finds; its compiler could not trace the search.
        vae.eval()  # a VampPrior encodes images
        q = vae.posterior(torch.zeros(1, vae.encoder_outputs, device=vae.device))
        with torch.no_grad():
            self.closed_form(q, vae.prior())
        vae.train()

    def kl_weight(self, vae: VAE, epoch: float) -> float:
        return vae.beta * (min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0)

    def closed_form(self, q: PosteriorDistribution, p: td.Distribution) -> Tensor | None:
        """Return `closed_form_kl(q, p)`, or None for a KL at the sample. Raises ConfigError if free bits need more."""
        kl = closed_form_kl(q, p) if self.kl == "analytic" else None
        if self.free_bits and (kl is None or kl.shape[-1:] != q.event_shape):
            allowed = "use model.objective.kl=analytic, model/prior=normal and model/posterior=gaussian"
            raise ConfigError(f"model.objective.free_bits={self.free_bits}: needs a closed-form KL; {allowed}")
        return kl

    def __call__(self, vae: VAE, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        q, prior = vae.posterior_given(x, labels), vae.prior_distribution()
        noise, kl, levels = vae.noise_for(q), self.closed_form(q, prior), {}  # [batch, latent_dim]
        if kl is not None:
            z = q.transform(noise)
        else:
            z, kl = q.transform_and_kl(noise, prior, path=self.kl != "monte_carlo")  # [batch, levels]
            levels = {f"kl_{n}": of_level for n, of_level in enumerate(kl.T, start=1) if kl.shape[1] > 1}
        p = vae.likelihood_given(z, labels)
        reconstruction, rate = -p.log_prob(x), kl.sum(dim=-1)
        penalty = with_free_bits(kl, self.free_bits) if self.free_bits else rate
        terms = {"elbo": -(reconstruction + rate), "reconstruction": reconstruction, "kl": rate} | levels
        more = q.loss_terms()
        loss = reconstruction + self.kl_weight(vae, epoch) * penalty + sum(more.values())
        metrics = {name: value.expand(len(x)) for name, value in vae.posterior.summary(z.detach()).items()}
        return {"loss": loss} | terms | more | metrics | vae.likelihood.metrics(p, x)


class VAE(ImageModel):
    """Encoder, decoder, prior and an objective; `beta` weights the KL in the loss.

    A part is a class, a `functools.partial` or a spec; `backbone` also a pair (encoder, decoder). `data_bias` sets the
    decoder's first output bias so that p(x|z) has the mean training image as mean. A `conditional` model has p(x|z, y)
    and q(z|x, y) with labels y (Sohn et al. 2015). Raises ConfigError if an argument is invalid.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Networks = MLP,
        likelihood: Part = Bernoulli,
        prior: Part = StandardNormal,
        posterior: Part = Gaussian,
        objective: Part = ELBO,
        beta: NonNegative = 1.0,
        data_bias: bool = False,
        conditional: bool = False,
        image_shape: ImageShape = (1, 28, 28),
        classes: PositiveInt | None = None,
        optimizer: Part = Adam,
        schedule: Part | None = None,
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        decay_biases: bool = True,
    ) -> None:
        q = build(posterior, Posterior, "model.posterior", latent_dim=latent_dim)
        if conditional and not classes:
            raise ConfigError("model.conditional=true: needs the number of classes, such as classes=10")
        p = build(likelihood, Likelihood, "model.likelihood")
        check_image_shape(image_shape)
        given, outputs = classes if conditional else None, p.channels(image_shape[0])
        super().__init__(latent_dim, q.encoder_outputs, backbone, image_shape, given, outputs)
        parts = {"likelihood": likelihood, "prior": prior, "posterior": posterior, "objective": objective}
        self.save_settings(backbone=backbone, **parts, optimizer=optimizer, schedule=schedule)
        self.beta, self.data_bias = beta, data_bias
        self.posterior, self.likelihood = q, p
        self.prior = build(prior, Prior, "model.prior", latent_dim=latent_dim, image_shape=image_shape)
        if conditional and self.prior.encodes_images:
            name = type(self.prior).__name__
            raise ConfigError(f"model.conditional=true: {name} encodes without labels; use another prior")
        if q.discrete != self.prior.discrete:
            names = f"{type(q).__name__} with {type(self.prior).__name__}"
            raise ConfigError(f"model.posterior: {names}: only one is discrete; model/prior=codes goes with vq and fsq")
        self.prior.connect(self.posterior, self.posterior_given)
        self.needs_images = data_bias or p.needs_images or type(self.prior).initialize is not Prior.initialize
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

    def decode_images_given(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.likelihood_given(z, labels).mean

    def elbo(self, x: Array, labels: Array | None = None, kl: KL = "analytic") -> dict[str, Tensor]:
        """Return loss, elbo, reconstruction and kl of each image, `[batch]`, in nats, as `ELBO(kl)` computes them."""
        return ELBO(kl)(self, *self.image_inputs(x, labels))

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

    def initialize(self, images: Tensor) -> None:
        """Initialize prior and likelihood, and with `data_bias` the decoder's bias, from training images."""
        self.prior.initialize(images)
        self.likelihood.initialize(images)
        if self.data_bias:
            self.likelihood.initialize_bias(output_bias(self.decoder), images)

    def check_batch(self, x: Tensor, labels: Tensor | None) -> None:
        super().check_batch(x, labels)
        self.likelihood.check_images(x)

    def summary(self, split: str) -> dict[str, Tensor]:
        """Add the bits per dimension of the ELBO, for likelihoods of 8-bit pixels."""
        means = super().summary(split)
        bits = bits_per_dim(self.likelihood, -means["elbo"], self.image_shape) if "elbo" in means else None
        return means if bits is None else means | {"bits_per_dim": bits}

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, labels: Array | None = None) -> Tensor:
        """Decode n samples of the prior: the means of p(x|z), `[n, *image_shape]`.

        With a `temperature` below 1, images are more typical and less varied. `labels` is a class of a conditional
        model or a list of n, by default 0, 1, …, 0, 1, …. Raises ShapeError for labels of a model without classes.
        """
        check_count("n", n)
        if labels is None:
            labels = torch.arange(n) % self.classes if self.classes else None
        elif not self.classes and type(self).likelihood_given is VAE.likelihood_given:
            raise ShapeError(f"labels={labels}: the model is not conditional; train one with model.conditional=true")
        return self.decode_images(self.prior_distribution(temperature).sample((n,)), labels)
