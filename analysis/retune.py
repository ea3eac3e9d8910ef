"""Retune: lets the purified model see a few poisoned images again, and watches the backdoor return.

Min, Qin, Zhang, Shen, Cheng. *Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense.* NeurIPS 2024, arXiv 2410.09838.

A purified model is fine-tuned on a small clean draw in which k images are replaced by poisoned
training images with the attacker's label. A model without a backdoor needs many of them to learn
the trigger; a model that only hides it needs few. Each k starts anew from the purified model, and
all models see the same images in the same order.

    python analysis/retune.py --result_file badnet_demo --clean_record clean_demo

Controls, without which the numbers say little: a clean model of the same recipe that is retuned
alike (what learning the trigger from nothing takes), and exact purification: the backdoored model
fine-tuned alike on the same clean draw and as many of its real poisoned images, with their true
labels (about the best that a defense can do, for these values of `--n_rounds` and `--lr`).
SGD without weight decay, in train mode; clean images are augmented, poisoned ones are not. Attacks
that control training store poisoned images that the model has not seen; these are used.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import RETUNED_WITH
from analysis.base import CLEAN, EXACT, AnalysisConfig, Results, percent, run
from analysis.subject import Controlled, Subject
from models.copies import copied
from utils.config import Group
from utils.data.batches import as_float, augment
from utils.errors import UserError, listed
from utils.process.seeds import generator
from utils.training.guard import seeded
from utils.training.loop import batch_sizes

if TYPE_CHECKING:
    from utils.plot import Figure


@dataclass(frozen=True, kw_only=True)
class Config(AnalysisConfig, Controlled):
    ratio: Annotated[float, Field(gt=0, le=1, description="images it is tuned on / training set")]
    poisoned_images: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(description="how many of them are replaced by poisoned ones, each tried in turn"),
    ]
    n_rounds: Annotated[int, Field(ge=1, description="passes over them"), Group.TRAINING]
    batch_size: Annotated[int, Field(ge=2, description="images per step")]
    lr: Annotated[float, Field(gt=0, description="learning rate of SGD, constant")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD")]
    crop_padding: Annotated[int, Field(ge=0, le=64, description="pixels around a random crop")]
    flip: Annotated[bool, Field(description="mirror clean images at random")]

    needs_trigger = needs_poison = needs_defenses = True

    def check(self, subject: Subject) -> None:
        assert subject.attack is not None
        assert subject.attack.poison_index is not None
        drawn = subject.clean_draw(self.ratio, self.random_seed)
        usable_counts(self, min(len(drawn), len(subject.attack.poison_index)))


class Mixture(NamedTuple):
    """Images to tune on.

    Attributes:
        images, labels: uint8 (N, C, H, W) and int64 (N,).
        is_poisoned: bool (N,); these are not augmented.
    """

    images: torch.Tensor
    labels: torch.Tensor
    is_poisoned: torch.Tensor


def mixture(clean: Mixture, poisoned: Mixture, count: int) -> Mixture:
    """The clean draw with its first `count` images replaced by the first poisoned ones."""
    parts = (
        torch.cat([other[:count], first[count:]])
        for first, other in zip(clean, poisoned, strict=True)
    )
    return Mixture(*parts)


def tuned(model: nn.Module, data: Mixture, config: Config) -> nn.Module:
    """A copy of a model, fine-tuned on a mixture; the same draws for the same size of it.

    Returns:
        The copy, in eval mode.
    """
    model = copied(model)
    device = next(model.parameters()).device
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=config.sgd_momentum)
    order = generator(config.random_seed, "retuning, order")
    crops = generator(config.random_seed, "retuning, augmentation")
    with seeded(config.random_seed):
        model.train()
        for _ in range(config.n_rounds):
            sizes = batch_sizes(len(data.labels), config.batch_size)
            for index in torch.randperm(len(data.labels), generator=order).split(sizes):
                images, labels, is_poisoned = (part[index] for part in data)
                moved = augment(images, config.crop_padding, config.flip, crops)
                images = torch.where(is_poisoned.view(-1, 1, 1, 1), images, moved)
                loss = F.cross_entropy(model(as_float(images, device)), labels.to(device))
                if not loss.isfinite():
                    raise UserError(
                        f"--lr: with {config.lr:g} the loss is not finite; give a smaller one"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.eval()
    return model


def look(subject: Subject, config: Config, results: Results) -> None:
    """ASR, RA and ACC of every model before and after it was tuned with k poisoned images.

    Tables: `retune` (model, poisoned_images: empty before, rates with counts). Headline:
    `asr_retuned` (5 images; None of a model that has collapsed), `asr` before, `acc_retuned`.
    """
    clean, poisoned, true_labels = images_of(subject, config, results)
    models: dict[str, Callable[[], nn.Module]] = {**subject.purified_and_clean()}
    results.lack_of_control(
        subject.clean,
        "whether the backdoor returns sooner than a clean model learns it is not known",
    )
    counts = usable_counts(config, min(len(clean.labels), len(poisoned.labels)), results)
    if torch.equal(poisoned.labels, true_labels):
        results.warn(
            "no exact purification: the poisoned images have their true labels (clean-label attack)"
        )
    else:
        truth = Mixture(poisoned.images, true_labels, poisoned.is_poisoned)
        models[EXACT] = lambda: exactly_purified(subject.model, config, clean, truth)
    rows = []
    for name, load in models.items():
        model = functools.cache(load)  # not loaded where an interrupted run has done all steps
        for count in (None, *counts):

            def scores(
                model: Callable[[], nn.Module] = model, count: int | None = count
            ) -> dict[str, Any]:
                if count is None:
                    return subject.score(model()).counts()
                return subject.score(
                    tuned(model(), mixture(clean, poisoned, count), config)
                ).counts()

            said = "before" if count is None else f"{count} poisoned images"
            point = results.step(f"{name}, {said}", scores)
            rows.append({"model": name, "poisoned_images": count, **point})
    results.tables["retune"] = rows
    for name in models:
        numbers = headline([row for row in rows if row["model"] == name])
        accuracies = numbers["acc_retuned"], subject.scores.acc.value
        has_collapsed = name in results.collapsed  # before, by the defense
        if has_collapsed or results.tell_collapse(name, *accuracies, " while it was tuned"):
            numbers["asr_retuned"] = None
        results.headline[name] = numbers
    conclude(results)
    results.figures["retune"] = lambda: draw(rows)


def usable_counts(config: Config, most: int, results: Results | None = None) -> list[int]:
    """The numbers of poisoned images for which there are enough.

    Args:
        results: gets a warning that names the others.

    Raises:
        UserError: if there is none.
    """
    counts = list(dict.fromkeys(config.poisoned_images))
    if not counts:
        raise UserError("--poisoned_images: a value is needed; give numbers like 0,5")
    usable = [count for count in counts if count <= most]
    if not usable:
        raise UserError(
            f"--poisoned_images: {listed(counts)}: there are only {most} images; give fewer, or "
            "raise --ratio"
        )
    if results is not None and len(usable) < len(counts):
        others = listed([count for count in counts if count > most])
        results.warn(f"not tried with {others} poisoned images: there are only {most} images")
    return usable


def images_of(
    subject: Subject, config: Config, results: Results
) -> tuple[Mixture, Mixture, torch.Tensor]:
    """The clean draw in a random order, the poisoned images likewise, and their true labels."""
    stored = subject.poisoned_images(results)
    order = generator(config.random_seed, "retuning")
    index = subject.clean_draw(config.ratio, config.random_seed)
    index = index[torch.randperm(len(index), generator=order)]
    drawn = subject.data.train.at(index)
    rows = torch.randperm(len(stored.index), generator=order)
    return (
        Mixture(drawn.images, drawn.labels, torch.zeros(len(index), dtype=torch.bool)),
        Mixture(stored.images[rows], stored.labels[rows], torch.ones(len(rows), dtype=torch.bool)),
        stored.clean.labels[stored.index[rows]],
    )


def exactly_purified(model: nn.Module, config: Config, clean: Mixture, truth: Mixture) -> nn.Module:
    """A backdoored model, tuned on the clean draw and as many poisoned images, truly labelled.

    Args:
        truth: poisoned images with their true labels; fewer than clean ones if there are fewer.
    """
    count = len(clean.labels)
    both = (torch.cat([first, other[:count]]) for first, other in zip(clean, truth, strict=True))
    return tuned(model, Mixture(*both), config)


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ASR before, and ASR and ACC after retuning with five images, or the number nearest to it.

    Of two that are equally near it is the larger one; it is never 0, so there may be none.
    """

    def nearness(row: Mapping[str, Any]) -> tuple[int, int]:
        count = row["poisoned_images"]
        return abs(count - RETUNED_WITH), -count

    row = min((row for row in rows if row["poisoned_images"]), key=nearness, default={})
    return {
        "asr_retuned": row.get("asr"),
        "asr": rows[0]["asr"],
        "acc_retuned": row.get("acc"),
        "poisoned_images": row.get("poisoned_images"),
    }


