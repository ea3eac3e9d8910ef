"""Several processes that train one model, as torchrun starts them; one process works as usual.

All processes hold the same weights and draw the same numbers. Each computes its own part of every
batch and of every test set. Gradients, BatchNorm statistics, losses and scores are those of the
whole. Only the first process writes files and prints messages.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from models.fast.batchnorm import BatchNorm2d
from utils.errors import UserError, is_lost_process, one_line
from utils.process.seeds import random_states, same_states

# While the first process prepares something alone, e.g. decodes images, the others wait so long.
_PATIENCE = timedelta(hours=12)

_alone = False


def is_launched() -> bool:
    """Whether torchrun, or a launcher like it, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started; without torchrun nothing happens.

    Raises:
        UserError: if a machine has fewer GPUs than processes, the processes cannot meet, or one of
            the others has ended, as when it was killed.
    """
    if not is_launched():
        yield
        return
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: process {local_rank()} has no GPU, there are "
                f"{torch.cuda.device_count()}; start one process per GPU"
            )
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"RANK, WORLD_SIZE and MASTER_ADDR are set, but the processes cannot meet "
            f"({one_line(error)}); start them with torchrun, or unset these variables"
        ) from None
    try:
        yield
        barrier()  # none closes its connections while the first one still writes
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(
            "another process of this run has ended, which torchrun names; start the run again, "
            "with --resume (and without --overwrite) to go on"
        ) from None
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many work together here."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if _alone or not dist.is_initialized() else dist.get_rank()


def is_main() -> bool:
    """Whether this process writes files and prints messages."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier() -> None:
    """Waits for all processes."""
    if processes() > 1:
        dist.barrier()


@contextmanager
def main_alone() -> Iterator[bool]:
    """The first process works as if it were alone; the others wait for it.

    Gives whether this is the first process:

        with main_alone() as is_mine:
            if is_mine:
                ...

    Raises:
        UserError: in all processes, if the first one does.
    """
    global _alone
    is_mine, outer = is_main(), _alone
    _alone = True
    error: UserError | None = None
    try:
        yield is_mine
    except UserError as raised:
        error = raised
    finally:
        _alone = outer
    of_main = from_main(error)
    if error is not None:
        raise error
    if of_main is not None:
        raise of_main


def from_main(value: Any) -> Any:
    """The first process's value, in all processes."""
    box = [value]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def agreed(number: int, is_due: bool) -> tuple[int, bool]:
    """The largest number of any process, and whether it is due for the first one; in all of them.

    Args:
        number: >= 0.
    """
    if processes() == 1:
        return number, is_due
    both = torch.tensor([number, int(is_due and is_main())])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return int(both[0]), bool(both[1])


