"""Images in a memory map: the same batches as from memory, never read as a whole, and exactly resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, checkpoint, composed
from test_resuming import Signal, signal_at

from vae_lightning.data.checks import check_images
from vae_lightning.data.mapped import DataError, MappedImages
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.torchvision_sets import MNISTDataModule, load_images
from vae_lightning.training.signals import Interrupted
from vae_lightning.training.train import train

N = 3_000


class Mapped(MNISTDataModule):
    """MNIST's first training images and 500 of its test images, in memory or in memory maps."""

    in_file = True

    def load(self) -> Any:
        (images, labels), (test, test_labels) = super().load()
        images, test = images[:N], test[:500]
        if self.in_file:
            images, test = as_map(images), as_map(test)
        return (images, labels[:N]), (test, test_labels[:500])


class InMemory(Mapped):
    in_file = False


def as_map(images: torch.Tensor, mode: str = "r") -> np.memmap:
    path = Path("images.npy")  # in the directory of a test
    path = path.with_stem(f"images{len(images)}")
    np.save(path, images.numpy())
    return np.load(path, mmap_mode=mode)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ready(kind: type[ImageDataModule], **options: Any) -> Any:
    data = kind(root=str(DATA), batch_size=100, val_size=500, **options)
    data.setup()
    return data


@pytest.mark.parametrize("pixels", ["grey", "threshold", "dynamic", "fixed"])
def test_batches_are_those_from_memory(pixels: str) -> None:
    file, memory = ready(Mapped, pixels=pixels, flip=True), ready(InMemory, pixels=pixels, flip=True)
    for split in ("train", "val", "test"):
        pairs = list(zip(*(getattr(data, f"{split}_dataloader")() for data in (file, memory)), strict=True))
        same = all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))
        assert same == (pixels in ("grey", "threshold") or (pixels == "dynamic" and split == "train"))
        assert all(torch.equal(one[1], two[1]) for one, two in pairs)


def test_each_image_of_a_file_has_one_fixed_draw_with_the_right_mean() -> None:
    data = ready(Mapped, pixels="fixed")
    whole = data.train_images[:]
    assert set(whole.unique().tolist()) == {0, 255}
    (images, _), _ = load_images("MNIST", DATA)
    p = images[:2_500].double() / 255
    error = (p * (1 - p)).sum().sqrt()
    assert abs((whole / 255).double().sum() - p.sum()) < 4 * error
    index = torch.tensor([[7, 3], [2_000, 7]])
    assert torch.equal(data.train_images[index], whole[index])
    assert torch.equal(data.train_images[-1], whole[-1])
    assert torch.equal(torch.cat(list(data.train_images.split(999))), whole)


def test_a_file_is_never_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    read, rows_read = MappedImages.read, []
    monkeypatch.setattr(MappedImages, "read", lambda self, rows: rows_read.append(rows.size) or read(self, rows))
    monkeypatch.setattr(np, "take", None)
    for pixels in ("grey", "dynamic", "fixed", "threshold"):
        data = ready(Mapped, pixels=pixels)
        data.checksums()
    assert sum(rows_read) <= 4 * (1_000 + 500 + 3 * 100)  # of 3,500, each time


def test_checksums_of_a_file_depend_on_its_shape_and_sample() -> None:
    data = ready(Mapped)
    before = data.checksums()
    assert before == ready(Mapped).checksums()
    assert len(set(before.values())) == 3
    file = np.load("images3000.npy", mmap_mode="r+")
    file[0] += 1
    after = data.checksums()
    assert [split for split in before if before[split] != after[split]] == ["train"]


@pytest.mark.parametrize("mode", ["r", "c"])
def test_views_of_a_file_are_read_as_they_are(mode: str) -> None:
    last = torch.randint(256, (20, 9, 10, 3), dtype=torch.uint8)
    view = as_map(last, mode)[5:].transpose(0, 3, 1, 2)
    images = check_images(view, "")
    assert isinstance(images, MappedImages)
    assert torch.equal(images[:], last[5:].permute(0, 3, 1, 2))
    assert isinstance(check_images(view[::-1], ""), MappedImages)
    assert torch.equal(check_images(view[::-1], "")[1], last[18].permute(2, 0, 1))
    assert isinstance(check_images(view.copy(), ""), torch.Tensor)


def test_a_file_that_has_become_shorter_gets_one_line() -> None:
    images = check_images(as_map(torch.randint(256, (20, 1, 9, 9), dtype=torch.uint8)), "")
    with open("images20.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(DataError, match=r"images20\.npy: has become shorter while it was read"):
        images[7]


@pytest.mark.parametrize("pixels", ["dynamic", "fixed"])
def test_a_run_from_a_file_is_resumed_exactly(pixels: str, tmp_path: Path) -> None:
    words = ["data._target_=test_mapped.Mapped", f"data.root={DATA}", "data.val_size=500", f"data.pixels={pixels}"]
    words += ["data.flip=true", "trainer.max_epochs=2", "model.backbone.hidden=[16]", "model/prior=vamp"]
    words += ["figures.embedded=0", "model.prior.pseudo_inputs=4", signal_at("batch", 27)]
    train(composed(*words), tmp_path / "whole")
    Signal.armed = "once"
    with pytest.raises(Interrupted):
        train(composed(*words), tmp_path / "stopped")
    train(composed(*words), tmp_path / "stopped", resume=True)
    one, two = (checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "stopped"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
