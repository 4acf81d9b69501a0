"""`train(config)`: build data, model and trainer, fit, test, and leave a complete run directory."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import Field

from vae_lightning import figures
from vae_lightning.config import ConfigError, Interval, Seed, Spec, build, check_arguments, flatten
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import described
from vae_lightning.files import as_yaml, atomic_write, errors_name, write_json
from vae_lightning.models.base import ImageModel
from vae_lightning.models.likelihoods import remark
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory, RunError, StrPath
from vae_lightning.runs.environment import count_parameters, describe_environment
from vae_lightning.runs.loading import load_checkpoint, load_weights
from vae_lightning.training.callbacks import Figures
from vae_lightning.training.checkpoints import Progress, epochs_started
from vae_lightning.training.history import History, format_terms
from vae_lightning.training.loggers import make_loggers, opened, rewind_events
from vae_lightning.training.process import log_to, share_log, steady_cpu
from vae_lightning.training.signals import StopRequest
from vae_lightning.training.trainer import (
    TRAINER_DEFAULTS,
    check_batches,
    check_monitors,
    check_schedule,
    make_trainer,
    user_errors,
)

log = logging.getLogger(__name__)


@dataclass
class Config:
    """The configuration that conf/train.yaml composes: plain dictionaries, lists, numbers and strings."""

    name: Annotated[str, Field(min_length=1)]
    seed: Seed
    model: Spec
    data: Spec
    trainer: dict[str, Any]
    figures: dict[str, Any]
    logger: dict[str, Spec] = field(default_factory=dict)
    test: bool = True


def train(config: dict[str, Any], directory: StrPath, resume: bool = False) -> dict[str, Any]:
    """Train what `config` describes into `directory`, and return the content of its metrics.json.

    With `resume`, continue the run in `directory` from its last checkpoint, exactly as if it had not stopped. The test
    set is used once, at the end, with the weights of the lowest val/loss, or the last ones without validation images.
    Raises UserError before anything is written if the run cannot be trained, and Interrupted if a signal stopped it.
    """
    run = RunDirectory(directory)
    check_arguments(Config, config, "")
    c = Config(**config)
    c.trainer = TRAINER_DEFAULTS | c.trainer  # a run of another Lightning version may lack an argument
    seed_everything(c.seed, verbose=False)
    steady_cpu()
    share_log()

    data = build(c.data, ImageDataModule, "data", seed=c.seed)
    data.setup()  # now, to find a wrong file or split before anything is written
    of_data = {"image_shape": data.image_shape} | ({"classes": data.classes} if c.model.get("conditional") else {})
    model = build(c.model, ImageModel, "model", **of_data)

    validates = data.val_size > 0 and c.trainer["limit_val_batches"] != 0
    options = c.trainer | ({} if validates else {"limit_val_batches": 0})
    interval = Interval.parse(options.pop("checkpoint_every", None), "trainer.checkpoint_every")
    saves = options["enable_checkpointing"] is not False and not options["fast_dev_run"]
    stop = StopRequest()
    history = History(run.history_file, options["max_epochs"])
    progress = Progress(run, history, stop, interval, saves)
    name = run.best_checkpoint.stem
    best = ModelCheckpoint(run.checkpoints, filename=name, monitor="val/loss", enable_version_counter=False)
    callbacks = [make_figures(c.figures, run, model), progress, *([best] if saves and validates else [])]
    callbacks += [LearningRateMonitor("epoch")] if c.model.get("schedule") else []
    loggers = make_loggers(c.logger, run, resume)
    check_arguments(make_trainer, options, "trainer", given=("run", "ours", "loggers"))
    trainer = make_trainer(run, callbacks, [*loggers.values(), history], **options)

    # Errors that Lightning would only report after the directory is created, or after training.
    batches = check_batches(trainer, data)
    check_monitors(trainer, model, data, c.model.get("schedule"))
    if type(model).configure_optimizers is ImageModel.configure_optimizers:  # a custom one may need the trainer
        check_schedule(trainer, model, batches)

    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        stack.enter_context(errors_name(run.path))
        if trainer.is_global_zero:
            environment = describe_environment(model, trainer.strategy.root_device, data)
            stack.enter_context(opened_directory(run, config, resume))
        last = progress.restore_last(trainer, model) if resume else None
        if trainer.is_global_zero:
            if resume:
                rewind(run, config, environment["data_checksums"], history, last and last[1])
            run.remove_partial()
            settings = flatten({"seed": c.seed, "model": c.model, "data": c.data})
            settings.pop("data.root", None)  # it may change from one machine to another
            environment["loggers"] = stack.enter_context(opened(loggers, settings))
            write_environment(run, environment)

        with user_errors(trainer, data.batch_size, stop):
            trainer.fit(model, data, ckpt_path=last and last[0], weights_only=True)
        stop.stepping = False
        stop.check()  # a signal during the last step: everything is saved

        if saves:
            first = RunDirectory(trainer.strategy.broadcast(str(run)))  # the first process's directory
            if not first.checkpoints.exists():  # max_epochs=0
                trainer.save_checkpoint(first.last_checkpoint, weights_only=False)
            if not best.best_model_path and trainer.is_global_zero:
                # No validation images, or a run that ended before its first validation.
                with atomic_write(run.best_checkpoint) as partial:
                    shutil.copyfile(run.last_checkpoint, partial)
            trainer.strategy.barrier()
            # Not by Lightning, which with averaged weights would test those of the optimizer.
            load_weights(load_checkpoint(first.best_checkpoint)["state_dict"], model, first.best_checkpoint)
        if c.test:
            trainer.test(model, data, verbose=False)
        return finish(c, run, model, data, trainer, history, best.best_model_path)


@contextlib.contextmanager
def opened_directory(run: RunDirectory, config: dict[str, Any], resume: bool) -> Iterator[None]:
    """Create the run directory, or open that of a resumed run; lock it, and log to its train.log.

    A ConfigError before the first checkpoint removes the files written since. Raises RunError if the directory holds
    another run, or another process trains it.
    """
    before = set(run.path.iterdir()) if run.path.is_dir() else set()
    if not resume:
        run.create(config)
    with run.locked():
        try:
            with log_to(run.log_file):
                yield
        except ConfigError:
            if not run.checkpoints.exists():
                for path in set(run.path.iterdir()) - before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


def rewind(
    run: RunDirectory, config: dict[str, Any], checksums: Any, history: History, checkpoint: dict[str, Any] | None
) -> None:
    """Take a run directory back to `checkpoint`, or to the start, and mark it as unfinished.

    Raises RunError, before anything is changed, if the run cannot continue from there.
    """
    if checkpoint is None and run.metrics_file.exists():
        raise RunError(f"{run}: is finished, and has no checkpoint to resume from")
    epochs, limit = epochs_started(checkpoint) if checkpoint else 0, config["trainer"].get("max_epochs")
    if limit not in (None, -1) and limit < epochs:
        raise RunError(f"trainer.max_epochs={limit}: {run} is in epoch {epochs} already")
    if run.read_environment().get("data_checksums", checksums) != checksums:
        raise RunError(f"{run}: was trained on other images than those in data.root={config['data']['root']}")
    run.reopen(config)
    rewind_events(run.tensorboard, checkpoint["progress"]["events"] if checkpoint else 0)
    history.write()
    log.info("resuming %s", f"after step {checkpoint['global_step']}" if checkpoint else "from the start")


def write_environment(run: RunDirectory, environment: dict[str, Any]) -> None:
    """Write environment.json. For a resumed run, append what has changed since the last start to its list `resumed`."""
    former = run.read_environment()
    if former:
        listed = former.get("resumed")
        before = [change for change in listed if isinstance(change, dict)] if isinstance(listed, list) else []
        latest = former | {key: value for change in before for key, value in change.items()}
        changed = {key: value for key, value in environment.items() if value != latest.get(key)}
        environment = former | {"resumed": [*before, changed]}
    write_json(run.environment_file, environment)


def finish(
    c: Config,
    run: RunDirectory,
    model: ImageModel,
    data: ImageDataModule,
    trainer: Trainer,
    history: History,
    best: str,
) -> dict[str, Any]:
    """Write metrics.json, the loss curves, and the settings in TensorBoard; return the content of metrics.json."""
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
    results = metrics | {
        "name": c.name,
        "data": data.dataset,
        "pixels": data.pixels,
        "image_shape": list(data.image_shape),
        "remark": remark(model.likelihood, data.pixels) if isinstance(model, VAE) else "",
        "checkpoint": "best" if best else "last",
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": history.seconds,
        "seed": c.seed,
        "latent_dim": model.latent_dim,
        "parameters": count_parameters(model),
    }
    if not trainer.is_global_zero:
        return results
    if metrics:
        terms = format_terms({key.partition("/")[2]: value for key, value in metrics.items()})
        kind = described(data.pixels, data.image_shape[0]) + " pixels"
        log.info("test, %s: %s", f"{kind}, cross-entropy and not a likelihood" if results["remark"] else kind, terms)
    if history.rows:  # none in Lightning's fast_dev_run
        settings = flatten({"seed": c.seed, "model": c.model, "data": c.data})
        for logger in (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)):
            logger.log_hyperparams(settings, metrics)
            logger.experiment.add_text("config", f"```yaml\n{as_yaml(asdict(c))}```")
            logger.finalize("success")
        figures.save(figures.loss_curves(history.rows), run.subdirectory(run.figures) / "loss_curves.png")
    run.previous_checkpoint.unlink(missing_ok=True)
    write_json(run.metrics_file, results)  # last, because it marks the run as finished
    return results


def make_figures(options: dict[str, Any], run: RunDirectory, model: ImageModel) -> Figures:
    """Build the callback that draws pictures. Raises ConfigError; `figures.points` must be latents of the model."""
    options = options | {"directory": run.figures}
    check_arguments(Figures, options, "figures")
    wrong = [point for point in options.get("points", ()) if len(point) != model.latent_dim]
    if wrong:
        raise ConfigError(f"figures.points={wrong[0]}: each point has model.latent_dim={model.latent_dim} coordinates")
    return Figures(**options)
