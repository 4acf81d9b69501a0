"""Pictures from images and latents: pure functions that return an image grid or a matplotlib figure.

Grids are tensors `[channels, height, width]` in [0, 1], ready for TensorBoard's `add_image` and for `save`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from PIL.Image import Image
from PIL.Image import open as open_image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from vae_lightning.files import atomic_write

# Ten colours told apart by colour-blind readers (Petroff 2021, arXiv:2107.02270).
COLOURS = "#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadb".split()
# The same, dealt to the digits so that those that lie side by side in latent space (3, 5, 8; 4, 7, 9) differ most.
DIGIT_COLOURS = "#e76300 #a96b59 #b9ac70 #bd1f01 #832db6 #92dadb #94a4a2 #3f90da #717581 #ffa90e".split()
SCALE = 3  # screen pixels for each image pixel in a saved grid


def image_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Images `[n, channels, height, width]` in rows of `columns`."""
    return make_grid(images.clamp(0, 1).cpu(), nrow=columns, padding=padding, pad_value=0.5)


def reconstruction_grid(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Rows of originals, each above the row of its reconstructions; both `[n, channels, height, width]`."""
    # The widest of 5 to 10 columns that leaves the fewest places empty: 8 pairs make one row, 25 make five.
    columns = min(len(images), min(range(10, 4, -1), key=lambda c: -len(images) % c))
    rows: list[Tensor] = []
    for originals, copies in zip(images.split(columns), reconstructions.split(columns), strict=True):
        blank = originals.new_full((columns - len(originals), *originals.shape[1:]), 0.5)
        rows += [originals, blank, copies, blank]
    return image_grid(torch.cat(rows), columns)


def manifold_latents(steps: int = 20) -> Tensor:
    """A steps × steps grid over two latent dimensions, at equally probable quantiles of N(0, 1): `[steps², 2]`.

    The first dimension grows to the right and the second upwards, as on the scatter of posterior means
    (Kingma & Welling 2014, figure 4).
    """
    quantiles = torch.special.ndtri(torch.linspace(0.5 / steps, 1 - 0.5 / steps, steps, dtype=torch.float64)).float()
    up, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([right, up], dim=-1).reshape(-1, 2)


def manifold_grid(decode: Callable[[Tensor], Tensor], steps: int = 20) -> Tensor:
    """The decoded 2-D manifold; `decode` takes latents `[n, 2]` to images."""
    return image_grid(decode(manifold_latents(steps)), steps, padding=0)


def latent_scatter(means: Tensor, labels: Tensor, names: tuple[str, str] = ("$z_1$", "$z_2$")) -> Figure:
    """Codes `[n, 2]` coloured by digit, each digit named where its median lies; `names` are the axes'."""
    figure, axes = new_axes(6.4, 6)
    digits = labels.unique().tolist()
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(0)).to(labels.device)
    colours = [DIGIT_COLOURS[digit % 10] for digit in labels[order].tolist()]  # in turn, so that none covers the rest
    size = 3 * max(1.0, (10_000 / len(means)) ** 0.5)
    x, y = means[order].T.cpu()
    axes.scatter(x, y, s=size, alpha=0.6, linewidths=0, c=colours)
    medians = torch.stack([means[labels == digit].median(dim=0).values for digit in digits]).cpu()
    extent = (means.amax(dim=0) - means.amin(dim=0)).max().item()
    for digit, (x, y) in zip(digits, spread_labels(medians, 0.05 * extent).tolist(), strict=True):
        box = {"fc": "white", "ec": DIGIT_COLOURS[digit % 10], "boxstyle": "round,pad=0.2"}
        axes.text(x, y, digit, ha="center", va="center", weight="bold", bbox=box)
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    return figure


def spread_labels(points: Tensor, distance: float) -> Tensor:
    """Move points `[n, 2]` apart until no two are much closer than `distance`."""
    n = len(points)
    points = points.double() + 1e-6 * distance * torch.arange(n).unsqueeze(1)  # points that coincide move apart too
    for _ in range(100):
        apart = points.unsqueeze(1) - points  # [n, n, 2]
        length = apart.norm(dim=-1, keepdim=True)
        push = (distance - length).clamp(min=0) / 2
        points = points + (push * normalize(apart, dim=-1)).sum(dim=1)
    return points.float()


