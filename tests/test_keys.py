"""Every key of the configuration, and every argument of the parts: a changed value changes the run, or is refused."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DATA, MLP, ROOT, differences
from helpers import Few
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from vae_lightning.config import ConfigError, build, flatten, locate
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.torchvision_sets import MNISTDataModule
from vae_lightning.launch.plan import set_key
from vae_lightning.models.base import ImageModel
from vae_lightning.models.optimization import EMA
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.training import callbacks, trainer
from vae_lightning.training.callbacks import Figures
from vae_lightning.training.checkpoints import Interval
from vae_lightning.training.loggers import make_loggers

# Keys that no test here changes, and the reason.
EXCEPTIONS = {
    "resume": "tests/test_plan.py",
    "init": "tests/test_training.py",
    "init_strict": "tests/test_training.py",
    "hparams_search": "tests/test_search.py",
    "name": "of the run directory, in tests/test_cli.py",
    "seed": "tests/test_training.py",
    "test": "tests/test_resuming.py",
    "data.name": "other data are downloaded: tests/test_data.py",
    "data.root": "where the same images are",
    "logger.wandb": "arguments of W&B: tests/test_loggers.py",
    "logger.mlflow": "arguments of MLflow: tests/test_loggers.py",
}
# Other values, by the last part of the key, where `changed` finds none that is allowed and visible in six steps.
VALUES: dict[str, Any] = {
    "activation": "tanh", "kl": "monte_carlo", "output": "tanh", "mean": "identity", "start": "mean", "kind": "spline",
    "padding": 2, "eps": 0.1, "betas": [0.5, 0.6], "start_factor": 0.5, "pixels": "threshold", "T_max": 7,
    "points": [[1.0, 2.0]], "gamma": 0.5, "version": "1",
}  # fmt: skip
TRAINER: dict[str, Any] = {
    "accelerator": "gpu", "strategy": "ddp", "devices": 2, "num_nodes": 2, "precision": "bf16-mixed",
    "fast_dev_run": True, "max_epochs": 7, "min_epochs": 2, "max_steps": 7, "min_steps": 2, "max_time": "00:00:01:00",
    "limit_train_batches": 3, "limit_val_batches": 3, "limit_test_batches": 3, "overfit_batches": 2,
    "val_check_interval": 2, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 1, "log_every_n_steps": 7,
    "enable_checkpointing": False, "enable_progress_bar": True, "enable_model_summary": False,
    "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "gradient_clip_algorithm": "value",
    "deterministic": True, "benchmark": True, "inference_mode": False,
    "use_distributed_sampler": False, "profiler": "simple", "detect_anomaly": True, "barebones": True, "plugins": ["x"],
    "sync_batchnorm": True, "reload_dataloaders_every_n_epochs": 1, "enable_autolog_hparams": False, "fast_loop": False,
    "compile": True, "matmul_precision": "high", "checkpoint_every": "5s", "on_nan": "skip", "decay": 0.5, "start": 3,
    "callbacks": [{"_target_": "lightning.pytorch.callbacks.RichProgressBar"}],
}  # fmt: skip
GIVEN = {"latent_dim", "encoder_outputs", "image_shape", "output_channels"}
GIVEN |= {"params", "lr", "weight_decay", "optimizer"}
# The choices of each group, with what makes its keys visible or quick.
CHOICES = {
    f"{path.parent.relative_to(ROOT / 'conf')}={path.stem}": more
    for path in sorted((ROOT / "conf" / "model").glob("*/*.yaml"))
    for more in [{"steps": ["model.schedule.milestones=[1,2]"], "residual_conv": ["model.backbone.channels=[4,8,8]"],
                  "conv": ["model.backbone.channels=[4]"], "vamp": ["model.prior.pseudo_inputs=3"],
                  "vq": ["model/prior=codes", "model.posterior.code_dim=2", "model.posterior.decay=0.2"],
                  "fsq": ["model/prior=codes", "model.posterior.levels=[2,2]"],
                  "codes": ["model/posterior=vq", "model.posterior.code_dim=2"],
                  "levels": [f"model.{path.parent.name}.levels=[1,1]"]}.get(path.stem, [])]
}  # fmt: skip


def changed(key: str, value: Any) -> Any:
    """Return another value that a key allows."""
    name = key.rpartition(".")[2]
    if name in VALUES:
        return VALUES[name]
    if name == "interval":
        return {"epoch": "step", "step": "epoch"}[value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + (1 if isinstance(value, int) else value or 0.5)
    if isinstance(value, list | tuple):
        return [n + 1 for n in value] or [1]
    return f"{value}_other"


@pytest.fixture(scope="module")
def few() -> Few:
    data = Few(root=str(DATA), batch_size=20, val_size=0)
    data.setup()
    data.train_images, data.train_labels = data.train_images[:60], data.train_labels[:60]
    return data


def after_training(spec: dict[str, Any], data: Few) -> dict[str, Any]:
    """Return weights, metrics and learning rates of a model after three epochs of two steps."""
    seed_everything(0, verbose=False)
    of_data = {"image_shape": data.image_shape, **({"classes": 10} if spec.get("conditional") else {})}
    model = build(spec, ImageModel, "model", **of_data)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fit = Trainer(accelerator="cpu", max_epochs=3, limit_train_batches=2, **quiet)
    fit.fit(model, data)
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in fit.optimizers[0].param_groups
    ]
    found = {"weights": dict(model.state_dict()), "metrics": dict(fit.callback_metrics), "groups": groups}
    return found | {"pictures": model.reconstruct(data.test_images[:2], torch.zeros(2) if model.classes else None)}


def arguments(spec: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the keys of a part, and the further arguments of its class if it is one of this package, with values."""
    target = locate(spec["_target_"], object, path)
    own = inspect.signature(target).parameters if spec["_target_"].startswith("vae_lightning") else {}
    defaults = {name: p.default for name, p in own.items() if p.default is not p.empty and name not in GIVEN}
    return {f"{path}.{name}": value for name, value in (defaults | spec).items() if name != "_target_"}


