"""Trials of networks, before a run begins that could not end."""

from collections.abc import Callable
from typing import TypeVar

import torch

from models import userfile
from models.classifier import Classifier
from models.copies import apart_from, copied
from models.outside import Outside, state_outside
from utils.errors import UserError, listed, told

T = TypeVar("T")


def try_size(name: str, image_size: int, build: Callable[[int], Classifier]) -> None:
    """Tries a network with a batch of two, without memory or arithmetic (on torch's meta device).

    Args:
        name: the `--model` value.
        image_size: side of the images in pixels.
        build: makes the network for a size of images.

    Raises:
        UserError: if it cannot train on images of that size; it lists sizes that it can take.
    """

    def fits(size: int) -> bool:
        try:
            with torch.device("meta"):
                model = build(size).train()
                model(torch.empty(2, 3, size, size))
        except (RuntimeError, ValueError, AssertionError):
            return False
        return True

    if not fits(image_size):
        able = [str(size) for size in (16, 28, 32, 48, 64, 96, 128, 224, 299) if fits(size)]
        raise UserError(
            f"--model: {name} cannot take images of {image_size} x {image_size} pixels; "
            f"give --image_size {' or '.join(able)}, or another model"
        )


def try_user_model(
    name: str,
    image_size: int,
    build: Callable[[], Classifier],
    warn: Callable[[str], None] | None = None,
) -> None:
    """Tries everything that attacks and defenses will do with the user's network.

    Args:
        name: the `--model` value.
        image_size: side of the images in pixels.
        build: makes the network, another one in each call.
        warn: gets a line about state of Python that logits depend on, and that no file keeps.

    Raises:
        UserError: if it cannot do some of it.
    """

    def tried(work: Callable[[], T], what: str, advice: str = "repair it") -> T:
        return told(f"--model: {name}", work, what, advice)

    def logits(count: int, model: Classifier) -> torch.Tensor:
        """A model's logits of that many black images."""
        images = torch.zeros(count, 3, image_size, image_size)
        what = f"take {userfile.in_words(images)}"
        return tried(lambda: model(images), what, "repair it, or give another --image_size")

    def weights(of: Classifier) -> userfile.Weights:
        return tried(lambda: userfile.weights_of(of.network, name), userfile.SAVED)

    def built() -> Classifier:
        return tried(build, userfile.SAVED)

    model = built()
    before = weights(model)
    tried(model.train, "be put in train mode")
    loss = logits(2, model).float().square().sum()
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"--model: {name} has no weight with requires_grad; a defense trains them")
    tried(loss.backward, "be trained")
    tried(model.eval, "be put in eval mode")
    with torch.no_grad():
        for count in (3, 1):
            logits(count, model)
    if weights(model) != before:
        raise UserError(
            f"--model: {name} has other names or shapes of weights after a call than before; make "
            "all of them in its constructor"
        )
    again = built()
    tried(
        lambda: again.network.load_state_dict(model.network.state_dict()),
        "load the weights of another one that the same call has built",
    )
    second = tried(lambda: copied(model), "be copied by copy.deepcopy, as defenses do")
    shared = {*map(id, second.parameters())} & {*map(id, model.parameters())}
    if shared or weights(second) != before:
        raise UserError(f"--model: {name} gives copy.deepcopy no copy with weights of its own")
    copy_of_it = f"--model: {name} gives copy.deepcopy a copy that"
    with torch.no_grad(), apart_from(model, copy_of_it):
        for is_training in (False, True):
            logits(2, second.train(is_training))
    _try_state(
        name, tried(lambda: state_outside(model, again, image_size), "be called a few times"), warn
    )


def _try_state(name: str, outside: Outside, warn: Callable[[str], None] | None) -> None:
    """Tells of state outside the state dict.

    Raises:
        UserError: if a record would lack buffers on which the logits in eval mode depend.
    """
    if outside.buffers:
        raise UserError(
            f"--model: {name} gives other logits in eval mode without "
            f"{_in_words(outside.buffers)}, which its state dict lacks, and a record keeps the "
            "state dict alone; register it without persistent=False"
        )
    if outside.attributes and warn is not None:
        warn(
            f"--model: {name} computes with {_in_words(outside.attributes)}, which its state dict "
            "lacks, so a run that is resumed, or a model that is loaded, may differ; keep it in a "
            "buffer (register_buffer)"
        )


def _in_words(names: list[str]) -> str:
    """Names of buffers and attributes, as the user's file has them."""
    return listed([name.removeprefix("network.") for name in names], limit=100)
