import functools
import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, DATA
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from vae_lightning.config import ConfigError
from vae_lightning.data import decoding
from vae_lightning.data.batches import DeviceBatches, fits
from vae_lightning.data.module import DataError
from vae_lightning.data.pixels import Share, bernoulli_draw
from vae_lightning.data.torchvision_sets import MNISTDataModule, load_images
from vae_lightning.runs.loading import open_run
from vae_lightning.training.train import train


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the data directory that a test may change."""
    shutil.copytree(DATA / "MNIST", tmp_path / "data" / "MNIST")
    return tmp_path / "data"


def module(**options: object) -> MNISTDataModule:
    data = MNISTDataModule(root=str(DATA), **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_bundled_files_are_mnist() -> None:
    (train, train_labels), (test, test_labels) = load_images("MNIST", DATA)
    assert (train.shape, test.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert train.dtype == torch.uint8
    assert test_labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_splits() -> None:
    data = module(val_size=10_000)
    assert [len(images) for images in (data.train_images, data.val_images, data.test_images)] == [
        50_000,
        10_000,
        10_000,
    ]
    (train, _), _ = load_images("MNIST", DATA)
    assert torch.equal(data.val_images, train[50_000:])
    everything = module(val_size=0)
    assert len(everything.train_images) == 60_000
    assert everything.val_dataloader() == []
    with pytest.raises(ConfigError, match=r"data.val_size=60000: leaves no image.* 0 to 59999"):
        module(val_size=60_000)


def test_an_epoch_has_every_image_once_and_a_short_last_batch() -> None:
    images = torch.arange(250, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    batches = DeviceBatches(images, images.flatten(), batch_size=100, shuffle_seed=0)
    epoch = list(batches)
    assert len(batches) == len(epoch) == 3
    assert [len(x) for x, _ in epoch] == [100, 100, 50]
    assert torch.cat([y for _, y in epoch]).sort().values.tolist() == list(range(250))
    for x, y in epoch:
        torch.testing.assert_close(x.flatten() * 255, y.float())


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(torch.seed())  # the global generator has no influence
        labels = torch.arange(1_000)
        batches = DeviceBatches(torch.zeros(1_000, 1, 1, 1, dtype=torch.uint8), labels, 100, shuffle_seed=seed)
        batches.set_epoch(epoch)
        return torch.cat([y for _, y in batches]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(3, 7) == order(3, 7)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_grey_is_byte_over_255_and_threshold_is_above_one_half() -> None:
    (train, _), (test, _) = load_images("MNIST", DATA)
    x, _ = next(iter(module(pixels="grey", batch_size=50).test_dataloader()))
    torch.testing.assert_close(x, test[:50].float() / 255)
    data = module(pixels="threshold", batch_size=50)
    x, _ = next(iter(data.test_dataloader()))
    assert torch.equal(x, (test[:50].float() / 255 > 0.5).float())
    assert torch.equal(data.train_images, (train[:50_000].float() / 255 > 0.5).to(torch.uint8) * 255)


def test_dynamic_draws_each_epoch_for_training_and_once_for_evaluation() -> None:
    data = module(pixels="dynamic", batch_size=10_000, val_size=50_000)
    loader = data.train_dataloader()
    (first, _), (again, _) = next(iter(loader)), next(iter(loader))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(first, again)  # the same epoch, the same draw
    order = torch.argsort(loader._order())
    loader.set_epoch(1)
    second, _ = next(iter(loader))
    assert not torch.equal(first[order], second[torch.argsort(loader._order())])
    for images, loader in ((data.test_images, data.test_dataloader()), (data.val_images, data.val_dataloader())):
        assert set(images.unique().tolist()) == {0, 255}
        one, two = (torch.cat([x for x, _ in loader]) for _ in range(2))
        assert torch.equal(one, two)


def test_fixed_draw_never_changes() -> None:
    dynamic, fixed = module(pixels="dynamic"), module(pixels="fixed")
    assert torch.equal(dynamic.test_images, fixed.test_images)
    digest = hashlib.sha256(fixed.test_images.numpy().tobytes()).hexdigest()
    assert digest == "2260c1689f9fc411c377996b3ad828507c35ff15dff4f4e98da1942fb91eb39d"


def test_bernoulli_draw_has_the_right_mean() -> None:
    for byte in (0, 1, 100, 254, 255):
        images = torch.full((400_000,), byte, dtype=torch.uint8)
        drawn = bernoulli_draw(images, torch.Generator().manual_seed(0), Share(len(images))).float().mean().item()
        assert drawn == pytest.approx(byte / 255, abs=4 * (0.25 / 400_000) ** 0.5)
        assert byte not in (0, 255) or drawn == byte / 255


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_error_names_a_damaged_file(copied: Path, damage: str) -> None:
    file = copied / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    content = file.read_bytes()
    file.write_bytes(content[:1000] if damage == "truncated" else content[:-9] + b"123456789")
    with pytest.raises(DataError) as error:
        load_images("MNIST", copied)
    line = str(error.value)
    assert "\n" not in line
    for word in (str(file), "expected MD5 9fb629c4189551a2d022fa330f9573f3", "git checkout -- data"):
        assert word in line


def test_failed_download_is_one_line(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [(copied / "nowhere").as_uri() + "/"])
    with pytest.raises(DataError, match=r"MNIST is incomplete and cannot be downloaded \(.*train-labels") as error:
        load_images("MNIST", copied)
    assert "\n" not in str(error.value)


def idx(array: torch.Tensor) -> bytes:
    """Return `array` in the format of MNIST's files."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.to(torch.uint8).numpy().tobytes()


