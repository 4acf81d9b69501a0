"""Figures of a trained run: one function per figure, which takes an opened run.

    run = open_run("outputs/…")
    manifold(run, plane=[1, 3])

`generate_run` saves them in the run directory; figures.py draws them. Images are from the test set, under the run's
pixel protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from zlib import crc32

import torch
from matplotlib import style
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from vae_lightning import figures
from vae_lightning.analysis.evaluation import posteriors
from vae_lightning.config import ConfigError, NonNegativeInt, Positive, PositiveInt, Seed
from vae_lightning.data import mapped
from vae_lightning.files import read_dict
from vae_lightning.models import standard_figures
from vae_lightning.models.estimators import closed_form_kl
from vae_lightning.models.latents import arc, by_activity, line, moments
from vae_lightning.models.standard_figures import latent_plane, sample_rows
from vae_lightning.models.vae import VAE
from vae_lightning.runs.directory import StrPath
from vae_lightning.runs.loading import Run, open_run

Dimensions = Annotated[Sequence[PositiveInt], Field(min_length=2, max_length=2)]  # latent dimensions, counted from 1
Images = Annotated[Sequence[NonNegativeInt], Field(min_length=1)]  # indices into the test set
Image = Annotated[Sequence[NonNegativeInt], Field(min_length=1, max_length=1)]
Points = Annotated[Sequence[float], Field(min_length=1)]  # the coordinates of one latent, of the next, …


def samples(
    run: Run,
    *,
    n: PositiveInt | None = None,
    columns: PositiveInt = 8,
    label: NonNegativeInt | None = None,
    temperature: Positive = 1.0,
    seed: Seed = 0,
) -> Tensor | Figure:
    """Draw a grid of n samples from the prior, by default 64; of a conditional model, a row of n samples per class.

    `label` is the only class to draw. `temperature` scales the prior's standard deviations.
    """
    torch.manual_seed(seed)
    labels = labels_to_draw(run, label)
    n = n or (columns if len(labels) > 1 else 64)
    return sample_rows([prior_samples(run, n, temperature, y) for y in labels], columns, run.data.class_name)


def overview(run: Run) -> Figure:
    """Draw one figure of a run: its numbers, loss curves, latent space, reconstructions and samples."""
    history, file = run.directory.read_history(), run.directory.metrics_file
    if not history:
        raise ConfigError(f"{run.directory}: has no finished epoch to draw")
    metrics = read_dict(file) if file.exists() else {}
    return standard_figures.overview(run.model, run.data, history, metrics, run.model.config["name"])


def reconstructions(run: Run, *, n: PositiveInt = 16, images: Images | None = None) -> Figure:
    """Draw test images, the first n or those with the given indices, above their reconstructions."""
    x, labels = select_test_images(run, images or range(min(n, len(run.data.test_images))))
    return figures.reconstructions(x, run.model.reconstruct(x, labels))


def manifold(
    run: Run, *, columns: PositiveInt = 20, plane: Dimensions | None = None, label: NonNegativeInt | None = None
) -> Figure:
    """Draw a decoded latent plane, at equally probable quantiles: the latent space, if it has two dimensions.

    With more, `plane` is two of them; the default is the plane of the first two principal components. Of a conditional
    model, draw the plane of the class `label`, or of each class.
    """
    labels = labels_to_draw(run, label)
    chosen = latent_plane(run.model, codes_of_test_set(run), plane)
    return standard_figures.manifold(run.model, chosen, columns, labels, run.data.class_name)


def scatter(run: Run, *, n: PositiveInt = 10_000, plane: Dimensions | None = None) -> Figure:
    """Draw the codes of the first n test images in a latent plane, coloured by class.

    With more than two latent dimensions, `plane` is two of them; the default is the plane of the first two principal
    components.
    """
    codes = codes_of_test_set(run)
    chosen = latent_plane(run.model, codes, plane)
    points = chosen.coordinates(codes[:n])
    return figures.latent_scatter(points, run.data.test_labels[:n], chosen.names, run.data.class_name)


def traversals(
    run: Run,
    *,
    n: PositiveInt = 10,
    columns: PositiveInt = 11,
    images: Image | None = None,
    label: NonNegativeInt | None = None,
) -> Figure:
    """Draw one latent dimension per row, from −3 to 3 standard deviations: those of the n largest KL, with the KL.

    Without a closed-form KL, they are the n dimensions of the codes that vary most.
    The other dimensions keep the value of the center of latent space, or of the code of the given test image. A
    conditional model decodes with the class `label`, by default that of the image, or the classes in turn, one per row.
    """
    labels = labels_to_draw(run, label)
    center, deviation = latent_center_and_deviation(run)
    start = center
    if images:
        x, of_image = select_test_images(run, images)
        start = run.model.codes(x, of_image)[0]
        labels = of_image.tolist() if label is None and run.model.classes else labels
    codes, kl = codes_and_kl(run)
    dimensions = (by_activity(codes) if kl is None else kl.argsort(descending=True).tolist())[:n]
    of_rows = [labels[row % len(labels)] for row in range(len(dimensions))]
    steps = torch.linspace(-3, 3, columns, device=center.device)
    z = start.repeat(len(dimensions), columns, 1)
    for row, dimension in enumerate(dimensions):
        z[row, :, dimension] = center[dimension] + steps * deviation[dimension]
    rows = [
        f"$z_{{{dimension + 1}}}$"
        + ("" if kl is None else f": KL {kl[dimension]:.2f}")
        + ("" if label is None else f", y = {figures.verbatim(run.data.class_name(label))}")
        for dimension, label in zip(dimensions, of_rows, strict=True)
    ]
    drawn = torch.stack([run.model.decode_images(*row) for row in zip(z, of_rows, strict=True)])
    caption = f"z in standard deviations of the {'prior' if isinstance(run.model, VAE) else 'codes'}"
    caption += "" if kl is None else "; KL in nats per image"
    across = [f"{round(step, 1) + 0.0:g}".replace("-", "−") for step in steps.tolist()]
    return figures.labelled_rows(drawn, rows, across, caption)


def interpolations(run: Run, *, n: PositiveInt = 5, columns: PositiveInt = 10, images: Images | None = None) -> Figure:
    """Draw interpolations between n pairs of test images: a row along the straight line, and one along the arc.

    `images` has the indices of the first pair, of the second, …; by default the first image of each digit. Each row
    begins and ends with the test images. A conditional model decodes a row with the label of its first image.
    """
    indices = list(images or first_of_each_digit(run))[: 2 * n]
    if images and len(indices) % 2:
        raise ConfigError(f"images={indices}: should be pairs, an even number of indices")
    # An odd number of classes leaves the last out; a single class gives the first two images.
    indices = indices[: len(indices) // 2 * 2] or [0, 1]
    x, labels = select_test_images(run, indices)
    ends = x.unflatten(0, (-1, 2)).movedim(1, 0)  # [2, pairs, …]
    start, end = run.model.codes(x, labels).unflatten(0, (-1, 2)).movedim(1, 0)
    paths = [
        torch.cat([ends[:1], run.model.decode_images(path(start, end, columns), labels[::2]), ends[1:]])
        for path in (line, arc)
    ]
    rows = torch.stack(paths).movedim(2, 0).flatten(0, 1)  # line and arc of the first pair, of the second, …
    names = ["image", *[""] * columns, "image"]
    return figures.labelled_rows(rows, ["line", "arc"] * (len(indices) // 2), names)


def analogies(run: Run, *, n: PositiveInt = 10, images: Images | None = None) -> Figure:
    """Draw test images, and in each row the codes of one decoded as every class: z is kept, and y changes.

    They are the first n images, or those with the given indices. Raises ConfigError unless the model is conditional.
    """
    if not run.model.classes:
        raise ConfigError(f"{run.directory}: its model has no classes; train one with model.conditional=true")
    x, labels = select_test_images(run, images or range(min(n, len(run.data.test_images))))
    z = run.model.codes(x, labels)
    classes = range(run.model.classes)
    names = [figures.verbatim(run.data.class_name(y)) for y in classes]
    rows = torch.stack([x, *(run.model.decode_images(z, y) for y in classes)], dim=1)
    return figures.labelled_rows(rows, [names[y] for y in labels.tolist()], ["image", *names])


def decode(run: Run, *, z: Points, columns: PositiveInt = 10, label: NonNegativeInt | None = None) -> Tensor:
    """Draw the decoded images of latents: `z` has the coordinates of the first, of the second, …

    Of a conditional model, draw them as the class `label`, or as each class in a row.
    """
    labels = labels_to_draw(run, label)
    if len(z) % (d := run.model.latent_dim):
        raise ConfigError(f"z={list(z)}: should be {d} coordinates, the latent_dim, or a multiple of them")
    points = run.model.latents(torch.tensor(z).reshape(-1, d))
    columns = len(points) if len(labels) > 1 else min(columns, len(points))
    return figures.image_grid(torch.cat([run.model.decode_images(points, y) for y in labels]), columns)


def nearest(
    run: Run,
    *,
    n: PositiveInt = 10,
    label: NonNegativeInt | None = None,
    temperature: Positive = 1.0,
    seed: Seed = 0,
) -> Figure:
    """Draw n samples from the prior above their three nearest training images, to see whether digits are memorized.

    Above each sample is its Euclidean distance to the nearest. Of a conditional model, the samples are of the class
    `label`, or of the classes in turn.
    """
    torch.manual_seed(seed)
    x = prior_samples(run, n, temperature, label)
    distances, neighbours = nearest_images(x, run.data.train_images, k=min(3, len(run.data.train_images)))
    rows = torch.stack([x, *run.model.images(neighbours.flatten(0, 1)).unflatten(0, (-1, n))])
    names = ["sample", "nearest", "second nearest", "third nearest"][: len(rows)]
    above = [f"{distance:.1f}" for distance in distances[0].tolist()]
    return figures.labelled_rows(rows, names, above, "above: Euclidean distance to the nearest training image")


def walk(run: Run, *, columns: PositiveInt = 12, images: Images | None = None) -> list[Tensor]:
    """Draw the frames of a closed path through test images along arcs, `columns` frames from each to the next.

    A conditional model decodes them with the label of the image where the arc starts.
    """
    x, labels = select_test_images(run, images or first_of_each_digit(run))
    codes = run.model.codes(x, labels)
    legs = [arc(start, end, columns + 1)[:-1] for start, end in pairwise([*codes, codes[0]])]
    frames = run.model.decode_images(torch.cat(legs), labels.repeat_interleave(columns))
    return [figures.image_grid(image.unsqueeze(0), 1) for image in frames]


Drawn = Tensor | Figure | list[Tensor]
FIGURES: dict[str, Callable[..., Drawn]] = {
    function.__name__: function
    for function in (
        overview,
        samples,
        reconstructions,
        manifold,
        scatter,
        traversals,
        interpolations,
        analogies,
        decode,
        nearest,
        walk,
    )
}


@torch.inference_mode()
def generate_run(
    run: StrPath,
    what: str,
    *,
    format: Literal["png", "pdf", "svg"] = "png",
    dark: bool = False,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    data_root: str | None = None,
    **options: Any,
) -> Path:
    """Save one figure in the figures/ of a run, and return the path of the file.

    `what` is a name in FIGURES, and `options` are those of the function: `generate_run(run, "samples", n=64)`. They
    are part of the file's name, samples_n-64.png, as are `dark` and another checkpoint than the best one.
    A walk is always an animated GIF. Raises UserError for a run that cannot be opened, or a wrong value.
    """
    function = FIGURES[what]
    arguments = {
        name: value for name, value in options.items() if value != signature(function).parameters[name].default
    }
    opened = open_run(run, accelerator, data_root)
    with style.context("vae_lightning.dark") if dark else nullcontext():
        figure = function(opened, **arguments)
    suffix = "gif" if isinstance(figure, list) else format
    words = [f"{key}-{re.sub('[^A-Za-z0-9.,+-]', '', str(value))}" for key, value in sorted(arguments.items())]
    if opened.checkpoint.name != opened.directory.best_checkpoint.name:
        words.append(opened.checkpoint.stem)
    words += ["dark"] * dark
    name = "_".join([what, *words]).replace(",", "_")
    if len(name) > 200:  # a file system allows 255
        name = f"{name[:190]}_{crc32(name.encode()):08x}"
    path = opened.directory.figures / f"{name}.{suffix}"
    figures.save(figure, path)
    return path


def prior_samples(run: Run, n: int, temperature: float, label: int | None = None) -> Tensor:
    """Return n images decoded from samples of the prior. Raises ConfigError for an autoencoder."""
    if not isinstance(run.model, VAE):
        raise ConfigError(f"{run.directory}: an autoencoder has no prior to sample from")
    return run.model.sample(n, temperature, label)


def labels_to_draw(run: Run, label: int | None) -> list[int] | list[None]:
    """Return `[label]`, or the label of each class; `[None]` for a model without classes. Raises ConfigError."""
    if label is not None and not run.model.classes:
        raise ConfigError(f"label={label}: the model of {run.directory} is not conditional; leave label out")
    if label is not None and label >= run.model.classes:
        raise ConfigError(f"label={label}: should be a class from 0 to {run.model.classes - 1}")
    return run.model.every_label() if label is None else [label]


def select_test_images(run: Run, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return test images as the model takes them, and their labels. Raises ConfigError for an index out of range."""
    images = run.data.test_images
    if max(indices) >= len(images):
        raise ConfigError(f"images={max(indices)}: should be less than {len(images)}, the number of test images")
    return run.model.images(images[list(indices)]), run.data.test_labels[list(indices)].to(run.model.device)


