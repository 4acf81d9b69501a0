"""`hparams_search=optuna`: find the settings of lowest validation loss with Optuna; each trial is a run directory.

Optuna is called directly, because Hydra's sweeper needs an Optuna from before version 3, has no pruning, and cannot be
resumed. The study is stored in the search's directory, and the same command resumes it. Only the best trial reads the
test set, once, at the end.
"""

from __future__ import annotations

import copy
import csv
import logging
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vae_lightning.config import ConfigError, Interval, NonNegativeInt, PositiveInt, flatten
from vae_lightning.files import read_json, write_json
from vae_lightning.launch.sweeps import JobError, job_variables, train_in_subprocess
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.resume import RunPlan, comparable, first_difference, set_key
from vae_lightning.training.signals import StopRequest

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

# Losses under different values of these keys cannot be compared.
INCOMPARABLE = (
    *("model.beta", "model.objective", "model.likelihood", "data.pixels", "data.name", "data.val_size", "seed"),
)
Space = Annotated[dict[str, dict[str, bool | int | float | list[Any]]], Field(min_length=1)]


def search(
    config: dict[str, Any],
    directory: Path,
    space: Space,
    trials: PositiveInt,
    jobs: PositiveInt,
    warmup_epochs: NonNegativeInt,
    timeout: str | None,
) -> Path:
    """Search, and return the run directory of the best trial.

    Raises UserError, and Interrupted if a signal stopped the search; the same command resumes it.
    """
    seconds = Interval.parse(timeout, "hparams_search.timeout", steps=False).seconds
    if not config["data"].get("val_size"):
        raise ConfigError(f"data.val_size={config['data'].get('val_size')}: a search needs validation images")
    try:
        import optuna
    except ImportError:
        raise ConfigError("hparams_search=optuna: is not installed; pip install -e '.[optuna]' installs it") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_space(space, config)
    devices = config["trainer"].get("devices", "auto")
    cpus = None if jobs == 1 or "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // jobs)
    slots, asking = list(range(jobs)), Lock()  # slots: numbers of the jobs that are free
    stop = StopRequest()
    stop.stepping = True  # the trials run in other threads, and check for a signal themselves

    def run_trial(_: int) -> None:
        """Train the run of one trial, report each epoch to Optuna, and stop it early if Optuna prunes it."""
        stop.check()
        with asking:  # with SQLite, two threads that ask at the same time could get the same queued trial
            trial = study.ask()
        run = run_of(trial, directory)
        trial_config = copy.deepcopy(config) | {"test": False}
        for key, choice in space.items():
            set_key(trial_config, key, suggest(trial, key, choice))
        reported: set[int] = set()

        def should_prune() -> bool:
            stop.check()
            for epoch, loss in validation_losses(run).items():
                if epoch not in reported:
                    trial.report(loss, epoch)
                    reported.add(epoch)
            return trial.should_prune()

        log.info("trial %s: %s", run.path.name, "  ".join(f"{key}={value}" for key, value in trial.params.items()))
        if run.state != "new" and comparable(run.read_config()) != comparable(trial_config):
            raise RunError(f"{run}: is of another study, whose study.db is missing; choose another hydra.run.dir")
        plan = RunPlan(trial_config, run, resume=run.state != "new")
        slot = slots.pop()
        try:
            variables = job_variables(slot, devices, cpus, assign_gpu=True)
            pruned = train_in_subprocess(plan, variables, seconds, should_prune) or should_prune()
        except JobError as error:
            log.error("trial %s: %s", run.path.name, error)
            trial.set_user_attr("interrupted", error.interrupted)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        finally:
            slots.append(slot)
        losses = validation_losses(run)
        if not losses:
            raise ConfigError(
                f"{run}: was not validated; see trainer.limit_val_batches, trainer.check_val_every_n_epoch"
            )
        if pruned:
            log.info("trial %s: pruned after epoch %s", run.path.name, max(losses))
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            log.info("trial %s: val/loss %.2f", run.path.name, min(losses.values()))
            study.tell(trial, min(losses.values()))

    directory.mkdir(parents=True, exist_ok=True)
    with RunDirectory(directory).locked(), stop.listening():
        file = directory.absolute() / "study.db"
        try:
            study = optuna.create_study(storage=f"sqlite:///{file}", study_name="search", load_if_exists=True)
        except Exception as error:  # of many types
            reason = str(error).partition("\n")[0]
            raise RunError(f"{file}: cannot be opened ({reason}); choose another hydra.run.dir") from error
        settings = {"config": config, "hparams_search": {"space": space, "warmup_epochs": warmup_epochs}}
        former = study.user_attrs.get("settings", settings)
        if former != settings:
            key, old, new = first_difference(former, settings)
            raise RunError(f"{directory}: holds another search ({key}={old}, not {new}); choose another hydra.run.dir")
        study.set_user_attr("settings", settings)
        study.sampler = optuna.samplers.TPESampler(seed=config["seed"] + len(study.trials))
        study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=warmup_epochs)
        # The directory is locked, so a trial that is marked as running was stopped.
        for name, trial in latest_trials(study, directory).items():
            if trial.state.name == "RUNNING" or trial.user_attrs.get("interrupted"):
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
                study.enqueue_trial(trial.params, user_attrs={"directory": name})
        finished = sum(trial.state.is_finished() for trial in latest_trials(study, directory).values())
        with ThreadPoolExecutor(jobs) as threads:
            list(threads.map(run_trial, range(max(0, trials - finished))))  # raises the first exception of a trial
        return finish(study, directory)


