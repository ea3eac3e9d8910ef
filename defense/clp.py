"""CLP: prunes channels whose Lipschitz bound stands out. Sees no images at all.

Zheng, Tang, Li, Liu. *Data-free Backdoor Removal Based on Channel Lipschitzness.* ECCV 2022,
arXiv 2208.03111.

A channel that serves a backdoor reacts strongly to small changes: the Lipschitz bound of its
convolution and BatchNorm stands out in its layer, and the channel is pruned.

    L_k = sigma_max(W_k) |gamma_k| / sqrt(running variance_k)        pruned where L > mean + u sd

    python defense/clp.py --result_file badnet_demo

`pairs` says which convolution belongs to a BatchNorm. `order`, as published, takes the last
convolution that was registered before the BatchNorm. In networks that normalize before they
convolve (PreAct-ResNet18), this is not always the convolution whose output the BatchNorm
normalizes. `direct` takes only BatchNorm layers whose input is a convolution's output. In a layer
of ten channels or fewer, u = 3 can prune nothing. CLP misses most attacks in RESULTS.md, Blended,
LF and SIG among them, and may cost much accuracy.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import Outlying, checked, run
from models.channels import Pairs, convolutions_before, running_norms
from utils.training.loop import Loop
from utils.training.pruning import pruned_in_rounds
from utils.training.selection import outliers


@dataclass(frozen=True, kw_only=True)
class Config(Outlying):
    pairs: Annotated[
        Pairs, Field(description="convolution of a BatchNorm: by order, or the direct one alone")
    ]

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        convolutions_before(model, self.pairs, image_shape)


def channel_lipschitz(
    conv_weight: torch.Tensor, bn_weight: torch.Tensor, running_var: torch.Tensor
) -> torch.Tensor:
    """The largest singular value of each output channel's weights, times |gamma| / sqrt(variance).

    Args:
        conv_weight: (C, I, kh, kw); a channel's is seen as a matrix (I, kh kw).
        bn_weight, running_var: (C,). A variance of 0 gives infinity.

    Returns:
        (C,) float32.
    """
    singular = torch.linalg.matrix_norm(conv_weight.detach().float().flatten(2), ord=2)
    return singular * bn_weight.detach().float().abs() / running_var.float().sqrt()


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A copy of a classifier with outlying channels pruned; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with BatchNorm.
        images: (N, C, H, W); only C, H and W are read, N may be 0.
        labels: not read.
        config: `Config.load(...)`.
        loop: takes what was pruned.

    Returns:
        The pruned model, in eval mode.

    Raises:
        UserError: if the network has no convolution with a BatchNorm behind it.

    Example:
        >>> config = Config.load(u=2.5)
        >>> purified = purify(model, images[:0], labels[:0], config)
    """

    def outlying(model: nn.Module) -> dict[str, torch.Tensor]:
        layers, channels = running_norms(model), {}
        for name, convolution in convolutions_before(model, config.pairs, images.shape[1:]).items():
            variance: torch.Tensor = layers[name].running_var  # type: ignore[assignment]
            bounds = channel_lipschitz(convolution.weight, layers[name].weight, variance)
            channels[name] = outliers(bounds, config.u)
        return channels

    loop = loop or Loop()
    paired = convolutions_before(model, config.pairs, images.shape[1:])
    alone = len(running_norms(model)) - len(paired)
    text = f"{alone} of {alone + len(paired)} BatchNorm layers are not looked at, since "
    if alone and config.pairs == "direct":
        loop.findings.say(f"{text}what they read is no convolution's output (--pairs direct)")
    elif alone:
        loop.findings.warn(f"{text}no convolution of their width comes before them")
    return pruned_in_rounds(
        model, loop, outlying, n_rounds=config.n_rounds, prune_bias=config.prune_bias
    )


if __name__ == "__main__":
    run(Config, purify)
