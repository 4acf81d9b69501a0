"""The package without Hydra: parts as classes, any loader, Lightning's own Trainer, evaluation and comparison."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MLP as SMALL
from conftest import ROOT
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import vae_lightning
from vae_lightning import (
    IWAE,
    MLP,
    VAE,
    Autoencoder,
    Conv,
    GaussianLikelihood,
    GaussianPosterior,
    ImageModel,
    MixturePrior,
    ResidualConv,
    VampPrior,
    compare,
    evaluate,
    load_run,
)
from vae_lightning.config import UserError
from vae_lightning.models.inputs import ShapeError
from vae_lightning.runs.directory import RunError
from vae_lightning.runs.loading import open_run

IMAGES = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
SHAPE = (1, 8, 8)
TINY = partial(MLP, hidden=(8,))


def trainer(directory: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=1, accelerator="cpu", default_root_dir=directory, **quiet, **options)


def pair(latent_dim: int = 3) -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2 * latent_dim))
    return encoder, nn.Sequential(nn.Linear(latent_dim, 64), nn.Unflatten(1, SHAPE))


class Mine(LightningDataModule):
    """A data module that knows nothing of this package."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(IMAGES, 16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(IMAGES, 16)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class Named(VAE):
    """Batches that are dictionaries."""

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return batch["image"], batch.get("label")


def test_every_name_of_the_package_is_listed_and_can_be_imported() -> None:
    names = set(vae_lightning.__all__)
    assert names <= set(dir(vae_lightning))
    assert {getattr(vae_lightning, name).__name__ for name in names} >= names - {
        "GaussianLikelihood",
        "GaussianPosterior",
        "MNISTDataModule",
    }
    checked = (ROOT / "src" / "vae_lightning" / "__init__.py").read_text().partition("if TYPE_CHECKING")[2]
    assert names == {line.split()[-1] for line in checked.splitlines() if " as " in line}, "those of the type checker"
    page = (ROOT / "docs" / "reference" / "package.md").read_text()
    assert all(f"`{name}`" in page for name in names)


@pytest.mark.parametrize("start", [{}, {"prior": partial(VampPrior, pseudo_inputs=5), "data_bias": True}])
@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        IMAGES.float() / 255,
        TensorDataset(IMAGES),
        TensorDataset(IMAGES, LABELS),
        Endless(),
        Mine(),
        [{"image": x} for x in IMAGES],
    ],
    ids=["bytes", "floats", "one", "labels", "endless", "module", "dictionary"],
)
def test_any_loader_trains_tests_and_predicts(data: Any, start: dict[str, Any], tmp_path: Path) -> None:
    loader = data if isinstance(data, Mine) else DataLoader(data, 16)
    vae = (Named if isinstance(data, list) else VAE)(3, TINY, image_shape=SHAPE, **start)
    fit = trainer(tmp_path, enable_checkpointing=False)
    fit.fit(vae, loader)
    assert fit.callback_metrics["train/loss"].isfinite()
    loader = DataLoader(IMAGES, 16) if isinstance(data, Mine) else loader
    codes = torch.cat(fit.predict(vae, loader))
    torch.testing.assert_close(codes, vae.codes(IMAGES))
    assert fit.test(vae, loader, verbose=False)[0]["test/elbo"] < 0


def test_pseudo_inputs_start_at_images_of_the_loader_once(tmp_path: Path) -> None:
    vae = VAE(3, TINY, prior=partial(VampPrior, pseudo_inputs=5), image_shape=SHAPE, learning_rate=1e-12)
    trainer(tmp_path, enable_checkpointing=False).fit(vae, DataLoader(IMAGES, 16))
    found = vae.prior.pseudo_inputs.detach().clone()
    assert all((x - IMAGES / 255).abs().amax(dim=(1, 2, 3)).min() < 1e-6 for x in found)
    trainer(tmp_path, enable_checkpointing=False).fit(vae, DataLoader(IMAGES, 16))
    torch.testing.assert_close(vae.prior.pseudo_inputs.detach(), found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDataset(IMAGES, LABELS, IMAGES), r"batch of \(Tensor, Tensor, Tensor\): should be images.*`unpack`"),
        ([{"image": x} for x in IMAGES], "batch of dict: should be images.*`unpack`"),
        (IMAGES.flatten(1), r"\(16, 64\): training needs images \(batch, 1, 8, 8\), uint8 or floats"),
        (IMAGES.long(), "batch of torch.int64"),
        (IMAGES.float(), "pixels from 0 to 255: should be floats in"),
    ],
)
def test_other_batches_are_refused_before_the_first_step(data: Any, message: str, tmp_path: Path) -> None:
    for loaders in ({"train_dataloaders": DataLoader(data, 16)}, {"val_dataloaders": DataLoader(data, 16)}):
        with pytest.raises(ShapeError, match=message):
            trainer(tmp_path, enable_checkpointing=False).fit(
                VAE(3, TINY, image_shape=SHAPE), **({"train_dataloaders": DataLoader(IMAGES)} | loaders)
            )


