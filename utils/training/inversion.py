"""A trigger inverted by a generator that changes images; a mask separates it from benign features.

The first steps of BTI-DBF (Xu et al., ICLR 2024), which PAM shares. With f the network's last map
of features, h the network, and g what follows the map:

    generator  G(x) = x first, by mean squared error
    mask       m = tanh(t) / (2 + 1e-7) + 1/2 in:
               min over t   CE(g(m f(x)), y) - CE(g((1 - m) f(x)), y)
    trigger    min over G   0.01 MSE(m f(x), m f(G(x))) - MSE((1 - m) f(x), (1 - m) f(G(x)))
               from the second time on + CE(h(G(x)), t), t the label that most G(x) had at first

So the benign features stay as they are, and the others change as much as they can. If G changes the
images or the benign features of a batch too much, G learns the identity on this batch instead.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from models.copies import copied
from models.lastmap import last_map
from models.modes import evaluating, frozen, in_float32
from models.outputs import recording, weighted
from models.parts import usual_weight
from models.unet import UNet
from utils.data.batches import as_float, whole_share
from utils.perturb import to_unit
from utils.process.seeds import generator
from utils.training.findings import Picture
from utils.training.loop import Loop

BENIGN = 0.01  # weight of the benign features' change
NOISE = 0.03  # deviation of what is added to the images whose label is detected, pixels in [0, 1]
SHOWN = 8  # images of the picture

# Share of steps for the identity alone, from which on no trigger is searched. A search that works
# goes along a bound, and takes some steps to come back from each one beyond it.
MOST_IDENTITY = 0.9


class Flags(Protocol):
    """The flags that the inversion reads."""

    @property
    def inversion_rounds(self) -> int: ...
    @property
    def identity_epochs(self) -> int: ...
    @property
    def mask_epochs(self) -> int: ...
    @property
    def generator_epochs(self) -> int: ...
    @property
    def generator_width(self) -> int: ...
    @property
    def mask_lr(self) -> float: ...
    @property
    def generator_lr(self) -> float: ...
    @property
    def image_bound(self) -> float: ...
    @property
    def feature_bound(self) -> float: ...
    @property
    def generated_ratio(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def random_seed(self) -> int: ...


def mask_loss(
    model: nn.Module, layer: str, images: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """CE(g(m f(x)), y) - CE(g((1 - m) f(x)), y): benign features tell the label, others do not.

    Args:
        model: in the mode that it has; from (B, C, H, W) to (B, K).
        layer: whose output is f.
        images: (B, C, H, W) float in [0, 1].
        labels: (B,) int64.
        mask: in [0, 1], of the shape of f without its first dimension.

    Returns:
        A scalar with a gradient for the mask.
    """
    with weighted(model, layer, mask):
        benign = F.cross_entropy(model(images), labels)
    with weighted(model, layer, 1 - mask):
        return benign - F.cross_entropy(model(images), labels)


class GeneratorLoss(NamedTuple):
    """Of one batch.

    Attributes:
        loss: a scalar.
        change: MSE(x, G(x)), a scalar.
        is_identity_only: whether the loss is the change alone; a scalar of bool.
    """

    loss: torch.Tensor
    change: torch.Tensor
    is_identity_only: torch.Tensor


def generator_loss(
    images: torch.Tensor,
    generated: torch.Tensor,
    features: torch.Tensor,
    generated_features: torch.Tensor,
    mask: torch.Tensor,
    config: Flags,
    target_loss: torch.Tensor | None = None,
) -> GeneratorLoss:
    """The loss of the generator on one batch.

    0.01 MSE(m f(x), m f(G(x))) - MSE((1 - m) f(x), (1 - m) f(G(x))) and `target_loss`. If
    MSE(x, G(x)) is over `image_bound`, or MSE(m f(x), m f(G(x))) is over `feature_bound`, the loss
    is only MSE(x, G(x)).

    Args:
        images, generated: x and G(x), (B, C, H, W) float, pixel units.
        features, generated_features: f of both, (B, D, h, w).
        mask: (D, h, w) in [0, 1].
        target_loss: a scalar; None for none.
    """
    change = F.mse_loss(generated, images)
    benign = F.mse_loss(mask * generated_features, mask * features)
    other = F.mse_loss((1 - mask) * generated_features, (1 - mask) * features)
    wanted = BENIGN * benign - other
    if target_loss is not None:
        wanted = wanted + target_loss
    is_far = (change > config.image_bound) | (benign > config.feature_bound)
    return GeneratorLoss(torch.where(is_far, change, wanted), change, is_far)


class Inversion:
    """The generator of a model's triggers, and the steps that train it.

    Args:
        model: whose trigger it is; from (N, C, H, W) float in [0, 1] to (N, K) logits.
        images: (N, C, H, W) clean images, uint8 or float in [0, 1].
        labels: (N,) int64.
        loop: counts the phases, and takes the detected label and a picture.

    Attributes:
        layer: the name of the layer whose output is f.

    Raises:
        UserError: if the network has no map of features before global pooling.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        config: Flags,
        loop: Loop,
    ) -> None:
        self.layer = last_map(model, images.shape[1:])
        self._images, self._labels, self._config, self._loop = images, labels, config, loop
        weight = usual_weight(model)
        self._device, self._dtype = weight.device, weight.dtype
        with in_float32():
            unet = UNet(images.shape[1], config.generator_width)
        self._generator = unet.to(self._device, self._dtype)
        self._order = generator(config.random_seed, "batches of the inversion")
        self._target: int | None = None
        self._learn_identity()

    def batches(self, order: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels of a pass, (B, C, H, W) float in [0, 1] and (B,), on the device."""
        for index in self._loop.batches(len(self._images), self._config.batch_size, order):
            yield self._floats(self._images[index]), self._labels[index].to(self._device)

    def invert(self, model: nn.Module, number: int) -> None:
        """Learns a mask, and then the trigger of the model as it is now.

        Args:
            model: stays as it is.
            number: which time this is, from 1. The first one detects the label, which is no finding
                if hardly any step searched a trigger.
        """
        mask = self._learn_mask(model, number)
        is_searched = self._learn_trigger(model, number, mask)
        if number == 1:
            self._detect(model, is_searched)
        if number == self._config.inversion_rounds:
            self._draw()

    @torch.no_grad()
    def mixed(self, images: torch.Tensor) -> torch.Tensor:
        """A batch whose first int(generated_ratio B) + 1 images are replaced by G's.

        Shape:
            (B, C, H, W) float -> the same; what G gives is not clipped to [0, 1].
        """
        count = whole_share(self._config.generated_ratio, len(images)) + 1
        return torch.cat([self._generator(images[:count]), images[count:]])

    def _floats(self, images: torch.Tensor) -> torch.Tensor:
        return as_float(images, self._device).to(self._dtype)

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._generator.parameters(), lr=self._config.generator_lr)

    def _learn_identity(self) -> None:
        optimizer = self._optimizer()
        for _ in self._loop.rounds(
            self._config.identity_epochs,
            "identity",
            rate="--generator_lr",
            generator=self._generator,
            optimizer=optimizer,
            order=self._order,
        ):
            for x, _ in self.batches(self._order):
                loss = F.mse_loss(self._generator(x), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self._loop.log(len(x), loss=loss)

    def _learn_mask(self, model: nn.Module, number: int) -> torch.Tensor:
        """(D, h, w) in (0, 1), of the shape of an image's f; on a copy in train mode."""
        with recording(model, [self.layer]) as features, evaluating(model), torch.no_grad():
            model(self._floats(self._images[:1]))
        shape = features[self.layer].shape[1:]
        rng = generator(self._config.random_seed, f"mask {number}")
        drawn = torch.randn(shape, generator=rng, dtype=self._dtype)
        theta = drawn.to(self._device).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=self._config.mask_lr)
        model = copied(model, training=True)
        model.requires_grad_(False)
        for _ in self._loop.rounds(
            self._config.mask_epochs,
            f"mask {number}",
            rate="--mask_lr",
            theta=theta,
            optimizer=optimizer,
            order=self._order,
        ):
            for x, y in self.batches(self._order):
                loss = mask_loss(model, self.layer, x, y, to_unit(theta))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self._loop.log(len(x), loss=loss)
        return to_unit(theta.detach())

    def _learn_trigger(self, model: nn.Module, number: int, mask: torch.Tensor) -> bool:
        """Whether a trigger was searched at all, see `_say_searched`."""
        optimizer = self._optimizer()
        steps = torch.zeros(2, dtype=torch.int64, device=self._device)  # all, identity only
        with evaluating(model), frozen(model), recording(model, [self.layer]) as features:
            for _ in self._loop.rounds(
                self._config.generator_epochs,
                f"trigger {number}",
                rate="--generator_lr",
                generator=self._generator,
                optimizer=optimizer,
                order=self._order,
                steps=steps,
            ):
                for x, _ in self.batches(self._order):
                    with torch.no_grad():
                        model(x)
                    before = features[self.layer]
                    generated = self._generator(x)
                    logits = model(generated)
                    target_loss = None
                    if self._target is not None:
                        wanted = torch.full((len(x),), self._target, device=self._device)
                        target_loss = F.cross_entropy(logits, wanted)
                    after = features[self.layer]
                    losses = generator_loss(
                        x, generated, before, after, mask, self._config, target_loss
                    )
                    optimizer.zero_grad()
                    losses.loss.backward()
                    optimizer.step()
                    steps[0] += 1
                    steps[1] += losses.is_identity_only
                    self._loop.log(len(x), loss=losses.loss, change=losses.change)
        return self._say_searched(number, *steps.tolist())

    def _say_searched(self, number: int, steps: int, identity_only: int) -> bool:
        """Keeps the share of steps that were only for the identity; warns if it is nearly all.

        Returns:
            Whether a trigger was searched in more than a tenth of the steps.
        """
        findings = self._loop.findings
        share = identity_only / steps if steps else 1.0
        findings.facts["identity_only"] = [*findings.facts.get("identity_only", []), share]
        if steps == 0:
            findings.warn("--generator_epochs is 0, so no trigger is searched; give at least 1")
        elif share >= MOST_IDENTITY:
            findings.warn(
                f"inversion {number} hardly searched a trigger: {identity_only} of {steps} steps "
                "only taught the generator the identity, because it changed images by more than "
                "--image_bound, or benign features by more than --feature_bound; give more "
                "--identity_epochs, a smaller --batch_size or a smaller --generator_lr"
            )
        return share < MOST_IDENTITY

    @torch.no_grad()
    def _detect(self, model: nn.Module, is_searched: bool) -> None:
        """Keeps the label that most of the generated images get, after noise was added.

        Args:
            is_searched: whether it is a finding; else it is that of blurred images.
        """
        rng = generator(self._config.random_seed, "noise of the detection")
        predictions = []
        with evaluating(model):
            for images in self._images.split(self._config.batch_size):
                x = self._floats(images)
                noise = torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
                predictions.append(model(self._generator(x + NOISE * noise)).argmax(1))
        counts = torch.cat(predictions).bincount()
        self._target = int(counts.argmax())
        if not is_searched:
            return
        share = int(counts[self._target]) / len(self._images)
        self._loop.findings.say(
            f"{100 * share:.2f} % of the generated images are taken for class {self._target}",
            targets=[self._target],
            target_share=share,
        )

    @torch.no_grad()
    def _draw(self) -> None:
        images = self._floats(self._images[:SHOWN])
        rows = {"clean": images, "generated": self._generator(images).clamp(0, 1)}
        self._loop.findings.pictures["generated"] = Picture(
            "what the generator makes of clean images",
            {name: row.float().cpu() for name, row in rows.items()},
            is_compared=True,
        )
