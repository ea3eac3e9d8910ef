"""What holds for every defense, present and future: the contract that `defense/base.py` states.

Names come from `defense.names()`, flags from each `Config`; see `every_defense.py`. That several
processes give what one gives is in `test_distributed.py`.
"""

import copy
import functools
import json
import math
import random
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import defense
import models
from defense import base
from models import Classifier, prepare
from models.changes import changes_of
from models.parts import bare
from models.userfile import build_user_model
from tests.conftest import Picture
from tests.every_defense import cases, fields, module, of_the_method, shortened
from tests.processes import Small
from tests.scripts import run_script, trained
from utils import plot
from utils.config import USER_FILES
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.errors import UserError
from utils.files import ROOT
from utils.plain import read_yaml
from utils.process.seeds import random_states
from utils.records.attack import AttackRecord, load_attack
from utils.records.defense import load_defense
from utils.tensors import load_tensors
from utils.training.evaluate import evaluate
from utils.training.loop import Loop
from utils.training.watch import Watch

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")
NAMES = defense.names()
every_defense = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize(("name", "changes"), cases().values(), ids=cases())

# Values with which a defense changes nothing, by a field that it may have.
IDENTITIES: dict[str, dict[str, Any]] = {
    "n_rounds": {"n_rounds": 0},
    "nb_iter": {"nb_iter": 0, "selection": "fixed"},
    "u": {"u": 1e9},
    "mad_threshold": {"mad_threshold": 1e9},
}

# Those whose pictures of their own kinds are drawn; pictures of other runs take no time.
DRAWN = ("bti_dbf", "nc", "sau")

# Defenses whose cuts take half a minute.
MANY_PHASES = ("bti_dbf", "pam")

# Defenses that scale the channels of convolutions, whose weights may be frozen.
SCALING = ("ims",)

# Values with which a defense is plain fine-tuning, by its name.
EQUALS_FT: dict[str, dict[str, Any]] = {"ft_sam": {"rho": 0.0, "label_smoothing": 0.0}}

# A user's network without BatchNorm, as a file.
PLAIN = """
from torch import nn


class Plain(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2)
        self.last = nn.Linear(8, classes)

    def forward(self, images):
        return self.last(self.second(self.first(images).relu()).relu().mean((2, 3)))


def build(num_classes, image_size):
    return Plain(num_classes)
"""


# --- a network, its images, and what comes of them -----------------------------------------------


def bright_data() -> Dataset:
    """37 training and 21 test images of four classes, 16 pixels, which differ in brightness."""
    source = torch.Generator().manual_seed(5)

    def split(count: int) -> Labelled:
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 100, (count, 3, 16, 16), generator=source)
        return Labelled((noise + 50 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    means, deviations = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)
    return Dataset("bright", split(37), split(21), ("a", "b", "c", "d"), means, deviations)


@functools.cache
def _fitted() -> Classifier:
    data = bright_data()
    torch.manual_seed(3)
    model = Classifier(Small(4), data.mean, data.std).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.images / 255), data.train.labels).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def fitted(dtype: torch.dtype = torch.float32) -> Classifier:
    """A small network with BatchNorm that has learned `bright_data`."""
    return copy.deepcopy(_fitted()).to(dtype)


