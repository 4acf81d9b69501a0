"""Sweeps with jobs that fail, are killed or hang; run again, a sweep skips finished jobs and resumes the others."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, DATA, ROOT
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from vae_lightning.launch.jobs import resume_override
from vae_lightning.launch.sweeps import FAILED, SweepDirectory, job_variables, note_failure
from vae_lightning.training.signals import StopRequest

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
SMALL = [*BRIEF, "trainer.enable_model_summary=false", "model.backbone.hidden=[16]", f"data.root={DATA}"]


class Trouble(Callback):
    """Kill the process of a run with three latent dimensions, and hang with four, but only the first time."""

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        once = Path(trainer.default_root_dir) / "once"
        if trainer.global_step == 2 and module.latent_dim in (3, 4) and not once.exists():
            once.touch()
            if module.latent_dim == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(1000)


TROUBLE = "trainer.callbacks=[{_target_: test_sweeps.Trouble}]"


def sweep(directory: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "train.py", "-m", *SMALL, f"hydra.sweep.dir={directory}", *words]
    return subprocess.run(command, env=ENVIRONMENT, cwd=directory.parent, capture_output=True, text=True, timeout=500)


def finished(directory: Path) -> list[int]:
    return sorted(json.loads(file.read_text())["latent_dim"] for file in directory.glob("*/metrics.json"))


@pytest.mark.proof
def test_a_killed_job_does_not_affect_the_others(tmp_path: Path) -> None:
    first = sweep(tmp_path / "sweep", "model.latent_dim=2,3,0", TROUBLE, "hydra/launcher=joblib")
    assert first.returncode == 2, first.stderr
    assert finished(tmp_path / "sweep") == [2]
    killed, refused = first.stderr.splitlines()[-2:]
    assert killed.startswith("job 1 (")
    assert "model.latent_dim=3" in killed
    assert killed.endswith("killed by SIGKILL; it can be resumed")
    assert refused.endswith("model.latent_dim=0: should be greater than or equal to 1.")
    assert not list((tmp_path / "sweep").glob("*/.*")), "no temporary files are left"
    before = (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns
    # With other job numbers: a job is identified by its configuration.
    again = sweep(tmp_path / "sweep", "model.latent_dim=3,2", TROUBLE)
    assert again.returncode == 0, again.stderr
    assert finished(tmp_path / "sweep") == [2, 3]
    assert "0: finished already; nothing to do" in again.stdout
    assert (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / "sweep").glob("[0-9]*")) == ["0", "1"]
    assert not list((tmp_path / "sweep" / FAILED).iterdir())


@pytest.mark.proof
def test_each_failed_job_has_its_own_reason(command, tmp_path: Path) -> None:
    """Two jobs that fail in subprocesses, one after the other."""
    failed = command("model.latent_dim=0,-1", "-m", "timeout=5min", "hydra.sweep.dir=sweep", *BRIEF)
    assert failed.code == 2
    assert [line.rpartition("): ")[2] for line in failed.err.splitlines()[-2:]] == [
        f"model.latent_dim={n}: should be greater than or equal to 1." for n in (0, -1)
    ]


def test_a_job_whose_directory_is_taken_gets_another(command, tmp_path: Path) -> None:
    assert command("-m", "model.latent_dim=4", "hydra.sweep.dir=sweep", *BRIEF).code == 0
    assert command("-m", "model.latent_dim=3,4", "hydra.sweep.dir=sweep", *BRIEF).code == 0
    assert sorted(path.name for path in (tmp_path / "sweep").glob("[0-9]*")) == ["0", "0_2"]
    assert finished(tmp_path / "sweep") == [3, 4]


def test_resume_auto_finds_the_jobs_of_an_earlier_sweep(command, tmp_path: Path) -> None:
    for _ in range(2):
        assert command("-m", "model.latent_dim=3,4", "resume=auto", *BRIEF).code == 0
    assert len(list(tmp_path.glob("outputs/sweeps/*/*/metrics.json"))) == 2


def test_resume_with_a_path_is_refused_in_a_sweep(command) -> None:
    refused = command("-m", "resume=somewhere", *BRIEF)
    assert refused.code == 2
    assert "resume is for one run; a sweep is resumed by the same command" in refused.err


@pytest.mark.parametrize("timeout", ["7", "soon"])
def test_an_invalid_timeout_is_refused(command, timeout: str) -> None:
    refused = command("-m", f"timeout={timeout}", *BRIEF)
    assert refused.code == 2
    assert f"timeout={timeout}: should be a time such as 30s, 10min or 2h" in refused.err


def test_a_timeout_of_a_single_run_is_refused(command) -> None:
    refused = command("timeout=10min", *BRIEF)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "trainer.max_time is for a run" in refused.err


@pytest.mark.parametrize(("launcher", "wanted"), [("ray_local", "ray"), ("local", "submitit_local")])
def test_a_launcher_that_is_not_installed(command, monkeypatch, launcher: str, wanted: str) -> None:
    Plugins.instance()  # installed launchers register their configurations
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{wanted}.yaml", raising=False)
    refused = command("-m", f"hydra/launcher={launcher}", *BRIEF)
    assert refused.code == 2
    extra = {"ray": "ray", "submitit_local": "launchers"}[wanted]
    assert refused.err == f"hydra/launcher={wanted}: is not installed; pip install -e '.[{extra}]' installs it\n"


def test_gpus_are_assigned_in_turn(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [job_variables(job, "auto", None, assign_gpu=True) for job in range(4)]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in jobs] == ["0", "1", "2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert job_variables(3, 1, 4, assign_gpu=True) == {"CUDA_VISIBLE_DEVICES": "7", "OMP_NUM_THREADS": "4"}
    assert job_variables(3, 2, None, assign_gpu=True) == {}, "a job of two devices chooses them itself"
    assert job_variables(3, 1, None, assign_gpu=False) == {}, "Slurm and Ray assign them"


def test_special_characters_in_paths_are_quoted_for_the_shell_and_hydra() -> None:
    for path in ("/a b/c", "/a'b", "/a=b,c", "/a\\b", "/[x]{y}", "/ä(1)", "/plain"):
        (word,) = shlex.split(resume_override(Path(path)))
        (override,) = OverridesParser.create().parse_overrides([word])
        assert override.value() == path


def test_failed_jobs_are_reported_in_their_order(tmp_path: Path, capsys) -> None:
    config, callback = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}), SweepDirectory()
    for job in (10, 9, 1):
        note_failure(tmp_path / "nested" / str(job), job, ["seed=1"], "why")
    with pytest.raises(SystemExit, match="2"):
        callback.on_multirun_end(config)
    assert capsys.readouterr().err == "".join(f"job {job} (seed=1): why\n" for job in (1, 9, 10))
    with StopRequest().listening():
        callback.on_multirun_start(config)  # the sweep is run again
    callback.on_multirun_end(config)
    assert capsys.readouterr().err == ""


@pytest.mark.proof
@pytest.mark.parametrize("launcher", ["basic", "joblib", "local", "ray_local"])
def test_failed_killed_and_hanging_jobs_under_every_launcher(tmp_path: Path, launcher: str) -> None:
    if launcher == "ray_local":
        pytest.importorskip("ray", reason="pip install -e '.[ray]' brings it")
    words = ["model.latent_dim=2,3,4,0,5,6", TROUBLE, f"hydra/launcher={launcher}", "timeout=90s"]
    first = sweep(tmp_path / "sweep", *words)
    assert first.returncode == 2, first.stderr
    assert finished(tmp_path / "sweep") == [2, 5, 6]
    reasons = first.stderr.splitlines()[-3:]
    for reason, wanted in zip(reasons, ("SIGKILL", "took longer than timeout=90s", "model.latent_dim=0"), strict=True):
        assert wanted in reason
    again = sweep(tmp_path / "sweep", *words)
    assert again.returncode == 2
    assert finished(tmp_path / "sweep") == [2, 3, 4, 5, 6]


SLURM = {
    # Run the tasks of an array in the background, one after the other.
    "sbatch": """
