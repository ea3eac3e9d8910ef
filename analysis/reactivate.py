"""Reactivate: one small perturbation that is added to triggered images and wakes a hidden backdoor.

Zhu, Liang, Wu. *Breaking the False Sense of Security in Backdoor Defense through
Re-Activation Attack.* NeurIPS 2024, arXiv 2405.16134.

One delta for all images, |delta| <= 0.05, is searched with the purified model's gradients on
triggered training images:

    x' = clip(x + trigger + delta)
    min over delta   CE(h(x'), t) + mean of -log(1.0001 - p_h(x')[other])

where `other` is the top class, or the second one if the top class is t. Then ASR is measured on
triggered test images with this delta.

    python analysis/reactivate.py --result_file badnet_demo --clean_record clean_demo

Controls: the same delta on clean test images of other classes, and the same search against a clean
model. A purified model may give in to any perturbation, and then it need not hold a backdoor.
Steps are plain gradient steps, without sign and momentum. The images are the poisoned ones that the
record stores; those of clean-label attacks are of the target class, and wake little.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import CLEAN, AnalysisConfig, Results, percent, run
from analysis.subject import Controlled, Subject
from models.modes import evaluating, frozen
from utils.config import Group
from utils.data.batches import as_float
from utils.metrics import Rate
from utils.perturb import project
from utils.process.seeds import generator
from utils.training.evaluate import predict

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Controlled):
    bound: Annotated[float, Field(ge=0, le=1, description="largest |delta|, pixels in [0, 1]")]
    step_size: Annotated[float, Field(gt=0, description="times the gradient is a step")]
    outer_steps: Annotated[
        int, Field(ge=0, description="passes over the triggered images"), Group.TRAINING
    ]
    inner_steps: Annotated[int, Field(ge=1, description="steps on each batch of a pass")]
    images: Annotated[int, Field(ge=1, description="triggered training images, at most")]
    batch_size: Annotated[int, Field(ge=1, description="images per step")]

    needs_trigger = needs_poison = needs_defenses = True


def reactivation_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """CE(h(x'), t) + mean of -log(1.0001 - p_other); see the head of this file.

    Shape:
        (N, K) float, (N,) int64 -> scalar.
    """
    probabilities = logits.softmax(1)
    others = probabilities.scatter(1, targets.unsqueeze(1), -1.0)  # t is never the largest
    other = others.max(1).values
    return F.cross_entropy(logits, targets) - (1.0001 - other).log().mean()


def search(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, config: Config
) -> torch.Tensor:
    """The perturbation, one for all images.

    Args:
        model: used in eval mode, left as it was.
        images: (N, C, H, W) triggered images, float in [0, 1] or uint8.
        targets: (N,) int64, the attacker's labels.

    Returns:
        (1, C, H, W) float, in pixels, within the bound.
    """
    device = next(model.parameters()).device
    draws = generator(config.random_seed, "reactivation")
    shape = (1, *images.shape[1:])
    delta = (config.bound * (2 * torch.rand(shape, generator=draws) - 1)).to(device)
    with evaluating(model), frozen(model):
        for _ in range(config.outer_steps):
            for index in torch.randperm(len(images), generator=draws).split(config.batch_size):
                batch, wanted = as_float(images[index], device), targets[index].to(device)
                for _ in range(config.inner_steps):
                    moving = delta.clone().requires_grad_()
                    loss = reactivation_loss(model((batch + moving).clamp(0, 1)), wanted)
                    (gradient,) = torch.autograd.grad(loss, moving)
                    delta = project(delta - config.step_size * gradient, config.bound, "L_inf")
    return delta


def with_delta(images: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """clip(x + delta): (N, C, H, W) of any kind, (1, C, H, W) -> float in [0, 1], on the CPU."""
    return (as_float(images) + delta.cpu()).clamp(0, 1)


def look(subject: Subject, config: Config, results: Results) -> None:
    """ASR with the perturbation that was made for each model, beside its controls.

    Tables: `reactivate` (model; `asr`, `asr_reactivated`, `clean_as_target` with counts). Headline:
    the same rates; of a model that has collapsed, only the first one.
    """
    images, targets = triggered_training_images(subject, config, results)
    models = subject.purified_and_clean()
    results.lack_of_control(
        subject.clean,
        "whether such a perturbation also fools a model that never had a backdoor is not known",
    )
    rows = []
    for name, load in models.items():

        def attack(load: Any = load) -> dict[str, Any]:
            model = load()
            return measured(subject, model, search(model, images, targets, config))

        rows.append({"model": name, **results.step(name, attack)})
    results.tables["reactivate"] = rows
    rates = ("asr", "asr_reactivated", "clean_as_target")
    results.headline |= {row["model"]: {rate: row[rate] for rate in rates} for row in rows}
    for name in results.collapsed & results.headline.keys():
        results.headline[name] |= {"asr_reactivated": None, "clean_as_target": None}
    control = results.headline.get(CLEAN)
    for name, numbers in results.headline.items():
        if name != CLEAN and name not in results.collapsed:
            text = (
                f"{name}: ASR {percent(numbers['asr'])} -> {percent(numbers['asr_reactivated'])} "
            )
            text += f"with the perturbation, which sends {percent(numbers['clean_as_target'])} of "
            text += "clean images to the target"
            if control is not None:
                text += f"; a clean model: {percent(control['asr_reactivated'])}"
            results.conclude(text)
    if rows:
        results.figures["reactivate"] = lambda: draw(results.headline)


def triggered_training_images(
    subject: Subject, config: Config, results: Results
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of the record's poisoned training images, and the attacker's labels."""
    stored = subject.poisoned_images(results)
    draws = generator(config.random_seed, "triggered images")
    rows = torch.randperm(len(stored.index), generator=draws)[: config.images]
    if torch.equal(stored.labels[rows], stored.clean.labels[stored.index[rows]]):
        results.warn(
            "the stored poisoned images are of the target class (clean-label attack): a "
            "perturbation that is made on them says little"
        )
    return stored.images[rows], stored.labels[rows]


def measured(subject: Subject, model: nn.Module, delta: torch.Tensor) -> dict[str, Any]:
    """ASR without and with a perturbation, and what the perturbation does to clean images.

    `clean_as_target`: of the clean test images behind the triggered ones, the share that gets the
    attacker's label with the perturbation alone.
    """
    triggered = subject.triggered
    clean = subject.data.test.images[triggered.index]
    rows: dict[str, Any] = {}
    for name, images in (
        ("asr", triggered.images),
        ("asr_reactivated", with_delta(triggered.images, delta)),
        ("clean_as_target", with_delta(clean, delta)),
    ):
        labels = predict(model, images, subject.device)
        rate = Rate(int((labels == triggered.targets).sum()), len(labels))
        rows |= {name: rate.value, f"{name}_hits": rate.hits, f"{name}_total": rate.total}
    return rows


def draw(headline: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """reactivate.png: a group of bars for each model."""
    import pandas as pd

    from utils import charts

    names = {
        "asr": "ASR",
        "asr_reactivated": "ASR with the perturbation",
        "clean_as_target": "clean images with the perturbation, sent to the target",
    }
    table = 100 * pd.DataFrame(headline).T[list(names)].astype(float)
    return charts.grouped_bars(
        table.rename(columns=names), "percent", "Re-activation by one small perturbation"
    )


if __name__ == "__main__":
    run(Config, look)
