"""Image grids and matplotlib figures of images, latents and metrics, from pure functions.

Grids are tensors `[channels, height, width]` in [0, 1], as TensorBoard's `add_image` and `save` expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

# Ten colours that colour-blind readers can distinguish (Petroff 2021, arXiv:2107.02270).
COLOURS = "#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadb".split()
# The same colours, ordered so that digits that are close in latent space (3, 5, 8; 4, 7, 9) differ most.
DIGIT_COLOURS = "#e76300 #a96b59 #b9ac70 #bd1f01 #832db6 #92dadb #94a4a2 #3f90da #717581 #ffa90e".split()
# Ten classes: nine colours that colour-blind readers can distinguish, and grey (Paul Tol's scheme "muted").
CLASS_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"),
)
SCALE = 3  # screen pixels for each image pixel in a saved grid


def image_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Arrange images `[n, channels, height, width]` in rows of `columns`: `[3, height, width]`."""
    return make_grid(displayable(images).clamp(0, 1).cpu(), nrow=columns, padding=padding, pad_value=0.5)


def displayable(images: Tensor) -> Tensor:
    """Return images `[n, channels, height, width]` with one or three channels: others as a row of grey images each."""
    n, channels, height, width = images.shape
    return images if channels in (1, 3) else images.movedim(1, 2).reshape(n, 1, height, channels * width)


