"""`train(config)`: compose data, model and trainer, fit, test, and leave a whole run directory."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pydantic import Field

from vae_lightning import figures
from vae_lightning.config import (
    ConfigError,
    Interval,
    Seed,
    Spec,
    build,
    check_arguments,
    flatten,
    out_of_memory,
)
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import described
from vae_lightning.files import as_yaml, atomic_write, errors_name, write_json
from vae_lightning.models.base import ImageModel
from vae_lightning.models.likelihoods import remark
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunDirectory, RunError, StrPath
from vae_lightning.runs.environment import count_parameters, describe_environment
from vae_lightning.runs.loading import load_checkpoint, load_weights
from vae_lightning.training.callbacks import Figures, TrainingError
from vae_lightning.training.checkpoints import Progress, epochs_begun, last_checkpoint, rewind
from vae_lightning.training.history import History, format_terms
from vae_lightning.training.loggers import make_loggers, opened
from vae_lightning.training.signals import StopRequest
from vae_lightning.training.trainer import TRAINER_DEFAULTS, check_batches, check_monitors, make_trainer

log = logging.getLogger(__name__)


@dataclass
class Config:
    """What conf/train.yaml composes: plain dictionaries, lists, numbers and strings."""

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

    With `resume`, continue the run that `directory` holds from its last checkpoint, as if it had never stopped.

    The test set is read once, at the end, with the checkpoint of lowest val/loss, or with the last weights where no
    images were held out. Raises UserError, before anything is written, for what cannot be trained, and Interrupted
    where a signal asked to stop.
    """
    run = RunDirectory(directory)
    check_arguments(Config, config, "")
    c = Config(**config)
    c.trainer = TRAINER_DEFAULTS | c.trainer  # a run of another version of Lightning may lack an argument
    seed_everything(c.seed, verbose=False)
    steady_cpu()
    share_log()

    data = build(c.data, ImageDataModule, "data", seed=c.seed)
    data.setup()  # now, so that a wrong file or split is found before anything is written
    model = build(c.model, ImageModel, "model", image_shape=data.image_shape)
    validates = data.val_size > 0 and c.trainer["limit_val_batches"] != 0
    pictures = make_figures(c.figures, run, model)
    history = History(run.history_file, c.trainer["max_epochs"])
    loggers = make_loggers(c.logger, run, logger_ids(run) if resume else {})
    name = run.best_checkpoint.stem
    best = ModelCheckpoint(run.checkpoints, filename=name, monitor="val/loss", enable_version_counter=False)
    options = c.trainer | ({} if validates else {"limit_val_batches": 0})
    keeps = options["enable_checkpointing"] is not False and not options["fast_dev_run"]
    interval = Interval.parse(options.pop("checkpoint_every", None), "trainer.checkpoint_every")
    stop = StopRequest()
    kept = [Progress(run, history, stop, interval, keeps), *([best] if keeps and validates else [])]
    ours = [pictures, *kept, *schedule_monitor(c.model)]
    check_arguments(make_trainer, options, "trainer", given=("run", "ours", "loggers"))
    trainer = make_trainer(run, ours, [*loggers.values(), history], **options)
    # What Lightning would find later, when the directory is begun, or when all is trained.
    check_batches(options, data, trainer.world_size)
    check_monitors(trainer, model, data, c.model.get("schedule"))
    if type(model).configure_optimizers is ImageModel.configure_optimizers:  # another may want the trainer
        model.configure_optimizers()

    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        stack.enter_context(errors_name(run.path))
        if trainer.is_global_zero:
            environment = describe_environment(model, trainer.strategy.root_device, data)
            last = stack.enter_context(started(run, config, resume, environment, model, loggers))
        else:
            last = last_checkpoint(run, model) if resume else None
        with user_errors(trainer, data.batch_size):
            trainer.fit(model, data, ckpt_path=last and last[0], weights_only=True)
        stop.stepping = False
        stop.check()  # a signal of the last step: everything is saved
        first = RunDirectory(trainer.strategy.broadcast(str(run)))  # the first process's
        if keeps and not first.checkpoints.exists():  # max_epochs=0
            trainer.save_checkpoint(first.last_checkpoint, weights_only=False)
        if keeps and not best.best_model_path and trainer.is_global_zero:
            # The last is the best there is: no images were held out, or the run was too short to look at them.
            with atomic_write(run.best_checkpoint) as partial:
                shutil.copyfile(run.last_checkpoint, partial)
        if c.test:
            if keeps:  # by ourselves: with averaged weights, Lightning would test the last ones of the optimizer
                load_weights(load_checkpoint(first.best_checkpoint)["state_dict"], model, first.best_checkpoint)
            trainer.test(model, data, verbose=False)
        return finish(c, run, model, data, trainer, history, best.best_model_path)


@contextlib.contextmanager
def started(
    run: RunDirectory,
    config: dict[str, Any],
    resume: bool,
    environment: dict[str, Any],
    model: ImageModel,
    loggers: Mapping[str, Logger],
) -> Iterator[tuple[Path, dict[str, Any]] | None]:
    """A run directory, made or resumed, locked, and its loggers: yields the checkpoint to resume from, if any.

    Raises RunError, before anything is touched, where it holds another run, is trained by another process, or cannot be
    resumed.
    """
    before = set(run.path.iterdir()) if run.path.is_dir() else set()
    if not resume:
        run.create(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.locked())
        if not resume:
            stack.enter_context(discarded_if_refused(run, before))
        stack.enter_context(log_to(run.log_file))
        last = prepare_resume(run, config, environment, model) if resume else None
        if not resume:
            run.remove_partial()
        former = run.read_environment()
        settings = flatten({"seed": config["seed"], "model": config["model"], "data": config["data"]})
        settings.pop("data.root", None)  # which may change from one machine to another
        environment["loggers"] = stack.enter_context(opened(loggers, settings))
        if former:
            changed = {key: value for key, value in environment.items() if value != former.get(key)}
            before = former.get("resumed", [])
            environment = former | {"resumed": [*(before if isinstance(before, list) else []), changed]}
        write_json(run.environment_file, environment)
        yield last


