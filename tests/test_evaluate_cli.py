"""The command `vae evaluate …`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import BRIEF, DATA, Finished, composed
from torch import Tensor

from vae_lightning.analysis import evaluation
from vae_lightning.analysis.evaluation import evaluate_run
from vae_lightning.data import torchvision_sets
from vae_lightning.models.vae import VAE
from vae_lightning.training.train import train

QUICK = {"split": "test", "samples": 3, "seed": 0, "batch_size": 500, "chunk": 3, "probes": False}
QUICK |= {"accelerator": "cpu", "data_root": None}


@pytest.fixture
def evaluate_py(script: Callable[..., Finished]) -> Callable[..., Finished]:
    return partial(script, "vae", "evaluate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(composed("model.latent_dim=3", "model.backbone.hidden=[16]", "data.val_size=500", *BRIEF), directory)
    return directory


@pytest.fixture
def run_directory(trained: Path, tmp_path: Path) -> Path:
    """A copy of a trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_evaluate_prints_a_table_and_writes_evaluation_json(evaluate_py, run_directory: Path) -> None:
    result = evaluate_py(run_directory, *"--samples 3 --split val --batch-size 250 --chunk 2".split())
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == str(run_directory / "evaluations" / "val_best_k3_seed0.json")
    content = json.loads(Path(result.out.splitlines()[-1]).read_text())
    wanted = "nll nll_stderr elbo reconstruction kl kl_per_dimension active_units mutual_information marginal_kl"
    wanted += " ess ess_min knn_accuracy linear_accuracy nll_curve"
    assert {f"val/{name}" for name in wanted.split()} <= set(content)
    assert (content["samples"], content["pixels"], content["data"]) == (3, "grey", "MNIST")
    assert len(content["val/kl_per_dimension"]) == 3
    assert content["val/nll"] <= -content["val/elbo"] + 3 * content["val/nll_stderr"]
    assert (run_directory / "evaluations" / "val_best_k3_seed0.png").exists()
    values = np.loadtxt(run_directory / "evaluations" / "val_best_k3_seed0.csv", delimiter=",", skiprows=1)
    assert values.shape == (content["images"], 2) == (500, 2)
    assert -values[:, 0].mean() == pytest.approx(content["val/nll"], abs=1e-5)
    assert (content["quantity"], len(content["images_sha256"])) == ("negative cross-entropy", 64)
    assert "val set, grey pixels, 3 samples" in result.out
    assert "nll (cross-entropy)" in result.out
    assert "not likelihoods" in content["remark"]
    assert f"{content['val/nll']:.4f}" in result.out
    assert content["val/ess"] < 10
    assert "* few samples carry this estimate (median ess below 10): it is too high" in result.out


def test_evaluations_do_not_overwrite_each_other(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images, labels), (test_images, test_labels) = torchvision_sets.load_images("MNIST", DATA)
    fewer = (images[:2_000], labels[:2_000]), (test_images[:1_000], test_labels[:1_000])
    monkeypatch.setattr(torchvision_sets, "load_images", lambda name, root: fewer)

    def evaluated(**options) -> dict:
        evaluate_run(**{"run": str(run_directory), **QUICK, **options})
        content = json.loads((run_directory / "evaluation.json").read_text())
        return {key: content.get(key) for key in ("samples", "checkpoint", "test/nll", "val/nll", "test/knn_accuracy")}

    first = evaluated(probes=True)
    curve = (run_directory / "figures" / "nll_curve.png").read_bytes()
    assert first["test/knn_accuracy"] > 0
    assert evaluated(split="val") == first
    assert evaluated(samples=2) == first
    assert evaluated(run=f"{run_directory}/checkpoints/last.ckpt", samples=9) == first
    assert evaluated() == first, "probes of the earlier evaluation are kept"
    assert (run_directory / "figures" / "nll_curve.png").read_bytes() == curve
    assert len(np.loadtxt(run_directory / "evaluation.csv", delimiter=",", skiprows=1)) == 1_000
    assert evaluated(samples=5)["samples"] == 5
    csv = (run_directory / "evaluation.csv").read_bytes()
    assert csv == (run_directory / "evaluations" / "test_best_k5_seed0.csv").read_bytes()
    assert sorted(path.stem for path in (run_directory / "evaluations").glob("*.json")) == [
        *("test_best_k2_seed0", "test_best_k3_seed0", "test_best_k5_seed0", "test_last_k9_seed0", "val_best_k3_seed0"),
    ]


