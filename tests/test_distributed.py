"""Several processes use the same images and noise as one process, and get the same results."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT

from vae_lightning.data.batches import DeviceBatches
from vae_lightning.data.pixels import Share
from vae_lightning.data.torchvision_sets import MNISTDataModule
from vae_lightning.models.vae import VAE

# 2,001 images in batches of 100: 21 batches, and the last one is a single image. 509 to validate on.
WORDS = [
    "trainer.accelerator=cpu", "trainer.max_epochs=2", "data.val_size=509", "trainer.limit_test_batches=3",
    "data._target_=test_distributed.Few", "model.backbone.hidden=[32]", "data.pixels=dynamic", "figures.embedded=10",
    "model/prior=vamp", "model.prior.pseudo_inputs=5", "model.data_bias=true", "trainer.enable_model_summary=false",
]  # fmt: skip
CONDITIONAL = [*(word for word in WORDS if "prior" not in word), "model.conditional=true"]
TWO = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=50"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
}


class Few(MNISTDataModule):
    """MNIST's first 2,510 training images."""

    def load(self):
        (train, labels), test = super().load()
        return (train[:2510], labels[:2510]), test


def run(
    directory: Path, *words: str, command: tuple = (sys.executable,), base: Sequence[str] = WORDS
) -> subprocess.Popen:
    words = (*base, f"data.root={DATA}", f"hydra.run.dir={directory}", *words)
    return subprocess.Popen(
        [*command, ROOT / "train.py", *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=directory.parent
    )


def read_results(directory: Path) -> tuple[dict, list[dict], dict]:
    weights = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    with (directory / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    metrics = json.loads((directory / "metrics.json").read_text())
    return weights, rows, {key: value for key, value in metrics.items() if key.startswith("test/")}


def same(one: Path, two: Path) -> None:
    (weights, rows, metrics), (weights_two, rows_two, metrics_two) = read_results(one), read_results(two)
    assert [len(rows), rows] == [2, [pytest.approx(row, rel=1e-4) for row in rows_two]]
    assert metrics == pytest.approx(metrics_two, rel=1e-4)
    assert len(metrics) >= 4
    for name, value in weights.items():
        assert torch.allclose(value, weights_two[name], atol=2e-4), name


@pytest.mark.proof
@pytest.mark.parametrize("words", [WORDS, CONDITIONAL], ids=["vamp", "conditional"])
def test_two_processes_equal_one_with_twice_the_batch_size(words: list[str], command, tmp_path: Path) -> None:
    two = run(tmp_path / "two", *TWO, base=words)
    assert command(*words, "data.batch_size=100", "hydra.run.dir=one").code == 0
    assert two.wait(300) == 0, two.stderr.read()
    same(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_shares_together_are_the_batch() -> None:
    images = torch.arange(23, dtype=torch.uint8).reshape(23, 1, 1, 1)
    parts = [DeviceBatches(images, images.flatten(), 5, shuffle_seed=1, rank=r, world_size=3) for r in range(3)]
    whole = DeviceBatches(images, images.flatten(), 15, shuffle_seed=1)
    for batch, *shares in zip(whole, *parts, strict=True):
        together = torch.cat([labels for _, labels in shares])
        assert sorted(together.tolist()) == sorted(batch[1].tolist())
    assert [part.share for part in parts] == [Share(8, rank, 3) for rank in range(3)]


def test_a_process_without_an_image_does_not_count() -> None:
    vae, values = VAE(), torch.ones(1)
    for rank, counts in ((0, True), (1, False)):
        share = Share(1, rank, 2)
        assert (share.rows, share.counts) == (slice(rank, None, 2) if counts else slice(0, 1), counts)
        vae.share = lambda share=share: share
        assert vae.batch_mean(values).item() == (2.0 if counts else 0.0)
        vae.count("train", {"loss": values})
    assert vae.means["train"].count.item() == 1


def test_noise_and_loss_equal_those_of_the_full_batch(monkeypatch) -> None:
    vae, values, found, noises = VAE(), torch.randn(7), [], []
    for rank in range(2):
        torch.manual_seed(0)
        share = Share(7, rank, 2)
        monkeypatch.setattr(vae, "share", lambda share=share: share)
        noises.append(vae.noise(3, len(values[share.rows]), 20))
        found.append(vae.batch_mean(values[share.rows]))
    torch.manual_seed(0)
    whole = torch.randn(3, 7, 20)
    assert torch.equal(noises[0], whole[:, 0::2])
    assert torch.equal(noises[1], whole[:, 1::2])
    assert torch.allclose(sum(found) / 2, values.mean())


@pytest.mark.proof
def test_two_nodes_by_torchrun(command, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = ["trainer.num_nodes=2", "trainer.devices=1", *TWO[1:]]
    jobs = [run(tmp_path / "two", *nodes, command=(*torchrun, f"--node_rank={rank}")) for rank in range(2)]
    assert command(*WORDS, "data.batch_size=100", "hydra.run.dir=one").code == 0
    assert [job.wait(300) for job in jobs] == [0, 0], jobs[0].stderr.read()
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.proof
def test_two_processes_stop_together_and_resume(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *TWO, "trainer.max_epochs=40")
    assert whole.wait(300) == 0, whole.stderr.read()
    stopped = run(tmp_path / "run", *TWO, "trainer.max_epochs=40")
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(100) == 75, stopped.stderr.read()
    again = run(tmp_path / "run", *TWO, "trainer.max_epochs=40", "resume=auto")
    assert again.wait(300) == 0, again.stderr.read()
    (weights, rows, metrics), (weights_two, rows_two, metrics_two) = (
        read_results(tmp_path / "whole"),
        read_results(tmp_path / "run"),
    )
    assert rows == rows_two
    assert metrics == metrics_two
    assert all(torch.equal(value, weights_two[name]) for name, value in weights.items())
