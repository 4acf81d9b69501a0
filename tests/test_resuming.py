"""A run that was stopped and resumed has the same results, bit by bit, as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, ROOT, checkpoint, composed, differences, read_results
from lightning.pytorch import Callback

from vae_lightning.config import ConfigError
from vae_lightning.data.module import ImageDataModule
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.loading import load_checkpoint, load_run
from vae_lightning.training.callbacks import TrainingError
from vae_lightning.training.checkpoints import Interval
from vae_lightning.training.signals import Interrupted, StopRequest
from vae_lightning.training.train import train

# Long enough to stop at different steps: three epochs of forty.
LONG = [
    *("trainer.max_epochs=3", "data.batch_size=100", "trainer.limit_train_batches=40", "trainer.limit_val_batches=2"),
    *("trainer.limit_test_batches=2", "figures.every=2", "figures.embedded=10", "model.backbone.hidden=[32]"),
    *("trainer.enable_model_summary=false", "trainer.accelerator=auto", "figures.samples=[2,2]"),
]


class Signal(Callback):
    """Send this process a signal once, at a given place of training."""

    armed = ""

    def __init__(self, at: str, step: int = 0, name: str = "SIGTERM") -> None:
        self.at, self.step, self.name = at, step, name

    def here(self, at: str, trainer) -> None:
        if at == self.at and Signal.armed and trainer.global_step >= self.step:
            Signal.armed = ""
            os.kill(os.getpid(), signal.Signals[self.name])

    def on_train_batch_start(self, trainer, *rest) -> None:
        self.here("batch", trainer)

    def on_validation_batch_start(self, trainer, *rest) -> None:
        self.here("validation", trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self.here("epoch_end", trainer)

    def on_train_end(self, trainer, module) -> None:
        self.here("end", trainer)

    def on_test_batch_start(self, trainer, *rest) -> None:
        self.here("test", trainer)

    def on_fit_start(self, trainer, module) -> None:
        self.here("setup", trainer)


VAMP = [
    "model/schedule=cosine", "data.pixels=dynamic", "trainer.checkpoint_every=3", "model/prior=vamp",
    "model.prior.pseudo_inputs=4", "model.objective.warmup_epochs=2", "trainer.val_check_interval=15",
]  # fmt: skip
LIGHTNING = [
    "trainer.fast_loop=false", "model/schedule=warmup", "trainer.checkpoint_every=5", "trainer.log_every_n_steps=7",
    "trainer.val_check_interval=15", "model.conditional=true",
]  # fmt: skip
EMA = [
    "trainer=ema", "data.val_size=0", "trainer.accumulate_grad_batches=3", "trainer.checkpoint_every=4",
    "trainer.gradient_clip_val=1", "model.data_bias=true", "trainer.max_epochs=9",
]  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize(
    ("overrides", "kills"),
    [
        pytest.param(VAMP, 20, id="vamp"),
        pytest.param(LIGHTNING, 20, id="lightning"),
        pytest.param(EMA, 20, id="ema"),
        pytest.param([*VAMP, "trainer.compile=true"], 10, id="compiled"),
    ],
)
def test_a_killed_run_has_the_same_results(tmp_path: Path, overrides: list[str], kills: int) -> None:
    killed = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed.py", tmp_path / "run", str(kills), "0", *LONG, *overrides],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == 0, killed.stderr
    steps = [int(line.rpartition(" ")[2]) for line in killed.stdout.splitlines()]
    assert len(steps) >= kills // 2, "too few kills"
    assert len({step % 40 for step in steps}) >= kills // 4, "too few different steps"
    assert max(steps) > 0, "no attempt left a checkpoint"
    assert differences(read_results(tmp_path / "uninterrupted"), read_results(tmp_path / "run")) == []


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped."""
    directory = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(composed(*LONG, signal_at("batch", 57)), directory)
    return directory


