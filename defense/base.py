"""What a defense sees, and the pipeline that every defense script runs.

A defense gives its configuration and `purify(model, images, labels, config, loop)`. The bases of
its configuration say what it sees and which flags it has. The pipeline reads a record, hands over
what the defense may see, scores and saves the model that it gives back, and draws its findings.
Dataset, model, normalization and target come from the record. Test images and triggers are used
only for the report.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_type_hints

import torch
from pydantic import Field
from torch import nn

from models import Classifier, prepare
from models.channels import norms, require_replaceable
from models.copies import copied, holds_graphs
from models.lastmap import last_map
from models.views import has_own_code
from utils.config import Group
from utils.data.batches import keep_on
from utils.data.labelled import Dataset
from utils.errors import NothingToDo, UserError, shown
from utils.files import read_bytes
from utils.metrics import Scores, defense_effectiveness_rating
from utils.process import distributed
from utils.process.device import pick_device, pick_precision, run_conditions
from utils.process.script import file_log, logger, run_script
from utils.process.seeds import deterministic, seed_everything
from utils.records import folders, places
from utils.records.attack import AttackRecord, load_attack
from utils.records.checkpoint import Origin
from utils.records.contents import DEFENSE_RESULT, SUMMARY
from utils.records.defense import checked_result, require_of_record, save_defense
from utils.records.index import read_index
from utils.records.named import OfRecord, check_dataset, dataset_of_record, named_record
from utils.records.recipe import require_method
from utils.training import ending, selection
from utils.training.evaluate import predict
from utils.training.findings import Findings
from utils.training.guard import (
    apart,
    check_given,
    half_precision,
    require_finite,
    require_module,
    run_soundly,
    seeded,
    sheltered,
)
from utils.training.loop import Loop
from utils.training.sgd import Schedule
from utils.training.watch import Watch, scorer
from utils.values import Endless

Sees = Literal["nothing", "clean", "poisoned"]
Selection = Literal["fixed", "val"]


@dataclass(frozen=True, kw_only=True)
class DefenseConfig(OfRecord):
    """The record, and how the defense runs."""

    flags_title = "This defense"

    save_folder_name: Annotated[
        str | None,
        Field(description="name of the result's folder; null for the defense's name"),
        Group.RECORD,
    ]
    checkpoint_every: Annotated[
        float, Field(ge=0, description="seconds between two checkpoints to resume from")
    ]

    advice = "change its flags, see --help"  # what to do where ACC falls by more than 10 points
    rates = "--lr"  # the flags whose size decides how large steps and losses are
    learns = True  # whether it takes gradients of weights, or of images
    moves_images = False  # whether it takes gradients of images
    takes_float16 = True  # False with Adam, whose 1e-8 is 0 there

    @property
    def gives_back_early(self) -> bool:
        """Whether weights, modes or hooks are given back between a pass and its gradients."""
        return False

    @property
    def sees(self) -> Sees:
        """Which images the defense is given."""
        return "nothing"

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        """Checks what the method needs of a network, before anything else is done.

        Args:
            model: in any mode; left as it is. It may be called with black images.
            image_shape: (C, H, W).

        Raises:
            UserError: if the network lacks it.
        """


@dataclass(frozen=True, kw_only=True)
class CleanData(DefenseConfig):
    """The clean subset that the defense sees."""

    ratio: Annotated[
        float, Field(gt=0, le=1, description="clean subset / clean training set"), Group.SEEN
    ]
    index: Annotated[
        str | None,
        Field(description="file of the clean subset's indices, one per line; null draws them"),
    ]

    advice = "give more images (--ratio), or change its flags, see --help"

    @property
    def sees(self) -> Sees:
        return "clean"


@dataclass(frozen=True, kw_only=True)
class HeldOut(CleanData):
    """Selection on a held-out part of the clean subset."""

    selection: Annotated[
        Selection,
        Field(description="level chosen on held-out images, or the author's fixed value"),
        Group.SELECTION,
    ]
    val_ratio: Annotated[
        float, Field(gt=0, lt=1, description="held-out images / clean subset (selection val)")
    ]
    acc_ratio: Annotated[
        float,
        Field(ge=0, le=1, description="relative loss of held-out accuracy that is accepted (val)"),
    ]

    advice = "lower --acc_ratio, or give more images (--ratio)"


@dataclass(frozen=True, kw_only=True)
class Masked(HeldOut):
    """Pruning by masks that the method learns; `--help` lists its fields with the method's own."""

    pruning_max: Annotated[float, Field(ge=0, le=1, description="highest level to try (val)")]
    pruning_step: Annotated[float, Field(gt=0, le=1, description="between two levels (val)")]
    pruning_number: Annotated[
        float, Field(ge=0, le=1, description="masks up to it are pruned (fixed)")
    ]
    prune_bias: Annotated[bool, Field(description="a pruned channel gives 0; else its bias")]

    advice = "lower --acc_ratio (val) or --pruning_number (fixed)"
    gives_back_early = True

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        norms(model)
        require_replaceable(model)


