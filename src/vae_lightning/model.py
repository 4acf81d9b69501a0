"""What every model here shares: the steps, exact epoch means, and the optimizer.

A model says what an image costs, `terms(x)`; the rest of training is the same for all.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vae_lightning.config import NonNegative, Positive, Spec, build
from vae_lightning.metrics import EpochMeans

Batch = tuple[Tensor, Tensor]  # images [batch, channels, height, width] in [0, 1], labels [batch]


class ImageModel(LightningModule):
    """A model of images, trained on `terms(x)["loss"]`, which logs the mean over images of every term each epoch."""

    encoder: nn.Module
    decoder: nn.Module

    def __init__(
        self, learning_rate: Positive = 1e-3, weight_decay: NonNegative = 0.0, schedule: Spec | None = None
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        # In a plain dictionary: they hold no weights, and do not belong in checkpoints and model summaries.
        self.means = {split: EpochMeans() for split in ("train", "val", "test")}

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """Per-image figures `[batch]` by name; `"loss"` is minimised, all are logged."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images `[batch, *image_shape]` in [0, 1], through the model and back: the same shape."""
        return self(x)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        terms = self.terms(batch[0])
        self.means["train"].update(terms)
        return terms["loss"].mean()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.means["val"].update(self.terms(batch[0]))

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self.means["test"].update(self.terms(batch[0]))

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
