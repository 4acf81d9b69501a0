import math

import pytest
import torch
from linear import SHAPE, linear_vae
from torch import Tensor

from vae_lightning.config import ConfigError
from vae_lightning.models.estimators import kl_divergence
from vae_lightning.models.objectives import ELBO, IWAE, DReG
from vae_lightning.models.vae import VAE, Objective


def gradients(vae: VAE, x: Tensor, objective: Objective) -> Tensor:
    vae.zero_grad()
    objective(vae, x)["loss"].mean().backward()
    return torch.cat([p.grad.flatten() for p in vae.encoder.parameters() if p.grad is not None])


def test_iwae_with_one_sample_is_the_monte_carlo_elbo() -> None:
    vae, x = linear_vae(shift=0.5).train(), torch.rand(30, *SHAPE)
    torch.manual_seed(1)
    one = gradients(vae, x, IWAE(samples=1))
    torch.manual_seed(1)
    monte_carlo = gradients(vae, x, ELBO(kl="monte_carlo"))
    torch.testing.assert_close(one, monte_carlo, rtol=1e-4, atol=1e-5)


def test_the_path_derivative_is_the_expected_gradient_and_vanishes_at_the_exact_posterior() -> None:
    vae, x = linear_vae(shift=0.3).train(), torch.rand(20, *SHAPE)
    values = []
    for kl in ("path", "monte_carlo"):
        torch.manual_seed(1)
        values.append(vae.elbo(x, kl=kl)["loss"])
    torch.testing.assert_close(*values)
    many = x.repeat(50, 1, 1, 1)
    analytic, path, whole = (
        torch.stack([gradients(vae, many, ELBO(kl=kl)) for _ in range(200)])
        for kl in ("analytic", "path", "monte_carlo")
    )
    for sampled in (path, whole):
        error = (sampled.var(0) / 200 + analytic.var(0) / 200).sqrt()
        assert ((sampled.mean(0) - analytic.mean(0)).abs() < 5 * error + 1e-5).all()
        assert analytic.mean(0).abs().max() > 10 * error.max()  # there is a gradient to agree on
    at_the_optimum = linear_vae().train()
    assert gradients(at_the_optimum, x, ELBO(kl="path")).abs().max() < 1e-4
    assert gradients(at_the_optimum, x, ELBO(kl="monte_carlo")).abs().max() > 1e-2


def test_dreg_has_the_value_and_expected_gradient_of_iwae_at_lower_variance() -> None:
    vae, x = linear_vae(shift=0.3).train(), torch.rand(20, *SHAPE)
    torch.manual_seed(1)
    value = IWAE(samples=16)(vae, x)["loss"]
    torch.manual_seed(1)
    torch.testing.assert_close(DReG(samples=16)(vae, x)["loss"], value)
    many = x.repeat(50, 1, 1, 1)
    iwae, dreg = (
        torch.stack([gradients(vae, many, objective) for _ in range(200)]) for objective in (IWAE(16), DReG(16))
    )
    error = (iwae.var(0) / 200 + dreg.var(0) / 200).sqrt()
    assert ((iwae.mean(0) - dreg.mean(0)).abs() < 5 * error).all()
    assert iwae.mean(0).abs().max() > 10 * error.max()  # there is a gradient to agree on
    assert (dreg.var(0) < 0.5 * iwae.var(0)).all()


def test_dreg_keeps_the_decoder_gradient() -> None:
    vae, x = linear_vae(shift=0.3).train(), torch.rand(20, *SHAPE)
    found = []
    for objective in (IWAE(8), DReG(8)):
        torch.manual_seed(2)
        gradients(vae, x, objective)
        found.append(vae.decoder[0].weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_warm_up_weights_the_kl_in_the_loss_only() -> None:
    vae, x = linear_vae(beta=2.0), torch.rand(10, *SHAPE)
    objective = ELBO(warmup_epochs=10)
    for epoch, weight in ((0.0, 0.0), (2.5, 0.25), (10.0, 1.0), (99.0, 1.0), (math.inf, 1.0)):
        terms = objective(vae, x, epoch=epoch)
        torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 2 * weight * terms["kl"])
        torch.testing.assert_close(terms["elbo"], -terms["reconstruction"] - terms["kl"])


def test_objectives_refuse_models_for_which_they_are_undefined() -> None:
    with pytest.raises(ConfigError, match=r"model\.beta=2\.0: .* allowed: 1"):
        linear_vae(beta=2.0, objective={"_target_": "vae_lightning.models.objectives.IWAE"})
    free = {"_target_": "vae_lightning.models.objectives.ELBO", "free_bits": 0.5, "kl": "monte_carlo"}
    with pytest.raises(ConfigError, match=r"model\.objective\.free_bits=0\.5"):
        linear_vae(objective=free)
    vamp = {"_target_": "vae_lightning.models.priors.VampPrior", "pseudo_inputs": 3}
    with pytest.raises(ConfigError, match=r"free_bits=0\.5: needs a closed-form KL"):
        linear_vae(prior=vamp, objective=free | {"kl": "analytic"})
    with pytest.raises(ConfigError, match=r"free_bits=0\.5: needs a closed-form KL"):
        ELBO(kl="monte_carlo", free_bits=0.5)(linear_vae(), torch.rand(1, *SHAPE))


def test_the_default_loss_is_reconstruction_and_weighted_kl_with_free_bits() -> None:
    vae, x = linear_vae(beta=3.0), torch.rand(10, *SHAPE)
    terms = ELBO(warmup_epochs=4.0, free_bits=0.2)(vae, x, epoch=1.0)
    kl = kl_divergence(vae.encode(x).mean, vae.encode(x).log_variance)
    floored = torch.where(kl.mean(dim=0) > 0.2, kl, torch.tensor(0.2)).sum(dim=-1)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 3 * 0.25 * floored)
    torch.testing.assert_close(terms["kl"], kl.sum(dim=-1))


@pytest.mark.parametrize("objective", [IWAE(7), DReG(7)], ids=["iwae", "dreg"])
@pytest.mark.parametrize("training", [True, False])
def test_elbo_reconstruction_and_kl_use_the_same_samples(objective: IWAE, training: bool) -> None:
    vae, x = linear_vae(shift=0.3).train(training), torch.rand(9, *SHAPE)
    terms = objective(vae, x)
    assert torch.equal(terms["elbo"], -(terms["reconstruction"] + terms["kl"]))
    assert (-terms["loss"] > terms["elbo"]).all()
    torch.manual_seed(0)
    expected = vae.log_weights(x, 7)
    torch.manual_seed(0)
    torch.testing.assert_close(objective(vae, x)["elbo"], expected.mean(dim=0))