def reconstruction_grid(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Arrange rows of originals, each above its reconstructions; both are `[n, channels, height, width]`."""
    # The largest number of columns from 5 to 10 that leaves the fewest cells empty: 8 pairs make one row, 25 make five.
    columns = min(len(images), min(range(10, 4, -1), key=lambda c: -len(images) % c))
    rows: list[Tensor] = []
    for originals, copies in zip(images.split(columns), reconstructions.split(columns), strict=True):
        blank = originals.new_full((columns - len(originals), *originals.shape[1:]), 0.5)
        rows += [originals, blank, copies, blank]
    return image_grid(torch.cat(rows), columns)


def manifold_latents(steps: int = 20) -> Tensor:
    """Return a steps × steps grid of latents `[steps², 2]`, at equally probable quantiles of N(0, 1).

    The first dimension increases to the right and the second upwards, as in the scatter plot of posterior means
    (Kingma & Welling 2014, figure 4).
    """
    quantiles = torch.special.ndtri(torch.linspace(0.5 / steps, 1 - 0.5 / steps, steps, dtype=torch.float64)).float()
    up, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([right, up], dim=-1).reshape(-1, 2)


def manifold_grid(
    decode: Callable[[Tensor, int | None], Tensor], steps: int = 20, labels: Sequence[int | None] = (None,)
) -> Tensor:
    """Return the decoded 2-D manifold as a grid; `decode` maps latents `[n, 2]` and a label to images.

    With several labels, the grids of all labels are side by side, five in a row.
    """
    z = manifold_latents(steps)
    return image_grid(torch.stack([image_grid(decode(z, label), steps, padding=0) for label in labels]), columns=5)


def latent_scatter(
    means: Tensor,
    labels: Tensor,
    names: tuple[str, str] = ("$z_1$", "$z_2$"),
    class_name: Callable[[int], str] = str,
) -> Figure:
    """Plot latents `[n, 2]` coloured by label, with the name of each class at its median; `names` label the axes."""
    figure, axes = new_axes(6.4, 6)
    digits = labels.unique().tolist()
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(0)).to(labels.device)
    colours = [DIGIT_COLOURS[digit % 10] for digit in labels[order].tolist()]  # shuffled: no digit covers the others
    size = 3 * max(1.0, (10_000 / len(means)) ** 0.5)
    x, y = means[order].T.cpu()
    axes.scatter(x, y, s=size, alpha=0.6, linewidths=0, c=colours)
    medians = torch.stack([means[labels == digit].median(dim=0).values for digit in digits]).cpu()
    extent = (means.amax(dim=0) - means.amin(dim=0)).max().item()
    for digit, (x, y) in zip(digits, spread_labels(medians, 0.05 * extent).tolist(), strict=True):
        box = {"fc": "white", "ec": DIGIT_COLOURS[digit % 10], "boxstyle": "round,pad=0.2"}
        if name := class_name(digit):  # none of images without labels
            axes.text(x, y, verbatim(name), ha="center", va="center", weight="bold", bbox=box)
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    return figure


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


def labelled_rows(images: Tensor, rows: Sequence[str], columns: Sequence[str] = ()) -> Figure:
    """Plot images `[rows, columns, channels, height, width]` with labels for the rows and columns."""
    many, across = images.shape[:2]
    height, width = displayable(images.flatten(0, 1)).shape[2:]
    height_of_rows = 0.5 * many * (height + 2) / (width + 2)
    figure, axes = new_axes(0.3 + 0.08 * max(map(len, rows)) + 0.5 * across, 0.35 + height_of_rows)
    show_rows(axes, images, rows, columns)
    return figure


def show_rows(axes: Axes, images: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Show images `[rows, columns, channels, height, width]` in `axes`, with labels."""
    many, across = images.shape[:2]
    shown = displayable(images.flatten(0, 1))
    grid = image_grid(shown, across).permute(1, 2, 0).numpy()
    height, width = (2 + size for size in shown.shape[-2:])  # of a cell with its border
    axes.imshow(grid, interpolation="nearest")
    axes.set_anchor("E")  # leaves the room beside the images to the labels
    axes.set_yticks([height * (row + 0.5) for row in range(many)], rows)
    axes.set_xticks([width * (column + 0.5) for column in range(across if columns else 0)], columns)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def differences(values: Tensor, images: Tensor, title: str, most: int = 10) -> Figure:
    """Plot sorted differences `[n]` in nats, above the images that gained and lost most, with index and difference.

    `images` are `[n, channels, height, width]`, bytes.
    """
    order = values.argsort().cpu()
    most = min(most, len(values) // 2)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, *below = figure.subplots(3, 1, height_ratios=[4, 1, 1])
    share, ordered = torch.linspace(0, 100, len(values)).numpy(), values.cpu()[order].numpy()
    axes.fill_between(share, ordered.clip(max=0), color=COLOURS[2], linewidth=0)
    axes.fill_between(share, ordered.clip(min=0), color=COLOURS[0], linewidth=0)
    axes.axhline(values.mean().item(), color="black", linewidth=0.8, linestyle="--", label=f"mean {values.mean():+.2f}")
    axes.margins(x=0)
    finish(axes, xlabel="share of images, %", ylabel="difference, nats per image", title=verbatim(title))
    axes.title.set_fontsize("small")
    for row, name, indices in zip(below, ("gained", "lost"), (order[-most:].flip(0), order[:most]), strict=True):
        labels = [f"{values[index]:+.1f}\n#{index}" for index in indices]
        show_rows(row, images[indices].float().div(255).unsqueeze(0), [name], labels)
        row.tick_params(labelsize="small")
    return figure


def loss_curves(history: Sequence[Mapping[str, object]]) -> Figure:
    """Plot each term against the epoch, in one panel per term; `history` has one dictionary per epoch.

    `elbo` has a panel only if it differs from the negative loss.
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
        finish(axes, title=term, xlabel="epoch", ylabel=unit(term, terms))
    return figure


def nll_curve(curve: Mapping[int, float], quantity: str) -> Figure:
    """Plot the negative importance-weighted bound against k; `curve` maps k samples to the bound in nats."""
    figure, axes = new_axes(4.8, 3.2)
    axes.plot(list(curve), [-bound for bound in curve.values()], marker="o", color=COLOURS[0])
    axes.set(xscale="log", xlabel="importance samples k", ylabel="nats per image", title=quantity)
    return figure


def unit(term: str, terms: Iterable[str]) -> str:
    """Return the unit of a term; none of a count, a share or a metric of your own."""
    if term == "mse" or (term == "loss" and "kl" not in terms and "mse" in terms):  # the loss of an autoencoder
        return "per pixel"
    if term.partition(" ")[0] == "bits_per_dim":
        return "bits per dimension"
    nats = ("loss", "elbo", "reconstruction", "kl", "mutual_information", "nll", "marginal_nll")
    return "per image" if term == "squared_error" else "nats per image" if term.partition(" ")[0] in nats else ""


def against(lines: Mapping[str, Sequence[tuple[float, float, float]]], key: str, metric: str) -> Figure:
    """Plot a metric against a configuration key, with one line of (key, mean, standard deviation) per name."""
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


def learning_curves(curves: Mapping[str, tuple[str, Sequence[tuple[int, float]]]], unit: str) -> Figure:
    """Plot one line per run; `curves` maps a run's name to (metric, points), with points (epoch, value)."""
    figure, axes = new_axes(6, 3.8)
    for (name, (_, points)), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), label=verbatim(name), color=colour, marker="." if len(points) < 2 else "")
    settled = [value for _, points in curves.values() for _, value in points[len(points) // 20 :]]
    room = 0.05 * (max(settled) - min(settled)) or 1.0
    axes.set_ylim(min(settled) - room, max(settled) + room)  # without the steep first epochs
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    metrics = " or ".join(sorted({metric for metric, _ in curves.values()}))
    finish(axes, xlabel="epoch", ylabel=f"{metrics}, {unit}")
    return figure


def rate_distortion(points: Mapping[str, tuple[float, float]]) -> Figure:
    """Plot distortion against rate, with one point (kl, reconstruction) per run and lines of equal ELBO."""
    figure, axes = new_axes(5.4, 4)
    for (name, (rate, distortion)), colour in zip(points.items(), COLOURS, strict=False):
        axes.plot(rate, distortion, marker="o", linestyle="", label=verbatim(name), color=colour)
        axes.axline((rate, distortion), slope=-1, color=colour, linewidth=0.6, linestyle=":")
    axes.plot([], [], color="grey", linewidth=0.6, linestyle=":", label="equal ELBO")
    finish(axes, xlabel="kl: rate, nats per image", ylabel="reconstruction: distortion, nats per image")
    return figure


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure of that size in inches, with axes that have no line at the top and right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def verbatim(text: str) -> str:
    """Escape `$`, so that matplotlib reads no formula in text from a configuration."""
    return text.replace("$", r"\$")


def finish(axes: Axes, **labels: str) -> None:
    """Set labels, hide the lines at the top and right, and add a legend if any line has a label."""
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")


def save(figure: Tensor | Figure | Sequence[Tensor], path: Path) -> None:
    """Write a grid or a figure to `path` in the format of its suffix, or a sequence of grids as a GIF."""
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as partial:
        if isinstance(figure, Figure):
            figure.savefig(partial, dpi=120)
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
    figure.savefig(file, dpi=120)
    return open_image(file).convert("RGB")


def enlarged(figure: Tensor, times: int = SCALE) -> Tensor:
    """Repeat each pixel of a grid `times` × `times`."""
    return interpolate(figure.unsqueeze(0), scale_factor=times, mode="nearest")[0]