def first_of_each_digit(run: Run) -> list[int]:
    """Return the index of the first test image of each label; of unlabelled images, those of the first ten."""
    labels = run.data.test_labels
    found = [int((labels == label).nonzero()[0]) for label in labels.unique() if label >= 0]
    return found or list(range(min(10, len(labels))))


def codes_of_test_set(run: Run) -> Tensor:
    """Return the codes of the test set, `[n, latent_dim]`."""
    return run.model.all_codes(run.data.test_images, run.data.test_labels)


@torch.no_grad()
def codes_and_kl(run: Run) -> tuple[Tensor, Tensor | None]:
    """Return the codes of the test images, `[n, latent_dim]`, and KL(q(z|x) ‖ p(z)) of each latent dimension in nats.

    The KL is the mean over images, `[latent_dim]`: None for an autoencoder, and if it is no sum over dimensions.
    """
    model, images, labels = run.model, run.data.test_images, run.data.test_labels
    if not isinstance(model, VAE):
        return model.all_codes(images, labels), None
    parts, prior = posteriors(model, images, labels), model.prior_distribution()
    kl = [found for q in parts if (found := closed_form_kl(q, prior)) is not None]
    each = bool(kl) and kl[0].shape[1] == model.latent_dim
    return torch.cat([q.mean for q in parts]), torch.cat(kl).mean(dim=0) if each else None


def latent_center_and_deviation(run: Run) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of latent space, `[latent_dim]` each: of the prior, or else of all codes."""
    if isinstance(run.model, VAE):
        return moments(run.model.prior_distribution())
    codes = codes_of_test_set(run)
    return codes.mean(dim=0), codes.std(dim=0)


def nearest_images(x: Tensor, images: mapped.Images, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest neighbours of x `[m, …]`, in [0, 1], among `images` `[n, …]`, bytes, by Euclidean distance.

    Distances `[k, m]`, images `[k, m, …]`.
    """
    flat = x.flatten(1).cpu()
    distances = torch.cat([torch.cdist(flat, part.flatten(1).cpu().float() / 255) for part in images.split(10_000)], 1)
    nearest = distances.topk(k, dim=1, largest=False)
    return nearest.values.T, images[nearest.indices.T]
