"""LC: hard images of the target class, with a pattern in their corners.

Turner, Tsipras, Madry. *Label-Consistent Backdoor Attacks.* 2019, arXiv 1912.02771. Images of the
target class are made adversarial, so that the model learns little from their content. They also get
a pattern in all four corners, which is then easier to learn. Their labels stay true.

Threat model: data poisoning, clean label. The attacker changes training images of the target class,
but no label, and not the training. For this the attacker trains a surrogate model on the clean
training set. Test images get only the pattern, without the adversarial step.

    python attack/lc.py --save_folder_name lc_demo

pratio is a share of the whole training set, as published by BackdoorBench. With 10 classes and
pratio 0.1, no clean image of the target class is left, and ACC falls to about 0.9 of what it would
be. With 0.05 it does not fall. If a class has too few images, all of them are used. By default,
BackdoorBench loads adversarial images from a file that is not part of this project. By its name,
the file has a bound of 16: `--adv_bound 16`.

Limits: one target, no all2all. The surrogate is the network of --model, trained with the run's own
recipe (the published surrogate is a separate ResNet-18). So another --batch_size or --lr gives
other poisoned images. The surrogate is trained adversarially, as the paper proposes, and plainly on
the digits. `surrogate_recognises` in summary.json counts the hard images that it recognises.

Expected on the embedded digits, where all zeros are poisoned: ACC 90 %, ASR >= 90 % (half of the
channels >= 75 %). CIFAR-10, PreAct-ResNet18, 10 % poisoned, as published by BackdoorBench: ACC
84.59 %, ASR 99.92 %; 5 %: ACC 93.29 %, ASR 99.50 %.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import clean_label, run
from attack.recipe import AttackConfig, clean_model, recipe
from attack.setting import Setting
from models.modes import evaluating, frozen
from utils.data.batches import as_float, augment, truncated
from utils.data.labelled import Labelled
from utils.data.poison import Triggers
from utils.process.progress import Progress
from utils.process.script import logger
from utils.process.seeds import generator
from utils.training.evaluate import predict
from utils.training.sgd import Supervised

# Both left corners, rows from the top; the right ones mirror them.
CORNER = torch.tensor([[1, -1, -1], [-1, 1, -1], [1, -1, 1]])


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    patch_amplitude: Annotated[
        float, Field(gt=0, le=1, description="added to and taken from corner pixels, pixel units")
    ]
    surrogate: Annotated[
        Literal["adversarial", "plain"], Field(description="how the surrogate model is trained")
    ]
    surrogate_epochs: Annotated[int, Field(ge=1, description="epochs of the surrogate model")]
    surrogate_steps: Annotated[int, Field(ge=1, description="adversarial steps per training batch")]
    adv_bound: Annotated[float, Field(ge=0, le=255, description="L_inf bound, grey levels of 255")]
    adv_step: Annotated[float, Field(gt=0, le=255, description="size of a step, grey levels")]
    adv_steps: Annotated[int, Field(ge=0, description="steps that make an image adversarial")]


@dataclass(frozen=True)
class Hard:
    """All training images of the target class, made adversarial.

    index int64 (M,), ascending positions in the training set; images uint8 (M, C, H, W).
    """

    index: torch.Tensor
    images: torch.Tensor


def corner_pattern(height: int, width: int) -> torch.Tensor:
    """The pattern that is added: float (H, W) of 1 and -1 in four corners, 0 elsewhere.

    A corner is 3 x 3 blocks of max(1, round(H / 32)) pixels, flush: 3 pixels at 16, 28 and 32, 6 at
    64. The right ones mirror the left ones, so that a flip leaves the pattern as it is.
    """
    block = max(1, round(height / 32))
    corner = CORNER.repeat_interleave(block, 0).repeat_interleave(block, 1).float()
    side = len(corner)
    pattern = torch.zeros(height, width)
    for rows in (slice(None, side), slice(-side, None)):
        pattern[rows, :side] = corner
        pattern[rows, -side:] = corner.flip(1)
    return pattern


def add_pattern(images: torch.Tensor, pattern: torch.Tensor, amplitude: float) -> torch.Tensor:
    """uint8 (N, C, H, W): clip(x + 255 amplitude pattern), cast by truncation as published."""
    return (images + 255 * amplitude * pattern).clamp(0, 255).to(torch.uint8)


def adversarial(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    bound: float,
    step: float,
    steps: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Untargeted L_inf PGD: ascends the cross-entropy of the true labels.

    Args:
        images: float (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        bound, step: radius of the ball and size of a step, pixel units.
        start: inside the ball; None for the images themselves.

    Returns:
        float (N, C, H, W) in [0, 1], within `bound` of the images.
    """
    low, high = (images - bound).clamp(min=0), (images + bound).clamp(max=1)
    changed = images if start is None else start.clamp(low, high)
    for _ in range(steps):
        changed = changed.detach().requires_grad_()
        loss = F.cross_entropy(model(changed), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, changed)
        changed = (changed + step * gradient.sign()).clamp(low, high)
    return changed.detach()


