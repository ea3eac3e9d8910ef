"""What holds around every defense's `purify`: sound input, and draws that repeat."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from models import Classifier
from models.bf16 import sound_gradients
from models.copies import apart_from, copied
from models.modes import in_turn, undisturbed
from models.parts import refuse_scripts, usual_weight
from models.userfile import not_as_logits
from models.views import any_order, has_own_code
from utils.data.batches import as_float
from utils.errors import Diverged, UserError, shown, told
from utils.process.seeds import random_states, seed_everything
from utils.training.state import restore_random

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROUNDING = 1e-3  # by which a pixel may leave [0, 1], as after a normalization that was undone
COPY_OF_IT = "model: a copy of the network"
SWITCH_OFF = (
    "if it has gradient checkpointing, switch this off (model.gradient_checkpointing_disable() or "
    "the like)"
)
MAKE_COPYABLE = "give one without locks, open files and the like among its attributes"
GIVE_IMAGES = "give (N, C, H, W), floats in [0, 1] or uint8 in 0 to 255"


T = TypeVar("T")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators begin with the seed; they are restored at the end.

    So dropout, and all other draws of a network, repeat, and the caller's own draws do not change.
    Other threads that need the generators wait.
    """
    with in_turn():
        before = random_states()
        seed_everything(seed)
        try:
            yield
        finally:
            restore_random(before)


@contextmanager
def sheltered(seed: int) -> Iterator[None]:
    """Inside, a method runs alike wherever it is called from, and with the same draws each time."""
    with seeded(seed), single_images_told(), undisturbed():
        yield


@contextmanager
def run_soundly(model: nn.Module) -> Iterator[None]:
    """`any_order` and `sound_gradients`, where a network needs them, around forward and backward.

    A `Classifier` sees to them in its forward pass. But gradient checkpointing, in code of the
    user's own, computes parts of it again in the backward pass.
    """
    is_own = has_own_code(model)
    is_half = not isinstance(model, Classifier) and half_precision(model) == "bfloat16"
    with any_order(is_own), sound_gradients(is_own or is_half):
        yield


def half_precision(model: nn.Module) -> str:
    """The name of the half precision that weights of a network have; "" if none has."""
    types = {weight.dtype for weight in model.parameters()}
    return next((f"{t}"[6:] for t in (torch.float16, torch.bfloat16) if t in types), "")


def apart(images: torch.Tensor) -> torch.Tensor:
    """The same images, through which no gradient reaches the caller's."""
    return images.clone() if images.is_inference() else images.detach()


def require_module(purified: object) -> None:
    """Raises UserError if what a defense returned is no network."""
    if not isinstance(purified, nn.Module):
        given = type(purified).__name__
        raise UserError(f"the defense's purify gave {given}; return the purified nn.Module")


def require_finite(purified: nn.Module) -> None:
    """Raises UserError if a weight or a statistic is NaN or infinite, as of a run that diverged.

    Losses do not always say so, because BatchNorm keeps them small.
    """
    if (name := _not_finite(purified)) is not None:
        raise Diverged(
            f"{shown(name, 100)} of the purified network is not finite; give smaller learning "
            "rates, or take back what else makes steps large"
        )


def _not_finite(model: nn.Module) -> str | None:
    """The name of a weight, or of BatchNorm's statistics, that is not finite."""
    values = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, nn.Parameter) or name.endswith(("running_mean", "running_var"))
    }
    return next(
        (name for name, value in values.items() if not value.detach().isfinite().all()),
        None,
    )


