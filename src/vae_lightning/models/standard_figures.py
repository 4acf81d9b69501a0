"""The figures that every run saves, as functions of a model and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from vae_lightning import figures
from vae_lightning.config import ConfigError
from vae_lightning.data.mapped import Images
from vae_lightning.data.module import ImageDataModule
from vae_lightning.data.pixels import described, evaluation_pixels
from vae_lightning.models.base import ImageModel
from vae_lightning.models.latents import moments, principal_directions
from vae_lightning.models.likelihoods import remark
from vae_lightning.models.vae import VAE


class Plane(NamedTuple):
    """A plane in latent space, with one standard deviation along each of its axes."""

    center: Tensor  # [latent_dim]
    axes: Tensor  # [2, latent_dim], orthogonal
    origin: Tensor  # [2], the coordinates of the center
    names: tuple[str, str]

    def coordinates(self, codes: Tensor) -> Tensor:
        """Return the coordinates `[n, 2]` of latents `[n, latent_dim]` in the plane."""
        return (codes - self.center) @ normalize(self.axes).T + self.origin


def latent_plane(model: ImageModel, codes: Tensor, plane: Sequence[int] | None = None) -> Plane:
    """Return the plane of two latent dimensions, counted from 1; `codes` `[n, latent_dim]` are those of many images.

    By default, it is the two-dimensional latent space, or that of the first two principal components of the codes.
    Raises ConfigError if the latent space has no such plane.
    """
    d = model.latent_dim
    if d < 2:
        raise ConfigError(f"latent_dim={d}: a plane needs 2 latent dimensions")
    if plane is None and d > 2:
        directions, deviations = principal_directions(codes, 2)
        shares = (deviations.square() / codes.var(dim=0).sum()).tolist()
        first, second = (f"PC {n} ({share:.0%} of variance)" for n, share in enumerate(shares, start=1))
        axes = directions * deviations[:, None]
        return Plane(codes.mean(dim=0), axes, torch.zeros(2).to(codes), (first, second))
    across, up = plane or (1, 2)
    if max(across, up) > d or across == up:
        raise ConfigError(f"plane=[{across},{up}]: should be two different dimensions from 1 to {d}, the latent_dim")
    of_codes = codes.mean(dim=0), codes.std(dim=0)
    center, deviation = moments(model.prior_distribution()) if isinstance(model, VAE) else of_codes
    chosen = [across - 1, up - 1]
    axes = deviation.new_zeros(2, d)
    axes[[0, 1], chosen] = deviation[chosen]
    return Plane(center, axes, center[chosen], (f"$z_{{{across}}}$", f"$z_{{{up}}}$"))


def manifold(
    model: ImageModel, plane: Plane, steps: int, labels: Sequence[int | None], class_name: Callable[[int], str]
) -> Figure:
    """Return the figure of a decoded plane, with a panel for each of `labels`."""

    def decode(z: Tensor, label: int | None) -> Tensor:
        return model.decode_images(z.to(plane.axes) @ plane.axes + plane.center, label)

    deviation = plane.axes.norm(dim=1).tolist()
    return figures.manifold(decode, steps, labels, plane.names, plane.origin.tolist(), deviation, class_name)


def sample_rows(of_classes: Sequence[Tensor], columns: int, class_name: Callable[[int], str]) -> Tensor | Figure:
    """Return a grid of samples `[n, *image_shape]`, or of several classes a figure with a row for each."""
    if len(of_classes) == 1:
        return figures.image_grid(of_classes[0], columns)
    names = [figures.verbatim(class_name(label)) for label in range(len(of_classes))]
    return figures.labelled_rows(torch.stack(list(of_classes)), names)


def fixed_samples(model: VAE, n: int, label: int | None = None) -> Tensor:
    """Return `model.sample(n)` of the same latents each time; random numbers go on as if none were drawn."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        return model.sample(n, labels=label)


