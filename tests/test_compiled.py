"""`trainer.compile` gives the results of uncompiled training up to rounding, and steps aside where it cannot."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from shutil import which
from unittest.mock import patch

import pytest
import torch
from conftest import SMALL, history

from vae_lightning.models.objectives import ELBO
from vae_lightning.training.compiled import CompiledLoss
from vae_lightning.training.train import train

BASIC = ["model.objective.warmup_epochs=1.5", "model.objective.free_bits=0.01", "data.pixels=dynamic"]
CONV = ["model/backbone=conv", "model.backbone.channels=[4]", "model.backbone.batch_norm=[1]"]
VARIANTS = {
    "iwae": ["model/objective=iwae", "model/schedule=steps", "trainer.gradient_clip_val=1"],
    "dreg, vamp": ["model/objective=dreg", "model/prior=vamp", "model.prior.pseudo_inputs=5", "trainer=ema"],
    "conv with batch norm": [*CONV, "trainer.accumulate_grad_batches=2"],
    "residual": ["model/backbone=residual_conv", "model.backbone.channels=[4]", "trainer.on_nan=skip"],
    "gated, gaussian": ["model/backbone=gated_mlp", "model/likelihood=gaussian", "model.likelihood.learn_scale=true"],
    "bf16": ["trainer.precision=bf16-mixed", "model/likelihood=continuous_bernoulli", "model/optimizer=adamw"],
    "flows": ["model/prior=flow", "model/posterior=flow", "model/objective=dreg"],
    "mixture": ["model/prior=mixture", "model/posterior=full_covariance", "model.objective.kl=monte_carlo"],
    "8-bit pixels": ["model/likelihood=logistic_mixture", "model.likelihood.components=2"],
    "conditional": ["model.conditional=true", "model/objective=iwae"],
    "autoencoder": ["model=autoencoder", "trainer.fast_loop=false", "model/optimizer=sgd"],
}


class Branching(ELBO):
    """An objective with a branch on the values of a tensor, which cannot be compiled."""

    def __call__(self, vae, x, labels=None, epoch=torch.inf):
        terms = super().__call__(vae, x, labels, epoch)
        return terms if terms["loss"].mean() < 1e9 else {"loss": 0 * terms["loss"]}


def losses(directory: Path) -> list[float]:
    return [float(row["train/loss"]) for row in history(directory)]


@pytest.fixture
def compiled_steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step whether it was compiled."""
    steps: list[bool] = []
    original = CompiledLoss.__call__

    def noted(self, *inputs):
        result = original(self, *inputs)
        steps.append(result[0].is_leaf)
        return result

    monkeypatch.setattr(CompiledLoss, "__call__", noted)
    return steps


needs_compiler = pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    "overrides",
    [BASIC, *(pytest.param(words, id=name, marks=pytest.mark.proof) for name, words in VARIANTS.items())],
)
def test_compiled_training_differs_by_rounding_only(config, tmp_path, compiled_steps, overrides) -> None:
    small = SMALL[1:] if any("conv" in word for word in overrides) else SMALL
    for compiled in ("true", "false"):
        train(config(*small, *overrides, f"trainer.compile={compiled}"), tmp_path / compiled)
    assert compiled_steps == [True] * 46
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)


def no_compiler() -> AbstractContextManager[object]:
    from torch._inductor import config

    return config.patch({"cpp.cxx": ("no-such-compiler",)})


def old_version() -> AbstractContextManager[object]:
    return patch("vae_lightning.training.compiled.can_trace_gradients", return_value=False)


@pytest.mark.parametrize(
    ("change", "overrides", "reason"),
    [
        pytest.param(no_compiler, ["model.backbone.hidden=[17]"], "compiler", marks=pytest.mark.proof),
        (old_version, [], r"PyTorch 2\.\S+ cannot trace gradients"),
        (nullcontext, ["model.objective._target_=test_compiled.Branching"], r"ata-dependent.*test_compiled.py:\d+"),
        pytest.param(
            nullcontext, ["trainer.detect_anomaly=true"], "trainer.detect_anomaly=true", marks=pytest.mark.proof
        ),
    ],
)
def test_one_line_where_it_cannot_be_compiled(
    config, tmp_path, compiled_steps, caplog, change, overrides, reason
) -> None:
    with change(), caplog.at_level("INFO"):
        train(config(*SMALL, *overrides, "trainer.compile=true"), tmp_path / "compiled")
    assert not any(compiled_steps[1:])  # the first step tries
    (line,) = [r.message for r in caplog.records if "compile=true has no effect" in r.message]
    assert re.search(reason, line)
    assert "\n" not in line
    train(config(*SMALL, *overrides), tmp_path / "uncompiled")
    assert losses(tmp_path / "compiled") == losses(tmp_path / "uncompiled")
