"""Image grids and matplotlib figures of images, latents and metrics, from pure functions.

Grids are tensors `[channels, height, width]` in [0, 1], as TensorBoard's `add_image` and `save` expect. Figures are as
wide as half a printed page, in the style of style.mplstyle. They are dark within a dark style of matplotlib:
`with matplotlib.style.context("vae_lightning.dark"): …`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any, ParamSpec, TypeVar

import torch
from matplotlib import rcParams, style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory
from PIL.Image import Image
from PIL.Image import open as open_image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from vae_lightning.files import atomic_write

# Ten classes: nine colours that colour-blind readers can distinguish, and grey (Paul Tol's scheme "muted").
CLASS_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB"),
)
MARKERS = "o^sDv"  # of classes 0 to 9, 10 to 19, …, which have the same colours
MOST_NAMES = 30  # of classes in a scatter plot; more would cover the points
WIDTH = 3.3  # inches: half a page
SCALE = 3  # screen pixels for each image pixel in a saved grid

P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw with style.mplstyle, and with dark.mplstyle where the text colour of matplotlib is light."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        with style.context(["vae_lightning.style", *["vae_lightning.dark"] * is_dark()]):
            return draw(*args, **kwargs)

    return drawn


def is_dark() -> bool:
    return sum(to_rgb(rcParams["text.color"])) > 1.5


def colour(index: int) -> str:
    """Return a colour of the style for lines. Its name, C0, would stand for that of the style in which it is saved."""
    return to_hex(f"C{index}")


def image_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Arrange images `[n, channels, height, width]` in rows of `columns`: `[3, height, width]`."""
    return make_grid(displayable(images).clamp(0, 1).cpu(), nrow=columns, padding=padding, pad_value=0.5)


def displayable(images: Tensor) -> Tensor:
    """Return images `[n, channels, height, width]` with one or three channels: others as a row of grey images each."""
    n, channels, height, width = images.shape
    return images if channels in (1, 3) else images.movedim(1, 2).reshape(n, 1, height, channels * width)


