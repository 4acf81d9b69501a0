"""A colour run with a likelihood of 8-bit pixels goes through everything that a grey one does."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from conftest import differences, events, history, read_results

from vae_lightning.analysis.explorer import make_application
from vae_lightning.analysis.exporting import export_run
from vae_lightning.analysis.generation import FIGURES
from vae_lightning.runs.loading import open_run

WORDS = [
    *("data._target_=helpers.Colours", "data.batch_size=20", "data.val_size=40"),
    *("model/backbone=residual_conv", "model.backbone.channels=[8,8]", "model.backbone.blocks=1"),
    *("model.backbone.groups=2", "model.backbone.spatial=true", "model.latent_dim=32", "model.data_bias=true"),
    *("figures.every=1", "figures.samples=[1,2]", "trainer.accelerator=cpu", "trainer.enable_model_summary=false"),
]
MIXTURE = ["model/likelihood=logistic_mixture", "model.likelihood.components=2"]
TWO = ["trainer.max_epochs=2"]
NATS = 3 * 8 * 8 * math.log(2)  # of one bit per dimension


def test_a_colour_run_goes_through_every_command(command, script, tmp_path: Path) -> None:
    finished = command(*WORDS, *MIXTURE, *TWO, "hydra.run.dir=mixture")
    assert finished.code == 0, finished.err
    assert "test, colour pixels: " in (tmp_path / "mixture" / "train.log").read_text()
    assert command(*WORDS, "model/likelihood=discretized_logistic", "hydra.run.dir=logistic", *TWO).code == 0
    metrics = json.loads((tmp_path / "mixture" / "metrics.json").read_text())
    assert metrics["test/bits_per_dim"] == pytest.approx(-metrics["test/elbo"] / NATS, rel=1e-6)
    assert metrics["remark"] == ""
    for row in history(tmp_path / "mixture"):
        for split in ("train", "val"):
            assert float(row[f"{split}/bits_per_dim"]) == pytest.approx(-float(row[f"{split}/elbo"]) / NATS, rel=1e-6)
    assert "test/bits_per_dim" in events(tmp_path / "mixture").Tags()["scalars"]
    assert (tmp_path / "mixture" / "figures" / "reconstructions.png").exists()

    one = script("vae", "evaluate", "mixture", "--samples=3", "--no-probes")
    content = json.loads((tmp_path / "mixture" / "evaluation.json").read_text())
    bits = content["test/bits_per_dim"]
    assert bits == pytest.approx(content["test/nll"] / NATS)
    assert content["quantity"] == "log probability of 8-bit pixels"
    (line,) = [line for line in one.out.splitlines() if line.split()[0] == "nll"]
    assert line.endswith(f"nats, {bits:8.4f} bits per dimension")
    both = script("vae", "evaluate", "mixture", "logistic", "--samples=3", "--no-probes")
    assert "bits_per_dim" in both.out.splitlines()[0]
    report = script("vae", "report", "mixture", "logistic")
    assert report.out.startswith("Colours, colour pixels, 8-bit likelihood\n"), report.out
    assert all(f"{name} " in report.out for name in ("test/bits_per_dim", "test/bits_per_dim (k=3)", "LogisticMixture"))
    compared = script("vae", "compare", "mixture", "logistic")
    assert f" {bits:.3f}" in compared.out

    run = open_run(tmp_path / "mixture", "cpu")
    with torch.inference_mode():
        for name, function in FIGURES.items():
            if name in ("analogies", "manifold"):  # of conditional models, and of two latent dimensions
                continue
            assert function(run, **({"z": [0.0] * 32} if name == "decode" else {})) is not None
    asyncio.run(explore(run))
    assert (export_run(tmp_path / "mixture") / "decoder.onnx").exists()


async def explore(run) -> None:
    async with TestClient(TestServer(make_application(run, "127.0.0.1"))) as client:
        images = [await (await client.post("/decode", json={"z": [z] * 32})).read() for z in (0, 1)]
        assert images[0] != images[1]


def test_a_colour_run_resumes_to_the_bit(command, tmp_path: Path) -> None:
    assert command(*WORDS, *MIXTURE, "hydra.run.dir=run", "trainer.max_epochs=1").code == 0
    assert command(*WORDS, *MIXTURE, "resume=run", *TWO).code == 0
    assert command(*WORDS, *MIXTURE, *TWO, "hydra.run.dir=uninterrupted").code == 0
    resumed, uninterrupted = (read_results(tmp_path / name) for name in ("run", "uninterrupted"))
    assert differences(resumed["history"], uninterrupted["history"]) == []
    assert differences(resumed["last"]["state_dict"], uninterrupted["last"]["state_dict"]) == []
    assert differences(resumed["metrics"], uninterrupted["metrics"]) == []


def test_binary_pixels_are_refused_in_one_line(command, tmp_path: Path) -> None:
    refused = command("model/likelihood=discretized_logistic", "data.pixels=dynamic", "hydra.run.dir=run")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert refused.err.startswith(
        "binary images: DiscretizedLogistic is a likelihood of 8-bit pixels; use data.pixels="
    )
    assert not (tmp_path / "run").exists()
