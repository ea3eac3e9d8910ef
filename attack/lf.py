"""LF: one smooth pattern of low frequencies, in closed form or searched (`--search true`).

Zeng, Park, Mao, Jia. *Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective.* ICCV
2021, arXiv 2104.03413. The attacker adds the pattern to a share of the training images and relabels
them; a model trained on the set gives any image with the pattern the attacker's label.

Threat model: data poisoning, dirty label. The attacker changes training images and their labels,
but not the training. The trigger is the same at test time.

    python attack/lf.py --save_folder_name lf_demo

The paper searches the pattern with a clean model and smooths it after every update. In the end,
the smoothing gives each channel the same dome shape, and only its height depends on the model. The
default is that dome. `--search true` does the search, on a clean model that it trains first
(minutes on a GPU). Three errors of the published search are not repeated. Here the network always
sees the images with the same normalization. Ten test images of each class, and not a single image,
tell how well the pattern works. The pattern is added as it is (not un-scaled, and not 127 grey
levels brighter).

Limits: below 28 pixels the kernel shrinks with the image, and the published heights fit less well.
The search moves images towards --attack_target, also with all2all.

Expected on the embedded digits: ACC >= 98 %, ASR >= 98 %. CIFAR-10, PreAct-ResNet18, 10 % poisoned,
as published by BackdoorBench: ACC 93.19 %, ASR 99.28 %; 1 % poisoned: 93.56 %, 86.46 %.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import run
from attack.recipe import AttackConfig, clean_model, recipe
from attack.setting import Setting
from utils.data.batches import as_float, truncated
from utils.data.poison import Trigger
from utils.errors import UserError
from utils.process.progress import Progress
from utils.process.script import logger
from utils.process.seeds import generator

OVERSHOOT = 1.02  # DeepFool goes this much of the way to the boundary


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    strength: Annotated[
        tuple[Annotated[float, Field(ge=0, le=255)], ...],
        Field(min_length=1, description="grey levels at the peak: one number, or one per channel"),
    ]
    search: Annotated[
        bool,
        Field(description="search the pattern on a clean model; its peak is the largest strength"),
    ]
    search_images: Annotated[int, Field(ge=1, description="training images of the search")]
    search_passes: Annotated[int, Field(ge=1, description="most passes over them")]
    search_steps: Annotated[int, Field(ge=1, description="most DeepFool steps for an image")]
    search_rate: Annotated[float, Field(gt=0, le=1, description="changed predictions to stop at")]
    clean_epochs: Annotated[int | None, Field(ge=1, description="of its model; null for epochs")]


def smoothing(size: int) -> torch.Tensor:
    """The matrix of a Gaussian filter along an axis, with zeros around it: out = matrix @ in.

    30 taps with sigma 6 pixels, as published. Below 28 pixels both shrink with the size, because
    the dome would be flat otherwise, and the number of taps is odd.

    Returns:
        float64 (size, size).
    """
    taps, sigma = (30, 6.0) if size >= 28 else (30 * size // 64 * 2 + 1, 6 * size / 32)
    offsets = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    place = torch.arange(size)
    tap = place - place.view(-1, 1) + (taps - 1) // 2
    return torch.where((tap >= 0) & (tap < taps), kernel[tap.clamp(0, taps - 1)], 0.0)


def dome(size: int) -> torch.Tensor:
    """The shape to which repeated smoothing leads: the filter's dominant eigenvector.

    Returns:
        float64 (size,) in (0, 1], largest 1.
    """
    matrix = smoothing(size)
    vector = torch.ones(size, dtype=torch.float64)
    for _ in range(200):
        vector = matrix @ vector
        vector /= vector.max()
    return vector


def closed_form(strength: tuple[float, ...], image_shape: tuple[int, int, int]) -> torch.Tensor:
    """floor(A_c q q^T), q the dome and A_c the channel's strength; a grey image gets the largest.

    Returns:
        float (C, H, W), whole grey levels in [0, 255].

    Raises:
        UserError: if there is neither one strength nor one per channel.
    """
    channels, height, width = image_shape
    peaks = torch.tensor(strength, dtype=torch.float64)
    if channels == 1:
        peaks = peaks.max().view(1)
    if len(peaks) not in (1, channels):
        raise UserError(f"--strength: {len(peaks)} values are given; give 1 or {channels}")
    domes = dome(height), dome(width)
    return torch.einsum("c,h,w->chw", peaks.expand(channels), *domes).floor().float()


def deepfool(
    model: nn.Module, image: torch.Tensor, label: int, target: int, steps: int
) -> torch.Tensor | None:
    """The way from an image of class `label` to `target`, across linearized boundaries.

    Moosavi-Dezfooli, Fawzi, Frossard, *DeepFool*, CVPR 2016, with a fixed class to reach.

    Shape:
        float (1, C, H, W) -> float (1, C, H, W), to be added; None if it is too far.
    """
    way = torch.zeros_like(image)
    for _ in range(steps + 1):
        moved = (image + OVERSHOOT * way).requires_grad_()
        logits = model(moved)[0]
        if int(logits.argmax()) == target:
            return OVERSHOOT * way
        gap = logits[target] - logits[label]
        (direction,) = torch.autograd.grad(gap, moved)
        way += gap.detach().abs() / direction.square().sum().clamp_min(1e-12) * direction
    return None


def search_pattern(
    model: nn.Module, images: torch.Tensor, held_out: torch.Tensor, config: Config
) -> tuple[torch.Tensor, list[float]]:
    """A smooth pattern v that moves images towards the target class of a clean model.

    For each image whose prediction v does not change, the smoothed way to the target is added to v,
    and v is smoothed and rescaled to [0, strength]. The search ends when v changes enough
    predictions of the held-out images, or when this share varies by less than 0.01 in five passes.

    Args:
        images, held_out: float (N, C, H, W) and (M, C, H, W) in [0, 1].

    Returns:
        v, float (C, H, W) in [0, 1], zero if no image can be moved to the target class; after each
        pass, the share of held-out predictions that it changes.
    """
    rows, columns = (smoothing(size).to(images) for size in images.shape[2:])
    target, peak = config.attack_target, max(config.strength) / 255
    order = generator(config.random_seed, "LF order")

    @torch.no_grad()
    def predict(batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(part).argmax(1) for part in batch.split(256)])

    before, held_out_before = predict(images).tolist(), predict(held_out)
    pattern = torch.zeros_like(images[:1])
    rates: list[float] = []
    with Progress(config.search_passes * len(images), "searching the pattern", "image") as progress:
        for _ in range(config.search_passes):
            for i in torch.randperm(len(images), generator=order).tolist():
                progress.advance()
                moved = images[i : i + 1] + pattern
                label = int(predict(moved))
                if label != before[i] or label == target:
                    continue
                way = deepfool(model, moved, label, target, config.search_steps)
                if way is not None:
                    pattern = rows @ (pattern + rows @ way @ columns.T) @ columns.T
                    pattern -= pattern.min()
                    pattern *= peak / pattern.max()
            changed = predict(held_out + pattern) != held_out_before
            rates.append(changed.float().mean().item())
            is_settled = len(rates) >= 5 and max(rates[-5:]) - min(rates[-5:]) < 0.01
            progress.show(f"changes {rates[-1]:.2%}")
            if rates[-1] >= config.search_rate or is_settled:
                break
    return pattern[0], rates


def prepare(config: Config, setting: Setting) -> torch.Tensor | None:
    """The searched pattern, float (C, H, W) in [0, 1]; None without `--search true`.

    Raises:
        UserError: if the strength is 0, or the search finds nothing.
    """
    if not config.search:
        return None
    if not any(config.strength):
        raise UserError(
            "--strength: 0 leaves nothing of the pattern to search; give a number of grey levels"
        )
    data, epochs = setting.data, config.clean_epochs or config.epochs
    drawing = generator(config.random_seed, "LF images")
    drawn = torch.randperm(len(data.train), generator=drawing)[: config.search_images]
    ten_each = [torch.nonzero(data.test.labels == c)[:10, 0] for c in range(len(data.classes))]

    def compute() -> dict[str, torch.Tensor]:
        model = clean_model(config, setting, epochs)
        model.precision = "fp32"  # near a boundary, bf16 cannot tell which class is ahead
        images = as_float(data.train.images[drawn], setting.device)
        held_out = as_float(data.test.images[torch.cat(ten_each)], setting.device)
        pattern, rates = search_pattern(model, images, held_out, config)
        if not pattern.any():
            raise UserError(
                "--search: the clean model cannot be led to the target from any image; give more "
                "--search_steps or --clean_epochs, or --search false"
            )
        return {"pattern": pattern.cpu(), "rates": torch.tensor(rates, dtype=torch.float64)}

    values = (config.strength, config.attack_target, epochs, config.search_rate)
    counts = (config.search_images, config.search_passes, config.search_steps)
    key = recipe(config, setting) | {"LF": [*values, *counts]}
    cached = setting.cached("lf-pattern", key, compute, version=2)
    rates = cached["rates"].tolist()
    logger.info(
        "the pattern changes %.2f %% of predictions after %d passes", 100 * rates[-1], len(rates)
    )
    setting.facts["search"] = {"passes": len(rates), "changed_predictions": rates[-1]}
    return cached["pattern"]


def make_trigger(
    config: Config, image_shape: tuple[int, int, int], searched: torch.Tensor | None = None
) -> Trigger:
    """The trigger x -> x + L, whole grey levels, clipped.

    Args:
        image_shape: (C, H, W).
        searched: a pattern of `search_pattern`; None for the closed form.

    Raises:
        UserError: if the strength does not fit the channels.

    Example:
        >>> trigger = make_trigger(Config.load(), (3, 32, 32))
        >>> triggered = trigger(images, indices)
    """
    if searched is None:
        pattern = closed_form(config.strength, image_shape)
    else:
        pattern = truncated(searched).float()

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return (images.float() + pattern).clamp(0, 255).to(torch.uint8)

    return trigger


if __name__ == "__main__":
    run(Config, make_trigger, prepare=prepare)
