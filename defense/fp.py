"""FP: cuts off features that stay quiet on clean images, and fine-tunes the rest.

Liu, Dolan-Gavitt, Garg. *Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks.* RAID 2018, arXiv 1805.12185.

Features that stay quiet on clean images may serve the trigger. They are cut off from the head, the
quietest first, and the rest of the network is fine-tuned.

    order   features by their mean over clean images, ascending; negative means are the quietest
    prune   the head's weights of the first n features are 0, and stay so
    tune    FT on all clean images

    python defense/fp.py --result_file badnet_demo

`selection val` prunes up to the last n at which accuracy on held-out images still holds; `fixed`
prunes the share `prune_ratio` (0.8, as 48 of 60 channels in the authors' face network, a number
that they picked by hand). Published tables chose n by accuracy on test images. It sees the clean
subset, and works on every network whose logits a linear layer gives. It often fails, most of
all where the trigger uses features that clean images use, too (Blended, LF).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from defense.base import FineTuned, HeldOut, checked, run
from models.channels import named_channels
from models.copies import copied
from models.heads import head
from models.parts import bare, changeable, learning_weights
from utils.data.batches import least_share, none_of
from utils.training.evaluate import head_features
from utils.training.loop import Loop
from utils.training.pruning import chosen_level, say_pruned, split_to_choose
from utils.training.sgd import fine_tune


@dataclass(frozen=True, kw_only=True)
class Config(HeldOut, FineTuned):
    once_prune_ratio: Annotated[
        float, Field(gt=0, le=1, description="features from a level to the next / all (val)")
    ]
    prune_ratio: Annotated[float, Field(ge=0, le=1, description="features pruned / all (fixed)")]

    advice = "lower --acc_ratio (val), --prune_ratio (fixed) or --lr"

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        if self.n_rounds:
            learning_weights(model)
        name, linear = head(model, image_shape)
        changeable({name: linear}, model)


def pruning_order(features: torch.Tensor) -> torch.Tensor:
    """The features by their signed mean over the images, the quietest first; ties keep their order.

    Shape:
        (N, D) float -> (D,) int64.
    """
    return features.cpu().double().mean(0).argsort(stable=True)


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier, pruned and fine-tuned; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with a linear head.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds, and takes what was selected.

    Returns:
        The model after the last round, in eval mode; as it was, if there are no rounds or no
        good level.

    Raises:
        UserError: if no linear layer makes the logits, or all images are held out.

    Example:
        >>> config = Config.load(n_rounds=1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    name, linear = head(model, images.shape[1:])
    count = linear.in_features
    purified = copied(model, training=False)
    if config.n_rounds == 0:
        return purified

    if config.selection == "fixed":
        order = pruning_order(head_features(model, images))
        level: int | None = round(config.prune_ratio * count)
        if config.prune_ratio and not level:
            loop.findings.warn(
                f"{none_of('--prune_ratio', config.prune_ratio, count, 'features')}, so the "
                f"network is only fine-tuned; give at least {least_share(count)}"
            )
    else:
        purpose = "order the features by"
        split = split_to_choose(model, images, labels, config, loop, purpose=purpose)
        if split is None:
            return purified
        order = pruning_order(head_features(model, images[split.fit]))
        step = max(1, math.ceil(config.once_prune_ratio * count - 1e-9))  # 0.07 * 100 is over 7

        def of_level(level: int) -> nn.Module:
            pruned = copied(model)
            _prune(pruned, name, order[:level])
            return pruned

        levels = range(0, count, step)
        level = chosen_level(levels, of_level, split, loop, acc_ratio=config.acc_ratio)
    if level is None:
        return purified
    features = order[:level]
    is_pruned = torch.zeros(count, dtype=torch.bool).index_fill(0, features, True)
    text = f"{level} of {count} features pruned"
    say_pruned(loop.findings, named_channels({name: is_pruned}), text, level=level, channels=count)
    _prune(purified, name, features)

    def after_step() -> None:
        _prune(purified, name, features)

    fine_tune(purified, images, labels, config, loop, after_step=after_step)
    return purified


@torch.no_grad()
def _prune(model: nn.Module, name: str, features: torch.Tensor) -> None:
    """Makes the head of that name ignore some features; in place."""
    weight = bare(model).get_submodule(name).get_parameter("weight")
    weight[:, features.to(weight.device)] = 0


if __name__ == "__main__":
    run(Config, purify)
