import pytest
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from vae_lightning import figures
from vae_lightning.figures import loss_curves  # the fixtures of other tests replace it in the module


def test_reconstructions_are_below_their_originals() -> None:
    originals, copies = torch.full((11, 1, 28, 28), 0.25), torch.full((11, 1, 28, 28), 0.75)
    grid = figures.reconstruction_grid(originals, copies)
    assert grid.shape == (3, 4 * 30 + 2, 6 * 30 + 2)
    centres = grid[0, 16::30, 16::30]
    blank = 0.5
    assert centres.tolist() == [[0.25] * 6, [0.75] * 6, [0.25] * 5 + [blank], [0.75] * 5 + [blank]]


def test_reconstruction_grid_fills_its_rows() -> None:
    for pairs, rows, columns in ((2, 1, 2), (8, 1, 8), (25, 5, 5), (16, 2, 8)):
        x = torch.rand(pairs, 1, 28, 28)
        assert figures.reconstruction_grid(x, x).shape == (3, 2 * rows * 30 + 2, columns * 30 + 2)


def test_image_grid_columns() -> None:
    assert figures.image_grid(torch.rand(50, 1, 28, 28), columns=10).shape == (3, 5 * 30 + 2, 10 * 30 + 2)
    assert figures.image_grid(torch.full((1, 3, 8, 8), 7.0), columns=1).max() == 1


def test_manifold_latents_are_quantiles_of_the_normal_distribution() -> None:
    z = figures.manifold_latents(steps=3)
    quantile = 0.9674216  # Φ⁻¹(5/6)
    assert z[0].tolist() == pytest.approx([-quantile, quantile], abs=1e-5)  # top left: z₁ low, z₂ high
    assert z[4].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert z[8].tolist() == pytest.approx([quantile, -quantile], abs=1e-5)

    grid = figures.manifold_grid(first_coordinate, steps=4)
    assert grid.shape == (3, 4 * 28, 4 * 28)
    assert (grid[0, 0].diff() >= 0).all()


def first_coordinate(z: torch.Tensor, label: int | None = None) -> torch.Tensor:
    return ((z[:, 0] + 3) / 6 + (label or 0)).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)


def ticks(axes: Axes) -> tuple[list[str], list[str]]:
    return tuple([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis))


def test_the_manifold_has_the_coordinates_of_its_points_on_its_axes() -> None:
    figure = figures.manifold(first_coordinate, 3, center=(0.0, 1.0), deviation=(1.0, 2.0))
    (axes,) = figure.axes
    assert ticks(axes) == (["−0.97", "0.00", "0.97"], ["−0.93", "1.00", "2.93"])
    assert figure.get_supxlabel() == "$z_1$, at quantiles of N(0, 1²)"
    assert figure.get_supylabel() == "$z_2$, at quantiles of N(1, 2²)"
    image = torch.as_tensor(axes.images[0].get_array())
    # The cell of a tick shows the decoded point of its coordinate: the second coordinate increases upwards.
    assert image[::28, ::28, 0].numpy() == pytest.approx(
        ((torch.tensor([[-0.967, 0, 0.967]] * 3) + 3) / 6).numpy(), abs=1e-3
    )
    assert axes.images[0].get_extent() == [-0.5, 2.5, -0.5, 2.5]
    panels = figures.manifold(first_coordinate, 4, [0, 1], class_name=["cat", "dog"].__getitem__).axes
    assert [panel.get_title() for panel in panels] == ["cat", "dog"]
    assert (torch.as_tensor(panels[1].images[0].get_array()) == 1).all()


def test_rows_of_a_grid_have_labels() -> None:
    x = torch.rand(16, 1, 28, 28)
    (axes,) = figures.reconstructions(x, x).axes
    assert ticks(axes)[1] == ["original", "reconstruction"] * 2
    height, *_ = axes.images[0].get_array().shape
    assert list(axes.get_yticks()) == pytest.approx([height * row / 8 for row in (1, 3, 5, 7)])
    (axes,) = figures.labelled_rows(
        torch.rand(1, 4, 3, 8, 8), ["a row"], ["one", "two", "three", "four"], "caption"
    ).axes
    assert ticks(axes) == (["one", "two", "three", "four"], ["a row"])
    assert list(axes.get_xticks()) == pytest.approx([42 * column / 8 for column in (1, 3, 5, 7)])


def test_every_class_has_its_colour_and_its_name_at_its_points() -> None:
    means = torch.tensor([[float(label), 10.0 * (label % 2)] for label in range(12) for _ in range(3)])
    labels = torch.arange(12).repeat_interleave(3)
    names = [f"class {label}" for label in range(12)]
    (axes,) = figures.latent_scatter(means, labels, class_name=names.__getitem__).axes
    found = {}  # (colour, marker) by label
    for points, marker in zip(axes.collections, figures.MARKERS, strict=False):
        for (x, _), colour in zip(points.get_offsets(), points.get_facecolors(), strict=True):
            found.setdefault(round(x), set()).add((to_hex(colour), marker))
    assert all(len(of_class) == 1 for of_class in found.values())
    assert len(set.union(*found.values())) == 12, "no two classes look the same"
    assert [found[label] for label in range(10)] == [{(c.lower(), "o")} for c in figures.CLASS_COLOURS]
    assert [text.get_text() for text in axes.texts] == names
    assert [text.get_position()[0] for text in axes.texts] == pytest.approx(range(12), abs=0.7)
    many = torch.arange(31)
    assert len(figures.latent_scatter(torch.rand(31, 2), many).axes[0].texts) == 0, "names would cover the points"
    unlabelled = figures.latent_scatter(torch.rand(4, 2), torch.full((4,), -1), class_name=lambda label: "").axes[0]
    assert len(unlabelled.texts) == 0