@dataclass(frozen=True, kw_only=True)
class Outlying(DefenseConfig):
    """Pruning of channels that stand out; `--help` lists its fields with the method's own."""

    u: Annotated[
        float, Field(ge=0, description="standard deviations from which on to prune"), Endless
    ]
    prune_bias: Annotated[bool, Field(description="a pruned channel gives 0; else its bias")]
    n_rounds: Annotated[
        int,
        Field(ge=0, description="how often outliers are pruned; 0 changes nothing"),
        Group.TRAINING,
    ]

    advice = "raise --u"
    learns = False


@dataclass(frozen=True, kw_only=True)
class PoisonedData(DefenseConfig):
    """The part of the training set that the defense sees."""

    ratio: Annotated[
        float, Field(gt=0, le=1, description="images that it sees / training set"), Group.SEEN
    ]
    index: Annotated[
        str | None, Field(description="file of their indices, one per line; null draws them")
    ]
    data: Annotated[
        Literal["poisoned", "clean"],
        Field(description="the training set as the attacker has left it, or a clean subset"),
    ]

    @property
    def sees(self) -> Sees:
        return self.data


@dataclass(frozen=True, kw_only=True)
class Rounds(DefenseConfig):
    """Passes over the images."""

    n_rounds: Annotated[
        int,
        Field(ge=0, description="passes over the images, of the last phase; 0 changes nothing"),
        Group.TRAINING,
    ]
    batch_size: Annotated[int, Field(ge=1, description="images per step")]

    @property
    def in_train_mode(self) -> bool:
        """Whether the whole network is called in train mode."""
        return False


@dataclass(frozen=True, kw_only=True)
class Scored(Rounds):
    """Passes after which there is a model to score."""

    eval_every: Annotated[
        int, Field(ge=1, description="rounds between two evaluations"), Group.TRAINING
    ]


@dataclass(frozen=True, kw_only=True)
class Augmented(DefenseConfig):
    """Random changes of the images."""

    crop_padding: Annotated[
        int, Field(ge=0, le=64, description="pixels around a random crop"), Group.TRAINING
    ]
    flip: Annotated[bool, Field(description="mirror images at random")]


@dataclass(frozen=True, kw_only=True)
class FineTuned(CleanData, Scored, Augmented):
    """Fine-tuning with SGD."""

    lr: Annotated[float, Field(gt=0, description="peak learning rate of SGD"), Group.TRAINING]
    lr_scheduler: Annotated[Schedule, Field(description="how the learning rate changes")]
    sgd_momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD")]
    wd: Annotated[float, Field(ge=0, description="weight decay of SGD")]

    advice = "lower --lr, or give more images (--ratio)"
    rates = "--lr or --wd"
    in_train_mode = True


