"""Pictures of what a trained run has learnt: a function each, from an opened run to a picture.

    run = open_run("outputs/…")
    manifold(run, plane="principal")

`generate_run` saves them into the run directory; figures.py draws them. All take images from the test set, under the
run's own pixel protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vae_lightning import figures
from vae_lightning.config import ConfigError, NonNegativeInt, Positive, PositiveInt, Seed, check_arguments
from vae_lightning.models.latents import arc, by_activity, line, principal_directions
from vae_lightning.models.vae import VAE
from vae_lightning.runs.loading import Run, open_run

Plane = Literal["principal"] | Annotated[Sequence[PositiveInt], Field(min_length=2, max_length=2)]
Images = Annotated[Sequence[NonNegativeInt], Field(min_length=1)]  # indices into the test set
Image = Annotated[Sequence[NonNegativeInt], Field(min_length=1, max_length=1)]
Points = Annotated[Sequence[float | Sequence[float]], Field(min_length=1)]


def samples(
    run: Run, n: PositiveInt = 64, columns: PositiveInt = 8, temperature: Positive = 1.0, seed: Seed = 0
) -> Tensor:
    """A grid of n images decoded from the prior, whose standard deviations `temperature` scales."""
    torch.manual_seed(seed)
    return figures.image_grid(prior_samples(run, n, temperature), columns)


def reconstructions(run: Run, n: PositiveInt = 16, images: Images | None = None) -> Tensor:
    """Test images, the first n or those of the given indices, above their reconstructions."""
    x, labels = chosen(run, images or range(min(n, len(run.data.test_images))))
    return figures.reconstruction_grid(x, run.model.reconstruct(x, labels))


def manifold(run: Run, columns: PositiveInt = 20, plane: Plane | None = None) -> Tensor:
    """A plane in latent space, decoded at equally probable quantiles; with two latent dimensions, all there is."""
    center, axes, _ = latent_plane(run, plane)
    return figures.manifold_grid(lambda z: run.model.pictures(z.to(axes) @ axes + center), columns)


def scatter(run: Run, n: PositiveInt = 10_000, plane: Plane | None = None) -> Figure:
    """Where the first n test images lie, coloured by digit; with more than two dimensions, on their principal plane."""
    if plane is None and run.model.latent_dim > 2:
        plane = "principal"
    center, axes, names = latent_plane(run, plane)
    codes = run.model.all_codes(run.data.test_images[:n], run.data.test_labels[:n])
    along = codes - center if plane == "principal" else codes
    return figures.latent_scatter(along @ normalize(axes).T, run.data.test_labels[:n].to(codes.device), names)


def traversals(run: Run, n: PositiveInt = 10, columns: PositiveInt = 11, images: Image | None = None) -> Figure:
    """One latent dimension a row, the n most active first, from −3 to 3 standard deviations, the others held still.

    They are held at the middle of latent space, or at the code of the test image whose index is given.
    """
    codes = codes_of_test_set(run)
    center, spread = middle(run, codes)
    still = run.model.codes(*chosen(run, images))[0] if images else center
    rows = by_activity(codes)[:n]
    values = torch.linspace(-3, 3, columns, device=codes.device)
    z = still.repeat(len(rows), columns, 1)
    for row, dimension in enumerate(rows):
        z[row, :, dimension] = center[dimension] + values * spread[dimension]
    names = [f"$z_{{{dimension + 1}}}$" for dimension in rows]
    return figures.labelled_rows(
        run.model.pictures(z), names, [f"{round(value, 1) + 0.0:g}" for value in values.tolist()]
    )


def interpolations(run: Run, n: PositiveInt = 5, columns: PositiveInt = 10, images: Images | None = None) -> Figure:
    """From test image to test image, along the straight line and along the arc: two rows for each of n pairs.

    `images` are the indices of the pairs, one after the other; by default the first of each digit. At both ends of a
    row stands the image itself. A conditional model decodes a row with the label of its first image.
    """
    indices = list(images or first_of_each_digit(run))[: 2 * n]
    if not images:  # of an odd number of classes the last stays out; of one class, two of its images
        indices = indices[: len(indices) // 2 * 2] or [0, 1]
    if len(indices) % 2:
        raise ConfigError(f"images={indices}: pairs are needed, and these are {len(indices)}")
    x, labels = chosen(run, indices)
    ends = x.unflatten(0, (-1, 2)).movedim(1, 0)  # [2, pairs, …]
    start, end = run.model.codes(x, labels).unflatten(0, (-1, 2)).movedim(1, 0)
    paths = [
        torch.cat([ends[:1], run.model.pictures(path(start, end, columns), labels[::2]), ends[1:]])
        for path in (line, arc)
    ]
    rows = torch.stack(paths).movedim(2, 0).flatten(0, 1)  # line and arc of the first pair, of the second, …
    names = ["image", *[""] * columns, "image"]
    return figures.labelled_rows(rows, ["line", "arc"] * (len(indices) // 2), names)


def decode(run: Run, z: Points, columns: PositiveInt = 10) -> Tensor:
    """The images at given latents: one, [0.5, 0], or several, [[0.5, 0], [2, 0]]."""
    points = run.model.latents(z)
    pictures = run.model.pictures(points.reshape(-1, run.model.latent_dim))
    return figures.image_grid(pictures, min(columns, len(pictures)))


def nearest(run: Run, n: PositiveInt = 10, temperature: Positive = 1.0, seed: Seed = 0) -> Figure:
    """n samples above the training images nearest to them: have digits been learnt by heart?

    Above each sample stands the Euclidean distance to the nearest.
    """
    torch.manual_seed(seed)
    x = prior_samples(run, n, temperature)
    distances, neighbours = nearest_images(x, run.data.train_images, k=3)
    rows = torch.stack([x, *run.model.images(neighbours.flatten(0, 1)).unflatten(0, (3, n))])
    names = ["sample", "nearest", "second", "third"]
    return figures.labelled_rows(rows, names, [f"{distance:.1f}" for distance in distances[0].tolist()])


def walk(run: Run, columns: PositiveInt = 12, images: Images | None = None) -> list[Tensor]:
    """The frames of a round trip from test image to test image along arcs, `columns` frames from each to the next."""
    codes = run.model.codes(*chosen(run, images or first_of_each_digit(run)))
    legs = [arc(start, end, columns + 1)[:-1] for start, end in pairwise([*codes, codes[0]])]
    return [figures.image_grid(image.unsqueeze(0), 1) for image in run.model.pictures(torch.cat(legs))]


Picture = Tensor | Figure | list[Tensor]
PICTURES: dict[str, Callable[..., Picture]] = {
    function.__name__: function
    for function in (samples, reconstructions, manifold, scatter, traversals, interpolations, decode, nearest, walk)
}


@torch.inference_mode()
def generate_run(
    run: str,
    what: Literal[tuple(PICTURES)],  # type: ignore[valid-type]
    format: Literal["png", "pdf", "svg"] = "png",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    data_root: str | None = None,
    trust: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Draw one picture of a run into its figures/, and return the file's path. Raises UserError for what does not fit.

    `options` are those of the function of that name above. One that this picture has no use for is refused, as is one
    out of range: the functions' type hints say so. The options are part of the file's name,
    manifold_plane=principal.png, so that no picture takes the place of another.
    """
    function = PICTURES[what]
    arguments = {name: value for name, value in options.items() if value is not None}
    if what == "decode" and "z" not in arguments:
        raise ConfigError("what=decode: wants latents to decode, such as z=[0.5,0] or z=[[0.5,0],[2,0]]")
    takes = [name for name in signature(function).parameters if name != "run"]
    for name in arguments:
        if name not in takes:
            others = [what for what, picture in PICTURES.items() if name in signature(picture).parameters]
            raise ConfigError(f"what={what}: takes {', '.join(takes)}, not {name}, which is for {', '.join(others)}")
    try:
        check_arguments(function, arguments, "", given=("run",))
    except ConfigError as error:
        raise ConfigError(f"what={what}: {error}") from None
    if what == "walk" and format != "png":
        raise ConfigError(f"what=walk: is an animated GIF, and not format={format}")
    opened = open_run(run, accelerator, trust, data_root)
    picture = function(opened, **arguments)
    suffix = "gif" if isinstance(picture, list) else format
    given = [f"{key}={re.sub(r'[^a-z0-9.,-]', '', str(value))}" for key, value in sorted(arguments.items())]
    name = "_".join([what, *given])
    path = opened.directory.subdirectory(opened.directory.figures) / f"{name[:200]}.{suffix}"
    figures.save(picture, path)
    return path


