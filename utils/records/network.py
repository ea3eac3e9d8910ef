"""Networks of records, of attacks and of defenses: their weights, and how they are made again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models import Classifier, build_model, is_user_file, model_identity
from models.changes import apply_changes, require_promise
from utils.errors import Diverged, UserError, is_lack_of_memory, listed, one_line
from utils.records import schema
from utils.tensors import not_finite


def model_state(model: Classifier) -> dict[str, torch.Tensor]:
    """The bare network's state dict on the CPU, in plain memory order.

    Raises:
        UserError: if a network of the user's file has other weights than when it was made.
        Diverged: if a weight is not finite, because no record of it could be read.
    """
    require_promise(model)
    state = model.network.state_dict()
    try:
        schema.check_state(state)
    except ValueError as error:
        raise Diverged(
            f"{error}, so no record of them could be read; give a smaller learning rate, or repair "
            "the network"
        ) from None
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def checked_model(name: str, sha256: str | None, given: str | None, in_python: str = "") -> str:
    """The name to build a record's model by.

    Args:
        name, sha256: what the record says of its network; the latter of a user's file.
        given: the user's `--model`; a file is run only if it is given here.
        in_python: what to call to give it, for the message.

    Raises:
        UserError: if that is not the record's, or has to be given and is not.
    """
    if not is_user_file(name):
        if given not in (None, name):
            raise UserError(f"--model: {given}, but the record says {name}; drop the flag")
        return name
    if given is None:
        raise UserError(
            f"--model: the record's network is made by a file of yours, {name}, which is run only "
            "if you name it; give --model and its path"
            + (f", or from Python {in_python}" if in_python else "")
        )
    file, sha256_of_file = model_identity(given)
    if sha256_of_file is None or file.rpartition(":")[2] != name.rpartition(":")[2]:
        raise UserError(f"--model: {given}, but the record says {name}; give that file")
    if sha256_of_file != sha256:
        raise UserError(
            f"--model: {given} is not the file that the record was made with, whose sha256 is "
            f"{sha256}; give that file"
        )
    return given


def make_model(
    name: str,
    state: Mapping[str, torch.Tensor],
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    network_size: int | None,
    where: Path,
    changes: Sequence[Mapping[str, Any]] = (),
) -> Classifier:
    """A network with a record's weights, in eval mode, on the CPU.

    Args:
        name: as `checked_model` gives it; the rest as for `build_model`.
        changes: what a defense has added to the network.
        where: the file or folder that has the weights, for messages.

    Raises:
        UserError: if the weights do not fit the network, before memory is taken for it; only the
            user's own file is run first.
    """

    def build() -> Classifier:
        model = build_model(
            name,
            num_classes,
            tuple(mean),
            tuple(std),
            image_size=image_size,
            network_size=network_size,
        )
        if changes:
            model.network = apply_changes(model.network, changes)
        return model

    def check(model: Classifier) -> None:
        misfits = schema.misfits(state, model.network.state_dict())
        if misfits:
            raise UserError(f"{'; '.join(misfits[:3])}; {len(misfits)} in all")

    try:
        if not is_user_file(name):  # on "meta" a network is its shapes alone
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                check(build())
        with torch.random.fork_rng(devices=[]):  # new weights are drawn, which nobody sees
            model = build()
        check(model)
        model.network.load_state_dict(state)
        if broken := not_finite(model.network.state_dict()):  # too large for their type here
            raise UserError(f"too large for its type: {listed(broken, limit=200)}")
    except (RuntimeError, UserError) as error:
        if is_lack_of_memory(error) or str(error).startswith("--model"):
            raise
        what = name.rpartition("/")[2]
        raise UserError(f"{where}: its weights do not fit {what} ({one_line(error)})") from None
    model.eval()
    return model
