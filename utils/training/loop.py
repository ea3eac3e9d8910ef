"""The loop of a training run: phases, rounds and batches, and their state for a checkpoint."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from models import Classifier
from models.changes import require_promise
from models.fast.graphed import Graphed
from models.parts import learning_weights
from utils.data.batches import wide
from utils.errors import Diverged, UserError, one_line, shown
from utils.process import distributed
from utils.process.seeds import random_states
from utils.tensors import not_finite
from utils.training.findings import Findings
from utils.training.state import device_of, restore, restore_random, state_of

LOSS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,40}")  # the name of one


class Step(Protocol):
    """How a batch's loss is made; an attack that controls training gives its own."""

    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of uint8 (B, C, H, W) images as they are in the set, and int64 (B,) labels."""

    def update(self) -> None:
        """Called after each step of the model's optimizer, for networks of the attack's own."""


class Position(NamedTuple):
    """The round, from 1, and how many of its batches are done."""

    number: int
    batches: int


class Loop:
    """Phases, rounds and batches of a training run.

    A method writes its two `for` statements with it and reports its losses; a pipeline watches
    through the callbacks. Without callbacks it only counts. Everything else that the method finds
    goes into `findings`.

    With several processes (`utils.process.distributed`) it gives each its own part of every batch.
    A method trains data-parallel if it trains through `parallel(model)` and calls `backward(loss)`.
    A method that draws batches but does not do this is refused.

    Args:
        after_round: called with (round from 1, total rounds, mean losses, state) after each round.
        after_batch: called with (number of batches in the round) after each batch.
        unit: what a round of the main phase is called.
        resume: from `snapshot`; the loop continues after that batch.

    Attributes:
        rate: the flags whose size decides how large the main phase's steps are, as of `rounds`.
        phase: the name of the present phase; "" for a method's main one.
        findings: what the method found.
        part: of how many images the present batch is, and which of them this process has.
    """

    def __init__(
        self,
        after_round: Callable[[int, int, dict[str, float], dict[str, Any]], None] | None = None,
        after_batch: Callable[[int], None] | None = None,
        unit: str = "round",
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.rate = "--lr"
        self.phase = ""
        self.findings = Findings()
        self._unit = unit
        self._phase_rate: str | None = None
        self._resume = resume
        self._state: dict[str, Any] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._total = self._round = self._batch = 0
        self._is_open = self._has_ended = self._ends = False
        self._generator: torch.Generator | None = None
        self._order: torch.Tensor | None = None
        self._after_round = after_round
        self._after_batch = after_batch
        self._sums: dict[str, torch.Tensor] = {}
        self._images = 0
        self._weight = 1.0
        self._is_shared = False
        self.part = (0, slice(0))

    def parallel(self, model: nn.Module) -> nn.Module:
        """The module to train a model through; it shares the model's weights.

        Backward comes before the next call where that is possible, see `models.fast.graphed`.

        Raises:
            UserError: if no weight has `requires_grad`.
        """
        learning_weights(model)  # refuses
        self._is_shared = True
        return self.alone(distributed.parallel(model))

    @staticmethod
    def alone(model: nn.Module) -> nn.Module:
        """The module to call a model through, where each process works on its own images.

        Backward comes before the next call where that is possible, see `models.fast.graphed`.
        """
        return model if distributed.processes() > 1 else Graphed(model)

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of a mean over this process's images, as part of the whole batch."""
        (loss * self._weight if self._weight != 1 else loss).backward()

    def rounds(
        self,
        total: int,
        phase: str = "",
        model: nn.Module | None = None,
        rate: str | None = None,
        **state: Any,
    ) -> Iterator[int]:
        """1 to total; a resumed loop begins with the round that it was in.

        A method may have several phases, one after the other. When a run is resumed, a phase that
        was done restores its state as it was at its end and gives no round.

        Args:
            phase: its name, a different one for each phase. The main phase, which `n_rounds` counts
                and the report follows, has no name.
            model: what a pipeline scores after a round; part of the state.
            rate: the flag of the phase's learning rate, for the message when a loss is not finite;
                None for `Loop.rate`.
            state: everything that rounds change: objects with a `state_dict`, generators, tensors,
                and dictionaries of tensors. A snapshot keeps it.

        Raises:
            UserError: if a round's mean loss is not finite, or a snapshot is of another run.
        """
        if self._is_open or phase in self._done or self._has_ended:
            raise ValueError(
                f"phase {phase!r}: a phase is left by stop(), is run once, and none follows the "
                "main one"
            )
        self._state = state if model is None else {"model": model, **state}
        self.phase, self._total, self._round, self._batch = phase, total, 0, 0
        self._phase_rate = rate
        self._generator = self._order = None
        self._sums, self._images, self._ends = {}, 0, False
        first = 1
        if self._resume is not None:
            done = self._phases_done()
            if phase in done:
                self._put_back(done[phase])
                self._done[phase] = done[phase]
                return
            first = self._restore(self._resume, total)
        self._is_open = True
        for number in range(first, total + 1):
            self._round = number
            if self._resume is None:
                self._sums, self._images, self._batch = {}, 0, 0
            yield number
            losses = self.losses()
            if model is not None:
                distributed.require_equal(model)
            self._refuse_divergence(losses)
            if self._after_round:
                self._after_round(number, total, losses, self._state)
            if self._ends:
                break
        self._is_open, self._has_ended = False, phase == ""
        if phase and self._after_batch:  # else nobody takes snapshots
            self._done[phase] = _kept(self._objects())

    def _refuse_divergence(
        self, losses: Mapping[str, float], networks: Iterable[nn.Module] = ()
    ) -> None:
        """Raises Diverged if a loss, or a weight of one of the networks, is not finite."""
        broken = [f"loss '{name}'" for name, value in losses.items() if not math.isfinite(value)]
        for network in networks:
            broken += [f"weight {name}" for name in not_finite(network.state_dict())]
        if broken:
            where = f"{'round' if self.phase else self._unit} {self._round} of {self._total}"
            where += f" ({self.phase})" if self.phase else ""
            raise Diverged(
                f"the {shown(broken[0], 100)} is not finite in {where}; give a smaller "
                f"{self._phase_rate or self.rate}, or take back what else makes losses or steps "
                "large"
            )

    def stop(self) -> None:
        """Makes the present round the last one of its phase."""
        self._ends = True

    @property
    def is_last(self) -> bool:
        """Whether the present round is the last one of its phase."""
        return self._ends or self._round == self._total

    def batches(
        self,
        count: int,
        batch_size: int,
        generator: torch.Generator,
        drop_last: bool = False,
        whole: bool = False,
        steps: int | None = None,
        least: int = 2,
    ) -> Iterator[torch.Tensor]:
        """A fresh permutation of range(count) in batches of int64 indices.

        Each of several processes gets its own part of a batch, at least one image. Call it once
        per round.

        Args:
            generator: on the CPU, so that the order is the same on every device.
            drop_last: whether to skip a last batch that is not full.
            whole: give every process the whole batch; for `distributed.Gathered`.
            steps: number of batches of images drawn with replacement, instead of a permutation.
            least: smallest number of images in a last batch, see `batch_sizes`; 1 for methods that
                need no statistics of a batch.

        Raises:
            UserError: if there is no image, or a process would get none of a batch.
        """
        if count == 0:
            raise UserError("no image is left to learn from; give more images (--ratio)")
        if distributed.processes() > 1 and not (self._is_shared or whole):
            raise UserError(
                "this method does not train data-parallel; start it without torchrun, in one "
                "process"
            )
        done, now = 0, None
        if self._resume is not None:
            try:
                now = self._resume["order_after"]
                generator.set_state(now)  # tried before anything is drawn
                generator.set_state(self._resume["order"])  # for the same permutation once more
            except (KeyError, TypeError, RuntimeError) as error:
                raise NotOfThisRun(error) from None
            done, self._resume = self._batch, None
        self._generator, self._order = generator, generator.get_state()
        if steps is None:
            sizes = batch_sizes(count, batch_size, 1 if drop_last else least)
            batches = torch.randperm(count, generator=generator).split(sizes)
        else:
            batches = tuple(torch.randint(count, (steps, batch_size), generator=generator))
        if now is not None:  # what was drawn from it for other things after the permutation
            generator.set_state(now)
        if drop_last and len(batches[-1]) < batch_size:
            batches = batches[:-1]
        if batches and len(batches[-1]) < distributed.processes():
            raise UserError(
                f"--batch_size: with {batch_size} the last batch has {len(batches[-1])} of {count} "
                f"images, fewer than the {distributed.processes()} processes; give another"
            )
        for number, batch in enumerate(batches[done:], done + 1):
            self.part = len(batch), slice(None) if whole else distributed.part(len(batch))
            rows = batch[self.part[1]]
            share = len(rows) * (1 if whole else distributed.processes())
            self._weight = share / len(batch)
            yield rows
            self._batch = number
            if self._after_batch:
                self._after_batch(len(batches))

    def steps(self, count: int) -> Iterator[int]:
        """1 to count, each of which counts as a batch; for a method that draws its own images.

        Call it once per round. A resumed round begins with the step after the last one.
        """
        done = 0 if self._resume is None else self._batch
        self._resume = None
        for number in range(done + 1, count + 1):
            yield number
            self._batch = number
            if self._after_batch:
                self._after_batch(count)

    @property
    def position(self) -> Position:
        """Where the loop is in its present phase."""
        return Position(self._round, self._batch)

    @property
    def total(self) -> int:
        """How many rounds the present phase has."""
        return self._total

    def snapshot(self) -> dict[str, Any]:
        """Plain data and tensors from which a loop like this one can continue after this batch.

        Sums are those of all processes, which call it together.

        Raises:
            TypeError: if a part of the state is of a kind that cannot be kept.
            UserError: if a loss or a weight is not finite, from which nothing can go on, or if a
                network of the user's file has other weights than when it was made.
        """
        networks = [value for value in self._state.values() if isinstance(value, nn.Module)]
        self._refuse_divergence(self.losses(), networks)
        for network in networks:
            if isinstance(network, Classifier):
                require_promise(network)
        return {
            "done": self._done,
            "phase": self.phase,
            "round": self._round,
            "batch": self._batch,
            "order": self._order,
            "order_after": None if self._generator is None else self._generator.get_state(),
            "sums": {name: distributed.total(value) for name, value in self._sums.items()},
            "images": int(distributed.total(torch.tensor(self._images))),
            **self._objects(),
        }

    def _objects(self) -> dict[str, Any]:
        """The objects that have changed so far, as they are now."""
        return {
            "random": random_states(),
            "objects": {name: state_of(name, value) for name, value in self._state.items()},
            "findings": self.findings.state_dict(),
        }

    def _phases_done(self) -> Mapping[str, Any]:
        try:
            done = self._resume["done"]  # type: ignore[index]
            return {str(phase): dict(state) for phase, state in done.items()}
        except Exception as error:  # a damaged file holds anything
            raise NotOfThisRun(error) from None

    def _put_back(self, kept: Mapping[str, Any]) -> None:
        """Restores the objects of the present phase, and the global generators.

        Raises:
            UserError: if what was kept is of another run.
        """
        try:
            if kept["objects"].keys() != self._state.keys():
                raise ValueError(f"it has {', '.join(map(str, kept['objects']))}")
            for name, value in self._state.items():
                restore(name, value, kept["objects"][name])
            self.findings.load_state_dict(kept["findings"])
            restore_random(kept["random"])
        except Exception as error:  # optimizers and generators raise whatever they stumble over
            raise NotOfThisRun(error) from None

    def _restore(self, snapshot: Mapping[str, Any], total: int) -> int:
        """Puts a snapshot into the objects of the round that it was taken in; returns its number.

        Raises:
            UserError: if it is of another run.
        """
        self._put_back(snapshot)
        try:
            if snapshot["phase"] != self.phase:
                raise ValueError(f"phase {snapshot['phase']!r} instead of {self.phase!r}")
            numbers = [snapshot[name] for name in ("round", "batch", "images")]
            number, self._batch, self._images = numbers
            if any(type(n) is not int or n < 0 for n in numbers) or not 1 <= number <= total:
                raise ValueError(f"round {number} of {total}, batch {self._batch}")
            device = device_of(self._state)
            self._sums = {}
            for name, value in snapshot["sums"].items():
                if not LOSS.fullmatch(name):
                    raise ValueError(f"a loss is called {name}")
                self._sums[name] = value.to(device).reshape(())
            if not distributed.is_main():  # the first process has the sums of all
                self._images = 0
                self._sums = {name: torch.zeros_like(sum_) for name, sum_ in self._sums.items()}
            return number
        except Exception as error:  # a damaged file holds anything
            raise NotOfThisRun(error) from None

    def losses(self) -> dict[str, float]:
        """The mean losses of the round so far, over all processes; waits for the device."""
        if not self._sums:
            return {}
        # On the CPU, because not every device (mps) has float64.
        sums = torch.stack([value.cpu().double() for value in self._sums.values()])
        everything = torch.cat([sums, sums.new_tensor([self._images])])
        *values, images = distributed.total(everything).tolist()
        return {name: value / images for name, value in zip(self._sums, values, strict=True)}

    def log(self, count: int, **losses: torch.Tensor) -> None:
        """Adds a batch's mean losses, weighted by its images; does not wait for the device.

        Sums of half precision would lose small parts, or be infinite; they are in float32.
        """
        self._images += count
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + wide(loss.detach()) * count


def batch_sizes(count: int, batch_size: int, least: int = 2) -> list[int]:
    """The sizes of the batches of a round: full batches, and a last one with the rest.

    If the rest has fewer than `least` images, it joins the batch before. So if there are several
    batches, none has a single image, for which BatchNorm has no statistics in train mode.

    Args:
        count: images, >= 1.
        batch_size: >= 1.
        least: 1 allows a last batch of one image.
    """
    full, rest = divmod(count, batch_size)
    sizes = [batch_size] * full
    if sizes and rest < least:
        sizes[-1] += rest
        return sizes
    return [*sizes, rest]


def _kept(value: Any) -> Any:
    """Plain data and tensors as they are now, the tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _kept(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_kept(inner) for inner in value)
    return value


class NotOfThisRun(UserError):
    """A snapshot is of another run."""

    def __init__(self, error: Exception) -> None:
        self.reason = one_line(error)
        super().__init__(
            f"--resume: the checkpoint is not of this run ({self.reason}); give --overwrite to "
            "start anew"
        )
