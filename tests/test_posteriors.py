import torch

from vae_lightning.models.estimators import kl_divergence
from vae_lightning.models.posteriors import LOG_VARIANCE_BOUND, FullCovarianceGaussian, Gaussian


def test_posterior_log_variance_is_bounded_with_nonzero_gradient() -> None:
    outputs = torch.tensor([[0.0, 0.0, 30.0, -30.0]], requires_grad=True)
    q = Gaussian(2)(outputs)
    assert q.log_variance.abs().max() <= LOG_VARIANCE_BOUND
    (kl_divergence(q.mean, q.log_variance).sum()).backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, 2] > 0 > outputs.grad[0, 3]  # both are pulled back towards the prior
    extreme = Gaussian(2)(torch.tensor([[0.0, 0.0, 1e30, -1e30]]))
    assert kl_divergence(extreme.mean, extreme.log_variance).isfinite().all()
    assert extreme.log_prob(torch.zeros(1, 2)).isfinite().all()


def test_posterior_log_variance_is_nearly_linear_near_zero() -> None:
    raw = torch.linspace(-3, 3, 7).reshape(1, -1)
    bounded = Gaussian(7)(torch.cat([torch.zeros_like(raw), raw], dim=1)).log_variance
    torch.testing.assert_close(bounded, raw, rtol=0.02, atol=1e-6)


def test_samples_of_the_full_covariance_are_exact_under_mixed_precision() -> None:
    posterior = FullCovarianceGaussian(12)
    assert not list(posterior.buffers()), "averaged weights would average indices"
    q = posterior(torch.randn(3, posterior.encoder_outputs))
    with torch.autocast("cpu", torch.bfloat16):
        z, log_q = q.transform_and_log_prob(torch.randn(5, 3, 12))
    torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-4, atol=1e-3)
