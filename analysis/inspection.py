"""Inspect: looks for a backdoor in a model without knowing its trigger.

No signal here is a verdict. A model is suspicious only in comparison with clean models of the same
recipe: name their records with `--clean_records`, or let `--train_clean 6` train them.

| signal | what |
|---|---|
| A  | adversarial images (SAU's first batch): the largest share of a class |
| A' | the same with small steps from the image, up to the first change of label |
| B  | the perturbation of one image on other images: how often they get the same label |
| C  | the smallest change of features that sends most images to a class; small at the target |
| D  | the largest margin of a class over noise images that maximise it, without any data |
| E  | how small the smallest mask of `defense/nc.py` is (`--neural_cleanse true`) |

    python analysis/inspect.py --result_file badnet_demo --clean_records clean_1,clean_2,clean_3
    python analysis/inspect.py --state_dict my_model.pt --model resnet18 --dataset cifar10 \\
        --save_folder_name theirs_inspected --train_clean 6

C, D and E compare a class with the others, so they are skipped if there are only two classes.
If A and A' name different classes, there is no clear signal. Expect misses: attacks with several
targets (all-to-all), clean-label attacks, and weak WaNet. docs/analysis.md has the power of each
signal. The results also show purified models. Their signals should be flat.

C follows the idea of TAC-QP (arXiv 2511.08944), and D that of MM-BD (Wang, Xiang, Miller, Kesidis,
IEEE S&P 2024, arXiv 2205.06900).
"""

import contextlib
import csv
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
from pydantic import Field
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.base import BEFORE, Results, analyse, check_current, write
from analysis.cleanmodels import built, clean_records, train_clean
from analysis.signals import (
    CLEANSE,
    COMPARING,
    HEAD,
    LARGE,
    SMALL,
    TITLES,
    UNITS,
    SignalConfig,
    outstanding,
    signals_of,
    steps_of,
)
from analysis.subject import Subject, says_little, trained_otherwise
from attack.recipe import TrainingConfig, learned_little
from models import build_model, check_model, model_identity, prepare
from models.modes import evaluating
from utils.data.batches import as_float
from utils.data.datasets import DatasetName, load_dataset
from utils.data.labelled import Labelled
from utils.errors import NothingToDo, UserError, counted, suggestion
from utils.files import as_path, file_sha256
from utils.process.device import pick_device, pick_precision
from utils.process.seeds import generator
from utils.records import folders, places
from utils.records.attack import AttackRecord
from utils.records.contents import ATTACK_RESULT, summary_of
from utils.records.named import dataset_of_record
from utils.records.weights import fill, read_state_dict
from utils.training.labelshare import FEWEST_TO_STAND_OUT
from utils.values import Distinct

if TYPE_CHECKING:
    from utils.plot import Figure

ENOUGH_CLEAN = 6  # clean models, below which a comparison says little
FACTS = ("entropy", "z", "norm", "p_gamma")  # of signals


@dataclass(frozen=True, kw_only=True)
class Config(SignalConfig):
    yaml_folder = "inspect"

    state_dict: Annotated[
        str | None,
        Field(description="checkpoint of a model without a record; needs --model and --dataset"),
    ]
    image_size: Annotated[
        int | None,
        Field(ge=8, le=1024, description="side of its images in pixels; null for the dataset's"),
    ]
    clean_records: Annotated[
        tuple[str, ...], Field(description="records of clean models of the same recipe"), Distinct
    ]
    train_clean: Annotated[
        int, Field(ge=0, le=100, description="clean models to train, or that were trained before")
    ]
    neural_cleanse: Annotated[
        bool, Field(description="read the masks of the records' results of defense/nc.py")
    ]

    def check(self, subject: Subject) -> None:
        clean_records(subject, self, self.clean_records)


