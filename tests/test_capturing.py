"""CUDA graphs without a GPU: what one would take down is taken down here, operation by operation, and replayed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_stepping import SMALL, differences, left
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae_lightning import capturing, stepping
from vae_lightning.training import train
from vae_lightning.vae import VAE

OFTEN = [*SMALL, "trainer.log_every_n_steps=5", "trainer.cuda_graphs=true"]
GIVEN_UP = "trainer.cuda_graphs: kernels are launched one by one: "


class Recording(TorchDispatchMode):
    """PyTorch's operations in their order, on the tensors that they had: what Python did between them is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = operation(*args, **kwargs or {})
        if operation.namespace != "profiler":
            self.calls.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, result in self.calls:
            again = operation(*args, **kwargs)
            for there, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(new, Tensor) and there.data_ptr() != new.data_ptr():  # neither a view, nor in place
                    there.copy_(new)


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """Stands in for the GPU: one number for each graph, how often it was replayed in the end."""
    counts: list[int] = []

    def record(call: Callable[[], dict[str, Tensor]], stream: None) -> tuple[dict[str, Tensor], Callable[[], None]]:
        with Recording() as recording:
            terms = call()
        n = len(counts)
        counts.append(0)

        def replay() -> None:
            counts[n] += 1
            recording.replay()

        return terms, replay

    monkeypatch.setattr(capturing, "record", record)
    original = stepping.uncapturable

    def uncapturable(trainer) -> str | None:
        reason = original(trainer)
        return None if reason == "there are none on cpu" else reason

    monkeypatch.setattr(stepping, "uncapturable", uncapturable)
    return counts


class ByEpoch(VAE):
    """A loss that is another one in each epoch."""

    def terms(self, x):
        terms = super().terms(x)
        return terms | {"loss": terms["loss"] * (1 + self.current_epoch)}


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.pixels=dynamic", "trainer.gradient_clip_val=0.1"],
        ["model/schedule=steps", "model.schedule.milestones=[1]"],
        ["model._target_=test_capturing.ByEpoch"],
        ["model/prior=vamp", "model.prior.pseudo_inputs=4", "model/objective=dreg", "model.weight_decay=0.01"],
        ["model/backbone=conv", "model.backbone.channels=[4]", "model.backbone.batch_norm=[1]"],
        ["trainer.precision=bf16-mixed", "model/likelihood=gaussian"],
        ["model=autoencoder"],
    ],
)
def test_replayed_steps_are_the_same_to_the_bit(config, tmp_path: Path, replays, overrides) -> None:
    small = [word for word in OFTEN if "conv" not in str(overrides) or "hidden" not in word]
    found = []
    for wanted in ("false", "true"):
        train(config(*small, *overrides, f"trainer.cuda_graphs={wanted}"), tmp_path / wanted)
        found.append(left(tmp_path / wanted))
        assert len(replays) == (2 if wanted == "true" else 0)  # one an epoch
    (checkpoint, rows), (replayed, rows_replayed) = found
    assert rows == rows_replayed
    assert differences(checkpoint, replayed) == []
    # Of 46 steps, eleven are watched, one in five and the last of each epoch; the first four find an empty optimizer.
    assert sum(replays) == 31 + 2 * capturing.TRIAL_STEPS


@pytest.mark.parametrize("prior", ["StandardNormal", "VampPrior"])
@pytest.mark.parametrize("likelihood", ["Bernoulli", "ContinuousBernoulli", "Gaussian"])
@pytest.mark.parametrize("objective", ["ELBO", "IWAE", "DReG"])
def test_a_loss_stays_on_the_gpu(prior: str, likelihood: str, objective: str) -> None:
    """Tensors without numbers, which know their device: mixing devices is an error, and so is asking for a number."""
    parts = {"prior": prior, "likelihood": likelihood, "objective": objective}
    targets = {"prior": "priors", "likelihood": "likelihoods", "objective": "objectives"}
    specs = {part: {"_target_": f"vae_lightning.{targets[part]}.{name}"} for part, name in parts.items()}
    with FakeTensorMode(), torch.device("cuda"):
        vae = VAE(**specs)
        vae._trainer = SimpleNamespace(world_size=1, global_step=30, num_training_batches=60)
        terms = vae.terms(torch.rand(5, 1, 28, 28))
    assert {(values.device.type, values.shape) for values in terms.values()} == {("cuda", (5,))}


class Asks(VAE):
    """Looks at a number on the way, for which Python has to wait."""

    def terms(self, x):
        terms = super().terms(x)
        return terms if terms["loss"].mean().item() > 0 else {}


class Counts(VAE):
    """A loss that changes with what Python counts."""

    def terms(self, x):
        self.seen = getattr(self, "seen", 0) + 1
        terms = super().terms(x)
        return terms | {"loss": terms["loss"] * self.seen}


class OwnStep(VAE):
    def training_step(self, batch, batch_index):
        return super().training_step(batch, batch_index)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model._target_=test_capturing.Asks"], "operation not permitted when stream is capturing"),
        (["model.objective.warmup_epochs=3"], "unsupported operand type(s) for /: 'object' and 'int'"),
    ],
)
def test_what_cannot_be_a_graph_is_trained_as_ever(config, tmp_path, replays, caplog, overrides, reason) -> None:
    for wanted in ("false", "true"):
        train(config(*OFTEN, *overrides, f"trainer.cuda_graphs={wanted}"), tmp_path / wanted)
    assert [r.message for r in caplog.records if "graphs" in r.message] == [GIVEN_UP + reason]
    assert not sum(replays)
    (checkpoint, rows), (other, other_rows) = (left(tmp_path / wanted) for wanted in ("false", "true"))
    assert rows == other_rows
    assert differences(checkpoint, other) == []


def test_replays_that_differ_from_steps_are_not_used(config, tmp_path, replays, caplog) -> None:
    train(config(*OFTEN, "model._target_=test_capturing.Counts"), tmp_path / "run")
    assert [r.message for r in caplog.records if "graphs" in r.message] == [
        GIVEN_UP + "its replays differ from its steps"
    ]
    assert sum(replays) == capturing.TRIAL_STEPS


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "there are none on cpu"),
        (["model._target_=test_capturing.OwnStep"], "OwnStep has a training_step of its own"),
        (["trainer.profiler=simple"], "trainer.profiler=SimpleProfiler"),
    ],
)
def test_what_is_known_beforehand(config, tmp_path, caplog, overrides, reason) -> None:
    train(config(*OFTEN, *overrides, "trainer.max_epochs=1", "trainer.limit_train_batches=2"), tmp_path / "run")
    assert [r.message for r in caplog.records if "graphs" in r.message] == [GIVEN_UP + reason]