def differences(one: Any, other: Any, where: str) -> list[str]:
    """Where two nested values differ; tensors bit for bit and in their type, NaN equals NaN."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other):
            return [f"{where}: {list(one)} and {list(other)}"]
        return [text for key in one for text in differences(one[key], other[key], f"{where} {key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [text for i, (a, b) in pairs for text in differences(a, b, f"{where} {i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        is_same = one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    elif isinstance(one, float) and isinstance(other, float):
        is_same = one == other or (math.isnan(one) and math.isnan(other))
    else:
        is_same = type(one) is type(other) and one == other
    return [] if is_same else [f"{where}: {one} and {other}"]


@dataclass
class Outcome:
    """What a defense gave.

    Attributes:
        model: the one that `purify` returned.
        rounds: phase, number, total and mean losses of each round.
        findings: as plain data and tensors.
    """

    model: nn.Module = field(default_factory=nn.Identity)
    rounds: list[tuple[Any, ...]] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)

    def differs_from(self, other: "Outcome") -> list[str]:
        """Where weights, losses or findings are not the same, bit for bit."""
        return [
            *differences(self.model.state_dict(), other.model.state_dict(), "weights"),
            *differences(self.rounds, other.rounds, "rounds"),
            *differences(self.findings, other.findings, "findings"),
        ]


def outcome(
    name: str,
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: base.DefenseConfig,
    after_batch: Callable[[Loop, int], None] | None = None,
    resume: Mapping[str, Any] | None = None,
) -> Outcome:
    """What `purify` gives, and what its loop was told.

    Args:
        after_batch: called with the loop, and the number of batches in the round.
        resume: a snapshot of the loop.
    """
    result = Outcome()

    def after_round(number: int, total: int, losses: dict[str, float], _: dict[str, Any]) -> None:
        result.rounds.append((loop.phase, number, total, dict(losses)))

    watch = None if after_batch is None else lambda batches: after_batch(loop, batches)
    loop = Loop(after_round, watch, resume=resume)
    result.model = module(name).purify(model, images, labels, config, loop)
    pictures = loop.findings.pictures  # some are made only where they are drawn
    pictures.update({name: made() for name, made in pictures.items() if callable(made)})
    result.findings = loop.findings.state_dict()
    return result


def on_bright(name: str, changes: Mapping[str, Any], **how: Any) -> Outcome:
    """The outcome for the fitted network and those of its training images that a defense sees."""
    data, model = bright_data(), fitted()
    config = shortened(name, model, **changes)
    seen = data.train.at(torch.arange(0 if config.sees == "nothing" else len(data.train)))
    return outcome(name, model, seen.images, seen.labels, config, **how)


@functools.cache
def _whole(name: str, changes: tuple[tuple[str, Any], ...]) -> Outcome:
    return on_bright(name, dict(changes))


def whole_run(name: str, changes: Mapping[str, Any]) -> Outcome:
    """What `on_bright` gives if nothing stops it; computed once."""
    return _whole(name, tuple(changes.items()))


def disturb() -> None:
    """Moves the global generators."""
    torch.rand(7)
    np.random.rand(7)
    random.random()


# --- what stays as it was ------------------------------------------------------------------------


def look(*_: Any) -> None:
    """A hook of the user's."""


