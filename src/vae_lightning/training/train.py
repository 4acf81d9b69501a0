"""`train(config)`: build data, model and trainer, fit, test, and leave a complete run directory."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field
from torch.utils.tensorboard.summary import hparams

from vae_lightning import figures
from vae_lightning.config import ConfigError, Seed, Spec, build, check_arguments, flatten
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import described
from vae_lightning.files import atomic_write, write_json
from vae_lightning.models.base import ImageModel
from vae_lightning.models.likelihoods import remark
from vae_lightning.models.metrics import MONITOR, better
from vae_lightning.models.standard_figures import overview
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory, RunError, StrPath
from vae_lightning.runs.environment import count_parameters, describe_environment
from vae_lightning.runs.loading import load_checkpoint, load_weights, weights_from
from vae_lightning.training.callbacks import Figures
from vae_lightning.training.checkpoints import Interval, Progress, load_last
from vae_lightning.training.history import History, format_terms
from vae_lightning.training.loggers import make_loggers, opened, tensorboard_writers
from vae_lightning.training.process import log_to, share_log, steady_cpu
from vae_lightning.training.signals import StopRequest
from vae_lightning.training.trainer import TRAINER_DEFAULTS, make_trainer

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
    init: Annotated[str, Field(min_length=1)] | None = None
    init_strict: bool = True


def train(
    config: dict[str, Any], directory: StrPath, resume: bool = False, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train what `config` describes into `directory`, and return the content of its metrics.json.

    With `resume`, continue the run in `directory` from its last checkpoint, exactly as if it had not stopped. The test
    set is used once, at the end, with the weights of the lowest val/loss, or the last ones without validation images.
    A new run that fails before its first checkpoint leaves no files.
    Raises UserError if the run cannot be trained, and Interrupted if a signal stopped it.
    """
    run = RunDirectory(directory)
    check_arguments(Config, config, "")
    c = Config(**config)
    c.trainer = TRAINER_DEFAULTS | c.trainer  # a run of another Lightning version may lack an argument
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        # 1. The process: signals, seed, settings; the first of several has the directory
        stack.enter_context(stop.listening())
        seed_everything(c.seed, verbose=False)
        steady_cpu()
        share_log()
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        if is_first:
            stack.enter_context(run.locked())
            if not resume:
                run.create(config)
                stack.enter_context(discarded_if_it_fails(run))
            stack.enter_context(log_to(run.log_file))

        # 2. Data and model
        data = build(c.data, ImageDataModule, "data", seed=c.seed)
        data.setup()
        of_data = {"image_shape": data.image_shape} | ({"classes": data.classes} if c.model.get("conditional") else {})
        model = build(c.model, ImageModel, "model", **of_data)
        if c.init and not resume:
            model.initial_weights = weights_from(c.init, model, c.init_strict)

        # 3. Loggers, callbacks and trainer
        checkpoint = load_last(run) if resume else None
        loggers = make_loggers(c.logger, run, resume, checkpoint)
        options = c.trainer | ({} if data.val_size else {"limit_val_batches": 0})
        interval = Interval.parse(options.pop("checkpoint_every", None))
        saves = options["enable_checkpointing"] is not False and not options["fast_dev_run"]
        history = History(run.history_file, options["max_epochs"])
        progress = Progress(run, history, stop, interval, saves)
        name = run.best_checkpoint.stem
        best = ModelCheckpoint(
            run.checkpoints, filename=name, monitor=MONITOR, mode=better(MONITOR), enable_version_counter=False
        )
        drawn = build(partial(Figures, **c.figures), Figures, "figures", directory=run.figures)
        ours = [drawn, progress, LearningRateMonitor("epoch"), *callbacks]
        ours += [best] if saves and options["limit_val_batches"] != 0 else []
        check_arguments(make_trainer, options, "trainer", given=("run", "ours", "loggers"))
        trainer = make_trainer(run, ours, [*loggers.values(), history], **options)
        check_test_batches(trainer, data)

        # 4. The description of the run
        if is_first:
            environment = describe_environment(model, trainer.strategy.root_device, data)
            if resume:
                rewind(run, config, environment, checkpoint)
            settings = flatten({"seed": c.seed, "model": c.model, "data": c.data})
            settings.pop("data.root", None)  # it may change from one machine to another
            environment["loggers"] = stack.enter_context(opened(loggers, settings))
            write_environment(run, environment)

        # 5. Fit
        trainer.fit(model, data, ckpt_path=run.last_checkpoint if checkpoint else None, weights_only=True)
        stop.stepping = False
        stop.check()  # a signal during the last step: everything is saved

        end = {"stopped": reason_to_stop(trainer), "checkpoint_steps": trainer.global_step}
        log.info("training stopped: %s", end["stopped"])

        # 6. Test with the weights of the best checkpoint
        if saves:
            first = RunDirectory(trainer.strategy.broadcast(str(run)))  # the first process's directory
            if not first.checkpoints.exists():  # max_epochs=0
                trainer.save_checkpoint(first.last_checkpoint, weights_only=False)
            if not best.best_model_path and is_first:
                # No validation images, or a run that ended before its first validation.
                with atomic_write(run.best_checkpoint) as file:
                    shutil.copyfile(run.last_checkpoint, file)
            trainer.strategy.barrier()
            # Not by Lightning, which with averaged weights would test those of the optimizer.
            tested = load_checkpoint(first.best_checkpoint)
            load_weights(tested["state_dict"], model, first.best_checkpoint)
            end["checkpoint_steps"] = tested["global_step"]
        if c.test:
            trainer.test(model, data, verbose=False)

        # 7. Results
        results = describe_results(c, model, data, trainer, history, best.best_model_path) | end
        if is_first and history.rows:  # none in Lightning's fast_dev_run
            model.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            figures.save(overview(model, data, history.rows, results, c.name), run.figures / "overview.png")
        if is_first:
            write_results(c, run, settings, results, trainer, history)
        return results


