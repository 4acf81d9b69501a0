"""Which run a command is about: its directory, and whether it starts, resumes or is finished."""

import shlex
from pathlib import Path

import pytest
from conftest import BRIEF
from hydra.core.override_parser.overrides_parser import OverridesParser

from vae_lightning.launch.errors import quoted
from vae_lightning.launch.plan import run_name


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["resume=auto", "data.root=/images", "trainer.accelerator=gpu"], "default"),
        (["model.latent_dim=5", "model/backbone=conv", "seed=1"], "latent_dim-5_backbone-conv_seed-1"),
        (["model.prior.layers=2", "model.posterior.layers=4"], "prior.layers-2_posterior.layers-4"),
        (["model.backbone.hidden=[400,400]", "+x={a: 'b c'}", "~y"], "hidden-400-400_x-a-bc_y-none"),
        (["seed=-1", "name=ü=1"], "seed--1_name---1"),
    ],
)
def test_a_directory_is_named_by_the_overrides(overrides: list[str], name: str) -> None:
    assert run_name(overrides) == name


def test_a_long_name_ends_in_a_hash() -> None:
    first, second = (run_name([f"trainer.limit_train_batches={n}" + "0" * 200]) for n in (1, 2))
    assert first != second
    assert len(first) == len(second) == 150


def test_resume_auto_starts_resumes_and_skips(command, tmp_path: Path) -> None:
    words = [*BRIEF, "model.backbone.hidden=[8]", "resume=auto"]
    for status in ("", "finished already; nothing to do"):
        result = command("model.latent_dim=3", *words)
        assert result.code == 0, result.err
        directory = Path(result.out.splitlines()[-1])
        assert directory.parent == tmp_path / "outputs" / "vae"
        assert directory.name.endswith("_hidden-8")
        assert status in result.out
    (directory / "metrics.json").unlink()
    assert "resuming after step 2" in command("model.latent_dim=3", *words).out
    assert command("model.latent_dim=4", *words).code == 0
    assert len(list(tmp_path.glob("outputs/vae/*"))) == 2


def test_a_directory_with_another_run_is_refused(command, tmp_path: Path) -> None:
    words = [*BRIEF, "model.backbone.hidden=[8]", "hydra.run.dir=run"]
    assert command(*words).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for more, wanted in (
        (["resume=auto", "model.beta=2", "seed=1"], "model.beta=2: is 1.0 in "),
        (["resume=auto", "model/prior=vamp"], "model.prior._target_=vae_lightning.models.priors.VampPrior: is vae_"),
        ([], "run: already contains a run; resume="),
    ):
        refused = command(*words, *more)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
        assert wanted in refused.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert command(*words, "resume=auto", "trainer.fast_loop=false", "trainer.max_epochs=2").code == 0, "trained longer"


def test_a_run_needs_its_own_directory(command, tmp_path: Path) -> None:
    (tmp_path / "full" / "notes").mkdir(parents=True)
    (tmp_path / "full" / "slurm-12.out").touch()
    for directory in (".", "full"):
        refused = command(*BRIEF, f"hydra.run.dir={directory}")
        assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
        assert "a run needs a directory of its own" in refused.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes", "slurm-12.out"]
    (tmp_path / "full" / "notes").rmdir()
    assert command(*BRIEF, "hydra.run.dir=full").code == 0


def test_a_path_is_relative_to_the_start_directory(command) -> None:
    directory, resume = (shlex.split(quoted(key, "ö = 1"))[0] for key in ("hydra.run.dir", "resume"))
    assert command(*BRIEF, directory).code == 0
    resumed = command("hydra.job.chdir=true", resume)
    assert resumed.code == 0, resumed.err
    assert "finished already" in resumed.out


@pytest.mark.parametrize("path", ["/plain", "/a b/c", "/a=b,c", "/[x]{y}", "/ä(1)", "/a'b"])
def test_the_command_that_resumes_is_quoted_for_the_shell_and_hydra(path: str) -> None:
    (word,) = shlex.split(quoted("resume", path))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.value() == path