def test_no_two_of_nine_class_colours_look_alike_to_the_colour_blind() -> None:
    # Linear RGB as seen without the long-wave and without the middle-wave cones (Viénot et al. 1999).
    protan = torch.tensor([[0.1124, 0.8876, 0.0], [0.1124, 0.8876, 0.0], [0.004, -0.004, 1.0]])
    deutan = torch.tensor([[0.2925, 0.7075, 0.0], [0.2925, 0.7075, 0.0], [-0.0223, 0.0223, 1.0]])
    colours = torch.tensor([to_rgb(colour) for colour in figures.CLASS_COLOURS[:9]])  # the tenth is grey
    for seen in (torch.eye(3), protan, deutan):
        shown = (colours**2.2 @ seen.T).clamp(0, 1) ** (1 / 2.2)
        assert torch.nn.functional.pdist(shown).min() > 0.12


def test_figures_are_dark_in_a_dark_style() -> None:
    def colours() -> list[str]:
        figure = loss_curves([{"epoch": 1, "train/loss": 3.0}])
        axes = figure.axes[0]
        return [to_hex(c) for c in (figure.get_facecolor(), axes.xaxis.label.get_color(), axes.lines[0].get_color())]

    light = colours()
    assert light[0] == "#ffffff"
    with style.context("vae_lightning.dark"):
        dark = colours()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert colours() == light
    with style.context("dark_background"):
        assert colours() == dark, "whichever dark style a notebook has"


def test_a_curve_is_cut_to_its_settled_epochs_and_says_so() -> None:
    losses = [500.0, 120.0, 110.0, 105.0, 103.0, 102.0, 101.0, 100.5, 100.2, 100.0]
    (axes,) = loss_curves([{"epoch": n, "train/loss": loss} for n, loss in enumerate(losses, 1)]).axes
    assert axes.get_title(loc="right") == "axis cut to epochs 3–10"
    low, high = axes.get_ylim()
    assert low < 100
    assert 110 < high < 120
    (axes,) = loss_curves([{"epoch": n, "train/loss": 110.0 - n} for n in range(1, 11)]).axes
    assert axes.get_title(loc="right") == ""
    assert axes.get_ylim()[1] > 109


def test_the_spread_over_seeds_is_drawn() -> None:
    lines = {"MLP": [(2.0, [150.0, 152.0, 151.0]), (20.0, [100.0])], "Conv": [(2.0, [145.0, 147.0])]}
    (axes,) = figures.against(lines, "latent_dim", "test/loss").axes
    mlp, _ = axes.containers
    assert mlp.lines[0].get_ydata().tolist() == [151.0, 100.0]
    low, high = axes.get_ylim()
    assert low < 100
    assert high > 152
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["MLP", "Conv"]
    segments = [segment[:, 1].tolist() for segment in mlp.lines[2][0].get_segments()]
    assert segments == [pytest.approx([150.0, 152.0]), pytest.approx([100.0, 100.0])]
    seeds = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert seeds == [[150.0, 152.0, 151.0, 100.0], [145.0, 147.0]]
    curves = {"MLP": [[(1, 3.0), (2, 2.0)], [(1, 4.0), (2, 3.0)]], "Conv": [[(1, 2.0), (2, 1.0)]]}
    (axes,) = figures.learning_curves(curves, "val/loss").axes
    assert [line.get_color() for line in axes.lines] == ["#3f90da", "#3f90da", "#ffa90e"]
    (axes,) = figures.rate_distortion({"MLP": [(10.0, 90.0), (12.0, 88.0)]}).axes
    assert axes.lines[0].get_xydata().tolist() == [[10.0, 90.0], [12.0, 88.0]]


def test_loss_curves_have_one_panel_per_term_and_one_line_per_split() -> None:
    rows = [{"epoch": 1, "train/loss": 3.0, "train/kl": 1.0}, {"epoch": 2, "train/loss": 2.0, "train/kl": 1.5}]
    rows[1] |= {"val/loss": 2.5}
    figure = loss_curves(rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss\nnats per image", "kl\nnats per image"]
    train, val = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in (train, val)] == [[3.0, 2.0], [2.5]]
    assert train.get_color() == val.get_color()
    assert train.get_linestyle() != val.get_linestyle()


def test_each_panel_has_the_unit_of_its_term() -> None:
    def units(**terms: float) -> list[str]:
        history = [{"epoch": 1} | {f"train/{name}": value for name, value in terms.items()}]
        return [axes.get_ylabel().split("\n")[1] for axes in loss_curves(history).axes]

    assert units(loss=0.1, mse=0.1) == ["per pixel", "per pixel"]
    assert units(loss=90.0, kl=20.0, squared_error=40.0) == ["nats per image", "nats per image", "per image"]


def test_elbo_has_a_panel_only_if_it_differs_from_the_negative_loss() -> None:
    row = {"epoch": 1, "train/loss": 3.0, "train/elbo": -3.0}
    assert len(loss_curves([row]).axes) == 1
    assert loss_curves([row | {"train/elbo": -2.0}]).axes[1].get_ylabel() == "elbo\nnats per image"


def test_save_writes_the_format_of_the_suffix(tmp_path) -> None:
    figures.save(figures.image_grid(torch.rand(4, 1, 28, 28), 2), tmp_path / "grid.png")
    figures.save(loss_curves([{"epoch": 1, "train/loss": 1.0}]), tmp_path / "figure.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("grid.png", "figure.png"))
    figures.save(figures.image_grid(torch.rand(4, 1, 28, 28), 2), tmp_path / "grid.pdf")
    pdf = (tmp_path / "grid.pdf").read_bytes()
    assert b"/Width 62" in pdf
    assert b"/Height 62" in pdf
