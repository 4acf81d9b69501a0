"""Check once what `load` of a data set returns, and say in one line what is wrong and how to convert it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_lightning.data.mapped import Array, DataError, Images, MappedImages, spread

Labelled = tuple[Tensor | Array, Tensor | Array | None]  # what `load` may return of a split: images, labels
Checked = tuple[Images, Tensor]  # images [n, channels, height, width], uint8, and labels [n], int64; -1: unlabelled


def check_loaded(loaded: Any, source: str, class_names: Sequence[str] | None) -> tuple[Checked, Checked]:
    """Return training and test images with their labels as tensors. Raises DataError, which begins with `source`."""
    try:
        (train, train_labels), (test, test_labels) = loaded
    except (TypeError, ValueError):
        raise DataError(
            f"{source} returned {describe(loaded)}: should be two pairs, (training images, labels), (test images, "
            "labels); labels may be None"
        ) from None
    train, test = check_images(train, f"{source}: training images"), check_images(test, f"{source}: test images")
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{source}: test images are {describe(test)}, but training images {describe(train)}")
    train_labels = check_labels(train_labels, len(train), f"{source}: training labels")
    test_labels = check_labels(test_labels, len(test), f"{source}: test labels")
    highest = int(max(train_labels.max(), test_labels.max()))
    if class_names is not None and highest >= len(class_names):
        raise DataError(f"{source}: class_names has {len(class_names)} names, and a label is {highest}; add names")
    return (train, train_labels), (test, test_labels)


def check_images(images: Any, what: str) -> Images:
    """Return uint8 images `[n, channels, height, width]`, on the CPU or in a file. Raises DataError for others.

    A sample stands for the pixels of a memory map, which is never read as a whole.
    """
    if not is_numeric(images):
        raise DataError(f"{what} are {describe(images)}: should be a tensor, NumPy array or memory map of uint8")
    if 0 in images.shape:
        raise DataError(f"{what} are {describe(images)}: should be at least one image with at least one pixel")
    dtype, shape, steps = name_of(images.dtype), images.shape, []
    mapped = isinstance(images, np.memmap) and images.mode is not None  # None: a copy in memory
    pixels = MappedImages(images).read(spread(len(images), 1_000)) if mapped else images
    low, high = float(pixels.min()), float(pixels.max())
    if dtype != "uint8" or high == 1:
        steps.append(scaling(dtype, low, high))
    if len(shape) != 4:
        steps.append("x[:, None]" if len(shape) == 3 else "x.reshape(n, channels, height, width)")
    elif shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        steps.append("x.permute(0, 3, 1, 2)")
    if steps:
        advice = ", then ".join(steps)
        if not isinstance(images, Tensor):
            advice = advice.replace("to(torch.uint8)", "astype('uint8')").replace("permute", "transpose")
        raise DataError(
            f"{what} are {describe(images)}, {low:g} to {high:g}: should be uint8 [n, channels, height, width], "
            f"0 to 255; convert them: {advice}"
        )
    return MappedImages(images) if mapped else as_tensor(images)


def scaling(dtype: str, low: float, high: float) -> str:
    """Return the expression that converts pixels from `low` to `high` to bytes."""
    if dtype == "bool":
        return "x.to(torch.uint8) * 255"
    if dtype == "uint8":
        return "x * 255"
    if low >= 0 and high <= 1:
        return "(x * 255).round().to(torch.uint8)"
    if low >= -1 and high <= 1:
        return "((x + 1) * 127.5).round().to(torch.uint8)"
    if low >= 0 and high <= 255:
        return "x.round().to(torch.uint8)"
    if not low <= high < float("inf"):
        return "remove NaN and infinite values"
    shifted, width = (f"(x - {low:g})" if low > 0 else f"(x + {-low:g})" if low < 0 else "x"), high - min(low, 0)
    return f"({shifted} / {width:g} * 255).round().to(torch.uint8)"


def check_labels(labels: Any, n: int, what: str) -> Tensor:
    """Return labels `[n]`, int64; -1 for each image if `labels` is None. Raises DataError for others."""
    if labels is None:
        return torch.full((n,), -1)
    labels = np.asarray(labels) if isinstance(labels, list | tuple) else labels
    form, advice = describe(labels), ""
    if not is_numeric(labels) or "complex" in form:
        advice = "use numbers from 0, and class_names for their names"
    elif labels.ndim == 2 and labels.shape[1] > 2 and (as_tensor(labels).sum(dim=1) == 1).all():
        advice = "labels.argmax(1)"
    elif labels.ndim != 1:
        advice = "choose one column, such as labels[:, 0]"
    elif len(labels) != n:
        advice = f"there are {n} images"
    elif not name_of(labels.dtype).startswith(("int", "uint")):
        advice = "labels.long()" if isinstance(labels, Tensor) else "labels.astype(int)"
    elif labels.min() < -1:
        advice = f"the lowest is {int(labels.min())}; -1 is an unlabelled image"
    if advice:
        raise DataError(f"{what} are {form}: should be [{n}] integers from 0, or None; {advice}")
    return as_tensor(labels).long()


def is_numeric(values: Any) -> bool:
    """Return whether `values` is a dense tensor or array of real numbers or booleans, with at least one axis."""
    if isinstance(values, Tensor):
        return values.layout == torch.strided and not values.is_complex() and values.ndim > 0
    return isinstance(values, np.ndarray) and values.dtype.kind in "biuf" and values.ndim > 0


def as_tensor(values: Tensor | Array) -> Tensor:
    """Return values as a tensor on the CPU, without a copy where possible."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = values.astype(values.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def describe(values: Any) -> str:
    """Return `uint8 [60000, 1, 28, 28]` for a tensor or array, or else the type."""
    if isinstance(values, Tensor | np.ndarray):
        return f"{name_of(values.dtype)} {list(values.shape)}"
    return "None" if values is None else f"of type {type(values).__name__}"
