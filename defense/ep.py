"""EP: prunes channels whose activations on poisoned images have two modes.

Zheng, Tang, Li, Liu. *Pre-activation Distributions Expose Backdoor Neurons.* NeurIPS 2022 ("dde" in
BackdoorBench's table).

On a mixture of clean and poisoned images the pre-activations of a channel that serves a backdoor
have two modes, and after standardization a lower entropy than those of its neighbours:

    H = -sum p ln p    of a histogram of one value per image       pruned where H < mean - u sd

    python defense/ep.py --result_file badnet_demo
    python defense/ep.py --result_file badnet_demo --data clean --save_folder_name ep_clean

Unlike other defenses, it sees a part of the poisoned training set, in which some images carry the
trigger. It is not told which ones, and reads no labels. `--data clean` is its control: the same on
clean images, where there is no second mode and little should be pruned. It often fails at low
poisoning ratios, and against all-to-all, Blended, LF and WaNet. For attacks that control training,
the stored poisoned images were made after the training. In a layer of ten channels or fewer, u = 3
can prune nothing.
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

from defense.base import Outlying, PoisonedData, Rounds, checked, run
from models.channels import norms
from models.modes import evaluating
from models.outputs import watching
from utils.data.batches import as_float
from utils.errors import UserError
from utils.training.loop import Loop
from utils.training.pruning import pruned_in_rounds
from utils.training.selection import outliers

MOST_BINS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Config(Outlying, PoisonedData, Rounds):
    bin_width: Annotated[
        float, Field(gt=0, description="of the histogram, in standard deviations of a channel")
    ]

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        norms(model)


def channel_entropy(values: torch.Tensor, bin_width: float) -> torch.Tensor:
    """The entropy of each channel's histogram, natural logarithm.

    Channels are standardized (unbiased deviation). Bins start at the smallest value of the whole
    layer, and there are int(range / bin_width) of them. Values behind the last bin, and values on
    an edge, are not counted.

    Args:
        values: (C, B) float, B values per channel.
        bin_width: > 0, in standard deviations.

    Returns:
        (C,) float64, >= 0; NaN for a channel whose values are all the same.

    Raises:
        UserError: if there are more bins than anybody needs.
    """
    values = values.double()
    if values.shape[1] < 2:  # they have no deviation
        return torch.full_like(values[:, 0], torch.nan)
    deviation = values.std(1, keepdim=True)
    z = (values - values.mean(1, keepdim=True)) / deviation
    is_known = z.isfinite().all(1)  # 0 / 0 is not
    entropy = torch.full_like(deviation.squeeze(1), torch.nan)
    if not is_known.any():
        return entropy
    z = z[is_known]
    low = z.min()
    width = float(z.max() - low)
    if width > MOST_BINS * bin_width:
        raise UserError(
            f"--bin_width: {bin_width:g} makes more than {MOST_BINS:,} bins of a range of "
            f"{width:.3g}; give a larger one"
        )
    bins = int(width / bin_width)
    edges = low + bin_width * torch.arange(bins + 1, device=z.device, dtype=z.dtype)
    place = torch.bucketize(z, edges)  # edges[place - 1] < z <= edges[place]
    is_counted = (place >= 1) & (place <= bins) & (z < edges[place.clamp(max=bins)])
    # Only bins that hold a value are kept, because there may be many more bins than values.
    channel = torch.arange(len(z), device=z.device)[:, None]
    held, counts = (channel * (bins + 2) + place)[is_counted].unique(return_counts=True)
    parts = torch.special.entr(counts.to(z.dtype) / z.shape[1])
    entropy[is_known] = z.new_zeros(len(z)).index_add_(0, held // (bins + 2), parts)
    return entropy


def largest_inputs(
    model: nn.Module, images: torch.Tensor, batch_size: int
) -> dict[str, torch.Tensor]:
    """The largest value of each channel that enters a BatchNorm, image by image, in eval mode.

    Of a BatchNorm that is called more than once, all calls count.

    Returns:
        (C, N) float32 on the CPU, by the layer's name.
    """
    device = next(model.parameters()).device
    largest: dict[str, list[torch.Tensor]] = {name: [] for name in norms(model)}
    of_batch: dict[str, torch.Tensor] = {}

    def see(name: str, features: torch.Tensor) -> None:
        values = features.float().amax(dim=(2, 3))
        of_batch[name] = values.maximum(of_batch[name]) if name in of_batch else values

    with evaluating(model), torch.no_grad(), watching(model, largest, see, of="input"):
        for batch in images.split(batch_size):
            of_batch.clear()
            model(as_float(batch, device))
            for name, values in of_batch.items():
                largest[name].append(values.cpu())
    return {name: torch.cat(parts).T for name, parts in largest.items() if parts}


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
        images: (N, C, H, W), a mixture of clean and poisoned ones, float in [0, 1] or uint8.
        labels: not read.
        config: `Config.load(...)`.
        loop: takes what was pruned.

    Returns:
        The pruned model, in eval mode.

    Raises:
        UserError: if the network has no BatchNorm.

    Example:
        >>> config = Config.load(u=2.5)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    if len(images) < 2:
        loop.findings.warn(
            "one image gives each channel one value, which has no distribution, so nothing is "
            "pruned; give more images (--ratio)"
        )

    def outlying(model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: outliers(channel_entropy(values, config.bin_width), config.u, are_low=True)
            for name, values in largest_inputs(model, images, config.batch_size).items()
        }

    return pruned_in_rounds(
        model, loop, outlying, n_rounds=config.n_rounds, prune_bias=config.prune_bias
    )


if __name__ == "__main__":
    run(Config, purify)