@dataclass(frozen=True, kw_only=True)
class Inverted(CleanData, Scored):
    """Inversion of the trigger by a generator."""

    n_rounds: Annotated[
        int,
        Field(ge=0, description="passes over the images in each unlearning; 0 changes nothing"),
        Group.TRAINING,
    ]
    inversion_rounds: Annotated[
        int,
        Field(ge=1, description="times that the trigger is inverted and unlearned"),
        Group.INVERSION,
    ]
    identity_epochs: Annotated[
        int, Field(ge=0, description="passes that teach the generator the identity, first")
    ]
    mask_epochs: Annotated[int, Field(ge=0, description="passes that learn the mask of features")]
    generator_epochs: Annotated[int, Field(ge=0, description="passes that learn the trigger")]
    generator_width: Annotated[
        int, Field(ge=1, description="channels of the generator, a U-Net, at full size")
    ]
    mask_lr: Annotated[float, Field(gt=0, description="learning rate of the mask's Adam")]
    generator_lr: Annotated[float, Field(gt=0, description="learning rate of the generator's Adam")]
    image_bound: Annotated[
        float, Field(ge=0, description="largest mean squared change of pixels in [0, 1]")
    ]
    feature_bound: Annotated[
        float, Field(ge=0, description="largest mean squared change of the benign features")
    ]
    generated_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="r: int(r B) + 1 images of a batch of B are generated in unlearning",
        ),
    ]

    advice = "lower --lr or --generated_ratio, or give more images (--ratio)"
    in_train_mode = True
    moves_images = True
    takes_float16 = False
    gives_back_early = True

    def check_network(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        if self.n_rounds:
            last_map(model, image_shape)


@dataclass(frozen=True)
class Given:
    """What a defense is given.

    Attributes:
        index: int64 (N,), positions in the training set, ascending.
        images, labels: uint8 (N, C, H, W) and int64 (N,).
    """

    index: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


C = TypeVar("C", bound=DefenseConfig)
C_contra = TypeVar("C_contra", bound=DefenseConfig, contravariant=True)


class Purify(Protocol[C_contra]):
    """The function that every defense has: from a model and images to another model."""

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        config: C_contra,
        loop: Loop | None = None,
    ) -> nn.Module:
        """A purified copy in eval mode; the model itself is left as it is.

        Args:
            model: any module from (N, C, H, W) float in [0, 1] to (N, K) logits.
            images: (N, C, H, W), float in [0, 1] or uint8; N is 0 where the defense sees nothing.
            labels: (N,) int64.
            config: of the defense.
            loop: counts phases, rounds and batches, and takes what is found.

        Raises:
            UserError: if these do not fit together, see `checked`.
        """


def checked(purify: Purify[C]) -> Purify[C]:
    """The decorator of every `purify`; a method file writes `@checked` over it.

    Model, images and labels are checked first (`check_given`, and `check_network` of the method),
    and at the end whether the weights are finite. In every call, the global generators start with
    `random_seed`, so dropout draws the same; they are restored at the end. One thread purifies at a
    time, and the caller's modes, such as autocast, are off. Gradients are computed wherever it is
    called from, but never those of the caller's images; a network that gives none is refused. A
    network with code of the user's own is copied first, since this code may change it in each call.
    A compiled network runs as it was written. If a network cannot learn from one image at a time,
    one line says so.

    Args:
        purify: the method.

    Returns:
        The same, which raises UserError if what it is given does not fit together.
    """

    @functools.wraps(purify)
    def wrapped(
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        config: C,
        loop: Loop | None = None,
    ) -> nn.Module:
        expected = get_type_hints(purify).get("config", DefenseConfig)
        if isinstance(expected, type) and not isinstance(config, expected):
            raise UserError(
                f"config: {type(config).__name__} of {type(config).__module__} is no configuration "
                f"of this defense; give {expected.__module__}.{expected.__name__}.load(...)"
            )
        with sheltered(config.random_seed):
            images = check_given(
                model,
                images,
                labels,
                needs_images=config.sees != "nothing",
                needs_labels=isinstance(config, CleanData),
                learns=config.learns,
                moves_images=config.moves_images,
                takes_float16=config.takes_float16,
                computes_once=config.gives_back_early,
                batch_size=config.batch_size
                if isinstance(config, Rounds) and config.in_train_mode
                else None,
            )
        # The method's draws begin anew, whatever the check has drawn.
        with sheltered(config.random_seed), run_soundly(model):
            _check_network(config, model, images.shape[1:])
            given = copied(model) if has_own_code(model) else model
            loop = loop or Loop()
            loop.rate = config.rates
            if config.learns and (half := half_precision(model)):
                loop.findings.warn(
                    f"the model's weights are in {half}, where small steps are lost in rounding; "
                    "give model.float()"
                )
            purified = purify(given, apart(images), apart(labels), config, loop)
            require_module(purified)
            require_finite(purified)
            for weight in purified.parameters():
                weight.grad = None  # of the last step
            return copied(purified) if holds_graphs(purified) else purified

    return wrapped