def hooks(model: nn.Module) -> list[tuple[str, str, list[Any]]]:
    """Layer or weight, kind and functions of all hooks but those with which torch saves."""
    owners = [*model.named_modules(), *model.named_parameters()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_post_accumulate_grad_hooks",)
    hooked = [(name, kind, getattr(owner, kind, None)) for name, owner in owners for kind in kinds]
    return [(name, kind, list(functions.values())) for name, kind, functions in hooked if functions]


def attributes(layer: nn.Module) -> dict[str, Any]:
    """Plain values by name, and the types of all others, in an order; its mode is left out."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: value if isinstance(value, plain) else type(value)
        for name, value in sorted(vars(layer).items())
        if name != "training"
    }


def everything_of(model: nn.Module) -> dict[str, Any]:
    """What a defense must not change."""
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: weight.grad for name, weight in weights.items()},
        "learns": {name: weight.requires_grad for name, weight in weights.items()},
        "modes": {name: part.training for name, part in modules.items()},
        "types": {name: type(part) for name, part in modules.items()},
        "attributes": {name: attributes(part) for name, part in modules.items()},
        "hooks": hooks(model),
    }


def name_in(result: nn.Module, part: str) -> str:
    """What a layer or weight is called once a defense has put a part before the layer."""
    for change in changes_of(result):
        if f"{part}.".startswith(f"{change['layer']}."):
            return f"{change['layer']}.layer{part.removeprefix(change['layer'])}"
    return part


@every_case
def test_the_model_and_the_images_stay_as_they_were(name: str, changes: dict[str, Any]) -> None:
    """A user's own module in mixed modes, with a frozen weight and a hook: nothing of it moves.

    Its classes are torch's: a network with code of the user's own is copied before `purify`.

    The result is in eval mode, trains what the model trained, shares no memory with it, and has no
    gradients, and no hooks but those that came with the copy. Its layers are as they were, it has
    changed, and a frozen weight has not.
    """
    data, model = bright_data(), nn.Sequential(*fitted().network).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[2].register_forward_hook(look)
    images, labels = data.train.images.clone(), data.train.labels.clone()
    before = everything_of(model)
    result = outcome(name, model, images, labels, shortened(name, model, **changes)).model
    assert differences(before, everything_of(model), "model") == []
    assert torch.equal(images, data.train.images)
    assert torch.equal(labels, data.train.labels)

    assert [layer for layer, part in result.named_modules() if part.training] == []
    assert [functions for _, _, functions in hooks(result)] == [[look]]
    weights = dict(result.named_parameters())
    for weight, learns in before["learns"].items():
        assert weights[name_in(result, weight)].requires_grad == learns, weight
    assert [weight for weight, value in weights.items() if value.grad is not None] == []
    if name not in SCALING:
        frozen = weights[name_in(result, "0.weight")]
        assert torch.equal(frozen, before["state"]["0.weight"])
    assert differences(before["state"], result.state_dict(), "weights") != []
    for layer, values in before["attributes"].items():
        if layer:
            mine = attributes(result.get_submodule(name_in(result, layer)))
            assert differences(values, mine, layer) == []
    memory = {value.data_ptr() for value in model.state_dict().values()}
    assert not memory & {value.data_ptr() for value in result.state_dict().values()}


@every_case
def test_the_model_changes_here(name: str, changes: dict[str, Any]) -> None:
    """Else what is equal in these tests would also be what stands still."""
    images = bright_data().test.images / 255
    assert not torch.equal(fitted()(images), whole_run(name, changes).model(images))


@every_case
def test_a_network_may_compute_in_bf16(name: str, changes: dict[str, Any]) -> None:
    """As on a GPU: it is purified, and its weights stay finite float32."""
    data, model = bright_data(), prepare(fitted(), CPU, "bf16")
    config = shortened(name, model, **changes)
    seen = data.train.at(torch.arange(0 if config.sees == "nothing" else len(data.train)))
    state = outcome(name, model, seen.images, seen.labels, config).model.state_dict()
    floats = {key: value for key, value in state.items() if value.is_floating_point()}
    assert {value.dtype for value in floats.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in floats.values())
    assert differences(bare(fitted()).state_dict(), state, "weights") != []


# --- same seed, same images, same bits -----------------------------------------------------------


@pytest.mark.slow
@every_case
def test_the_same_seed_gives_the_same_bits(name: str, changes: dict[str, Any]) -> None:
    """Weights, losses and findings, whatever was drawn from the global generators meanwhile."""
    first = on_bright(name, changes)
    disturb()
    assert on_bright(name, changes).differs_from(first) == []


@every_case
def test_bytes_and_floats_are_the_same_images(name: str, changes: dict[str, Any]) -> None:
    """uint8, and the same over 255; in float64, since their order in memory is not the same."""
    data, model = bright_data(), fitted(torch.float64)
    config = shortened(name, model, **changes)
    state, other = (
        outcome(name, model, images, data.train.labels, config).model.state_dict()
        for images in (data.train.images, data.train.images.float() / 255)
    )
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.allclose(value.double(), other[key].double(), rtol=0, atol=1e-6), key


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(*case, id=key, marks=[pytest.mark.slow] if case[0] in MANY_PHASES else [])
        for key, case in cases().items()
    ],
)
def test_a_run_cut_in_each_phase_goes_on_bit_for_bit(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """Cut after the first batch of each phase, and around the end of its first round.

    Only a defense without any step of an optimizer may do without batches.
    """
    whole = whole_run(name, changes)
    snapshots: dict[tuple[str, int, int], Path] = {}
    steps: list[None] = []

    def keep(loop: Loop, batches: int) -> None:
        loop.findings.facts["mark"] = "a resumed run does not find this again, but keeps it"
        number, batch = loop.position
        if (number, batch) in ((1, 1), (1, batches), (2, 1)):
            path = tmp_path / f"{len(snapshots)}.pt"
            torch.save(loop.snapshot(), path)
            snapshots[loop.phase, number, batch] = path

    hook = register_optimizer_step_post_hook(lambda *_: steps.append(None))
    try:
        watched = on_bright(name, changes, after_batch=keep)
    finally:
        hook.remove()
    watched.findings["facts"].pop("mark", None)
    assert watched.differs_from(whole) == []
    begun = [(phase, number) for phase, number, *_ in whole.rounds]
    can_be_cut = {phase for phase, _, _ in snapshots} == {phase for phase, _ in begun}
    assert can_be_cut or not steps
    for (phase, number, batch), path in snapshots.items():
        disturb()
        snapshot = load_tensors(path)
        resumed = on_bright(name, changes, after_batch=lambda *_: None, resume=snapshot)
        rest = replace(whole, rounds=whole.rounds[begun.index((phase, number)) :])
        cut = f"cut in phase {phase!r}, round {number}, after batch {batch}"
        assert resumed.findings["facts"].pop("mark", None), cut
        assert resumed.differs_from(rest) == [], cut


# --- networks that lack something ----------------------------------------------------------------


class Noting(Loop):
    """A loop that notes the rounds that begin."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[str, int]] = []

    def rounds(self, *arguments: Any, **named: Any) -> Iterator[int]:
        for number in super().rounds(*arguments, **named):
            self.begun.append((self.phase, number))
            yield number


@every_defense
def test_a_network_without_batchnorm_works_or_is_refused_in_one_line(
    tmp_path: Path, name: str
) -> None:
    """Changed; or refused before a round begins, by a line that names what it lacks."""
    (tmp_path / "plain.py").write_text(PLAIN, encoding="utf-8")
    torch.manual_seed(3)
    data, model = bright_data(), build_user_model(f"{tmp_path / 'plain.py'}:build", 4, 16)
    before, loop, refused = everything_of(model), Noting(), None
    config = shortened(name, model)
    try:
        result = module(name).purify(model, data.train.images, data.train.labels, config, loop)
        logits = [network(data.test.images / 255) for network in (model, result)]
        assert not torch.equal(*logits)
    except UserError as error:
        refused = str(error)
    assert (refused is None) == bool(loop.begun)
    assert refused is None or ("BatchNorm" in refused and len(refused.splitlines()) == 1)
    assert differences(before, everything_of(model), "model") == []


# --- what is refused, and what a network draws by itself -----------------------------------------


def refused(name: str, model: nn.Module, images: Any, labels: Any, **changes: Any) -> str:
    """The one line of a `purify` that is given nonsense; nothing else may come of it."""
    config = shortened(name, fitted(), **changes)
    with pytest.raises(UserError) as caught:
        module(name).purify(model, images, labels, config)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def float_images() -> torch.Tensor:
    return bright_data().train.images / 255


NONSENSE_IMAGES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "255": (lambda x: x * 255, "floats in [0, 1]"),
    "normalized": (lambda x: (x - 0.5) / 0.2, "before any normalization"),
    "a little over": (lambda x: x + 0.4, "floats in [0, 1]"),
    "a little under": (lambda x: x - 0.2, "floats in [0, 1]"),
    "one NaN": (lambda x: x.index_put((torch.tensor(36),), torch.tensor(math.nan)), "nan"),
    "one inf": (lambda x: x.index_put((torch.tensor(36),), torch.tensor(math.inf)), "inf"),
    "int64": (lambda x: x.long(), "torch.int64"),
    "bool": (lambda x: x > 0.5, "torch.bool"),
    "complex": (lambda x: x + 0j, "complex"),
    "an image": (lambda x: x[0], "(N, C, H, W)"),
    "rows": (lambda x: x.flatten(1), "(N, C, H, W)"),
    "five": (lambda x: x.unsqueeze(0), "(N, C, H, W)"),
    "no pixels": (lambda x: x[:, :, :0], "(N, C, H, W)"),
    "no channels": (lambda x: x[:, :0], "(N, C, H, W)"),
    "an array": (lambda x: x.numpy(), "ndarray is no tensor"),
    "nothing": (lambda x: None, "NoneType is no tensor"),
    "grey": (lambda x: x[:, :1].repeat(1, 5, 1, 1), "cannot take images of shape"),
    "small": (lambda x: x[:, :, :4, :4], "cannot take images of shape"),
    "last first": (lambda x: x.permute(0, 2, 3, 1), "cannot take images of shape"),
}

