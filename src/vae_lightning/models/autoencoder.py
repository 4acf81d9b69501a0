"""The deterministic autoencoder, on the same backbones: what a VAE is compared with."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vae_lightning.config import ImageShape, NonNegative, Positive, PositiveInt, Spec, build
from vae_lightning.models.backbones import Backbone
from vae_lightning.models.base import Array, ImageModel


class Autoencoder(ImageModel):
    """Encoder and decoder trained on the mean squared error per pixel.

    `output="sigmoid"` compares pixels in [0, 1]; `"tanh"` scales them to [−1, 1] first, where errors are four times
    as large. Raises ConfigError for a backbone that does not fit.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Spec = {"_target_": "vae_lightning.models.backbones.MLP"},  # noqa: B006 (read, never written)
        output: Literal["sigmoid", "tanh"] = "sigmoid",
        image_shape: ImageShape = (1, 28, 28),
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        schedule: Spec | None = None,
    ) -> None:
        super().__init__(image_shape, learning_rate, weight_decay, schedule)
        self.save_hyperparameters(logger=False)
        self.latent_dim = latent_dim
        self.output = output
        networks = build(
            backbone,
            Backbone,
            "model.backbone",
            latent_dim=latent_dim,
            encoder_outputs=latent_dim,
            image_shape=image_shape,
        )
        self.encoder: nn.Module = networks.encoder
        self.decoder: nn.Module = networks.decoder

    def encode(self, x: Array) -> Tensor:
        """Codes `[batch, latent_dim]` of images `[batch, *image_shape]` in [0, 1], or what `images` makes them of."""
        return self.encoder(self._scaled(self.images(x)))

    def decode(self, z: Array) -> Tensor:
        """Images `[..., *image_shape]` of codes `[..., latent_dim]`, in the output's own range."""
        z = self.latents(z)
        outputs = self.decoder(z.reshape(-1, self.latent_dim)).float()
        outputs = outputs.reshape(*z.shape[:-1], *outputs.shape[1:])
        return outputs.sigmoid() if self.output == "sigmoid" else outputs.tanh()

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """loss and mse, the same number: the mean squared error per pixel of each image, `[batch]`."""
        error = (self.decode(self.encode(x)) - self._scaled(x)).square().flatten(start_dim=1).mean(dim=1)
        return {"loss": error, "mse": error}

    def codes(self, x: Array) -> Tensor:
        return self.encode(x)

    def pictures(self, z: Array) -> Tensor:
        decoded = self.decode(z)
        return decoded if self.output == "sigmoid" else (decoded + 1) / 2

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.output == "sigmoid" else 2 * x - 1
