"""The base class of all models: networks, steps, exact epoch means and the optimizer.

A model defines `terms(x, labels, epoch)`, the loss of each image. The rest of training is the same for all models.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import ArrayLike
from torch import Tensor, nn

from vae_lightning.config import ConfigError, ImageShape, PositiveInt, Spec, UserError, build
from vae_lightning.data.pixels import Share
from vae_lightning.models.backbones import Backbone
from vae_lightning.models.conditional import ConditionalDecoder, ConditionalEncoder
from vae_lightning.models.latents import arc, line
from vae_lightning.models.metrics import EpochMeans
from vae_lightning.models.optimization import make_optimizer, make_schedule

Array = Tensor | ArrayLike  # any input of torch.as_tensor
Batch = tuple[Tensor, Tensor]  # images [batch, channels, height, width] in [0, 1], labels [batch]


class ShapeError(UserError):
    """Images, latents or labels of a shape or type that the model does not accept."""


def as_tensor(values: Array, what: str) -> Tensor:
    """Convert numbers to a tensor. Raises ShapeError for anything that is not a rectangular array of numbers."""
    if isinstance(values, Tensor) and not (values.is_complex() or values.is_sparse or values.is_meta):
        return values
    try:
        if isinstance(values, Tensor):
            raise TypeError
        array = np.array(values, order="C")
        if array.dtype.kind not in "biuf":  # bool, integers and floats
            raise TypeError
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ShapeError(f"{what}: {type(values).__name__} is not an array of real numbers") from None


def check_count(name: str, count: object) -> None:
    """Raise ShapeError unless `count` is a positive integer."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ShapeError(f"{name}={count}: should be a positive integer")


