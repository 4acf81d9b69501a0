import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BRIEF, DATA, SMALL, checkpoint, events, history
from lightning.pytorch import Callback, Trainer

from vae_lightning import figures
from vae_lightning.config import ConfigError
from vae_lightning.data.torchvision_sets import MNISTDataModule, load_images
from vae_lightning.figures import loss_curves, overview
from vae_lightning.models.vae import ELBO, VAE
from vae_lightning.runs.loading import load_run
from vae_lightning.training.callbacks import TrainingError
from vae_lightning.training.train import train

QUICK = [
    *("trainer.limit_train_batches=5", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2"),
    *("model.backbone.hidden=[16]", "figures.embedded=0", "figures.samples=[2,2]"),
]


def test_a_real_epoch_on_real_mnist(config, tmp_path: Path) -> None:
    overrides = ["model.backbone.hidden=[400]", "data.val_size=0", "trainer.max_epochs=1", "figures.every=0"]
    metrics = train(config(*overrides), tmp_path / "run")
    assert metrics["test/loss"] < 132  # about 127 after one epoch; an untrained model has about 550
    assert metrics["test/elbo"] == pytest.approx(-metrics["test/loss"], abs=1e-3)
    assert metrics["test/reconstruction"] + metrics["test/kl"] == pytest.approx(metrics["test/loss"], abs=1e-3)
    assert 10 < metrics["test/kl"] < 40
    assert metrics["epochs"] == 1
    assert metrics["steps"] == math.ceil(60_000 / 128)


def test_the_run_directory_is_complete(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "loss_curves", loss_curves)  # without the short cuts of conftest.py
    monkeypatch.setattr(figures, "overview", overview)
    directory = tmp_path / "run"
    overrides = ["model.latent_dim=2", "trainer.max_epochs=2", "figures.every=1", "figures.points=[[0.5, 0]]", *QUICK]
    overrides += ["figures.embedded=1000", "figures.samples=[8,8]"]
    composed = config(*overrides)
    returned = train(composed, directory)

    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints", "config.yaml", "environment.json", "figures", "history.csv", "metrics.json", "tensorboard",
        "train.log",
    ]  # fmt: skip
    assert yaml.safe_load((directory / "config.yaml").read_text()) == composed
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics == returned
    assert {"test/loss", "test/elbo", "test/reconstruction", "test/kl", "seconds", "parameters"} <= set(metrics)
    assert {key: metrics[key] for key in ("pixels", "data", "epochs", "latent_dim", "seed", "checkpoint")} == {
        "pixels": "grey", "data": "MNIST", "epochs": 2, "latent_dim": 2, "seed": 0, "checkpoint": "best",
    }  # fmt: skip
    assert "cross-entropies, not likelihoods" in metrics["remark"]
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["parameters"] == environment["encoder_parameters"] + environment["decoder_parameters"]
    assert torch.__version__.startswith(environment["versions"]["torch"])
    rows = history(directory)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for split in ("train", "val"):
        for row in rows:
            loss, reconstruction, kl = (float(row[f"{split}/{term}"]) for term in ("loss", "reconstruction", "kl"))
            assert loss == pytest.approx(reconstruction + kl, rel=1e-5)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    drawn = {path.stem for path in (directory / "figures").glob("*.png")}
    assert drawn == {"reconstructions", "samples", "points", "manifold", "scatter", "loss_curves", "overview"}

    board = events(directory)
    wanted = {f"{split}/{term}" for split in ("train", "val", "test") for term in ("loss", "reconstruction", "kl")}
    assert wanted <= set(board.Tags()["scalars"])
    assert {"reconstructions", "samples", "points", "manifold", "scatter"} <= set(board.Tags()["images"])
    assert len(board.Images("samples")) == 2
    assert len(board.Histograms("health/kl_per_dimension")) == 2
    assert "config/text_summary" in board.Tags()["tensors"]
    (projector,) = directory.glob("tensorboard/*/codes/tensors.tsv")
    assert len(projector.read_text().splitlines()) == 1_000
    assert (projector.parent / "sprite.png").exists()
    assert "latent_dim: 2" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    hparams = [tag for tag in board.summary_metadata if tag.startswith("_hparams_")]
    assert "_hparams_/session_start_info" in hparams