def test_an_unfinished_run_does_not_get_the_evaluation_of_its_best_checkpoint(run_directory: Path) -> None:
    (run_directory / "metrics.json").unlink()
    evaluate_run(**{"run": str(run_directory), **QUICK})
    assert (run_directory / "evaluations" / "test_best_unfinished_k3_seed0.json").exists()
    assert not (run_directory / "evaluation.json").exists()


def test_a_proper_likelihood_has_no_remark(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["data.pixels=dynamic", "model.backbone.hidden=[16]", "data.val_size=200", *BRIEF]
    train(config(*overrides), tmp_path / "run")
    seen: list[Tensor] = []
    all_codes = VAE.all_codes
    monkeypatch.setattr(VAE, "all_codes", lambda vae, x, *labels: seen.append(x) or all_codes(vae, x[:500]))
    monkeypatch.setattr(evaluation, "probe_accuracy", lambda *codes_and_labels: {})
    content = evaluate_run(**{"run": str(tmp_path / "run"), **QUICK, "split": "val", "probes": True})
    assert (content["pixels"], content["remark"]) == ("dynamic", "")
    assert [sorted(x.unique().tolist()) for x in seen] == [[0, 255]], "probes learn from binary pixels, too"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", 'Command "evaluate" parameter --runs requires an argument.'),
        ("nowhere", "nowhere: no such run directory"),
        (".", ".: contains no run"),
        ("latest", "latest: no run found in outputs/"),
        ("nowhere --smaples 3", "Unknown option: --smaples. Did you mean --samples?"),
        ("nowhere --samples 0", 'Invalid value "0" for --samples: Input should be greater than or equal to 1'),
        ("nowhere --split tset", 'Invalid value "tset" for --split. Choose from: "test", "val". Did you mean "test"?'),
    ],
)
def test_wrong_input_gets_one_clear_line(evaluate_py, words: str, line: str) -> None:
    result = evaluate_py(*words.split())
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert line in result.err


def test_an_autoencoder_or_a_missing_validation_split_is_refused(config, tmp_path: Path) -> None:
    train(config("model=autoencoder", "data.val_size=0", *BRIEF), tmp_path / "run")
    with pytest.raises(Exception, match="its model, Autoencoder, has no likelihood"):
        evaluate_run(**{"run": str(tmp_path / "run"), **QUICK})
    with pytest.raises(Exception, match=r"split=val: the run has no validation split"):
        evaluate_run(**{"run": str(tmp_path / "run"), **QUICK, "split": "val"})


def test_every_run_of_a_directory_is_evaluated_once(evaluate_py, trained: Path, config, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        shutil.copytree(trained, runs / name)
    train(config("model=autoencoder", "data.val_size=0", *BRIEF), runs / "autoencoder")
    words = (runs, *"--samples 2 --no-probes --batch-size 500".split())
    first = evaluate_py(*words)
    lines = first.out.splitlines()
    assert (first.code, [line.split()[0] for line in lines[2:4]]) == (0, [f"{runs}/a", f"{runs}/b"]), first.err
    assert lines[-1].startswith(f"left out: {runs}/autoencoder: its model, Autoencoder, has no likelihood")
    written = [(runs / name / "evaluation.json").stat().st_mtime_ns for name in ("a", "b")]
    assert evaluate_py(*words).out == first.out
    assert [(runs / name / "evaluation.json").stat().st_mtime_ns for name in ("a", "b")] == written
    assert evaluate_py(runs / "a", *words[1:3], "--seed", "1").code == 0
    assert (runs / "a" / "evaluation.json").stat().st_mtime_ns > written[0]


def test_help_says_what_the_options_mean_without_importing_torch(evaluate_py, script) -> None:
    assert "importance samples per image" in evaluate_py("--help").out
    code = "import sys; from vae_lightning.launch.vae import vae; sys.argv = ['vae', '--help']; vae()"
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert all(word in shown.stdout for word in ("evaluate", "generate", "report", "compare", "explore", "export"))
    assert not {"torch", "lightning", "hydra"} & {line.split()[-1] for line in shown.stderr.splitlines()}