script="${@: -1}"
cat "$script" >> "$CLUSTER/scripts"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
(for n in $(seq 0 ${last:-0}); do
    SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$n SLURM_JOB_ID=$((80 + n)) SLURM_JOB_NUM_NODES=1 SLURM_NNODES=1 \\
    SLURM_JOB_NODELIST=here SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_JOB_NAME=train \\
    bash "$script" > /dev/null 2>> "$CLUSTER/errors"; touch "$CLUSTER/done_$n"
done) > /dev/null 2>&1 &
echo "Submitted batch job 77"
""",
    "srun": """while [ "$1" != "$PYTHON" ]; do shift; done; exec "$@" """,
    "sacct": """
echo "JobID|State|NodeList"
for n in 0 1 2 3; do [ -e "$CLUSTER/done_$n" ] && state=COMPLETED || state=RUNNING; echo "77_$n|$state|here"; done
""",
    "scontrol": """echo here""",
    "scancel": "",
}


@pytest.mark.proof
def test_a_slurm_array_of_two_processes_each(tmp_path: Path) -> None:
    """Without a cluster: scripts with the names of Slurm's commands run the jobs on this machine."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "cluster").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    cluster = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CLUSTER": str(tmp_path / "cluster")}
    words = ["model.latent_dim=2,5", "hydra/launcher=slurm", "hydra.launcher.partition=short"]
    words += [
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.accelerator=cpu",
        f"hydra.sweep.dir={tmp_path / 's'}",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "-m", *SMALL, *words],
        env=ENVIRONMENT | cluster | {"PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "s") == [2, 5]
    script = (tmp_path / "cluster" / "scripts").read_text()
    for line in ("#SBATCH --array=0-1", "#SBATCH --partition=short", "#SBATCH --signal=USR2@120"):
        assert line in script
