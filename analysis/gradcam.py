"""Grad-CAM: the places of an image that a model's label comes from, before and after a defense.

Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra. *Grad-CAM: Visual Explanations from Deep Networks
via Gradient-based Localization.* ICCV 2017, arXiv 1610.02391.

    weight of a channel   mean over places of the gradient of the label's logit
    map                   max(0, sum over channels of weight * activation), of the last feature map

    python analysis/gradcam.py --result_file badnet_demo

A backdoored model looks at the trigger. The map has few pixels if the images are small (2 x 2 for
the digits), so its place is only rough; `--layer` names an earlier layer, which is finer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import BEFORE, AnalysisConfig, Results, run
from analysis.subject import Defended, Subject
from models.lastmap import last_map
from models.modes import evaluating
from models.outputs import recording
from models.parts import layer
from utils.data.labelled import examples
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Defended):
    layer: Annotated[
        str | None, Field(description="layer of the network; null for its last map of features")
    ]
    images: Annotated[int, Field(ge=1, le=12, description="test images that are shown")]

    needs_trigger = True

    def check(self, subject: Subject) -> None:
        clean, _ = examples(subject.triggered, subject.data, 1)
        label = torch.zeros(1, dtype=torch.int64, device=subject.device)
        class_activation(
            subject.model, clean.to(subject.device), label, explained_layer(subject, self)
        )


def class_activation(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, name: str
) -> torch.Tensor:
    """Grad-CAM maps, each scaled so that its largest value is 1 (all 0 if nothing speaks for it).

    Args:
        model: used in eval mode, left as it was.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64, the classes whose logits are explained.
        name: of the layer.

    Returns:
        (N, H, W) float in [0, 1], enlarged to the size of the images.

    Raises:
        UserError: if the layer gives no map of features, (N, C, H, W), or is not used.
    """
    with evaluating(model), recording(model, [name]) as outputs, torch.enable_grad():
        logits = model(images.clone().requires_grad_())
        activations, gradients = outputs.get(name), None
        if activations is not None and activations.ndim == 4 and activations.requires_grad:
            wanted = logits.gather(1, labels.unsqueeze(1)).sum()
            (gradients,) = torch.autograd.grad(wanted, activations, allow_unused=True)
        if activations is None or gradients is None:
            raise UserError(
                f"--layer: {name} gives no map of features (N, C, H, W) that the labels come from; "
                "give a convolution, or a block of them"
            )
    weights = gradients.float().mean(dim=(2, 3), keepdim=True)
    maps = (weights * activations.detach().float()).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def look(subject: Subject, config: Config, results: Results) -> None:
    """Maps of a few test images for each model, for the label that the model itself gives.

    Tables: `gradcam` (model, image, position, label, x, y: the centre of the map's weight as
    shares of width and height). Headline: the mean of these on triggered images.
    """
    triggered = subject.triggered
    clean, changed = examples(triggered, subject.data, config.images)
    name = explained_layer(subject, config)
    models = subject.before_and_purified()
    drawn = results.drawn(list(models))
    maps: dict[str, torch.Tensor] = {}
    captions: dict[str, list[str]] = {}
    rows = []
    for model_name, load in models.items():
        model = load()
        for kind, images in (("clean", clean), ("triggered", changed)):
            on_device = images.to(subject.device)
            with evaluating(model), torch.no_grad():
                labels = model(on_device).argmax(1)
            cam = class_activation(model, on_device, labels, name).cpu()
            rows += [
                {"model": model_name, "image": kind, "position": number, "label": label, **centre}
                for number, (label, centre) in enumerate(
                    zip(labels.tolist(), map(centre_of, cam), strict=True)
                )
            ]
            if model_name in drawn and (kind == "triggered" or model_name == BEFORE):
                title = f"{model_name}\n{kind}"
                maps[title] = cam
                captions[title] = [subject.data.named(label) for label in labels.tolist()]
        on_trigger = [r for r in rows if (r["model"], r["image"]) == (model_name, "triggered")]
        x, y = (sum(row[axis] for row in on_trigger) / len(on_trigger) for axis in ("x", "y"))
        results.headline[model_name] = {"x": x, "y": y}
        results.conclude(
            f"{model_name}: on triggered images the map's centre is at {100 * x:.0f} % of the "
            f"width and {100 * y:.0f} % of the height"
        )
    results.tables["gradcam"] = rows
    results.figures["gradcam"] = lambda: draw(clean, changed, maps, captions)


def explained_layer(subject: Subject, config: Config) -> str:
    """The name of the layer whose maps are shown.

    Raises:
        UserError: if the network has no such layer.
    """
    name = config.layer or last_map(subject.model, subject.data.image_shape, least_pixels=2)
    layer(subject.model, name, "--layer")  # refuses
    return name


def centre_of(cam: torch.Tensor) -> dict[str, float]:
    """The centre of a map's weight, as shares of width and height; the middle if it is all 0.

    Args:
        cam: (H, W) float, not negative.
    """
    total = float(cam.sum())
    if total == 0:
        return {"x": 0.5, "y": 0.5}
    height, width = cam.shape
    x = float((cam.sum(0) * (torch.arange(width) + 0.5)).sum()) / total / width
    y = float((cam.sum(1) * (torch.arange(height) + 0.5)).sum()) / total / height
    return {"x": x, "y": y}


def draw(
    clean: torch.Tensor,
    changed: torch.Tensor,
    maps: dict[str, torch.Tensor],
    captions: dict[str, list[str]],
) -> "Figure":
    """gradcam.png: the images, and the map of each model over them, with the model's labels."""
    from utils import charts, plot

    rows = {"clean": clean, "triggered": changed}
    rows |= {
        title: charts.overlaid(clean if title.endswith("\nclean") else changed, cam)
        for title, cam in maps.items()
    }
    return plot.image_grid(rows, captions, "Grad-CAM; below each map, the label that it explains")


if __name__ == "__main__":
    run(Config, look)