def test_best_is_the_checkpoint_of_lowest_validation_loss(config, tmp_path: Path) -> None:
    # A learning rate that explodes after the first epoch: the best checkpoint is that epoch's, and the test uses it.
    schedule = "model.schedule={_target_: torch.optim.lr_scheduler.MultiStepLR, milestones: [1], gamma: 1e6}"
    directory = tmp_path / "run"
    metrics = train(
        config("trainer.max_epochs=2", "trainer.limit_train_batches=20", "model.backbone.hidden=[32]", schedule),
        directory,
    )
    rows = history(directory)
    assert [float(row["lr-Adam"]) for row in rows] == [1e-3, 1e3]
    assert float(rows[0]["val/loss"]) * 2 < float(rows[1]["val/loss"])
    assert metrics["test/loss"] == pytest.approx(float(rows[0]["val/loss"]), rel=0.05)
    assert checkpoint(directory, "best")["epoch"] == 0
    assert checkpoint(directory)["epoch"] == 2  # the next


def test_health_is_logged_each_epoch_with_one_warning_of_a_collapse(config, tmp_path: Path, caplog) -> None:
    overrides = ["trainer.max_epochs=2", "model.beta=1e4", "model.latent_dim=3", "trainer.limit_train_batches=200"]
    overrides += ["model.backbone.hidden=[64]"]
    train(config(*overrides, "data.val_size=1000", "trainer.limit_test_batches=1"), tmp_path / "collapsed")
    rows = history(tmp_path / "collapsed")
    assert [float(row["health/active_units"]) for row in rows] == [0, 0]
    assert sum("The posterior has collapsed" in record.message for record in caplog.records) == 1
    caplog.clear()
    train(config(*overrides[2:], "trainer.max_epochs=1", "data.val_size=1000", *BRIEF[3:]), tmp_path / "alive")
    (row,) = history(tmp_path / "alive")
    assert float(row["health/active_units"]) == 3
    assert 0 < float(row["health/kl_min"]) <= float(row["health/kl_max"])
    assert "health/kl_max" in events(tmp_path / "alive").Tags()["scalars"]
    assert not [record for record in caplog.records if "collapsed" in record.message]


def test_tensorboard_has_each_number_of_a_run_once(config, tmp_path: Path, caplog) -> None:
    words = ["trainer.log_every_n_steps=10", "model.objective.warmup_epochs=4", "model.beta=2"]
    words += ["model/likelihood=gaussian", "model.likelihood.learn_scale=true"]
    with caplog.at_level("INFO"):
        metrics = train(config(*SMALL, *words), tmp_path / "run")
    assert "trainer.fast_loop" not in caplog.text  # no number makes it step aside
    (line,) = [message for message in caplog.messages if "epoch 1/2" in message]
    assert " left  train: loss " in line
    board = events(tmp_path / "run")
    found = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    assert all(len(found[tag]) == len(board.Scalars(tag)) for tag in found if tag != "epoch")
    assert {key: found[key] for key in metrics if key.startswith("test/")} == {
        key: {46: pytest.approx(value)} for key, value in metrics.items() if key.startswith("test/")
    }
    assert list(found["health/gradient_norm"]) == [9, 19, 29, 39]
    assert found["lr-Adam"] == {0: pytest.approx(1e-3), 23: pytest.approx(1e-3)}
    assert found["health/kl_weight"] == {22: pytest.approx(2 * 22 / 23 / 4), 45: pytest.approx(2 * 45 / 23 / 4)}
    assert found["health/scale"][45] == pytest.approx(load_run(tmp_path / "run").likelihood.scale.item())
    settings = yaml.safe_load((tmp_path / "run" / "tensorboard" / "hparams.yaml").read_text())
    assert settings["model.beta"] == 2


