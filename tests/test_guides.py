"""The mathematics of the models in docs/guides/; test_pages.py runs their commands."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import blocks, close_in_expectation, grid
from linear import LATENT_DIM, SHAPE, linear_vae

from vae_lightning.analysis.evaluation import aggregate_posterior
from vae_lightning.config import ConfigError
from vae_lightning.models.estimators import kl_divergence

Guide = Callable[[str], Any]


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> Guide:
    """`guide("prior")`: the last Python module that docs/guides/prior.md shows; all of them can be imported."""

    def load(page: str) -> ModuleType:
        shown = [block for block in blocks(f"docs/guides/{page}.md") if (block.file or "").endswith(".py")]
        modules = [ModuleType(Path(block.file or "").stem) for block in shown]
        for module, block in zip(modules, shown, strict=True):
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(block.text, vars(module))
        return modules[-1]

    return load


def test_total_correlation_and_its_companions_add_up_to_the_kl(guide: Guide) -> None:
    objective = guide("tcvae").TCVAE(images=40)
    vae, x = linear_vae(shift=0.5).requires_grad_(False), torch.rand(40, *SHAPE)
    terms = [objective(vae, x) for _ in range(300)]  # all images in one batch: the estimate of q(z) is exact
    mean = {name: torch.stack([term[name].mean() for term in terms]) for name in terms[0]}
    q = vae.encode(x)
    kl = kl_divergence(q.mean, q.log_variance).sum(dim=-1).mean()
    assert close_in_expectation(mean["mutual_information"] + mean["total_correlation"] + mean["dimension_kl"], kl)
    torch.testing.assert_close(mean["loss"], -mean["elbo"])  # with β = 1
    points, log_area = grid(6, 401)
    log_joint = q.mixture().log_prob(points).unflatten(0, (401, 401)) + log_area
    log_product = log_joint.logsumexp(dim=0) + log_joint.logsumexp(dim=1).unsqueeze(1)
    assert close_in_expectation(mean["total_correlation"], (log_joint.exp() * (log_joint - log_product)).sum())
    information = [aggregate_posterior(vae, [q], seed)[0] for seed in range(300)]
    difference = mean["mutual_information"] - torch.tensor(information)  # two independent estimates
    assert close_in_expectation(difference, torch.tensor(0.0))


def test_the_density_of_the_aggregate_is_estimated_without_bias(guide: Guide) -> None:
    tcvae, vae, x = guide("tcvae"), linear_vae(shift=0.5).requires_grad_(False), torch.rand(9, *SHAPE)
    z = vae.reparameterize(vae.encode(x))
    found = []
    for others in itertools.combinations(range(1, len(x)), 3):  # all batches of four with the first image
        batch = [0, *others]
        found.append(tcvae.log_aggregate(vae.encode(x[batch]), z[batch], len(x))[0][0].exp())
    torch.testing.assert_close(torch.stack(found).mean(), vae.encode(x).mixture().log_prob(z[0]).exp())


def test_total_correlation_needs_a_diagonal_gaussian_and_a_normal_prior(guide: Guide) -> None:
    guide("tcvae")
    prior = {"_target_": "vae_lightning.models.priors.VampPrior", "pseudo_inputs": 3}
    with pytest.raises(ConfigError, match=r"TCVAE needs model/posterior=gaussian and model/prior=normal"):
        linear_vae(objective={"_target_": "tcvae.TCVAE"}, prior=prior)


def test_the_autoregressive_prior_is_a_density_and_samples_from_it(guide: Guide) -> None:
    guide("second_stage")
    spec = {"_target_": "autoregressive.Autoregressive", "components": 2}
    vae = linear_vae(prior=spec).requires_grad_(False)
    vae.prior.shift.mul_(0.5)  # scales that fit the grid
    vae.prior.last.mul_(5)  # so that the second dimension depends on the first
    p = vae.prior_distribution()
    points, log_area = grid(20, 401)
    density = (p.log_prob(points) + log_area).exp().unsqueeze(1)
    torch.testing.assert_close(density.sum(), torch.tensor(1.0), atol=1e-3, rtol=0)
    samples = p.sample((50_000,))
    assert samples.shape == (50_000, LATENT_DIM)
    assert close_in_expectation(samples, (density * points).sum(dim=0))
    assert close_in_expectation(samples.prod(dim=1), (density * points.prod(dim=1, keepdim=True)).sum())