NONSENSE_LABELS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "twice": (lambda y: y.repeat(2), "for 37 images"),
    "half": (lambda y: y[:18], "for 37 images"),
    "one hot": (lambda y: F.one_hot(y), "for 37 images"),
    "float": (lambda y: y.float(), "int64"),
    "int32": (lambda y: y.int(), "int64"),
    "from 1": (lambda y: y + 1, "give 0 to 3"),
    "one is -1": (lambda y: y.index_fill(0, torch.tensor(5), -1), "give 0 to 3"),
    "a list": (lambda y: y.tolist(), "list is no tensor"),
    "nothing": (lambda y: None, "NoneType is no tensor"),
}


@pytest.mark.slow
@every_defense
@pytest.mark.parametrize(("change", "said"), NONSENSE_IMAGES.values(), ids=NONSENSE_IMAGES)
def test_images_that_are_none_are_refused(
    name: str, change: Callable[[torch.Tensor], Any], said: str
) -> None:
    assert said in refused(name, fitted(), change(float_images()), bright_data().train.labels)


@pytest.mark.slow
@every_defense
@pytest.mark.parametrize(("change", "said"), NONSENSE_LABELS.values(), ids=NONSENSE_LABELS)
def test_labels_that_are_none_are_refused(
    name: str, change: Callable[[torch.Tensor], Any], said: str
) -> None:
    assert said in refused(name, fitted(), float_images(), change(bright_data().train.labels))


@every_defense
def test_no_image_is_refused_by_who_needs_some(name: str) -> None:
    """Who sees nothing works without; who reads no labels works without these."""
    images, labels, model = float_images(), bright_data().train.labels, fitted()
    config = shortened(name, model)
    if config.sees == "nothing":
        module(name).purify(model, images[:0], labels[:0], config)
    else:
        assert "there is none" in refused(name, model, images[:0], labels[:0])
    if isinstance(config, base.CleanData):
        assert "for 37 images" in refused(name, model, images, labels[:0])
    else:
        module(name).purify(model, images, labels[:0], config)


class Strange(nn.Module):
    """Gives something else than its logits.

    Args:
        change: from logits to what it gives.
    """

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = fitted(), change

    def forward(self, images: torch.Tensor) -> Any:
        return self.change(self.inner(images))


