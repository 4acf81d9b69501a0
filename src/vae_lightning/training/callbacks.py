"""What happens during training, beside the optimization: the guard against NaN, health, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from vae_lightning import figures
from vae_lightning.config import NonNegativeInt, PositiveInt, UserError
from vae_lightning.models.base import ImageModel
from vae_lightning.models.estimators import active_units, kl_divergence
from vae_lightning.models.posteriors import DiagonalGaussian
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training.loggers import boards, log_pictures

log = logging.getLogger(__name__)


class TrainingError(UserError):
    """Training that cannot continue."""


class NonFiniteGuard(Callback):
    """Stops a run whose loss becomes NaN or infinite, before a checkpoint could be written from it.

    A check looks at all steps since the last one, and names the right step. On an accelerator it makes the device wait,
    so there it is at the steps that Lightning logs, and at the end of each epoch. Raises TrainingError.
    """

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        logged = trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        if trainer.strategy.root_device.type == "cpu" or trainer.global_step % logged == 0:
            self._check(trainer, module, "train")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.check_training(trainer, module)

    def check_training(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at all steps so far, and at the weights that they led to."""
        self._check(trainer, module, "train")
        # The loss of a step is that of the weights before it: the last step's update shows in the weights alone.
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                self._stop(trainer, f"the weights {name} became NaN or infinite by step {trainer.global_step}")

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "test")

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "val")

    def _check(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        assert isinstance(module, ImageModel)
        found = module.means[split].first_not_finite()
        if not trainer.strategy.reduce_boolean_decision(found is not None, all=False):  # in any process
            return
        term, update = found or ("loss, of another process,", module.means[split].updates - 1)
        step = trainer.current_epoch * int(trainer.num_training_batches) + update + 1
        where = f"at step {step}" if split == "train" else f"after step {trainer.global_step}"
        self._stop(trainer, f"{split}/{term} became NaN or infinite {where}")

    def _stop(self, trainer: Trainer, what: str) -> NoReturn:
        raise TrainingError(
            f"{what} (epoch {trainer.current_epoch + 1}); {last_good(trainer)}. "
            "A lower model.learning_rate, or trainer.gradient_clip_val=1, may help"
        )


class SkipNonFinite(Callback):
    """Leaves out updates whose gradient is not finite, and says in `train/skipped` how many an epoch had.

    The model and the optimizer stay as they were before the step, and the epoch's means leave the batch out. Looking at
    each gradient makes a GPU wait at each step. Raises TrainingError after too many in a row.
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
        log.warning("the gradient of step %d is not finite; its update is left out", trainer.global_step + 1)
        if self.in_a_row == self.IN_A_ROW:
            raise TrainingError(
                f"{self.IN_A_ROW} updates in a row were not finite, the last at step {trainer.global_step + 1} "
                f"(epoch {trainer.current_epoch + 1}); {last_good(trainer)}"
            )
        for parameter in module.parameters():
            parameter.grad = None  # the optimizer passes over what has no gradient

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.log("train/skipped", float(self.skipped), sync_dist=True)
        self.skipped = 0


def last_good(trainer: Trainer) -> str:
    """What is kept of a run that cannot continue, in words."""
    checkpoint = RunDirectory(trainer.default_root_dir).last_checkpoint
    return f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"


class Health(Callback):
    """Active units and the largest and smallest KL of a dimension, each epoch; one warning if the posterior collapsed.

    The KL is from N(0, I), in nats, whatever the prior. Measured on up to 2,000 held-out (or training) images, so that
    it costs about a hundredth of an epoch; evaluate.py counts active units over the whole test set. Active:
    Var_x(E_q[z]) > 0.01 (Burda et al. 2016, section 5.2).
    """

    IMAGES = 2_000

    def __init__(self) -> None:
        self.warned = False

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, VAE):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        split = "val" if data.val_size else "train"
        images, labels = (getattr(data, f"{split}_{what}")[: self.IMAGES] for what in ("images", "labels"))
        module.eval()
        posterior = module.encode(images, labels.to(module.device))
        module.train()
        active = active_units(posterior.mean)
        figures = {"active_units": active.float()}
        if isinstance(posterior, DiagonalGaussian):
            kl = kl_divergence(posterior.mean, posterior.log_variance).mean(dim=0)
            figures |= {"kl_max": kl.max(), "kl_min": kl.min()}
            for board in boards(trainer):
                board.add_histogram("health/kl_per_dimension", kl, trainer.global_step)
        module.log_dict({f"health/{name}": value for name, value in figures.items()}, sync_dist=True)
        if not self.warned and active == 0:
            self.warned = True
            log.warning(
                "The posterior has collapsed: no latent dimension depends on the image after epoch %d. What may help: "
                "model.objective.warmup_epochs=10, model.objective.free_bits=0.1, a smaller model.beta or "
                "model.learning_rate",
                trainer.current_epoch + 1,
            )


class Figures(Callback):
    """Pictures for the loggers every `every` epochs (0: never), and of the test set into `figures/` at the end.

    `pairs` originals above their reconstructions; `samples` = [rows, columns] of prior samples, from one fixed z so
    that epochs compare; `points` to decode; with two latent dimensions also the posterior means and the manifold. The
    codes of `embedded` test images go into TensorBoard's projector at the end, with their pictures.
    """

    def __init__(
        self,
        directory: Path,
        every: NonNegativeInt = 5,
        pairs: PositiveInt = 8,
        samples: Annotated[Sequence[PositiveInt], Field(min_length=2, max_length=2)] = (8, 8),
        points: Sequence[Sequence[float]] = (),
        embedded: NonNegativeInt = 1_000,
    ) -> None:
        self.directory = directory
        self.every = every
        self.pairs = pairs
        self.samples = samples
        self.points = points
        self.embedded = embedded

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if not self.every or epoch % self.every or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        # The test set waits for the end: pictures on the way are of held-out images, or else of training images.
        split = "val" if data.val_size else "train"
        log_pictures(trainer, self.draw(module, getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")))

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.directory.mkdir(exist_ok=True)
        pictures = self.draw(module, data.test_images, data.test_labels)
        log_pictures(trainer, {f"test/{name}": picture for name, picture in pictures.items()})
        for name, picture in pictures.items():
            figures.save(picture, self.directory / f"{name}.png")
        if self.embedded:
            assert isinstance(module, ImageModel)
            images, labels = data.test_images[: self.embedded], data.test_labels[: self.embedded]
            for board in boards(trainer):
                codes = module.all_codes(images, labels).cpu()
                codes = pad(codes, (0, max(0, 3 - codes.shape[1])))  # the projector draws nothing in fewer dimensions
                board.add_embedding(codes, labels.tolist(), module.images(images).cpu(), trainer.global_step, "codes")

    @torch.inference_mode()
    def draw(self, module: LightningModule, images: Tensor, labels: Tensor) -> dict[str, Tensor | Figure]:
        """The pictures of a model, by name; `images` are bytes `[n, channels, height, width]`."""
        assert isinstance(module, ImageModel)
        was_training = module.training
        module.eval()
        x, labels = module.images(images[: self.pairs]), labels.to(module.device)
        pictures: dict[str, Tensor | Figure] = {
            "reconstructions": figures.reconstruction_grid(x, module.reconstruct(x, labels[: self.pairs]))
        }
        if isinstance(module, VAE):
            rows, columns = self.samples
            with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
                torch.manual_seed(0)
                pictures["samples"] = figures.image_grid(module.sample(rows * columns), columns)
        if self.points:
            pictures["points"] = figures.image_grid(module.pictures(self.points), len(self.points))
        if module.latent_dim == 2:
            codes = module.all_codes(images[:10_000], labels[:10_000])
            pictures["scatter"] = figures.latent_scatter(codes, labels[:10_000])
            if isinstance(module, VAE):
                center, spread = module.prior_moments()
                pictures["manifold"] = figures.manifold_grid(
                    lambda z: module.pictures(center + spread * z.to(center.device))
                )
        module.train(was_training)
        return pictures
