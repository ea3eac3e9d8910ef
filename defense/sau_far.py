"""SAU-Far: SAU that moves far from the backdoored weights; ours, not published.

SAU ends near the backdoored model: it covers the backdoor, and a few poisoned images bring it back
(`analysis/retune.py`). This method has SAU's inner problem and losses, see `sau.py`, and three
changes in how the weights learn:

- Adam's learning rate is ten times as high, and falls to zero by a cosine: the weights first move
  far, and then settle on the clean images.
- BatchNorm is in train mode in the outer step. Clean and perturbed images pass it apart, and only
  the clean ones change the running statistics. SAU keeps the statistics of the poisoned images.
- Clean images are cropped (and mirrored) at random before they are perturbed, because so high a
  rate would learn a few images by heart.

    python defense/sau_far.py --result_file badnet_demo

It was developed on BadNets and Blended. RESULTS.md says how it does on other attacks.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import Augmented, checked, run
from defense.sau import SharedAdversarial, shared_perturbation, unlearning_loss, warn_of_loss
from models.copies import copied
from models.modes import keeping_statistics
from utils.data.batches import as_float, augment
from utils.process.seeds import generator
from utils.training.labelshare import Tally, add
from utils.training.loop import Loop, batch_sizes
from utils.training.sgd import Schedule, Scheduler


@dataclass(frozen=True, kw_only=True)
class Config(SharedAdversarial, Augmented):
    lr_scheduler: Annotated[Schedule, Field(description="how Adam's learning rate changes")]

    in_train_mode = True
    gives_back_early = True


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A purified copy of a backdoored classifier; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8; N >= 2.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode.

    Raises:
        UserError: if a loss is not finite.

    Example:
        >>> config = Config.load(n_rounds=20, crop_padding=2, flip=False)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    device = next(model.parameters()).device
    reference = copied(model, training=False)
    reference.requires_grad_(False)
    model = copied(model, training=False)
    learner = loop.parallel(model)
    attacked = loop.alone(model), loop.alone(reference)
    optimizer = config.adam(model)
    steps = len(batch_sizes(len(images), config.batch_size))
    scheduler = Scheduler(optimizer, config.lr_scheduler, config.n_rounds, steps)
    order = generator(config.random_seed, "batches")
    start = generator(config.random_seed, "perturbation")
    crops = generator(config.random_seed, "augmentation", images.device)
    with torch.no_grad():
        classes = reference(as_float(images[: config.batch_size], device)).shape[1]
    sent = Tally(classes)
    changing: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "sent": sent}
    changing |= {"order": order, "start": start, "crops": crops}
    for number in loop.rounds(config.n_rounds, model=model, **changing):
        for index in loop.batches(len(images), config.batch_size, order):
            moved = augment(images[index], config.crop_padding, config.flip, crops, is_part=True)
            x, y = as_float(moved, device), labels[index].to(device)
            with torch.no_grad():
                ref_clean = reference(x)
            delta = shared_perturbation(
                *attacked,
                x,
                y,
                config,
                ref_predictions=ref_clean.argmax(1),
                generator=start,
                part=loop.part,
            )
            with torch.no_grad():
                ref_adv = reference(x + delta)
            if number == 1:
                add(sent, y, ref_clean.argmax(1), ref_adv.argmax(1))

            model.train()
            optimizer.zero_grad()
            logits = learner(x)
            loop.backward(config.lmd_1 * F.cross_entropy(logits, y))
            with keeping_statistics(model):
                adv_logits = learner(x + delta)
            # The clean part has been counted; here it is a constant.
            losses = unlearning_loss(logits.detach(), adv_logits, ref_clean, ref_adv, y, config)
            loop.backward(losses["total"])
            optimizer.step()
            scheduler.after_step()
            model.eval()
            loop.log(len(index), **losses)
        scheduler.after_epoch(loop.losses()["total"])
        if number == 1:
            warn_of_loss(loop.findings, sent, loop.losses()["shared"], config)
    return model


if __name__ == "__main__":
    run(Config, purify)
