"""Random overrides: a complete run, or an error in one line and no files, never a traceback."""

import os
import shutil
from pathlib import Path
from typing import Any

from conftest import BRIEF
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vae_lightning.config import flatten

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2"))  # make proof has hundreds
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# Keys that would make a run long, start many processes, or read and write elsewhere.
EXCLUDED = (
    *("trainer.max_epochs", "trainer.max_steps", "trainer.min_epochs", "trainer.min_steps", "trainer.max_time"),
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.limit_train_batches", "data.root"),
    *("trainer.limit_val_batches", "trainer.limit_test_batches", "trainer.fast_dev_run"),
    *("trainer.val_check_interval", "trainer.overfit_batches", "trainer.detect_anomaly", "trainer.benchmark"),
)
ODD = [2**40, -(2**70), float("nan"), float("inf"), 1e-9]
NUMBERS = st.integers(-3, 70) | st.sampled_from([-1.5, -0.0, 1e-3, 0.5, 2.5]) | st.sampled_from(ODD)
WORDS = st.sampled_from(["", "cpu", "null", "nul", "os.system", "torch.nn.Linear", "..", "a b", "ä", "~", "{", "%s"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_target_", "a", "hidden"]), inner),
    max_leaves=4,
)


def keys(config: dict[str, Any]) -> list[str]:
    found = {key for key in flatten(config) if key not in EXCLUDED}
    parents = {key.rpartition(".")[0] for key in found} - {""}
    return sorted(found | parents | {"model.nothing", "nothing"})


def as_override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {as_override(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_override, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if value in (None, True, False)
        else str(value)
    )


def test_overrides(config, command, tmp_path: Path) -> None:
    known = keys(config())

    @FUZZ
    @given(st.dictionaries(st.sampled_from(known), VALUES, min_size=1, max_size=2))
    def fuzz(overrides: dict[str, Any]) -> None:
        words = [f"++{key}={as_override(value)}" for key, value in overrides.items()]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        result = command(*BRIEF, "trainer.accelerator=cpu", *words, "hydra.run.dir=run")
        assert result.code in (0, 2), result.err
        if result.code == 2:
            assert len([line for line in result.err.splitlines() if "Warning" not in line]) == 1, result.err
            assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]

    fuzz()