def without_effect(config: dict[str, Any], keys: dict[str, Any], look, replace=changed) -> list[str]:
    """Return the keys of which another value changes nothing that `look` sees, and is not refused."""
    usual, found = look(config), []
    for key, value in keys.items():
        other = {name: dict(part) if isinstance(part, dict) else part for name, part in config.items()}
        for name in ("backbone", "likelihood", "prior", "posterior", "objective", "optimizer", "schedule"):
            if isinstance(other["model"].get(name), dict):
                other["model"][name] = dict(other["model"][name])
        set_key(other, key, replace(key, value))
        try:
            if not differences(usual, look(other)):
                found.append(key)
        except ConfigError as refused:
            if key.rpartition(".")[2] not in str(refused):
                found.append(f"{key}: {refused}")
    return found


@pytest.mark.parametrize("choice", CHOICES)
def test_every_argument_of_a_part_has_an_effect(choice: str, config, few: Few) -> None:
    path = choice.partition("=")[0].replace("/", ".")
    composed = config(choice, *CHOICES[choice], "model.latent_dim=2")
    if not path.endswith("backbone"):
        composed["model"]["backbone"] = MLP
    keys = arguments(composed["model"][path.rpartition(".")[2]], path)
    assert without_effect(composed, keys, lambda c: after_training(c["model"], few)) == []


@pytest.mark.parametrize("model", ["vae", "autoencoder"])
def test_every_key_of_a_model_has_an_effect(model: str, config, few: Few) -> None:
    composed = config(f"model={model}", "model.weight_decay=0.1")
    composed["model"]["backbone"] = MLP
    keys = {f"model.{key}": value for key, value in composed["model"].items() if not isinstance(value, dict)}
    keys = {key: value for key, value in keys.items() if key not in ("model._target_", "model.schedule")}
    assert without_effect(composed, keys, lambda c: after_training(c["model"], few)) == []


def test_every_key_of_the_data_has_an_effect(config) -> None:
    def first_batches(c: dict[str, Any]) -> list[Any]:
        data = build(c["data"] | {"root": str(DATA)}, ImageDataModule, "data", seed=0)
        data.setup()
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        return [list(next(iter(loader))) for loader in loaders]

    composed = config()
    keys = arguments(composed["data"], "data")
    assert set(keys) == {f"data.{name}" for name in inspect.signature(MNISTDataModule).parameters}
    keys = {key: value for key, value in keys.items() if key not in EXCEPTIONS}
    assert without_effect(composed, keys, first_batches) == []


