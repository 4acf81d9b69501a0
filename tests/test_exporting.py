import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import BRIEF
from safetensors import safe_open
from torch import nn

from vae_lightning.analysis.exporting import export_run, write_graph
from vae_lightning.config import UserError
from vae_lightning.runs.loading import load_run
from vae_lightning.training.train import train


@pytest.mark.parametrize(
    "words",
    [
        "model/backbone=conv model.latent_dim=3 data.pixels=dynamic",
        *(
            pytest.param(words, marks=pytest.mark.proof)
            for words in (
                "model/likelihood=gaussian model/prior=vamp model.prior.pseudo_inputs=5 model.backbone.hidden=[16]",
                "model=autoencoder model.output=tanh model.backbone.hidden=[16]",
            )
        ),
    ],
)
def test_exported_graphs_match_the_model(words: str, config, tmp_path: Path, mnist) -> None:
    train(config("figures.every=0", *words.split(), *BRIEF), tmp_path / "run")
    directory = export_run(tmp_path / "run")
    assert directory == tmp_path / "run" / "export"
    model = load_run(tmp_path / "run")
    encoder, decoder = (onnxruntime.InferenceSession(directory / f"{name}.onnx") for name in ("encoder", "decoder"))
    codes = encoder.run(None, {"images": mnist[:50].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(codes), model.codes(mnist[:50]), rtol=1e-4, atol=1e-4)
    (images,) = decoder.run(["images"], {"latents": codes})
    torch.testing.assert_close(torch.from_numpy(images), model.reconstruct(mnist[:50]), rtol=1e-4, atol=1e-4)
    with safe_open(directory / "decoder.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.decoder.state_dict())
        assert json.loads(file.metadata()["model"])["latent_dim"] == model.latent_dim
        assert file.metadata()["pixels"] == model.config["data"]["pixels"]


class Mean(nn.Module):
    """A network that takes a mean: ONNX gives that node the name of the first output."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = images.mean(1)
        return 2 * mean, mean.square()


def test_a_node_may_have_the_name_of_an_output(tmp_path: Path) -> None:
    images = torch.rand(3, 4, 5)
    write_graph(tmp_path / "encoder.onnx", Mean().eval(), {"images": images}, ["mean", "log_variance"])
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    (mean,) = session.run(["mean"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(mean), 2 * images.mean(1))


class Drifting(nn.Module):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return 2 * latents + (0 if torch.compiler.is_compiling() else 0.01)


def test_a_graph_that_differs_from_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decoder\.onnx: differs from PyTorch by up to 1\.0e-02"):
        write_graph(tmp_path / "decoder.onnx", Drifting().eval(), {"latents": torch.rand(3, 2)}, ["images"])


def test_a_missing_extra_gets_one_clear_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"export needs onnxruntime: pip install -e '\.\[export\]'"):
        export_run(tmp_path)