def _check_network(config: DefenseConfig, model: nn.Module, image_shape: Sequence[int]) -> None:
    """As `DefenseConfig.check_network`; the user's own code, which may count its calls, is copied.

    Raises:
        UserError: as it does.
    """
    config.check_network(copied(model) if has_own_code(model) else model, image_shape)


def run(config_class: type[C], purify: Purify[C]) -> None:
    """Runs a defense script: flags and a record -> a purified model beside it.

    Args:
        config_class: the defense's configuration; its module's name is the defense's name.
        purify: (model, images, labels, config, loop) -> model.
    """
    module = sys.modules[config_class.__module__]

    def main() -> None:
        config = config_class.from_command_line(
            sys.argv[1:], module.__doc__ or "", dataset_of_record
        )
        defend(config, Path(str(module.__file__)).stem, purify)

    run_script(main)


def defend(config: C, name: str, purify: Purify[C]) -> folders.RunFolder:
    """Purifies a record's model and writes the result beside it.

    Returns:
        The result's folder.

    Raises:
        UserError: if the record, the data and the configuration do not fit together.
    """
    started = time.monotonic()
    source = named_record(config.result_file, config.record_path)
    summary = _summary(source)
    attack = load_attack(source)
    check_dataset(config, attack)
    attack.check_model(config.model)
    folder = places.defense_folder(attack.folder, config.save_folder_name or name)
    record = folders.RunFolder(source)
    try:
        folder.claim(config.overwrite, config.resume, record, config.dump())
    except NothingToDo:
        before = checked_result(folder.path, attack).get("defense")
        require_method(folder.path, before, name)
        raise
    if _summary(source) != summary:  # from now on an attack that would replace it sees this defense
        raise UserError(f"{source}: was replaced while it was read; run the defense again")
    with folder.replacing():
        return _defend(config, name, purify, attack, folder, started)


def _defend(
    config: C,
    name: str,
    purify: Purify[C],
    attack: AttackRecord,
    folder: folders.RunFolder,
    started: float,
) -> folders.RunFolder:
    """As `defend`, with the record that was read and the folder that was claimed."""
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    backdoored = _checked_model(config, attack)
    data = attack.load_dataset(config.dataset_path)
    given = seen_images(config, attack, data)
    seed_everything(config.random_seed)
    prepare(backdoored, device, precision)

    # Flags that only repeat what the record says are no part of the recipe.
    recipe = replace(config, dataset=None, model=None)
    inputs = ending.inputs_of(recipe, data, attack.model_sha256)
    distributed.barrier()  # all have come so far before one empties the folder
    origin = _origin(name, attack, data, given, inputs, run_conditions(device, precision))
    listed = {"clean": "clean_index.txt", "poisoned": "poisoned_index.txt"}.get(config.sees)
    of_target = ending.target_title(vars(attack), data)
    with file_log() as open_log, deterministic(config.deterministic):
        checkpoint = folder.start(config.dump(), config.resume, attack.model_sha256, origin)
        if listed:
            folder.write_text(listed, "".join(f"{number}\n" for number in given.index.tolist()))
        open_log(folder.log, append=checkpoint is not None)
        logger.info(
            "%s against %s on %s%s: %s, %s, %s",
            name,
            attack.attack,
            data.name,
            of_target,
            attack.model_name,
            device,
            precision,
        )
        logger.info("%s", _said_of(given, config, data))
        if attack.triggered is None:
            logger.info("the record has no triggered images: ACC alone is reported, no ASR or DER")
        score = scorer(data.test, lambda: attack.triggered, device)
        before = score(backdoored)
        logger.info("before  %s", before)
        watch = Watch(
            folder,
            "round",
            score,
            config.eval_every if isinstance(config, Scored) else 1,
            config.checkpoint_every,
            checkpoint,
        )
        loop = watch.start(before)
        if config.sees == "clean":
            has_index = getattr(config, "index", None) is not None
            _warn_of_classes(given, data, loop.findings, has_index)
        if isinstance(config, (CleanData, PoisonedData)) and config.index is None:
            count = len(data.train)
            selection.warn_of_number(given.index, count, config.ratio, loop.findings)
        images = keep_on(device, given.images)
        model = purify(copied(backdoored), images, given.labels, config, loop)
        require_module(model)
        require_of_record(model, attack, name)
        after = watch.finish(model)
        if not distributed.is_main():
            return folder
        save_defense(folder, model, attack, name)
        title = f"{name} against {attack.attack} on {data.name}{of_target}"
        caption = _labels_of_both(backdoored, model, data, device)
        pictures = [ending.draw_curves(folder, watch.metrics, "round", title)]
        if attack.triggered is not None:
            picture = ending.draw_before_after(folder, caption, attack.triggered, data, title)
            pictures.append(picture)
        pictures += ending.draw_findings(folder, loop.findings, caption, title)
        result = comparison(before, after, defense_effectiveness_rating(before, after))
        found = loop.findings.verdict
        verdict = ending.judged(found, attack, before) if found else None
        if verdict:
            result += f"\n{_said_of_verdict(verdict, data, before.attack_failed)}"
        ending.finish_run(
            folder,
            loop.findings,
            facts=_facts(name, config, attack, given, before, after, verdict, watch),
            said=data.warnings,
            warnings=_result_warnings(before, after, config.advice),
            result=result,
            pictures=pictures,
            files=[DEFENSE_RESULT, *filter(None, [listed])],
            run=ending.run_facts(recipe, started - watch.earlier, device, precision, inputs),
        )
    return folder