def test_the_logged_gradient_norm_is_that_of_the_step(config, tmp_path: Path) -> None:
    norms = []

    class Watched(Callback):
        def on_after_backward(self, trainer, module) -> None:
            norms.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm().item())

    words = ["trainer.log_every_n_steps=10", "trainer.gradient_clip_val=0.1"]  # the norm is that before clipping
    train(config(*SMALL, *words), tmp_path / "run", callbacks=[Watched()])
    logged = [e.value for e in events(tmp_path / "run").Scalars("health/gradient_norm")]
    assert logged == pytest.approx(norms[9::10])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_warm_up_follows_the_epochs(accumulated: int, config, tmp_path: Path) -> None:
    overrides = ["model.objective.warmup_epochs=4", "trainer.max_epochs=2", *QUICK]
    overrides += [f"trainer.accumulate_grad_batches={accumulated}", "model.backbone.hidden=[400,400]"]
    train(config(*overrides), tmp_path / "run")
    rows = [{key: float(value) for key, value in row.items()} for row in history(tmp_path / "run")]
    for row, (least, most) in zip(rows, ((0.1, 0.25), (0.35, 0.5)), strict=True):
        weight = (row["train/loss"] - row["train/reconstruction"]) / row["train/kl"]
        assert least <= weight <= most  # the last batches weigh most: their KL is the largest
        assert row["val/loss"] == pytest.approx(row["val/reconstruction"] + row["val/kl"], rel=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian model.likelihood.mean=identity"])
def test_data_bias_starts_the_decoder_at_the_mean_image(likelihood: str, config, tmp_path: Path) -> None:
    words = [*f"model/likelihood={likelihood}".split(), "model.learning_rate=1e-9", *BRIEF]
    without, started = (
        train(config(f"model.data_bias={asked}", *words), tmp_path / asked)["test/reconstruction"]
        for asked in ("false", "true")
    )
    assert started < without - 10


def test_vamp_starts_at_training_images(config, tmp_path: Path) -> None:
    train(config("model/prior=vamp", "model.prior.pseudo_inputs=5", *BRIEF), tmp_path / "run")
    inputs = weights(tmp_path / "run")["prior.pseudo_inputs"]
    (images, _), _ = load_images("MNIST", DATA)
    nearest = torch.cdist(inputs.flatten(1), images.flatten(1).float() / 255).min(dim=1).values
    assert nearest.max() < 0.01 * 784**0.5  # two steps of Adam away


def test_averaged_weights_are_saved_and_tested(config, tmp_path: Path) -> None:
    words = ["model=autoencoder", "trainer=ema", *QUICK, "trainer.max_epochs=1"]  # an autoencoder draws no noise
    metrics = train(config(*words), tmp_path / "run")
    assert metrics["steps"] == 5
    plain, averaged = (checkpoint(tmp_path / "run", "best")[key] for key in ("current_model_state", "state_dict"))
    assert not torch.equal(plain["decoder.0.weight"], averaged["decoder.0.weight"])
    _, (images, _) = load_images("MNIST", DATA)
    mse = load_run(tmp_path / "run").terms(images[:256].float() / 255)["mse"].mean().item()
    assert metrics["test/mse"] == pytest.approx(mse, rel=1e-5)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint(directory)["state_dict"]


def test_the_same_seed_gives_the_same_bits(config, tmp_path: Path) -> None:
    overrides = ["trainer.max_epochs=2", "data.pixels=dynamic", *QUICK]
    first = train(config(*overrides), tmp_path / "first")
    second = train(config(*overrides, "figures.every=1"), tmp_path / "second")  # figures draw no random numbers
    other = train(config(*overrides, "seed=1"), tmp_path / "other")
    for key in ("test/loss", "test/kl", "test/elbo"):
        assert first[key] == second[key]
    assert first["test/loss"] != other["test/loss"]
    same, again = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(same[key], again[key]) for key in same)


def test_a_run_without_checkpoints(config, tmp_path: Path) -> None:
    metrics = train(config("trainer.max_steps=7", "trainer.enable_checkpointing=false", *QUICK), tmp_path / "run")
    assert (metrics["steps"], metrics["checkpoint"]) == (7, "last")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("words", ["trainer.check_val_every_n_epoch=9", "trainer.max_epochs=0"])
