"""Sweeps: jobs in one process equal single runs; the same command finishes a sweep after failed and killed jobs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, DATA, ROOT, SMALL, differences, read_results
from lightning.pytorch import Callback

from vae_lightning.launch import jobs

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}


class Killed(Callback):
    """Send the process of a run with three latent dimensions a signal at a step, once."""

    def __init__(self, step: int, name: str = "SIGKILL") -> None:
        self.step, self.name = step, name

    def on_train_batch_start(self, trainer, module, *rest) -> None:
        once = Path(trainer.default_root_dir).parent / f"killed_{self.step}"
        if trainer.global_step == self.step and module.latent_dim == 3 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.Signals[self.name])


def sweep(directory: Path, *words: str) -> subprocess.CompletedProcess:
    directory.parent.mkdir(exist_ok=True)
    command = [sys.executable, ROOT / "train.py", "-m", f"data.root={DATA}", f"hydra.sweep.dir={directory}", *words]
    return subprocess.run(command, env=ENVIRONMENT, cwd=directory.parent, capture_output=True, text=True, timeout=500)


def finished(directory: Path) -> list[int]:
    return sorted(json.loads(file.read_text())["latent_dim"] for file in directory.glob("*/metrics.json"))


def test_a_failed_job_does_not_stop_a_sweep(command, tmp_path: Path) -> None:
    words = ["-m", "hydra.sweep.dir=sweep", *BRIEF]
    failed = command(*words, "model.latent_dim=0,3,-1")
    assert failed.code == 2
    assert [line.partition(": ")[2] for line in failed.err.splitlines()] == [
        f"model.latent_dim={n}: should be greater than or equal to 1." for n in (0, -1)
    ]
    assert finished(tmp_path / "sweep") == [3]
    again = command(*words, "model.latent_dim=3,4")
    assert (again.code, again.err) == (0, "")
    assert again.out.count("finished already; nothing to do") == 1
    assert finished(tmp_path / "sweep") == [3, 4]
    assert len(list((tmp_path / "sweep").glob("*/"))) == 2, "the failed jobs left no directories"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=1,1"], "another job of this sweep has the same overrides"),
        (["seed=1,2", "trainer.devices=2"], "trainer.devices=2: a job of a sweep or search trains on one device"),
        (["seed=1,2", "resume=somewhere"], "resume=somewhere: is for one run; the same command resumes a sweep"),
    ],
)
def test_jobs_that_a_sweep_refuses(command, words: list[str], line: str) -> None:
    refused = command("-m", *BRIEF, *words)
    assert refused.code == 2
    assert line in refused.err.splitlines()[-1]


def test_a_stopped_sweep_is_resumed_by_the_same_command(command, tmp_path: Path) -> None:
    words = ["-m", "hydra.sweep.dir=sweep", "model.latent_dim=3,4", *SMALL]
    words += ["trainer.callbacks=[{_target_: test_sweeps.Killed, step: 7, name: SIGTERM}]"]
    stopped = command(*words)
    assert (stopped.code, finished(tmp_path / "sweep")) == (75, [])
    assert stopped.err == "stopped by SIGTERM after step 8; to resume it: the same command, in the same directory\n"
    again = command(*words)
    assert (again.code, finished(tmp_path / "sweep")) == (0, [3, 4])
    assert "resuming after step 8" in again.out


def test_gpus_are_assigned_in_turn(monkeypatch) -> None:
    found = []
    for number in range(4):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
        jobs.use_one_device({"devices": "auto", "num_nodes": 1}, number)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == ["5", "7", "9", "5"]


JOBS = {
    "compiled": ["trainer.compile=true"],
    "uncompiled": ["trainer.compile=false"],
    "bfloat16": ["trainer.precision=bf16-mixed", "trainer.matmul_precision=medium"],
    "failing": ["model.learning_rate=3e38"],
    "dreg": ["model/objective=dreg", "model/prior=vamp", "model.prior.pseudo_inputs=5"],
}


@pytest.mark.proof
def test_jobs_in_one_process_equal_single_runs(command, tmp_path: Path) -> None:
    """One after the other in this process, and each in a process of its own: every weight is the same."""
    for name, words in JOBS.items():
        together = command("-m", *SMALL, f"data.root={DATA}", *words, f"hydra.sweep.dir={tmp_path / 'together' / name}")
        alone = sweep(tmp_path / "alone" / name, *SMALL, *words)
        assert together.code == alone.returncode == (2 if name == "failing" else 0), (together.err, alone.stderr)
        if name != "failing":
            runs = [next((tmp_path / place / name).glob("*/")) for place in ("together", "alone")]
            assert differences(*(read_results(run) for run in runs)) == [], name


@pytest.mark.proof
@pytest.mark.parametrize("launcher", ["basic", "joblib", "local", "ray_local"])
def test_a_killed_job_is_resumed_by_the_same_command(tmp_path: Path, launcher: str) -> None:
    if launcher == "ray_local":
        pytest.importorskip("ray", reason="pip install -e '.[ray]' brings it")
    killed = ", ".join(f"{{_target_: test_sweeps.Killed, step: {step}}}" for step in (7, 20, 23, 30, 45))
    words = ["model.latent_dim=2,3", *SMALL, "trainer.checkpoint_every=4", f"hydra/launcher={launcher}"]
    assert sweep(tmp_path / "whole", *words).returncode == 0
    for _ in range(5):
        assert sweep(tmp_path / "sweep", *words, f"trainer.callbacks=[{killed}]").returncode
    last = sweep(tmp_path / "sweep", *words, f"trainer.callbacks=[{killed}]")
    assert last.returncode == 0, last.stderr
    assert finished(tmp_path / "sweep") == [2, 3]
    for latent_dim in (2, 3):
        runs = [next((tmp_path / place).glob(f"latent_dim-{latent_dim}_*")) for place in ("whole", "sweep")]
        weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in runs]
        assert differences(*weights) == []


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
def test_a_slurm_array(tmp_path: Path) -> None:
    """Without a cluster: scripts with the names of Slurm's commands run the jobs on this machine."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "cluster").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    cluster = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CLUSTER": str(tmp_path / "cluster")}
    words = ["model.latent_dim=2,5", "hydra/launcher=slurm", "hydra.launcher.partition=short", f"data.root={DATA}"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "-m", *SMALL, *words, f"hydra.sweep.dir={tmp_path / 's'}"],
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