def _checked_model(config: DefenseConfig, attack: AttackRecord) -> Classifier:
    """The record's model; raises UserError if a defense, or this one, cannot work with it."""
    with seeded(config.random_seed):
        model = attack.build(config.model)
        no_images = torch.zeros(0, *attack.image_shape), torch.zeros(0, dtype=torch.int64)
        check_given(model, *no_images, needs_images=False, needs_labels=False)
        _check_network(config, model, attack.image_shape)
    return model


def _origin(
    name: str,
    attack: AttackRecord,
    data: Dataset,
    given: Given,
    inputs: Mapping[str, str],
    conditions: Mapping[str, str | int],
) -> Origin:
    """What a checkpoint of this run depends on."""
    triggered = attack.triggered
    poison = [] if triggered is None else [triggered.index, triggered.images, triggered.targets]
    return Origin(
        method=name,
        files={"the record": attack.sha256, **ending.files_of_flags(inputs)},
        tensors={
            f"the images and labels of {data.name}": data.tensors(),
            "the images that the defense sees": [given.index, given.images, given.labels],
            "the triggered images": poison,
        },
        conditions=conditions,
    )


def _labels_of_both(
    before: nn.Module, after: nn.Module, data: Dataset, device: torch.device
) -> ending.Captions:
    """From images to the labels that the models before and after the defense give them."""

    def caption(images: torch.Tensor) -> list[str]:
        labels = [predict(network, images, device).tolist() for network in (before, after)]
        return [f"{data.named(a)} | {data.named(b)}" for a, b in zip(*labels, strict=True)]

    return caption


def _facts(
    name: str,
    config: DefenseConfig,
    attack: AttackRecord,
    given: Given,
    before: Scores,
    after: Scores,
    verdict: Mapping[str, Any] | None,
    watch: Watch,
) -> dict[str, Any]:
    """What the summary says of this defense first."""
    return {
        "defense": name,
        "attack": attack.attack,
        "before": before.counts(),
        "after": after.counts(),
        "der": defense_effectiveness_rating(before, after),
        **({"verdict": verdict} if verdict else {}),
        "seed": config.random_seed,
        "dataset": attack.dataset,
        "model": attack.model_name,
        "sees": config.sees,
        "seen_images": len(given.index),
        "clean_images": len(given.index) if config.sees == "clean" else 0,
        "rounds": watch.metrics[-1]["round"] if hasattr(config, "n_rounds") else None,
        "purify_seconds": round(watch.training_seconds, 2),
        **attack.identity,
    }


