"""BNP: prunes channels whose statistics on clean images are far from the running ones.

Zheng, Tang, Li, Liu. *Pre-activation Distributions Expose Backdoor Neurons.* NeurIPS 2022 ("mbns"
in BackdoorBench's table).

BatchNorm's running statistics were collected on the poisoned training set. A channel that serves a
backdoor has other statistics on clean images; a channel for which the two differ much more than for
its neighbours is pruned.

    D = KL(N(m1, v1) || N(m2, v2)) = 1/2 ln(v2 / v1) + (v1 + (m1 - m2)^2) / (2 v2) - 1/2
    m1, v1: of clean images    m2, v2: the running ones    pruned where D > mean + u sd

    python defense/bnp.py --result_file badnet_demo

It sees clean images and reads no labels. It prunes nothing if the statistics were updated on clean
images, as in fine-tuning, and it often misses Blended and LF. In a layer of ten channels or fewer,
u = 3 can prune nothing. Published code has the logarithm without the 1/2, and compares with the
statistics of poisoned images, so its numbers are those of another method. The authors use one batch
of 500 images; here all images are used, without augmentation.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import CleanData, Outlying, Rounds, checked, run
from models.channels import running_norms
from models.modes import evaluating
from models.outputs import watching
from utils.data.batches import as_float
from utils.training.loop import Loop
from utils.training.pruning import pruned_in_rounds
from utils.training.selection import outliers


@dataclass(frozen=True, kw_only=True)
class Config(Outlying, CleanData, Rounds):
    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        running_norms(model)


@dataclass(frozen=True)
class Moments:
    """Statistics of each channel's values.

    Attributes:
        count: of the values of a channel.
        mean: (C,) float64.
        squares: (C,) float64, the sum of squared distances from the mean.
    """

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """(C,) float64, unbiased; NaN of a single value."""
        return self.squares / (self.count - 1)


def channel_divergence(
    mean: torch.Tensor,
    variance: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
) -> torch.Tensor:
    """KL divergence of a channel's clean Gaussian from its running one (equation of the paper).

    Args:
        mean, variance: (C,) float, on clean images.
        running_mean, running_var: (C,) float, of the BatchNorm.

    Returns:
        (C,) float64 on the CPU, >= 0; not finite where a variance is 0.
    """
    given = (mean, variance, running_mean, running_var)
    m1, v1, m2, v2 = (value.cpu().double() for value in given)
    return (v2 / v1).log() / 2 + (v1 + (m1 - m2).square()) / (2 * v2) - 0.5


def moments(values: torch.Tensor) -> Moments:
    """Statistics of (N, C, H, W) values over all but the channels, computed in float32."""
    variance, mean = torch.var_mean(values.float(), dim=(0, 2, 3), correction=0)
    count = values[:, 0].numel()
    return Moments(count, mean.cpu().double(), count * variance.cpu().double())


def pooled(parts: Sequence[Moments]) -> Moments:
    """Statistics of all values, from the statistics of parts that may have different sizes."""
    count = sum(part.count for part in parts)
    mean = torch.stack([part.count * part.mean for part in parts]).sum(0) / count
    squares = [part.squares + part.count * (part.mean - mean).square() for part in parts]
    return Moments(count, mean, torch.stack(squares).sum(0))


def input_moments(model: nn.Module, images: torch.Tensor, batch_size: int) -> dict[str, Moments]:
    """Statistics of what enters each BatchNorm, over all images, pixels and calls, in eval mode.

    Returns:
        By the layer's name; layers that are never called are skipped.
    """
    device = next(model.parameters()).device
    parts: dict[str, list[Moments]] = {name: [] for name in running_norms(model)}

    def see(name: str, features: torch.Tensor) -> None:
        parts[name].append(moments(features))

    with evaluating(model), torch.no_grad(), watching(model, parts, see, of="input"):
        for batch in images.split(batch_size):
            model(as_float(batch, device))
    return {name: pooled(values) for name, values in parts.items() if values}


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
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits, with BatchNorm that
            keeps running statistics.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64; checked, but not read.
        config: `Config.load(...)`.
        loop: takes what was pruned.

    Returns:
        The pruned model, in eval mode; only BatchNorm's weights differ from the model's.

    Raises:
        UserError: if the network has no BatchNorm, or none that keeps running statistics.

    Example:
        >>> config = Config.load(u=2.0)
        >>> purified = purify(model, images, labels, config)
    """

    def outlying(model: nn.Module) -> dict[str, torch.Tensor]:
        layers, channels = running_norms(model), {}
        for name, clean in input_moments(model, images, config.batch_size).items():
            running = layers[name].running_mean, layers[name].running_var
            divergence = channel_divergence(clean.mean, clean.variance, *running)  # type: ignore[arg-type]
            channels[name] = outliers(divergence, config.u)
        return channels

    return pruned_in_rounds(
        model, loop or Loop(), outlying, n_rounds=config.n_rounds, prune_bias=config.prune_bias
    )


if __name__ == "__main__":
    run(Config, purify)
