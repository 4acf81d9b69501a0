import math

import pytest
import torch

from vae_lightning.models.latents import arc, by_activity, line, principal_directions


def test_paths_include_both_ends() -> None:
    start, end = torch.randn(2, 5, 8)
    for path in (line, arc):
        points = path(start, end, 7)
        assert points.shape == (7, 5, 8)
        torch.testing.assert_close(points[[0, -1]], torch.stack([start, end]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(line(start, end, 7)[3], (start + end) / 2)


def test_arc_turns_evenly_and_keeps_the_norm() -> None:
    points = arc(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), 4)
    torch.testing.assert_close(points.norm(dim=-1), torch.tensor([2, 8 / 3, 10 / 3, 4]))
    angles = torch.atan2(points[:, 1], points[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 4))


@pytest.mark.parametrize("end", [[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
def test_degenerate_arc_is_the_line(end: list[float]) -> None:
    start = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(arc(start, torch.tensor(end), 5), line(start, torch.tensor(end), 5))


def test_principal_directions_of_a_stretched_cloud() -> None:
    cloud = torch.randn(20_000, 3) @ torch.diag(torch.tensor([1.0, 5.0, 0.1])) + 7
    directions, deviations = principal_directions(cloud, 3)
    torch.testing.assert_close(directions.abs(), torch.eye(3)[[1, 0, 2]], rtol=0, atol=0.02)
    torch.testing.assert_close(deviations, torch.tensor([5.0, 1.0, 0.1]), rtol=0.05, atol=0)
    assert (directions.amax(dim=1) > 0.9).all()
    assert by_activity(cloud) == [1, 0, 2]


def test_principal_directions_of_many_dimensions() -> None:
    cloud = torch.randn(500, 6) @ torch.diag(torch.tensor([2.0, 5.0, 1.0, 3.0, 0.5, 0.1]))
    expected, deviations = principal_directions(cloud, 2)
    directions, found = principal_directions(torch.nn.functional.pad(cloud, (0, 2_000)), 2)
    torch.testing.assert_close(directions, torch.nn.functional.pad(expected, (0, 2_000)), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, deviations)


def test_one_latent_dimension_has_one_direction() -> None:
    directions, deviations = principal_directions(torch.tensor([[1.0], [3.0]]), 2)
    assert directions.tolist() == [[1.0]]
    assert deviations.item() == pytest.approx(math.sqrt(2))
