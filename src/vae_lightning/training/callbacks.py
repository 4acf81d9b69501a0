"""Callbacks of every run: the guards against NaN, the health of the posterior, and figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from vae_lightning import figures
from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt, UserError
from vae_lightning.data.mapped import Images
from vae_lightning.data.pixels import evaluation_pixels
from vae_lightning.models.base import ImageModel
from vae_lightning.models.estimators import active_units, kl_divergence
from vae_lightning.models.posteriors import DiagonalGaussian
from vae_lightning.models.standard_figures import standard_figures
from vae_lightning.models.vae import VAE
from vae_lightning.training.loggers import log_figures, tensorboard_writers

log = logging.getLogger(__name__)


class TrainingError(UserError):
    """Training that cannot continue."""


class NonFiniteGuard(Callback):
    """Stop a run whose loss or weights become NaN or infinite, before a checkpoint is written from it.

    Each check covers all steps since the last one and names the first bad step. A check makes a GPU wait, so it runs
    only at the steps that Lightning logs, at the end of each epoch, and before saving. Raises TrainingError.
    """

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        if trainer.global_step % (trainer.log_every_n_steps or 50) == 0:  # type: ignore[attr-defined]
            self._check(trainer, module, "train")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "train")
        # The loss of a step is that of the weights before it: the last update shows only in the weights.
        for name, weights in module.state_dict().items():  # with the running statistics of batch normalization
            if not weights.isfinite().all():
                self._stop(trainer, f"the weights {name} became NaN or infinite by step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.on_train_epoch_end(trainer, module)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "train")  # whose NaN is the reason
        self._check(trainer, module, "val")

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "test")

    def _check(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        assert isinstance(module, ImageModel)
        found = module.means[split].first_not_finite()
        if not trainer.strategy.reduce_boolean_decision(found is not None, all=False):  # in any process
            return
        term, update = found or ("loss, of another process,", module.means[split].updates - 1)
        together = trainer.accumulate_grad_batches
        step = trainer.current_epoch * -(-int(trainer.num_training_batches) // together) + update // together + 1
        where = f"at step {step}" if split == "train" else f"after step {trainer.global_step}"
        self._stop(trainer, f"{split}/{term} became NaN or infinite {where}")

    def _stop(self, trainer: Trainer, problem: str) -> NoReturn:
        advice = "a lower model.learning_rate, or trainer.gradient_clip_val=1, may help"
        raise TrainingError(f"{problem} (epoch {trainer.current_epoch + 1}); {advice}")


class SkipNonFinite(Callback):
    """Skip updates whose gradient is not finite, and log their number per epoch as `health/skipped`.

    A skipped update changes neither model nor optimizer. The epoch means leave out batches whose terms are not finite.
    Checking each gradient makes a GPU wait at each step. Raises TrainingError after 20 skipped updates in a row.
    """

    IN_A_ROW = 20

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, ImageModel)
        module.means["train"].leave_out_non_finite = True

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if torch.nn.utils.get_total_norm(gradients).isfinite():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        log.warning("the gradient of step %d is not finite; its update is skipped", trainer.global_step + 1)
        if self.in_a_row == self.IN_A_ROW:
            step = trainer.global_step + 1
            raise TrainingError(f"{self.IN_A_ROW} updates in a row were not finite, the last at step {step}")
        for parameter in module.parameters():
            parameter.grad = None  # the optimizer skips parameters without a gradient

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.log("health/skipped", float(self.skipped), sync_dist=True)
        self.skipped = 0


def held_out_images(trainer: Trainer) -> tuple[Images, Tensor]:
    """Return the validation images and labels; without a validation split, the first 2,000 training ones."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data.val_size:
        return data.val_images, data.val_labels
    return evaluation_pixels(data.train_images[:2_000], data.pixels), data.train_labels[:2_000]