def conclude(results: Results) -> None:
    """A sentence for each defense, beside its controls."""
    control = results.headline.get(CLEAN)
    for name, numbers in results.headline.items():
        if name in (CLEAN, EXACT) or numbers["asr_retuned"] is None:
            continue
        asr, after = numbers["asr"], numbers["asr_retuned"]
        text = f"{name}: ASR {percent(asr)} -> {percent(after)} after {numbers['poisoned_images']} "
        text += "poisoned images"
        if control is not None and control["asr_retuned"] is not None:
            text += f"; a clean model: {percent(control['asr_retuned'])}"
        results.conclude(text)


def draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """retune.png: ASR and ACC over the number of poisoned images, a curve for each model."""
    import pandas as pd

    from utils import charts

    table = pd.DataFrame(rows).dropna(subset=["poisoned_images"])
    order = list(dict.fromkeys(table["model"]))
    panels = {
        rate.upper(): 100
        * table.pivot(index="poisoned_images", columns="model", values=rate)[order]
        for rate in ("asr", "acc")
    }
    return charts.curves_of(
        panels,
        "poisoned images among those it is tuned on",
        "Re-learning: after a short fine-tuning with few poisoned images",
        controls=(CLEAN, EXACT),
        spaced=True,
    )


if __name__ == "__main__":
    run(Config, look)