@contextlib.contextmanager
def discarded_if_refused(run: RunDirectory, before: set[Path]) -> Iterator[None]:
    """Around a new run: where its configuration is found to be wrong before it is saved once, nothing of it stays."""
    try:
        yield
    except ConfigError:
        if not run.checkpoints.exists():
            for path in set(run.path.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def prepare_resume(
    run: RunDirectory, config: dict[str, Any], environment: dict[str, Any], model: ImageModel
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint from which a run is resumed; what was written after it is taken out. Raises RunError."""
    last = last_checkpoint(run, model)
    if last is None and run.metrics_file.exists():
        raise RunError(f"{run}: is finished, and has no checkpoint to resume from")
    epochs, limit = epochs_begun(last[1]) if last else 0, config["trainer"].get("max_epochs")
    if limit not in (None, -1) and limit < epochs:
        raise RunError(f"trainer.max_epochs={limit}: {run} is in epoch {epochs} already")
    former = run.read_environment()
    if former.get("data_checksums", environment["data_checksums"]) != environment["data_checksums"]:
        raise RunError(f"{run}: was trained on other images than data.root={config['data']['root']} has")
    run.reopen(config)
    rewind(run, last[1]["progress"] if last else None)
    log.info("resuming %s", f"after step {last[1]['global_step']}" if last else "from the start")
    return last


def logger_ids(run: RunDirectory) -> dict[str, str]:
    """The ids that a run has at its loggers."""
    ids = run.read_environment().get("loggers")
    return {name: value for name, value in ids.items() if isinstance(value, str)} if isinstance(ids, dict) else {}


@contextlib.contextmanager
def log_to(file: Path) -> Iterator[None]:
    """Write what is logged in the block to the end of `file`, too."""
    handler = logging.FileHandler(file, delay=True)
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def user_errors(trainer: Trainer, batch_size: int) -> Iterator[None]:
    """Around training: what the person at the keyboard can mend, in a line, as TrainingError or ConfigError."""
    try:
        yield
    except (MisconfigurationException, RuntimeError, MemoryError) as error:
        said = " ".join(str(error).split())
        if out_of_memory(error):
            raise TrainingError(
                f"out of memory at step {trainer.global_step + 1}: lower data.batch_size={batch_size} (half of it "
                "with trainer.accumulate_grad_batches=2 makes the same steps), or the model's width or samples "
                f"({said[:150]})"
            ) from error
        if "returned nan values" in said:  # trainer.detect_anomaly
            raise TrainingError(f"became NaN at step {trainer.global_step + 1}: {said}") from error
        if isinstance(error, MisconfigurationException) or "arly stopping" in said:
            raise ConfigError(f"trainer: {said}") from error
        raise


def finish(
    c: Config,
    run: RunDirectory,
    model: ImageModel,
    data: ImageDataModule,
    trainer: Trainer,
    history: History,
    best: str,
) -> dict[str, Any]:
    """Write metrics.json, the loss curves and what TensorBoard shows of a finished run; return the metrics."""
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
    results = metrics | {
        "name": c.name,
        "data": data.dataset,
        "pixels": data.pixels,
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
    write_json(run.metrics_file, results)  # last: it says that the run is finished
    return results


def make_figures(options: dict[str, Any], run: RunDirectory, model: ImageModel) -> Figures:
    """The pictures callback; `figures.points` must be latents of the model. Raises ConfigError."""
    options = options | {"directory": run.figures}
    check_arguments(Figures, options, "figures")
    wrong = [point for point in options.get("points", ()) if len(point) != model.latent_dim]
    if wrong:
        raise ConfigError(f"figures.points={wrong[0]}: each point has model.latent_dim={model.latent_dim} coordinates")
    return Figures(**options)


def schedule_monitor(model: Spec) -> list[Callback]:
    """Lightning's learning-rate curve, where the learning rate has one."""
    return [LearningRateMonitor("epoch")] if model.get("schedule") else []


def steady_cpu() -> None:
    """Settings of the process that make the CPU's pace steady, and change no result worth having."""
    # Denormal numbers slow arithmetic many times over, and small models drift into them after a few epochs.
    torch.set_flush_denormal(True)
    # glibc hands the memory of each step's gradients back to the kernel, and pays for it in page faults at the next.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold, never = -1, -3, 2**31 - 1  # <malloc.h>
        mallopt(m_trim_threshold, never)
        mallopt(m_mmap_threshold, never)
    # Optimizers ask for a GPU at each step. Lightning has that answered by searching the disk for NVIDIA's library, so
    # that processes may still be forked; where there is no GPU, the driver's own answer is many times quicker.
    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def share_log() -> None:
    """Let Lightning's messages go where ours go, to the console and train.log, less what helps nobody here."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.filters.clear()
        logger.addFilter(lambda record: "Tip:" not in record.msg and "already configured" not in record.msg)
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")  # Lightning 2.6, on the newest torch
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on the newest torch
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a resumed run's is
    warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")  # nothing here is logged by the step