class Health(Callback):
    """Log the norm of the gradient, and each epoch the state of the VAE; warn once of posterior collapse.

    The norm, before clipping, is that of the steps that Lightning logs (trainer.log_every_n_steps). Each epoch has
    active units, the largest and smallest KL per dimension, the weight of the KL, and a learnt scale of the likelihood.
    The KL is from N(0, I), in nats, whatever the prior. It is measured on up to 2,000 validation (or training) images,
    which takes about 1 % of an epoch; `vae evaluate` counts active units on the test set. A unit is active if
    Var_x(E_q[z]) > 0.01 (Burda et al. 2016, section 5.2).
    """

    IMAGES = 2_000

    def __init__(self) -> None:
        self.warned = False

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            module.log("health/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, VAE):
            return
        images, labels = (tensor[: self.IMAGES] for tensor in held_out_images(trainer))
        module.eval()
        posterior = module.encode(images, labels.to(module.device))
        module.train()
        active = active_units(posterior.mean)
        metrics: dict[str, float | Tensor | None] = {
            "health/active_units": active.float(),
            "health/kl_weight": module.objective.kl_weight(module, module.epochs_trained()),
            "health/scale": module.likelihood.learnt_scale(),
        }
        if isinstance(posterior, DiagonalGaussian):
            kl = kl_divergence(posterior.mean, posterior.log_variance).mean(dim=0)
            metrics |= {"health/kl_max": kl.max(), "health/kl_min": kl.min()}
            for writer in tensorboard_writers(trainer):
                with suppress(ValueError):  # there is no histogram of NaN or very large values
                    writer.add_histogram("health/kl_per_dimension", kl, trainer.global_step - 1)
        module.log_dict({key: value for key, value in metrics.items() if value is not None}, sync_dist=True)
        if not self.warned and active == 0:
            self.warned = True
            log.warning(
                "The posterior has collapsed: no latent dimension depends on the image after epoch %d. These may help: "
                "model.objective.warmup_epochs=10, model.objective.free_bits=0.1, a smaller model.beta or "
                "model.learning_rate",
                trainer.current_epoch + 1,
            )


@dataclass(eq=False)
class Figures(Callback):
    """Log `standard_figures` every `every` epochs, and write those of the test set into `directory` at the end."""

    directory: Path
    every: NonNegativeInt = 5  # 0: only at the end
    pairs: PositiveInt = 8
    samples: Annotated[Sequence[PositiveInt], Field(min_length=2, max_length=2)] = (8, 8)
    points: Sequence[Sequence[float]] = ()
    embedded: NonNegativeInt = 1_000  # test images whose codes are shown in TensorBoard's projector

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, ImageModel)
        for point in self.points:
            if len(point) != (d := module.latent_dim):
                raise ConfigError(f"figures.points={point}: each point has model.latent_dim={d} coordinates")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, ImageModel)
        if self.every and (trainer.current_epoch + 1) % self.every == 0 and trainer.is_global_zero:
            images, labels = held_out_images(trainer)  # the test set is used only at the end
            drawn = self._drawn(trainer, module, images, labels)
            log_figures(trainer, drawn, trainer.global_step - 1)  # the step of the epoch's metrics

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, ImageModel)
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        images, labels = data.test_images, data.test_labels
        drawn = self._drawn(trainer, module, images, labels)
        log_figures(trainer, {f"test/{name}": figure for name, figure in drawn.items()}, trainer.global_step)
        for name, figure in drawn.items():
            figures.save(figure, self.directory / f"{name}.png")
        for writer in tensorboard_writers(trainer) if self.embedded else ():
            images, labels = images[: self.embedded], labels[: self.embedded]
            codes = module.all_codes(images, labels).cpu()
            codes = pad(codes, (0, max(0, 3 - codes.shape[1])))  # the projector needs three dimensions
            names = [data.class_name(label) or "unlabelled" for label in labels.tolist()]
            shown = figures.displayable(module.images(images).cpu())
            writer.add_embedding(codes, names, shown, trainer.global_step, "codes")

    def _drawn(
        self, trainer: Trainer, module: ImageModel, images: Images, labels: Tensor
    ) -> dict[str, Tensor | Figure]:
        class_name = trainer.datamodule.class_name  # type: ignore[attr-defined]
        return standard_figures(module, images, labels, self.pairs, self.samples, self.points, class_name)
