"""ACC, ASR and RA of a model, in one pass over each test set."""

import torch
from torch import nn

from utils.data import Labelled, Triggered, as_float
from utils.metrics import Rate, Scores
from utils.runtime import evaluating


def predict(
    model: nn.Module, images: torch.Tensor, device: torch.device, batch_size: int = 256
) -> torch.Tensor:
    """Predicted labels, model in eval mode.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        device: where the model is.

    Returns:
        int64 (N,), on the CPU.
    """
    with evaluating(model), torch.inference_mode():
        predictions = [
            model(as_float(batch, device)).argmax(1) for batch in images.split(batch_size)
        ]
    return torch.cat(predictions).cpu()


def evaluate(
    model: nn.Module,
    clean: Labelled,
    triggered: Triggered | None,
    device: torch.device,
    batch_size: int = 256,
    cross: Labelled | None = None,
) -> Scores:
    """Scores with their counts; without triggered images ACC alone."""
    acc = _share(predict(model, clean.images, device, batch_size), clean.labels)
    if triggered is None:
        return Scores(acc)
    predictions = predict(model, triggered.images, device, batch_size)
    return Scores(
        acc,
        asr=_share(predictions, triggered.targets),
        ra=_share(predictions, triggered.labels),
        cross_acc=None
        if cross is None
        else _share(predict(model, cross.images, device, batch_size), cross.labels),
    )


def _share(predictions: torch.Tensor, labels: torch.Tensor) -> Rate:
    return Rate(int((predictions == labels).sum()), len(labels))
