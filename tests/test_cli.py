"""`python train.py …` on the command line: its output, its files and its errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BRIEF, DATA, ROOT
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from vae_lightning.config import ConfigError

STOP = "_target_: lightning.pytorch.callbacks.EarlyStopping"
AVERAGE = "_target_: lightning.pytorch.callbacks.EMAWeightAveraging"
REFUSED = [
    # Hydra's message, with the nearest match
    ("model.latent_dmi=2", ["'model.latent_dmi'", "did you mean model.latent_dim?", "Allowed: model._target_"]),
    ("modle=vae", ["'modle'", "did you mean model?"]),
    ("+model.latent_dmi=2", ["model.latent_dmi=2", "did you mean latent_dim?"]),
    ("model/bakbone=conv", ["'model/bakbone'", "did you mean model/backbone?"]),
    (
        "model/backbone=covn",
        ["'model/backbone/covn'", "conv gated_mlp mlp", "did you mean conv?"],
    ),
    ("backbone=conv", ["'backbone'", "did you mean model/backbone?"]),
    ("logger=wndb", ["'logger/wndb'", "csv mlflow", "did you mean wandb?"]),
    ("trainer.limit_trian_batches=2", ["did you mean trainer.limit_train_batches?"]),
    ("model.latent_dim=${nothing}", ["nothing", "not found"]),
    ("model.latent_dim=[1", ["[1", "quote text"]),
    (
        "hydra.run.dir=a=b",
        ["hydra.run.dir=a=b: Hydra cannot read this", """quote text with special characters: 'hydra.run.dir="a=b"'"""],
    ),
    ("hydra.run.dir=ü", ["""quote text with special characters: 'hydra.run.dir="ü"'"""]),
    # type hints of the classes
    ("logger.tensorboard=3", ["logger", "dictionary"]),
    ("~data", ["data: missing"]),
    ("data.pixels=gray", ["data.pixels=gray", "'grey', 'dynamic', 'fixed' or 'threshold'", "did you mean grey?"]),
    ("trainer.precision=64-true", ["trainer.precision=64-true", "'32-true'", "'bf16-mixed'"]),
    ("model.latent_dim=two", ["model.latent_dim=two", "valid integer"]),
    ("trainer.callbacks=[true]", ["trainer.callbacks.0=True", "_target_: class"]),
    ("model.backbone.hidden=[400,0]", ["model.backbone.hidden=[400, 0]", "greater than or equal to 1"]),
    ("model.backbone._target_=os.system", ["model.backbone._target_=os.system", "subclass"]),
    ("data.batch_size=9223372036854775808", ["data.batch_size=9223372036854775808", "less than 9223372036854775808"]),
    ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches=0", "greater than or equal to 1"]),
    ("trainer.gradient_clip_val=-1", ["trainer.gradient_clip_val=-1", "greater than or equal to 0"]),
    ("name=", ["name="]),
    # values that fit together
    ("data.val_size=60000", ["data.val_size=60000", "0 to 59999"]),
    ("figures.points=[[1,2]]", ["figures.points=[1, 2]", "model.latent_dim=20"]),
    ("trainer.strategy=ddp_spawn", ["trainer.strategy=ddp_spawn", "Allowed: ddp"]),
    ("trainer.limit_test_batches=0.00001", ["trainer.limit_test_batches=1e-05", "one of 79 batches"]),
    ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateFinder}]", ["LearningRateFinder does not"]),
    ("trainer.gradient_clip_algorithm=value", ["algorithm: has no effect without trainer.gradient_clip_val"]),
    # metrics that are monitored, and averaged weights
    (
        f"trainer.callbacks=[{{{STOP}, monitor: val/elbo, mode: min}}]",
        ["callbacks.0.mode=min: val/elbo", "Allowed: max"],
    ),
    (f"trainer.callbacks=[{{{STOP}, monitor: val/los}}]", ["needs trainer.callbacks.0.mode", "did you mean val/loss?"]),
    (
        f"trainer.callbacks=[{{{STOP}, monitor: val/mine}}]",
        ["callbacks.0.monitor=val/mine: a metric of your own needs"],
    ),
    (f"trainer={{limit_val_batches: 0, callbacks: [{{{STOP}, monitor: val/loss}}]}}", ["no images are validated"]),
    ("trainer.callbacks=[{_target_: test_cli.Maximal}]", ["callbacks.0.mode=max: val/loss", "Allowed: min"]),
    (
        f"trainer.callbacks=[{{{AVERAGE}, update_starting_at_step: 9}}]",
        ["averages untrained weights until", "optimization.EMA"],
    ),
    # Lightning's own checks, before and in `fit`
    ("trainer.accelerator=cuda9", ["trainer: ", "cuda9"]),
    ("trainer.max_epochs=-7", ["max_epochs", "-7"]),
    ("trainer.strategy=dpp", ["strategy='dpp'"]),
    ("trainer.limit_val_batches=0.001", ["limit_val_batches"]),
    ("trainer.val_check_interval=1000", ["val_check_interval", "1000"]),
    # files
    ("hydra.run.dir=/proc/nowhere/run", ["/proc/nowhere"]),
]


class Maximal(EarlyStopping):
    """Early stopping with a metric and a mode of its own."""

    def __init__(self) -> None:
        super().__init__("val/loss", mode="max")


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[override for override, _ in REFUSED])
def test_invalid_input_is_reported_in_one_line(override: str, words: list[str], command, tmp_path: Path) -> None:
    result = command(override)
    assert result.code == 2
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.rglob("*.*")), "no files are left"


class Late(Callback):
    """Fail at the second step, as a bug or with an error that the user can fix."""

    def __init__(self, error: str) -> None:
        self.error = error

    def on_train_batch_end(self, trainer, *rest) -> None:
        if trainer.global_step == 2:
            raise {"bug": KeyError, "user": ConfigError}[self.error]("late")


def test_an_error_before_the_first_checkpoint_leaves_no_files(command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm.out").touch()
    words = [*BRIEF, "hydra.run.dir=run"]
    user = command(*words, "trainer.callbacks=[{_target_: test_cli.Late, error: user}]")
    assert (user.code, user.err.splitlines()[-1]) == (2, "late")
    stopping = command(*words, f"trainer.callbacks=[{{{STOP}, monitor: val/own, mode: min}}]")
    assert (stopping.code, "Early stopping conditioned on metric `val/own`" in stopping.err) == (2, True)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["slurm.out"]
    with pytest.raises(KeyError, match="late"):
        command(*words, "trainer.callbacks=[{_target_: test_cli.Late, error: bug}]")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["slurm.out"]


def test_a_traceback_is_shown_on_request(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match=r"model\.latent_dim=0"):
        command("model.latent_dim=0")


def test_gpu_on_a_machine_without_one(command, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CUDAAccelerator", "MPSAccelerator"):
        monkeypatch.setattr(f"lightning.pytorch.accelerators.{kind}.is_available", staticmethod(lambda: False))
    result = command("trainer.accelerator=gpu")
    assert result.code == 2
    assert result.err.startswith("trainer: No supported gpu backend found!")
    assert len(result.err.splitlines()) == 1


def test_the_last_line_of_output_is_the_run_directory(command, tmp_path: Path) -> None:
    result = command("model.latent_dim=3", *BRIEF)
    assert result.code == 0
    directory = Path(result.out.splitlines()[-1])
    assert directory.parent == tmp_path / "outputs" / "vae"
    assert (directory / "metrics.json").exists()
    assert "epoch 1/1" in (directory / "train.log").read_text()
    assert command("model=autoencoder", *BRIEF).out.splitlines()[-1].startswith(str(tmp_path / "outputs/autoencoder/"))


def test_output_without_a_terminal_has_one_line_per_epoch(command) -> None:
    result = command("model/backbone=conv", *BRIEF, "trainer.max_epochs=3")
    assert [line.split()[1] for line in result.out.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert "[1, 64, 7, 7]" in result.out  # a layer's output shape
    assert "Total params" in result.out
    assert "\r" not in result.out + result.err
    assert "test, grey pixels, cross-entropy and not a likelihood: loss" in result.out
    assert result.out.count("cross-entropy") == 1, "once, in the summary"


@pytest.mark.proof
def test_two_processes_at_the_same_time(tmp_path: Path) -> None:
    """Started from another directory: exit status, output streams and separate run directories."""
    words = [sys.executable, str(ROOT / "train.py"), f"data.root={DATA}", *BRIEF]
    jobs = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    directories = {job.communicate(timeout=300)[0].splitlines()[-1] for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0]
    assert len(directories) == 2
    refused = subprocess.run([*words, "model.latent_dmi=2"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