class AdversarialTraining(Supervised):
    """The batch step of the surrogate: cross-entropy on adversarial images, from random starts.

    The inner model is in eval mode; its steps are 2.5 bound / steps, so that they can cross the
    ball.
    """

    def __init__(self, config: Config, rng: torch.Generator) -> None:
        super().__init__(config.crop_padding, config.flip, rng)
        self.bound = config.adv_bound / 255
        self.steps = config.surrogate_steps

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = as_float(augment(images, self.crop_padding, self.flip, self.augmentation))
        noise = torch.rand(images.shape, device=images.device, generator=self.augmentation)
        start = images + self.bound * (2 * noise - 1)
        step = 2.5 * self.bound / self.steps
        with evaluating(model), frozen(model):
            hard = adversarial(model, images, labels, self.bound, step, self.steps, start)
        return F.cross_entropy(model(hard), labels)


def prepare(config: Config, setting: Setting) -> Hard:
    """Makes all training images of the target class adversarial, once, and keeps them."""
    train, device = setting.data.train, setting.device
    index = torch.nonzero(train.labels == config.attack_target).flatten()
    members = train.at(index)
    trained = ("adv_bound", "surrogate_steps") if config.surrogate == "adversarial" else ()
    variant = {name: getattr(config, name) for name in trained}
    names = ("surrogate", "surrogate_epochs", "adv_bound", "adv_step", "adv_steps", "attack_target")
    key = recipe(config, setting) | variant | {name: getattr(config, name) for name in names}

    def compute() -> dict[str, torch.Tensor]:
        rng = generator(config.random_seed, "surrogate", device)
        step = AdversarialTraining(config, rng) if config.surrogate == "adversarial" else None
        model = clean_model(config, setting, config.surrogate_epochs, step, variant)
        hard = harden(model, members, config, device)
        counts = [
            int((predict(model, images, device) == config.attack_target).sum())
            for images in (members.images, hard)
        ]
        return {"images": hard, "recognised": torch.tensor(counts)}

    cached = setting.cached("lc-hard-images", key, compute)
    easy, hard = cached["recognised"].tolist()
    logger.info(
        "of %d images of the target class the surrogate recognises %d, and %d when made hard",
        len(members),
        easy,
        hard,
    )
    setting.facts["surrogate_recognises"] = {"images": len(members), "clean": easy, "hard": hard}
    return Hard(index, cached["images"])


def harden(model: nn.Module, clean: Labelled, config: Config, device: torch.device) -> torch.Tensor:
    """Hard images, truncated as published: uint8 (N, C, H, W).

    At most `adv_bound` away; of a bound that is no whole number, less than one level more.
    """
    hard = []
    with Progress(len(clean), "making images hard", "image") as progress:
        for index in torch.arange(len(clean)).split(config.batch_size):
            part = clean.at(index)
            changed = adversarial(
                model,
                as_float(part.images, device),
                part.labels.to(device),
                config.adv_bound / 255,
                config.adv_step / 255,
                config.adv_steps,
            )
            hard.append(truncated(changed).cpu())
            progress.advance(len(index))
    return torch.cat(hard)


def make_trigger(config: Config, image_shape: tuple[int, int, int], hard: Hard) -> Triggers:
    """In training, the pattern on the hard image of the same index; in the test, on the image.

    Example:
        >>> triggers = make_trigger(Config.load(), (3, 32, 32), Hard(indices, images))
        >>> triggered = triggers.train(images, indices)
    """
    pattern = corner_pattern(*image_shape[1:])

    def train(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        rows = torch.searchsorted(hard.index, indices)
        return add_pattern(hard.images[rows], pattern, config.patch_amplitude)

    def test(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return add_pattern(images, pattern, config.patch_amplitude)

    return Triggers(train, test)


if __name__ == "__main__":
    run(Config, make_trigger, prepare=prepare, choose=clean_label)
