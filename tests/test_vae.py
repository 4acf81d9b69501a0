import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.distributions as td
from conftest import MLP
from lightning import Trainer
from torch import Tensor

from vae_lightning.config import ConfigError
from vae_lightning.models import backbones
from vae_lightning.models.autoencoder import Autoencoder
from vae_lightning.models.estimators import closed_form_kl
from vae_lightning.models.inputs import ShapeError
from vae_lightning.models.objectives import ELBO, IWAE, DReG
from vae_lightning.models.posteriors import DiagonalGaussian, Gaussian, PosteriorDistribution
from vae_lightning.models.vae import VAE

GAUSSIAN = {"_target_": "vae_lightning.models.likelihoods.Gaussian"}


@pytest.mark.parametrize("latent_dim", [1, 20])
@pytest.mark.parametrize("backbone", ["MLP", "Conv"])
def test_shapes(latent_dim: int, backbone: str, mnist: Tensor) -> None:
    vae = VAE(latent_dim, {"_target_": f"vae_lightning.models.backbones.{backbone}"})
    x = mnist[:3]
    posterior = vae.encode(x)
    assert posterior.mean.shape == posterior.log_variance.shape == (3, latent_dim)
    assert vae.reparameterize(posterior).shape == (3, latent_dim)
    assert vae.reparameterize(posterior, samples=4).shape == (4, 3, latent_dim)
    assert vae.log_weights(x, k=4).shape == (4, 3)
    assert {term: tuple(value.shape) for term, value in vae.elbo(x).items()} == dict.fromkeys(
        ("loss", "elbo", "reconstruction", "kl"), (3,)
    )
    assert vae.reconstruct(x).shape == x.shape
    assert vae.sample(6).shape == (6, 1, 28, 28)


def test_numbers_are_float32_under_mixed_precision(mnist: Tensor) -> None:
    vae = VAE(5, MLP)
    with torch.autocast("cpu", torch.bfloat16):
        terms = vae.elbo(mnist[:8])
    assert {value.dtype for value in terms.values()} == {torch.float32}


def test_hyperparameters_rebuild_the_model() -> None:
    vae = VAE(3, MLP, GAUSSIAN, beta=2.0)
    again = VAE(**vae.hparams)
    again.load_state_dict(vae.state_dict())
    assert (again.latent_dim, again.beta, again.likelihood.scale.item()) == (3, 2.0, pytest.approx(0.5**0.5))


@pytest.mark.parametrize(("output", "scale"), [("sigmoid", 1.0), ("tanh", 2.0)])
def test_autoencoder_error_is_per_pixel_on_the_output_scale(output: str, scale: float, mnist: Tensor) -> None:
    model = Autoencoder(3, MLP, output=output)
    terms = model.terms(mnist[:8])
    error = (scale * (model.reconstruct(mnist[:8]) - mnist[:8])).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["mse"], error)
    torch.testing.assert_close(terms["loss"], error)
    assert model.codes(mnist[:8]).shape == (8, 3)
    assert 0 <= model.reconstruct(mnist[:8]).min() <= model.reconstruct(mnist[:8]).max() <= 1


class Flat(backbones.MLP):
    """A decoder that forgets the shape of images."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.decoder = self.decoder[:-1]


class Narrow(backbones.MLP):
    """An encoder with one output too few."""

    def __init__(self, encoder_outputs: int, **options: Any) -> None:
        super().__init__(encoder_outputs=encoder_outputs - 1, **options)


def test_wrong_network_output_shapes_are_refused(mnist: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"its decoder returns \[8, 784\] for 8 latents; should be \[8, 1, 28, 28\]"):
        VAE(3, {"_target_": "test_vae.Flat"}).elbo(mnist[:8])
    with pytest.raises(ConfigError, match=r"its encoder returns \[8, 5\] for 8 images; should be \[8, 6\]"):
        VAE(3, {"_target_": "test_vae.Narrow"}).elbo(mnist[:8])
    with pytest.raises(ConfigError, match=r"its encoder returns \[8, 2\] for 8 images; should be \[8, 3\]"):
        Autoencoder(3, {"_target_": "test_vae.Narrow"}).terms(mnist[:8])


class Shifted(Gaussian):
    """Another posterior: the encoder's outputs, and one more for a shift of all dimensions; sampled from two noises."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.encoder_outputs += 1

    def forward(self, outputs: Tensor) -> PosteriorDistribution:
        return ShiftedDistribution(super().forward(outputs[:, 1:]), outputs[:, :1])


