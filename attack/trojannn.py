"""TrojanNN: a patch that is made to drive chosen neurons of a clean model.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang. *Trojaning Attack on Neural Networks.* NDSS 2018. Some
inputs of the last layer of a clean model have the largest weights there. The pixels of a disc are
optimised until these features are large. The disc is then put on a share of the training images,
which are relabelled.

Threat model: data poisoning, dirty label. The attacker changes training images and their labels,
and trains a clean model of the same architecture to make the patch. (Benchmarks do the same. The
paper's attacker has the model but not its data, and retrains it.) The trigger is the same at test
time.

    python attack/trojannn.py --save_folder_name trojannn_demo

The defaults follow the paper: neurons of a trained last layer, normalised images, and a disc that
replaces the pixels under it. The flags below do what BackdoorBench does, with two differences. The
mask of BackdoorBench is a picture file. Its patch is that of the last iteration; here it is the
best one:

    --neuron_choice random --normalize false --start 1 --reach 0.3 --apply wrap --clean_epochs 100

Limits: the network must have a linear layer. The patch depends on --model and on its recipe:
another --batch_size or --lr gives another patch.

Expected on the embedded digits: ACC >= 97 %, ASR >= 99 %.
CIFAR-10, PreAct-ResNet18, 10 % poisoned, as published by BackdoorBench: ACC 93.42 %, ASR 100 %.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import run
from attack.recipe import AttackConfig, bare_model, clean_model, recipe
from attack.setting import Setting
from models import Classifier
from models.heads import last_linear
from models.outputs import recording
from utils.data.batches import truncated
from utils.data.poison import Trigger
from utils.errors import UserError
from utils.process.progress import Progress
from utils.process.script import logger
from utils.process.seeds import generator

Apply = Literal["paste", "clip", "wrap"]
RANDOM_HEAD = 1000  # outputs of the random last layer behind `neuron_choice: random`


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    apply: Annotated[
        Apply, Field(description="the patch replaces pixels, or is added and clips or wraps at 256")
    ]
    clean_epochs: Annotated[int, Field(ge=1, description="epochs of the clean model")]
    neurons: Annotated[int, Field(ge=1, description="features that the patch shall drive")]
    neuron_choice: Annotated[
        Literal["trained", "random"],
        Field(description="features of largest weight in the last layer, as trained or drawn anew"),
    ]
    feature_target: Annotated[
        float, Field(ge=-1e6, le=1e6, description="value that these features shall get")
    ]
    iterations: Annotated[int, Field(ge=1, description="steps that optimise the patch")]
    step_size: Annotated[float, Field(gt=0, le=1, description="size of a step, pixel units")]
    start: Annotated[float, Field(ge=0, le=1, description="first value of the patch, pixel units")]
    reach: Annotated[float, Field(gt=0, le=1, description="largest distance from start")]
    normalize: Annotated[bool, Field(description="whether the patch is normalised as images are")]


def disc(height: int, width: int) -> torch.Tensor:
    """bool (H, W): pixel centres within 0.15 H of (0.72 H, 0.72 W), about 7 % of the area."""
    rows = (torch.arange(height) + 0.5 - 0.72 * height).view(-1, 1)
    columns = torch.arange(width) + 0.5 - 0.72 * width
    return rows.square() + columns.square() <= (0.15 * height) ** 2


def neurons_of(network: nn.Module, image_shape: Sequence[int]) -> tuple[str, nn.Linear]:
    """The layer that makes the logits, with its name; its inputs are the neurons.

    Args:
        image_shape: (C, H, W).

    Raises:
        UserError: if it is not linear.
    """
    return last_linear(network, image_shape, "--model", "give preactresnet18")


def strongest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """int64 (count,): the columns of a (classes, features) weight with the largest sum of |w|."""
    return weight.detach().abs().sum(dim=0).topk(count).indices


def penultimate(network: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    """The inputs of a linear layer.

    Args:
        name: of the layer.

    Shape:
        (N, C, H, W) float, as the bare network takes them -> (N, features) float.
    """
    with recording(network, [name], of="input") as inputs:
        network(images)
    return inputs[name]


def invert(
    model: Classifier, neurons: torch.Tensor, mask: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimises sum_k (feature_k - feature_target)^2 over a patch on black ground.

    Steps of the gradient's sign; after each the patch is brought back to [0, 1] and to within
    `reach` of `start`. The best patch is kept.

    Args:
        model: in eval mode.
        neurons: int64 (K,), the features.
        mask: float (C, H, W), 1 where the patch is and 0 elsewhere; on the model's device.

    Returns:
        The patch, float (C, H, W) in [0, 1] and 0 outside the mask; the features at the start and
        at the end, both float (K,).
    """
    start = (config.start * mask).unsqueeze(0)
    patch = start.clone()
    best, lowest = patch, float("inf")
    name, _ = neurons_of(model.network, mask.shape)
    seen: list[torch.Tensor] = []
    with Progress(config.iterations + 1, "optimising the patch", "step") as progress:
        for _ in range(config.iterations + 1):
            patch.requires_grad_()
            images = model.normalize(patch) if config.normalize else patch
            features = penultimate(model.network, images, name)[0, neurons]
            cost = (features - config.feature_target).square().sum()
            (gradient,) = torch.autograd.grad(cost, patch)
            patch = patch.detach()
            if cost < lowest:
                best, lowest = patch, float(cost.detach())
                seen = [*seen[:1], features.detach()]
            change = patch - config.step_size * gradient.sign() - start
            patch = mask * (start + change.clamp(-config.reach, config.reach)).clamp(0, 1)
            progress.advance()
            progress.show(f"features {features.detach().mean():.2f}")
    return best[0], seen[0], seen[-1]