def test_a_run_too_short_for_a_validation_is_saved(words: str, config, tmp_path: Path) -> None:
    train(config("trainer.max_epochs=1", *QUICK, words), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_overfit_batches_are_the_same_each_epoch(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = [], VAE.training_step

    def noted(self: VAE, batch, i: int) -> torch.Tensor:
        seen.append(batch[1].tolist())
        return step(self, batch, i)

    monkeypatch.setattr(VAE, "training_step", noted)
    train(config("trainer.max_epochs=3", "trainer.overfit_batches=1", *QUICK[2:]), tmp_path / "run")
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


def test_non_finite_weights_after_the_last_step_stop_the_run(config, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the weights .* became NaN or infinite by step 1|test/.* became NaN"):
        train(config("trainer.limit_train_batches=1", "data.val_size=0", "model.learning_rate=3e38"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(("accumulated", "step"), [(1, 8), (2, 5)])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    accumulated: int, step: int, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elbo, calls = ELBO.__call__, 0

    def fails(self: ELBO, vae: VAE, *arguments) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += vae.training
        terms = elbo(self, vae, *arguments)
        return terms | {name: terms[name] * math.nan for name in ("kl", "loss")} if calls == 8 else terms

    monkeypatch.setattr(ELBO, "__call__", fails)
    directory = tmp_path / "run"
    words = ["trainer.max_epochs=4", f"trainer.accumulate_grad_batches={accumulated}", *QUICK]
    with pytest.raises(TrainingError, match=rf"train/kl became NaN or infinite at step {step} \(epoch 2\)"):
        train(config(*words), directory)
    assert all(value.isfinite().all() for value in weights(directory).values())
    assert not (directory / "metrics.json").exists()


def test_validation_that_is_not_finite_stops_the_run(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elbo = ELBO.__call__

    def fails(self: ELBO, vae: VAE, *arguments) -> dict[str, torch.Tensor]:
        terms = elbo(self, vae, *arguments)
        return terms if vae.training else terms | {"loss": terms["loss"] * math.inf}

    monkeypatch.setattr(ELBO, "__call__", fails)
    with pytest.raises(TrainingError, match="val/loss became NaN or infinite after step 2"):
        train(config(*BRIEF), tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))


def test_a_checkpoint_is_not_used_under_another_protocol(config, tmp_path: Path) -> None:
    train(config(*BRIEF, "data.pixels=dynamic"), tmp_path / "run")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2
    )
    for use in (trainer.fit, trainer.test):
        with pytest.raises(ConfigError, match=r"data.pixels=grey: the checkpoint is of data.pixels=dynamic"):
            use(VAE(), MNISTDataModule(root=str(DATA)), ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_denormal_numbers_are_flushed_to_zero(config, tmp_path: Path) -> None:
    """Without flushing, training this model on a CPU becomes five times slower."""
    torch.set_flush_denormal(False)  # an earlier run in this process has switched it on
    train(config("model=autoencoder", *BRIEF), tmp_path / "run")
    assert (torch.tensor([1e-40]) * 1.0).item() == 0.0


def test_a_run_starts_with_the_weights_of_another(command, tmp_path: Path) -> None:
    vamp = ["model/prior=vamp", "model.prior.pseudo_inputs=5", "model.data_bias=true"]
    words = [*BRIEF, "model.backbone.hidden=[8]", *vamp]
    assert command(*words, "hydra.run.dir=one").code == 0
    done = command(*words, "hydra.run.dir=two", "init=one", "trainer.max_epochs=0", "model.learning_rate=1e-4")
    assert done.code == 0, done.err
    first, second = checkpoint(tmp_path / "one", "best")["state_dict"], checkpoint(tmp_path / "two")["state_dict"]
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["init"] == str(tmp_path / "one")
    wider = [*words, "hydra.run.dir=three", "init=one", "model.latent_dim=21", "trainer.max_epochs=0"]
    refused = command(*wider)
    assert refused.code == 2
    assert refused.err.endswith("3 tensors, listed above, do not fit this model; init_strict=false starts them anew\n")
    assert "init: decoder.0.weight is [8, 21] here, [8, 20] in the other run" in refused.out
    assert not (tmp_path / "three").exists()
    assert command(*wider, "init_strict=false").code == 0
    third = checkpoint(tmp_path / "three")["state_dict"]
    same = {name for name, value in third.items() if first[name].shape == value.shape and first[name].equal(value)}
    assert third.keys() - same == {"encoder.3.weight", "encoder.3.bias", "decoder.0.weight"}
    shutil.rmtree(tmp_path / "one")
    assert command("resume=two", "trainer.max_epochs=1").code == 0, "the other run is not needed again"
