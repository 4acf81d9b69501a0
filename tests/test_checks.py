"""Data sets that are not as they should be: what `load` returned, and what to do, in one line and before any file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BRIEF
from torch.utils.data import DataLoader

from vae_lightning.config import ConfigError
from vae_lightning.data.checks import check_images, check_labels, check_loaded
from vae_lightning.data.mapped import DataError
from vae_lightning.data.torchvision_sets import MNISTDataModule
from vae_lightning.runs.loading import open_run
from vae_lightning.training.train import train

BYTES = torch.randint(256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
UNIT = BYTES / 255
COLOUR = BYTES.expand(-1, 3, -1, -1)


def counts() -> torch.Tensor:
    return (UNIT * 1276).round()


# What users returned, what the line says of it, and the conversion that it gives, which is applied and accepted.
WRONG_IMAGES = {
    "floats in [0, 1]": (UNIT, "float32 [30, 1, 8, 8], 0 to 1", "(x * 255).round().to(torch.uint8)"),
    "counts": (counts(), "float32 [30, 1, 8, 8], 0 to 1276", "(x / 1276 * 255).round().to(torch.uint8)"),
    "bool": (BYTES > 127, "bool [30, 1, 8, 8], 0 to 1", "x.to(torch.uint8) * 255"),
    "floats in [-1, 1]": (2 * UNIT - 1, "float32 [30, 1, 8, 8], -1 to 1", "((x + 1) * 127.5).round().to(torch.uint8)"),
    "standardized": (4 * UNIT - 2, "-2 to 2", "((x + 2) / 4 * 255).round().to(torch.uint8)"),
    "int64": (BYTES.long(), "int64 [30, 1, 8, 8], 0 to 255", "x.round().to(torch.uint8)"),
    "bytes 0 and 1": ((BYTES > 127).byte(), "uint8 [30, 1, 8, 8], 0 to 1", "x * 255"),
    "channels last": (COLOUR.movedim(1, 3), "uint8 [30, 8, 8, 3]", "x.permute(0, 3, 1, 2)"),
    "no channel axis": (BYTES[:, 0], "uint8 [30, 8, 8]", "x[:, None]"),
    "several at once": (UNIT[:, 0], "float32 [30, 8, 8]", "(x * 255).round().to(torch.uint8), then x[:, None]"),
    "array": (UNIT.numpy(), "float32 [30, 1, 8, 8]", "(x * 255).round().astype('uint8')"),
    "array, channels last": (COLOUR.movedim(1, 3).numpy(), "[30, 8, 8, 3]", "x.transpose(0, 3, 1, 2)"),
    "rows of numbers": (torch.zeros(30, 50).byte(), "uint8 [30, 50]", "x.reshape(n, channels, height, width)"),
    "NaN": (UNIT / 0, "float32", "remove NaN and infinite values"),
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_images_that_are_not_bytes_get_the_conversion(name: str) -> None:
    x, described, advice = WRONG_IMAGES[name]
    with pytest.raises(DataError) as error:
        check_images(x, "Scans.load(): training images")
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("Scans.load(): training images are ")
    assert described in line
    assert line.endswith(f"should be uint8 [n, channels, height, width], 0 to 255; convert them: {advice}")
    if name not in ("rows of numbers", "NaN"):
        for step in advice.split(", then "):
            x = eval(step, {"x": x, "torch": torch})
        assert check_images(x, "").shape[2:] == (8, 8)


WRONG_LABELS = {
    "too few": (torch.zeros(29).long(), "int64 [29]: should be [30] integers from 0, or None; there are 30 images"),
    "floats": (torch.zeros(30), "float32 [30]: should be [30] integers from 0, or None; labels.long()"),
    "an array of floats": (np.zeros(30), "float64 [30]: should be [30] integers from 0, or None; labels.astype(int)"),
    "two columns": (torch.zeros(30, 2).long(), "choose one column, such as labels[:, 0]"),
    "one-hot": (torch.eye(10)[torch.arange(30) % 10], "labels.argmax(1)"),
    "words": (["cat"] * 30, "use numbers from 0, and class_names for their names"),
    "negative": (torch.full((30,), -2), "the lowest is -2; -1 is an unlabelled image"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_labels_that_are_not_integers_get_one_line(name: str) -> None:
    labels, expected = WRONG_LABELS[name]
    with pytest.raises(DataError) as error:
        check_labels(labels, 30, "Scans.load(): training labels")
    assert str(error.value).startswith("Scans.load(): training labels are ")
    assert str(error.value).endswith(expected)


@pytest.mark.parametrize(
    ("loaded", "names", "line"),
    [
        (BYTES, None, "Scans.load() returned uint8 [30, 1, 8, 8]: should be two pairs, (training images, labels)"),
        (None, None, "Scans.load() returned None: should be two pairs"),
        (((BYTES, None), ([1, 2], None)), None, "Scans.load(): test images are of type list: should be a tensor"),
        (((BYTES, None), (BYTES[:0], None)), None, "test images are uint8 [0, 1, 8, 8]: should be at least one image"),
        (
            ((BYTES, None), (COLOUR, None)),
            None,
            "test images are uint8 [30, 3, 8, 8], but training images uint8 [30, 1",
        ),
        (((BYTES, torch.full((30,), 2)), (BYTES, None)), ["a", "b"], "class_names has 2 names, and a label is 2; add"),
    ],
)
def test_the_form_of_the_whole_gets_one_line(loaded: Any, names: list[str] | None, line: str) -> None:
    with pytest.raises(DataError) as error:
        check_loaded(loaded, "Scans.load()", names)
    assert line in str(error.value)


def test_arrays_and_missing_labels_are_accepted() -> None:
    backwards = BYTES.numpy()[:, :, ::-1]
    backwards.setflags(write=False)
    (images, labels), (_, of_test) = check_loaded(((backwards, None), (BYTES, [1] * 30)), "Scans.load()", None)
    assert torch.equal(images, BYTES.flip(2))
    assert labels.tolist() == [-1] * 30
    assert (of_test.dtype, of_test.tolist()) == (torch.int64, [1] * 30)


class Given(MNISTDataModule):
    """A data set whose `load` returns what a test says."""

    loaded: Callable[[], Any]

    def load(self) -> Any:
        return Given.loaded()


GIVEN = ["data._target_=test_checks.Given", "data.batch_size=10", "data.val_size=10"]


def test_wrong_data_leave_no_files(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Given, "loaded", lambda: ((UNIT, None), (UNIT, None)), raising=False)
    refused = command("hydra.run.dir=run", *GIVEN)
    assert refused.code == 2
    assert refused.err.startswith("Given.load(): training images are float32 [30, 1, 8, 8], 0 to 1: should be uint8")
    assert len(refused.err.splitlines()) == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("channels", [2, 4])
def test_unlabelled_images_of_other_channels_are_trained_on_and_shown(
    channels: int, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = BYTES.expand(-1, channels, -1, -1).numpy()
    monkeypatch.setattr(Given, "loaded", lambda: ((images, None), (images, None)), raising=False)
    words = [*BRIEF, *GIVEN, "model.latent_dim=2", "figures.every=1", "figures.embedded=5"]
    metrics = train(config(*words), tmp_path / "run")
    assert metrics["image_shape"] == [channels, 8, 8]
    names = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert names >= {"reconstructions", "samples", "scatter", "manifold"}
    run = open_run(tmp_path / "run", "cpu")
    assert run.data.test_labels.unique().tolist() == [-1]


def test_class_names_are_shown_in_place_of_labels() -> None:
    data = Given()
    assert [data.class_name(label) for label in (-1, 0, 1)] == ["", "0", "1"]
    data.class_names = ["cat", "dog"]
    assert [data.class_name(label) for label in (-1, 0, 1)] == ["", "cat", "dog"]


def test_a_last_batch_of_one_image_joins_the_one_before_it_for_batch_normalization(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Given, "loaded", lambda: ((BYTES, None), (BYTES, None)), raising=False)
    words = [
        "model.backbone.batch_norm=true",
        "trainer.max_epochs=2",
        "figures.embedded=0",
        "model.backbone.hidden=[8]",
    ]
    unpatched = DataLoader.__init__
    with pytest.raises(ConfigError, match=r"data\.batch_size=1: batch normalization needs 2 images or more per batch"):
        train(config(*GIVEN, *words, "data.batch_size=1"), tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    assert DataLoader.__init__ is unpatched  # by Lightning, which would change the next job of this process
    metrics = train(config(*GIVEN, *words, "data.val_size=9"), tmp_path / "joined")  # 21 images: 10 and 11
    assert metrics["steps"] == 4
    assert train(config(*GIVEN, *words[1:], "data.val_size=9"), tmp_path / "without")["steps"] == 6