def conclusion(
    signals: Mapping[str, Mapping[str, Any]],
    null: Sequence[Mapping[str, Mapping[str, Any]]],
    named: Callable[[int], str],
) -> str:
    """What the signals of a model say, in careful words.

    Args:
        signals: of the model, by name.
        null: those of clean models.
        named: the name of a class.
    """
    large, small = signals[LARGE]["top"], signals[SMALL]["top"]
    if not all(signals[name]["statistic"] > 0 for name in (LARGE, SMALL)):
        return "no clear signal: no image was sent to another class, or only by large steps"
    if large is None or large != small:
        names = ["several classes" if c is None else f"class {named(c)}" for c in (large, small)]
        return f"no clear signal: large steps point to {names[0]}, small ones to {names[1]}"
    if not null:
        return (
            f"A and A' both point to class {named(large)}, as happens in many clean models; "
            "without clean models to compare with this says nothing: give --clean_records, or "
            f"--train_clean {ENOUGH_CLEAN}"
        )
    stronger = [
        name
        for name, signal in signals.items()
        if signal["top"] == large
        and all(name in other and signal["statistic"] > other[name]["statistic"] for other in null)
    ]
    many = counted(len(null), "clean model")
    if not {LARGE, SMALL} & set(stronger):
        return f"no clear signal: adversarial images are not more one-sided than in {many}"
    each, are_few = ("each of ", "are few") if len(null) > 1 else ("", "is little")
    few = "" if len(null) >= ENOUGH_CLEAN else f", which {are_few}: {ENOUGH_CLEAN} say more"
    return (
        f"class {named(large)} stands out in {', '.join(stronger)}, more than in {each}{many}"
        f"{few}; a reason to look closer, and no proof"
    )


def headline_of(signal: Mapping[str, Any], named: Callable[[int], str]) -> str:
    """The statistic of a signal, and the class that stands out, if one does."""
    stands_out = signal["statistic"] > 0 and signal["top"] is not None
    of_class = f" (class {named(signal['top'])})" if stands_out else ""
    return f"{signal['statistic']:.3f}{of_class}"


@dataclass(frozen=True)
class _Model:
    """A model whose signals are computed.

    Attributes:
        kind: "record", "model" (without a record), "purified" or "clean".
    """

    kind: str
    load: Callable[[], nn.Module]


def _models_of(
    subject: Subject, config: Config, clean: Mapping[str, AttackRecord], results: Results
) -> dict[str, _Model]:
    """The models to look at, by name; warns of clean ones that are no fair comparison."""
    kind = "record" if subject.attack is not None else "model"
    models = {BEFORE: _Model(kind, lambda: subject.model)}
    for purified in subject.purified:
        models[purified.name] = _Model("purified", purified.load)
    for name, record in clean.items():
        if record.model_name != subject.model_name:
            results.warn(says_little(name, record.model_name, subject.model_name))
        elif subject.attack and (other := trained_otherwise(name, record, subject.attack)):
            results.warn(other)
        models[name] = _Model("clean", functools.partial(built, record, subject, config))
        results.models[name] = record.sha256
    return models


def look(subject: Subject, config: Config, results: Results) -> None:
    """All signals of the model, of clean models, and of purified models.

    Tables: `signals` (model, kind, signal, statistic, top: empty if several classes tie, p: the
    share of clean models, and of this one, that are at least as suspicious; entropy, z, ...: facts
    of the signal), `classes` (model, signal, class, value), `matrix` (model, signal A or A', true,
    adversarial, count; cells of 0 are skipped). Fact `signals`: by model and signal, `statistic`,
    `top` and its facts.
    """
    data = subject.data
    ratio = min(1.0, config.probes / len(data.train))
    index = subject.clean_draw(ratio, config.random_seed)
    order = generator(config.random_seed, "probes")
    probes = data.train.at(index[torch.randperm(len(index), generator=order)])
    named = [*config.clean_records, *train_clean(subject, config, config.train_clean)]
    clean = clean_records(subject, config, named)
    models = _models_of(subject, config, clean, results)
    results.facts["acc"] = subject.scores.acc.value
    if learned_little(subject.scores, len(data.classes)):
        results.warn(
            f"ACC is only {subject.scores.acc} with {len(data.classes)} classes; if the model was "
            "trained with another normalization, give --mean and --std to interop/state_dict.py, "
            "and inspect the record that it makes"
        )
    has_enough = len(data.classes) >= FEWEST_TO_STAND_OUT
    if not has_enough:
        results.warn(
            "no signals C, D and E, and no z: of two classes none can stand out in them; A, A' and "
            "B are compared with clean models alone"
        )
    signals: dict[str, dict[str, dict[str, Any]]] = {}
    for name, model in models.items():
        computed = signals_of(model.load(), probes, config, subject.device)
        if HEAD not in computed and has_enough:
            results.warn(f"{name}: no signal C, since its last layer is not a linear one")
        step = f"{name} ({clean[name].sha256[:8]})" if name in clean else name
        signals[name] = {
            signal: results.step(f"{step}, {signal}", compute)
            for signal, compute in computed.items()
            if has_enough or signal not in COMPARING
        }
    if config.neural_cleanse and has_enough:
        add_neural_cleanse(subject, clean, signals, results)
    null = [signals[name] for name in clean]
    kinds = {name: model.kind for name, model in models.items()}
    results.tables |= _tables(signals, kinds, null, data.classes)
    results.facts["signals"] = {
        name: {
            signal: {"statistic": value["statistic"], "top": value["top"], **value["facts"]}
            for signal, value in of_model.items()
        }
        for name, of_model in signals.items()
        if kinds[name] != "clean"
    }
    for name, of_model in signals.items():
        if kinds[name] != "clean":
            results.headline[name] = {
                signal: headline_of(value, data.named) for signal, value in of_model.items()
            }
    said = conclusion(signals[BEFORE], null, data.named)
    results.conclude(said)
    page = (signals[BEFORE], probes, said, len(null))
    results.figures["inspect"] = lambda: draw(subject, config, *page)


