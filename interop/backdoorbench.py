"""Records from and to BackdoorBench.

    python interop/backdoorbench.py import ~/bdb/record/theirs --save_folder_name x
    python interop/backdoorbench.py export --result_file ours --to ~/bdb/record/ours

Defenses read a record of BackdoorBench as it is; `import` makes one of ours, for everything else.
`export` writes files that BackdoorBench's own loader reads, with the results of defenses. Records
that it cannot read are refused: datasets and networks that it does not have, and clean models.
"""

import contextlib
import errno
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interop.layout import attack_result, is_in_place, model_result, split_state, write_images
from models.changes import changes_of
from utils.config import Parser
from utils.data.datasets import DatasetName
from utils.data.labelled import Dataset, Labelled, Triggered
from utils.data.poison import PoisonedSet, is_kind
from utils.errors import UserError, listed
from utils.files import CONFIG_FILE, absolute, remove_strays, temporary_folder
from utils.plain import as_yaml, read_yaml
from utils.process.script import logger, run_script
from utils.records import folders, places
from utils.records.attack import AttackRecord, is_backdoorbench, load_attack, save_attack
from utils.records.backdoorbench import (
    CROSS,
    INFO,
    METRICS,
    MODELS,
    NORMALIZATION,
    POISON_LIST,
    TEST,
    TRAIN,
)
from utils.records.contents import (
    ATTACK_RESULT,
    DEFENSE_RESULT,
    METRICS_FILE,
    POISON,
    SUMMARY,
    summary_of,
)
from utils.records.defense import checked_result, load_defense
from utils.records.hashes import file_hashes
from utils.records.network import model_state
from utils.tensors import explained
from utils.training import ending
from utils.training.findings import Findings

# Their columns of attack_df.csv that metrics.csv has, and our names of them.
_COLUMNS = {
    "epoch": "epoch",
    "train_epoch_loss_avg_over_batch": "loss",
    "test_acc": "acc",
    "test_asr": "asr",
    "test_ra": "ra",
}


