"""Evaluation of user-defined models, compared with `log_weights` and with the run's own test."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from linear import SHAPE, exact_log_likelihood, linear_vae
from torch import Tensor, nn

from vae_lightning.analysis import generation
from vae_lightning.analysis.evaluation import evaluate_images, evaluate_run
from vae_lightning.data.module import ImageDataModule
from vae_lightning.models.posteriors import Gaussian, PosteriorDistribution
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import RunError
from vae_lightning.runs.loading import open_run
from vae_lightning.training.train import train

QUICK = {"samples": 20, "probes": False, "accelerator": "cpu"}


class Autoregressive(PosteriorDistribution):
    """One step of an inverse autoregressive flow: dimension i is scaled by a function of the dimensions before it.

    It has no inverse, so it has no `log_prob` of a given z.
    """

    def __init__(self, base: PosteriorDistribution, weight: Tensor) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.weight = base, weight

    def flow(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = torch.tanh(y @ self.weight.tril(-1).T)
        return y * log_scale.exp(), log_scale.sum(dim=-1)

    @property
    def mean(self) -> Tensor:
        return self.flow(self.base.mean)[0]

    def transform_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        y, log_q = self.base.transform_and_log_prob(noise)
        z, log_determinant = self.flow(y)
        return z, log_q - log_determinant

    def detach(self) -> None:
        return None


class IAF(Gaussian):
    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.weight = nn.Parameter(torch.full((latent_dim, latent_dim), 0.4))

    def forward(self, outputs: Tensor) -> PosteriorDistribution:
        return Autoregressive(super().forward(outputs), self.weight)


class Conditional(VAE):
    """The label shifts all latents, so that reconstructions without it are wrong."""

    def posterior_given(self, x, labels=None) -> PosteriorDistribution:
        return super().posterior_given(x if labels is None else x * (0.1 + labels.view(-1, 1, 1, 1) / 10), labels)

    def likelihood_given(self, z, labels=None):
        return super().likelihood_given(z if labels is None else z + 3 * labels.float().unsqueeze(-1))


class Inconsistent(VAE):
    """Its `terms` do not agree with `log_weights`."""

    def terms(self, x, *arguments, **options) -> dict[str, Tensor]:
        terms = super().terms(x, *arguments, **options)
        return terms | {"elbo": terms["elbo"] - 50}


class Bars(ImageDataModule):
    """300 training and 200 test images, each of one bar."""

    def load(self):
        images = torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
        for n, image in enumerate(images):
            image[:, n % 7, : 2 + n % 6] = 255
        labels = torch.arange(500) % 4
        return (images[:300], labels[:300]), (images[300:], labels[300:])


BARS = {"_target_": "test_evaluation_of_own_models.Bars", "pixels": "fixed", "val_size": 0}
BRIEF = [
    "trainer.max_epochs=1", "model.latent_dim=3", "model.backbone.hidden=[16]", "figures.every=0", "figures.embedded=0",
    "trainer.enable_model_summary=false",
]  # fmt: skip
OWN = {
    "part": ["model.posterior._target_=test_evaluation_of_own_models.IAF"],
    "conditional": ["model._target_=test_evaluation_of_own_models.Conditional"],
    "vamp": ["model/prior=vamp", "model.prior.pseudo_inputs=5", "model/posterior=full_covariance"],
    "flow": ["model/prior=flow", "model/posterior=flow", "model.prior.hidden=[8]", "model.posterior.hidden=[8]"],
}


def trained(overrides: list[str], directory: Path) -> dict[str, Any]:
    return train(composed(*BRIEF, *overrides) | {"data": BARS}, directory)


@pytest.mark.parametrize("kind", OWN)
def test_evaluation_agrees_with_log_weights_and_with_the_run_s_test(kind: str, tmp_path: Path) -> None:
    metrics = trained(OWN[kind], tmp_path / "run")
    found = evaluate_run(str(tmp_path / "run"), **QUICK | {"samples": 200})
    run = open_run(tmp_path / "run", "cpu")
    x, labels = run.model.images(run.data.test_images), run.data.test_labels
    with torch.inference_mode():
        weights = run.model.log_weights(x, 200, labels)
    nll = math.log(200) - weights.logsumexp(0).mean().item()
    assert found["test/nll"] == pytest.approx(nll, abs=0.2)
    assert found["test/elbo"] == pytest.approx(weights.mean().item(), abs=0.3)
    assert found["test/elbo"] == pytest.approx(metrics["test/elbo"], abs=1.5)
    assert found["test/reconstruction"] + found["test/kl"] == pytest.approx(-found["test/elbo"], rel=1e-5)
    flow = kind in ("part", "flow")
    assert (found["test/mutual_information"] is None) == flow, "there is no mixture of flows"
    for name in ("reconstructions", "traversals", "interpolations", "samples", "walk"):
        assert getattr(generation, name)(run) is not None


def test_an_elbo_that_contradicts_the_run_s_own_test_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(["model._target_=test_evaluation_of_own_models.Inconsistent"], tmp_path / "run")
    refused = r"elbo=-[0-9.]+, but metrics\.json has -[0-9.]+: more than sampling noise .*; nothing was written"
    monkeypatch.chdir(tmp_path)
    for path in ("run", "run/checkpoints/best.ckpt"):
        with pytest.raises(RunError, match=refused):
            evaluate_run(path, **QUICK)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics | {"test/elbo": metrics["test/elbo"] + 50}))
    assert evaluate_run(str(tmp_path / "run"), **QUICK)["test/elbo"] == pytest.approx(metrics["test/elbo"] + 50, abs=2)


def test_a_flow_on_top_of_the_true_posterior_finds_the_exact_likelihood() -> None:
    vae = linear_vae(posterior={"_target_": "test_evaluation_of_own_models.IAF"})
    images, labels = torch.randint(256, (30, *SHAPE), dtype=torch.uint8), torch.zeros(30)
    exact = exact_log_likelihood(vae, images / 255)
    results, sampled, _ = evaluate_images(vae, images, labels, samples=20_000, chunk=2_000)
    assert results["nll"] == pytest.approx(-exact.mean().item(), abs=0.02)
    assert results["elbo"] < exact.mean().item() - 0.01
    assert not sampled.analytic
    assert results["kl_per_dimension"] is None
