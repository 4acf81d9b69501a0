"""Conditional VAEs: exact numbers of a linear model, every command on a small run, and samples that are recognized."""

import asyncio
from pathlib import Path

import onnxruntime
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from conftest import BRIEF, DATA, MLP
from helpers import Few
from linear import LATENT_DIM, SCALE, SHAPE, exact_log_likelihood, linear_vae
from torch import Tensor, nn

from vae_lightning.analysis.evaluation import bayes_classifier, evaluate_images, evaluate_run
from vae_lightning.analysis.explorer import make_application
from vae_lightning.analysis.exporting import export_run
from vae_lightning.analysis.generation import FIGURES
from vae_lightning.analysis.reports import report_runs
from vae_lightning.config import ConfigError
from vae_lightning.data.torchvision_sets import load_images
from vae_lightning.models.base import ShapeError
from vae_lightning.models.objectives import ELBO, IWAE, DReG
from vae_lightning.models.vae import VAE
from vae_lightning.runs.loading import load_run, open_run
from vae_lightning.training.train import train

BACKBONES = {
    "mlp": MLP,
    "gated": MLP | {"gated": True},
    "conv": {"_target_": "vae_lightning.models.backbones.Conv", "channels": [4]},
    "residual": {"_target_": "vae_lightning.models.backbones.ResidualConv", "channels": [4]},
}


def conditional_linear_vae() -> tuple[VAE, Tensor]:
    """Return a VAE with p(x|z, y) = N(W z + V y + b, s² I) and its true posterior, and V `[6, 3]` of three classes.

    Subtracting V y from the image gives the model without labels, so the label images of the encoder are −V y.
    """
    plain, v = linear_vae(), 0.4 * torch.randn(6, 3)
    likelihood = plain.hparams["likelihood"]
    vae = VAE(LATENT_DIM, {"_target_": "linear.Linear"}, likelihood, image_shape=SHAPE, conditional=True, classes=3)
    with torch.no_grad():
        vae.decoder.network[0].weight.copy_(torch.cat([plain.decoder[0].weight, v], dim=1))
        vae.decoder.network[0].bias.copy_(plain.decoder[0].bias)
        vae.encoder.network.load_state_dict(plain.encoder.state_dict())
        vae.encoder.label_images.copy_(-v.T.reshape(3, *SHAPE))
    return vae, v


def test_a_linear_model_has_the_exact_likelihood_and_accuracy() -> None:
    vae, v = conditional_linear_vae()
    images, labels = torch.randint(256, (60, *SHAPE), dtype=torch.uint8), torch.arange(60) % 3
    train_labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = images / 255
    exact = torch.stack([exact_log_likelihood(linear_vae(), x - v[:, y].reshape(SHAPE)) for y in range(3)], dim=1)
    of_labels = exact[torch.arange(60), labels]
    for objective in (ELBO(kl="monte_carlo"), IWAE(3), DReG(3)):
        torch.testing.assert_close(-objective(vae, x, labels)["loss"].double(), of_labels, rtol=1e-5, atol=1e-4)
    results, _, _ = evaluate_images(vae, images, labels, samples=5)
    assert results["nll"] == pytest.approx(-of_labels.mean().item(), abs=1e-4)
    log_joint = exact + torch.tensor([3, 2, 1]).double().div(6).log()
    found = bayes_classifier(vae, images, labels, train_labels, samples=2)
    accuracy = (log_joint.argmax(dim=1) == labels).double().mean().item()
    assert 0.1 < accuracy < 0.9
    assert found["class_accuracy"] == pytest.approx(accuracy)
    assert found["marginal_nll"] == pytest.approx(-log_joint.logsumexp(dim=1).mean().item(), abs=1e-4)
    assert vae.likelihood.scale == SCALE