@every_defense
def test_a_network_that_is_none_is_refused(name: str) -> None:
    images, labels = float_images(), bright_data().train.labels
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    for model, said in (
        (lazy, "lazy layer was never called"),
        (nn.Flatten(), "has no weights"),
        (lambda x: x, "is no network"),
        (Strange(lambda logits: (logits, logits)), "gives tuple"),
        (Strange(lambda logits: logits[:1]), "logits (N, K) are needed"),
        (Strange(lambda logits: logits[:, :0]), "logits (N, K) are needed"),
        (Strange(lambda logits: logits.squeeze()), "gives (4,) for one image"),
        (nn.Sequential(*list(fitted().network)[:-2]), "logits (N, K) are needed"),
    ):
        assert said in refused(name, model, images, labels)  # type: ignore[arg-type]
    assert isinstance(lazy[0], nn.LazyConv2d)  # the look at it was at a copy


@every_case
def test_pixels_at_the_bounds_and_beyond_by_rounding_are_taken(
    name: str, changes: dict[str, Any]
) -> None:
    images, model = float_images(), fitted()
    images[0], images[1] = 1 + 1e-6, -1e-6
    config = shortened(name, model, **changes)
    module(name).purify(model, images, bright_data().train.labels, config)


def with_dropout() -> nn.Module:
    """The fitted network, which drops features before its last layer in train mode."""
    layers = list(fitted().network)
    return nn.Sequential(*layers[:-1], nn.Dropout(0.5), layers[-1])


@pytest.mark.slow
@every_case
def test_a_network_with_dropout_gives_the_same_bits(name: str, changes: dict[str, Any]) -> None:
    """Whatever the global generators hold; they are then as they were. Another seed differs."""
    data, states = bright_data(), []
    given = data.train.images, data.train.labels

    def run(**more: Any) -> Outcome:
        disturb()
        states.append(random_states())
        config = shortened(name, with_dropout(), **{**changes, "train_mode": True, **more})
        result = outcome(name, with_dropout(), *given, config)
        assert differences(random_states(), states[-1], "generators") == []
        return result

    first, second, third = run(), run(), run(random_seed=1)
    assert second.differs_from(first) == []
    assert differences(states[0], states[1], "generators") != []
    if any(losses for *_, losses in first.rounds):
        assert differences(third.rounds, first.rounds, "rounds") != []


@every_defense
def test_generators_are_put_back_after_a_refusal(name: str) -> None:
    before = random_states()
    refused(name, fitted(), float_images() * 255, bright_data().train.labels)
    assert differences(random_states(), before, "generators") == []


def narrow() -> nn.Module:
    """BatchNorm of one value per channel and image, which knows nothing of one image."""
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    last = (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(*layers, *last).eval()


@pytest.mark.slow
@every_case
@pytest.mark.parametrize(("count", "batch_size"), [(37, 12), (37, 36), (3, 2), (37, 1), (1, 16)])
def test_a_batch_of_one_image_works_or_is_told_in_one_line(
    name: str, changes: dict[str, Any], count: int, batch_size: int
) -> None:
    """A last one works in every defense; else the line comes before a single step was made."""
    data = bright_data().train.at(torch.arange(count))
    steps: list[Any] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    config = shortened(name, narrow(), **{**changes, "batch_size": batch_size, "val_ratio": 0.4})
    said = ""
    try:
        outcome(name, narrow(), data.images, data.labels, config)
    except UserError as error:
        said = str(error)
    finally:
        hook.remove()
    if said:
        assert min(count, batch_size) == 1
        assert "a --batch_size of at least 2" in said
        assert len(said.splitlines()) == 1
        assert steps == []


# --- configurations that change nothing ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        pytest.param(name, {**changes, **values}, id=f"{key}-{given}")
        for key, (name, changes) in cases().items()
        for given, values in IDENTITIES.items()
        if given in fields(module(name).Config) and {**values, **changes} == {**changes, **values}
    ],
)
def test_the_identity_gives_the_model_bit_for_bit(name: str, values: dict[str, Any]) -> None:
    """Without rounds, or with a threshold that nothing exceeds: weights, buffers and logits.

    The model is in train mode, and its copy is not.
    """
    data, model = bright_data(), fitted().train()
    images, labels = data.train.images, data.train.labels
    result = outcome(name, model, images, labels, shortened(name, model, **values)).model
    assert differences(fitted().state_dict(), result.state_dict(), "weights") == []
    assert [layer for layer, part in result.named_modules() if part.training] == []
    images = data.test.images / 255
    assert torch.equal(fitted()(images), result(images))


@pytest.mark.parametrize(("name", "values"), EQUALS_FT.items())
def test_what_is_plain_fine_tuning_equals_ft_bit_for_bit(name: str, values: dict[str, Any]) -> None:
    """With the schedule of FT, crops and mirrored images."""
    schedule = {"lr_scheduler": "cosine"}
    assert on_bright(name, {**schedule, **values}).differs_from(on_bright("ft", schedule)) == []


