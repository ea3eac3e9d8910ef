"""What a defense writes into its folder, and how its model is used again.

from utils.records.defense import load_defense

model = load_defense("record/badnet_demo/defense/sau")
"""

from pathlib import Path
from typing import Any

from torch import nn

from models import Classifier
from models.changes import changes_of, weights_without
from models.modes import in_float32, undisturbed
from utils.errors import UserError
from utils.files import read_object
from utils.records import schema
from utils.records.attack import AttackRecord
from utils.records.contents import DEFENSE_RESULT, SUMMARY, said_of_replaced
from utils.records.folders import RunFolder
from utils.records.hashes import checked_hashes
from utils.records.network import checked_model, make_model, model_state
from utils.tensors import explained, load_tensors


def save_defense(folder: RunFolder, model: nn.Module, attack: AttackRecord, name: str) -> None:
    """Writes `defense_result.pt`: the model, and what is needed to make its network again.

    Args:
        model: a `Classifier` with the record's network, or with one that was changed only by
            `models.changes`.
        attack: the record that it was purified from.
        name: of the defense.

    Raises:
        UserError: if the network is another one, which nothing could make again.
    """
    require_of_record(model, attack, name)
    assert isinstance(model, Classifier)
    state, changes = model_state(model), changes_of(model.network)
    folder.write_tensors(
        DEFENSE_RESULT,
        {
            "model": state,
            "model_name": attack.model_name,
            "model_sha256": attack.model_sha256,
            "network_size": attack.network_size,
            "num_classes": attack.num_classes,
            "image_shape": list(attack.image_shape),
            "mean": list(attack.mean),
            "std": list(attack.std),
            "changes": changes,
            "defense": name,
            "attack_sha256": attack.sha256,
        },
    )


def require_of_record(model: nn.Module, attack: AttackRecord, name: str) -> None:
    """Raises UserError if a defense's network could not be made again from what a result keeps.

    Args:
        model, attack, name: as in `save_defense`.
    """
    state = model_state(model) if isinstance(model, Classifier) else {}
    weights = weights_without(model.network, state) if isinstance(model, Classifier) else {}
    if schema.misfits(weights, attack.state):
        raise UserError(
            f"{name}: it gave a network that is not the record's, and that models/changes.py does "
            "not know; give a copy of the model, or put its parts in with models.changes.insert"
        )


def checked_result(folder: Path, attack: AttackRecord) -> dict[str, Any]:
    """The `summary.json` of a finished result, which fits its file and the record.

    Raises:
        UserError: if the result was changed, or is of another attack.
    """
    checked_hashes(folder, [DEFENSE_RESULT])
    summary: dict[str, Any] = read_object(folder / SUMMARY)
    if summary.get("attack_sha256") != attack.sha256:
        raise UserError(
            f"{folder}: is of another attack than the record that is there; run the defense again"
        )
    attack.require_triggers(summary, folder)
    return summary


@undisturbed()
@in_float32()
def load_defense(folder: str | Path, model: str | None = None) -> Classifier:
    """The purified model that a defense has written, in eval mode, on the CPU, in float32.

    It takes float images in [0, 1], (N, C, H, W), and gives logits. The caller's modes, and the
    caller's default device and type, change nothing.

    Args:
        folder: of the result, e.g. `record/badnet_demo/defense/sau`.
        model: `file.py:function`, if the network is made by a file of yours.

    Raises:
        UserError: if the run is not finished, or a file was changed or damaged.
    """
    folder = Path(folder)
    if not (folder / SUMMARY).exists():
        raise UserError(
            f"{folder}: has no summary.json, so it is no finished result of a defense"
            f"{said_of_replaced(folder)}; run the defense again, or give another folder"
        )
    checked_hashes(folder, [DEFENSE_RESULT])
    with explained(folder / DEFENSE_RESULT, "a defense's result of this program"):
        content = load_tensors(folder / DEFENSE_RESULT)
        plain = schema.check_defense(content)
    name = plain["model_name"]
    in_python = f'load_defense(folder, "{name}")'
    return make_model(
        checked_model(name, plain.get("model_sha256"), model, in_python),
        content["model"],
        num_classes=plain["num_classes"],
        mean=plain["mean"],
        std=plain["std"],
        image_size=plain["image_shape"][1],
        network_size=plain.get("network_size"),
        where=folder / DEFENSE_RESULT,
        changes=plain.get("changes", []),
    )
