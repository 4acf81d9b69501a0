"""`hparams_search=optuna`: the settings of lowest validation loss, by Optuna, each trial a run in a process of its own.

Hydra's sweeper for Optuna needs a version from before 2022, prunes nothing and forgets all when it is stopped. Here
Optuna is asked directly: a trial is a run directory, whose history.csv says after each epoch whether it is worth going
on. The study lies in the search's directory (study.db), and a search that was stopped goes on, its trials where they
were. No trial reads the test set; the winner does, once, at the end.
"""

from __future__ import annotations

import copy
import csv
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from tabulate import tabulate

from vae_lightning.config import ConfigError, Interval, NonNegativeInt, PositiveInt, check_arguments, flatten
from vae_lightning.files import as_yaml, atomic_write, read_json, read_yaml, write_json
from vae_lightning.launch.sweeps import JobError, share_of_machine, train_apart
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.resume import RunPlan, first_difference, set_key
from vae_lightning.training.signals import StopRequest
from vae_lightning.training.trainer import TRAINER_DEFAULTS

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

# Losses under different values of these are not of one kind, and the lowest of them means nothing.
INCOMPARABLE = (
    "model.beta",
    "model.objective",
    "model.likelihood",
    "data.pixels",
    "data.name",
    "data.val_size",
    "seed",
)


def check_search(
    space: Annotated[dict[str, dict[str, Any]], Field(min_length=1)],
    trials: PositiveInt,
    jobs: PositiveInt,
    warmup_epochs: NonNegativeInt,
    timeout: str | None,
) -> None:
    """What conf/hparams_search/optuna.yaml says, by type."""


def check_space(space: Mapping[str, Mapping[str, Any]], config: dict[str, Any]) -> None:
    """Raise ConfigError for a key or range that cannot be searched."""
    known = flatten(config)
    for key, choice in space.items():
        where = f"hparams_search.space.{key}"
        if key not in known:
            raise ConfigError(f"{where}: no such key in the configuration")
        if any(key == name or key.startswith(f"{name}.") for name in INCOMPARABLE):
            raise ConfigError(f"{where}: validation losses under different values of it cannot be compared")
        low, high = choice.get("low"), choice.get("high")
        ranged = (
            isinstance(low, int | float)
            and isinstance(high, int | float)
            and low < high
            and (low > 0 or not choice.get("log"))
            and set(choice) <= {"low", "high", "log"}
        )
        listed = set(choice) == {"choices"} and isinstance(choice["choices"], list) and choice["choices"]
        if not (listed or ranged):
            raise ConfigError(f"{where}={dict(choice)}: should be {{low: …, high: …, log: true}} or {{choices: […]}}")


def suggest(trial: optuna.Trial, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A value for each key of the space: whole numbers where low and high are."""
    values: dict[str, Any] = {}
    for key, choice in space.items():
        if "choices" in choice:
            values[key] = trial.suggest_categorical(key, choice["choices"])
        elif isinstance(choice["low"], int) and isinstance(choice["high"], int):
            values[key] = trial.suggest_int(key, choice["low"], choice["high"], log=bool(choice.get("log")))
        else:
            values[key] = trial.suggest_float(key, choice["low"], choice["high"], log=bool(choice.get("log")))
    return values


def search(config: dict[str, Any], options: dict[str, Any], directory: Path) -> Path:
    """Search, and return the winner's run directory. Raises UserError, and Interrupted for a search to go on with."""
    check_arguments(check_search, options, "hparams_search")
    check_space(options["space"], config)
    timeout = Interval.parse(options["timeout"], "hparams_search.timeout", steps=False).seconds
    if not config["data"].get("val_size"):
        raise ConfigError(f"data.val_size={config['data'].get('val_size')}: a search needs images to validate on")
    try:
        import optuna
    except ImportError:
        raise ConfigError("hparams_search=optuna: not installed; pip install -e '.[optuna]' brings it") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    _start(directory, {"config": config, "hparams_search": options})
    with RunDirectory(directory).locked():
        study = optuna.create_study(
            storage=f"sqlite:///{directory.absolute() / 'study.db'}",
            study_name="search",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=config["seed"] + len(_trials(directory))),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=options["warmup_epochs"]),
        )
        _run_trials(study, config, options, directory, timeout)
        return _finish(study, directory)


def _start(directory: Path, content: dict[str, Any]) -> None:
    """Write search.yaml, or compare it with the one that is there; trials, jobs and timeout may change."""
    file = directory / "search.yaml"
    if file.exists():
        theirs, ours = copy.deepcopy(read_yaml(file)), copy.deepcopy(content)
        for free in ("trials", "jobs", "timeout"):
            theirs["hparams_search"].pop(free, None)
            ours["hparams_search"].pop(free, None)
        if theirs != ours:
            key, old, new = first_difference(theirs, ours)
            raise RunError(f"{directory}: holds another search ({key}={old}, not {new}); choose another hydra.run.dir")
    with atomic_write(file) as partial:
        partial.write_text(as_yaml(content))


