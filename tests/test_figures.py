import pytest
import torch

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

    def first_coordinate(z: torch.Tensor, label: int | None) -> torch.Tensor:
        return ((z[:, 0] + 3) / 6 + (label or 0)).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    grid = figures.manifold_grid(first_coordinate, steps=4)
    assert grid.shape == (3, 4 * 28, 4 * 28)
    assert (grid[0, 0].diff() >= 0).all()
    of_two_classes = figures.manifold_grid(first_coordinate, steps=4, labels=[0, 1])
    assert torch.equal(of_two_classes[:, 2:114, 2:114], grid)
    assert (of_two_classes[:, 2:114, 116:228] == 1).all()


def test_loss_curves_have_one_panel_per_term_and_one_line_per_split() -> None:
    rows = [{"epoch": 1, "train/loss": 3.0, "train/kl": 1.0}, {"epoch": 2, "train/loss": 2.0, "train/kl": 1.5}]
    rows[1] |= {"val/loss": 2.5}
    figure = loss_curves(rows)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "kl"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[3.0, 2.0], [2.5]]


def test_each_panel_has_the_unit_of_its_term() -> None:
    def units(**terms: float) -> list[str]:
        history = [{"epoch": 1} | {f"train/{name}": value for name, value in terms.items()}]
        return [axes.get_ylabel() for axes in loss_curves(history).axes]

    assert units(loss=0.1, mse=0.1) == ["per pixel", "per pixel"]
    assert units(loss=90.0, kl=20.0, squared_error=40.0) == ["nats per image", "nats per image", "per image"]


def test_elbo_has_a_panel_only_if_it_differs_from_the_negative_loss() -> None:
    row = {"epoch": 1, "train/loss": 3.0, "train/elbo": -3.0}
    assert [axes.get_title() for axes in loss_curves([row]).axes] == ["loss"]
    assert [axes.get_title() for axes in loss_curves([row | {"train/elbo": -2.0}]).axes] == ["loss", "elbo"]


def test_save_writes_the_format_of_the_suffix(tmp_path) -> None:
    figures.save(figures.image_grid(torch.rand(4, 1, 28, 28), 2), tmp_path / "grid.png")
    figures.save(loss_curves([{"epoch": 1, "train/loss": 1.0}]), tmp_path / "figure.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("grid.png", "figure.png"))
    figures.save(figures.image_grid(torch.rand(4, 1, 28, 28), 2), tmp_path / "grid.pdf")
    pdf = (tmp_path / "grid.pdf").read_bytes()
    assert b"/Width 62" in pdf
    assert b"/Height 62" in pdf