def check_space(space: Mapping[str, Mapping[str, Any]], config: dict[str, Any]) -> None:
    """Raise ConfigError for a key or range that cannot be searched."""
    import optuna

    known = flatten(config)
    trial = optuna.create_study().ask()
    for key, choice in space.items():
        where = f"hparams_search.space.{key}"
        if key not in known:
            raise ConfigError(f"{where}: no such key in the configuration")
        if any(f"{key}.".startswith(f"{name}.") for name in INCOMPARABLE):
            raise ConfigError(f"{where}: validation losses under different values of it cannot be compared")
        try:
            suggest(trial, key, choice)
        except (TypeError, ValueError, OverflowError):
            wanted = "{low: …, high: …, log: true} or {choices: […]}"
            raise ConfigError(f"{where}={dict(choice)}: should be {wanted}") from None


def suggest(trial: optuna.Trial, key: str, choice: Mapping[str, Any]) -> Any:
    """Return Optuna's value for one key of the space: an integer if low and high are integers."""
    if "choices" in choice:
        return trial.suggest_categorical(key, **choice)
    integers = isinstance(choice.get("low"), int) and isinstance(choice.get("high"), int)
    return (trial.suggest_int if integers else trial.suggest_float)(key, **choice)


def run_of(trial: optuna.Trial | optuna.trial.FrozenTrial, directory: Path) -> RunDirectory:
    """Return the run of a trial. A resumed trial has a new number, and the directory of the first."""
    return RunDirectory(directory / "trials" / trial.user_attrs.get("directory", str(trial.number)))


def latest_trials(study: optuna.Study, directory: Path) -> dict[str, optuna.trial.FrozenTrial]:
    """Return the latest trial of each run, by the name of its directory."""
    return {run_of(trial, directory).path.name: trial for trial in study.trials}


def validation_losses(run: RunDirectory) -> dict[int, float]:
    """Return val/loss after each validated epoch of a run."""
    try:
        with run.history_file.open(encoding="utf-8") as file:
            return {int(row["epoch"]): float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}
    except FileNotFoundError:
        return {}


def finish(study: optuna.Study, directory: Path) -> Path:
    """Test the run of the best trial, write search.json, and return the run's directory."""
    states = Counter(trial.state.name.lower() for trial in latest_trials(study, directory).values())
    if not states["complete"]:
        raise RunError(f"{directory}: none of {states.total()} trials finished; the log has the reasons")
    best = study.best_trial
    run = run_of(best, directory)
    if "test/loss" not in read_json(run.metrics_file):
        train_in_subprocess(RunPlan(run.read_config() | {"test": True}, run, resume=True), {})
    metrics = {key: value for key, value in read_json(run.metrics_file).items() if key.startswith("test/")}
    content = {"trials": states, "best": run.path.name, "val/loss": best.value, "params": best.params}
    write_json(directory / "search.json", content | metrics | {"run": str(run)})
    terms = {"val/loss": best.value} | metrics
    log.info("best trial: %s  %s", run.path.name, "  ".join(f"{key} {value:.2f}" for key, value in terms.items()))
    return run.path