@pytest.mark.parametrize("name", BACKBONES)
def test_both_networks_of_every_backbone_use_the_label(name: str, mnist: Tensor) -> None:
    vae, x, labels = VAE(3, BACKBONES[name], conditional=True, classes=10), mnist[:4], torch.arange(4)
    vae.elbo(x, labels)["loss"].sum().backward()
    gradient = vae.encoder.label_images.grad
    assert (gradient.flatten(1).abs().sum(dim=1) > 0).tolist() == [True] * 4 + [False] * 6
    nn.init.normal_(vae.encoder.label_images)
    assert not torch.allclose(vae.encode(x, labels).mean, vae.encode(x, labels + 1).mean)
    assert not torch.allclose(vae.decode_images(torch.zeros(3), 1), vae.decode_images(torch.zeros(3), 2))
    z = torch.randn(5, 4, 3)
    torch.testing.assert_close(vae.decode_images(z, labels)[2, 3], vae.decode_images(z[2, 3], 3))


def test_samples_are_of_the_class_or_of_all_classes_in_turn() -> None:
    vae = VAE(2, MLP, conditional=True, classes=3)
    vae.prior.scale.zero_()
    drawn = [vae.sample(4, labels=y) for y in (None, 1, [2, 1, 0, 0])]
    of_class = [vae.decode_images(torch.zeros(2), y) for y in range(3)]
    for images, labels in zip(drawn, ([0, 1, 2, 0], [1, 1, 1, 1], [2, 1, 0, 0]), strict=True):
        torch.testing.assert_close(images, torch.stack([of_class[y] for y in labels]))


def test_missing_and_wrong_labels_get_one_clear_line(mnist: Tensor, command) -> None:
    vae, x = VAE(2, MLP, conditional=True, classes=10), mnist[:3]
    missing = "labels: missing; a conditional model needs a class from 0 to 9 for each image"
    for call in (lambda: vae.encode(x), lambda: vae.reconstruct(x), lambda: vae.decode([0.0, 0.0])):
        with pytest.raises(ShapeError, match=missing):
            call()
    for labels, line in (
        (10, "labels from 10 to 10: should be a class from 0 to 9"),
        ([0, -1, 3], "labels from -1 to 3: should be a class from 0 to 9"),
        ([0.5, 1, 2], "labels from 0.5 to 2: should be"),
        ([0, 1], r"labels of shape \(2,\): should be \(3,\)"),
        ("seven", "labels: str is not an array of real numbers"),
    ):
        with pytest.raises(ShapeError, match=line):
            vae.encode(x, labels)
    with pytest.raises(
        ShapeError, match=r"labels=7: the model is not conditional; train one with model\.conditional=true"
    ):
        VAE(2, MLP).sample(4, labels=7)
    with pytest.raises(ConfigError, match=r"model\.conditional=true: needs the number of classes"):
        VAE(2, MLP, conditional=True)
    unlabelled = ["data._target_=test_conditional.Unlabelled", "data.val_size=100"]
    for words, line in (
        (["model/prior=vamp"], "model.conditional=true: VampPrior encodes without labels; use another prior"),
        (unlabelled, "model.conditional=true: images of Unlabelled have no label; each should have one"),
    ):
        refused = command("model.conditional=true", "hydra.run.dir=run", *words)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert refused.err.startswith(line)
        assert not Path("run").exists()


class Unlabelled(Few):
    def load(self):
        (train, labels), (test, test_labels) = super().load()
        return (train, -torch.ones_like(labels)), (test, test_labels)


