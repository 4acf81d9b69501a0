"""`python train.py …` on the command line: its output, its files and its errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BRIEF, DATA, ROOT

from vae_lightning.config import ConfigError
from vae_lightning.launch.cli import error_line
from vae_lightning.launch.commands import importing

STOP = "_target_: lightning.pytorch.callbacks.EarlyStopping"
PLATEAU = "_target_: torch.optim.lr_scheduler.ReduceLROnPlateau"
CYCLE = "_target_: torch.optim.lr_scheduler.OneCycleLR, max_lr: 0.01"
REFUSED = [
    ("model.latent_dmi=2", ["model.latent_dmi=2", "no such key", "did you mean model.latent_dim?", "latent_dim"]),
    ("modle=vae", ["modle=vae", "did you mean model?"]),
    ("+modle=vae", ["modle=vae", "did you mean model?", "Allowed"]),
    ("+model.latent_dmi=2", ["model.latent_dmi=2", "did you mean latent_dim?"]),
    ("model/bakbone=conv", ["model/bakbone=conv", "did you mean model/backbone?"]),
    (
        "model/backbone=covn",
        ["model/backbone=covn", "did you mean conv?", "Allowed: conv, gated_mlp, mlp, residual_conv"],
    ),
    ("logger=wndb", ["logger=wndb", "did you mean wandb?", "Allowed: csv, mlflow"]),
    ("logger=[csv,wndb]", ["logger=wndb", "did you mean wandb?", "Allowed: csv, mlflow"]),
    ("logger.tensorboard=3", ["logger", "dictionary"]),
    ("trainer.logger=false", ["trainer.logger=false", "logger=csv"]),
    ("model.latent_dim.x=2", ["did you mean model.latent_dim?"]),
    ("model.batch_size=32", ["did you mean data.batch_size?", "Allowed under model: _target_"]),
    ("data.pixels=gray", ["data.pixels=gray", "'grey', 'dynamic', 'fixed' or 'threshold'", "did you mean grey?"]),
    ("data.name=FashonMNIST", ["data.name=FashonMNIST", "did you mean FashionMNIST?"]),
    ("trainer.accelerator=cuda9", ["trainer.accelerator=cuda9", "did you mean cuda?", "Allowed: auto, gpu"]),
    ("trainer.limit_trian_batches=2", ["trainer.limit_trian_batches=2", "did you mean trainer.limit_train_batches?"]),
    ("trainer.precision=bf17", ["trainer.precision=bf17", "'bf16-mixed'", "did you mean"]),
    ("trainer.max_epochs=-7", ["max_epochs", "-7"]),
    ("trainer.strategy=dpp", ["strategy='dpp'"]),
    ("trainer.precision=64-true", ["trainer.precision=64-true", "'32-true'", "'bf16-mixed'"]),
    ("trainer.precision=transformer-engine", ["trainer.precision=transformer-engine", "'bf16-mixed'"]),
    ("trainer.strategy=ddp_spawn", ["trainer.strategy=ddp_spawn", "Allowed: ddp"]),
    ("trainer.limit_test_batches=0.00001", ["trainer.limit_test_batches=1e-05", "one of 79 batches; at least 0.0127"]),
    ("trainer.limit_val_batches=0.001", ["trainer.limit_val_batches=0.001", "at least 0.0127"]),
    ("trainer.limit_train_batches=1e-6", ["trainer.limit_train_batches=1e-06", "one of 391 batches"]),
    ("trainer.val_check_interval=1000", ["trainer.val_check_interval=1000", "from 1 to 391"]),
    ("trainer.val_check_interval=0.001", ["trainer.val_check_interval=0.001", "from 0.00256 to 1.0"]),
    (f"trainer.callbacks=[{{{STOP}, monitor: val/los}}]", ["EarlyStopping.monitor=val/los", "did you mean val/loss?"]),
    (f"model.schedule={{{PLATEAU}, monitor: nothing}}", ["model.schedule.monitor=nothing", "Allowed: train/loss"]),
    (f"model.schedule={{{PLATEAU}, monitor: [1]}}", ["model.schedule.monitor=[1]", "no such metric"]),
    (f"trainer.callbacks=[{{{STOP}, monitor: health/nope}}]", ["EarlyStopping.monitor=health/nope", "health/kl_min"]),
    (f"model.schedule={{{CYCLE}, total_steps: 29, interval: epoch}}", ["after 29 epochs, the run after 30"]),
    (f"model.schedule={{{CYCLE}, total_steps: 99, interval: step}}", ["after 99 steps, the run after 11730"]),
    ("trainer.min_epochs=-5", ["trainer.min_epochs=-5", "greater than or equal to 0"]),
    ("trainer.strategy=xla", ["trainer: ", "torch_xla"]),
    ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.BackboneFinetuning}]", ["no attribute 'backbone'"]),
    ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateFinder}]", ["Allowed: model.learn"]),
    ("model.backbone=conv", ["model.backbone=conv", "Say model/backbone=conv"]),
    ("--config-name=generate", ["--config-name=generate", "its own configuration"]),
    ("--config-path=/tmp", ["--config-path=/tmp", "--config-dir adds a directory"]),
    ("~data", ["data: missing"]),
    ("optimizer=sgd", ["optimizer=sgd: no such key; say model/optimizer=sgd"]),
    ("--latent_dim=2", ["--latent_dim=2: no such option", "model.latent_dim=2"]),
    ("=", ["without spaces"]),
    ("~trainer", ["trainer: missing"]),
    ("model.latent_dim=two", ["model.latent_dim=two", "valid integer"]),
    ("trainer.callbacks=[true]", ["trainer.callbacks.0=True", "_target_: class"]),
    ("model.latent_dim=0", ["model.latent_dim=0", "greater than or equal to 1"]),
    ("model.beta=-1", ["model.beta=-1", "greater than or equal to 0"]),
    ("model.backbone.hidden=[400,0]", ["model.backbone.hidden=[400, 0]", "greater than or equal to 1"]),
    ("model.backbone.activation=rleu", ["model.backbone.activation=rleu", "did you mean relu?"]),
    ("model.backbone._target_=os.system", ["model.backbone._target_=os.system", "subclass"]),
    ("model.latent_dim=${nothing}", ["nothing", "not found"]),
    ("model.latent_dim=[1", ["[1"]),
    ("data.batch_size=9223372036854775808", ["data.batch_size=9223372036854775808", "less than 9223372036854775808"]),
    ("hydra.run.dir=null", ["hydra.run.dir=null: ", "not Optional"]),
    ("data.batch_size=-1", ["data.batch_size=-1", "greater than or equal to 1"]),
    ("data.val_size=60000", ["data.val_size=60000", "0 to 59999"]),
    ("figures.points=[[1,2]]", ["figures.points=[1, 2]", "model.latent_dim=20"]),
    ("figures.pairs=0", ["figures.pairs=0"]),
    ("figures.samples=[8]", ["figures.samples=[8]"]),
    ("model=null", ["model=null", "choices"]),
    ("model.schedule=foo", ["model.schedule=foo"]),
    ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches=0", "greater than or equal to 1"]),
    ("trainer.gradient_clip_val=-1", ["trainer.gradient_clip_val=-1", "greater than or equal to 0"]),
    ("name=", ["name="]),
    ("seed=-1", ["seed=-1"]),
    ("hydra.run.dir=/proc/nowhere/run", ["hydra.run.dir=/proc/nowhere/run", "cannot write"]),
]


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[override for override, _ in REFUSED])
def test_invalid_input_is_reported_in_one_line(override: str, words: list[str], command, tmp_path: Path) -> None:
    result = command(override)
    assert result.code == 2
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.rglob("*.*")), "no files are left"


def test_a_late_error_of_lightning_leaves_no_files(command, tmp_path: Path) -> None:
    late = command(f"trainer.callbacks=[{{{STOP}, monitor: lr-nothing}}]", *BRIEF)
    assert (late.code, len(late.err.splitlines())) == (2, 1)
    assert "Early stopping conditioned on metric `lr-nothing`" in late.err
    assert not list(tmp_path.rglob("*.*"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm.out").touch()
    assert command(f"trainer.callbacks=[{{{STOP}, monitor: lr-no}}]", "hydra.run.dir=run", *BRIEF).code == 2
    assert [path.name for path in tmp_path.rglob("*.*")] == ["slurm.out"]


def test_an_anomaly_is_reported_in_one_line(command) -> None:
    result = command(
        "trainer.detect_anomaly=true", "model.learning_rate=1e30", "trainer.enable_model_summary=false", *BRIEF
    )
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("became NaN at step 2: ")


def test_the_configuration_of_a_sweep_is_not_shown(command) -> None:
    shown = command("seed=0,1", "-m", "--cfg", "job")
    assert (shown.code, shown.err) == (2, "--cfg: is for one run; leave out -m\n")


def test_an_error_line_has_no_control_characters() -> None:
    assert error_line(ConfigError("model._target_=\x1b[2J\x07Evil:\nnot in …")) == "model._target_=?[2J?Evil: not in …"


def test_an_override_of_a_removed_key(command) -> None:
    assert command("~model", "model.latent_dim=2").err == "model.latent_dim=2: ~model removes this key\n"


def test_an_unknown_key_below_a_key_with_dots(command) -> None:
    refused = command("hparams_search=optuna", "hparams_search.space={model.latent_dim: {choices: [2]}}")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "no such key" in refused.err
    assert "Allowed under hparams_search.space.model.latent_dim: low, high" in refused.err


@pytest.mark.proof
def test_a_closed_output_pipe_is_no_error() -> None:
    words = f"{sys.executable} {ROOT / 'train.py'} --cfg all | head -1"
    done = subprocess.run(words, shell=True, capture_output=True, text=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_ctrl_c_during_the_imports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, importing():
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_traceback_is_shown_on_request(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match=r"model\.latent_dim=0"):
        command("model.latent_dim=0")


def test_resume_path_is_relative_to_the_start_directory(command) -> None:
    assert command(*BRIEF, "hydra.run.dir=one").code == 0
    resumed = command("hydra.job.chdir=true", "resume=one")
    assert resumed.code == 0, resumed.err
    assert "finished already" in resumed.out


def test_gpu_on_a_machine_without_one(command, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CUDAAccelerator", "MPSAccelerator"):
        monkeypatch.setattr(f"lightning.pytorch.accelerators.{kind}.is_available", staticmethod(lambda: False))
    result = command("trainer.accelerator=gpu")
    assert result.code == 2
    assert result.err == "trainer.accelerator=gpu: PyTorch finds none on this machine. Allowed: auto, cpu\n"


def test_an_output_path_below_a_file(command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command("hydra.run.dir=file/run")
    assert result.code == 2
    assert result.err.startswith("hydra.run.dir=file/run: cannot write")
    assert len(result.err.splitlines()) == 1


def test_an_existing_run_is_not_overwritten(command, tmp_path: Path) -> None:
    assert command("hydra.run.dir=run", *BRIEF).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "train.log"}
    assert command("hydra.run.dir=run", *BRIEF).code == 0  # the same command: the run is finished
    result = command("hydra.run.dir=run", *BRIEF, "model.beta=2")
    assert result.code == 2
    assert "already contains a run with another configuration (model.beta=1.0, not 2)" in result.err
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "train.log"}
    assert before == after


def test_a_refused_command_keeps_the_user_s_files(command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text("mine")
    assert command("hydra.run.dir=run", "model.latent_dim=0").code == 2
    assert (tmp_path / "run" / "train.log").read_text() == "mine"


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


def test_a_failed_job_does_not_stop_a_sweep(command, tmp_path: Path) -> None:
    result = command("-m", "model.latent_dim=0,3", *BRIEF)
    assert result.code == 2
    assert "job 0: model.latent_dim=0" in result.out
    assert result.err.splitlines()[-1].startswith("job 0 (model.latent_dim=0 ")
    assert result.err.splitlines()[-1].endswith("): model.latent_dim=0: should be greater than or equal to 1.")
    assert [run.parent.name for run in (tmp_path / "outputs" / "sweeps").glob("*/*/metrics.json")] == ["1"]


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