def part(count: int) -> slice:
    """This process's part of `count` things in a row; parts differ by one at most."""
    return slice(count * rank() // processes(), count * (rank() + 1) // processes())


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; no gradient."""
    if processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def parallel(model: nn.Module) -> nn.Module:
    """The module to train a model through; it shares the model's weights.

    A backward pass through it leaves the mean of all processes' gradients. In train mode BatchNorm
    then uses the statistics of all processes; the model's own modules are changed for that.
    """
    if processes() == 1:
        return model
    device = next(model.parameters()).device
    _synchronise(model, device.type)
    # Statistics are equal already. torch 2.14 has another name for the flag.
    parameters = inspect.signature(DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return _Parallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{flag: False},  # type: ignore[arg-type]
    )


def require_equal(model: nn.Module) -> None:
    """Raises UserError if the processes no longer hold the same weights and statistics.

    This happens if a method trains without `Loop.parallel` and `Loop.backward`.
    """
    if processes() == 1:
        return
    with torch.no_grad():
        held = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        sums = torch.stack([values.double().sum() for values in held])
        mean = total(sums) / processes()
        apart = total((sums - mean).abs() > 1e-3 * (1 + mean.abs()))
    if apart.any():
        raise UserError(
            "the processes no longer train the same model: this method does not train "
            "data-parallel; start it without torchrun"
        )


def try_sharing(model: nn.Module, images: torch.Tensor, device: torch.device) -> None:
    """Tries what `parallel` and training need of a network, before the work.

    Args:
        model: another one of its kind, on the CPU, which is called in train mode.
        images: two or more, as it takes them.
        device: on which processes will train.

    Raises:
        UserError: if several processes could not train it as one would.
    """
    if processes() > 1:
        _norms(model, device.type)  # refuses
        with torch.no_grad(), _without_draws():
            model.train()
            model(images)


@contextmanager
def _without_draws() -> Iterator[None]:
    """Inside, a network must not draw random numbers.

    Each process would draw its own for its own images, and none would draw those of one process.

    Raises:
        UserError: if a global generator has moved.
    """
    before = random_states()
    yield
    if not same_states(before, random_states()):
        raise UserError(
            "this network draws random numbers in train mode, e.g. for dropout, which several "
            "processes cannot draw as one would; start it without torchrun, or give a network "
            "without them"
        )


class Gathered(nn.Module):
    """A module that takes the whole batch, computes this process's part, and gives all outputs.

    For steps that need the batch as a whole, such as those of attacks that control training: every
    process runs the same step, and only the model's work is shared out. The loss, and the gradient
    of the images, are those of one process.

    Args:
        model: through which to train, from `parallel`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        share = part(len(images))
        return _Gather.apply(self.model(_Scatter.apply(images, share)), share, len(images))


class _Scatter(torch.autograd.Function):
    """Own rows of a batch; the gradient comes back for all rows."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, share: slice) -> torch.Tensor:
        ctx.share, ctx.count = share, len(images)
        return images[share].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Undoes the factor of _Gather, which is there for the weights.
        return _padded(gradient, ctx.share, ctx.count) / processes(), None


class _Gather(torch.autograd.Function):
    """The rows of all processes; the gradient goes to own rows.

    It grows by the number of processes, because the weights' gradients are averaged afterwards.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, share: slice, count: int) -> torch.Tensor:
        ctx.share = share
        return _padded(logits, share, count)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient[ctx.share] * processes(), None, None


def _padded(rows: torch.Tensor, share: slice, count: int) -> torch.Tensor:
    """All rows, from the rows of each process; by a sum, because gloo gathers only equal shares."""
    everything = rows.new_zeros(count, *rows.shape[1:])
    everything[share] = rows
    dist.all_reduce(everything)
    return everything


class _Total(torch.autograd.Function):
    """The sum over all processes, and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return total(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return total(gradient)


class _Parallel(DistributedDataParallel):
    """Data-parallel training that says in a line what it cannot train."""

    def forward(self, *inputs: Any) -> Any:
        try:
            with _without_draws() if self.module.training else nullcontext():
                return super().forward(*inputs)
        except RuntimeError as error:
            if "finished reduction" not in str(error):
                raise
            raise UserError(
                "this network has a weight that its output does not depend on, which several "
                "processes cannot train; start it without torchrun"
            ) from None


class _Synchronised(_BatchNorm):
    """BatchNorm with the statistics of all processes' images; torch's own is for GPUs only."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.training or processes() == 1:
            return super().forward(features)
        others = [dim for dim in range(features.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(features.dim())]
        size = torch.tensor([features.numel() / self.num_features])
        sums = _Total.apply(torch.cat([features.sum(others), size]))
        mean, count = sums[:-1] / sums[-1].detach(), sums[-1].item()
        centered = features - mean.view(shape)
        variance = _Total.apply(centered.square().sum(others)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = self.momentum
                if share is None:  # the mean of all batches
                    share = 1 / int(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / max(count - 1, 1), share)
        scale = (1 if self.weight is None else self.weight) / (variance + self.eps).sqrt()
        normal = centered * scale.view(shape)
        return normal if self.bias is None else normal + self.bias.view(shape)


class _BatchNorm1d(_Synchronised, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_Synchronised, nn.BatchNorm3d):
    pass


_SYNCHRONISED: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
    BatchNorm2d: _BatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
}


def _norms(model: nn.Module, device: str) -> list[nn.Module]:
    """The BatchNorm layers that do not yet use the statistics of all processes.

    Raises:
        UserError: for one that cannot: of another kind, or without running statistics.
    """
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Synchronised)
    ]
    for name, layer in layers:
        if layer.running_mean is None:
            fault = "keeps no running statistics"
        elif device != "cuda" and type(layer) not in _SYNCHRONISED:
            fault = f"is a {type(layer).__name__}"
        else:
            continue
        raise UserError(
            f"the BatchNorm layer {name} {fault}, so each of several processes would normalize its "
            "own images; start it without torchrun"
        )
    return [layer for _, layer in layers]


def _synchronise(model: nn.Module, device: str = "cpu") -> None:
    """Makes BatchNorm use the statistics of all processes.

    Raises:
        UserError: as `_norms` does.
    """
    layers = _norms(model, device)
    if device == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for layer in layers:
            layer.__class__ = _SYNCHRONISED[type(layer)]  # same weights, statistics and keys
