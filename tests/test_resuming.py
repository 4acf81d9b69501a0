"""A run that was stopped and resumed has the same results, bit by bit, as an uninterrupted one."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, ROOT, composed
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vae_lightning.analysis.reports import read_result
from vae_lightning.config import ConfigError, Interval
from vae_lightning.data.module import ImageDataModule
from vae_lightning.files import as_yaml
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import load_checkpoint
from vae_lightning.runs.resume import find_run
from vae_lightning.training.callbacks import TrainingError
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train

SMALL = [
    "trainer.max_epochs=3", "data.batch_size=100", "trainer.limit_train_batches=40", "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2", "figures.every=2", "figures.embedded=10", "model.backbone.hidden=[32]",
    "trainer.enable_model_summary=false", "trainer.accelerator=auto", "figures.samples=[2,2]",
]  # fmt: skip
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}


def read_results(directory: Path) -> dict:
    """Return all results of a run, without times and paths."""
    found: dict = {}
    for name in ("last", "best"):
        found[name] = torch.load(directory / "checkpoints" / f"{name}.ckpt", weights_only=True)
        progress = found[name].pop("progress")
        found[name] |= {key: progress[key] for key in ("random", "means", "logged")}
        for key, state in found[name]["callbacks"].items():
            found[name]["callbacks"][key] = without(state.get("dirpath", "-"), state)
    with (directory / "history.csv").open() as file:
        found["history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    metrics = json.loads((directory / "metrics.json").read_text())
    found["metrics"] = {key: value for key, value in metrics.items() if key != "seconds"}
    board = EventAccumulator(str(directory / "tensorboard"), EVERYTHING).Reload()
    tags = board.Tags()
    # Sorted: of files of one second TensorBoard reads the tenth of a process before the ninth.
    found["scalars"] = {tag: sorted((e.step, e.value) for e in board.Scalars(tag)) for tag in tags["scalars"]}
    found["images"] = {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    found["histograms"] = {
        tag: [(e.step, e.histogram_value) for e in board.Histograms(tag)] for tag in tags["histograms"]
    }
    found["files"] = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*.*") if "tfev" not in str(path)
    )
    return found


def without(prefix: str, tree):
    """Return a copy of nested dictionaries with `prefix` removed from keys and values."""
    if isinstance(tree, dict):
        return {without(prefix, key): without(prefix, value) for key, value in tree.items()}
    return tree.replace(prefix, "") if isinstance(tree, str) else tree


def differences(a, b, where: str = "") -> list[str]:
    """Return the keys at which two nested dictionaries or lists differ; tensors are compared bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [place for key in a.keys() | b.keys() for place in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for n, pair in enumerate(zip(a, b, strict=True)) for place in differences(*pair, f"{where}.{n}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [where]


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


@pytest.mark.parametrize(
    ("overrides", "kills"),
    [
        pytest.param(VAMP, 2, id="few"),
        pytest.param(VAMP, 20, id="vamp", marks=pytest.mark.proof),
        pytest.param(LIGHTNING, 20, id="lightning", marks=pytest.mark.proof),
        pytest.param(EMA, 20, id="ema", marks=pytest.mark.proof),
        pytest.param([*VAMP, "trainer.compile=true"], 10, id="compiled", marks=pytest.mark.proof),
    ],
)
def test_a_killed_run_has_the_same_results(tmp_path: Path, overrides: list[str], kills: int) -> None:
    killed = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed.py", tmp_path / "run", str(kills), "0", *SMALL, *overrides],
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
    train(composed(*SMALL, signal_at("batch", 57)), directory)
    return directory


@pytest.fixture(scope="session")
def stopped_at_58(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal stopped at step 58 of 120; its previous checkpoint is of step 40."""
    directory = tmp_path_factory.mktemp("runs") / "stopped"
    Signal.armed = "once"
    with pytest.raises(Interrupted):
        train(composed(*SMALL, signal_at("batch", 57)), directory)
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
    stopped = command(*SMALL, signal_at(at, step, name), "hydra.run.dir=run")
    assert stopped.code == 75
    assert stopped.err.splitlines()[-1].startswith(f"stopped by {name}")
    assert stopped.err.splitlines()[-1].endswith(f"python train.py resume={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "metrics.json").exists()
    if at == "batch":
        assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == step + 1
    resumed = command("resume=run", "trust=[test_resuming]")
    assert resumed.code == 0, resumed.err
    assert resumed.out.splitlines()[-1] == str(tmp_path / "run")
    assert differences(read_results(uninterrupted), read_results(tmp_path / "run")) == []
    assert not list(tmp_path.glob("outputs/*/*")), "Hydra leaves no directory"


def test_a_second_ctrl_c_does_not_wait() -> None:
    from vae_lightning.training.signals import StopRequest

    stop = StopRequest()
    with stop.listening():
        stop.stepping = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(Interrupted, match="at once"):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        stop.check()


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(stopped: Path, command, tmp_path: Path) -> None:
    last, previous = (stopped / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    shutil.copytree(stopped, tmp_path / "both")
    resumed = command("resume=run", "trust=[test_resuming]")
    assert resumed.code == 0, resumed.err
    log = (stopped / "train.log").read_text()
    assert f"{last}: damaged" in log
    assert f"resuming from the previous checkpoint, {previous}, at step 40" in log
    both = tmp_path / "both"
    (both / "checkpoints" / "previous.ckpt").write_bytes(b"")
    refused = command("resume=both", "trust=[test_resuming]")
    assert refused.code == 2
    assert refused.err.splitlines()[-1].endswith(f"to train from the start, remove {both / 'checkpoints'}")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["model.latent_dim=5"], ["model.latent_dim=5: is 20", "change only trainer.max_epochs"]),
        (["model/backbone=conv"], ["model/backbone: model.backbone._target_ is vae_lightning.models.backbones.MLP"]),
        (["model/objective=iwae"], ["model/objective"]),
        (["seed=1"], ["seed=1: is 0"]),
        (["~trainer.max_epochs"], ["trainer.max_epochs: is 3"]),
        (["trust=[]"], ["test_resuming.Signal", "trust=[test_resuming] allows it"]),
    ],
)
def test_a_resumed_run_keeps_its_configuration(stopped: Path, command, words, wanted) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*.*")}
    refused = command("resume=run", *([] if "trust=[]" in words else ["trust=[test_resuming]"]), *words)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    for word in wanted:
        assert word in refused.err
    assert before == {path: path.read_bytes() for path in stopped.rglob("*.*")}


def test_only_a_run_directory_can_be_resumed(command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in ("nowhere", "empty"):
        refused = command(f"resume={directory}")
        assert refused.code == 2
        assert "not a run directory" in refused.err
        assert len(refused.err.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_run_is_locked_by_its_process(stopped: Path, command) -> None:
    with RunDirectory(stopped).locked():
        refused = command("resume=run", "trust=[test_resuming]")
    assert refused.code == 2
    assert refused.err == f"{stopped}: is being trained by another process\n"


def test_a_configuration_without_arguments_that_have_a_default(config, tmp_path: Path) -> None:
    handed = config(*SMALL, "trainer.max_steps=3")
    for key in ("max_epochs", "devices", "num_nodes"):
        del handed["trainer"][key]
    assert train(handed, tmp_path / "run")["steps"] == 3
    handed["trainer"]["max_steps"] = 5
    assert train(handed, tmp_path / "run", resume=True)["steps"] == 5


def test_a_finished_run_is_extended(uninterrupted: Path, command, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(uninterrupted, tmp_path / "run"))
    run.evaluation_file.write_text("{}")
    before = json.loads(run.metrics_file.read_text())
    Signal.armed = "once"
    assert command("resume=run", "trust=[test_resuming]", "trainer.max_epochs=5").code == 75
    assert run.state == "unfinished"
    assert json.loads(run.metrics_file.read_text()) == before | {"unfinished": True}
    with pytest.raises(RunError, match=r"not finished, its metrics.json is of the first 3 epochs"):
        read_result(run)
    assert command("resume=run", "trust=[test_resuming]").code == 0
    assert run.state == "finished"
    longer = read_results(run.path)
    longer["files"].remove("evaluation_3_epochs.json")  # the earlier evaluation is kept under another name
    assert command(*SMALL, signal_at("batch", 57), "hydra.run.dir=fresh", "trainer.max_epochs=5").code == 0
    assert differences(read_results(tmp_path / "fresh"), longer) == []
    environment = run.read_environment()
    assert len(environment["resumed"]) == 2
    assert len(environment["data_checksums"]["train"]) == 64


def test_a_run_needs_its_own_directory(command, tmp_path: Path) -> None:
    (tmp_path / "full" / "notes").mkdir(parents=True)
    (tmp_path / "full" / "slurm-12.out").touch()
    for directory in (".", "", "full", str(tmp_path.parent)):
        refused = command(*SMALL, f"hydra.run.dir='{directory}'")
        assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
        assert "a run needs a directory of its own" in refused.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes", "slurm-12.out"]
    (tmp_path / "full" / "notes").rmdir()
    assert command(*BRIEF, "hydra.run.dir=full").code == 0


def test_a_run_is_resumed_in_another_place_and_with_an_earlier_clock(stopped: Path, command, tmp_path: Path) -> None:
    (events,) = (stopped / "tensorboard").glob("events*")
    events.rename(events.with_name(f"events.out.tfevents.4000000000.{events.name.split('.', 4)[4]}"))
    shutil.move(stopped, tmp_path / "elsewhere")
    assert command("resume=elsewhere", "trust=[test_resuming]").code == 0
    content = torch.load(tmp_path / "elsewhere" / "checkpoints" / "last.ckpt", weights_only=True)
    (best,) = [state for key, state in content["callbacks"].items() if "ModelCheckpoint" in key]
    assert best["best_model_path"] == str(tmp_path / "elsewhere" / "checkpoints" / "best.ckpt")
    board = EventAccumulator(str(tmp_path / "elsewhere" / "tensorboard"), EVERYTHING).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [39, 79, 119]


def test_other_data_are_refused(stopped: Path, command) -> None:
    environment = json.loads((stopped / "environment.json").read_text())
    environment["data_checksums"]["test"] = "0" * 64
    (stopped / "environment.json").write_text(json.dumps(environment))
    refused = command("resume=run", "trust=[test_resuming]")
    assert refused.code == 2
    assert "was trained on other images" in refused.err


def test_resume_auto_repeats_the_same_command(stopped_at_58: Path, command, tmp_path: Path) -> None:
    """A scheduler can start a command with `resume=auto` any number of times."""
    run = tmp_path / "outputs" / "vae" / "first"
    shutil.copytree(stopped_at_58, run)
    words = [*SMALL, signal_at("batch", 57), "resume=auto"]
    second = command(*words)
    assert second.code == 0
    assert second.out.splitlines()[-1] == str(run)
    before = (run / "metrics.json").stat().st_mtime_ns
    third = command(*words)
    assert third.code == 0
    assert third.out.splitlines()[-1] == str(run)
    assert "finished already; nothing to do" in third.err + third.out
    assert (run / "metrics.json").stat().st_mtime_ns == before
    assert command(*words, "trainer.max_epochs=1").code == 0  # another configuration is another run
    assert len(list(tmp_path.glob("outputs/vae/*"))) == 2


def test_an_unfinished_run_is_not_overwritten(stopped: Path, uninterrupted: Path, command, tmp_path: Path) -> None:
    callback = signal_at("batch", 57)
    refused = command(*SMALL, callback, "hydra.run.dir=run")
    assert refused.code == 2
    assert f"is not finished; use resume={stopped} or resume=auto" in refused.err
    shutil.copytree(uninterrupted, tmp_path / "other")  # the same run, finished, beside it
    assert command(*SMALL, callback, "hydra.run.dir=run", "resume=auto").code == 0
    assert (stopped / "metrics.json").exists(), "the given directory is used"


def test_a_run_without_checkpoint_starts_again(config, tmp_path: Path) -> None:
    Signal.armed = "once"
    callback = signal_at("setup")
    with pytest.raises(Interrupted):
        train(config(*SMALL, callback), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert train(config(*SMALL, callback), tmp_path / "run", resume=True)["epochs"] == 3


DOZEN = [1, 1_000, 2_000, 5_000, 8_000, 16_000, 30_000, 45_000, 80_000, 100_000, 200_000, 400_000]


@pytest.mark.parametrize(
    ("width", "sizes", "wanted"),
    [
        pytest.param(32, [100, 3_000, 200_000], ["config.yaml", ".ckpt"], id="few", marks=pytest.mark.proof),
        pytest.param(32, DOZEN, ["config.yaml", ".ckpt"], id="many", marks=pytest.mark.proof),
        pytest.param(1, DOZEN, ["config.yaml", "100000 (File"], id="tensorboard", marks=pytest.mark.proof),
    ],
)
def test_a_full_disk_is_reported_in_one_line_and_damages_no_checkpoint(
    tmp_path: Path, width: int, sizes: list[int], wanted: list[str]
) -> None:
    """The size of files is limited. With a small model and many samples, TensorBoard's file is the largest."""
    words = [*SMALL, f"model.backbone.hidden=[{width}]", "figures.every=1", f"data.root={ROOT / 'data'}"]
    words += ["figures.samples=[10,10]"] if width == 1 else []
    script = [sys.executable, ROOT / "tests" / "full_disk.py", tmp_path, ",".join(map(str, sizes)), *words]
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["size"] for outcome in outcomes] == sizes
    refused = [outcome for outcome in outcomes if outcome["status"] != 0]
    for outcome in refused:
        run = tmp_path / str(outcome["size"])
        assert outcome["status"] == 2, outcome["stderr"]
        assert len(outcome["stderr"].splitlines()) == 1, outcome["stderr"]
        assert outcome["stderr"].startswith(f"hydra.run.dir={run}: cannot write {run}")
        assert not [name for name in outcome["files"] if ".vae_lightning" in name]
        for file in run.rglob("*.ckpt"):
            assert load_checkpoint(file)["global_step"] > 0
    said = " ".join(outcome["stderr"] for outcome in refused)
    assert all(word in said for word in wanted), said
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--git-path", "index.lock"], capture_output=True, text=True)
    if git.returncode == 0:  # not a copy without its history
        assert not (ROOT / git.stdout.strip()).exists(), "of git, which is called for the commit"


@pytest.mark.parametrize("text", ["0", "-5", "5parsecs", "1.5", "true", "10 min later"])
def test_checkpoint_every_is_steps_or_a_time(text: str) -> None:
    with pytest.raises(ConfigError, match="should be a number of steps, or a time such as"):
        Interval.parse(text, "trainer.checkpoint_every")


def test_checkpoint_every_reads_steps_and_times() -> None:
    assert [Interval.parse(text, "trainer.checkpoint_every") for text in (None, 500, "500", "30s", "10min", "2h")] == [
        Interval(), Interval(steps=500), Interval(steps=500), Interval(seconds=30), Interval(seconds=600),
        Interval(seconds=7200),
    ]  # fmt: skip


def test_checkpoint_every_some_seconds(config, tmp_path: Path, monkeypatch) -> None:
    saved = []
    from lightning.pytorch import Trainer

    original = Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda self, *a, **k: (saved.append(1), original(self, *a, **k)))
    train(config(*SMALL, "trainer.checkpoint_every=1s", "trainer.max_epochs=1", "data.val_size=0"), tmp_path / "rarely")
    rarely = len(saved)
    monkeypatch.setattr(Interval, "parse", classmethod(lambda cls, *_: cls(seconds=0.0001)))
    train(config(*SMALL, "trainer.log_every_n_steps=10", "trainer.max_epochs=1", "data.val_size=0"), tmp_path / "often")
    assert len(saved) - rarely >= rarely + 3


def test_runs_are_found_by_their_configuration(tmp_path: Path, config) -> None:
    composed = config(*SMALL)
    for name in ("a", "b", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{" if name == "broken" else as_yaml(composed | {"name": name}))
    places = [tmp_path / name for name in ("broken", "a", "b", "nowhere")]
    found = find_run(composed | {"name": "b"}, places)
    assert found is not None
    assert found.path == tmp_path / "b"
    assert find_run(composed | {"name": "c"}, places) is None
    moved_data = composed | {"name": "b", "data": composed["data"] | {"root": "/elsewhere"}}
    assert find_run(moved_data, places) is not None, "the place of the images changes no result"
    assert find_run(moved_data | {"data": moved_data["data"] | {"batch_size": 7}}, places) is None


def test_a_repeated_run_gets_the_same_numbers(uninterrupted: Path, command, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    environment["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    again = command("repeat=run", "hydra.run.dir=again", "trust=[test_resuming]")
    assert again.code == 0, again.err
    assert "torch 1.0 then" in again.out
    assert differences(read_results(uninterrupted), read_results(tmp_path / "again")) == []
    for refused in (command("repeat=run", "model.beta=3"), command("repeat=run", "resume=auto")):
        assert refused.code == 2
        assert len(refused.err.splitlines()) == 1


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
        train(config(*SMALL, "trainer.precision=16-mixed", "trainer.on_nan=skip"), tmp_path / "half")
    metrics = train(config(*SMALL, bad, "trainer.on_nan=skip"), tmp_path / "run")
    assert metrics["test/loss"] < 500
    assert [float(row["health/skipped"]) for row in read_results(tmp_path / "run")["history"]] == [1, 2, 0]
    assert sum("is not finite; its update is skipped" in record.message for record in caplog.records) == 3
    with pytest.raises(TrainingError, match="became NaN or infinite at step 4"):
        train(config(*SMALL, bad), tmp_path / "stopped")
    many = bad.replace("[3, 50, 51]", str(list(range(10, 40))))
    with pytest.raises(TrainingError, match="20 updates in a row were not finite, the last at step 29"):
        train(config(*SMALL, many, "trainer.on_nan=skip"), tmp_path / "often")


class OutOfMemory(Callback):
    def on_train_batch_start(self, *args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


def test_out_of_memory_is_reported_in_one_line(command) -> None:
    refused = command(*SMALL, "trainer.callbacks=[{_target_: test_resuming.OutOfMemory}]")
    assert refused.code == 2
    line = refused.err.splitlines()[-1]
    assert line.startswith("out of memory at step 1: lower data.batch_size=100 (half of it with trainer.accumulate")


def everything(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "train.log"}


def test_early_stopping_survives_a_resume(command, tmp_path: Path) -> None:
    early = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 1, min_delta: 1000}"
    callbacks = f"trainer.callbacks=[{early}, {{_target_: test_resuming.Signal, at: test}}]"
    words = [*SMALL, "trainer.max_epochs=6", callbacks]
    assert command(*words, "hydra.run.dir=uninterrupted").code == 0
    for _ in range(2):
        Signal.armed = "once"
        assert command(*words, "hydra.run.dir=run", "resume=auto").code == 75
    assert command("resume=run", "trust=[test_resuming]").code == 0
    assert read_results(tmp_path / "run")["metrics"]["epochs"] == 2
    assert differences(read_results(tmp_path / "uninterrupted"), read_results(tmp_path / "run")) == []


def test_a_longer_run_keeps_its_schedule(command) -> None:
    words = [*SMALL, "hydra.run.dir=run", "trainer.limit_train_batches=2", "model/schedule=cosine"]
    assert command(*words, "trainer.max_epochs=1").code == 0
    longer = command("resume=run", "trainer.max_epochs=2")
    assert (longer.code, "model.schedule stays as it was for trainer.max_epochs=1" in longer.out) == (0, True)


def test_a_finished_run_is_not_shortened(uninterrupted: Path, command, tmp_path: Path) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "evaluation.json").write_text("{}")
    before = everything(run)
    for max_epochs in (0, 1, 2):
        refused = command("resume=run", "trust=[test_resuming]", f"trainer.max_epochs={max_epochs}")
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert f"trainer.max_epochs={max_epochs}: {run} is in epoch 3 already" in refused.err
        assert everything(run) == before


def altered(name: str, content: dict) -> dict:
    """Return a damaged checkpoint."""
    if name == "empty progress":
        content["progress"] = {}
    elif name == "no progress":
        content["progress"] = []
    elif name == "no optimizer":
        del content["optimizer_states"]
    elif name == "another optimizer":
        content["optimizer_states"] = [{}]
    elif name == "random numbers":
        content["progress"]["random"]["torch"] = torch.zeros(3)
    elif name == "events of another format":
        content["progress"]["events"] = {"/etc/hostname": 0}
    elif name == "another path":
        content["progress"]["events"] = {"../config.yaml": 3}
    elif name == "another model":
        content["state_dict"] = {key: value[..., :1] for key, value in content["state_dict"].items()}
    return content


@pytest.mark.parametrize(
    "name",
    [
        *("empty progress", "no progress", "no optimizer", "another optimizer"),
        *("random numbers", "events of another format", "another path", "another model"),
    ],
)
def test_foreign_checkpoints_change_nothing(stopped: Path, command, name: str) -> None:
    for file in (stopped / "checkpoints" / "last.ckpt", stopped / "checkpoints" / "previous.ckpt"):
        torch.save(altered(name, torch.load(file, weights_only=True)), file)
    before = everything(stopped)
    refused = command("resume=run", "trust=[test_resuming]")
    assert refused.code == 2, refused.err
    assert "Traceback" not in refused.err
    assert everything(stopped) == before


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "train.log"])
def test_nothing_is_written_through_links(stopped: Path, command, tmp_path: Path, name: str) -> None:
    (stopped / "train.log").touch()  # only written where the log shows messages
    shutil.move(stopped / name, tmp_path / "victim")
    (stopped / name).symlink_to(tmp_path / "victim")
    if name == "checkpoints":
        (tmp_path / "victim" / "thesis.ckpt").touch()
    before = everything(tmp_path / "victim") or (tmp_path / "victim").read_bytes()
    refused = command("resume=run", "trust=[test_resuming]")
    assert refused.code == 2
    assert f"{stopped / name}: is a link" in refused.err
    assert before == (everything(tmp_path / "victim") or (tmp_path / "victim").read_bytes())


def test_checkpoints_on_another_disk(stopped: Path, command, tmp_path: Path, recwarn) -> None:
    for file in (stopped / "checkpoints").iterdir():  # `stopped` is a copy; the links of a run lead to its own files
        content = torch.load(file, weights_only=True)
        content["progress"]["directory"] = str(stopped)
        torch.save(content, file)
    shutil.move(stopped / "checkpoints", tmp_path / "disk")
    (stopped / "checkpoints").symlink_to(tmp_path / "disk")
    assert command("resume=run", "trust=[test_resuming]").code == 0
    assert {file.name for file in (tmp_path / "disk").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert (stopped / "checkpoints").is_symlink()
    assert not [w for w in recwarn if "dirpath has changed" in str(w.message)], "the best checkpoint so far is restored"


def test_linked_event_files_and_foreign_files_are_not_changed(stopped: Path, command, tmp_path: Path) -> None:
    (events,) = (stopped / "tensorboard").glob("events*")
    (stopped / "tensorboard" / "mine").mkdir()
    (stopped / "tensorboard" / "mine" / "notes.txt").write_text("kept")
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * 100_000)
    events.unlink()
    events.symlink_to(victim)
    assert command("resume=run", "trust=[test_resuming]").code == 0
    assert victim.read_bytes() == b"x" * 100_000
    assert (stopped / "tensorboard" / "mine" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("word", ["resume=true", "resume=[a]", "resume={a: 1}", "resume=''", "repeat=[a]", "resume=5"])
def test_a_value_that_is_no_path_is_reported_in_one_line(command, word: str) -> None:
    refused = command(word)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)


def test_a_run_with_damaged_metrics_is_not_finished(uninterrupted: Path, command, tmp_path: Path) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "metrics.json").write_text("")
    assert command("resume=run", "trust=[test_resuming]").code == 0
    assert differences(read_results(uninterrupted), read_results(run)) == []


def test_keys_that_one_version_lacks_are_reported(command, tmp_path: Path) -> None:
    assert command(*BRIEF, "hydra.run.dir=run").code == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(saved.replace("  on_nan: stop\n", ""))
    refused = command(*BRIEF, "hydra.run.dir=run")
    assert refused.code == 2
    assert "with another configuration (trainer.on_nan=missing, not stop)" in refused.err
