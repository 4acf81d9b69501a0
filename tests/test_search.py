"""The search: which trials run and are pruned, that only the best is tested, and that a search can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BRIEF, DATA, ROOT

from vae_lightning.config import ConfigError, UserError
from vae_lightning.launch import plan
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.training.signals import Interrupted

searching = pytest.importorskip("vae_lightning.launch.search", reason="pip install -e '.[optuna]' brings it")
search, check_space = searching.search, searching.check_space

SPACE = {
    "model.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "model.latent_dim": {"low": 2, "high": 9},
}
OPTIONS = {"space": SPACE, "trials": 12, "warmup_epochs": 1}
SHORT = OPTIONS | {"trials": 6}


class Training:
    """Replaces `train`: the loss falls with the epochs, and is lowest with 9 latent dimensions."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []  # names of trials, and whether they were tested
        self.stops: dict[str, BaseException] = {"2": UserError("it failed")}

    def __call__(self, config: dict[str, Any], run: RunDirectory, resume: bool, callbacks: Any = ()) -> dict[str, Any]:
        name = run.path.name
        self.seen.append((name, config["test"]))
        assert resume == run.config_file.exists()
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        for epoch in range(5):
            loss = torch.tensor(100 + 10 * (9 - config["model"]["latent_dim"]) + 10 / (epoch + 1))
            trainer = SimpleNamespace(callback_metrics={"val/loss": loss}, current_epoch=epoch)
            for callback in callbacks:
                callback.on_validation_end(trainer, None)
            if name in self.stops:
                stop = self.stops[name]
                if isinstance(stop, Interrupted):
                    del self.stops[name]
                raise stop
        metrics = {"epochs": 5} | ({"test/loss": 99.0} if config["test"] else {})
        run.metrics_file.write_text(json.dumps(metrics))
        return metrics


@pytest.fixture
def training(monkeypatch) -> Training:
    stand_in = Training()
    monkeypatch.setattr(plan, "train", stand_in)
    return stand_in


def test_a_search_tests_only_the_best_trial(config, training: Training, tmp_path: Path) -> None:
    winner = search(config(), tmp_path / "search", **OPTIONS)
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert found["run"] == str(winner)
    assert found["params"]["model.latent_dim"] == 9
    assert found["val/loss"] == pytest.approx(102)
    assert found["test/loss"] == 99
    assert sum(found["trials"].values()) == 12
    assert found["trials"]["pruned"] >= 3, "the trial that failed, and those worse than the median"
    assert [name for name, tested in training.seen if tested] == [winner.name]
    assert sorted(int(name) for name, tested in training.seen if not tested) == list(range(12))


def test_a_stopped_search_is_resumed(config, training: Training, tmp_path: Path) -> None:
    training.stops["4"] = Interrupted("stopped by SIGTERM")
    with pytest.raises(Interrupted):
        search(config(), tmp_path / "search", **SHORT)
    search(config(), tmp_path / "search", **SHORT)
    assert [name for name, tested in training.seen if not tested].count("4") == 2, "resumed in its directory"
    assert len({name for name, _ in training.seen}) == 6
    found = json.loads((tmp_path / "search" / "search.json").read_text())["trials"]
    assert sum(found.values()) == 6, "a resumed trial counts once"
    seen = len(training.seen)
    search(config(), tmp_path / "search", **SHORT)  # finished: no new trials
    assert len(training.seen) == seen
    search(config(), tmp_path / "search", **SHORT | {"trials": 8})  # more trials
    assert len({name for name, _ in training.seen}) == 8
    with pytest.raises(RunError, match=r"holds another search \(model.beta=1.0, not 2\)"):
        search(config("model.beta=2"), tmp_path / "search", **SHORT)


def test_a_search_without_a_finished_trial(config, training: Training, tmp_path: Path) -> None:
    training.stops |= {"0": UserError("no"), "1": UserError("no")}
    with pytest.raises(RunError, match="none of 2 trials finished"):
        search(config(), tmp_path / "search", **OPTIONS | {"trials": 2})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.latent_dmi": {"low": 1, "high": 2}}, "no such key; did you mean model.latent_dim?"),
        ({"model.objective.warmup_epochs": {"low": 1, "high": 2}}, "cannot be compared"),
        ({"model.latent_dim": {"low": 2, "high": 1}}, r"latent_dim=\{.*: .low <= high. must hold"),
        ({"model.latent_dim": {"low": 1, "hihg": 2}}, "unexpected keyword argument 'hihg'"),
        ({"model.latent_dim": {"choices": []}}, "must contain one or more elements"),
        ({"model.latent_dim": {}}, "missing 2 required positional"),
    ],
)
def test_an_invalid_space_is_refused(config, space, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(space, config())


def test_invalid_searches_are_refused(command, tmp_path: Path) -> None:
    for words, line in (
        (["hparams_search.trials=0"], "hparams_search.trials=0: should be greater than or equal to 1.\n"),
        (["data.val_size=0"], "data.val_size=0: a search needs validation images\n"),
        (["resume=latest"], "resume=latest: is for one run; the same command resumes a sweep or a search\n"),
    ):
        refused = command("hparams_search=optuna", *words)
        assert (refused.code, refused.err) == (2, line)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.proof
def test_a_search_typed_twice_and_killed(tmp_path: Path) -> None:
    """Two processes share the trials; one is killed, and the same command trains its trial again and tests the best."""
    words = ["hparams_search=optuna", "hparams_search.trials=4", *BRIEF, f"data.root={DATA}", "hydra.run.dir=search"]
    words += ["trainer.max_epochs=6", "trainer.limit_train_batches=20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *words]
    first, second = (subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(2))
    trials = tmp_path / "search" / "trials"
    while len(list(trials.glob("*/checkpoints/last.ckpt"))) < 2:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    assert second.wait(500) == 0
    time.sleep(searching.GRACE)
    last = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert last.stdout.splitlines()[-1].startswith(str(trials))
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert sum(found["trials"].values()) == len(list(trials.iterdir())) == 4
    tested = [file for file in trials.glob("*/metrics.json") if "test/loss" in file.read_text()]
    assert len(tested) == 1
