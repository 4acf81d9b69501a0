import json
from pathlib import Path

import pytest
import torch

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
