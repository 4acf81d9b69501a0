"""`hparams_search=optuna`: find the settings of lowest validation loss with Optuna; each trial is a run directory.

Optuna is called directly, because Hydra's sweeper needs an Optuna from before version 3, has no pruning, and cannot be
resumed. The study is stored in the search's directory: the same command resumes it, and typed twice it runs in
parallel. Only the best trial reads the test set, once, at the end.
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.trial import TrialState
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt, UserError, did_you_mean, flatten
from vae_lightning.files import read_dict, write_json
from vae_lightning.launch.plan import HARMLESS, changed_keys, plan_run, set_key
from vae_lightning.models.metrics import MONITOR
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.training.signals import Interrupted

log = logging.getLogger(__name__)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeat and retry

# Losses under different values of these keys cannot be compared.
INCOMPARABLE = (
    *("model.beta", "model.objective", "model.likelihood", "data.pixels", "data.name", "data.val_size", "seed"),
)
HEARTBEAT, GRACE = 10, 30  # seconds between signs of life of a trial, and without one until it is retried
RETRY = optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # a trial that was killed is retried as another
Space = Annotated[dict[str, dict[str, bool | int | float | list[Any]]], Field(min_length=1)]


def search(
    config: dict[str, Any], directory: Path, space: Space, trials: PositiveInt, warmup_epochs: NonNegativeInt
) -> Path:
    """Search, and return the run directory of the best trial, or `directory` while other processes still search.

    Raises UserError, and Interrupted if a signal stopped the search; the same command resumes it.
    """
    check_space(space, config)
    study = open_study(directory)
    study.sampler = optuna.samplers.TPESampler(seed=config["seed"] + len(study.trials))
    study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=warmup_epochs)
    settings = config | {"hparams_search": {"space": space, "warmup_epochs": warmup_epochs}}
    for key, (old, new) in changed_keys(study.user_attrs.get("settings", settings), settings).items():
        if key not in HARMLESS:
            raise RunError(f"{directory}: holds another search ({key}={old}, not {new}); choose another hydra.run.dir")
    study.set_user_attr("settings", settings)

    def run_trial(trial: optuna.Trial) -> float:
        """Train the run of one trial, and return its lowest validation loss."""
        run = run_of(trial, directory)
        trial.set_user_attr("directory", run.path.name)
        trial_config = copy.deepcopy(config) | {"test": False}
        for key, choice in space.items():
            set_key(trial_config, key, suggest(trial, key, choice))
        log.info("trial %s: %s", run.path.name, "  ".join(f"{key}={value}" for key, value in trial.params.items()))
        try:
            plan_run(trial_config, run.path, [], "auto").carry_out([Report(trial)])
        except UserError as error:
            raise optuna.TrialPruned(f"{run}: {error}") from error
        except Interrupted:
            RETRY(study, study.tell(trial, state=TrialState.FAIL))
            raise
        losses = study.trials[trial.number].intermediate_values.values()
        return min((loss for loss in losses if not math.isnan(loss)), default=math.inf)

    optuna.storages.fail_stale_trials(study)  # those whose process was killed wait to be retried
    while len(study.get_trials(deepcopy=False, states=COUNTED)) < trials:
        study.optimize(run_trial, n_trials=1)
    if study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        log.info("%s: other processes still search; if they were killed, the same command ends the search", directory)
        return directory
    return finish(study, directory)


def open_study(directory: Path) -> optuna.Study:
    """Open the study in the directory of a search, or create it. Optuna's messages go to our log."""
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    directory.mkdir(parents=True, exist_ok=True)
    storage = partial(
        optuna.storages.RDBStorage,
        f"sqlite:///{directory.absolute() / 'study.db'}",
        {"connect_args": {"timeout": 60}},
        heartbeat_interval=HEARTBEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=RETRY,
    )
    try:
        return optuna.create_study(storage=storage(), study_name="search", load_if_exists=True)
    except SQLAlchemyError:  # another process is creating the tables at this moment
        time.sleep(5)
        return optuna.create_study(storage=storage(), study_name="search", load_if_exists=True)


class Report(Callback):
    """Report each validation loss of a run to Optuna, and stop the run if Optuna prunes its trial."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.trial.report(trainer.callback_metrics[MONITOR].item(), trainer.current_epoch + 1)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"after epoch {trainer.current_epoch + 1}: it is worse than the median")


def check_space(space: Space, config: dict[str, Any]) -> None:
    """Raise ConfigError for a search without validation images, and for a key or range that cannot be searched."""
    known, trial = flatten(config), optuna.create_study().ask()
    if not known.get("data.val_size"):
        raise ConfigError(f"data.val_size={known.get('data.val_size')}: a search needs validation images")
    for key, choice in space.items():
        where = f"hparams_search.space.{key}"
        if key not in known:
            raise ConfigError(f"{where}: no such key{did_you_mean(key, known)}")
        if any(f"{key}.".startswith(f"{name}.") for name in INCOMPARABLE):
            raise ConfigError(f"{where}: validation losses under different values of it cannot be compared")
        try:
            suggest(trial, key, choice)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{where}={choice}: {' '.join(str(error).split())}") from None


def suggest(trial: optuna.Trial, key: str, choice: dict[str, Any]) -> Any:
    """Return Optuna's value for one key of the space: an integer if low and high are integers."""
    if "choices" in choice:
        return trial.suggest_categorical(key, **choice)
    integers = isinstance(choice.get("low"), int) and isinstance(choice.get("high"), int)
    return (trial.suggest_int if integers else trial.suggest_float)(key, **choice)


def run_of(trial: optuna.Trial | optuna.trial.FrozenTrial, directory: Path) -> RunDirectory:
    """Return the run of a trial. A retried trial has a new number, and the directory of the first."""
    return RunDirectory(directory / "trials" / trial.user_attrs.get("directory", str(trial.number)))


def finish(study: optuna.Study, directory: Path) -> Path:
    """Test the run of the best trial, write search.json, and return the run's directory."""
    states = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False, states=COUNTED))
    if not states["complete"]:
        raise RunError(f"{directory}: none of {states.total()} trials finished; the log has the reasons")
    best = study.best_trial
    run = run_of(best, directory)
    plan_run(run.read_config() | {"test": True}, run.path, [], "auto").carry_out()
    tested = {key: value for key, value in read_dict(run.metrics_file).items() if key.startswith("test/")}
    content = {"trials": states, "run": str(run), "params": best.params, MONITOR: best.value}
    write_json(directory / "search.json", content | tested)
    return run.path
