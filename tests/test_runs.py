import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BRIEF, composed
from PIL import Image

from vae_lightning.config import UserError
from vae_lightning.models.base import ShapeError
from vae_lightning.runs.directory import RunDirectory, RunError
from vae_lightning.runs.loading import load_run, open_run
from vae_lightning.training.train import train


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        run.create({"seed": 1})
        with pytest.raises(RunError, match="is being trained by another process"), RunDirectory(run).locked():
            pass
    with pytest.raises(RunError, match="already contains a run"), run.locked():
        run.create({"seed": 2})
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    with RunDirectory(tmp_path / "unused").locked():
        pass
    assert not (tmp_path / "unused").exists(), "nothing was written"


def test_load_run_refuses_incomplete_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(RunError, match=r"config\.yaml: is not the configuration of a run: data=None"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}\ndata: {}\nseed: 0\n")
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "checkpoints" / "best.ckpt").write_bytes(content)
        with pytest.raises(RunError, match=r"best\.ckpt: damaged"):
            load_run(tmp_path)


class Payload:
    ran = False

    def __reduce__(self):
        return (exec, (f"import {__name__}; {__name__}.Payload.ran = True",))


def test_load_run_unpickles_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("{model: {}, data: {}, seed: 0}\n")
    torch.save({"state_dict": Payload()}, tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(RunError, match="contains more than weights"):
        load_run(tmp_path)
    assert not Payload.ran


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(composed("model.latent_dim=3", "model.backbone.hidden=[16]", "figures.every=0", *BRIEF), directory)
    return directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run directory of a small VAE."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_load_run_loads_the_trained_model(run: Path, mnist: torch.Tensor) -> None:
    model, same = load_run(run), load_run(str(run / "checkpoints" / "best.ckpt"))
    assert not model.training
    assert model.latent_dim == 3
    assert model.config == yaml.safe_load((run / "config.yaml").read_text())
    torch.testing.assert_close(model.reconstruct(mnist[:5]), same.reconstruct(mnist[:5]))
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"]["pixels"] == "grey"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved["state_dict"].items())


def rewrite(run: Path, **changes: object) -> None:
    """Change keys of config.yaml, or remove those that are None: `data__pixels="grey"`."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        *parents, name = key.split("__")
        tree = config
        for parent in parents:
            tree = tree[parent]
        tree[name] = value
        if value is None:
            del tree[name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("pixels", ["threshold", None])  # None: the default, grey
def test_configuration_and_checkpoint_must_have_the_same_protocol(config, tmp_path: Path, pixels) -> None:
    train(config("data.pixels=dynamic", "model.backbone.hidden=[8]", *BRIEF), tmp_path / "run")
    rewrite(tmp_path / "run", data__pixels=pixels)
    with pytest.raises(RunError, match=r"has data\.pixels=(threshold|grey), but its checkpoint data.pixels=dynamic"):
        open_run(tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("model__backbone", {"_target_": "os.system", "command": "touch owned"}, "must be a subclass of vae_lightning"),
        ("data__batch_size", 0, "data.batch_size=0: should be greater than or equal to 1"),
        ("model__backbone", {"_target_": "wide.Wide"}, "model.backbone._target_=wide.Wide: cannot be imported"),
        ("model__latent_dim", 4, "best.ckpt: its weights do not fit the configured model"),
        ("seed", "x", "seed=x"),
    ],
)
def test_unbuildable_configurations_get_one_line(
    run: Path, key: str, value, line: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(run, **{key: value})
    with pytest.raises(UserError, match=re.escape(line)) as error:
        open_run(run, "cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_loaded_model_accepts_common_image_formats(run: Path, mnist: torch.Tensor) -> None:
    vae = load_run(run)
    expected = vae.reconstruct(mnist[:2])
    grey = (mnist[:2] * 255).round().to(torch.uint8)
    for same in (grey, grey[:, 0], grey.numpy(), mnist[:2, 0], mnist[:2].tolist(), mnist[:2].double()):
        torch.testing.assert_close(vae.reconstruct(same), expected)
    array = grey.numpy()
    for same in (array[::-1][::-1], array[..., ::-1].copy()[..., ::-1], (array / 255).astype(">f4"), list(array)):
        torch.testing.assert_close(vae.reconstruct(same), expected)
    torch.testing.assert_close(vae.reconstruct(Image.fromarray(array[0, 0])), expected[:1])
    for one in (grey[0], grey[0, 0], mnist[0]):
        torch.testing.assert_close(vae.reconstruct(one), expected[:1])
        assert vae.encode(one).mean.shape == (1, 3)
        assert vae.log_weights(one, k=5).shape == (5, 1)
        assert vae.interpolate(one, grey[1], steps=4).shape == (4, 1, 1, 28, 28)
    assert vae.decode([0.5, 0, 1]).mean.shape == (1, 28, 28)
    assert vae.decode([[0.5, 0, 1]] * 2).mean.shape == (2, 1, 28, 28)
    assert vae.log_joint(grey, torch.zeros(2, 3).tolist()).shape == (2,)


@pytest.mark.parametrize("shape", [(28, 27), (2, 3, 28, 28), ()])
def test_errors_name_a_wrong_image_shape(shape: tuple[int, ...], run: Path) -> None:
    with pytest.raises(ShapeError, match=r"images of shape .*: should be \(1, 28, 28\)"):
        load_run(run).encode(torch.zeros(shape))


def test_errors_name_invalid_pixels_and_latents(run: Path) -> None:
    vae, mnist_like = load_run(run), torch.zeros(28, 28)
    for wrong in (torch.full((28, 28), 255.0), torch.full((28, 28), -1.0), torch.full((28, 28), float("nan"))):
        with pytest.raises(ShapeError, match=r"should be floats in \[0, 1\]"):
            vae.reconstruct(wrong)
    with pytest.raises(ShapeError, match=r"latents of shape \(2,\): should end in latent_dim=3"):
        vae.decode([0.5, 0])
    with pytest.raises(ShapeError, match="images: Tensor is not an array of real numbers"):
        vae.reconstruct(torch.zeros(28, 28, dtype=torch.complex64))
    for ragged in ([[1], [2, 3]], "abc", None, [10**400, 0, 0]):
        with pytest.raises(ShapeError, match=r"latents: \w+ is not an array of real numbers"):
            vae.decode(ragged)
    for call in (lambda: vae.sample(-1), lambda: vae.sample(1.5), lambda: vae.log_weights(mnist_like, k=0)):
        with pytest.raises(ShapeError, match="should be a positive integer"):
            call()
    with pytest.raises(ShapeError, match="NaN or infinite"):
        vae.decode([float("nan"), 0, 0])


def test_latest_is_the_newest_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script) -> None:
    (tmp_path / "outputs" / "vae").mkdir(parents=True)
    for age, name in enumerate(("newest", "older", "oldest")):
        place = Path(shutil.copytree(run, tmp_path / "outputs" / "vae" / name))
        os.utime(place / "config.yaml", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    trial = Path(shutil.copytree(run, "outputs/searches/vae_optuna/trials/3"))
    assert RunDirectory.locate("latest")[0].path == trial
    shutil.rmtree("outputs/searches")
    assert RunDirectory.locate("latest")[0].path == Path("outputs/vae/newest")
    with pytest.raises(
        RunError, match=r"outputs/vae: not a run directory .it contains 3 runs; the newest is outputs/vae/newest"
    ):
        load_run("outputs/vae")
    assert script("train.py", "resume=latest").out.splitlines()[-1].endswith("outputs/vae/newest")
