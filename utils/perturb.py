"""Where perturbations start, and how they stay inside L_p balls, or learned values in (0, 1)."""

from typing import Literal

import torch

Norm = Literal["L_inf", "L1", "L2", "Reg"]
Start = Literal["zero", "random", "max", "min"]

EPSILON = 1e-7


def initial_perturbation(
    start: Start,
    bound: float,
    norm: Norm,
    images: torch.Tensor,
    generator: torch.Generator | None = None,
    part: tuple[int, slice] | None = None,
) -> torch.Tensor:
    """The perturbation before the first step, already inside the ball.

    Args:
        start: `zero`; `max` +bound everywhere; `min` -bound; `random` uniform in [0, 1).
        bound: radius of the ball, >= 0, pixel units.
        norm: the ball.
        images: (N, C, H, W) float; gives shape, dtype and device.
        generator: source of `random`, on the CPU; torch's global one if None.
        part: of how many images these are which, if several processes share a batch (`Loop.part`);
            they then get what they would get in a single process.

    Returns:
        delta: (N, C, H, W) float.
    """
    if start == "random":
        count, rows = part or (len(images), slice(None))
        shape = (count, *images.shape[1:])
        delta = torch.rand(shape, dtype=images.dtype, generator=generator)[rows].to(images.device)
    else:
        delta = torch.full_like(images, {"zero": 0.0, "max": bound, "min": -bound}[start])
    return project(delta, bound, norm)


def project(delta: torch.Tensor, bound: float, norm: Norm) -> torch.Tensor:
    """delta inside the ball of radius bound; each image is projected by itself.

    L_inf clamps each value to +-bound. L1 and L2 scale an image whose norm exceeds the bound by
    bound / norm. `Reg` leaves everything as it is.

    Shape:
        (N, C, H, W) float -> (N, C, H, W) float.
    """
    if norm == "Reg":
        return delta
    if norm == "L_inf":
        return delta.clamp(-bound, bound)
    lengths = torch.linalg.vector_norm(delta.flatten(1), ord={"L1": 1, "L2": 2}[norm], dim=1)
    scale = torch.where(lengths > bound, bound / lengths, 1.0)
    return delta * scale.view(-1, 1, 1, 1)


def to_unit(values: torch.Tensor) -> torch.Tensor:
    """tanh(v) / (2 + 1e-7) + 0.5: any float -> (0, 1)."""
    return values.tanh() / (2 + EPSILON) + 0.5