# --- what is said of it --------------------------------------------------------------------------


GROUPS = {
    "What the defense sees": ("ratio", "index", "data"),
    "Selection on held-out images": ("selection", "val_ratio", "acc_ratio"),
    "Inversion of the trigger": (
        *("inversion_rounds", "identity_epochs", "mask_epochs", "generator_epochs"),
        *("generator_width", "mask_lr", "generator_lr", "image_bound", "feature_bound"),
        "generated_ratio",
    ),
    "Record and folder": (
        *("result_file", "record_path", "overwrite", "resume"),
        *("save_folder_name", "checkpoint_every"),
    ),
    "Data": ("dataset", "dataset_path"),
    "Network": ("model",),
    "Training": (
        *("crop_padding", "flip", "n_rounds", "batch_size", "eval_every"),
        *("lr", "lr_scheduler", "sgd_momentum", "wd"),
    ),
    "Running: seed, device, precision": ("random_seed", "device", "precision", "deterministic"),
    "Your own files": tuple(USER_FILES),
}


@every_defense
def test_help_shows_the_flags_that_act_by_what_they_are_for(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that `defense/base.py` does not have come first, and with them those of pruning."""
    config = module(name).Config
    assert run_script(ROOT / f"defense/{name}.py", "--help") == 0
    text = capsys.readouterr().out
    blocks = text[text.index("\nflags, with") :].strip().split("\n\n")[1:]
    shown = {
        block.splitlines()[0]: re.findall(r"^  --(\w+)", block, flags=re.M) for block in blocks
    }
    bases = {
        flag
        for owner in config.__mro__
        if owner.__module__ == base.__name__
        for flag in fields(owner)
    }
    of_masks = set(fields(base.Masked)) - set(fields(base.HeldOut))
    of_outliers = set(fields(base.Outlying)) - set(fields(base.Rounds))
    method = [flag for flag in fields(config) if flag not in bases - of_masks - of_outliers]
    assert shown.pop("This defense", []) == method
    expected = {
        title: [flag for flag in flags if flag in bases or flag in USER_FILES]
        for title, flags in GROUPS.items()
    }
    assert shown == {title: flags for title, flags in expected.items() if flags}
    assert list(shown) == [title for title in GROUPS if title in shown]


@every_defense
def test_what_it_sees_is_what_its_bases_say(name: str) -> None:
    """One kind of images, or none; who sees none has no flag that would choose some."""
    config = module(name).Config.load()
    assert config.sees in get_args(base.Sees)
    if isinstance(config, base.PoisonedData):
        kinds = ("poisoned", "clean")
        assert tuple(replace(config, data=kind).sees for kind in kinds) == kinds
    elif isinstance(config, base.CleanData):
        assert config.sees == "clean"
    else:
        assert config.sees == "nothing"
        assert not {"ratio", "index", "batch_size"} & {*fields(config)}


# --- scripts -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' usual network becomes a small one."""
    monkeypatch.setitem(models.CONSTRUCTORS, "preactresnet18", Small)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures become ones that take no time."""
    without_pictures(monkeypatch)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    for drawing in ("curves", "image_grid"):
        patch.setattr(plot, drawing, lambda *_: Picture())


@pytest.fixture(scope="module")
def attacked(workplace: Path) -> Path:
    """The record of an attack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONSTRUCTORS, "preactresnet18", Small)
        return trained(workplace, "attacked", patch)


def script_flags(attack: AttackRecord, name: str, model: nn.Module) -> list[str]:
    """The flags of a shortened run on a record."""
    values: dict[str, Any] = of_the_method(shortened(name, model, ratio=0.5, batch_size=9))
    values |= {"result_file": attack.folder, "device": "cpu", "precision": "fp32"}
    texts = {
        flag: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for flag, value in values.items()
    }
    return [part for flag, text in texts.items() for part in (f"--{flag}", text)]


@dataclass(frozen=True)
class Purified:
    """What the script of the defense `name` left in `folder`, beside the record of `attack`."""

    name: str
    folder: Path
    attack: AttackRecord
    config: base.DefenseConfig

    def again(self) -> Outcome:
        """The same by hand, from the images that the defense may see."""
        given = base.seen_images(self.config, self.attack, self.attack.load_dataset())
        model = prepare(self.attack.build(), CPU, "fp32")
        return outcome(self.name, model, given.images, given.labels, self.config)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a defense's result, as they are stored."""
    return load_tensors(folder / "defense_result.pt")["model"]