@pytest.fixture(scope="session")
def stopped_at_58(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal stopped at step 58 of 120; its previous checkpoint is of step 40."""
    directory = tmp_path_factory.mktemp("runs") / "stopped"
    Signal.armed = "once"
    with pytest.raises(Interrupted):
        train(composed(*LONG, signal_at("batch", 57)), directory)
    return directory


@pytest.fixture
def stopped(stopped_at_58: Path, tmp_path: Path) -> Path:
    """A copy of that run, to resume."""
    return Path(shutil.copytree(stopped_at_58, tmp_path / "run"))


def signal_at(place: str, step: int = 0, name: str = "SIGTERM") -> str:
    return f"trainer.callbacks=[{{_target_: test_resuming.Signal, at: {place}, step: {step}, name: {name}}}]"


@pytest.mark.parametrize(
    ("at", "step", "name"),
    [
        ("batch", 57, "SIGTERM"),
        ("validation", 40, "SIGTERM"),
        ("end", 0, "SIGTERM"),
        *(
            pytest.param(*case, marks=pytest.mark.proof)
            for case in (
                ("batch", 33, "SIGINT"),
                ("batch", 50, "SIGUSR1"),
                ("epoch_end", 80, "SIGTERM"),
                ("test", 0, "SIGTERM"),
                ("setup", 0, "SIGINT"),
            )
        ),
    ],
)
def test_a_signal_stops_a_run_between_two_steps(at, step, name, uninterrupted: Path, command, tmp_path: Path) -> None:
    Signal.armed = "once"
    stopped = command(*LONG, signal_at(at, step, name), "hydra.run.dir=run")
    assert stopped.code == 75
    assert stopped.err.splitlines()[-1].startswith(f"stopped by {name}")
    assert stopped.err.splitlines()[-1].endswith(f"python train.py resume={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "metrics.json").exists()
    if at == "batch":
        assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == step + 1
    resumed = command("resume=run")
    assert resumed.code == 0, resumed.err
    assert resumed.out.splitlines()[-1] == str(tmp_path / "run")
    assert differences(read_results(uninterrupted), read_results(tmp_path / "run")) == []
    assert not list(tmp_path.glob("outputs/*/*")), "Hydra leaves no directory"


def test_a_second_ctrl_c_does_not_wait() -> None:

    stop = StopRequest()
    with stop.listening():
        stop.stepping = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(Interrupted, match="at once"):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        stop.check()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["model.latent_dim=5"], "model.latent_dim=5: is 20 in "),
        (["model/backbone=conv"], "model.backbone._target_=vae_lightning.models.backbones.Conv: is vae_lightning"),
        (["model/objective=iwae"], "model.objective"),
        (["seed=1"], "seed=1: is 0"),
        (["~trainer.max_epochs"], "trainer.max_epochs=missing: is 3"),
        (["-m"], "resume=run: is for one run; the same command resumes a sweep"),
        (["trainer.max_epochs=2"], "is in epoch 3 already"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(
    uninterrupted: Path, command, tmp_path: Path, words: list[str], wanted: str
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.name != "train.log"}
    refused = command("resume=run", *words)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
    assert wanted in refused.err
    assert before == {path: path.read_bytes() for path in run.rglob("*.*") if path.name != "train.log"}


@pytest.mark.parametrize("path", ["nowhere", "empty", "''", "5", "true"])
def test_only_a_run_directory_can_be_resumed(command, tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    refused = command(f"resume={path}")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "not a run directory" in refused.err or "resume=" in refused.err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("spoil", [lambda content: content[:1_000], lambda content: content[::-1], lambda content: b""])
def test_a_damaged_checkpoint_is_reported_in_one_line(stopped: Path, command, spoil) -> None:
    last = stopped / "checkpoints" / "last.ckpt"
    last.write_bytes(spoil(last.read_bytes()))
    refused = command("resume=run")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert refused.err.startswith(f"{last}: damaged")


def test_a_checkpoint_of_an_earlier_version_is_refused(stopped: Path, command) -> None:
    """Those up to 0.1 have no step from which TensorBoard continues. Such a run can be loaded."""
    last = stopped / "checkpoints" / "last.ckpt"
    content = load_checkpoint(last)
    del content["progress"]["purge_step"]
    torch.save(content, last)
    refused = command("resume=run")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "by an earlier version, so it cannot be resumed; it can be loaded and evaluated" in refused.err
    assert load_run(last).latent_dim == 20


def test_a_finished_run_is_extended(uninterrupted: Path, command, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(uninterrupted, tmp_path / "run"))
    run.evaluation_file.write_text("{}")
    before = json.loads(run.metrics_file.read_text())
    Signal.armed = "once"
    assert command("resume=run", "trainer.max_epochs=5").code == 75
    assert run.state == "unfinished"
    assert json.loads(run.metrics_file.read_text()) == before | {"unfinished": True}
    assert command("resume=run/checkpoints/best.ckpt").code == 0  # names the run
    assert run.state == "finished"
    longer = read_results(run.path)
    longer["files"].remove("evaluation_3_epochs.json")  # the earlier evaluation is kept under another name
    assert command(*LONG, signal_at("batch", 57), "hydra.run.dir=fresh", "trainer.max_epochs=5").code == 0
    assert differences(read_results(tmp_path / "fresh"), longer) == []
    environment = run.read_environment()
    assert len(environment["resumed"]) == 2
    assert len(environment["data_checksums"]["train"]) == 64


def test_other_data_are_refused(stopped: Path, command) -> None:
    environment = json.loads((stopped / "environment.json").read_text())
    environment["data_checksums"]["test"] = "0" * 64
    (stopped / "environment.json").write_text(json.dumps(environment))
    refused = command("resume=run")
    assert refused.code == 2
    assert "was trained on other images" in refused.err


def test_a_run_without_checkpoint_starts_again(config, tmp_path: Path) -> None:
    Signal.armed = "once"
    callback = signal_at("setup")
    with pytest.raises(Interrupted):
        train(config(*LONG, callback), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert train(config(*LONG, callback), tmp_path / "run", resume=True)["epochs"] == 3


DOZEN = [1, 1_000, 2_000, 5_000, 8_000, 16_000, 30_000, 45_000, 80_000, 100_000, 200_000, 400_000]


@pytest.mark.proof
@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        pytest.param(32, ["config.yaml", ".ckpt"], id="many"),
        pytest.param(1, ["config.yaml"], id="tensorboard"),
    ],
)
def test_a_full_disk_is_reported_in_one_line_and_damages_no_checkpoint(
    tmp_path: Path, width: int, wanted: list[str]
) -> None:
    """The size of files is limited. With a small model and many samples, TensorBoard's file is the largest."""
    words = [*LONG, f"model.backbone.hidden=[{width}]", "figures.every=1", f"data.root={ROOT / 'data'}"]
    words += ["figures.samples=[10,10]"] if width == 1 else []
    script = [sys.executable, ROOT / "tests" / "full_disk.py", tmp_path, ",".join(map(str, DOZEN)), *words]
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["size"] for outcome in outcomes] == DOZEN
    refused = [outcome for outcome in outcomes if outcome["status"] != 0]
    for outcome in refused:
        run = tmp_path / str(outcome["size"])
        assert outcome["status"] == 2, outcome["stderr"]
        assert len(outcome["stderr"].splitlines()) == 1, outcome["stderr"]
        assert "File too large" in outcome["stderr"]
        assert not [name for name in outcome["files"] if ".partial" in name]
        for file in run.rglob("*.ckpt"):
            assert load_checkpoint(file)["global_step"] > 0
    said = " ".join(outcome["stderr"] for outcome in refused)
    assert all(word in said for word in wanted), said
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--git-path", "index.lock"], capture_output=True, text=True)
    if git.returncode == 0:  # not a copy without its history
        assert not (ROOT / git.stdout.strip()).exists(), "of git, which is called for the commit"