def reconstruction_grid(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Arrange rows of originals, each above its reconstructions; both are `[n, channels, height, width]`."""
    columns = columns_of_pairs(len(images))
    rows: list[Tensor] = []
    for originals, copies in zip(images.split(columns), reconstructions.split(columns), strict=True):
        blank = originals.new_full((columns - len(originals), *originals.shape[1:]), 0.5)
        rows += [originals, blank, copies, blank]
    return image_grid(torch.cat(rows), columns)


def columns_of_pairs(n: int) -> int:
    """Return the largest number from 5 to 10 that leaves the fewest cells empty: 8 pairs make one row, 25 make five."""
    return min(n, min(range(10, 4, -1), key=lambda columns: -n % columns))


def reconstructions(images: Tensor, copies: Tensor) -> Figure:
    """Plot `reconstruction_grid` with labels for its rows."""
    rows = -(-len(images) // columns_of_pairs(len(images)))
    return labelled_grid(reconstruction_grid(images, copies), ["original", "reconstruction"] * rows)


def labelled_rows(images: Tensor, rows: Sequence[str], columns: Sequence[str] = (), caption: str = "") -> Figure:
    """Plot images `[rows, columns, channels, height, width]` with labels for rows and columns, above a caption."""
    return labelled_grid(image_grid(images.flatten(0, 1), images.shape[1]), rows, columns, caption)


@styled
def labelled_grid(grid: Tensor, rows: Sequence[str], columns: Sequence[str] = (), caption: str = "") -> Figure:
    """Plot a grid of images with labels for its rows and columns, above a caption."""
    height, width = grid.shape[1:]
    beside = 0.12 + 0.052 * max(map(longest_line, rows))
    tallest = max(1 + row.count("\n") for row in rows)
    of_row = min(0.6, max(0.2, 0.02 + 0.1 * tallest, (WIDTH - beside) / width * height / len(rows)))  # inches
    images = of_row * len(rows) * width / height
    wide = bool(columns) and 0.045 * max(map(longest_line, columns)) > images / len(columns)
    lines = max((1 + column.count("\n") for column in columns), default=0)
    above = 0.045 * max(map(longest_line, columns)) if wide else 0.06 * bool(columns) + 0.1 * lines
    figure = Figure(figsize=(beside + images, of_row * len(rows) + 0.08 + above + 0.2 * bool(caption)))
    axes = figure.subplots()
    show_grid(axes, grid, rows, columns)
    axes.tick_params(axis="x", labelsize=6, labelrotation=90 if wide else 0)
    figure.supxlabel(caption, fontsize=rcParams["axes.labelsize"])
    return figure


def longest_line(text: str) -> int:
    """Return the number of characters of the longest line, without those that mark a formula."""
    return max(len(line) for line in text.translate({ord(mark): "" for mark in "${}_"}).split("\n"))


def show_grid(axes: Axes, grid: Tensor, rows: Sequence[str], columns: Sequence[str] = ()) -> None:
    """Show a grid of images in `axes`, with labels at the middle of its rows and columns."""
    height, width = grid.shape[1:]
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_anchor("E")  # leaves the room beside the images to the labels
    axes.set_yticks([height * (row + 0.5) / len(rows) for row in range(len(rows))], rows)
    axes.set_xticks([width * (column + 0.5) / len(columns) for column in range(len(columns))], columns)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, pad=2)
    axes.spines[:].set_visible(False)


def manifold_latents(steps: int = 20) -> Tensor:
    """Return a steps × steps grid of latents `[steps², 2]`, at equally probable quantiles of N(0, 1).

    The first dimension increases to the right and the second upwards, as in the scatter plot of posterior means
    (Kingma & Welling 2014, figure 4).
    """
    quantiles = normal_quantiles(steps)
    up, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([right, up], dim=-1).reshape(-1, 2)


def normal_quantiles(steps: int) -> Tensor:
    return torch.special.ndtri(torch.linspace(0.5 / steps, 1 - 0.5 / steps, steps, dtype=torch.float64)).float()


def manifold_grid(decode: Callable[[Tensor], Tensor], steps: int = 20) -> Tensor:
    """Return the decoded plane of `manifold_latents` as a grid; `decode` maps latents `[n, 2]` to images."""
    return image_grid(decode(manifold_latents(steps)), steps, padding=0)


@styled
def manifold(
    decode: Callable[[Tensor, int | None], Tensor],
    steps: int = 20,
    labels: Sequence[int | None] = (None,),
    names: Sequence[str] = ("$z_1$", "$z_2$"),
    center: Sequence[float] = (0.0, 0.0),
    deviation: Sequence[float] = (1.0, 1.0),
    class_name: Callable[[int], str] = str,
) -> Figure:
    """Plot the decoded plane of `manifold_latents`, one panel per label; `decode` maps latents and a label to images.

    The ticks are the coordinates of the decoded points: `center` + `deviation` · quantiles of N(0, 1).
    """
    across = min(5, len(labels))
    down = -(-len(labels) // across)
    size = (WIDTH, WIDTH - 0.1) if across == 1 else (0.4 + 1.25 * across, 0.3 + 1.4 * down)
    figure = Figure(figsize=size)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    cells = [round(cell) for cell in torch.linspace(0, steps - 1, min(steps, 6 if across == 1 else 2)).tolist()]
    quantiles = normal_quantiles(steps)
    axis = [
        f"{name}, at quantiles of N({c:.2g}, {d:.2g}²)" for name, c, d in zip(names, center, deviation, strict=True)
    ]
    for axes, label in zip(panels, labels, strict=False):
        grid = manifold_grid(lambda z, y=label: decode(z, y), steps)  # type: ignore[misc]
        axes.imshow(grid.permute(1, 2, 0).numpy(), extent=(-0.5, steps - 0.5, -0.5, steps - 0.5), aspect="auto")
        axes.set_box_aspect(grid.shape[1] / grid.shape[2])
        axes.set_title("" if label is None else verbatim(class_name(label)))
        x, y = (
            [f"{c + d * quantiles[cell]:.2f}".replace("-", "−") for cell in cells]
            for c, d in zip(center, deviation, strict=True)
        )
        axes.set_xticks(cells, x)
        axes.set_yticks(cells, y)
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    figure.supxlabel(axis[0], fontsize=rcParams["axes.labelsize"])
    figure.supylabel(axis[1], fontsize=rcParams["axes.labelsize"])
    return figure


@styled
def latent_scatter(
    means: Tensor,
    labels: Tensor,
    names: Sequence[str] = ("$z_1$", "$z_2$"),
    class_name: Callable[[int], str] = str,
) -> Figure:
    """Plot latents `[n, 2]` coloured by label, with the name of each class at its median; `names` label the axes.

    Classes from the eleventh on repeat the colours with other markers; more than 30 have no names.
    """
    figure, axes = new_axes(WIDTH - 0.2)
    show_points(axes, means.cpu(), labels.cpu(), names, class_name)
    return figure


def show_points(
    axes: Axes,
    means: Tensor,
    labels: Tensor,
    names: Sequence[str],
    class_name: Callable[[int], str],
    small: bool = False,
) -> None:
    """Show the points of `latent_scatter` in `axes`, which may be a small panel."""
    colours = torch.tensor([to_rgb(colour) for colour in CLASS_COLOURS])
    colours = colours.lerp(torch.ones(()), 0.35) if is_dark() else colours
    classes = labels.unique().tolist()
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(0))  # no class covers the others
    area = (0.5 if small else 1.0) * max(1.0, (10_000 / len(means)) ** 0.5)
    for group in range(int(labels.max()) // 10 + 1):
        of_group = order[labels[order].clamp(min=0) // 10 == group]
        x, y = means[of_group].T
        c = colours[labels[of_group] % 10].numpy()  # -1, no label: grey
        marker = MARKERS[group % len(MARKERS)]
        axes.scatter(x, y, s=area, c=c, marker=marker, alpha=0.7, linewidths=0, rasterized=True)
    named = [label for label in classes if class_name(label)] if len(classes) <= MOST_NAMES else []
    if named:
        medians = torch.stack([means[labels == label].median(dim=0).values for label in named])
        longest = max(len(class_name(label)) for label in named)
        # Of a name: width and height as shares of the extent, and points.
        share, points = (
            ([0.06 + 0.055 * longest, 0.115], 6 if longest < 3 else 5) if small else ([0.03 + 0.02 * longest, 0.06], 7)
        )
        size = torch.tensor(share) * (means.amax(dim=0) - means.amin(dim=0)).max()
        for label, (x, y) in zip(named, (spread_labels(medians / size, 1.0) * size).tolist(), strict=True):
            box = {"fc": axes.get_facecolor(), "ec": colours[label % 10].tolist(), "boxstyle": "round,pad=0.15"}
            text = verbatim(class_name(label))
            axes.text(x, y, text, ha="center", va="center", fontsize=points, weight="bold", bbox=box)
    axes.set_xlabel(names[0], fontsize=6 if small else None)
    axes.set_ylabel(names[1], fontsize=6 if small else None)
    axes.set_aspect("equal", adjustable="datalim")


def spread_labels(points: Tensor, distance: float) -> Tensor:
    """Move points `[n, 2]` apart until no two are much closer than `distance`."""
    n = len(points)
    points = points.double() + 1e-6 * distance * torch.arange(n).unsqueeze(1)  # equal points move apart too
    for _ in range(100):
        apart = points.unsqueeze(1) - points  # [n, n, 2]
        length = apart.norm(dim=-1, keepdim=True)
        push = (distance - length).clamp(min=0) / 2
        points = points + (push * normalize(apart, dim=-1)).sum(dim=1)
    return points.float()


@styled
def differences(values: Tensor, images: Tensor, title: str, most: int = 8) -> Figure:
    """Plot sorted differences `[n]` in nats, above the images that gained and lost most, with index and difference.

    `images` are `[n, channels, height, width]`, bytes.
    """
    order = values.argsort().cpu()
    most = min(most, len(values) // 2)
    figure = Figure(figsize=(WIDTH, 3.4))
    axes, *below = figure.subplots(3, 1, height_ratios=[3, 1, 1])
    share, ordered = torch.linspace(0, 100, len(values)).numpy(), values.cpu()[order].numpy()
    axes.fill_between(share, ordered.clip(max=0), color=colour(2), linewidth=0)
    axes.fill_between(share, ordered.clip(min=0), color=colour(0), linewidth=0)
    dashes = {"color": rcParams["text.color"], "linewidth": 0.8, "linestyle": "--"}
    axes.axhline(values.mean().item(), **dashes, label=f"mean {values.mean():+.2f}")
    axes.margins(x=0)
    finish(axes, xlabel="share of images, %", ylabel="difference, nats per image")
    axes.set_title("\n".join(verbatim(fill(line, 50)) for line in title.split("\n")), fontsize=7)
    for row, name, indices in zip(below, ("gained", "lost"), (order[-most:].flip(0), order[:most]), strict=True):
        columns = [f"{values[index]:+.1f}\n#{index}".replace("-", "−") for index in indices]
        show_grid(row, image_grid(images[indices].float().div(255), most), [name], columns)
        row.tick_params(axis="x", labelsize=6)
    return figure


@styled
def loss_curves(history: Sequence[Mapping[str, object]]) -> Figure:
    """Plot each term against the epoch, in one panel per term; `history` has one dictionary per epoch.

    `elbo` has a panel only if it differs from the negative loss.
    """
    terms = terms_of(history[0])
    if "elbo" in terms and all(row["train/elbo"] == -row["train/loss"] for row in history):  # type: ignore[operator]
        terms.remove("elbo")
    figure = Figure(figsize=(WIDTH, 0.3 + 1.25 * len(terms)))
    for axes, term in zip(figure.subplots(len(terms), 1, sharex=True, squeeze=False)[:, 0], terms, strict=True):
        show_curves(axes, history, term)
    finish(figure.axes[0])
    figure.axes[-1].set_xlabel("epoch")
    return figure


def terms_of(row: Mapping[str, object]) -> list[str]:
    """Return the terms of an epoch, such as `loss` of `train/loss` and `val/loss`."""
    return list(dict.fromkeys(key.split("/")[1] for key in row if key.startswith(("train/", "val/"))))


def show_curves(axes: Axes, history: Sequence[Mapping[str, object]], term: str) -> None:
    """Show a term of training, dashed, and of validation, both in one hue, against the epoch."""
    for split, dashes in (("train", "--"), ("val", "-")):
        points = [(row["epoch"], row[f"{split}/{term}"]) for row in history if row.get(f"{split}/{term}") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), dashes, color=colour(0), label=split, marker="." * (len(points) < 2))
    axes.set_ylabel(f"{term}\n{unit(term, terms_of(history[0]))}".rstrip())
    cut_to_settled(axes)


def cut_to_settled(axes: Axes) -> None:
    """Cut the axis of curves over epochs to the values after the first fifth of the epochs, and say so above it.

    Not where the curves would gain less than half of the axis, and not for fewer than four epochs.
    """
    points = [point for line in axes.lines for point in line.get_xydata().tolist()]  # type: ignore[union-attr]
    last = round(max(epoch for epoch, _ in points))
    first = 1 + max(1, last // 5)
    values = [value for _, value in points]
    settled = [value for epoch, value in points if epoch >= first]
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if last >= 4 and settled and max(values) - min(values) > 2 * (room := max(settled) - min(settled)) > 0:
        axes.set_ylim(min(settled) - 0.1 * room, max(settled) + 0.1 * room)
        axes.set_title(f"axis cut to epochs {first}–{last}", loc="right", fontsize=6)


@styled
def nll_curve(curve: Mapping[int, float], quantity: str) -> Figure:
    """Plot the negative importance-weighted bound against k; `curve` maps k samples to the bound in nats."""
    figure, axes = new_axes()
    axes.plot(list(curve), [-bound for bound in curve.values()], marker="o")
    axes.set(xscale="log", xlabel="importance samples k", ylabel="nats per image", title=quantity)
    return figure


def unit(term: str, terms: Iterable[str]) -> str:
    """Return the unit of a term; none of a count, a share or a metric of your own."""
    if term == "mse" or (term == "loss" and "kl" not in terms and "mse" in terms):  # the loss of an autoencoder
        return "per pixel"
    if term.partition(" ")[0] == "bits_per_dim":
        return "bits per dimension"
    nats = ("loss", "elbo", "reconstruction", "kl", "mutual_information", "nll", "marginal_nll")
    if term.partition(" ")[0] in nats or re.fullmatch(r"kl_\d+", term):  # of a level of latents
        return "nats per image"
    return "per image" if term == "squared_error" else ""


@styled
def against(lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]], key: str, metric: str) -> Figure:
    """Plot a metric against a configuration key, with one line of (key, values of the seeds) per name.

    A line joins the means. Each seed is a point, and the bar is the standard deviation over seeds.
    """
    figure, axes = new_axes(2.5 + 0.14 * len(lines))
    for index, (name, points) in enumerate(lines.items()):
        x, values = zip(*sorted(points), strict=True)
        means = [mean(of_seeds) for of_seeds in values]
        deviations = [stdev(of_seeds) if len(of_seeds) > 1 else 0.0 for of_seeds in values]
        each = [(at, value) for at, of_seeds in zip(x, values, strict=True) for value in of_seeds]
        label = verbatim(name) or None
        bars = axes.errorbar(x, means, deviations, color=colour(index), label=label, marker="_", markersize=7)
        seeds = axes.plot(*zip(*each, strict=True), "o", color=colour(index), alpha=0.6, markeredgewidth=0)
        aside = ScaledTranslation((index - (len(lines) - 1) / 2) * 4 / 72, 0, figure.dpi_scale_trans)
        for artist in (*bars.get_children(), *seeds):
            artist.set_transform(axes.transData + aside)  # so that no line hides the bars of another
    ticks = sorted({point[0] for points in lines.values() for point in points})
    if ticks[0] > 0 and ticks[-1] / ticks[0] > 8:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=key, ylabel=metric)
    add_legend_below(figure)
    return figure


@styled
def learning_curves(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], metric: str) -> Figure:
    """Plot a line per seed; `curves` maps a name to the (epoch, value) points of each of its seeds."""
    figure, axes = new_axes(2.5 + 0.14 * len(curves))
    for index, (name, seeds) in enumerate(curves.items()):
        for n, points in enumerate(seeds):
            label = verbatim(name) if n == 0 else None
            marker = "." if len(points) < 2 else ""
            axes.plot(*zip(*points, strict=True), label=label, color=colour(index), marker=marker, linewidth=0.8)
    cut_to_settled(axes)
    axes.set(xlabel="epoch", ylabel=metric)
    add_legend_below(figure)
    return figure


@styled
def rate_distortion(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Plot distortion against rate: a point (kl, reconstruction) per seed, and equal ELBO through the mean."""
    figure, axes = new_axes(2.7 + 0.14 * len(points))
    for index, (name, seeds) in enumerate(points.items()):
        rates, distortions = zip(*seeds, strict=True)
        axes.plot(rates, distortions, "o", label=verbatim(name), color=colour(index), alpha=0.7, markeredgewidth=0)
        axes.axline((mean(rates), mean(distortions)), slope=-1, color=colour(index), linewidth=0.6, linestyle=":")
    axes.plot([], [], color="grey", linewidth=0.6, linestyle=":", label="equal ELBO")
    axes.set(xlabel="rate: kl, nats per image", ylabel="distortion: reconstruction, nats per image")
    add_legend_below(figure)
    return figure


@styled
def overview(
    title: str,
    numbers: Mapping[str, float],
    history: Sequence[Mapping[str, object]],
    grids: Sequence[tuple[Tensor, Sequence[str]]],
    points: tuple[Tensor, Tensor, Sequence[str]] | None = None,
    class_name: Callable[[int], str] = str,
) -> Figure:
    """Plot a run: its numbers, loss curves and latent space, and grids of images, each with labels for its rows.

    `numbers` are metrics such as `test/loss`; `points` are latents `[n, 2]`, labels `[n]` and the names of the axes, or
    None for a latent space that has no plane.
    """
    heights = [0.36, 1.3, *((WIDTH - 0.85) / grid.shape[2] * grid.shape[1] for grid, _ in grids)]  # inches
    figure = Figure(figsize=(WIDTH, 1.25 + sum(heights)))
    places = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.suptitle(verbatim(title), x=0.02, ha="left", fontsize=7)
    axes = figure.add_subplot(places[0, :])
    axes.axis("off")
    across = blended_transform_factory(figure.transFigure, axes.transAxes)
    place: dict[str, Any] = {"ha": "center", "in_layout": False, "transform": across}
    for column, (name, value) in enumerate(numbers.items()):
        of = unit(name.partition("/")[2], terms_of(history[0]))
        digits = ".4g" if "per image" not in of else ".2f" if abs(value) < 1_000 else ".1f"
        x = (column + 0.5) / len(numbers)
        axes.text(x, 1, f"{value:{digits}}", va="top", fontsize=11 if len(numbers) < 4 else 9, weight="bold", **place)
        axes.text(x, 0, verbatim(f"{name}\n{of}"), va="bottom", fontsize=6, **place)
    axes = figure.add_subplot(places[1, 0] if points else places[1, :])
    show_curves(axes, history, "loss")
    finish(axes, xlabel="epoch")
    if points:
        means, labels, names = points
        axes = figure.add_subplot(places[1, 1])
        show_points(axes, means.cpu(), labels.cpu(), names, class_name, small=True)
    for row, (grid, labels_of_rows) in enumerate(grids, start=2):
        axes = figure.add_subplot(places[row, :])
        show_grid(axes, grid, labels_of_rows)
        axes.tick_params(labelsize=6)
    return figure


def new_axes(height: float = 2.5) -> tuple[Figure, Axes]:
    """Create a figure of that height in inches, as wide as half a page, with axes."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def verbatim(text: str) -> str:
    """Escape `$`, so that matplotlib reads no formula in text from a configuration."""
    return text.replace("$", r"\$")


def finish(axes: Axes, **labels: str) -> None:
    """Set labels, and add a legend if any line has a label."""
    axes.set(**labels)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def add_legend_below(figure: Figure) -> None:
    """Add a legend below the axes, where names of runs cover no line, if any line has a label."""
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower left")


@styled
def save(figure: Tensor | Figure | Sequence[Tensor], path: Path) -> None:
    """Write a grid or a figure to `path` in the format of its suffix, or a sequence of grids as a GIF."""
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as partial:
        if isinstance(figure, Figure):
            figure.savefig(partial)
        elif not isinstance(figure, Tensor):
            frames = [to_pil_image(enlarged(frame, 2 * SCALE)) for frame in figure]
            frames[0].save(partial, save_all=True, append_images=frames[1:], duration=60, loop=0)
        elif path.suffix == ".png":
            save_image(enlarged(figure), partial)
        else:
            imsave(partial, figure.permute(1, 2, 0).numpy(), dpi=60)


def as_pil(figure: Tensor | Figure) -> Image:
    """Convert a grid or a figure to an image of the Python Imaging Library."""
    if isinstance(figure, Tensor):
        return to_pil_image(enlarged(figure))
    file = BytesIO()
    figure.savefig(file)
    return open_image(file).convert("RGB")


def enlarged(figure: Tensor, times: int = SCALE) -> Tensor:
    """Repeat each pixel of a grid `times` × `times`."""
    return interpolate(figure.unsqueeze(0), scale_factor=times, mode="nearest")[0]
