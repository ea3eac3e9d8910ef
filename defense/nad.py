"""NAD: teaches the model the attention of a copy that was briefly fine-tuned.

Li, Lyu, Koren, Lyu, Li, Ma. *Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks.* ICLR 2021, arXiv 2101.05930.

A copy that was tuned briefly, the teacher, looks at other places of an image than the backdoored
model, the student. The student is tuned so that its maps of attention become the teacher's.

    map       a = sum over channels of |A|^p, over its L2 norm + 1e-6    A: a stage's output
    student   min over weights   CE(h(x), y) + sum over stages of beta_i mean (a_i - a_i^teacher)^2

    python defense/nad.py --result_file badnet_demo

The teacher is FT with `te_epochs` and `lr_scheduler`; the student runs `n_rounds` at a constant
rate, as published. The stages are the last three parts of the network that give a map, or those
named in `attention_layers`. A published program also compares the pooled features, whose distance
is always 0, and skips an earlier stage: `--attention_layers layer3,layer4` gives its loss. It sees
the clean subset. A teacher that keeps the backdoor may teach it, but need not: RESULTS.md has cases
where NAD leaves much less than FT.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import FineTuned, checked, run
from models.copies import copied
from models.modes import evaluating
from models.outputs import recording
from models.parts import black_images, layer, top_level
from utils.config import Group
from utils.data.batches import as_float, augment, wide
from utils.errors import UserError
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.sgd import Schedule, fine_tune


@dataclass(frozen=True, kw_only=True)
class Config(FineTuned):
    te_epochs: Annotated[int, Field(ge=0, description="passes that tune the teacher, first")]
    beta1: Annotated[float, Field(ge=0, description="weight of the first stage's distance")]
    beta2: Annotated[float, Field(ge=0, description="weight of the second one's")]
    beta3: Annotated[float, Field(ge=0, description="weight of the third one's")]
    p: Annotated[
        float, Field(gt=0, description="power of the features; below 1 none of them may be 0")
    ]
    attention_layers: Annotated[
        tuple[str, ...],
        Field(max_length=3, description="layers whose maps count; none for the last three stages"),
    ]
    lr: Annotated[
        float,
        Field(
            gt=0, description="peak learning rate of the teacher, and the student's constant one"
        ),
        Group.TRAINING,
    ]
    lr_scheduler: Annotated[Schedule, Field(description="how the teacher's learning rate changes")]

    advice = "lower --lr or the betas, or give more images (--ratio)"
    rates = "--lr, --p, --beta1, --beta2 or --beta3"

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        stages(model, black_images(model, image_shape), self.attention_layers)


def attention_map(features: torch.Tensor, power: float) -> torch.Tensor:
    """The sum over channels of |A|^power, over its L2 norm + 1e-6; at least in float32.

    Shape:
        (B, C, H, W) float -> (B, H, W) float.
    """
    summed = wide(features).abs().pow(power).sum(1)
    return summed / (torch.linalg.vector_norm(summed, dim=(1, 2), keepdim=True) + 1e-6)


def attention_distance(student: torch.Tensor, teacher: torch.Tensor, power: float) -> torch.Tensor:
    """The mean squared difference of two maps of attention.

    Shape:
        (B, C, H, W) float, (B, D, H, W) float -> scalar.
    """
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


def stages(model: nn.Module, images: torch.Tensor, names: Iterable[str]) -> list[str]:
    """The layers whose maps count.

    Args:
        model: called with one image, in eval mode; left as it was.
        images: (N, C, H, W), float in [0, 1] or uint8.
        names: of layers; none for the last three parts that give maps of more than one pixel.

    Returns:
        Names, the earliest layer first unless they were given.

    Raises:
        UserError: if a layer gives no map or is named twice, or there are fewer than three such
            parts.
    """
    given = list(names)
    if repeated := [name for name in given if given.count(name) > 1]:
        raise UserError(f"--attention_layers: {repeated[0]} is named twice; name each layer once")
    for name in given:
        layer(model, name, "--attention_layers")
    tried = given or list(top_level(model))
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), recording(model, tried) as outputs:
        model(as_float(images[:1], device))
    maps = {
        name: output
        for name, output in outputs.items()
        if isinstance(output, torch.Tensor) and output.dim() == 4
    }
    for name in given:
        if name not in maps:
            raise UserError(
                f"--attention_layers: {name} gives no map (N, C, H, W); give convolutions, or "
                "blocks of them"
            )
    if given:
        return given
    last = [name for name in tried if name in maps and maps[name].shape[2:].numel() > 1][-3:]
    if len(last) < 3:
        raise UserError(
            f"--attention_layers: {len(last)} of this network's parts give maps (N, C, H, W) of "
            "more than one pixel, and three are taken; name one to three layers"
        )
    return last


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier with the attention of a tuned one; the model is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with layers that give
            maps.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The student after the last round, in eval mode.

    Raises:
        UserError: if the layers give no maps.

    Example:
        >>> config = Config.load(n_rounds=1, te_epochs=1, attention_layers=["conv1", "conv2"])
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    device = next(model.parameters()).device
    names = stages(model, images, config.attention_layers)
    betas = dict(zip(names, (config.beta1, config.beta2, config.beta3), strict=False))
    teacher, student = copied(model), copied(model)
    fine_tune(teacher, images, labels, config, loop, phase="teacher", rounds=config.te_epochs)

    learner = loop.parallel(student)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.wd,
        fused=device.type == "cuda",
    )
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation", images.device)
    with recording(student, names) as learned, recording(teacher, names) as taught:
        for _ in loop.rounds(
            config.n_rounds, model=student, optimizer=optimizer, order=order, crops=crops
        ):
            student.train()
            for index in loop.batches(len(images), config.batch_size, order):
                batch = augment(
                    images[index], config.crop_padding, config.flip, crops, is_part=True
                )
                x, y = as_float(batch, device), labels[index].to(device)
                with torch.no_grad():
                    teacher(x)
                cross_entropy = F.cross_entropy(learner(x), y)
                distances = [
                    beta * attention_distance(learned[name], taught[name], config.p)
                    for name, beta in betas.items()
                ]
                attention = torch.stack(distances).sum()
                loss = cross_entropy + attention
                optimizer.zero_grad()
                loop.backward(loss)
                optimizer.step()
                loop.log(len(index), loss=loss, cross_entropy=cross_entropy, attention=attention)
    student.eval()
    return student


if __name__ == "__main__":
    run(Config, purify)
