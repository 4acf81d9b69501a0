"""What every model here shares: the steps, exact epoch means, and the optimizer.

A model says what an image costs, `terms(x)`; the rest of training is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vae_lightning.config import ImageShape, NonNegative, Positive, Spec, UserError, build
from vae_lightning.data.pixels import Share
from vae_lightning.models.latents import arc, line
from vae_lightning.models.metrics import EpochMeans

Array = Tensor | ArrayLike  # what torch.as_tensor takes
Batch = tuple[Tensor, Tensor]  # images [batch, channels, height, width] in [0, 1], labels [batch]


class ShapeError(UserError):
    """Images or latents that the model cannot take."""


def as_tensor(values: Array, what: str) -> Tensor:
    """Numbers that a person passes, as a tensor. Raises ShapeError for what is none."""
    if isinstance(values, Tensor) and not (values.is_complex() or values.is_sparse or values.is_meta):
        return values
    try:
        if isinstance(values, Tensor):
            raise TypeError
        array = np.array(values, order="C")
        if array.dtype.kind not in "biuf":  # complex numbers would lose a part, and the rest are none
            raise TypeError
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ShapeError(f"{what}: {type(values).__name__} is no array of numbers, all rows of one length") from None


def check_counts(**counts: object) -> None:
    """Raise ShapeError for a number of samples or steps that is no whole number from 1."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ShapeError(f"{name}={count}: should be a whole number from 1")