@contextmanager
def single_images_told() -> Iterator[None]:
    """Turns BatchNorm's refusal of a batch of one image, in train mode, into a UserError.

    A last batch of one image does not occur (`utils.training.loop.batch_sizes`). So the error
    occurs only in runs where every batch has one image, and there in the first step.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        raise UserError(
            "this network cannot learn from one image at a time, because its BatchNorm would see "
            "a single value of a channel; give at least two images (--ratio), and a --batch_size "
            "of at least 2"
        ) from error


def check_given(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    needs_images: bool,
    needs_labels: bool,
    learns: bool = False,
    moves_images: bool = False,
    takes_float16: bool = True,
    computes_once: bool = False,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Checks the arguments of a `purify`; a copy of the network is called with two images, and one.

    Args:
        needs_images: whether there must be at least one image.
        needs_labels: whether there must be a label for each image; else there may be none at all.
        learns: whether gradients must reach weights that require them, if any does.
        moves_images: whether gradients must reach the images.
        takes_float16: whether weights may be in float16.
        computes_once: whether no part of the network may be called again for the gradients.
        batch_size: of methods that train the whole network in train mode; None for others.

    Returns:
        The images as they are; in the type of the network's weights if it takes no others.

    Raises:
        UserError: if the network has no weights, or not finite or too coarse ones, or its lazy
            layers have none yet; if images are no (N, C, H, W) of floats in [0, 1] or uint8; if
            labels are no (N,) of int64 below the number of classes; if the network cannot take the
            images, changes them, gives no logits (N, K), cuts off gradients that are needed,
            computes something again for them and must not, or cannot be trained on so few images;
            if a copy of it computes with its own weights.
    """
    _check_network(model)
    if not takes_float16 and any(w.dtype == torch.float16 for w in model.parameters()):
        raise UserError(
            "model: its weights are in float16, whose numbers are too coarse for the steps of this "
            "method; give model.float()"
        )
    _check_images(images, needs_images)
    if needs_labels or not isinstance(labels, torch.Tensor) or len(labels):
        _check_labels(labels, len(images))
    copy = _tried(lambda: copied(model), "be copied by copy.deepcopy", MAKE_COPYABLE)
    _tried(copy.eval, "be put in eval mode", "repair it")
    images = _in_its_type(copy, images)
    some = images[:2] if len(images) else images.new_zeros(1, *images.shape[1:])
    before = as_float(some, _device(model)).clone()
    for count in range(len(some), 0, -1):  # what is right for two may be wrong for one
        given = before[:count].clone()
        with torch.no_grad(), run_soundly(model), apart_from(model, COPY_OF_IT):
            logits = _tried(
                lambda given=given: copy(given),  # type: ignore[misc]
                f"take images of shape {tuple(given.shape)} and type {some.dtype}",
            )
        if not torch.equal(given, before[:count]):
            raise UserError(
                "model: the network changes the images that it is given; give one that does not "
                "normalize in place"
            )
        if len(images):
            classes = _classes(logits, count)
    if len(images) == 0:
        return images
    if classes < 2:
        raise UserError("model: it tells one class; give a network with two or more")
    if learns:
        _check_gradients(copy, before, moves_images, computes_once)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(
            f"labels: {int(labels.min())} to {int(labels.max())}, but the network has {classes} "
            f"classes; give 0 to {classes - 1}"
        )
    if batch_size is not None:
        count = min(len(some), batch_size)
        _tried(copy.train, "be put in train mode", "repair it")
        with (
            single_images_told(),
            torch.no_grad(),
            run_soundly(model),
            apart_from(model, COPY_OF_IT),
        ):
            if count == 1:
                logits = copy(before[:1])
            else:
                logits = _tried(lambda: copy(before[:count]), "be called in train mode")
        _classes(logits, count, " in train mode")
    return images


