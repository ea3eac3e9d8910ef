"""Geometry of L_p balls."""

import math

import pytest
import torch

from utils.perturb import Norm, Start, initial_perturbation, project


def image(*values: float) -> torch.Tensor:
    """One image of a row of pixels in one channel."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("norm", "bound", "delta", "expected"),
    [
        ("L_inf", 0.2, (0.3, -0.5, 0.1, 0.2), (0.2, -0.2, 0.1, 0.2)),  # value by value
        ("L2", 1.0, (3.0, 4.0, 0.0), (0.6, 0.8, 0.0)),  # length 5, scaled by 1/5
        ("L2", 5.0, (3.0, 4.0, 0.0), (3.0, 4.0, 0.0)),  # on the sphere
        ("L2", 9.0, (3.0, 4.0, 0.0), (3.0, 4.0, 0.0)),  # inside
        ("L1", 2.0, (3.0, -1.0), (1.5, -0.5)),  # length 4, scaled by 2/4
        ("L1", 4.0, (3.0, -1.0), (3.0, -1.0)),
        ("Reg", 0.1, (3.0, -7.0), (3.0, -7.0)),  # no ball
        ("L_inf", 0.0, (0.3, -0.5), (0.0, 0.0)),
        ("L2", 0.0, (0.3, -0.5), (0.0, 0.0)),
        ("L1", 0.0, (0.0, 0.0), (0.0, 0.0)),  # 0/0 must not appear
        ("L2", 0.0, (0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_projection(
    norm: Norm, bound: float, delta: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    found = project(image(*delta), bound, norm)
    torch.testing.assert_close(found, image(*expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_every_image_is_projected_by_itself(norm: Norm) -> None:
    """The first is far outside and scaled, the second is inside and stays as it is, to the bit."""
    inside = image(0.1, 0.05)
    found = project(torch.cat([image(30.0, 0.0), inside]), 0.5, norm)
    assert torch.equal(found, torch.cat([image(0.5, 0.0), inside]))


@pytest.mark.parametrize("norm", ["L_inf", "L1", "L2"])
def test_a_projected_perturbation_is_inside_and_projecting_again_keeps_it(norm: Norm) -> None:
    order = {"L_inf": math.inf, "L1": 1, "L2": 2}[norm]
    delta = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = project(delta, 0.3, norm)
    assert found.shape == delta.shape
    assert torch.linalg.vector_norm(found.flatten(1), ord=order, dim=1).max() <= 0.3 * (1 + 1e-5)
    torch.testing.assert_close(project(found, 0.3, norm), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["L_inf", "L1", "L2", "Reg"])
def test_projection_keeps_the_type(norm: Norm, dtype: torch.dtype) -> None:
    assert project(torch.ones(2, 3, 2, 2, dtype=dtype), 0.5, norm).dtype == dtype


@pytest.mark.parametrize(
    ("start", "norm", "value"),
    [
        ("zero", "L_inf", 0.0),
        ("zero", "L2", 0.0),
        ("max", "L_inf", 0.2),
        ("min", "L_inf", -0.2),
        ("max", "L2", 0.2 / math.sqrt(12)),  # twelve equal values of length 0.2 together
        ("min", "L2", -0.2 / math.sqrt(12)),
        ("max", "L1", 0.2 / 12),
        ("min", "L1", -0.2 / 12),
        ("max", "Reg", 0.2),
    ],
)
def test_fixed_starts_inside_the_ball(start: Start, norm: Norm, value: float) -> None:
    """Images of 3 x 2 x 2 = 12 values."""
    images = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    found = initial_perturbation(start, 0.2, norm, images)
    torch.testing.assert_close(found, torch.full_like(images, value), rtol=1e-12, atol=0)


def test_a_random_start_is_uniform_in_0_1_before_it_is_projected() -> None:
    """The mean of 1,200 draws deviates by sqrt(1 / 12 / 1200) = 0.0083; four of them: 0.033."""
    images = torch.zeros(100, 3, 2, 2)
    found = initial_perturbation("random", 0.2, "Reg", images, torch.Generator().manual_seed(0))
    assert found.min() >= 0
    assert found.max() < 1
    assert found.mean().item() == pytest.approx(0.5, abs=0.033)
    clamped = initial_perturbation("random", 0.2, "L_inf", images, torch.Generator().manual_seed(0))
    assert torch.equal(clamped, found.clamp(max=0.2))


def test_a_random_start_depends_on_its_generator_alone() -> None:
    images = torch.zeros(4, 3, 2, 2)
    first, again, other = (
        initial_perturbation("random", 1.0, "L_inf", images, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("start", ["zero", "random", "max", "min"])
def test_a_start_has_the_type_of_the_images_and_leaves_them_alone(start: Start) -> None:
    images = torch.ones(2, 3, 2, 2, dtype=torch.float64)
    found = initial_perturbation(start, 0.2, "L2", images, torch.Generator().manual_seed(0))
    assert found.dtype == torch.float64
    found += 1
    assert (images == 1).all()