def prior_samples(run: Run, n: int, temperature: float) -> Tensor:
    """n images from the prior of a VAE. Raises ConfigError for a model that has none."""
    if not isinstance(run.model, VAE):
        raise ConfigError(f"run={run.directory}: holds an autoencoder, which has no prior to draw samples from")
    return run.model.sample(n, temperature)


def chosen(run: Run, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Test images by index, as the model takes them, and their labels. Raises ConfigError for an index too large."""
    images = run.data.test_images
    if max(indices) >= len(images):
        raise ConfigError(f"images={max(indices)}: the test set has {len(images)}, numbered from 0")
    return run.model.images(images[list(indices)]), run.data.test_labels[list(indices)].to(run.model.device)


def codes_of_test_set(run: Run) -> Tensor:
    """The codes of all test images, `[n, latent_dim]`."""
    return run.model.all_codes(run.data.test_images, run.data.test_labels)


def first_of_each_digit(run: Run) -> list[int]:
    """The index of the first test image of every label."""
    labels = run.data.test_labels
    return [int((labels == label).nonzero()[0]) for label in labels.unique()]


def middle(run: Run, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and standard deviation of latent space, `[latent_dim]`: the prior's, or where there is none the codes'."""
    if isinstance(run.model, VAE):
        return run.model.prior_moments()
    return codes.mean(dim=0), codes.std(dim=0)


def latent_plane(run: Run, plane: Plane | None) -> tuple[Tensor, Tensor, tuple[str, str]]:
    """A plane of latent space: its centre `[latent_dim]`, two axes `[2, latent_dim]` a standard deviation long, names.

    Two dimensions, counted from 1, or the two principal directions of the test set's codes. Raises ConfigError.
    """
    d = run.model.latent_dim
    if plane is None and d != 2:
        others = "; say plane=principal, or plane=[1,2]" if d > 2 else ", and a plane needs two"
        raise ConfigError(f"run={run.directory}: has latent_dim={d}, and not 2{others}")
    codes = codes_of_test_set(run)
    if plane == "principal":
        directions, deviations = principal_directions(codes)
        if d < 2:
            raise ConfigError(f"plane=principal: the run has latent_dim={d}, and a plane needs 2")
        return (
            codes.mean(dim=0),
            directions[:2] * deviations[:2, None],
            ("first principal direction", "second principal direction"),
        )
    across, up = plane or (1, 2)
    assert isinstance(across, int)
    assert isinstance(up, int)
    if max(across, up) > d or across == up:
        raise ConfigError(f"plane=[{across},{up}]: two different dimensions from 1 to latent_dim={d} are needed")
    center, spread = middle(run, codes)
    axes = torch.diag(spread)[[across - 1, up - 1]]
    return center, axes, (f"$z_{{{across}}}$", f"$z_{{{up}}}$")


def nearest_images(x: Tensor, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k of `images` `[n, …]`, bytes, nearest to each of x `[m, …]` in [0, 1], and their Euclidean distances.

    Distances `[k, m]`, images `[k, m, …]`.
    """
    flat = x.flatten(1).cpu()
    distances = torch.cat([torch.cdist(flat, part.flatten(1).cpu().float() / 255) for part in images.split(10_000)], 1)
    nearest = distances.topk(k, dim=1, largest=False)
    return nearest.values.T, images.cpu()[nearest.indices.T]