def labelled_rows(images: Tensor, rows: Sequence[str], columns: Sequence[str] = ()) -> Figure:
    """Images `[rows, columns, channels, height, width]`, with a label before each row and above each column."""
    many, across = images.shape[:2]
    grid = image_grid(images.flatten(0, 1), across).permute(1, 2, 0).numpy()
    height, width = (2 + size for size in images.shape[-2:])  # of a cell, its border included
    figure, axes = new_axes(0.9 + 0.5 * across, 0.35 + 0.5 * many * height / width)
    axes.imshow(grid, interpolation="nearest")
    axes.set_yticks([height * (row + 0.5) for row in range(many)], rows)
    axes.set_xticks([width * (column + 0.5) for column in range(across if columns else 0)], columns)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def loss_curves(history: Sequence[Mapping[str, object]]) -> Figure:
    """Every term on every split against the epoch, one panel a term; `history` has a dictionary an epoch.

    `elbo` gets one only where it is more than the loss with its sign turned.
    """
    terms = list(dict.fromkeys(key.split("/")[1] for key in history[0] if key.startswith(("train/", "val/"))))
    if "elbo" in terms and all(row["train/elbo"] == -row["train/loss"] for row in history):  # type: ignore[operator]
        terms.remove("elbo")
    figure = Figure(figsize=(3.6 * len(terms), 3.2), layout="constrained")
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        for split, colour in (("train", COLOURS[0]), ("val", COLOURS[2])):
            key = f"{split}/{term}"
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=split, marker="." if len(points) < 2 else "")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        finish(axes, title=term, xlabel="epoch", ylabel="" if term == "mse" else "nats per image")
    return figure


def nll_curve(curve: Mapping[int, float], quantity: str) -> Figure:
    """The importance-weighted bound against the number of samples k; `curve` has the bound, in nats, for each k."""
    figure, axes = new_axes(4.8, 3.2)
    axes.plot(list(curve), [-bound for bound in curve.values()], marker="o", color=COLOURS[0])
    axes.set(xscale="log", xlabel="importance samples k", ylabel="nats per image", title=quantity)
    return figure


def against(lines: Mapping[str, Sequence[tuple[float, float, float]]], key: str, metric: str) -> Figure:
    """A metric against a configuration key: a line a name, of (key, mean, standard deviation); the last are bars."""
    figure, axes = new_axes(4.8, 3.6)
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        x, y, deviation = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, deviation, label=verbatim(name) or None, color=colour, marker="o", markersize=4, capsize=3)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    if ticks[0] > 0 and ticks[-1] / ticks[0] > 8:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    finish(axes, xlabel=key, ylabel=metric)
    return figure


def learning_curves(curves: Mapping[str, tuple[str, Sequence[tuple[int, float]]]]) -> Figure:
    """A line a run, of (metric, points) with points (epoch, value)."""
    figure, axes = new_axes(6, 3.8)
    for (name, (_, points)), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), label=verbatim(name), color=colour, marker="." if len(points) < 2 else "")
    settled = [value for _, points in curves.values() for _, value in points[len(points) // 20 :]]
    room = 0.05 * (max(settled) - min(settled)) or 1.0
    axes.set_ylim(min(settled) - room, max(settled) + room)  # the fall of the first epochs would flatten the rest
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    metrics = " or ".join(sorted({metric for metric, _ in curves.values()}))
    finish(axes, xlabel="epoch", ylabel=f"{metrics}, nats per image")
    return figure


def rate_distortion(points: Mapping[str, tuple[float, float]]) -> Figure:
    """Distortion against rate, (kl, reconstruction), a point a run; dotted lines join points of equal ELBO."""
    figure, axes = new_axes(5.4, 4)
    for (name, (rate, distortion)), colour in zip(points.items(), COLOURS, strict=False):
        axes.plot(rate, distortion, marker="o", linestyle="", label=verbatim(name), color=colour)
        axes.axline((rate, distortion), slope=-1, color=colour, linewidth=0.6, linestyle=":")
    axes.plot([], [], color="grey", linewidth=0.6, linestyle=":", label="equal ELBO")
    finish(axes, xlabel="kl: rate, nats per image", ylabel="reconstruction: distortion, nats per image")
    return figure


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of that size in inches, and its axes, without the lines at the top and right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def verbatim(text: str) -> str:
    """Text from a configuration, of which matplotlib must not make formulas."""
    return text.replace("$", r"\$")


def finish(axes: Axes, **labels: str) -> None:
    """Labels, and a legend where there are names for it."""
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")


def save(picture: Tensor | Figure | Sequence[Tensor], path: Path) -> None:
    """Write a grid or a figure to `path` in the format of its suffix, or frames, a grid each, as a GIF."""
    with atomic_write(path) as partial:
        if isinstance(picture, Figure):
            picture.savefig(partial, dpi=120)
        elif not isinstance(picture, Tensor):
            frames = [to_pil_image(enlarged(frame, 2 * SCALE)) for frame in picture]
            frames[0].save(partial, save_all=True, append_images=frames[1:], duration=60, loop=0)
        elif path.suffix == ".png":
            save_image(enlarged(picture), partial)
        else:
            imsave(partial, picture.permute(1, 2, 0).numpy(), dpi=60)


def as_pil(picture: Tensor | Figure) -> Image:
    """A grid or a figure as a picture of the Python Imaging Library."""
    if isinstance(picture, Tensor):
        return to_pil_image(enlarged(picture))
    file = BytesIO()
    picture.savefig(file, dpi=120)
    return open_image(file).convert("RGB")


def enlarged(picture: Tensor, times: int = SCALE) -> Tensor:
    """Each pixel of a grid as `times` × `times`."""
    return interpolate(picture.unsqueeze(0), scale_factor=times, mode="nearest")[0]
