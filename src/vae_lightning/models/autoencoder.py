"""The deterministic autoencoder, a baseline for the VAE on the same backbones."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.optim import Adam

from vae_lightning.config import ImageShape, NonNegative, Part, Positive, PositiveInt
from vae_lightning.models.backbones import MLP, Networks
from vae_lightning.models.base import ImageModel


class Autoencoder(ImageModel):
    """Encoder and decoder trained on the mean squared error per pixel.

    `output="sigmoid"` compares pixels in [0, 1]. `"tanh"` compares pixels scaled to [−1, 1], where the error is four
    times as large. Raises ConfigError if an argument is invalid.
    """

    def __init__(
        self,
        latent_dim: PositiveInt = 20,
        backbone: Networks = MLP,
        output: Literal["sigmoid", "tanh"] = "sigmoid",
        image_shape: ImageShape = (1, 28, 28),
        optimizer: Part = Adam,
        schedule: Part | None = None,
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        decay_biases: bool = True,
    ) -> None:
        super().__init__(latent_dim, latent_dim, backbone, image_shape)
        self.save_settings(backbone=backbone, optimizer=optimizer, schedule=schedule)
        self.output = output

    def codes_given(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.encoded(self._scaled(x))

    def terms(self, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        """Return loss and mse, both the mean squared error per pixel of each image, `[batch]`."""
        error = (self._decode(self.codes_given(x)) - self._scaled(x)).square().flatten(start_dim=1).mean(dim=1)
        return {"loss": error, "mse": error}

    def decode_images_given(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        decoded = self._decode(z)
        return decoded if self.output == "sigmoid" else (decoded + 1) / 2

    def _decode(self, z: Tensor) -> Tensor:
        """Decode codes `[..., latent_dim]` to images `[..., *image_shape]` in the range of `output`."""
        outputs = self.decoded(z)
        return outputs.sigmoid() if self.output == "sigmoid" else outputs.tanh()

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.output == "sigmoid" else 2 * x - 1