@pytest.fixture(scope="module", params=NAMES)
def purified(request: pytest.FixtureRequest, attacked: Path) -> Purified:
    """A finished run of a defense's script."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONSTRUCTORS, "preactresnet18", Small)
        if name not in DRAWN:
            without_pictures(patch)
        attack = load_attack(attacked)
        flags = script_flags(attack, name, attack.build())
        assert run_script(ROOT / f"defense/{name}.py", *flags) == 0
    folder = attacked / "defense" / name
    config = module(name).Config.load(**read_yaml(folder / "config.yaml"))
    return Purified(name, folder, attack, config)


def test_the_script_leaves_what_purify_gives(purified: Purified) -> None:
    """`load_defense` makes the same model: weights, and logits of every test image.

    It is in eval mode, and not the model before.
    """
    again, loaded = purified.again().model, load_defense(purified.folder)
    assert differences(bare(loaded).state_dict(), bare(again).state_dict(), "weights") == []
    assert differences(bare(loaded).state_dict(), purified.attack.state, "weights") != []
    assert [layer for layer, part in loaded.named_modules() if part.training] == []
    prepare(loaded, CPU, "fp32")  # the same order in memory
    for images in (purified.attack.load_dataset().test.images, purified.attack.triggered.images):
        assert torch.equal(loaded(images / 255), again(images / 255))


def test_the_summary_tells_the_scores_of_the_model_that_is_saved(purified: Purified) -> None:
    """Those of `load_defense` after and of the record before, with their counts, and DER.

    `metrics.csv` begins with the scores before and ends with those after.
    """
    summary, attack = summary_of(purified.folder), purified.attack
    test = attack.load_dataset().test
    before, after = (
        evaluate(model, test, attack.triggered, CPU)
        for model in (attack.build(), load_defense(purified.folder))
    )
    assert summary["before"] == before.counts()
    assert summary["after"] == after.counts()
    drop = {rate: before.values()[rate] - after.values()[rate] for rate in ("acc", "asr")}
    assert summary["der"] == (max(0, drop["asr"]) - max(0, drop["acc"]) + 1) / 2
    metrics = pd.read_csv(purified.folder / "metrics.csv", dtype=str).astype(float)
    assert metrics["round"].iloc[0] == 0
    for rate in before.values():
        assert metrics[rate].iloc[0] == before.values()[rate]
        assert metrics[rate].iloc[-1] == after.values()[rate]


def test_the_summary_tells_what_was_seen_and_how_long_it_took(purified: Purified) -> None:
    """The kind and number of images, whose indices stand in a file of that kind."""
    summary, config, attack = summary_of(purified.folder), purified.config, purified.attack
    assert summary["defense"] == purified.name
    assert summary["attack_sha256"] == attack.sha256
    last = pd.read_csv(purified.folder / "metrics.csv")["round"].iloc[-1]
    assert summary["rounds"] == (last if hasattr(config, "n_rounds") else None)
    index = base.seen_images(config, attack, attack.load_dataset()).index
    assert len(index) == (0 if config.sees == "nothing" else 18)  # half of 36
    assert summary["sees"] == config.sees
    assert summary["seen_images"] == len(index)
    assert summary["clean_images"] == (len(index) if config.sees == "clean" else 0)
    if config.sees != "nothing":
        lines = (purified.folder / f"{config.sees}_index.txt").read_text().split()
        assert [int(line) for line in lines] == index.tolist()
    assert 0 <= summary["purify_seconds"] <= summary["seconds"] + 0.06  # both are rounded


def test_the_script_leaves_these_files_and_no_others(purified: Purified) -> None:
    """Those of every defense, the list of its images, and one for each picture and table found.

    `phases.csv` has the rounds of the phases before the main one, if there are any.
    """
    again, folder = purified.again(), purified.folder
    main = [number for phase, number, *_ in again.rounds if not phase]
    earlier = [(phase, number) for phase, number, *_ in again.rounds if phase]
    expected = ["config.yaml", "defense_result.pt", "metrics.csv", "summary.json", "log.txt"]
    expected += ["curves.png", "before_after.png", "run.json"]
    if purified.config.sees != "nothing":
        expected.append(f"{purified.config.sees}_index.txt")
    if earlier:
        expected.append("phases.csv")
    expected += [f"{picture}.png" for picture in again.findings["pictures"]]
    expected += [f"{table}.csv" for table, rows in again.findings["tables"].items() if rows]
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert summary_of(folder).get("findings", {}) == again.findings["facts"]
    assert pd.read_csv(folder / "metrics.csv")["round"].tolist() == [0, *main]
    if earlier:
        phases = pd.read_csv(folder / "phases.csv")
        assert [*zip(phases["phase"], phases["round"], strict=True)] == earlier


@pytest.mark.usefixtures("no_pictures")
def test_test_sets_of_noise_change_no_weight(
    purified: Purified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test images, triggers and labels, twice as many: the same weights bit for bit."""
    source = torch.Generator().manual_seed(1)

    def noise(count: int) -> torch.Tensor:
        shape = (count, *attack.image_shape)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)

    attack, data = purified.attack, purified.attack.load_dataset()
    test = Labelled(noise(36), data.test.labels.flip(0).repeat(2))
    labels = [getattr(attack.triggered, name) for name in ("targets", "labels", "index")]
    triggered = Triggered(noise(24), *(values.repeat(2) for values in labels))
    monkeypatch.setattr(type(attack), "load_dataset", lambda *_: replace(data, test=test))
    monkeypatch.setattr("defense.base.load_attack", lambda _: replace(attack, triggered=triggered))
    config = replace(purified.config, save_folder_name=f"{purified.name}-noise")
    folder = base.defend(config, purified.name, module(purified.name).purify).path
    assert differences(weights_of(folder), weights_of(purified.folder), "weights") == []
    summary = summary_of(folder)
    assert summary["after"] == evaluate(load_defense(folder), test, triggered, CPU).counts()
    assert (summary["before"]["acc_total"], summary["before"]["asr_total"]) == (36, 24)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_script_that_is_stopped_in_each_phase_goes_on(
    purified: Purified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM comes in the first batch of each phase, and --resume follows each time.

    Weights, tables and findings are those of the run in one go.
    """
    stopped: list[str] = []
    asked: list[int] = []
    after_batch = Watch._after_batch

    def ask(watch: Watch, batches: int) -> None:
        loop = watch._loop
        if loop.position == (1, 1) and loop.phase not in stopped:
            stopped.append(loop.phase)
            asked.append(signal.SIGTERM)
        after_batch(watch, batches)

    monkeypatch.setattr(Watch, "_after_batch", ask)
    monkeypatch.setattr("utils.training.watch.stop_signal", lambda: asked[0] if asked else None)
    folder = purified.folder.with_name(f"{purified.name}-stopped")
    flags = script_flags(purified.attack, purified.name, purified.attack.build())
    flags += ["--save_folder_name", folder.name]
    script = ROOT / f"defense/{purified.name}.py"
    code = run_script(script, *flags)
    while code == 128 + signal.SIGTERM:
        asked.clear()
        disturb()
        code = run_script(script, *flags, "--resume")
    assert code == 0
    phases = [phase for phase, *_ in purified.again().rounds]
    assert stopped in ([], [*dict.fromkeys(phases)])

    assert differences(weights_of(folder), weights_of(purified.folder), "weights") == []
    for path in purified.folder.glob("*.csv"):
        tables = (pd.read_csv(place / path.name) for place in (folder, purified.folder))
        rows, expected = (table.drop(columns="seconds", errors="ignore") for table in tables)
        assert rows.equals(expected), path.name
    summary, whole = summary_of(folder), summary_of(purified.folder)
    for key in ("before", "after", "findings", "verdict", "warnings"):
        assert summary.get(key) == whole.get(key), key


@pytest.fixture(scope="module")
def plain_record(workplace: Path) -> tuple[Path, str]:
    """The record of a user's network without BatchNorm, and the `--model` that it takes."""
    (workplace / "plain.py").write_text(PLAIN, encoding="utf-8")
    model = f"{workplace / 'plain.py'}:build"
    with pytest.MonkeyPatch.context() as patch:
        return trained(workplace, "plain", patch, model=model), model


@every_defense
@pytest.mark.usefixtures("no_pictures")
def test_a_script_on_a_network_without_batchnorm_works_or_says_one_line(
    name: str, plain_record: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The network is made by a user's file. Its result loads again, or there is none."""
    record_folder, model = plain_record
    attack = load_attack(record_folder)
    flags = script_flags(attack, name, attack.build(model))
    code = run_script(ROOT / f"defense/{name}.py", *flags, "--model", model)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    folder = record_folder / "defense" / name
    if code == 0:
        test = attack.load_dataset().test
        scores = evaluate(load_defense(folder, model), test, attack.triggered, CPU)
        assert summary_of(folder)["after"] == scores.counts()
    else:
        assert code == 2
        assert len(errors) == 1
        assert "BatchNorm" in errors[0]
        assert not folder.exists()  # it is told before the work


@every_defense
def test_the_rates_of_a_method_are_among_its_flags(name: str) -> None:
    """They are told where a loss is not finite."""
    config = module(name).Config
    told = {word.strip(",").removeprefix("--") for word in config.rates.split() if word != "or"}
    assert told <= {*get_type_hints(config)} or not hasattr(config, "lr")


def test_a_loss_that_is_not_finite_names_the_method_s_own_flags() -> None:
    config = shortened("ft_sam", fitted(), n_rounds=1, rho=1e30)
    with pytest.raises(UserError, match="give a smaller --lr, --rho or --wd, or take back"):
        module("ft_sam").purify(fitted(), float_images(), bright_data().train.labels, config)