def test_every_key_of_the_figures_has_an_effect(config, few: Few, tmp_path: Path, monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(callbacks, "log_figures", lambda trainer, drawn, step: seen.append((sorted(drawn), step)))
    monkeypatch.setattr(callbacks.figures, "save", lambda figure, file: seen.append((file.name, *shapes(figure))))

    def shapes(figure: torch.Tensor | Figure) -> list[Any]:
        return (
            [figure.shape]
            if isinstance(figure, torch.Tensor)
            else [i.get_size() for a in figure.axes for i in a.images]
        )

    writer = SimpleNamespace(add_embedding=lambda codes, *rest: seen.append(len(codes)))
    monkeypatch.setattr(callbacks, "tensorboard_writers", lambda trainer: [writer])
    run, vae = RunDirectory(tmp_path), VAE(2, MLP)
    stand_in = SimpleNamespace(is_global_zero=True, datamodule=few, current_epoch=4, global_step=9)

    def drawn(c: dict[str, Any]) -> list[Any]:
        seen.clear()
        figures = build(partial(Figures, **c["figures"]), Figures, "figures", directory=run.figures)
        figures.setup(stand_in, vae, "fit")
        figures.on_train_epoch_end(stand_in, vae)
        figures.on_test_end(stand_in, vae)
        return [str(figure) for figure in seen]

    composed = config("model.latent_dim=2", "figures.embedded=20", "figures.samples=[1,2]")
    assert without_effect(composed, flatten({"figures": composed["figures"]}), drawn) == []


def test_every_key_of_the_trainer_has_an_effect(config, tmp_path: Path, monkeypatch) -> None:
    def passed(c: dict[str, Any]) -> list[str]:
        """Return what Lightning's Trainer gets, and what is set besides."""
        seen: list[Any] = []
        monkeypatch.setattr(trainer, "Trainer", Recorded)
        monkeypatch.setattr("vae_lightning.training.fast_loop.install", lambda _: seen.append("fast"))
        options = dict(c["trainer"])
        seen.append(Interval.parse(options.pop("checkpoint_every")))
        given = trainer.make_trainer(RunDirectory(tmp_path), [ModelCheckpoint()], [], **options).given
        ours = [(type(callback).__name__, getattr(callback, "start", None)) for callback in given.pop("callbacks")]
        given["plugins"] = len(given["plugins"])
        return [str(value) for value in (seen, ours, given, torch.get_float32_matmul_precision())]

    class Recorded:
        __init__ = Trainer.__init__  # its signature checks the arguments

        def __new__(cls, **given: Any) -> SimpleNamespace:
            return SimpleNamespace(given=given, precision=None)

    composed = config("trainer.enable_progress_bar=false")
    keys = {f"trainer.{key}": value for key, value in composed["trainer"].items()}
    try:
        assert without_effect(composed, keys, passed, lambda key, _: TRAINER[key.rpartition(".")[2]]) == []
    finally:
        torch.set_float32_matmul_precision("highest")
    average = config("trainer=ema")["trainer"]["callbacks"][0]
    weights = [torch.zeros(()), torch.ones(()), torch.tensor(2)]
    for key in ("decay", "start"):
        one, two = (
            build(spec, EMA, "ema")._kwargs["avg_fn"](*weights) for spec in (average, average | {key: TRAINER[key]})
        )
        assert one != two, key


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_every_key_of_a_logger_has_an_effect(logger: str, config, tmp_path: Path) -> None:
    composed = config(f"logger={logger}")
    keys = {key: value for key, value in flatten({"logger": composed["logger"]}).items() if "_target_" not in key}

    def built(c: dict[str, Any]) -> list[str]:
        (made,) = make_loggers(c["logger"], RunDirectory(tmp_path), False, None).values()
        default = made._default_hp_metric if isinstance(made, TensorBoardLogger) else None
        return [made.log_dir, str(default)]

    usual = built(composed)
    for key, value in keys.items():
        name, argument = key.split(".")[1:]
        assert built({"logger": {name: composed["logger"][name] | {argument: changed(key, value)}}}) != usual, key


def test_the_keys_of_these_tests_are_all_keys(config) -> None:
    groups = {"model", "data", "trainer", "figures", "logger"}  # the tests above go through all keys of each
    composed = config("hparams_search=optuna")
    assert set(composed) - groups == {key for key in EXCEPTIONS if "." not in key} - {"resume"}
    loggers = {path.stem for path in (ROOT / "conf" / "logger").glob("*.yaml")} - {"none", "csv", "tensorboard"}
    assert {f"logger.{name}" for name in loggers} <= set(EXCEPTIONS)