def export_record(source: Path, to: Path, dataset_path: str | None = None) -> None:
    """Writes a record as one of BackdoorBench, whose folder appears whole or not at all.

    Args:
        source: folder of the record, of either format.
        to: folder to make; its name becomes the record's.
        dataset_path: where the dataset is now; None for the record's path.

    Raises:
        UserError: if BackdoorBench could not read it, or the folder exists.
    """
    with _refusals_told(to):
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise UserError(f"--to: {to} exists; give a new folder")
    attack = load_attack(source)
    _refuse_unknown(attack)
    triggered = attack.triggered
    if triggered is None:
        raise UserError(
            f"{source}: has no triggered images, which BackdoorBench needs; give an attack's record"
        )
    data = attack.load_dataset(dataset_path)
    state = model_state(attack.build())
    place = to.resolve()
    with _refusals_told(to):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_strays(place.parent, glob.escape(place.name))
    with contextlib.ExitStack() as stack:
        with _refusals_told(to):
            partial = stack.enter_context(temporary_folder(place.parent, place.name))
        _write_record(partial, place.name, attack, data, state, triggered)
        with _refusals_told(to):
            try:
                os.rename(partial, place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                # Another process was faster, because an empty folder would have been replaced.
                raise UserError(f"--to: {to} exists; give a new folder") from None
    logger.info("record: %s", to)
    if not is_in_place(to):
        logger.warning(
            "warning: BackdoorBench finds its data beside the first 'record' of a path; move %s "
            "to its record/%s",
            to,
            place.name,
        )


def _write_record(
    to: Path,
    name: str,
    attack: AttackRecord,
    data: Dataset,
    state: dict[str, torch.Tensor],
    triggered: Triggered,
) -> None:
    """Writes all files of a record of BackdoorBench.

    Args:
        to: an existing folder.
        name: the final name of this folder.
        data, state: the dataset that the record's model was trained on, and its weights.
    """
    for finished in sorted((attack.folder / "defense").glob(f"[!.]*/{SUMMARY}")):
        _export_defense(finished.parent, attack, to)
    poisoned, cross = attack.poisoned_set(data), attack.cross_images(data)
    true_labels = data.train.labels[poisoned.index]
    folder = folders.RunFolder(to)
    train = None
    if len(poisoned.index):
        rows = (poisoned.index, poisoned.labels, true_labels)
        train_folder = f"{name}/{TRAIN}"
        train = split_state(train_folder, len(data.train), *rows)
        write_images(to / TRAIN, poisoned.images, poisoned.index, true_labels)
    rows = (triggered.index, triggered.targets, triggered.labels)
    test = split_state(f"{name}/{TEST}", len(data.test), *rows)
    write_images(to / TEST, triggered.images, triggered.index, triggered.labels)
    if cross is not None:
        everything = torch.arange(len(data.test))
        write_images(to / CROSS, cross, everything, data.test.labels)
    _write_notes(folder, attack, poisoned, name)
    content = attack_result(
        model_result(attack.model_name, attack.num_classes, state),
        attack.dataset,
        attack.image_shape,
        train,
        test,
    )
    folder.write_tensors(ATTACK_RESULT, content)


def import_record(
    source: Path,
    name: str,
    dataset_path: str | None = None,
    record_path: Path | None = None,
    overwrite: bool = False,
) -> folders.RunFolder:
    """Makes a record of ours out of one of BackdoorBench.

    Args:
        source: folder of BackdoorBench's record.
        name: of the record to make.
        dataset_path: folder of the dataset; None for `data/` of the checkout.
        record_path: folder of all records; None for `record/` of the checkout.
        overwrite: replace a record of that name.

    Returns:
        The new record's folder.

    Raises:
        UserError: if the source cannot be read, or the record exists.
        NothingToDo: if a process that made the same record was killed after its last file.
    """
    folder = places.attack_folder(name, record_path)
    was_killed = folder.lock()
    is_again = was_killed and not overwrite and _is_import(folder, source, dataset_path)
    folder.claim(overwrite, resume=is_again)
    if not is_backdoorbench(source):
        raise UserError(f"{source}: is no record of BackdoorBench; give one of its")
    attack = load_attack(source)
    data = attack.load_dataset(dataset_path)
    model = attack.build()
    poisoned, cross = attack.poisoned_set(data), attack.cross_images(data)
    facts = {
        "attack": attack.attack,
        "model_name": attack.model_name,
        **({} if attack.network_size is None else {"network_size": attack.network_size}),
        "dataset_path": absolute(dataset_path),
        "attack_target": attack.attack_target,
        "attack_label_trans": attack.attack_label_trans,
    }
    config = {"result_file": str(source.absolute()), "dataset": attack.dataset, **facts}
    _warn_of_results(source, name)
    with folder.replacing():
        folder.start(as_yaml(config))
        save_attack(
            folder,
            model,
            data,
            poisoned,
            attack.triggered,
            None if cross is None else Labelled(cross, data.test.labels),
            facts,
        )
        poison = int(is_kind(poisoned.kinds, "poison").sum())
        ending.finish_run(
            folder,
            Findings(),
            facts={
                **facts,
                "dataset": attack.dataset,
                "pratio": poison / len(data.train) if len(poisoned.index) else None,
                "train_images": len(data.train),
                "poisoned_images": poison,
                "imported_from": "BackdoorBench",
                "imported_sha256": attack.sha256,
                "inputs": {"dataset": data.fingerprint()},
            },
            warnings=[],
            result="",
            pictures=[],
            files=[ATTACK_RESULT, POISON],
            run={},
        )
    return folder


def _warn_of_results(source: Path, name: str) -> None:
    """Says which results of defenses an import leaves out.

    Args:
        name: of the record that is made.
    """
    if results := sorted(p.parent.name for p in source.glob(f"defense/*/{DEFENSE_RESULT}")):
        logger.warning(
            "warning: %s: results of defenses are left out (%s); run our defenses with "
            "--result_file %s",
            source,
            listed(results),
            name,
        )


def _is_import(folder: folders.RunFolder, source: Path, dataset_path: str | None) -> bool:
    """Whether a finished record is the import of that folder."""
    try:
        hashes = file_hashes(folders.RunFolder(source), ATTACK_RESULT)
    except (OSError, ValueError):
        return False
    expected = {
        "imported_sha256": hashes.get(ATTACK_RESULT, ""),
        "dataset_path": absolute(dataset_path),
    }
    return expected.items() <= summary_of(folder.path).items()


def _refuse_unknown(attack: AttackRecord) -> None:
    """Refuses records that BackdoorBench has no name for, or would normalize in another way."""
    for what, name, names in (
        ("dataset", attack.dataset, [n for n in get_args(DatasetName) if n in NORMALIZATION]),
        ("network", attack.model_name, MODELS),
    ):
        if name not in names:
            raise UserError(
                f"{attack.folder}: BackdoorBench has no {what} {name}, so it could not read this; "
                f"give a record with one of {', '.join(names)}"
            )
    is_transformer = attack.model_name.startswith("vit_")
    if is_transformer and attack.network_size != 224:
        raise UserError(
            f"{attack.folder}: its {attack.model_name} takes images as they are, but "
            "BackdoorBench's resizes them to 224; train it with --pretrained"
        )
    if not is_transformer and attack.network_size is not None:
        raise UserError(
            f"{attack.folder}: its {attack.model_name} resizes images to {attack.network_size}, "
            "but BackdoorBench's takes them as they are; train it without --pretrained"
        )
    mean, std = NORMALIZATION[attack.dataset]
    if not np.allclose([*attack.mean, *attack.std], [*mean, *std], atol=1e-6):
        raise UserError(
            f"{attack.folder}: its network normalizes with {attack.mean} and {attack.std}, but "
            f"BackdoorBench with {mean} and {std} on {attack.dataset}; train it with those"
        )


@contextlib.contextmanager
def _refusals_told(to: Path) -> Iterator[None]:
    """Raises UserError, naming the flag, if the system refuses to make the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--to: {to} cannot be made ({error.strerror}); give a folder that can be written"
        ) from None


def _write_notes(
    folder: folders.RunFolder,
    attack: AttackRecord,
    poisoned: PoisonedSet,
    name: str,
) -> None:
    """The files that BackdoorBench's loader does not need: arguments, poison list, metrics."""
    config = attack.folder / CONFIG_FILE
    arguments = {
        **(read_yaml(config) if config.exists() else {}),
        "attack": attack.attack,
        "dataset": attack.dataset,
        "model": attack.model_name,
        "num_classes": attack.num_classes,
        "attack_target": attack.attack_target,
        "attack_label_trans": attack.attack_label_trans,
        "save_path": f"./record/{name}",
    }
    folder.write_tensors(INFO, arguments)
    # Attacks that control training have cross samples, and no such list.
    if len(poisoned.index) and not is_kind(poisoned.kinds, "cross").any():
        is_poison = np.zeros(len(poisoned), dtype=np.float64)
        is_poison[poisoned.index[is_kind(poisoned.kinds, "poison")].numpy()] = 1
        folder.write(POISON_LIST, lambda path: folders.save_plain(path, is_poison))
    metrics = attack.folder / METRICS_FILE
    if metrics.exists():
        import pandas as pd  # here, because `--help` must not wait for it

        with explained(metrics, "a table of metrics"):
            ours = pd.read_csv(metrics, dtype=object, na_filter=False)  # each number as it is
            columns = {theirs: ours[name] for theirs, name in _COLUMNS.items() if name in ours}
        table = pd.DataFrame(columns, columns=list(METRICS))
        folder.write("attack_df.csv", lambda path: table.to_csv(path, index=False))


def _export_defense(source: Path, attack: AttackRecord, to: Path) -> None:
    """A defense's finished result, in BackdoorBench's form.

    Raises:
        UserError: if it is damaged, or of another attack than the record.
    """
    try:
        checked_result(source, attack)
        model = load_defense(source)
    except UserError as error:
        raise UserError(f"{error}, or move {source} away") from None
    if changes_of(model.network):
        logger.warning(
            "warning: %s: the defense has changed the network, which BackdoorBench cannot make "
            "again; skipped",
            source,
        )
        return
    result = model_result(attack.model_name, attack.num_classes, model_state(model))
    folder = to / "defense" / source.name
    with _refusals_told(folder):
        folder.mkdir(parents=True)
    folders.RunFolder(folder).write_tensors(DEFENSE_RESULT, result)


def _parsed() -> Any:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    theirs = commands.add_parser("import", help="a record of BackdoorBench becomes one of ours")
    ours = commands.add_parser("export", help="a record becomes one of BackdoorBench")
    theirs.add_argument("result_file", metavar="DIR", help="BackdoorBench's record: its folder")
    ours.add_argument("--result_file", required=True, help="record, or its name")
    for command in (theirs, ours):
        command.add_argument("--record_path", type=Path, help="folder of all records")
        command.add_argument("--dataset_path", help="where the dataset is; data/ if not given")
    theirs.add_argument("--save_folder_name", required=True, help="name of the record to make")
    theirs.add_argument("--overwrite", action="store_true", help="replace a record of that name")
    ours.add_argument("--to", type=Path, required=True, help="folder to make, e.g. record/NAME")
    return parser.parse_args()


def main() -> None:
    """Parses the flags and converts."""
    flags = _parsed()
    if flags.command == "export":
        source = places.find_record(flags.result_file, flags.record_path)
        export_record(source, flags.to, flags.dataset_path)
    else:
        folder = places.existing_folder(flags.result_file, flags.record_path, "DIR")
        if folder is None:
            raise UserError(f"DIR: {flags.result_file} is no folder; give BackdoorBench's record")
        import_record(
            folder,
            flags.save_folder_name,
            flags.dataset_path,
            flags.record_path,
            flags.overwrite,
        )


if __name__ == "__main__":
    run_script(main)
