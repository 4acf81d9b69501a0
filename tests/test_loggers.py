"""Metrics, settings and figures in W&B (offline), MLflow (SQLite), CSV and a custom logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BRIEF
from lightning.pytorch.loggers import Logger

from vae_lightning.config import ConfigError
from vae_lightning.files import read_dict
from vae_lightning.training.train import train

WANDB = ["logger=wandb", "logger.wandb.offline=true", "figures.samples=[2,2]"]


class Recorder(Logger):
    """A custom logger that records its input."""

    last: Recorder

    def __init__(self, save_dir: str, run_id: str | None = None) -> None:
        super().__init__()
        self.name, self.version, self.save_dir = "recorder", run_id or "first", save_dir
        self.settings: dict[str, Any] = {}
        self.numbers: dict[str, float] = {}
        self.drawn: list[str] = []
        self.status: list[str] = []
        Recorder.last = self

    name = version = save_dir = None  # type: ignore[assignment] (Lightning's are properties)

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.settings |= params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.numbers |= metrics

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.drawn.append(f"{key} {images[0].mode}")

    def finalize(self, status: str) -> None:
        self.status.append(status)


class Unreachable(Recorder):
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such account")


def test_a_custom_logger(config, tmp_path: Path) -> None:
    mine = {"mine": {"_target_": "test_loggers.Recorder"}}
    metrics = train(config("logger=none", "model.latent_dim=2", *BRIEF) | {"logger": mine}, tmp_path / "run")
    logger = Recorder.last
    assert logger.save_dir == str(tmp_path / "run")
    assert logger.settings["model.latent_dim"] == 2
    assert logger.numbers["test/loss"] == metrics["test/loss"]
    assert logger.drawn == [f"test/{name} RGB" for name in ("reconstructions", "samples", "scatter", "manifold")]
    assert logger.status[-1] == "success"
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.proof
def test_a_resumed_run_continues_in_mlflow_and_csv(config, tmp_path: Path, monkeypatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    c = config("logger=[csv,mlflow]", "figures.samples=[2,2]", *BRIEF)
    first = train(c, "run")
    c["trainer"]["max_epochs"] = 2
    second = train(c, "run", resume=True)

    client = MlflowClient("sqlite:///outputs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "vae-lightning"]
    (run,) = client.search_runs([experiment.experiment_id])
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "test/loss")]
    assert losses == [first["test/loss"], second["test/loss"]]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.beta"] == "1.0"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "test/samples")] == [
        "test/samples/2.png",
        "test/samples/4.png",
    ]
    assert len(list(Path("run").glob("csv/*/metrics.csv"))) == 2


@pytest.mark.proof
def test_wandb_offline_runs_are_separate(config, tmp_path: Path) -> None:
    c = config(*WANDB, *BRIEF)
    ids = []
    for name in ("one", "two"):  # in one process, like the jobs of a sweep
        train(c, tmp_path / name)
        ids.append(read_dict(tmp_path / name / "environment.json")["loggers"]["wandb"])
        assert list((tmp_path / name).glob("wandb/*/files/media/images/test/samples*.png"))
    c["trainer"]["max_epochs"] = 2
    train(c, tmp_path / "one", resume=True)
    assert ids[0] != ids[1]
    assert len(list((tmp_path / "one" / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


def test_missing_package_of_a_logger_is_reported_in_one_line(config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"^logger=wandb: its package is not installed \("):
        train(config(*WANDB, *BRIEF), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_logger_that_cannot_be_opened_is_reported_in_one_line(config, tmp_path: Path) -> None:
    spec = {"_target_": "test_loggers.Unreachable"}
    with pytest.raises(ConfigError, match=r"^logger=board: cannot be opened \(no such account\)$"):
        train(config(*BRIEF) | {"logger": {"board": spec}}, tmp_path / "run")