class ImageModel(LightningModule, ABC):
    """A model of images, trained on `terms(…)["loss"]`. Each epoch it logs the mean over images of every term.

    `backbone` is a spec, `{"_target_": class, argument: value}`; its encoder has `encoder_outputs` outputs. With
    `classes`, the model is conditional: both networks get the label of the image, an integer from 0 to `classes` − 1.
    A subclass calls `save_hyperparameters` with plain values, from which a checkpoint rebuilds the model. The
    hyperparameters of the optimizer are optimizer, schedule (specs), learning_rate, weight_decay and decay_biases.
    Raises ConfigError if a spec is invalid.
    """

    # Set by load_run:
    config: dict[str, Any]  # the configuration of the run
    protocol: dict[str, str]  # data.name and data.pixels of the checkpoint

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        backbone: Spec,
        image_shape: ImageShape,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.image_shape = tuple(image_shape)
        self.classes = classes or 0
        networks = build(
            backbone,
            Backbone,
            "model.backbone",
            latent_dim=latent_dim + self.classes,
            encoder_outputs=encoder_outputs,
            image_shape=self.image_shape,
        )
        self.encoder: nn.Module = networks.encoder
        self.decoder: nn.Module = networks.decoder
        if classes:
            self.encoder = ConditionalEncoder(networks.encoder, classes, image_shape)
            self.decoder = ConditionalDecoder(networks.decoder)
        self.encoder_outputs = encoder_outputs
        example = torch.zeros(1, *image_shape)
        self.example_input_array = (example, torch.zeros(1)) if classes else example  # for the model summary
        # A plain dictionary keeps them out of checkpoints and model summaries.
        self.means = {split: EpochMeans() for split in ("train", "val", "test")}
        self.batch_index = 0  # in the current epoch

    @abstractmethod
    def terms(self, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        """Return per-image terms `[batch]` by name: `"loss"` is minimised, all are logged. `labels` are `[batch]`.

        `epoch` is the training progress, with fractions of an epoch.
        """

    def images(self, x: Array) -> Tensor:
        """Convert images to a batch `[batch, *image_shape]` in [0, 1] on the model's device.

        Accepts bytes or floats; a tensor, array or list; one image or many; with or without a channel axis of size 1.
        Raises ShapeError for another shape, and for floats outside [0, 1].
        """
        x = as_tensor(x, "images")
        if self._skips_checks() and x.shape[1:] == self.image_shape and x.is_floating_point():
            return x
        shapes = [self.image_shape, *([self.image_shape[1:]] if self.image_shape[0] == 1 else [])]
        if not any(x.shape[-len(s) :] == s and x.ndim <= len(s) + 1 for s in shapes):
            raise ShapeError(f"images of shape {tuple(x.shape)}: should be {self.image_shape} or a batch of it")
        x = x.to(self.device).reshape(-1, *self.image_shape)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if not ((x >= 0) & (x <= 1)).all():
            raise ShapeError(f"pixels from {x.min():g} to {x.max():g}: should be floats in [0, 1], or uint8 up to 255")
        return x

    def latents(self, z: Array) -> Tensor:
        """Convert a tensor, array or list to latents `[..., latent_dim]` on the model's device. Raises ShapeError."""
        if not isinstance(z, Tensor):
            z = as_tensor(z, "latents")
            if not z.isfinite().all():
                raise ShapeError("latents: some are NaN or infinite")
        z = z.to(self.device, torch.float32)
        if z.shape[-1:] != (self.latent_dim,):
            raise ShapeError(f"latents of shape {tuple(z.shape)}: should end in latent_dim={self.latent_dim}")
        return z

    def label_inputs(self, labels: Array | None, shape: Sequence[int]) -> list[Tensor]:
        """Return the further input of the networks, one-hot labels `[*shape, classes]`; none without classes.

        `labels` may be one label for all, or anything that broadcasts to `shape`. Raises ShapeError for missing labels,
        another shape, and labels that are not integers from 0 to `classes` − 1.
        """
        if not self.classes:
            return []
        allowed = f"a class from 0 to {self.classes - 1} for each image"
        if labels is None:
            raise ShapeError(f"labels: missing; a conditional model needs {allowed}")
        y = as_tensor(labels, "labels").to(self.device)
        one_hot = (y.unsqueeze(-1) == torch.arange(self.classes, device=self.device)).float()
        if not self._skips_checks():
            if y.ndim > len(shape) or any(n not in (1, m) for n, m in zip(y.shape[::-1], shape[::-1], strict=False)):
                raise ShapeError(f"labels of shape {tuple(y.shape)}: should be {tuple(shape)}, {allowed}")
            if not one_hot.any(dim=-1).all():
                raise ShapeError(f"labels from {y.min():g} to {y.max():g}: should be {allowed}")
        return [one_hot.expand(*shape, self.classes)]

    def every_label(self) -> list[int] | list[None]:
        """Return the label of each class; `[None]` if the model has no classes, so that one loop serves both."""
        return list(range(self.classes)) or [None]

    def _skips_checks(self) -> bool:
        """Return whether this is training or tracing, where a check of values would synchronize the device."""
        return self._trainer is not None or torch.compiler.is_compiling()

    def encoded(self, x: Tensor, labels: Array | None = None) -> Tensor:
        """Return encoder outputs `[batch, encoder_outputs]` of images `[batch, *image_shape]`. Raises ConfigError."""
        outputs = self.encoder(x, *self.label_inputs(labels, x.shape[:1]))
        if outputs.shape[1:] != (self.encoder_outputs,):
            raise ConfigError(
                f"model.backbone: its encoder returns {list(outputs.shape)} for {len(x)} images; "
                f"should be [{len(x)}, {self.encoder_outputs}]"
            )
        return outputs

    def decoded(self, z: Array, labels: Array | None = None) -> Tensor:
        """Return decoder outputs `[..., *image_shape]`, float32, of z `[..., latent_dim]`. Raises ConfigError."""
        z = self.latents(z)
        inputs = [z, *self.label_inputs(labels, z.shape[:-1])]
        outputs = self.decoder(*(part.reshape(-1, part.shape[-1]) for part in inputs)).float()
        if outputs.ndim != 4 or outputs.shape[2:] != self.image_shape[1:]:
            raise ConfigError(
                f"model.backbone: its decoder returns {list(outputs.shape)} for {len(outputs)} latents; "
                f"should be {[len(outputs), *self.image_shape]}"
            )
        return outputs.reshape(*z.shape[:-1], *outputs.shape[1:])

    @abstractmethod
    def codes(self, x: Array, labels: Array | None = None) -> Tensor:
        """Return the latent codes of images, `[batch, latent_dim]`: the posterior means of a VAE."""

    @torch.no_grad()
    def all_codes(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return `codes` of many images `[n, *image_shape]`, in batches of 1,000: `[n, latent_dim]`."""
        parts = [None] * -(-len(images) // 1_000) if labels is None else labels.to(self.device).split(1_000)
        pairs = zip(images.split(1_000), parts, strict=True)
        return torch.cat([self.codes(self.images(batch), part) for batch, part in pairs])

    @abstractmethod
    def pictures(self, z: Array, labels: Array | None = None) -> Tensor:
        """Decode z `[..., latent_dim]` to images `[..., *image_shape]` in [0, 1]: the mean of p(x|z) of a VAE."""

    def forward(self, x: Array, labels: Array | None = None) -> Tensor:
        """Return reconstructions of images, `[batch, *image_shape]` in [0, 1]."""
        return self.pictures(self.codes(x, labels), labels)

    @torch.no_grad()
    def reconstruct(self, x: Array, labels: Array | None = None) -> Tensor:
        """Return reconstructions of images, `[batch, *image_shape]` in [0, 1], without gradients."""
        return self(x, labels)

    @torch.no_grad()
    def interpolate(
        self, start: Array, end: Array, steps: int = 10, spherical: bool = False, labels: Array | None = None
    ) -> Tensor:
        """Decode the path from image `start` to image `end`: `[steps, batch, *image_shape]`.

        The path between their codes is a straight line, or the arc of `latents.arc` if `spherical`. A conditional model
        encodes and decodes with `labels` `[batch]`.
        """
        check_count("steps", steps)
        path = arc if spherical else line
        return self.pictures(path(self.codes(start, labels), self.codes(end, labels), steps), labels)

    def share(self) -> Share | None:
        """Return this process's share of the current batch; None if there is only one process."""
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return None
        evaluated = trainer.val_dataloaders if trainer.validating else trainer.test_dataloaders
        return getattr(trainer.train_dataloader if trainer.training else evaluated, "share", None)

    def batch_mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` `[batch]`, scaled for several processes.

        DDP averages gradients over processes. In an uneven last batch some processes have one image fewer, so each
        weights its mean by its share of the images.
        """
        share = self.share()
        return values.mean() if share is None else values.sum() * (share.counts * share.world_size / share.total)

    def count(self, split: str, terms: dict[str, Tensor]) -> None:
        """Add a batch to the means of the epoch."""
        share = self.share()
        self.means[split].update({name: v[:0] for name, v in terms.items()} if share and not share.counts else terms)

    def noise(self, *shape: int) -> Tensor:
        """Draw ε ~ N(0, I) of `shape` `[..., batch, latent_dim]`.

        Several processes make the same draw and take their rows of it, so the number of processes changes no result.
        """
        share = self.share()
        if share is None:
            return torch.randn(*shape, device=self.device)
        *samples, _, latent_dim = shape
        return torch.randn(*samples, share.total, latent_dim, device=self.device)[..., share.rows, :]

    def epochs_trained(self) -> float:
        """Return the training progress in epochs, with fractions, counted in batches; infinite without a trainer."""
        if self._trainer is None:
            return math.inf
        batches = int(self.trainer.num_training_batches)
        return (self.trainer.current_epoch * batches + self.batch_index) / batches

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self.batch_index = batch_index
        loss, terms = self.loss_and_terms(*batch, self.epochs_trained())
        self.count("train", terms)
        return loss

    def loss_and_terms(self, x: Tensor, labels: Tensor, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a training batch and its terms. `trainer.compile` replaces this method during training."""
        terms = self.terms(x, labels, epoch)
        return self.batch_mean(terms["loss"]), terms

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.count("val", self.terms(*batch))

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self.count("test", self.terms(*batch))

    def on_train_epoch_end(self) -> None:
        self._log_means("train")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, split: str) -> None:
        means = self.means[split]
        # The means are over all processes already; without sync_dist Lightning would warn.
        self.log_dict({f"{split}/{term}": value.float() for term, value in means.compute().items()}, sync_dist=True)
        means.reset()

    def configure_optimizers(self) -> Any:
        trainer = self._trainer
        # Lightning cannot clip the gradients of a fused optimizer under mixed precision.
        fused = not (trainer and trainer.gradient_clip_val and "mixed" in str(trainer.precision))
        h = self.hparams
        optimizer = make_optimizer(
            h["optimizer"], self.parameters(), h["learning_rate"], h["weight_decay"], h["decay_biases"], fused
        )
        return optimizer if h["schedule"] is None else ([optimizer], [make_schedule(h["schedule"], optimizer)])
