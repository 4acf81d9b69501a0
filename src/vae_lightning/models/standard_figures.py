"""The figures that every run saves, as a function of a model and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vae_lightning import figures
from vae_lightning.data.mapped import Images
from vae_lightning.models.base import ImageModel
from vae_lightning.models.latents import moments
from vae_lightning.models.vae import VAE


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
        "reconstructions": figures.reconstruction_grid(x, model.reconstruct(x, labels[:pairs]))
    }
    if isinstance(model, VAE):
        rows, columns = samples
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)
            of_rows = [model.sample(columns if model.classes else rows * columns, labels=y) for y in every_label]
            drawn["samples"] = figures.image_grid(torch.cat(of_rows), columns)
    if points:
        decoded = torch.cat([model.decode_images(points, y) for y in every_label])
        drawn["points"] = figures.image_grid(decoded, len(points))
    if model.latent_dim == 2:
        codes = model.all_codes(images[:10_000], labels[:10_000])
        drawn["scatter"] = figures.latent_scatter(codes, labels[:10_000], class_name=class_name)
        if isinstance(model, VAE):
            center, spread = moments(model.prior_distribution())
            drawn["manifold"] = figures.manifold_grid(
                lambda z, y: model.decode_images(center + spread * z.to(center.device), y),
                steps=10 if model.classes else 20,
                labels=every_label,
            )
    model.train(was_training)
    return drawn
