"""data=folder: pictures of many formats, splits, classes, the cache, and files that cannot be read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF
from helpers import write_pictures
from PIL import Image

from vae_lightning.data import decoding
from vae_lightning.data.folder import FolderDataModule
from vae_lightning.data.mapped import DataError
from vae_lightning.runs.loading import open_run


def folder(root: Path, **options: object) -> FolderDataModule:
    data = FolderDataModule(str(root), **({"size": 16} | options))
    data.setup()
    return data


def test_the_command_of_the_readme(command, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos")
    result = command("data=folder", "data.root=photos", "data.size=16", "hydra.run.dir=run", *BRIEF)
    assert result.code == 0, result.err
    run = open_run("run", "cpu")
    assert run.model.image_shape == (3, 16, 16)
    assert [len(x) for x in (run.data.train_images, run.data.val_images, run.data.test_images)] == [41, 4, 5]
    assert run.data.dataset == "photos"


def test_classes_and_splits_follow_the_directories(tmp_path: Path) -> None:
    write_pictures(tmp_path / "whole", 40)
    one, same = folder(tmp_path / "whole"), folder(tmp_path / "whole")
    assert one.class_names == ["cat", "dog"]
    assert set(one.train_labels.tolist()) == set(one.val_labels.tolist()) | set(one.test_labels.tolist()) == {0, 1}
    assert torch.equal(one.test_images[:], same.test_images[:])
    for name, many in (("train", 12), ("test", 4)):
        write_pictures(tmp_path / "split" / name, many)
    data = folder(tmp_path / "split", val_size=2)
    assert [len(x) for x in (data.train_images, data.val_images, data.test_images)] == [10, 2, 4]
    assert sorted(data.test_labels.tolist()) == [0, 0, 1, 1]
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "whole").rglob("*.png"):
        path.rename(flat / path.name)
    assert folder(flat).class_names is None
    assert set(folder(flat).train_labels.tolist()) == {-1}


def test_formats_and_modes_are_cropped_resized_and_upright(tmp_path: Path) -> None:
    left, right = np.zeros((40, 20), np.uint8), np.full((40, 20), 200, np.uint8)
    halves = np.concatenate([left, right], axis=1)  # dark and light, 40 pixels a side
    wide = np.pad(halves, ((0, 0), (30, 30)), constant_values=255)  # what the crop removes
    grey = Image.fromarray(wide)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: the first row is the right side
    paths = {
        "grey.png": grey,
        "rgb.bmp": grey.convert("RGB"),
        "alpha.webp": grey.convert("RGBA"),
        "palette.gif": grey.convert("P"),
        "photo.JPG": grey.convert("RGB"),
        "sixteen.png": Image.fromarray(wide.astype(np.uint16) * 257),
    }
    for name, picture in paths.items():
        picture.save(tmp_path / name)
    Image.fromarray(np.rot90(wide).copy()).save(tmp_path / "turned.jpg", exif=turned)
    for channels in (1, 3):
        for name in [*paths, "turned.jpg"]:
            pixels = np.frombuffer(decoding.square(tmp_path / name, 8, channels), np.uint8).reshape(channels, 8, 8)
            assert abs(pixels[..., 1:3].astype(int)).max() < 20, name
            assert abs(pixels[..., 5:7].astype(int) - 200).max() < 20, name


def test_the_second_start_decodes_nothing_and_a_change_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "photos", 20)
    first = folder(tmp_path / "photos")
    (file,) = (tmp_path / "cache" / "vae_lightning").glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "square", None)
        assert torch.equal(folder(tmp_path / "photos").train_images[:], first.train_images[:])
    os.utime(tmp_path / "photos" / "cat" / "0.png", (1, 1))
    folder(tmp_path / "photos")
    folder(tmp_path / "photos", size=8)
    assert len(list(file.parent.glob("*.npy"))) == 3


def test_interrupted_decoding_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "photos", 20)
    square = decoding.square

    def interrupted(path: Path, *options: object) -> bytes:
        if path.name == "7.png":
            raise KeyboardInterrupt
        return square(path, *options)

    monkeypatch.setattr(decoding, "square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder(tmp_path / "photos")
    assert list((tmp_path / "cache" / "vae_lightning").iterdir()) == []


def test_files_that_cannot_be_read_are_named_and_left_out_on_request(tmp_path: Path, caplog) -> None:
    write_pictures(tmp_path / "photos", 20)
    cat = tmp_path / "photos" / "cat"
    (cat / "2.png").write_bytes((cat / "2.png").read_bytes()[:500])
    (cat / "4.png").write_text("no picture")
    (cat / "notes.txt").write_text("not a picture, and not meant to be one")
    (cat / ".ipynb_checkpoints").mkdir()
    (cat / ".ipynb_checkpoints" / "6-checkpoint.png").write_bytes((cat / "6.png").read_bytes())
    with pytest.raises(DataError) as error:
        folder(tmp_path / "photos")
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'photos'}: 2 of 20 pictures cannot be read: ")
    assert all(word in line for word in ("cat/2.png (OSError: ", "cat/4.png (Unidentified", "data.skip_broken=true"))
    data = folder(tmp_path / "photos", skip_broken=True)
    assert len(data.train_images) + len(data.val_images) + len(data.test_images) == 18
    assert "2 of 20 pictures cannot be read" in caplog.text


def test_a_folder_without_pictures_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"photos: no such directory; set it with data\.root=…"):
        folder(tmp_path / "photos")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="photos: contains no pictures"):
        folder(tmp_path / "photos")
    write_pictures(tmp_path / "photos" / "train", 3)
    with pytest.raises(DataError, match=r"photos: train/ has 3 pictures, and test/ 0; should both have some"):
        folder(tmp_path / "photos")
