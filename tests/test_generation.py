"""The command `vae generate …`, and the content of the figures."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, DATA, Finished, composed
from matplotlib.figure import Figure
from PIL import Image

from vae_lightning import figures
from vae_lightning.analysis import generation
from vae_lightning.config import ConfigError
from vae_lightning.figures import overview
from vae_lightning.models.estimators import kl_divergence
from vae_lightning.runs.loading import Run, open_run
from vae_lightning.training.train import train


@pytest.fixture(autouse=True)
def _overviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "overview", overview)  # without the short cut of conftest.py


@pytest.fixture
def generate(script: Callable[..., Finished]) -> Callable[..., Finished]:
    return partial(script, "vae", "generate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Return a function of overrides that trains a small model once and returns its run directory."""

    @cache
    def trained(*words: str) -> Path:
        directory = tmp_path_factory.mktemp("runs") / "run"
        train(composed("model.backbone.hidden=[16]", "figures.every=0", *words, *BRIEF), directory)
        return directory

    return trained


@pytest.fixture
def directory(trained, tmp_path: Path):
    """Return `directory("model.latent_dim=2", …)`, which returns a copy of such a run."""
    return lambda *words: Path(shutil.copytree(trained(*words), tmp_path / "run"))


FIGURES = [
    ("samples -n 6 --columns 3 --temperature 0.5 --seed 1", "samples_columns-3_n-6_seed-1_temperature-0.5.png", (2, 3)),
    ("overview", "overview.png", None),
    ("overview --dark", "overview_dark.png", None),
    ("reconstructions --images 3 18 61", "reconstructions_images-3_18_61.png", None),
    ("manifold --columns 5", "manifold_columns-5.png", None),
    ("scatter -n 200 --format pdf", "scatter_n-200.pdf", None),
    ("traversals -n 2 --columns 5 --images 7", "traversals_columns-5_images-7_n-2.png", None),
    ("interpolations -n 1 --columns 4", "interpolations_columns-4_n-1.png", None),
    ("decode --z 0.5 0", "decode_z-0.5_0.0.png", None),
    ("decode --z -0.5 0 2 0 --format svg", "decode_z--0.5_0.0_2.0_0.0.svg", None),
    ("nearest -n 3", "nearest_n-3.png", None),
    ("walk --columns 2 --images 1 2 3", "walk_columns-2_images-1_2_3.gif", None),
]


def test_every_figure_is_drawn(generate, directory) -> None:
    run = directory("model.latent_dim=2")
    for line, name, cells in FIGURES:
        what, *words = line.split()
        result = generate(what, run, *words)
        assert result.code == 0, result.err
        assert result.out.splitlines()[-1] == str(run / "figures" / name)
        if cells:
            with Image.open(run / "figures" / name) as image:
                assert image.size == tuple(3 * (30 * cell + 2) for cell in reversed(cells))
    last = generate("samples", f"{run}/checkpoints/last.ckpt", "-n", 6)
    assert last.out.splitlines()[-1] == str(run / "figures" / "samples_n-6_last.png")
    many = [generate("decode", run, "--z", *[0, 0] * 40, 0, end).out for end in (1, 2)]
    assert many[0] != many[1], "different figures have different names"
    drawn = {line.split()[0] for line, _, _ in FIGURES}
    assert drawn | {"analogies"} == set(generation.FIGURES)  # that one: test_conditional.py
    with Image.open(run / "figures" / "walk_columns-2_images-1_2_3.gif") as image:
        assert image.n_frames == 6


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "sampels RUN",
            'Unknown command "sampels". Did you mean "samples"? Available commands: overview, samples, ',
        ),
        ("samples RUN --plane 1 2", "Unknown option: --plane."),
        ("samples RUN --temprature 2", "Unknown option: --temprature. Did you mean --temperature?"),
        ("samples RUN -n 0", 'Invalid value "0" for -n: Input should be greater than or equal to 1'),
        ("samples", 'Command "generate samples" parameter --run requires an argument.'),
        ("samples nowhere", "nowhere: not a run directory"),
        ("reconstructions RUN --images 10000", "images=10000: should be less than 10000, the number of test images"),
        ("interpolations RUN --images 1 2 3", "images=[1, 2, 3]: should be pairs, an even number of indices"),
        ("manifold RUN --plane 1 4", "plane=[1,4]: should be two different dimensions from 1 to 3, the latent_dim"),
        ("manifold RUN --plane 1", "for --plane: "),
        ("decode RUN --z 0.5 0", "z=[0.5, 0.0]: should be 3 coordinates, the latent_dim, or a multiple of them"),
        ("decode RUN", "parameter --z requires an argument"),
        ("samples RUN --label 7", "label=7: the model of"),
        ("analogies RUN", "its model has no classes; train one with model.conditional=true"),
    ],
)
def test_wrong_input_gets_one_clear_line(words: str, line: str, generate, directory) -> None:
    run = directory("model.latent_dim=3")
    before = sorted(run.rglob("*"))
    result = generate(*words.replace("RUN", str(run)).split())
    assert result.code == 2
    assert line in result.err
    assert len(result.err.splitlines()) == 1
    assert sorted(run.rglob("*")) == before


