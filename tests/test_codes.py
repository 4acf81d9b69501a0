"""Discrete codes: exactness of the bound, the codebook, gradients, and a run through every command."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import differences, read_results

from vae_lightning import (
    IWAE,
    MLP,
    VAE,
    FiniteScalarQuantizer,
    GaussianPosterior,
    StandardNormal,
    UniformCodes,
    VectorQuantizer,
)
from vae_lightning.analysis.exporting import export_run
from vae_lightning.analysis.generation import FIGURES
from vae_lightning.config import ConfigError
from vae_lightning.runs.loading import open_run

QUANTIZERS = [partial(VectorQuantizer, code_dim=2, codes=5), partial(FiniteScalarQuantizer, levels=[2, 3])]


def make_vae(posterior: Any = QUANTIZERS[0], **options: Any) -> VAE:
    options = {"prior": UniformCodes, "image_shape": (1, 4, 4)} | options
    return VAE(6, partial(MLP, hidden=(16,)), posterior=posterior, **options)


@pytest.mark.parametrize("posterior", QUANTIZERS)
def test_the_sum_over_all_code_maps_is_log_p_and_the_bound_is_below(posterior: Any) -> None:
    vae = make_vae(posterior).eval().requires_grad_(False)
    for weights in vae.decoder.parameters():
        weights.mul_(4)  # so that the codes matter
    q, x = vae.posterior, torch.rand(7, 1, 4, 4).round()
    numbers = torch.tensor(list(itertools.product(range(q.codes), repeat=q.positions)))
    z = q.vectors(numbers)
    assert len(z.unique(dim=0)) == q.codes**3
    assert torch.equal(q.numbers(z), numbers)
    prior = vae.prior_distribution()
    assert prior.log_prob(z).exp().sum().item() == pytest.approx(1, abs=1e-5)
    log_likelihood = vae.log_joint(x, z.unsqueeze(1).expand(-1, len(x), -1)).logsumexp(dim=0)
    elbo = vae.elbo(x)["elbo"]
    assert (elbo < log_likelihood).all()
    torch.testing.assert_close(vae.log_weights(x, 3), elbo.expand(3, -1))
    torch.testing.assert_close(vae.elbo(x)["kl"], torch.full((7,), 3 * math.log(q.codes)))
    # The code of an image is one of the codes, and samples are uniform.
    torch.testing.assert_close(vae.codes(x), q.vectors(q.numbers(vae.codes(x))))
    counts = q.numbers(prior.sample((30_000,))).flatten().bincount()
    assert ((counts / counts.sum() - 1 / q.codes).abs() < 0.01).all()


@pytest.mark.parametrize("posterior", QUANTIZERS)
def test_the_gradient_of_z_goes_straight_through(posterior: Any) -> None:
    q = posterior(6)
    outputs = torch.randn(4, 6, requires_grad=True)
    towards = torch.randn(4, 6)
    (q(outputs).mean * towards).sum().backward()
    slope = torch.ones(4, 6)
    if isinstance(q, FiniteScalarQuantizer):
        slope = 1 - outputs.detach().tanh().square()
    torch.testing.assert_close(outputs.grad, towards * slope)


def test_the_codebook_finds_the_clusters() -> None:
    torch.manual_seed(0)
    centers = 3 * torch.randn(8, 2)
    q = VectorQuantizer(latent_dim=6, code_dim=2, codes=24, decay=0.9, restart=0.1)
    for _ in range(300):
        at = centers[torch.randint(8, (64, 3))]
        found = q(q.join(at + 0.01 * torch.randn(64, 3, 2)))
    assert (torch.cdist(centers, q.codebook).min(dim=1).values < 0.02).all()
    assert 8 < q.summary(found.mean)["perplexity"] <= 24
    codebook = q.codebook.clone()
    with torch.no_grad():
        q(torch.randn(64, 6))
    q.eval()(torch.randn(64, 6, requires_grad=True))
    assert torch.equal(q.codebook, codebook)  # nothing but training changes it
    distance = q(torch.zeros(1, 6)).loss_terms()["commitment"]
    assert distance.item() == pytest.approx(0.25 * 3 * codebook.square().sum(dim=1).min().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": StandardNormal}, "VectorQuantizer with StandardNormal: only one is discrete"),
        ({"posterior": GaussianPosterior}, "Gaussian with UniformCodes: only one is discrete"),
        (
            {"posterior": partial(VectorQuantizer, code_dim=4)},
            "code_dim: 4 entries of a code do not divide latent_dim=6",
        ),
        ({"objective": IWAE}, "model.objective=IWAE: all samples of a VectorQuantizer are the same; allowed: ELBO"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_vae(**options)


def test_a_run_goes_through_every_command(command, script, tmp_path: Path) -> None:
    words = [
        *("model=vq", "model.backbone.channels=[4,4,4]", "model.posterior.codes=8", "data.pixels=dynamic"),
        *("trainer.limit_train_batches=20", "trainer.limit_val_batches=2", "data.val_size=500"),
        *("trainer.accelerator=cpu", "trainer.enable_model_summary=false"),
    ]
    two = "trainer.max_epochs=2"
    assert command(*words, "hydra.run.dir=run", "trainer.max_epochs=1").code == 0
    assert command(*words, "resume=run", two).code == 0
    assert command(*words, two, "hydra.run.dir=uninterrupted").code == 0
    resumed, uninterrupted = (read_results(tmp_path / name) for name in ("run", "uninterrupted"))
    assert differences(resumed["last"]["state_dict"], uninterrupted["last"]["state_dict"]) == []
    assert differences(resumed["metrics"], uninterrupted["metrics"]) == []
    assert 1 < resumed["metrics"]["test/perplexity"] <= 8
    assert resumed["metrics"]["test/kl"] == pytest.approx(49 * math.log(8), rel=1e-5)

    run = open_run(tmp_path / "run", "cpu")
    run.data.test_images, run.data.test_labels = run.data.test_images[:200], run.data.test_labels[:200]
    evaluated = script("vae", "evaluate", "run", "--samples=5", "--no-probes")
    assert evaluated.code == 0, evaluated.err
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert content["test/nll"] == pytest.approx(-content["test/elbo"])
    assert "test/perplexity" in content
    assert "perplexity" in script("vae", "report", "run", "uninterrupted").out
    with torch.inference_mode():
        for name, function in FIGURES.items():
            if name not in ("analogies", "manifold"):  # of conditional models, and of two latent dimensions
                assert function(run, **({"z": [0.0] * 784} if name == "decode" else {})) is not None
    assert (export_run(tmp_path / "run") / "decoder.onnx").exists()