def test_every_command_works_on_a_conditional_run(config, tmp_path: Path) -> None:
    words = ["data._target_=helpers.Few", f"data.root={DATA}", "data.val_size=100", "model.latent_dim=2"]
    words += ["model.backbone.hidden=[16]", "figures.points=[[0.5,0]]", "model.data_bias=true"]
    train(config(*words, "model.conditional=true", *BRIEF), tmp_path / "run")
    run = open_run(tmp_path / "run", "cpu")
    with torch.inference_mode():
        for name, function in FIGURES.items():
            figure = function(run, **({"z": [0.0, 1.0]} if name == "decode" else {}))
            assert figure is not None
            if name == "decode":
                assert figure.shape[1:] == (10 * 30 + 2, 30 + 2)
        (axes,) = FIGURES["samples"](run).axes
        assert axes.images[0].get_array().shape == (10 * 30 + 2, 8 * 30 + 2, 3)
        assert [label.get_text() for label in axes.get_yticklabels()] == list(map(str, range(10)))
        assert FIGURES["samples"](run, n=3, label=7).shape[1:] == (32, 3 * 30 + 2)
        with pytest.raises(ConfigError, match="label=10: should be a class from 0 to 9"):
            FIGURES["samples"](run, label=10)
    found = evaluate_run(str(tmp_path / "run"), samples=2, probes=False, class_samples=1, accelerator="cpu")
    assert 0 <= found["test/class_accuracy"] <= 1
    assert found["test/marginal_nll"] > 0
    assert "test/marginal_nll (k=1)" in report_runs([str(tmp_path / "run")], to=str(tmp_path / "report"))
    asyncio.run(explore(run))


async def explore(run) -> None:
    async with TestClient(TestServer(make_application(run, "127.0.0.1"))) as client:
        assert (await (await client.get("/state")).json())["classes"] == 10
        images = [await (await client.post("/decode", json={"z": [0, 0], "y": y})).read() for y in (0, 1)]
        assert images[0] != images[1]
        for wrong in (None, 10, "a", [1], {}, [[0]]):
            refused = await client.post("/decode", json={"z": [0, 0], "y": wrong})
            assert (refused.status, (await refused.text()).startswith("labels")) == (400, True)
        drawn = await client.post("/encode", json={"image": [0.5] * 784, "y": 3})
        assert len((await drawn.json())["z"]) == 2


@pytest.mark.proof
def test_exported_graphs_take_labels(config, tmp_path: Path, mnist: Tensor) -> None:
    train(config("model.conditional=true", "model/backbone=conv", "figures.every=0", *BRIEF), tmp_path / "run")
    directory, vae = export_run(tmp_path / "run"), load_run(tmp_path / "run")
    encoder, decoder = (onnxruntime.InferenceSession(directory / f"{name}.onnx") for name in ("encoder", "decoder"))
    labels = torch.arange(50) % 10
    codes = encoder.run(None, {"images": mnist[:50].numpy(), "labels": labels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(codes), vae.codes(mnist[:50], labels), rtol=1e-4, atol=1e-4)
    (images,) = decoder.run(None, {"latents": codes, "labels": labels.numpy()})
    torch.testing.assert_close(torch.from_numpy(images), vae.reconstruct(mnist[:50], labels), rtol=1e-4, atol=1e-4)


def digit_classifier(images: Tensor, labels: Tensor, epochs: int = 5) -> nn.Module:
    """Train a small convolutional network on real digits, bytes `[n, 1, 28, 28]`."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(network(images[batch].float() / 255), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@pytest.mark.proof
def test_a_classifier_of_real_digits_recognizes_conditional_samples(config, tmp_path: Path) -> None:
    limits = ["trainer.max_epochs=24", "model.latent_dim=5", "model/schedule=cosine", "figures.every=0"]
    train(config("model.conditional=true", "trainer.enable_model_summary=false", *limits), tmp_path / "run")
    vae = load_run(tmp_path / "run")
    (images, labels), (test_images, test_labels) = load_images("MNIST", DATA)
    classifier = digit_classifier(images, labels)
    with torch.inference_mode():
        real = (classifier(test_images.float() / 255).argmax(dim=1) == test_labels).double().mean().item()
        wanted = torch.arange(1_000) % 10
        drawn = (classifier(vae.sample(1_000, labels=wanted)).argmax(dim=1) == wanted).double().mean().item()
    assert real > 0.98
    assert drawn >= 0.97
    found = evaluate_run(str(tmp_path / "run"), samples=20, class_samples=5, accelerator="cpu")
    assert found["test/class_accuracy"] > 0.95
    assert found["test/linear_accuracy"] < 0.5, "z is independent of y"