def test_planes_of_larger_latent_spaces(directory) -> None:
    run = open_run(directory("model.latent_dim=5"), "cpu")

    def grid(**options) -> torch.Tensor:
        return torch.as_tensor(generation.manifold(run, **options).axes[0].images[0].get_array())

    assert grid(columns=3).shape == (84, 84, 3)
    first, last = grid(columns=2, plane=[2, 5]), grid(columns=2, plane=[5, 2])
    torch.testing.assert_close(first[28:, :28], last[28:, :28])  # low in both
    torch.testing.assert_close(first[:28, :28], last[28:, 28:])  # low in 2, high in 5
    (axes,) = generation.scatter(run, n=100).axes
    assert re.fullmatch(r"PC 1 \(\d+% of variance\)", axes.get_xlabel())
    centre = torch.cat([torch.as_tensor(points.get_offsets()) for points in axes.collections]).mean(dim=0)
    assert centre.abs().max() < 1
    (axes,) = generation.scatter(run, n=100, plane=[4, 1]).axes
    offsets = torch.cat([torch.as_tensor(points.get_offsets()) for points in axes.collections])
    codes = run.model.all_codes(run.data.test_images[:100])[:, [3, 0]]
    assert sorted(offsets[:, 0].tolist()) == pytest.approx(sorted(codes[:, 0].tolist()), abs=1e-5)


def test_traversals_move_one_dimension_at_a_time_most_active_first(directory) -> None:
    run = open_run(directory("model.latent_dim=3"), "cpu")
    seen, original = [], run.model.decode_images
    run.model.decode_images = lambda z, *labels: (seen.append(z), original(z, *labels))[1]
    figure = generation.traversals(run, n=3, columns=5)
    assert isinstance(figure, Figure)
    q = run.model.encode(run.data.test_images)
    kl = kl_divergence(q.mean, q.log_variance).mean(dim=0)
    order = kl.argsort(descending=True).tolist()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"$z_{{{dimension + 1}}}$: KL {kl[dimension]:.2f}" for dimension in order]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["−3", "−1.5", "0", "1.5", "3"]
    assert figure.get_supxlabel() == "z in standard deviations of the prior; KL in nats per image"
    for z, dimension in zip(seen, order, strict=True):
        assert (z.std(dim=0) > 0).nonzero().flatten().tolist() == [dimension]
        assert z[:, dimension].tolist() == pytest.approx([-3, -1.5, 0, 1.5, 3])


def test_nearest_training_images_are_the_nearest(directory) -> None:
    run = open_run(directory("model.latent_dim=3"), "cpu")
    run.data.train_images = run.data.train_images[:2]
    labels = generation.nearest(run, n=1).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["sample", "nearest", "second nearest"]
    images = torch.randint(256, (300, 1, 4, 4), dtype=torch.uint8)
    x = images[[7, 250]].float() / 255
    distances, found = generation.nearest_images(x, images, k=2)
    assert torch.equal(found[0], images[[7, 250]])
    assert distances[0].abs().max() < 1e-2
    exact = ((images.float() / 255 - x[0]).square().sum(dim=(1, 2, 3)).sqrt()).sort().values[1]
    torch.testing.assert_close(distances[1, 0], exact, rtol=1e-4, atol=1e-4)