def _in_its_type(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The images in the type of the network's weights if it takes no others; else as they are.

    uint8 images become float32, batch by batch, which most networks take. What they are here stays
    in memory.
    """
    own = usual_weight(model).dtype
    is_of_levels = images.dtype == torch.uint8
    if own == (torch.float32 if is_of_levels else images.dtype) or own not in FLOATS:
        return images
    black = as_float(torch.zeros_like(images[:1], device=_device(model)))
    if len(black) == 0:
        black = black.new_zeros(1, *images.shape[1:])
    try:
        with torch.no_grad(), run_soundly(model):
            model(black)
    except Exception:  # the user's code may raise anything
        return images.to(own) / 255 if is_of_levels else images.to(own)
    return images


def _check_gradients(
    model: nn.Module, images: torch.Tensor, moves_images: bool, computes_once: bool
) -> None:
    """Raises UserError if no gradient of the logits reaches the weights, or the images.

    And if the network calls parts of it again for the gradients, and must not.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradient, calls = None, []
    with run_soundly(model):
        # What is frozen is computed again only for the gradient of what comes before.
        images = images.detach().clone().requires_grad_(moves_images or computes_once)
        logits = _tried(lambda: model(images.clone()), "be called with gradients")
        wanted = [tensor for tensor in (images, *weights) if tensor.requires_grad]
        if logits.requires_grad and wanted:
            with _calls(model) as calls:
                gradient, *_ = _tried(
                    lambda: torch.autograd.grad(logits.sum(), wanted, allow_unused=True),
                    "give gradients",
                    SWITCH_OFF,
                )
    for what, is_cut in (
        ("weights", bool(weights) and not logits.requires_grad),
        ("images", moves_images and gradient is None),
    ):
        if is_cut:
            raise UserError(
                f"model: no gradient reaches the {what}, because its code detaches something, "
                "leaves torch, or runs under no_grad; this method needs it, so give a network "
                "without that"
            )
    if computes_once and calls:
        raise UserError(
            "model: it computes parts of itself again for the gradients, when this method has "
            f"given their weights, modes or hooks back; {SWITCH_OFF}"
        )


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[str]]:
    """Inside, each call of a part of the network adds its name to a list."""
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _check_network(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {type(model).__name__} is no network; give an nn.Module")
    if next(model.parameters(), None) is None:
        raise UserError("model: the network has no weights; give one that was trained")
    refuse_scripts(dict(model.named_modules()))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, value in tensors.items() if is_lazy(value)]
    if lazy:
        raise UserError(
            f"model: {shown(lazy[0], 100)} has no values yet, because its lazy layer was never "
            "called; call the network once, and load the weights that were trained"
        )
    if any(value.is_meta for value in tensors.values()):
        raise UserError(
            "model: it was made under torch.device('meta'), where weights have no values; make it "
            "outside, and load the weights that were trained"
        )
    if any(value.is_inference() for value in tensors.values()):
        raise UserError(
            "model: it was made under torch.inference_mode, where nothing can be trained; make it "
            "outside"
        )
    if (broken := _not_finite(model)) is not None:
        raise UserError(
            f"model: {shown(broken, 100)} is not finite; give a network whose weights are"
        )


def _check_images(images: torch.Tensor, needs_images: bool) -> None:
    if not isinstance(images, torch.Tensor):
        raise UserError(f"images: {type(images).__name__} is no tensor; {GIVE_IMAGES}")
    if images.is_nested or images.layout != torch.strided or images.is_meta:
        raise UserError(f"images: they are no dense tensor with values; {GIVE_IMAGES}")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise UserError(f"images: the shape is {tuple(images.shape)}; {GIVE_IMAGES}")
    if images.dtype not in (torch.uint8, *FLOATS):
        raise UserError(f"images: the type is {images.dtype}; {GIVE_IMAGES}")
    if len(images) == 0:
        if needs_images:
            raise UserError("images: there is none, which this method needs; give at least one")
        return
    if images.dtype == torch.uint8:
        return
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # nor if one of them is NaN
        raise UserError(
            f"images: pixels reach from {low:g} to {high:g}; {GIVE_IMAGES}, before any "
            "normalization, which belongs into the network"
        )


def _check_labels(labels: torch.Tensor, count: int) -> None:
    if not isinstance(labels, torch.Tensor):
        raise UserError(f"labels: {type(labels).__name__} is no tensor; give (N,) int64")
    if tuple(labels.shape) != (count,):
        raise UserError(
            f"labels: the shape is {tuple(labels.shape)} for {count} images; give one for each, "
            f"({count},) int64"
        )
    if labels.dtype != torch.int64:
        raise UserError(f"labels: the type is {labels.dtype}; give (N,) int64")


def _classes(logits: Any, count: int, when: str = "") -> int:
    """The number of classes in what a network gives for so many images."""
    if wrong := not_as_logits(logits, count):
        images = "one image" if count == 1 else f"{count} images"
        raise UserError(
            f"model: the network gives {wrong} for {images}{when}; logits (N, K) are needed, as "
            "floats"
        )
    classes: int = logits.shape[1]
    return classes


def _tried(
    work: Callable[[], T], what: str, advice: str = "give images that it takes, or repair it"
) -> T:
    """As `told`, of the network that a caller gave."""
    return told("model: the network", work, what, advice, of=Exception)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