@pytest.mark.parametrize("text", ["0", "-5", "5parsecs", "1.5", "true", "10 min later"])
def test_checkpoint_every_is_steps_or_a_time(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint_every={text}: should be a number of steps, or a time such as"):
        Interval.parse(text)


def test_checkpoint_every_reads_steps_and_times() -> None:
    assert [Interval.parse(text) for text in (None, 500, "500", "30s", "10min", "2h")] == [
        Interval(), Interval(steps=500), Interval(steps=500), Interval(seconds=30), Interval(seconds=600),
        Interval(seconds=7200),
    ]  # fmt: skip


def test_a_run_without_a_test_does_not_read_the_test_set(command, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataModule, "test_dataloader", lambda self: pytest.fail("the test set was read"))
        assert command(*BRIEF, "test=false", "hydra.run.dir=run").code == 0
    file = tmp_path / "run" / "metrics.json"
    assert not [key for key in json.loads(file.read_text()) if key.startswith("test/")]
    assert not (tmp_path / "run" / "figures" / "reconstructions.png").exists()
    assert command("resume=run", "test=true").code == 0
    assert "test/loss" in json.loads(file.read_text())


class Bad(Callback):
    """Set the gradient of some steps to NaN."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step + 1 in self.steps:
            next(module.parameters()).grad[0] = float("nan")


def test_updates_that_are_not_finite_are_skipped(config, tmp_path: Path, caplog) -> None:
    bad = "trainer.callbacks=[{_target_: test_resuming.Bad, steps: [3, 50, 51]}]"
    with pytest.raises(ConfigError, match=r"on_nan=skip: trainer\.precision=16-mixed skips such updates itself"):
        train(config(*LONG, "trainer.precision=16-mixed", "trainer.on_nan=skip"), tmp_path / "half")
    metrics = train(config(*LONG, bad, "trainer.on_nan=skip"), tmp_path / "run")
    assert metrics["test/loss"] < 500
    assert [float(row["health/skipped"]) for row in read_results(tmp_path / "run")["history"]] == [1, 2, 0]
    assert sum("is not finite; its update is skipped" in record.message for record in caplog.records) == 3
    with pytest.raises(TrainingError, match="became NaN or infinite at step 4"):
        train(config(*LONG, bad), tmp_path / "stopped")
    many = bad.replace("[3, 50, 51]", str(list(range(10, 40))))
    with pytest.raises(TrainingError, match="20 updates in a row were not finite, the last at step 29"):
        train(config(*LONG, many, "trainer.on_nan=skip"), tmp_path / "often")


class OutOfMemory(Callback):
    def on_train_batch_start(self, *args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


def test_out_of_memory_is_reported_in_one_line(command) -> None:
    refused = command(*LONG, "trainer.callbacks=[{_target_: test_resuming.OutOfMemory}]")
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("out of memory: lower data.batch_size, with trainer.accumulate")


def test_early_stopping_survives_a_resume(command, tmp_path: Path) -> None:
    early = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 1, min_delta: 1000}"
    callbacks = f"trainer.callbacks=[{early}, {{_target_: test_resuming.Signal, at: test}}]"
    words = [*LONG, "trainer.max_epochs=6", callbacks]
    assert command(*words, "hydra.run.dir=uninterrupted").code == 0
    for _ in range(2):
        Signal.armed = "once"
        assert command(*words, "hydra.run.dir=run", "resume=auto").code == 75
    assert command("resume=run").code == 0
    assert read_results(tmp_path / "run")["metrics"]["epochs"] == 2
    assert differences(read_results(tmp_path / "uninterrupted"), read_results(tmp_path / "run")) == []


def test_a_longer_run_keeps_its_schedule(command, tmp_path: Path) -> None:
    words = [*LONG, "hydra.run.dir=run", "trainer.limit_train_batches=2", "model/schedule=cosine"]
    assert command(*words, "trainer.max_epochs=1").code == 0
    longer = command("resume=run", "trainer.max_epochs=2")
    assert (longer.code, "model.schedule stays as it was for trainer.max_epochs=1" in longer.out) == (0, True)
    assert checkpoint(tmp_path / "run")["lr_schedulers"][0]["T_max"] == 1
    cycle = "model.schedule={_target_: torch.optim.lr_scheduler.OneCycleLR, interval: step}"
    assert command(*words[:-1], "trainer.max_epochs=1", cycle, "hydra.run.dir=cycle").code == 0
    refused = command("resume=cycle", "trainer.max_epochs=2")
    assert (refused.code, refused.err.splitlines()[-1]) == (
        2,
        "trainer.max_epochs: a OneCycleLR ends with its run, which has 1 epochs",
    )


def test_a_run_with_damaged_metrics_is_not_finished(uninterrupted: Path, command, tmp_path: Path) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "metrics.json").write_text("")
    assert command("resume=run").code == 0
    assert differences(read_results(uninterrupted), read_results(run)) == []
