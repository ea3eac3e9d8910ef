"""How attacks, defenses and imports end: pictures, tables, summary, log."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import Classifier
from utils.config import FILES, Config
from utils.data.labelled import Dataset, Triggered, examples
from utils.metrics import Scores, rate_label
from utils.plain import parse_yaml
from utils.process.device import environment, peak_memory_mib
from utils.process.script import logger
from utils.records.attack import AttackRecord
from utils.records.checkpoint import files_of
from utils.records.folders import RunFolder
from utils.records.hashes import file_hashes
from utils.records.recipe import recipe_sha256
from utils.training.evaluate import predict
from utils.training.findings import Findings, Picture, Verdict

if TYPE_CHECKING:
    from utils.plot import Figure

# matplotlib and pandas load where something is drawn, because `--help` must not wait for them.

Captions = Callable[[torch.Tensor], list[str]]


def finish_run(
    folder: RunFolder,
    findings: Findings,
    *,
    facts: Mapping[str, Any],
    warnings: Sequence[str],
    result: str,
    pictures: Sequence[Path],
    files: Sequence[str],
    run: Mapping[str, Any],
    said: Sequence[str] = (),
) -> None:
    """Writes the findings, logs the result, and then writes the summary: the run is done.

    Args:
        facts: the first entries of `summary.json`.
        warnings: lines that were not logged so far; the summary has them and those of the findings.
        result: the lines to log at the end; empty for none.
        pictures: what was drawn before; see `draw_findings`.
        files: names whose sha256 the summary has.
        run: from `run_facts`; empty for an import, which runs nothing.
        said: warnings that were logged when they came up; the summary has them, too.
    """
    for name, rows in ((name, rows) for name, rows in findings.tables.items() if rows):
        folder.write_metrics(rows, f"{name}.csv")
    of_findings = {"findings": findings.facts} if findings.facts else {}
    summary = {
        **facts,
        **of_findings,
        "warnings": [*dict.fromkeys([*folder.warnings, *said, *findings.warnings, *warnings])],
        **run,
        "files": file_hashes(folder, *files),
    }
    # A run that is killed between the summary and the log would never log its result.
    for warning in warnings:
        logger.warning("warning: %s", warning)
    for line in result.split("\n") if result else ():
        logger.info("%s", line)
    folder.write_summary(summary)
    logger.info("record: %s", folder.path)
    for path in pictures:
        logger.info("picture: %s", path)


def draw_findings(
    folder: RunFolder, findings: Findings, captions: Captions, title: str
) -> list[Path]:
    """A PNG for each picture of the findings.

    Args:
        captions: from float images (N, C, H, W) to what to write under each.
    """
    from utils import plot

    def drawn(picture: Picture) -> "Figure":
        rows = {name: images.cpu() for name, images in picture.rows.items()}
        texts = {
            name: list(picture.captions.get(name, ())) or captions(images)
            for name, images in rows.items()
            if picture.is_labelled or name in picture.captions
        }
        if picture.is_compared:
            rows |= difference(*list(rows.values())[:2])
        return plot.image_grid(rows, texts, f"{title}: {picture.title}")

    return [
        save_figure(
            folder, f"{name}.png", drawn(picture if isinstance(picture, Picture) else picture())
        )
        for name, picture in findings.pictures.items()
    ]


def judged(verdict: Verdict, attack: AttackRecord, before: Scores) -> dict[str, Any]:
    """A verdict as plain data, beside what the record says.

    `is_right` says whether the verdict on the model, backdoored or clean, is true. `target_found`
    says whether the attacker's class is among the targets. Each is None if the record does not say
    it, or if the attack had failed: then there is hardly a backdoor to find. The second one is also
    None if no single class is the target.

    Args:
        before: scores of the record's model.
    """
    truth: bool | None = attack.attack != "prototype"
    is_told = attack.triggered is not None or attack.attack_target is not None
    if truth and (before.attack_failed or not is_told):
        truth = None
    has_target = bool(truth) and attack.attack_label_trans == "all2one"
    return {
        **asdict(verdict),
        "is_right": None if truth is None else verdict.is_backdoored == truth,
        "target_found": attack.attack_target in verdict.targets if has_target else None,
    }


def target_name(attack: Mapping[str, Any], data: Dataset) -> dict[str, str]:
    """The name of the target class for `summary.json`; nothing if there is no single one.

    Args:
        attack: what a record says, `attack_target` and `attack_label_trans` among it.
    """
    target = attack["attack_target"]
    if target is None or attack["attack_label_trans"] != "all2one":
        return {}
    return {"attack_target_name": data.classes[target]}


def target_title(attack: Mapping[str, Any], data: Dataset) -> str:
    """The target class as logs and pictures show it; see `target_name`."""
    has_one = target_name(attack, data)
    return f", target {data.named(attack['attack_target'])}" if has_one else ""


def difference(clean: torch.Tensor, changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row of the amplified difference of two rows of images, under its name.

    Args:
        clean, changed: float (N, C, H, W).
    """
    from utils import plot

    shown, scale = plot.amplified(changed - clean)
    return {f"difference\nx {scale:.3g}": shown}