@torch.inference_mode()
def standard_figures(
    model: ImageModel,
    images: Images,
    labels: Tensor,
    pairs: int = 8,
    samples: Sequence[int] = (8, 8),
    points: Sequence[Sequence[float]] = (),
    class_name: Callable[[int], str] = str,
) -> dict[str, Tensor | Figure]:
    """Return figures by name: reconstructions of `pairs` images, samples, decoded points.

    `images` are uint8 `[n, channels, height, width]`, `samples` rows and columns, always of the same z, and `points`
    latents. A conditional model has a row of samples per class. With two latent dimensions, the posterior means and the
    decoded latent plane are added; `class_name` returns the name of a label.
    """
    was_training = model.training
    model.eval()
    x, labels, every_label = model.images(images[:pairs]), labels.to(model.device), model.every_label()
    drawn: dict[str, Tensor | Figure] = {
        "reconstructions": figures.reconstructions(x, model.reconstruct(x, labels[:pairs]))
    }
    if isinstance(model, VAE):
        rows, columns = samples
        of_classes = [fixed_samples(model, columns if model.classes else rows * columns, y) for y in every_label]
        drawn["samples"] = sample_rows(of_classes, columns, class_name)
    if points:
        decoded = torch.cat([model.decode_images(points, y) for y in every_label])
        drawn["points"] = figures.image_grid(decoded, len(points))
    if model.latent_dim == 2:
        codes = model.all_codes(images[:10_000], labels[:10_000])
        plane = latent_plane(model, codes)
        drawn["scatter"] = figures.latent_scatter(codes, labels[:10_000], plane.names, class_name)
        if isinstance(model, VAE):
            drawn["manifold"] = manifold(model, plane, 10 if model.classes else 20, every_label, class_name)
    model.train(was_training)
    return drawn


@torch.inference_mode()
def overview(
    model: ImageModel,
    data: ImageDataModule,
    history: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    name: str,
) -> Figure:
    """Return one figure of a run: numbers, loss curves, latent space, reconstructions, and samples of a VAE.

    `history` has one dictionary per epoch, and `metrics` those of the test. Without them, the numbers and images are of
    the validation split, or else of training. The latent space is that of the first 2,000 images.
    """
    last = history[-1]
    metrics = {**last, **metrics}
    split = next(split for split in ("test", "val", "train") if f"{split}/loss" in metrics)
    images, labels = (getattr(data, f"{split}_{of}")[:2_000] for of in ("images", "labels"))
    if split == "train":
        images = evaluation_pixels(images, data.pixels)
    was_training = model.training
    model.eval()
    x, labels = model.images(images[:8]), labels.to(model.device)
    grids = [
        (figures.image_grid(torch.cat([x, model.reconstruct(x, labels[:8])]), len(x)), ["original", "reconstruction"])
    ]
    if isinstance(model, VAE):
        grids.append((figures.image_grid(fixed_samples(model, 16), 8), ["samples", ""]))
    points = None
    if model.latent_dim > 1 and len(images) > 1:
        codes = model.all_codes(images, labels)
        plane = latent_plane(model, codes)
        points = plane.coordinates(codes), labels, plane.names
    model.train(was_training)
    # Up to four metrics, without copies of the loss, such as -elbo, and without the KL of each level.
    of_split = {key: float(value) for key, value in metrics.items() if key.startswith(f"{split}/")}
    loss = of_split.pop(f"{split}/loss")
    others = [(key, value) for key, value in of_split.items() if abs(value) != loss and "/kl_" not in key]
    shown = {f"{split}/loss": loss} | dict(others[:3])
    likelihood = model.likelihood if isinstance(model, VAE) else None
    title = (
        f"{name}: {data.dataset}, {described(data.pixels, model.image_shape[0])} pixels"
        f"{' (cross-entropy, not a likelihood)' if likelihood and remark(likelihood, data.pixels) else ''}\n"
        f"latent_dim {model.latent_dim}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"epoch {last['epoch']:.0f} after {last['seconds']:.0f} s"
    )
    return figures.overview(title, shown, history, grids, points, data.class_name)
