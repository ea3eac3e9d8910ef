"""What a defense leaves in its folder, and how its model is used again.

from utils.records.defense import load_defense

model = load_defense("record/badnet_demo/defense/sau")
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from torch import nn
from typing_extensions import NotRequired, TypedDict

from models import Classifier, build_model
from models.changes import apply_changes, changes_of, shapes_without
from utils import record
from utils.errors import UserError, one_line
from utils.folders import RunFolder
from utils.tensors import explained, load_tensors

RESULT = "defense_result.pt"


class _Plain(TypedDict):
    """The plain values of `defense_result.pt`, as pydantic checks them."""

    model_name: str
    model_sha256: NotRequired[str | None]
    network_size: NotRequired[Annotated[int | None, Field(ge=1)]]
    num_classes: Annotated[int, Field(ge=1, strict=True)]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    changes: NotRequired[list[dict[str, str | int]]]


_PLAIN = TypeAdapter(_Plain)


def save_defense(
    folder: RunFolder, model: nn.Module, attack: record.AttackRecord, name: str
) -> None:
    """Writes `defense_result.pt`: the model, and what is needed to make its network again.

    Args:
        model: a `Classifier` with the record's network, or with one that was changed by
            `models.changes` alone.
        attack: the record that it was purified from.
        name: of the defense.

    Raises:
        UserError: if the network is another one, which nothing could make again.
    """
    changes = changes_of(model.network) if isinstance(model, Classifier) else []
    state = record.model_state(model) if isinstance(model, Classifier) else {}
    shapes = shapes_without(state, changes)
    if shapes != {key: value.shape for key, value in attack.state.items()}:
        raise UserError(
            f"{name}: it gave a network that is not the record's, and that models/changes.py does "
            "not know; give a copy of the model, or put its parts in with models.changes.insert"
        )
    folder.write_tensors(
        RESULT,
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


def load_defense(folder: str | Path, model: str | None = None) -> Classifier:
    """The purified model that a defense has left, in eval mode, on the CPU.

    It takes float images in [0, 1], (N, C, H, W), and gives logits.

    Args:
        folder: of the result, e.g. `record/badnet_demo/defense/sau`.
        model: `file.py:function`, where the network is made by a file of yours.

    Raises:
        UserError: if the run is not finished, or a file was changed or damaged.
    """
    folder = Path(folder)
    path = folder / RESULT
    content = _checked(folder)
    with explained(path, "a defense's result of this program"):
        plain = _PLAIN.validate_python(content)
        record.check_state(content["model"])
    name = record.checked_model(plain["model_name"], plain.get("model_sha256"), model)
    classifier = build_model(
        name,
        plain["num_classes"],
        plain["mean"],
        plain["std"],
        image_size=plain["image_shape"][1],
        network_size=plain.get("network_size"),
    )
    try:
        classifier.network = apply_changes(classifier.network, plain.get("changes", []))
        classifier.network.load_state_dict(content["model"])
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"{path}: its weights do not fit {plain['model_name']} ({one_line(error)})"
        ) from None
    return classifier.eval()


def _checked(folder: Path) -> Mapping[str, Any]:
    """The content of a finished result, whose sha256 is the one that its summary names."""
    path = folder / RESULT
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = record.file_hashes(RunFolder(folder), RESULT)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder}: has no readable summary.json ({one_line(error)}), so it is no finished "
            "result of a defense; run the defense again, or give another folder"
        ) from None
    files = summary.get("files") if isinstance(summary, dict) else None
    if not isinstance(files, dict) or not found or files.get(RESULT) != found[RESULT]:
        raise UserError(f"{path}: is not the file that summary.json describes; run it again")
    with explained(path, "a defense's result of this program"):
        return load_tensors(path)
