"""The search: which trials run and are pruned, that only the best is tested, and that a search can be resumed."""

import csv
import json
from pathlib import Path

import pytest
from conftest import BRIEF

from vae_lightning.config import ConfigError
from vae_lightning.files import as_yaml
from vae_lightning.launch import search as searching
from vae_lightning.launch.search import check_space, search
from vae_lightning.launch.sweeps import JobError
from vae_lightning.runs.directory import RunError
from vae_lightning.training.signals import Interrupted

pytest.importorskip("optuna", reason="pip install -e '.[optuna]' brings it")

OPTIONS = {
    "space": {
        "model.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "model.latent_dim": {"low": 2, "high": 9},
    },
    "trials": 12,
    "jobs": 1,
    "warmup_epochs": 1,
    "timeout": None,
}
SHORT = OPTIONS | {"trials": 6}


class Trials:
    """Replaces training: the loss falls with the epochs, and is lowest with 9 latent dimensions."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []
        self.fails = {2}
        self.epochs = 5
        self.interrupts: set[int] = set()
        self.interruption: BaseException = Interrupted("stopped by SIGTERM")

    def __call__(self, plan, environment, timeout=None, watch=lambda: False) -> bool:
        number = int(plan.run.path.name)
        if plan.config["test"]:
            metrics = json.loads(plan.run.metrics_file.read_text())
            plan.run.metrics_file.write_text(json.dumps(metrics | {"test/loss": 99.0}))
            self.seen.append((number, True))
            return False
        self.seen.append((number, False))
        plan.run.path.mkdir(parents=True, exist_ok=True)
        plan.run.config_file.write_text(as_yaml(plan.config))
        if number in self.fails:
            raise JobError("it failed")
        rows = []
        for epoch in range(1, self.epochs + 1):
            loss = 100 + 10 * (9 - plan.config["model"]["latent_dim"]) + 10 / epoch
            rows.append({"epoch": epoch, "val/loss": loss})
            with plan.run.history_file.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            if number in self.interrupts:
                self.interrupts.remove(number)
                raise self.interruption
            if watch():
                return True
        plan.run.metrics_file.write_text("{}")
        return False


@pytest.fixture
def trials(monkeypatch) -> Trials:
    stand_in = Trials()
    monkeypatch.setattr(searching, "train_in_subprocess", stand_in)
    return stand_in


def test_a_search_tests_only_the_best_trial(config, trials: Trials, tmp_path: Path) -> None:
    winner = search(config(), tmp_path / "search", **OPTIONS)
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert found["run"] == str(winner)
    assert found["params"]["model.latent_dim"] == 9
    assert found["val/loss"] == pytest.approx(102)
    assert found["test/loss"] == 99
    assert sum(found["trials"].values()) == 12
    assert found["trials"]["fail"] == 1
    assert found["trials"]["pruned"] >= 2, "trials worse than the median"
    assert [number for number, tested in trials.seen if tested] == [int(winner.name)]
    assert sorted(number for number, tested in trials.seen if not tested) == list(range(12))


def test_a_stopped_search_is_resumed(config, trials: Trials, tmp_path: Path) -> None:
    trials.interrupts.add(4)
    with pytest.raises(Interrupted):
        search(config(), tmp_path / "search", **SHORT)
    search(config(), tmp_path / "search", **SHORT)
    assert [number for number, _ in trials.seen].count(4) == 2, "the stopped trial was resumed in its directory"
    assert len({number for number, _ in trials.seen}) == 6
    found = json.loads((tmp_path / "search" / "search.json").read_text())["trials"]
    assert (found["fail"], sum(found.values())) == (1, 6), "a resumed trial counts once"
    seen = len(trials.seen)
    search(config(), tmp_path / "search", **SHORT)  # finished: no new trials
    assert len(trials.seen) == seen
    search(config(), tmp_path / "search", **SHORT | {"trials": 8})  # more trials
    assert len({number for number, _ in trials.seen}) == 8
    with pytest.raises(RunError, match=r"holds another search \(config.model.beta=1.0, not 2\)"):
        search(config("model.beta=2"), tmp_path / "search", **SHORT)


def test_a_killed_trial_is_resumed_by_the_same_command(config, trials: Trials, tmp_path: Path) -> None:
    trials.interrupts.add(4)
    trials.interruption = JobError("killed by SIGKILL", interrupted=True)
    for times in (1, 2):
        search(config(), tmp_path / "search", **SHORT)
        assert [number for number, tested in trials.seen if not tested].count(4) == times
    assert len({number for number, _ in trials.seen}) == 6


def test_two_stopped_trials_are_resumed_side_by_side(config, trials: Trials, tmp_path: Path) -> None:
    trials.interrupts |= {0, 1}
    trials.interruption = JobError("killed by SIGKILL", interrupted=True)
    for times in (1, 2):
        search(config(), tmp_path / "search", **OPTIONS | {"jobs": 2, "trials": 4})
        seen = [number for number, tested in trials.seen if not tested]
        assert [seen.count(number) for number in (0, 1)] == [times, times]


def test_a_search_without_a_finished_trial(config, trials: Trials, tmp_path: Path) -> None:
    trials.fails = {0, 1}
    with pytest.raises(RunError, match="none of 2 trials finished"):
        search(config(), tmp_path / "search", **OPTIONS | {"trials": 2})


def test_trials_of_a_lost_study_are_not_taken_for_its_own(config, trials: Trials, tmp_path: Path) -> None:
    search(config(), tmp_path / "search", **SHORT)
    (tmp_path / "search" / "study.db").unlink()
    space = {"model.latent_dim": {"low": 20, "high": 30}}
    with pytest.raises(RunError, match=r"trials/0: is of another study, whose study\.db is missing"):
        search(config(), tmp_path / "search", **SHORT | {"space": space})
    (tmp_path / "search" / "study.db").write_text("not SQLite")
    with pytest.raises(RunError, match=r"study\.db: cannot be opened \(.*file is not a database"):
        search(config(), tmp_path / "search", **SHORT)


def test_a_trial_that_is_not_validated_is_named(config, trials: Trials, tmp_path: Path) -> None:
    trials.epochs = 0
    with pytest.raises(ConfigError, match=r"trials/0: was not validated; see trainer\.limit_val_batches"):
        search(config(), tmp_path / "search", **SHORT)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.latent_dmi": {"low": 1, "high": 2}}, "no such key"),
        ({"model.beta": {"low": 1, "high": 2}}, "cannot be compared"),
        ({"model.objective.warmup_epochs": {"low": 1, "high": 2}}, "cannot be compared"),
        ({"model.latent_dim": {"low": 2, "high": 1}}, "should be"),
        ({"model.latent_dim": {"low": 0, "high": 1, "log": True}}, "should be"),
        ({"model.latent_dim": {"low": 1, "hihg": 2}}, "should be"),
        ({"model.latent_dim": {"choices": []}}, "should be"),
        ({"model.latent_dim": {}}, "should be"),
    ],
)
def test_an_invalid_space_is_refused(config, space, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(space, config())


def test_a_search_needs_validation_images(config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_size=0: a search needs validation images"):
        search(config("data.val_size=0"), tmp_path / "search", **OPTIONS)
    assert not (tmp_path / "search").exists()


def test_invalid_options_of_a_search_are_refused(command, tmp_path: Path) -> None:
    refused = command("hparams_search=optuna", "hparams_search.trials=0")
    assert (refused.code, refused.err) == (2, "hparams_search.trials=0: should be greater than or equal to 1.\n")
    assert command("hparams_search=optuna", "resume=latest").err.startswith("resume=latest: is not for a search; ")
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.proof
def test_a_search_with_real_training(command, tmp_path: Path) -> None:
    words = ["hparams_search=optuna", "hparams_search.trials=3", "hparams_search.jobs=2", *BRIEF]
    result = command(*words)
    assert result.code == 0, result.err
    winner = Path(result.out.splitlines()[-1])
    found = [
        json.loads(file.read_text())
        for file in (tmp_path / "outputs/searches/vae_optuna/trials").glob("*/metrics.json")
    ]
    assert len(found) == 3
    assert sum("test/loss" in metrics for metrics in found) == 1
    assert "test/loss" in json.loads((winner / "metrics.json").read_text())
