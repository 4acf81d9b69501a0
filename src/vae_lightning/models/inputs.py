"""Convert images, latents and labels of any common format to tensors, and check them.

Public methods of a model do so at the start, and training for its first batch: a check of values makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vae_lightning.config import UserError

Array = Tensor | ArrayLike  # any input of torch.as_tensor


class ShapeError(UserError):
    """Images, latents or labels of a shape or type that the model does not accept."""


def as_tensor(values: Array, what: str) -> Tensor:
    """Convert numbers to a tensor. Raises ShapeError for anything that is not a rectangular array of numbers."""
    if isinstance(values, Tensor) and not (values.is_complex() or values.is_sparse or values.is_meta):
        return values
    try:
        if isinstance(values, Tensor):
            raise TypeError
        array = np.array(values, order="C")
        if array.dtype.kind not in "biuf":  # bool, integers and floats
            raise TypeError
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ShapeError(f"{what}: {type(values).__name__} is not an array of real numbers") from None


def as_images(values: Array, image_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Convert images to a batch `[batch, *image_shape]` in [0, 1] on `device`.

    Accepts bytes or floats; a tensor, array or list; one image or many; with or without a channel axis of size 1.
    Raises ShapeError for another shape, and for floats outside [0, 1].
    """
    x = as_tensor(values, "images")
    shapes = [image_shape, *([image_shape[1:]] if image_shape[0] == 1 else [])]
    if not any(x.shape[-len(s) :] == s and x.ndim <= len(s) + 1 for s in shapes):
        raise ShapeError(f"images of shape {tuple(x.shape)}: should be {image_shape} or a batch of it")
    x = x.to(device).reshape(-1, *image_shape)
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if not ((x >= 0) & (x <= 1)).all():
        raise ShapeError(f"pixels from {x.min():g} to {x.max():g}: should be floats in [0, 1], or uint8 up to 255")
    return x


def as_latents(values: Array, latent_dim: int, device: torch.device) -> Tensor:
    """Convert a tensor, array or list to latents `[..., latent_dim]`, float32, on `device`. Raises ShapeError."""
    z = as_tensor(values, "latents")
    if z is not values and not z.isfinite().all():
        raise ShapeError("latents: some are NaN or infinite")
    z = z.to(device, torch.float32)
    if z.shape[-1:] != (latent_dim,):
        raise ShapeError(f"latents of shape {tuple(z.shape)}: should end in latent_dim={latent_dim}")
    return z


def as_labels(values: Array | None, classes: int, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """Convert one label for all, or anything that broadcasts to `shape`, to a tensor on `device`; None stays None.

    With `classes`, raises ShapeError for missing labels, another shape, and labels that are not integers from 0 to
    `classes` − 1.
    """
    if not classes:
        return None if values is None else as_tensor(values, "labels").to(device)
    allowed = f"a class from 0 to {classes - 1} for each image"
    if values is None:
        raise ShapeError(f"labels: missing; a conditional model needs {allowed}")
    y = as_tensor(values, "labels").to(device)
    if y.ndim > len(shape) or any(n not in (1, m) for n, m in zip(y.shape[::-1], shape[::-1], strict=False)):
        raise ShapeError(f"labels of shape {tuple(y.shape)}: should be {tuple(shape)}, {allowed}")
    if not torch.isin(y, torch.arange(classes, device=device)).all():
        raise ShapeError(f"labels from {y.min():g} to {y.max():g}: should be {allowed}")
    return y


def images_and_labels(batch: object) -> tuple[Tensor, Tensor | None]:
    """Return images and labels of a batch: `images`, `(images,)` or `(images, labels)`. Raises ShapeError."""
    parts: list[Any] = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(parts) in (1, 2) and all(isinstance(part, Tensor) for part in parts):
        return parts[0], parts[1] if parts[1:] else None
    given = ", ".join(type(part).__name__ for part in parts)
    given = f"({given})" if isinstance(batch, tuple | list) else given
    raise ShapeError(
        f"batch of {given}: should be images, (images,) or (images, labels), tensors; for another batch, override "
        "the model's method `unpack`"
    )


def check_batch(x: Tensor, labels: Tensor | None, image_shape: tuple[int, ...], classes: int) -> None:
    """Raise ShapeError unless a batch is floats `[batch, *image_shape]` in [0, 1], with valid labels if `classes`."""
    if x.shape[1:] != image_shape or not x.is_floating_point():
        shape = f"(batch, {', '.join(map(str, image_shape))})"
        raise ShapeError(
            f"batch of {x.dtype} and {tuple(x.shape)}: training needs images {shape}, uint8 or floats in [0, 1]; "
            "image_shape of the model and the images must agree"
        )
    as_images(x, image_shape, x.device)
    as_labels(labels, classes, x.shape[:1], x.device)


def check_image_shape(shape: object) -> None:
    """Raise ShapeError unless `shape` is three positive integers: channels, height, width."""
    sizes = list(shape) if isinstance(shape, Sequence) else []
    if len(sizes) != 3 or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ShapeError(f"image_shape={shape}: should be (channels, height, width), such as (1, 28, 28)")


def check_count(name: str, count: object) -> None:
    """Raise ShapeError unless `count` is a positive integer."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ShapeError(f"{name}={count}: should be a positive integer")
