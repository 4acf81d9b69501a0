"""The deterministic autoencoder, on the same backbones: what a VAE is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vae_lightning.backbones import Backbone
from vae_lightning.config import ImageShape, NonNegative, Positive, PositiveInt, Spec, build
from vae_lightning.model import ImageModel


class Autoencoder(ImageModel):
    """Encoder and decoder trained on the mean squared error per pixel.

    `output="sigmoid"` compares pixels in [0, 1]; `"tanh"` scales them to [−1, 1] first, where errors are four times
    as large. Raises ConfigError for a backbone that does not fit.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Spec = {"_target_": "vae_lightning.backbones.MLP"},  # noqa: B006 (read, never written)
        output: Literal["sigmoid", "tanh"] = "sigmoid",
        image_shape: ImageShape = (1, 28, 28),
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        schedule: Spec | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, schedule)
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
        self.example_input_array = torch.zeros(1, *image_shape)  # for the model summary

    def encode(self, x: Tensor) -> Tensor:
        """Codes `[batch, latent_dim]` of images `[batch, *image_shape]` in [0, 1]."""
        return self.encoder(self._scaled(x))

    def decode(self, z: Tensor) -> Tensor:
        """Images `[batch, *image_shape]` of codes, in the output's own range."""
        outputs = self.decoder(z).float()
        return outputs.sigmoid() if self.output == "sigmoid" else outputs.tanh()

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """loss and mse, the same number: the mean squared error per pixel of each image, `[batch]`."""
        error = (self.decode(self.encode(x)) - self._scaled(x)).square().flatten(start_dim=1).mean(dim=1)
        return {"loss": error, "mse": error}

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions in [0, 1], `[batch, *image_shape]`."""
        decoded = self.decode(self.encode(x))
        return decoded if self.output == "sigmoid" else (decoded + 1) / 2

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.output == "sigmoid" else 2 * x - 1
