import math

import pytest
import torch

from vae_lightning.models import metrics
from vae_lightning.models.metrics import EpochMeans


def test_mean_over_images_not_over_batches() -> None:
    values = torch.arange(10.0)
    means = EpochMeans()
    for batch in values.split(4):  # 4, 4 and a short batch of 2
        means.update({"loss": batch, "kl": 2 * batch})
    assert means.compute()["loss"].item() == pytest.approx(4.5)
    assert means.compute()["kl"].item() == pytest.approx(9)


def test_means_do_not_depend_on_the_batch_split() -> None:
    values = torch.rand(60_000) * 100 + 100
    results = []
    for size in (1_000, 128, 7):
        means = EpochMeans()
        for batch in values.split(size):
            means.update({"loss": batch})
        results.append(means.compute()["loss"].item())
    assert results == pytest.approx([values.double().mean().item()] * 3, rel=1e-9)


def test_reset() -> None:
    means = EpochMeans()
    means.update({"loss": torch.tensor([1.0, 2.0])})
    means.reset()
    means.update({"loss": torch.tensor([7.0])})
    assert means.compute()["loss"].item() == 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_not_finite_names_the_term_and_the_update(bad: float) -> None:
    means = EpochMeans()
    assert means.first_not_finite() is None
    good, wrong = torch.ones(4), torch.tensor([1.0, bad, 1.0, 1.0])
    means.update({"loss": good, "kl": good, "reconstruction": good})
    means.update({"loss": good, "kl": good, "reconstruction": good})
    assert means.first_not_finite() is None
    means.update({"loss": wrong, "kl": wrong, "reconstruction": good})
    means.update({"loss": good, "kl": good, "reconstruction": good})
    assert means.first_not_finite() == ("kl", 2)


def test_sums_grow_beyond_the_initial_rows(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", 4)
    values = torch.rand(30)
    means, restored = EpochMeans(), EpochMeans()
    for n, value in enumerate(values):
        means.update({"loss": value[None]})
        if n == 17:
            restored.restore(means.saved(lambda sums: sums), 0, torch.device("cpu"))
        elif n > 17:
            restored.update({"loss": value[None]})
    assert means.compute()["loss"].item() == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert restored.compute()["loss"].item() == means.compute()["loss"].item()  # to the bit
    means.reset()
    assert means.saved(lambda sums: sums) == {}


def test_gradients_are_not_kept() -> None:
    means = EpochMeans()
    means.update({"loss": torch.ones(2, requires_grad=True)})
    assert not means.compute()["loss"].requires_grad