class ImageModel(LightningModule, ABC):
    """A model of images, trained on `terms(x)["loss"]`, which logs the mean over images of every term each epoch."""

    encoder: nn.Module
    decoder: nn.Module
    latent_dim: int
    config: dict[str, Any]  # of the run that it was loaded from,
    protocol: dict[str, str]  # and what its checkpoint says of the data: data.name, data.pixels

    def __init__(
        self,
        image_shape: ImageShape,
        learning_rate: Positive = 1e-3,
        weight_decay: NonNegative = 0.0,
        schedule: Spec | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.example_input_array = torch.zeros(1, *image_shape)  # for the model summary
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        # In a plain dictionary: they hold no weights, and do not belong in checkpoints and model summaries.
        self.means = {split: EpochMeans() for split in ("train", "val", "test")}

    @abstractmethod
    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """Per-image figures `[batch]` by name; `"loss"` is minimised, all are logged."""

    def images(self, x: Array) -> Tensor:
        """What a person calls images as the batch that the model takes: `[batch, *image_shape]` in [0, 1].

        Bytes or floats, a tensor, array or list on any device, one image or many, with or without a channel axis of 1.
        Raises ShapeError for another shape, and for floats that are no pixels.
        """
        x = as_tensor(x, "images")
        known = self._trainer is not None or torch.compiler.is_compiling()
        if known and x.shape[1:] == self.image_shape and x.is_floating_point():
            return x  # a batch in training, or a graph being traced: nothing to do, and nothing to wait for
        shapes = [self.image_shape, *([self.image_shape[1:]] if self.image_shape[0] == 1 else [])]
        if not any(x.shape[-len(s) :] == s and x.ndim <= len(s) + 1 for s in shapes):
            raise ShapeError(f"images of shape {tuple(x.shape)}: the model takes {self.image_shape} or a batch of it")
        x = x.to(self.device).reshape(-1, *self.image_shape)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if not ((x >= 0) & (x <= 1)).all():
            raise ShapeError(f"pixels between {x.min():g} and {x.max():g}: floats are in [0, 1], bytes (uint8) to 255")
        return x

    def latents(self, z: Array) -> Tensor:
        """Latents `[..., latent_dim]`, given as a tensor, array or list, on the model's device. Raises ShapeError."""
        if not isinstance(z, Tensor):
            z = as_tensor(z, "latents")
            if not z.isfinite().all():
                raise ShapeError("latents that are NaN or infinite")
        z = z.to(self.device, torch.float32)
        if z.shape[-1:] != (self.latent_dim,):
            raise ShapeError(f"latents of shape {tuple(z.shape)}: the model has latent_dim={self.latent_dim}")
        return z

    @abstractmethod
    def codes(self, x: Array) -> Tensor:
        """Where images lie in latent space, `[batch, latent_dim]`: of a VAE, the posterior means."""

    @torch.no_grad()
    def all_codes(self, images: Tensor) -> Tensor:
        """`codes` of many images `[n, *image_shape]`, a thousand at a time: `[n, latent_dim]`."""
        return torch.cat([self.codes(self.images(batch)) for batch in images.split(1_000)])

    @abstractmethod
    def pictures(self, z: Array) -> Tensor:
        """Latents `[..., latent_dim]` as images to show, `[..., *image_shape]` in [0, 1]: of a VAE, p(x|z)'s mean."""

    def forward(self, x: Array) -> Tensor:
        """Images through the model and back, `[batch, *image_shape]` in [0, 1]."""
        return self.pictures(self.codes(x))

    @torch.no_grad()
    def reconstruct(self, x: Array) -> Tensor:
        """Images through the model and back, `[batch, *image_shape]` in [0, 1], without gradients."""
        return self(x)

    @torch.no_grad()
    def interpolate(self, start: Array, end: Array, steps: int = 10, spherical: bool = False) -> Tensor:
        """From image `start` to image `end`, decoded on the way, `[steps, batch, *image_shape]`.

        On the straight line between their codes, or along the arc that `latents.arc` describes.
        """
        check_counts(steps=steps)
        path = arc if spherical else line
        return self.pictures(path(self.codes(start), self.codes(end), steps))

    def share(self) -> Share | None:
        """Which images of the running batch are this process's; None where there are no others."""
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return None
        evaluated = trainer.val_dataloaders if trainer.validating else trainer.test_dataloaders
        return getattr(trainer.train_dataloader if trainer.training else evaluated, "share", None)

    def batch_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` `[batch]`, whose gradient is that over the batch of all processes together.

        They average their gradients, and an uneven last batch gives some of them an image less.
        """
        share = self.share()
        return values.mean() if share is None else values.sum() * (share.counts * share.world_size / share.total)

    def count(self, split: str, terms: dict[str, Tensor]) -> None:
        """Add a batch to the epoch's means."""
        share = self.share()
        self.means[split].update({name: v[:0] for name, v in terms.items()} if share and not share.counts else terms)

    def noise(self, *shape: int, device: torch.device) -> Tensor:
        """ε ~ N(0, I) of `shape` `[..., batch, latent_dim]`.

        Each of several processes takes its rows of one draw for all of them: their number changes no result.
        """
        share = self.share()
        if share is None:
            return torch.randn(*shape, device=device)
        *samples, _, latent_dim = shape
        return torch.randn(*samples, share.total, latent_dim, device=device)[..., share.rows, :]

    def epochs_trained(self) -> float:
        """How far training is, in epochs and fractions of one."""
        return self.trainer.global_step / self.trainer.num_training_batches

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        terms = self.terms(batch[0])
        self.count("train", terms)
        return self.batch_mean(terms["loss"])

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.count("val", self.terms(batch[0]))

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self.count("test", self.terms(batch[0]))

    def on_train_epoch_end(self) -> None:
        self._log_means("train")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, split: str) -> None:
        means = self.means[split]
        # The means are over all processes already; sync_dist tells Lightning so, which would warn without it.
        self.log_dict({f"{split}/{term}": value.float() for term, value in means.compute().items()}, sync_dist=True)
        means.reset()

    def configure_optimizers(self) -> Any:
        # fused: one kernel for all parameters, three times quicker than the default here, and the same update.
        # Lightning cannot clip its gradients under mixed precision.
        trainer = self._trainer
        fused = not (trainer and trainer.gradient_clip_val and "mixed" in str(trainer.precision))
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused
        )
        if self.schedule is None:
            return optimizer
        return [optimizer], [build(self.schedule, LRScheduler, "model.schedule", optimizer=optimizer)]