class ShiftedDistribution(PosteriorDistribution):
    arg_constraints: ClassVar[dict] = {}

    def __init__(self, base: DiagonalGaussian, shift: Tensor) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.shift = base, shift

    @property
    def mean(self) -> Tensor:
        return self.base.mean + self.shift

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q = self.base.transform_and_log_prob(noise)
        return z + self.shift, log_q

    def detach(self) -> None:
        return None


def test_custom_posterior(mnist: Tensor) -> None:
    vae, x = VAE(3, MLP, posterior={"_target_": "test_vae.Shifted"}), mnist[:4]
    assert closed_form_kl(vae.encode(x), vae.prior_distribution()) is None
    torch.manual_seed(1)
    terms = vae.elbo(x)
    torch.manual_seed(1)
    weights = vae.log_weights(x, k=1)[0]
    torch.testing.assert_close(terms["elbo"], weights)
    assert vae.reconstruct(x).shape == x.shape
    with pytest.raises(ConfigError, match="DReG needs a posterior with `detach`; ShiftedDistribution has none"):
        DReG()(vae, x)


class Conditional(VAE):
    """A decoder that is told the label: it shifts all latents."""

    def likelihood_given(self, z: Tensor, labels: Tensor | None = None) -> td.Distribution:
        shift = torch.zeros(1) if labels is None else labels.float()
        return super().likelihood_given(z + shift.unsqueeze(-1))


def test_labels_reach_every_method_of_a_conditional_model(mnist: Tensor) -> None:
    vae, x, labels = Conditional(3, MLP).eval(), mnist[:4], torch.arange(4)

    def drawn(call: Callable[..., Any], *arguments: Any) -> Tensor:
        torch.manual_seed(0)
        found = call(*arguments)
        return found["elbo"] if isinstance(found, dict) else found

    objectives = {"ELBO": ELBO(), "IWAE": IWAE(), "DReG": DReG()}
    for call, *arguments in [
        (vae.elbo, x), (vae.log_weights, x, 5), (vae.reconstruct, x), (vae.sample, 4), (vae.terms, x),
        *((functools.partial(objective, vae), x) for objective in objectives.values()),
    ]:  # fmt: skip
        place = [*arguments, 1.0] if call == vae.sample else arguments  # y: its third argument
        with_labels, shifted = drawn(call, *place, labels), drawn(call, *place, labels + 1)
        assert not torch.allclose(with_labels, shifted)
    vae.training_step((x, labels), 0)
    vae.validation_step((x, labels), 0)


@pytest.mark.parametrize("conditional", [False, True])
def test_training_checks_the_first_batch_of_a_fit_and_no_other(mnist: Tensor, conditional: bool) -> None:
    vae, labels = VAE(3, MLP, conditional=conditional, classes=3), torch.arange(4) % 3
    x = mnist[:4]
    wrong = [
        ((255 * x, labels), "pixels from 0 to 255: should be floats"),
        ((x.long(), labels), "batch of torch.int64 .*: training needs images"),
        ((x[:, 0], labels), r"\(4, 28, 28\): training needs images \(batch, 1, 28, 28\)"),
        *([((x, labels + 1), "labels from 1 to 3: should be a class from 0 to 2")] if conditional else []),
    ]
    for batch, message in wrong:
        with pytest.raises(ShapeError, match=message):
            vae.training_step(batch, 0)
    vae.training_step((x, labels), 0)
    vae.training_step((255 * x, labels), 1)  # unchecked


def test_public_methods_check_with_and_without_a_trainer(mnist: Tensor) -> None:
    vae = VAE(3, MLP)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for attached in (None, trainer):
        vae.trainer = attached
        for call in (vae.encode, vae.elbo, vae.codes, vae.reconstruct, functools.partial(vae.log_weights, k=2)):
            with pytest.raises(ShapeError, match="pixels from 0 to 255"):
                call(255 * mnist[:2])
            call((255 * mnist[:2]).byte())
