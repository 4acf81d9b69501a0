"""`hparams_search=optuna`: the settings of lowest validation loss, by Optuna; each trial is a run directory.

Optuna is asked directly: Hydra's sweeper needs a version of before 2022, prunes nothing and forgets all when it is
stopped. The study lies in the search's directory, and the same command resumes it. No trial reads the test set; the
winner does, once, at the end.
"""

from __future__ import annotations

import copy
import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from tabulate import tabulate

from vae_lightning.config import ConfigError, Interval, NonNegativeInt, PositiveInt, flatten
from vae_lightning.files import as_yaml, atomic_write, read_json, read_yaml, write_json
from vae_lightning.launch.sweeps import JobError, share_of_machine, train_apart
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.resume import RunPlan, first_difference, set_key
from vae_lightning.training.signals import StopRequest
from vae_lightning.training.trainer import TRAINER_DEFAULTS

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

# Losses under different values of these cannot be compared.
INCOMPARABLE = (
    *("model.beta", "model.objective", "model.likelihood", "data.pixels", "data.name", "data.val_size", "seed"),
)
Space = Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


def search(
    config: dict[str, Any],
    directory: Path,
    space: Space,
    trials: PositiveInt,
    jobs: PositiveInt,
    warmup_epochs: NonNegativeInt,
    timeout: str | None,
) -> Path:
    """Search, and return the winner's run directory. Raises UserError, and Interrupted for a search to resume."""
    check_space(space, config)
    seconds = Interval.parse(timeout, "hparams_search.timeout", steps=False).seconds
    if not config["data"].get("val_size"):
        raise ConfigError(f"data.val_size={config['data'].get('val_size')}: a search needs images to validate on")
    try:
        import optuna
    except ImportError:
        raise ConfigError("hparams_search=optuna: is not installed; pip install -e '.[optuna]' installs it") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directory.mkdir(parents=True, exist_ok=True)
    write_search(directory, config, {"space": space, "warmup_epochs": warmup_epochs})
    slots: Queue[int] = Queue()
    for slot in range(jobs):
        slots.put(slot)
    stop = StopRequest()
    stop.stepping = True  # a signal is noted, and ends the trials that run in other threads

    def run_trial(trial: optuna.Trial) -> float:
        """Train one trial's run, tell Optuna of each epoch, and end it early if it is worse than the others."""
        values = {key: suggest(trial, key, choice) for key, choice in space.items()}
        run = trial_run(directory, trial)
        plan = RunPlan(with_values(config, values), run, resume=run.state != "new")
        reported: set[int] = set()

        def is_worse() -> bool:
            stop.check()
            for epoch, loss in validation_losses(run).items():
                if epoch not in reported:
                    trial.report(loss, epoch)
                    reported.add(epoch)
            return trial.should_prune()

        log.info("trial %s: %s", run.path.name, "  ".join(f"{key} {short(value)}" for key, value in values.items()))
        slot = slots.get()
        try:
            worse = train_apart(plan, share(slot, jobs, config), seconds, is_worse) or is_worse()
        except JobError as problem:
            log.error("trial %s: %s", run.path.name, problem)
            trial.set_user_attr("interrupted", problem.interrupted)
            raise
        finally:
            slots.put(slot)
        losses = validation_losses(run)
        ended = f"given up after epoch {max(losses)}, " if worse else ""
        log.info(
            "trial %s: %sval/loss %.2f", run.path.name, ended, losses[max(losses)] if worse else min(losses.values())
        )
        if worse:
            raise optuna.TrialPruned
        return min(losses.values())

    with RunDirectory(directory).locked(), stop.listening():
        study = optuna.create_study(
            storage=f"sqlite:///{directory.absolute() / 'study.db'}", study_name="search", load_if_exists=True
        )
        study.sampler = optuna.samplers.TPESampler(seed=config["seed"] + len(study.trials))
        study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=warmup_epochs)
        # No other process runs this search, so a trial that is marked as running was stopped. Its run is resumed.
        trials_so_far = latest_trials(study, directory)
        stopped = {
            name: t for name, t in trials_so_far.items() if t.user_attrs.get("interrupted", t.state.name == "RUNNING")
        }
        for name, trial in stopped.items():
            if not trial.state.is_finished():
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"directory": name})
        remaining = max(0, trials - len(trials_so_far)) + len(stopped)
        study.optimize(run_trial, remaining, n_jobs=jobs, catch=JobError)
        return finish(study, directory)