def test_a_conditional_model_needs_labels(tmp_path: Path) -> None:
    vae = VAE(3, TINY, conditional=True, classes=3, image_shape=SHAPE)
    with pytest.raises(ShapeError, match="labels: missing; a conditional model needs a class from 0 to 2"):
        trainer(tmp_path, enable_checkpointing=False).fit(vae, DataLoader(IMAGES, 16))
    trainer(tmp_path, enable_checkpointing=False).fit(vae, DataLoader(TensorDataset(IMAGES, LABELS), 16))


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (VAE, {"backbone": TINY, "prior": MixturePrior, "likelihood": partial(GaussianLikelihood, learn_scale=True)}),
        (VAE, {"backbone": Conv, "posterior": GaussianPosterior, "objective": partial(IWAE, samples=3)}),
        (VAE, {"backbone": SMALL, "optimizer": torch.optim.AdamW, "prior": partial(VampPrior, pseudo_inputs=5)}),
        (Autoencoder, {"backbone": TINY, "schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=1)}),
        (Named, {"backbone": TINY}),
    ],
)
def test_a_plain_checkpoint_loads(model: type[ImageModel], parts: dict[str, Any], tmp_path: Path) -> None:
    saved = model(3, image_shape=SHAPE, **parts)
    data = [{"image": x} for x in IMAGES] if model is Named else IMAGES
    trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, "mine")]).fit(saved, DataLoader(data, 16))
    for loaded in (model.load_from_checkpoint(tmp_path / "mine.ckpt").eval(), load_run(tmp_path / "mine.ckpt")):
        assert type(loaded) is model
        assert not loaded.needs_images
        torch.testing.assert_close(loaded.reconstruct(IMAGES), saved.eval().reconstruct(IMAGES))
    assert all("_target_" in loaded.hparams[name] for name in parts)
    with pytest.raises(RunError, match="not a run directory"):  # which the commands need
        open_run(tmp_path / "mine.ckpt")


def test_a_pair_of_modules_is_given_again(tmp_path: Path) -> None:
    saved = VAE(3, pair(), image_shape=SHAPE)
    trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, "mine")]).fit(saved, DataLoader(IMAGES, 16))
    loaded = VAE.load_from_checkpoint(tmp_path / "mine.ckpt", backbone=pair()).eval()
    torch.testing.assert_close(loaded.reconstruct(IMAGES), saved.eval().reconstruct(IMAGES))
    for load in (VAE.load_from_checkpoint, load_run):
        with pytest.raises(UserError, match=r"was a pair of modules.*backbone=\(encoder, decoder\)\)$"):
            load(tmp_path / "mine.ckpt")


def test_other_checkpoints_are_not_loaded(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(RunError, match=r"other\.ckpt: has no config.yaml beside it; load it with VAE.load_from_ch"):
        load_run(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (784,)}, r"image_shape=\(784,\): should be \(channels, height, width\), such as"),
        ({"image_shape": 784}, r"image_shape=784: should be \(channels"),
        ({"image_shape": (1, 28, 0)}, r"image_shape=\(1, 28, 0\): should be \(channels"),
        ({"latent_dim": 0}, "latent_dim=0: should be a positive integer"),
        ({"image_shape": (1, 8, 9), "backbone": ResidualConv}, r"model\.backbone\.channels=.*sides divisible by 4"),
        ({"backbone": pair()}, r"model\.backbone: its encoder does not take shape \(2, 1, 28, 28\)"),
        ({"backbone": pair(), "image_shape": SHAPE}, r"model\.backbone: its decoder does not take shape \(2, 20\)"),
        ({"prior": MixturePrior(3)}, r"^model\.prior=MixturePrior\(\): should be a class, functools\.partial"),
        ({"prior": partial(MixturePrior, 3)}, r"^model\.prior=.*should be a class, functools\.partial\(class, arg"),
        ({"prior": MLP}, r"^model\.prior\._target_=MLP: must be a subclass of vae_lightning\.models\.priors\.Prior"),
        ({"prior": partial(MixturePrior, component=3)}, r"model\.prior\.component=3: no such key; did you mean comp"),
        ({"optimizer": "adam"}, r"^model\.optimizer=adam: should be a class"),
    ],
)
def test_wrong_arguments_take_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        VAE(**arguments)
    assert "\n" not in str(error.value)


def test_evaluate_and_compare() -> None:
    one, two = (VAE(d, TINY, image_shape=SHAPE) for d in (2, 3))
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 16)
    ours, baseline = (evaluate(vae, loader, samples=20) for vae in (one, two))
    assert one.training
    assert ours["log_likelihood"].shape == (40,)
    assert ours["nll"] == pytest.approx(-ours["log_likelihood"].mean().item())
    assert "cross-entropies" in ours["remark"]
    difference = compare(ours, baseline)
    assert difference.mean == pytest.approx(baseline["nll"] - ours["nll"], abs=1e-4)
    assert difference.low < difference.mean < difference.high
    assert compare(ours["log_likelihood"], baseline["log_likelihood"]) == difference
    for other, message in [
        (evaluate(two, loader, samples=10), "samples: 20 and 10; evaluate both models with the same number"),
        (evaluate(two, DataLoader(IMAGES[1:], 16), samples=20), "images_sha256: .* without shuffling"),
        (ours["log_likelihood"][:5], r"shape \(40,\) and \(5,\): should be two of the same shape \[images\]"),
    ]:
        with pytest.raises(UserError, match=message):
            compare(ours, other)


TWO_PROCESSES = """
import torch
from functools import partial
from lightning import Trainer
from torch.utils.data import DataLoader
from vae_lightning import VAE, MLP, VampPrior

if __name__ == "__main__":
    images = torch.randint(256, (70, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prior = partial(VampPrior, pseudo_inputs=5)
    vae = VAE(3, partial(MLP, hidden=(8,)), prior=prior, data_bias=True, image_shape=(1, 8, 8))
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, enable_progress_bar=False)
    trainer.fit(vae, DataLoader(images, 16, shuffle=True), DataLoader(images, 16))
    weights = torch.cat([p.flatten() for p in vae.parameters()]).detach()
    both = trainer.strategy.all_gather(weights)
    assert torch.equal(both[0], both[1]), "the processes have different weights"
    print(trainer.global_step, "steps", trainer.callback_metrics["val/elbo"].item())
"""


@pytest.mark.proof
def test_a_plain_trainer_with_two_processes(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, "two.py"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "6 steps" in done.stdout