def check_test_batches(trainer: Trainer, data: ImageDataModule) -> None:
    """Raise ConfigError for a share of the test set below one batch, which Lightning refuses only after training."""
    batches = -(-len(data.test_images) // (data.batch_size * trainer.world_size))
    limit = trainer.limit_test_batches
    if isinstance(limit, float) and 0 < limit < 1 / batches:
        raise ConfigError(f"trainer.limit_test_batches={limit}: is less than one of {batches} batches")


@contextlib.contextmanager
def discarded_if_it_fails(run: RunDirectory) -> Iterator[None]:
    """Remove the files of a new run that fails before its first checkpoint: there is nothing to resume."""
    try:
        yield
    except Exception:
        if not run.checkpoints.exists():
            run.discard()
        raise


def rewind(
    run: RunDirectory, config: dict[str, Any], environment: dict[str, Any], checkpoint: dict[str, Any] | None
) -> None:
    """Mark a run as unfinished, to continue from `checkpoint` or from the start.

    Raises RunError, before anything is changed, if the run cannot continue from there.
    """
    if checkpoint is None and run.metrics_file.exists():
        raise RunError(f"{run}: is finished, and has no checkpoint to resume from")
    limit, epochs = config["trainer"].get("max_epochs"), 0
    if checkpoint:
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"]
    if limit not in (None, -1) and limit < epochs:
        raise RunError(f"trainer.max_epochs={limit}: {run} is in epoch {epochs} already")
    if run.read_environment().get("data_checksums", environment["data_checksums"]) != environment["data_checksums"]:
        raise RunError(f"{run}: was trained on other images than those in data.root={config['data'].get('root')}")
    run.reopen(config)
    log.info("resuming %s", f"after step {checkpoint['global_step']}" if checkpoint else "from the start")


def write_environment(run: RunDirectory, environment: dict[str, Any]) -> None:
    """Write environment.json. For a resumed run, append what has changed since the last start to its list `resumed`."""
    if former := run.read_environment():
        latest = former | {key: value for change in former.get("resumed", []) for key, value in change.items()}
        changed = {key: value for key, value in environment.items() if value != latest.get(key)}
        environment = former | {"resumed": [*former.get("resumed", []), changed]}
    write_json(run.environment_file, environment)


def reason_to_stop(trainer: Trainer) -> str:
    """Return why training ended: the limit under `trainer` that was reached, or the reason of early stopping."""
    if trainer.global_step == trainer.max_steps:
        return "max_steps"
    if trainer.current_epoch == trainer.max_epochs:
        return "max_epochs"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and (reason := callback.stopping_reason_message):
            return f"early stopping in epoch {callback.stopped_epoch + 1}: {reason.partition(' Signaling')[0]}"
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            return "max_time"
    return "a callback" if trainer.should_stop else "no batches"


def describe_results(
    c: Config, model: ImageModel, data: ImageDataModule, trainer: Trainer, history: History, best: str
) -> dict[str, Any]:
    """Return the content of metrics.json: the test metrics and their conditions."""
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
    return metrics | {
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


def write_results(
    c: Config, run: RunDirectory, settings: dict[str, Any], results: dict[str, Any], trainer: Trainer, history: History
) -> None:
    """Write metrics.json, the loss curves, and the settings in TensorBoard."""
    metrics = {key: value for key, value in results.items() if key.startswith("test/")}
    if metrics:
        terms = format_terms({key.partition("/")[2]: value for key, value in metrics.items()})
        kind = described(results["pixels"], results["image_shape"][0]) + " pixels"
        log.info("test, %s: %s", f"{kind}, cross-entropy and not a likelihood" if results["remark"] else kind, terms)
    if history.rows:  # none in Lightning's fast_dev_run
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        for writer in tensorboard_writers(trainer):
            writer.add_text("config", f"```yaml\n{yaml.safe_dump(asdict(c), sort_keys=False)}```")
            for part in hparams(settings, metrics):  # `add_hparams` would write the metrics, which are there, again
                writer.file_writer.add_summary(part)  # type: ignore[attr-defined]
            writer.close()
        figures.save(figures.loss_curves(history.rows), run.figures / "loss_curves.png")
    write_json(run.metrics_file, results)  # last, because it marks the run as finished
