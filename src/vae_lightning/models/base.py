"""The base class of all models: networks, steps, exact epoch means and the optimizer.

A model defines `terms(x, labels, epoch)`, the loss of each image. The rest of training is the same for all models.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vae_lightning.config import ConfigError, ImageShape, PositiveInt, as_spec
from vae_lightning.data.mapped import Images, sampled
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import Share
from vae_lightning.models.backbones import Networks, Pair, is_pair, make_backbone
from vae_lightning.models.conditional import ConditionalDecoder, ConditionalEncoder
from vae_lightning.models.inputs import (
    Array,
    as_images,
    as_labels,
    as_latents,
    check_batch,
    check_count,
    check_image_shape,
    images_and_labels,
)
from vae_lightning.models.inputs import ShapeError as ShapeError  # part of this module's interface
from vae_lightning.models.latents import arc, line
from vae_lightning.models.metrics import EpochMeans
from vae_lightning.models.optimization import check_lengths, make_optimizer, make_schedule, run_length
from vae_lightning.models.posteriors import PosteriorDistribution

ENOUGH_IMAGES = 10_000  # to initialize from, of a loader


class ImageModel(LightningModule, ABC):
    """A model of images, trained on `terms(…)["loss"]`. Each epoch it logs the mean over images of every term.

    `backbone` is a class, a `functools.partial` of one, a spec `{"_target_": class, argument: value}`, or a pair of
    modules; its encoder has `encoder_outputs` outputs, and its decoder `output_channels` per pixel, by default as many
    as the images. With `classes`, the model is conditional: both networks get the label of the image, an integer from 0
    to `classes` − 1.
    A subclass calls `save_settings` in its constructor, so that a checkpoint can rebuild the model. The settings of the
    optimizer are optimizer, schedule, learning_rate, weight_decay and decay_biases.
    Raises ConfigError if an argument is invalid.
    """

    needs_images = False  # True: `initialize` is called before the first step

    # Set by load_run:
    config: dict[str, Any]  # the configuration of the run
    protocol: dict[str, str]  # data.name and data.pixels of the checkpoint

    def __init__(
        self,
        latent_dim: PositiveInt,
        encoder_outputs: PositiveInt,
        backbone: Networks,
        image_shape: ImageShape,
        classes: int | None = None,
        output_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_count("latent_dim", latent_dim)
        check_image_shape(image_shape)
        self.latent_dim = latent_dim
        self.image_shape = tuple(image_shape)
        self.classes = classes or 0
        self.output_shape = (output_channels or image_shape[0], *self.image_shape[1:])
        inputs, outputs = latent_dim + self.classes, self.output_shape[0]
        networks = make_backbone(backbone, inputs, encoder_outputs, self.image_shape, outputs)
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
        self.initial_weights: dict[str, Tensor] = {}  # of another run, to start the next fit from
        self.batch_index = 0  # in the current epoch
        self.schedule_length: int | None = None  # of the run, in the unit of its schedule
        self.checked: set[str] = set()  # splits whose first batch is checked, in the current fit

    def save_settings(self, **parts: Networks | None) -> None:
        """Save the arguments of the calling constructor as hyperparameters, and `parts`, which are arguments, as specs.

        Raises ConfigError for a part that is neither a spec, a class, a partial nor a pair of modules.
        """
        caller: Any = inspect.currentframe()
        self.save_hyperparameters(ignore=[*parts], frame=caller.f_back, logger=False)
        for name, part in parts.items():
            self.hparams[name] = Pair.NOT_STORED if is_pair(part) else part and as_spec(part, f"model.{name}")

    @abstractmethod
    def terms(self, x: Tensor, labels: Tensor | None = None, epoch: float = math.inf) -> dict[str, Tensor]:
        """Return per-image terms `[batch]` by name: `"loss"` is minimised, all are logged. `labels` are `[batch]`.

        `epoch` is the training progress, with fractions of an epoch.
        """

    def images(self, x: Array) -> Tensor:
        """Convert images to a batch `[batch, *image_shape]` in [0, 1] on the model's device, as `as_images` does."""
        return as_images(x, self.image_shape, self.device)

    def latents(self, z: Array) -> Tensor:
        """Convert a tensor, array or list to latents `[..., latent_dim]` on the model's device. Raises ShapeError."""
        return as_latents(z, self.latent_dim, self.device)

    def image_inputs(self, x: Array, labels: Array | None) -> tuple[Tensor, Tensor | None]:
        """Convert images, and labels that broadcast to `[batch]`, to what `…_given` take. Raises ShapeError."""
        x = self.images(x)
        return x, as_labels(labels, self.classes, x.shape[:1], self.device)

    def latent_inputs(self, z: Array, labels: Array | None) -> tuple[Tensor, Tensor | None]:
        """Convert latents `[..., latent_dim]` and labels that broadcast to `[...]` likewise. Raises ShapeError."""
        z = self.latents(z)
        return z, as_labels(labels, self.classes, z.shape[:-1], self.device)

    def every_label(self) -> list[int] | list[None]:
        """Return the label of each class; `[None]` if the model has no classes, so that one loop serves both."""
        return list(range(self.classes)) or [None]

    def encoded(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return encoder outputs `[batch, encoder_outputs]` of images `[batch, *image_shape]`. Raises ConfigError."""
        outputs = self.encoder(x, *self.one_hot(labels, x.shape[:1]))
        if outputs.shape[1:] != (self.encoder_outputs,):
            raise ConfigError(
                f"model.backbone: its encoder returns {list(outputs.shape)} for {len(x)} images; "
                f"should be [{len(x)}, {self.encoder_outputs}]"
            )
        return outputs

    def decoded(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return decoder outputs `[..., *output_shape]`, float32, of z `[..., latent_dim]`. Raises ConfigError."""
        inputs = [z, *self.one_hot(labels, z.shape[:-1])]
        outputs = self.decoder(*(part.reshape(-1, part.shape[-1]) for part in inputs)).float()
        if outputs.shape[1:] != self.output_shape:
            raise ConfigError(
                f"model.backbone: its decoder returns {list(outputs.shape)} for {len(outputs)} latents; "
                f"should be {[len(outputs), *self.output_shape]}"
            )
        return outputs.reshape(*z.shape[:-1], *outputs.shape[1:])

    def one_hot(self, labels: Tensor | None, shape: Sequence[int]) -> list[Tensor]:
        """Return the further input of the networks, one-hot labels `[*shape, classes]`; none without classes."""
        if not self.classes or labels is None:
            return []
        one_hot = labels.unsqueeze(-1) == torch.arange(self.classes, device=labels.device)
        return [one_hot.float().expand(*shape, self.classes)]

    @abstractmethod
    def codes_given(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the codes of images `[batch, *image_shape]` and labels `[batch]`, both unchecked."""

    @abstractmethod
    def decode_images_given(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images of z `[..., latent_dim]` and labels that broadcast to `[...]`, both unchecked."""

    def codes(self, x: Array, labels: Array | None = None) -> Tensor:
        """Return the latent codes of images, `[batch, latent_dim]`: the posterior means of a VAE."""
        return self.codes_given(*self.image_inputs(x, labels))

    def decode_images(self, z: Array, labels: Array | None = None) -> Tensor:
        """Decode z `[..., latent_dim]` to images `[..., *image_shape]` in [0, 1]: the mean of p(x|z) of a VAE."""
        return self.decode_images_given(*self.latent_inputs(z, labels))

    @torch.no_grad()
    def all_codes(self, images: Images, labels: Tensor | None = None) -> Tensor:
        """Return `codes` of many images `[n, *image_shape]`, in batches of 1,000: `[n, latent_dim]`."""
        parts = [None] * -(-len(images) // 1_000) if labels is None else labels.to(self.device).split(1_000)
        pairs = zip(images.split(1_000), parts, strict=True)
        return torch.cat([self.codes(batch, part) for batch, part in pairs])

    def forward(self, x: Array, labels: Array | None = None) -> Tensor:
        """Return reconstructions of images, `[batch, *image_shape]` in [0, 1]."""
        return self.decode_images(self.codes(x, labels), labels)

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
        return self.decode_images(path(self.codes(start, labels), self.codes(end, labels), steps), labels)

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

    def noise_for(self, q: PosteriorDistribution, samples: int | None = None) -> Tensor:
        """Draw ε ~ N(0, I): `[batch, noise_dim]`, or `[samples, batch, noise_dim]`."""
        sample_axis = () if samples is None else (samples,)
        return self.noise(*sample_axis, *q.batch_shape, q.noise_dim)

    def reparameterize(self, q: PosteriorDistribution, samples: int | None = None) -> Tensor:
        """Sample z = mean + σ ε, differentiable in both: `[batch, latent_dim]`, or `[samples, batch, latent_dim]`."""
        return q.transform(self.noise_for(q, samples))

    def epochs_trained(self) -> float:
        """Return the training progress in epochs, with fractions, counted in batches; infinite without a trainer."""
        if self._trainer is None:
            return math.inf
        batches = self.trainer.num_training_batches
        if math.isinf(batches):  # of a loader without a length
            return float(self.trainer.current_epoch)
        return (self.trainer.current_epoch * batches + self.batch_index) / batches

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return images and labels of a batch: `images`, `(images,)` or `(images, labels)`; None without labels.

        Override this method for other batches, such as longer tuples or dictionaries. Raises ShapeError for them.
        """
        return images_and_labels(batch)

    def check_batch(self, x: Tensor, labels: Tensor | None) -> None:
        """Raise ShapeError unless a batch is floats `[batch, *image_shape]` in [0, 1], with labels if conditional."""
        check_batch(x, labels, self.image_shape, self.classes)

    def prepared(self, batch: Any, split: str) -> tuple[Tensor, Tensor | None]:
        """Unpack a batch: images in [0, 1] and labels. The first batch of a split is checked, once per fit."""
        x, labels = self.unpack(batch)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if split not in self.checked:
            self.check_batch(x, labels)
            self.checked.add(split)
        return x, labels

    def initialize(self, images: Tensor) -> None:
        """Initialize from training images `[n, *image_shape]`, uint8 on the CPU, if `needs_images`."""

    def training_images(self) -> Tensor:
        """Return training images, uint8 on the CPU: all of an ImageDataModule, or up to 10,000 of a file or loader."""
        if isinstance(data := self.trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            return sampled(data.train_images)
        self.trainer.fit_loop.setup_data()  # Lightning would do so later
        loader: Any = self.trainer.train_dataloader
        if getattr(loader, "persistent_workers", False):  # they serve one iterator, which is Lightning's
            loader = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
        found: list[Tensor] = []
        for batch in loader:
            found.append((255 * self.prepared(batch, "train")[0]).round().to("cpu", torch.uint8))
            if len(found) * len(found[0]) >= ENOUGH_IMAGES:
                break
        return torch.cat(found)

    def on_fit_start(self) -> None:
        """Initialize from training images and `initial_weights`, unless the run is resumed or the model was loaded."""
        self.checked.clear()
        if self.needs_images and not self.trainer.ckpt_path:
            self.initialize(self.training_images())
            if self.trainer.world_size > 1:  # processes may have different images and random numbers
                self.load_state_dict(self.trainer.strategy.broadcast(self.state_dict()))
        self.load_state_dict(self.initial_weights, strict=False)
        self.needs_images, self.initial_weights = False, {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["_target_"] = f"{type(self).__module__}.{type(self).__qualname__}"  # for load_run
        checkpoint["schedule_length"] = self.schedule_length

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Do not initialize again, and keep the length of the schedule, also in a run that is trained for longer."""
        self.needs_images = False
        self.schedule_length = checkpoint.get("schedule_length")

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        self.batch_index = batch_index
        loss, terms = self.loss_and_terms(*self.prepared(batch, "train"), self.epochs_trained())
        self.count("train", terms)
        return loss

    def loss_and_terms(self, x: Tensor, labels: Tensor | None, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a training batch and its terms. `trainer.compile` replaces this method during training."""
        terms = self.terms(x, labels, epoch)
        return self.batch_mean(terms["loss"]), terms

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.count("val", self.terms(*self.prepared(batch, "val")))

    def test_step(self, batch: Any, batch_index: int) -> None:
        self.count("test", self.terms(*self.prepared(batch, "test")))

    def predict_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the codes of a batch, `[batch, latent_dim]`."""
        return self.codes_given(*self.prepared(batch, "predict"))

    def on_train_epoch_end(self) -> None:
        self._log_means("train")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def summary(self, split: str) -> dict[str, Tensor]:
        """Return the metrics of an epoch: the mean over images of each term."""
        return self.means[split].compute()

    def _log_means(self, split: str) -> None:
        # The means are over all processes already; without sync_dist Lightning would warn.
        self.log_dict({f"{split}/{term}": value.float() for term, value in self.summary(split).items()}, sync_dist=True)
        self.means[split].reset()

    def configure_optimizers(self) -> Any:
        trainer = self._trainer
        # Lightning cannot clip the gradients of a fused optimizer under mixed precision.
        fused = not (trainer and trainer.gradient_clip_val and "mixed" in str(trainer.precision))
        h, rate = self.hparams, self.hparams["learning_rate"]
        optimizer = make_optimizer(h["optimizer"], self.parameters(), rate, h["weight_decay"], h["decay_biases"], fused)
        if h["schedule"] is None:
            return optimizer
        if trainer and not trainer.ckpt_path:
            self.schedule_length = run_length(trainer, h["schedule"].get("interval", "epoch"))
        return [optimizer], [make_schedule(h["schedule"], optimizer, rate, self.schedule_length, trainer)]

    def on_train_start(self) -> None:
        check_lengths(self.trainer, self.hparams.get("objective") or {})
