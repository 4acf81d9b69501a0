"""`hparams_search=optuna`: find the settings of lowest validation loss with Optuna; each trial is a run directory.

Optuna is called directly, because Hydra's sweeper needs an Optuna from before version 3, has no pruning, and cannot be
resumed. The study is stored in the search's directory: the same command resumes it, and typed twice it runs in
parallel. Only the best trial reads the test set, once, at the end.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import Field

from vae_lightning.config import ConfigError, NonNegativeInt, PositiveInt, UserError, did_you_mean, flatten
from vae_lightning.files import read_dict, write_json
from vae_lightning.launch.plan import plan_run, set_key
from vae_lightning.models.metrics import MONITOR, better
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

# Losses under different values of these keys cannot be compared.
INCOMPARABLE = (
    *("model.beta", "model.objective", "model.likelihood", "data.pixels", "data.name", "data.val_size", "seed"),
)
HEARTBEAT, GRACE = 10, 30  # seconds between signs of life of a trial, and without one until it is retried
Space = Annotated[dict[str, dict[str, bool | int | float | list[Any]]], Field(min_length=1)]


def search(
    config: dict[str, Any], directory: Path, space: Space, trials: PositiveInt, warmup_epochs: NonNegativeInt
) -> Path:
    """Search, and return the run directory of the best trial, or `directory` while other processes still search.

    Raises UserError, and Interrupted if a signal stopped the search; the same command resumes it.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("hparams_search=optuna: is not installed; pip install -e '.[optuna]' installs it") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeat and retry
    check_space(space, config)
    directory.mkdir(parents=True, exist_ok=True)
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
    storage = open_storage(directory, retry)
    lower = better(MONITOR) == "min"
    direction: Literal["minimize", "maximize"] = "minimize" if lower else "maximize"
    study = optuna.create_study(storage=storage, study_name="search", direction=direction, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=config["seed"] + len(study.trials))
    study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=warmup_epochs)
    settings = flatten({"config": config, "space": space, "warmup_epochs": warmup_epochs})
    former = study.user_attrs.get("settings", settings)
    for key in settings | former:
        if (old := former.get(key)) != (new := settings.get(key)):
            raise RunError(f"{directory}: holds another search ({key}={old}, not {new}); choose another hydra.run.dir")
    study.set_user_attr("settings", settings)

    def run_trial(trial: optuna.Trial) -> float:
        """Train the run of one trial, and return its best value."""
        run = run_of(trial, directory)
        trial.set_user_attr("directory", run.path.name)
        trial_config = copy.deepcopy(config) | {"test": False}
        for key, choice in space.items():
            set_key(trial_config, key, suggest(trial, key, choice))
        log.info("trial %s: %s", run.path.name, "  ".join(f"{key}={value}" for key, value in trial.params.items()))
        try:
            plan = plan_run(trial_config, run.path, [], "auto")
            train(plan.config, run, plan.action == "resume", callbacks=[Report(trial)])
        except Interrupted:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            retry(study, study.trials[trial.number])
            raise
        except UserError as error:
            log.error("trial %s: %s", run.path.name, error)
            raise
        best = min if lower else max
        return best(study.trials[trial.number].intermediate_values.values(), default=float("nan"))

    while True:
        latest = {run_of(trial, directory).path: trial for trial in study.trials}  # of each run
        states = Counter(trial.state.name.lower() for trial in latest.values())
        if states.total() - states["waiting"] < trials:
            study.optimize(run_trial, n_trials=1, catch=UserError)
        elif not states["running"]:
            return finish(study, directory, states)
        else:
            time.sleep(GRACE)
            optuna.storages.fail_stale_trials(study)  # those whose process was killed wait to be retried
            if states["running"] == sum(trial.state.name == "RUNNING" for trial in study.trials):
                log.info("%s: other processes are still searching", directory)
                return directory


def open_storage(directory: Path, retry: Callable[..., None]) -> optuna.storages.RDBStorage:
    """Open the study's database, or create it; another process may be creating it at the same moment."""
    import optuna
    import sqlalchemy

    connect = partial(
        optuna.storages.RDBStorage,
        f"sqlite:///{directory.absolute() / 'study.db'}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=HEARTBEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=retry,
    )
    for _ in range(10):
        try:
            return connect()
        except sqlalchemy.exc.SQLAlchemyError:
            time.sleep(1)  # until the other process has written all tables
    return connect()


class Report(Callback):
    """Report each validation loss of a run to Optuna, and stop the run if Optuna prunes its trial."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        from optuna import TrialPruned

        value, epoch = trainer.callback_metrics[MONITOR].item(), trainer.current_epoch + 1
        self.trial.report(value, epoch)
        if self.trial.should_prune():
            log.info("trial %d is pruned after epoch %d: %s %.2f", self.trial.number, epoch, MONITOR, value)
            raise TrialPruned


def check_space(space: Space, config: dict[str, Any]) -> None:
    """Raise ConfigError for a search without validation images, and for a key or range that cannot be searched."""
    import optuna

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


def finish(study: optuna.Study, directory: Path, states: Counter[str]) -> Path:
    """Test the run of the best trial, write search.json, and return the run's directory."""
    if not states["complete"]:
        raise RunError(f"{directory}: none of {states.total()} trials finished; the log has the reasons")
    best = study.best_trial
    run = run_of(best, directory)
    metrics = read_dict(run.metrics_file)
    if "test/loss" not in metrics:
        metrics = train(run.read_config() | {"test": True}, run, resume=True)
    tested = {key: value for key, value in metrics.items() if key.startswith("test/")}
    content = {"trials": states, "run": str(run), "params": best.params, MONITOR: best.value}
    write_json(directory / "search.json", content | tested)
    log.info("best trial: %s  %s %.2f  test/loss %.2f", run.path.name, MONITOR, best.value, tested["test/loss"])
    return run.path
