"""FT: fine-tunes on the clean images, and does nothing else.

The smallest defense and the first baseline: train the backdoored model on with ordinary
cross-entropy and hope that it forgets the trigger. Whether it does depends on the attack, and on
the number of images and steps.

    min over weights   cross-entropy of h on clean images, cropped and mirrored at random

    python defense/ft.py --result_file badnet_demo

ACC falls by at most three points in all runs of RESULTS.md; ASR often stays high (mean over ten
attacks on CIFAR-10, PreAct-ResNet18, in the paper of FT-SAM: ACC 91.83 %, ASR 38.81 %).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense.base import FineTuned, checked, run
from models.copies import copied
from utils.data.batches import as_float, augment
from utils.process.seeds import generator
from utils.training.loop import Loop, batch_sizes
from utils.training.sgd import Scheduler


@dataclass(frozen=True, kw_only=True)
class Config(FineTuned):
    pass


@checked
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: Config,
    loop: Loop | None = None,
) -> nn.Module:
    """A fine-tuned copy of a classifier; the model itself is left as it is.

    Args:
        model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, float in [0, 1] or uint8.
        labels: (N,) int64 true labels.
        config: `Config.load(...)`.
        loop: lets a pipeline watch the rounds.

    Returns:
        The model after the last round, in eval mode.

    Example:
        >>> config = Config.load(n_rounds=1)
        >>> purified = purify(model, images, labels, config)
    """
    loop = loop or Loop()
    device = next(model.parameters()).device
    model = copied(model)
    learner = loop.parallel(model)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.wd,
        fused=device.type == "cuda",
    )
    steps = len(batch_sizes(len(images), config.batch_size))
    scheduler = Scheduler(optimizer, config.lr_scheduler, config.n_rounds, steps)
    order = generator(config.random_seed, "batches")
    crops = generator(config.random_seed, "augmentation", images.device)

    for _ in loop.rounds(
        config.n_rounds,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        order=order,
        crops=crops,
    ):
        model.train()
        for index in loop.batches(len(images), config.batch_size, order):
            batch = augment(images[index], config.crop_padding, config.flip, crops, is_part=True)
            loss = F.cross_entropy(learner(as_float(batch, device)), labels[index].to(device))
            optimizer.zero_grad()
            loop.backward(loss)
            optimizer.step()
            scheduler.after_step()
            loop.log(len(index), loss=loss)
        scheduler.after_epoch(loop.losses()["loss"])
    model.eval()
    return model


if __name__ == "__main__":
    run(Config, purify)