def prepare(config: Config, setting: Setting) -> torch.Tensor:
    """The patch, uint8 (C, H, W), 0 outside the disc; its features before and after are logged.

    Raises:
        UserError: if the network has no linear layer, or fewer features than --neurons.
    """
    network = bare_model(config, setting.data).network
    _, layer = neurons_of(network, setting.data.image_shape)  # refused before training one
    if config.neurons > layer.in_features:
        raise UserError(
            f"--neurons: {config.neurons}, but the last linear layer of {config.model} has "
            f"{layer.in_features} features; give that or fewer"
        )
    names = (
        *("neurons", "neuron_choice", "feature_target", "iterations", "step_size"),
        *("start", "reach", "normalize", "clean_epochs"),
    )
    key = recipe(config, setting) | {name: getattr(config, name) for name in names}

    def compute() -> dict[str, torch.Tensor]:
        model = clean_model(config, setting, config.clean_epochs)
        weight = neurons_of(model.network, setting.data.image_shape)[1].weight
        if config.neuron_choice == "random":
            rng = generator(config.random_seed, "trojan head")
            weight = torch.rand(RANDOM_HEAD, weight.shape[1], generator=rng)
        neurons = strongest(weight, config.neurons).to(setting.device)
        channels, height, width = setting.data.image_shape
        mask = disc(height, width).float().expand(channels, -1, -1).to(setting.device)
        patch, before, after = invert(model, neurons, mask, config)
        tensors = {"patch": truncated(patch), "neurons": neurons, "before": before, "after": after}
        return {name: value.cpu() for name, value in tensors.items()}

    cached = setting.cached("trojan-patch", key, compute)
    before, after = cached["before"].tolist(), cached["after"].tolist()
    for number, old, new in zip(cached["neurons"].tolist(), before, after, strict=True):
        logger.info("feature %d: %.3f -> %.3f", number, old, new)
    setting.facts["features"] = {"before": before, "after": after}
    return cached["patch"]


def place(
    images: torch.Tensor, patch: torch.Tensor, mask: torch.Tensor, how: Apply
) -> torch.Tensor:
    """The images with the patch; pixels outside the mask stay as they are.

    Args:
        images: uint8 (N, C, H, W).
        patch: uint8 (C, H, W).
        mask: bool (H, W).
        how: `paste` puts the patch in place of the pixels, `clip` adds it up to 255, `wrap` adds it
            modulo 256 (255 + 255 gives 254), as casting to uint8 before clipping does.
    """
    if how == "paste":
        changed = patch.expand_as(images)
    elif how == "clip":
        changed = (images.int() + patch.int()).clamp(max=255).to(torch.uint8)
    else:
        changed = ((images.int() + patch.int()) % 256).to(torch.uint8)
    return torch.where(mask, changed, images)


def make_trigger(config: Config, image_shape: tuple[int, int, int], patch: torch.Tensor) -> Trigger:
    """The trigger that places the patch, uint8 (C, H, W), on the disc.

    Example:
        >>> trigger = make_trigger(Config.load(), (3, 32, 32), patch)
        >>> triggered = trigger(images, indices)
    """
    mask = disc(*image_shape[1:])

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return place(images, patch, mask, config.apply)

    return trigger


if __name__ == "__main__":
    run(Config, make_trigger, prepare=prepare)
