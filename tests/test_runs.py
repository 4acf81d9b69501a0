import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BRIEF

from vae_lightning.model import ShapeError
from vae_lightning.runs import RunError, load_run, start_run, write_json
from vae_lightning.training import train


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    start_run(tmp_path / "run", {"seed": 1})
    with pytest.raises(RunError, match="already holds a run"):
        start_run(tmp_path / "run", {"seed": 2})
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_load_run_gives_the_trained_model(config, tmp_path: Path, mnist) -> None:
    brief = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "figures.every=0"]
    train(config("model.latent_dim=3", *brief), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    model = load_run(tmp_path / "moved")
    same = load_run(str(tmp_path / "moved" / "checkpoints" / "best.ckpt"))
    assert not model.training
    assert model.latent_dim == 3
    torch.testing.assert_close(model.reconstruct(mnist[:5]), same.reconstruct(mnist[:5]))
    saved = torch.load(tmp_path / "moved" / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"]["pixels"] == "grey"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved["state_dict"].items())


def test_load_run_refuses_what_is_not_a_whole_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no whole run is there"):
        load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {}\n")
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "checkpoints" / "best.ckpt").write_bytes(content)
        with pytest.raises(RunError, match=r"best\.ckpt: damaged"):
            load_run(tmp_path)


class Payload:
    ran = False

    def __reduce__(self):
        return (exec, ("import test_runs; test_runs.Payload.ran = True",))


def test_load_run_unpickles_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {}\n")
    torch.save({"state_dict": Payload()}, tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(RunError, match="holds more than weights"):
        load_run(tmp_path)
    assert not Payload.ran


@pytest.fixture
def run(config, tmp_path: Path) -> Path:
    """A run directory of a small VAE."""
    train(config("model.latent_dim=3", "model.backbone.hidden=[16]", "figures.every=0", *BRIEF), tmp_path / "run")
    return tmp_path / "run"


def test_a_model_has_the_configuration_of_its_run_at_hand(run: Path) -> None:
    assert load_run(run).config == yaml.safe_load((run / "config.yaml").read_text())


def test_a_checkpoint_that_was_cut_short_is_refused(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    whole = best.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 10):
        best.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"best\.ckpt: damaged"):
            load_run(run)
    torch.save([1, 2], best)
    with pytest.raises(RunError, match=r"best\.ckpt: damaged"):
        load_run(run)


def test_weights_of_another_model_are_refused_in_one_line(run: Path) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("latent_dim: 3", "latent_dim: 4"))
    with pytest.raises(RunError, match=r"best\.ckpt: not the weights of the model in .*config\.yaml$"):
        load_run(run)


def test_code_from_elsewhere_is_loaded_only_where_it_is_trusted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere.py").write_text("from vae_lightning.backbones import MLP as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("vae_lightning.backbones.MLP", "elsewhere.Mine"))
    for trust in ((), ("else",)):
        with pytest.raises(RunError, match=r"model.backbone._target_=elsewhere.Mine: .* trust=\[elsewhere\] allows it"):
            load_run(run, trust)
    assert "elsewhere" not in sys.modules  # refused before it was imported
    assert load_run(run, trust=["elsewhere"]).latent_dim == 3


def test_a_loaded_model_takes_what_a_person_would_pass(run: Path, mnist: torch.Tensor) -> None:
    vae = load_run(run)
    expected = vae.reconstruct(mnist[:2])
    grey = (mnist[:2] * 255).round().to(torch.uint8)
    for same in (grey, grey[:, 0], grey.numpy(), mnist[:2, 0], mnist[:2].tolist(), mnist[:2].double()):
        torch.testing.assert_close(vae.reconstruct(same), expected)
    for one in (grey[0], grey[0, 0], mnist[0]):
        torch.testing.assert_close(vae.reconstruct(one), expected[:1])
        assert vae.encode(one).mean.shape == (1, 3)
        assert vae.log_weights(one, k=5).shape == (5, 1)
        assert vae.interpolate(one, grey[1], steps=4).shape == (4, 1, 1, 28, 28)
    assert vae.decode([0.5, 0, 1]).mean.shape == (1, 28, 28)
    assert vae.decode([[0.5, 0, 1]] * 2).mean.shape == (2, 1, 28, 28)
    assert vae.log_joint(grey, torch.zeros(2, 3).tolist()).shape == (2,)


@pytest.mark.parametrize("shape", [(28, 27), (2, 3, 28, 28), (784,), (1, 1, 1, 28, 28), (28,), ()])
def test_images_of_the_wrong_shape_are_said_to_be_so(shape: tuple[int, ...], run: Path) -> None:
    with pytest.raises(ShapeError, match=r"images of shape .*: the model takes \(1, 28, 28\)"):
        load_run(run).encode(torch.zeros(shape))


def test_values_that_are_no_pixels_and_latents_that_do_not_fit_are_said_to_be_so(run: Path) -> None:
    vae = load_run(run)
    for wrong in (torch.full((28, 28), 255.0), torch.full((28, 28), -1.0), torch.full((28, 28), float("nan"))):
        with pytest.raises(ShapeError, match=r"floats are in \[0, 1\]"):
            vae.reconstruct(wrong)
    with pytest.raises(ShapeError, match=r"latents of shape \(2,\): the model has latent_dim=3"):
        vae.decode([0.5, 0])