def tiny_set() -> dict[str, bytes]:
    parts = {}
    for split, n in (("train", 30), ("t10k", 10)):
        parts[f"{split}-images-idx3-ubyte"] = idx(torch.full((n, 28, 28), n))
        parts[f"{split}-labels-idx1-ubyte"] = idx(torch.arange(n))
    return parts


Server = tuple[Path, str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A directory, and the URL of a local server for it: torchvision downloads over HTTP only."""
    directory = tmp_path / "server"
    directory.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield directory, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_other_data_sets_are_downloaded_once(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = server
    resources = []
    for name, content in tiny_set().items():
        (served / f"{name}.gz").write_bytes(gzip.compress(content))
        resources.append((f"{name}.gz", hashlib.md5((served / f"{name}.gz").read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    root = tmp_path / "data"
    (train, _), (test, labels) = load_images("FashionMNIST", root)
    assert (train.shape, test.shape, labels.tolist()) == ((30, 1, 28, 28), (10, 1, 28, 28), list(range(10)))
    assert sorted(os.listdir(root / "FashionMNIST" / "raw")) == sorted(name for name, _ in resources)
    shutil.rmtree(served)
    load_images.cache_clear()
    assert load_images("FashionMNIST", root)[0][0].float().mean() == 30


def test_emnist_is_unpacked_once(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = server[0] / "gzip.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in tiny_set().items():
            split, rest = name.replace("t10k", "test").split("-", 1)
            file.writestr(f"gzip/emnist-letters-{split}-{rest}.gz", gzip.compress(content))
    monkeypatch.setattr(datasets.EMNIST, "url", f"{server[1]}gzip.zip")
    monkeypatch.setattr(datasets.EMNIST, "md5", hashlib.md5(archive.read_bytes()).hexdigest())
    root = tmp_path / "data"
    assert load_images("EMNIST-letters", root)[0][0].shape == (30, 1, 28, 28)
    archive.unlink()
    load_images.cache_clear()
    assert load_images("EMNIST-letters", root)[1][0].shape == (10, 1, 28, 28)


def write_cifar(root: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write images `[60, 3, 32, 32]` as CIFAR10's archive: five training batches and a test batch of ten images."""
    checksums, files = [], {}
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batch = {"data": images[10 * i : 10 * i + 10].reshape(10, -1), "labels": list(range(10))}
        files[name] = pickle.dumps(batch)
        checksums.append([name, hashlib.md5(files[name]).hexdigest()])
    files["batches.meta"] = pickle.dumps({"label_names": [str(n) for n in range(10)]})
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    cifar = datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5((root / "cifar-10-python.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", checksums[:5])
    monkeypatch.setattr(cifar, "test_list", checksums[5:])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": hashlib.md5(files["batches.meta"]).hexdigest()})


def test_cifar10_is_read_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config) -> None:
    images = np.random.default_rng(0).integers(256, size=(60, 3, 32, 32), dtype=np.uint8)
    write_cifar(tmp_path, images, monkeypatch)
    words = ["data.name=CIFAR10", f"data.root={tmp_path}", "data.val_size=10", "data.batch_size=20", *BRIEF]
    metrics = train(config(*words), tmp_path / "run")
    assert (metrics["data"], metrics["image_shape"]) == ("CIFAR10", [3, 32, 32])
    data = open_run(tmp_path / "run", "cpu").data
    assert torch.equal(data.train_images, torch.from_numpy(images[:40]))
    assert torch.equal(data.test_images, torch.from_numpy(images[50:]))
    assert data.test_labels.tolist() == list(range(10))
    assert data.class_name(3) == "cat"
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    load_images.cache_clear()
    with pytest.raises(DataError, match=r"CIFAR10 is incomplete and cannot be downloaded \(.*set its directory"):
        load_images("CIFAR10", tmp_path)


def test_svhn_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(256, size=(12, 3, 32, 32), dtype=np.uint8)
    split_list = {}
    for split, part in (("train", images), ("test", images[:10])):
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": part.transpose(2, 3, 1, 0), "y": np.arange(len(part))[:, None] % 10 + 1})
        split_list[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    data = MNISTDataModule("SVHN", str(tmp_path), val_size=2)
    data.setup()
    assert torch.equal(data.train_images, torch.from_numpy(images[:10]))
    assert data.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # the files call the digit 0 class 10
    assert data.class_names is None


def test_celeba_is_decoded_once_with_the_official_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = tmp_path / "celeba" / "img_align_celeba"
    faces.mkdir(parents=True)
    rows = []
    for i in range(10):
        pixels = np.full((218, 178, 3), 20 * i, np.uint8)
        pixels[:30], pixels[-30:], pixels[:, :10], pixels[:, -10:] = 255, 255, 255, 255  # outside the crop
        Image.fromarray(pixels).save(faces / f"{i + 1:06}.jpg", quality=95)
        rows.append(f"{i + 1:06}.jpg {(0, 1, 2)[(i > 5) + (i > 7)]}\n")
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("".join(rows))
    data = MNISTDataModule("CelebA", str(tmp_path), val_size=2)
    data.setup()
    assert data.image_shape == (3, 64, 64)
    shown = [images[:].float().mean(dim=(1, 2, 3)) for images in (data.train_images, data.val_images, data.test_images)]
    expected = [20.0 * torch.arange(6), 20.0 * torch.arange(6, 8), 20.0 * torch.arange(8, 10)]
    for means, wanted in zip(shown, expected, strict=True):
        torch.testing.assert_close(means, wanted, atol=4, rtol=0)
    assert data.test_labels.tolist() == [-1, -1]
    monkeypatch.setattr(decoding, "square", None)
    load_images.cache_clear()
    MNISTDataModule("CelebA", str(tmp_path), val_size=2).setup()


def test_earlier_runs_name_the_class_by_its_former_module() -> None:
    from vae_lightning.data import mnist

    assert mnist.MNISTDataModule is MNISTDataModule
    assert MNISTDataModule().dataset == "MNIST"
    assert MNISTDataModule("FashionMNIST").class_name(9) == "Ankle boot"
    assert MNISTDataModule("EMNIST-letters").class_name(26) == "z"


def test_large_data_sets_stay_on_the_cpu(monkeypatch) -> None:
    images = torch.zeros(1_000, 1, 28, 28, dtype=torch.uint8)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes, 10**9))
    assert fits(images, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes - 2, 10**9))
    assert not fits(images, gpu)
    assert fits(images, torch.device("cpu"))