def _trials(directory: Path) -> list[Path]:
    return [path for path in (directory / "trials").glob("*") if path.is_dir()]


def _run_trials(
    study: optuna.Study, config: dict[str, Any], options: dict[str, Any], directory: Path, timeout: float | None
) -> None:
    """Run what trials there are still to be, so many at a time; those that were stopped come first."""
    import optuna

    stopped = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    unfinished = [optuna.Trial(study, trial._trial_id) for trial in stopped]
    new = options["trials"] - len(study.trials)
    stopping, stop = threading.Event(), StopRequest()
    slots = list(range(options["jobs"]))
    running: dict[Future[None], int] = {}
    with ThreadPoolExecutor(options["jobs"]) as pool, stop.listening():
        try:
            while unfinished or new > 0 or running:
                while slots and (unfinished or new > 0):
                    if unfinished:
                        trial = unfinished.pop(0)
                    else:
                        trial, new = study.ask(), new - 1
                    slot = slots.pop(0)
                    values = suggest(trial, options["space"])
                    share = _share(slot, options["jobs"], (TRAINER_DEFAULTS | config["trainer"])["devices"])
                    plan = _trial_plan(config, values, directory / "trials" / str(trial.number))
                    running[pool.submit(_run_trial, study, trial, plan, share, timeout, stopping)] = slot
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    slots.append(running.pop(future))
                    future.result()
        except BaseException:
            stopping.set()
            raise


def _trial_plan(config: dict[str, Any], values: Mapping[str, Any], directory: Path) -> RunPlan:
    config = copy.deepcopy(config) | {"test": False}
    for key, value in values.items():
        set_key(config, key, value)
    run = RunDirectory(directory)
    return RunPlan(config, run, resume=run.state != "new")


def _share(slot: int, jobs: int, devices: Any) -> dict[str, str]:
    cpus = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None
    return share_of_machine("joblib", slot, devices, cpus)


def _run_trial(
    study: optuna.Study,
    trial: optuna.Trial,
    plan: RunPlan,
    share: Mapping[str, str],
    timeout: float | None,
    stopping: threading.Event,
) -> None:
    """Train one trial's run, tell Optuna of each epoch, and stop where it has seen enough."""
    import optuna

    pruned = False

    def report() -> bool:
        known = study.trials[trial.number].intermediate_values
        new = {epoch: loss for epoch, loss in validation_losses(plan.run).items() if epoch not in known}
        for epoch, loss in new.items():
            trial.report(loss, epoch)
        return bool(new) and trial.should_prune()

    def enough() -> bool:
        nonlocal pruned
        pruned = pruned or report()
        return pruned or stopping.is_set()

    settings = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in trial.params.items())  # fmt: skip
    log.info("trial %d: %s", trial.number, settings)
    try:
        train_apart(plan, share, timeout, enough)
    except JobError as problem:
        if stopping.is_set():
            return
        log.error("trial %d: %s", trial.number, problem)
        if not problem.again:  # else it is still a running one, for the same command to go on with
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    losses = validation_losses(plan.run)
    if not pruned:
        report()
    if pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        log.info("trial %d: given up after epoch %d, val/loss %.2f", trial.number, max(losses), losses[max(losses)])
    elif plan.run.metrics_file.exists():
        study.tell(trial, min(losses.values()))
        log.info("trial %d: val/loss %.2f", trial.number, min(losses.values()))


def validation_losses(run: RunDirectory) -> dict[int, float]:
    """val/loss after each epoch that a run has validated so far."""
    try:
        with run.history_file.open() as file:
            return {int(row["epoch"]): float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}
    except FileNotFoundError:
        return {}


def _finish(study: optuna.Study, directory: Path) -> Path:
    """Test the winner, write search.json, print the best trials, and return the winner's directory."""
    import optuna

    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    states = {state.name.lower(): sum(t.state == state for t in study.trials) for state in optuna.trial.TrialState}
    if not complete:
        raise RunError(f"{directory}: none of {len(study.trials)} trials came to an end; its log says why")
    best = study.best_trial
    winner = RunDirectory(directory / "trials" / str(best.number))
    if not {"test/loss", "test/mse"} & set(read_json(winner.metrics_file)):
        train_apart(RunPlan({}, winner, resume=True), {}, words=["test=true"])
    metrics = {key: value for key, value in read_json(winner.metrics_file).items() if key.startswith("test/")}
    content = {"trials": states, "best": best.number, "val/loss": best.value, "params": best.params}
    write_json(directory / "search.json", content | metrics | {"run": str(winner)})
    first = sorted(complete, key=lambda trial: trial.value or 0)[:10]
    rows = [[trial.number, f"{trial.value:.2f}", *trial.params.values()] for trial in first]
    log.info("%s", tabulate(rows, ["trial", "val/loss", *best.params], tablefmt="plain"))
    log.info("winner, test: %s", "  ".join(f"{key[5:]} {value:.2f}" for key, value in metrics.items()))
    return winner.path