def table(scores: Scores) -> str:
    """One line per rate, with its counts."""
    return "\n".join(
        f"{rate_label(name):9} {rate!s:>8}  ({rate.hits} of {rate.total})"
        for name, rate in scores.rates().items()
    )


def draw_curves(
    folder: RunFolder, metrics: Sequence[Mapping[str, float]], step: str, title: str
) -> Path:
    """curves.png; see `plot.curves`."""
    from utils import plot

    return save_figure(folder, "curves.png", plot.curves(metrics, step, title))


def save_figure(folder: RunFolder, name: str, figure: "Figure") -> Path:
    """Writes a PNG; returns its path."""
    return folder.write(name, lambda path: figure.savefig(path, dpi=160))


def inputs_of(
    config: Config, data: Dataset, model_sha256: str | None = None, **contents: str
) -> dict[str, str]:
    """What a run reads -> sha256 of its content: the dataset, and the files that flags name.

    Args:
        model_sha256: of the user's file that makes the network; None for any other.
        contents: name of a flag -> sha256, if the flag names more than a single file.
    """
    flags = {name: value for name, value in vars(config).items() if name in paths_of(type(config))}
    return {
        "dataset": data.fingerprint(),
        **({} if model_sha256 is None else {"--model": model_sha256}),
        **files_of(flags),
        **{f"--{name}": sha256 for name, sha256 in contents.items()},
    }


def files_of_flags(inputs: Mapping[str, str]) -> dict[str, str]:
    """The files of `inputs_of` that a checkpoint depends on, without the network's own."""
    return {
        flag: sha256
        for flag, sha256 in inputs.items()
        if flag.startswith("--") and flag != "--model"
    }


def paths_of(config_class: type[Config]) -> set[str]:
    """The flags that name files which are part of the recipe."""
    return {field.name for field in fields(config_class)} & FILES


def run_facts(
    config: Config,
    started: float,
    device: torch.device,
    precision: str,
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Recipe, inputs, seconds, peak memory and environment for `summary.json`.

    Args:
        started: by `time.monotonic`, less the seconds of an earlier part of the run.
        inputs: as `inputs_of` gives them.
    """
    values = parse_yaml(config.dump(), "the configuration")
    return {
        "config_sha256": recipe_sha256(values, inputs),
        "inputs": dict(inputs),
        "seconds": round(time.monotonic() - started, 1),
        **peak_memory_mib(device),
        **environment(device, precision),
    }


def draw_trigger(
    folder: RunFolder,
    model: Classifier,
    data: Dataset,
    triggered: Triggered,
    title: str,
    device: torch.device,
) -> Path:
    """trigger.png: eight triggered test images beside the clean ones, with the model's labels."""
    from utils import plot

    rows = dict(zip(("clean", "triggered"), examples(triggered, data), strict=True))
    figure = plot.image_grid(
        rows | difference(*rows.values()),
        {
            name: [data.named(p) for p in predict(model, images, device).tolist()]
            for name, images in rows.items()
        },
        f"{title}: images, and the class that the model gives them",
    )
    return save_figure(folder, "trigger.png", figure)


def draw_before_after(
    folder: RunFolder, caption: Captions, triggered: Triggered, data: Dataset, title: str
) -> Path:
    """before_after.png: clean and triggered test images, and both models' labels."""
    from utils import plot

    rows = dict(zip(("clean", "triggered"), examples(triggered, data), strict=True))
    figure = plot.image_grid(
        rows,
        {name: caption(images) for name, images in rows.items()},
        f"{title}: test images; label before | after",
    )
    return save_figure(folder, "before_after.png", figure)