def test_samples_depend_on_seed_and_temperature(directory) -> None:
    run = open_run(directory("model.latent_dim=3"), "cpu")
    one, again, other = (generation.samples(run, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    hot, cold = (run.model.sample(2_000, temperature).std(dim=0).mean() for temperature in (1.0, 0.01))
    assert cold < 0.1 * hot


def test_an_autoencoder_has_figures_but_no_prior(directory) -> None:
    run: Run = open_run(directory("model=autoencoder", "model.latent_dim=2", "data.val_size=0"), "cpu")
    for name, function in generation.FIGURES.items():
        if name in ("samples", "nearest", "analogies"):
            with pytest.raises(ConfigError, match=r"an autoencoder has no prior to sample|its model has no classes"):
                function(run)
        else:
            assert function(run, **({"z": [0.0, 1.0]} if name == "decode" else {})) is not None


OVERVIEWS = {
    "": ("latent_dim=3", ["PC 1 (", "PC 2 ("], ["original", "reconstruction", "samples", ""]),
    "two latent dimensions": ("latent_dim=2", ["$z_{1}$", "$z_{2}$"], ["original", "reconstruction", "samples", ""]),
    "one latent dimension": ("latent_dim=1", None, ["original", "reconstruction", "samples", ""]),
    "autoencoder": ("latent_dim=3 model=autoencoder", ["PC 1 (", "PC 2 ("], ["original", "reconstruction"]),
}


@pytest.mark.parametrize(("words", "axes", "rows"), OVERVIEWS.values(), ids=OVERVIEWS)
def test_the_overview_has_every_panel_that_the_model_can_fill(words, axes, rows, directory) -> None:
    run = open_run(directory(*f"model.{words}".split()), "cpu")
    figure = generation.overview(run)
    numbers, curves, *others = figure.axes
    metrics = json.loads(run.directory.metrics_file.read_text())
    written = [text.get_text() for text in numbers.texts]
    autoencoder = "autoencoder" in words
    loss = f"{metrics['test/loss']:{'.4g' if autoencoder else '.2f'}}"
    assert written[:2] == [loss, f"test/loss\n{'per pixel' if autoencoder else 'nats per image'}"]
    assert ("test/kl\nnats per image" in written) is not autoencoder
    assert "test/elbo" not in str(written), "it is the negative loss"
    assert [line.get_label() for line in curves.lines] == ["train", "val"]
    if axes:
        scatter = others.pop(0)
        assert scatter.get_xlabel().startswith(axes[0])
        assert scatter.get_ylabel().startswith(axes[1])
        assert len(scatter.texts) == 10
    assert [label.get_text() for panel in others for label in panel.get_yticklabels()] == rows
    assert f"latent_dim {run.model.latent_dim}, " in figure.get_suptitle()


def test_the_overview_of_an_unfinished_run_has_the_numbers_of_its_last_epoch(directory) -> None:
    run = open_run(directory("model.latent_dim=3"), "cpu")
    run.directory.metrics_file.unlink()
    assert generation.overview(run).axes[0].texts[1].get_text() == "val/loss\nnats per image"
    run.directory.history_file.unlink()
    with pytest.raises(ConfigError, match="has no finished epoch to draw"):
        generation.overview(run)


def test_a_moved_run_finds_its_data(directory, tmp_path: Path) -> None:
    run = directory("model.latent_dim=3", "data.pixels=threshold")
    shutil.move(run, tmp_path / "elsewhere")
    moved = open_run(tmp_path / "elsewhere", "cpu")
    assert moved.data.pixels == "threshold"
    assert moved.data.root == DATA
    assert json.loads(moved.directory.metrics_file.read_text())["pixels"] == "threshold"
    file = moved.directory.config_file
    file.write_text(file.read_text().replace(f"root: {DATA}", f"root: {tmp_path}/of/another/machine"))
    assert torch.equal(open_run(moved.directory, "cpu", data_root=str(DATA)).data.test_images, moved.data.test_images)