def check_space(space: Mapping[str, Mapping[str, Any]], config: dict[str, Any]) -> None:
    """Raise ConfigError for a key or range that cannot be searched."""
    known = flatten(config)
    for key, choice in space.items():
        where = f"hparams_search.space.{key}"
        if key not in known:
            raise ConfigError(f"{where}: no such key in the configuration")
        if any(f"{key}.".startswith(f"{name}.") for name in INCOMPARABLE):
            raise ConfigError(f"{where}: validation losses under different values of it cannot be compared")
        low, high = choice.get("low"), choice.get("high")
        numbers = isinstance(low, int | float) and isinstance(high, int | float) and low < high
        ranged = numbers and set(choice) <= {"low", "high", "log"} and (choice["low"] > 0 or not choice.get("log"))
        listed = set(choice) == {"choices"} and isinstance(choice["choices"], list) and choice["choices"]
        if not (listed or ranged):
            raise ConfigError(f"{where}={dict(choice)}: should be {{low: …, high: …, log: true}} or {{choices: […]}}")


def suggest(trial: optuna.Trial, key: str, choice: Mapping[str, Any]) -> Any:
    """A value for one key of the space: a whole number where low and high are."""
    if "choices" in choice:
        return trial.suggest_categorical(key, choice["choices"])
    whole = isinstance(choice["low"], int) and isinstance(choice["high"], int)
    return (trial.suggest_int if whole else trial.suggest_float)(
        key, choice["low"], choice["high"], log=bool(choice.get("log"))
    )


def write_search(directory: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    """Write search.yaml, or compare it with the one that is there. Raises RunError for another search."""
    file, content = directory / "search.yaml", {"config": config, "hparams_search": options}
    if file.exists() and (theirs := read_yaml(file)) != content:
        key, old, new = first_difference(theirs, content)
        raise RunError(f"{directory}: holds another search ({key}={old}, not {new}); choose another hydra.run.dir")
    with atomic_write(file) as partial:
        partial.write_text(as_yaml(content), encoding="utf-8")


def trial_run(directory: Path, trial: optuna.Trial | optuna.trial.FrozenTrial) -> RunDirectory:
    """The run of a trial; one that is resumed has a number of its own, and the directory of the first."""
    return RunDirectory(directory / "trials" / trial.user_attrs.get("directory", str(trial.number)))


def latest_trials(study: optuna.Study, directory: Path) -> dict[str, optuna.trial.FrozenTrial]:
    """The trials by the names of their directories; of one that was resumed, the latest."""
    return {trial_run(directory, trial).path.name: trial for trial in study.trials}


def with_values(config: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's configuration, which leaves the test set alone."""
    config = copy.deepcopy(config) | {"test": False}
    for key, value in values.items():
        set_key(config, key, value)
    return config


def share(slot: int, jobs: int, config: dict[str, Any]) -> dict[str, str]:
    """Environment of one of `jobs` trials side by side: its share of the cores, and its GPU."""
    cpus = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None
    return share_of_machine(slot, (TRAINER_DEFAULTS | config["trainer"])["devices"], cpus, gpus_in_turn=True)


def validation_losses(run: RunDirectory) -> dict[int, float]:
    """val/loss after each epoch that a run has validated so far."""
    try:
        with run.history_file.open(encoding="utf-8") as file:
            return {int(row["epoch"]): float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}
    except FileNotFoundError:
        return {}


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(study: optuna.Study, directory: Path) -> Path:
    """Test the winner, write search.json, print the best trials, and return the winner's directory."""
    trials = latest_trials(study, directory)
    complete = [trial for trial in trials.values() if trial.state.name == "COMPLETE"]
    if not complete:
        raise RunError(f"{directory}: none of {len(trials)} trials came to an end; its log says why")
    best = study.best_trial
    winner = trial_run(directory, best)
    if not {"test/loss", "test/mse"} & set(read_json(winner.metrics_file)):
        train_apart(RunPlan(winner.read_config() | {"test": True}, winner, resume=True), {})
    metrics = {key: value for key, value in read_json(winner.metrics_file).items() if key.startswith("test/")}
    states = [trial.state.name.lower() for trial in trials.values()]
    content = {"trials": {state: states.count(state) for state in dict.fromkeys(states)}, "best": winner.path.name}
    content |= {"val/loss": best.value, "params": best.params} | metrics | {"run": str(winner)}
    write_json(directory / "search.json", content)
    first = sorted(complete, key=lambda trial: trial.value or 0)[:10]
    rows = [
        [trial_run(directory, trial).path.name, short(trial.value), *map(short, trial.params.values())]
        for trial in first
    ]
    log.info("%s", tabulate(rows, ["trial", "val/loss", *best.params], tablefmt="plain", disable_numparse=True))
    log.info("winner, test: %s", "  ".join(f"{key[5:]} {value:.2f}" for key, value in metrics.items()))
    return winner.path