def seen_images(config: DefenseConfig, attack: AttackRecord, data: Dataset) -> Given:
    """The images that a defense may see, and their labels.

    Raises:
        UserError: if there is none, or the record has no poisoned training set.
    """
    if isinstance(config, PoisonedData) and config.sees == "poisoned":
        if attack.poison_index is None or len(attack.poison_index) == 0:
            raise UserError(
                f"{attack.folder}: has no poisoned training images, which this defense looks at; "
                "give the record of an attack, or --data clean"
            )
        poisoned = attack.poisoned_set(data)
        index = drawn_index(poisoned.stored_labels(), config)
        chosen = poisoned.at(index)
    elif isinstance(config, (CleanData, PoisonedData)):
        index = drawn_index(data.train.labels, config)
        chosen = data.train.at(index)
    else:
        index = torch.zeros(0, dtype=torch.int64)
        chosen = data.train.at(index)
    return Given(index, chosen.images, chosen.labels)


def drawn_index(labels: torch.Tensor, config: CleanData | PoisonedData) -> torch.Tensor:
    """Which training images: those of the file `index`, or a share of each class, drawn at random.

    They depend on the seed and the labels of the training set only.

    Args:
        labels: int64 (N,), of the training set.

    Returns:
        int64 indices into the training set, ascending.

    Raises:
        UserError: if there is none.
    """
    count = len(labels)
    if config.index is not None:
        index = read_index(Path(config.index), count)
        if len(index) == 0:
            raise UserError(f"--index: {config.index} is empty; name at least one image")
        return index
    return selection.drawn_share(labels, config.ratio, config.random_seed)


def comparison(before: Scores, after: Scores, der: float | None) -> str:
    """The table that ends a defense: rates before and after with their counts, and DER."""
    lines = [f"{'':4}{'before':>24}{'after':>24}"]
    for name, rate in before.rates().items():
        cells = (f"{r} ({r.hits}/{r.total})" for r in (rate, after.rates()[name]))
        lines.append(f"{name.upper():4}" + "".join(f"{cell:>24}" for cell in cells))
    if der is not None:
        lines.append(f"{'DER':4}{'':24}{f'{100 * der:.2f} %':>24}")
    return "\n".join(lines)


def _summary(source: Path) -> bytes | None:
    """The summary of a record; another summary means that the record has other content."""
    try:
        return read_bytes(source / SUMMARY)
    except OSError:
        return None


def _said_of(given: Given, config: DefenseConfig, data: Dataset) -> str:
    """One line that says what the defense is given."""
    count, total = len(given.index), len(data.train)
    return {
        "nothing": "sees no images",
        "clean": f"{count} clean images of {total}",
        "poisoned": f"{count} of the {total} images of the poisoned training set",
    }[config.sees]


def _said_of_verdict(verdict: Mapping[str, Any], data: Dataset, attack_failed: bool = False) -> str:
    """One line that says the verdict, and whether it is right."""
    names = ", ".join(
        f"{target} ({shown(data.classes[target], 60)})" for target in verdict["targets"]
    )
    text = f"backdoored, target {names}" if verdict["is_backdoored"] else "no backdoor found"
    unknown = "the record does not tell"
    if attack_failed:
        unknown = "the attack had failed, so it is neither right nor wrong"
    judgement = {True: "right", False: "wrong", None: unknown}
    text = f"verdict: {text}; {judgement[verdict['is_right']]}"
    if verdict["is_backdoored"] and verdict["target_found"] is False:
        text += ", but the target is another class"
    return text


def _warn_of_classes(
    given: Given, data: Dataset, findings: Findings, has_index: bool = False
) -> None:
    """Warns of classes without an image."""
    counts = torch.bincount(given.labels, minlength=len(data.classes))
    lacking = [
        name for name, count in zip(data.classes, counts.tolist(), strict=True) if count == 0
    ]
    if lacking:
        advice = "add some of them to --index" if has_index else "raise --ratio"
        findings.warn(
            f"the clean subset lacks {len(lacking)} of {len(data.classes)} classes "
            f"({', '.join(lacking[:10])}); {advice}"
        )


def _result_warnings(before: Scores, after: Scores, advice: str) -> list[str]:
    warnings = []
    if before.attack_failed:
        warnings.append(
            f"the attack had failed before (ASR {before.asr}), so this says little of the defense"
        )
    if before.acc.value - after.acc.value > 0.1:
        warnings.append(
            f"the defense cost more than 10 points of ACC ({before.acc} -> {after.acc}); {advice}"
        )
    return warnings