def _tables(
    signals: Mapping[str, Mapping[str, Mapping[str, Any]]],
    kinds: Mapping[str, str],
    null: Sequence[Mapping[str, Mapping[str, Any]]],
    names: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """The tables of an inspection, see `look`.

    Args:
        signals: by model and signal.
        kinds: of the models, by name.
        null: the signals of clean models.
        names: of the classes.
    """
    rows: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    for name, of_model in signals.items():
        for signal, value in of_model.items():
            others = [other[signal]["statistic"] for other in null if signal in other]
            p = (1 + sum(other >= value["statistic"] for other in others)) / (1 + len(others))
            rows.append(
                {
                    "model": name,
                    "kind": kinds[name],
                    "signal": signal,
                    "statistic": value["statistic"],
                    "top": value["top"],
                    "top_name": None if value["top"] is None else names[value["top"]],
                    "p": p if others and kinds[name] != "clean" else None,
                    "clean_models": len(others),
                    **{fact: value["facts"].get(fact) for fact in FACTS},
                }
            )
            cells += [
                {
                    "model": name,
                    "signal": signal,
                    "true": true,
                    "adversarial": adversarial,
                    "count": count,
                }
                for true, counts in enumerate(value.get("matrix", []))
                for adversarial, count in enumerate(counts)
                if count
            ]
            classes += [
                {"model": name, "signal": signal, "class": label, "value": number}
                for label, number in enumerate(value["by_class"])
            ]
    return {"signals": rows, "classes": classes, "matrix": cells}


def add_neural_cleanse(
    subject: Subject,
    clean: Mapping[str, AttackRecord],
    signals: dict[str, dict[str, dict[str, Any]]],
    results: Results,
) -> None:
    """Adds signal E from finished results of defense/nc.py in the records, where there are some."""
    records = dict(clean)
    if subject.attack is None:
        results.warn("the model has no signal E: it has no record, and so no result of defense/nc")
    else:
        records[BEFORE] = subject.attack
    for name, record in records.items():
        folder = record.folder / "defense/nc"
        norms: list[float] = []
        with contextlib.suppress(OSError, KeyError, ValueError):
            if summary_of(folder).get("attack_sha256") == record.sha256:
                text = (folder / "norms.csv").read_text(encoding="utf-8")
                norms = [float(row["mask_norm"]) for row in csv.DictReader(text.splitlines())]
        if len(norms) == len(subject.data.classes):
            signals[name][CLEANSE] = asdict(outstanding(norms))
        else:
            of_record = record.folder.name
            results.warn(f"{name}: no signal E; run defense/nc.py --result_file {of_record} first")


def draw(
    subject: Subject,
    config: Config,
    signals: Mapping[str, Mapping[str, Any]],
    probes: Labelled,
    said: str,
    clean: int,
) -> "Figure":
    """inspect.png: the matrix of A, bars by class, and adversarial images."""
    from utils import charts

    chosen = slice(0, 8)
    images = as_float(probes.images[chosen], subject.device)
    true = probes.labels[chosen].to(subject.device)
    draws = generator(config.random_seed, "examples")
    delta = steps_of(config)[LARGE](subject.model, images, true, generator=draws)
    with evaluating(subject.model), torch.no_grad():
        labels = [subject.model(x).argmax(1).tolist() for x in (images, images + delta)]
    named = subject.data.named
    what = (
        "a model"
        if subject.attack is None
        else f"a model of the record {subject.attack.folder.name}"
    )
    controls = counted(clean, "clean model") if clean else "no clean models"
    compared = f"{controls} to compare with"
    return charts.inspection(
        torch.tensor(signals[LARGE]["matrix"]),
        {(TITLES[name], UNITS[name]): signal["by_class"] for name, signal in signals.items()},
        {"clean": images.cpu(), "adversarial": (images + delta).cpu()},
        [f"{named(a)} | {named(b)}" for a, b in zip(*labels, strict=True)],
        subject.data.classes,
        f"A look inside {what} ({subject.data.name}); the largest bar is hatched; {compared}",
        said,
    )


def subject_of_weights(config: Config) -> Subject:
    """A model that was trained elsewhere, without a record.

    Raises:
        UserError: if checkpoint, network, data and flags do not fit together.
    """
    for flag in ("dataset", "model"):
        if getattr(config, flag) is None:
            raise UserError(f"--{flag}: a value is needed with --state_dict")
    dataset, model_name = str(config.dataset), str(config.model)
    if dataset not in get_args(DatasetName):
        raise UserError(
            f"--dataset: {dataset} is not known{suggestion(dataset, get_args(DatasetName))}; give "
            f"one of {', '.join(get_args(DatasetName))}"
        )
    if config.result_file is not None:
        raise UserError("--state_dict: leave it out, or --result_file")
    if config.defenses:
        raise UserError(
            "--defenses: a model without a record has no results of defenses; leave it out, or "
            "give --result_file instead of --state_dict"
        )
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    size = config.image_size or TrainingConfig.load(dataset).image_size
    data = load_dataset(dataset, as_path(config.dataset_path), size)
    check_model(model_name, len(data.classes), size)
    model = build_model(model_name, len(data.classes), data.mean, data.std, image_size=size)
    fill(model, read_state_dict(Path(str(config.state_dict))), model_name)
    name, sha256 = model_identity(model_name)
    return Subject(
        data,
        device,
        precision,
        prepare(model, device, precision),
        name,
        sha256,
        sha256=file_sha256(Path(str(config.state_dict))),
    )


def inspect_weights(config: Config) -> folders.RunFolder:
    """Inspects a model without a record; the result is in `record/<save_folder_name>/analysis/`.

    Raises:
        UserError: if there is a record of that name, or checkpoint, network, data and flags do not
            fit together.
    """
    started = time.monotonic()
    if config.save_folder_name is None:
        raise UserError("--save_folder_name: a value is needed with --state_dict")
    home = places.attack_folder(config.save_folder_name, as_path(config.record_path)).path
    if (home / ATTACK_RESULT).exists():
        raise UserError(
            f"--save_folder_name: {config.save_folder_name} is the record of another model; give a "
            "new name, or --result_file instead of --state_dict"
        )
    folder = places.analysis_folder(home, "inspect")
    try:
        folder.claim(config.overwrite, config.resume, config=config.dump())
    except NothingToDo:
        check_current(folder, "inspect", subject_of_weights(config), config)
        raise
    subject = subject_of_weights(config)
    config.check(subject)
    with folder.replacing():
        return write(config, "inspect", look, subject, folder, started)


def main() -> None:
    """Inspects a record, or a checkpoint."""

    def find_dataset(values: Mapping[str, Any]) -> str | None:
        return values.get("dataset") if values.get("state_dict") else dataset_of_record(values)

    config = Config.from_command_line(sys.argv[1:], str(__doc__), find_dataset)
    if config.state_dict is not None:
        inspect_weights(config)
    elif config.image_size is not None:
        raise UserError("--image_size: is for --state_dict; a record has its own; leave it out")
    else:
        analyse(config, "inspect", look)
