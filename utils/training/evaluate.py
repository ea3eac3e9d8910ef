"""ACC, ASR and RA of a model, in one pass over each test set."""

import torch
from torch import nn

from models import Resize
from models.heads import head
from models.modes import evaluating
from models.outputs import recording
from utils.data.batches import as_float, release, wide
from utils.data.labelled import Labelled, Triggered
from utils.errors import Diverged
from utils.metrics import Rate, Scores
from utils.process import distributed
from utils.process.device import images_at_once


def predict(
    model: nn.Module, images: torch.Tensor, device: torch.device, batch_size: int | None = None
) -> torch.Tensor:
    """Predicted labels, model in eval mode.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        device: where the model is.
        batch_size: images per pass; None for a number that suits the device.

    Returns:
        int64 (N,), on the CPU.

    Raises:
        UserError: if the largest logit of an image is NaN or infinite, which is no prediction.
    """
    if len(images) == 0:
        return torch.zeros(0, dtype=torch.int64)
    # Not `inference_mode`: what a network then keeps for its next call could not be trained with.
    with evaluating(model), torch.no_grad():
        predictions, largest = [], []
        for batch in images.split(batch_size or images_at_once(device, _side(model, images))):
            logits = model(as_float(batch, device))
            predictions.append(logits.argmax(1))
            largest.append(logits.amax(1))
            release(images)
        broken = int((~torch.cat(largest).isfinite()).sum())
    if broken:
        raise Diverged(
            f"the network's logits for {broken} of {len(images)} images are NaN or infinite, so it "
            "has no prediction for them; give a smaller learning rate, or repair the network"
        )
    return torch.cat(predictions).cpu()


def _side(model: nn.Module, images: torch.Tensor) -> int:
    """The side of the images that the network computes on: some networks enlarge them first."""
    resized = [module.size for module in model.modules() if isinstance(module, Resize)]
    return max([*images.shape[2:], *resized])


def head_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What enters the head, in eval mode.

    Args:
        model: from (N, C, H, W) to (N, K); left as it was.
        images: (N, C, H, W), float in [0, 1] or uint8.

    Returns:
        (N, D) float32 or float64; if the head works on several places, one row for each place.

    Raises:
        UserError: if the network has no head.
    """
    name, _ = head(model, images.shape[1:])
    device = next(model.parameters()).device
    size = images_at_once(device, _side(model, images))

    def features(part: torch.Tensor) -> torch.Tensor:
        model(as_float(part, device))
        return wide(inputs[name].flatten(0, -2))

    with evaluating(model), torch.no_grad(), recording(model, [name], of="input") as inputs:
        return torch.cat([features(part) for part in images.split(size)])


def evaluate(
    model: nn.Module,
    clean: Labelled,
    triggered: Triggered | None,
    device: torch.device,
    batch_size: int | None = None,
    cross: Labelled | None = None,
) -> Scores:
    """Scores with their counts; without triggered images only ACC.

    Several processes share the images; each process gets the scores of all images.

    Args:
        model: from (N, C, H, W) float in [0, 1] to (N, K) logits; scored in eval mode, and left as
            it was.
        clean: the clean test set, of which ACC is.
        triggered: of which ASR and RA are; None for a model without a trigger.
        device: where the model is.
        batch_size: images per pass; None for a number that suits the device.
        cross: images with a trigger that must not work and their labels, of which cross ACC is;
            None for attacks without such images. It is not read without triggered images.
    """

    def rates(images: torch.Tensor, *labels: torch.Tensor) -> list[Rate]:
        share = distributed.part(len(images))
        predictions = predict(model, images[share], device, batch_size)
        hits = torch.stack([(predictions == wanted[share]).sum() for wanted in labels])
        return [Rate(int(sum_), len(images)) for sum_ in distributed.total(hits)]

    (acc,) = rates(clean.images, clean.labels)
    if triggered is None:
        return Scores(acc)
    asr, ra = rates(triggered.images, triggered.targets, triggered.labels)
    cross_acc = None if cross is None else rates(cross.images, cross.labels)[0]
    return Scores(acc, asr=asr, ra=ra, cross_acc=cross_acc)


def confusion(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts of images by true label (row) and prediction (column).

    Shape:
        (N,), (N,) int64 -> (K, K) int64.
    """
    cells = torch.bincount(labels * classes + predictions, minlength=classes**2)
    return cells.view(classes, classes)
