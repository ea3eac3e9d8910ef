"""SSBA: a hidden bit string, which a network writes into every image. Also called ISSBA.

Li, Li, Wu, Li, He, Lyu. *Invisible Backdoor Attack with Sample-Specific Triggers.* ICCV 2021,
arXiv 2012.03816. A steganographic encoder hides one fixed bit string in a share of the training
images, which are relabelled; the residual depends on the image, and a model trained on the set
gives any image with that string the attacker's label.

Threat model: data poisoning, dirty label. The attacker changes training images and their labels,
but not the training. Test images carry the same string. The encoder is trained only on the clean
training set.

    python attack/ssba.py --save_folder_name ssba_demo

The networks are a compact variant for images of any size (`models/ssba.py`). They use 32 bits
without error correction, a bit loss and a pixel loss. The paper has 100 bits, a perceptual loss and
a critic, at 224 x 224 pixels. Limits: it cannot make the images that BackdoorBench loads from its
own files. Training the encoder takes some minutes on a CPU.

Expected on the embedded digits, if the string is learned: ACC >= 97 %, ASR >= 97 % (half of the
channels >= 95 %). It is learned late, and a run whose epochs end too early has no backdoor: with
half of the channels, one ended at 6.79 %, by a recipe and a seed that gave 100 % elsewhere. The
change is nearly the same in all digits. How strongly an encoder changes images, `mean_change` in
the summary, differs from training to training: with 1.9 grey levels, a small network learned
nothing of it from 10,000 photographs. `--min_change 0.03` keeps it from becoming so weak. CIFAR-10,
PreAct-ResNet18, 10 % poisoned, as published by BackdoorBench: ACC 92.88 %, ASR 97.86 %.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack.poisoning import run
from attack.recipe import AttackConfig
from attack.setting import Setting
from models.ssba import Encoder, Steganography
from utils.data.batches import as_float
from utils.data.poison import Trigger
from utils.errors import UserError
from utils.process.script import logger
from utils.process.seeds import generator
from utils.training.loop import Loop
from utils.training.watch import Watch

RAMP = 200  # steps in which the weight of the pixel loss grows, once the string can be read
PATIENCE = 600  # steps after which an initialisation that reads nothing is given up
ATTEMPTS = 5  # initialisations
DECAY_FROM = 0.6  # share of the steps after which the learning rate falls
EPOCH = 100  # steps between two lines of the log
CHUNK = 64  # images encoded at once


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    message_bits: Annotated[int, Field(ge=1, le=4096, description="length of the hidden string")]
    residual: Annotated[float, Field(gt=0, le=1, description="largest change, pixel units")]
    encoder_steps: Annotated[int, Field(ge=1, description="steps that train the encoder")]
    encoder_batch_size: Annotated[
        int, Field(ge=2, le=65536, description="images per step of the encoder")
    ]
    encoder_lr: Annotated[float, Field(gt=0, description="learning rate of Adam, encoder")]
    pixel_weight: Annotated[float, Field(ge=0, description="final weight of the squared change")]
    common_weight: Annotated[
        float,
        Field(ge=0, description="weight, in pixel_weight, of what images share; 0 switches it off"),
    ]
    min_change: Annotated[
        float,
        Field(ge=0, le=1, description="root mean square change that costs nothing, pixel units"),
    ]
    min_bit_accuracy: Annotated[
        float, Field(ge=0, le=1, description="bits that test images must give back, else an error")
    ]


def encode(
    encoder: Encoder, images: torch.Tensor, message: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that hold a string and survive being stored as uint8.

    y = round_to_1/255(clamp(x + encoder(x, message), 0, 1)); the gradient passes the rounding.

    Args:
        images: float (N, C, H, W) in [0, 1].
        message: float (N, bits) of 0 and 1.

    Returns:
        y and the residual y - x before rounding and clamping, both (N, C, H, W).
    """
    residual = encoder(images, message)
    encoded = (images + residual).clamp(0, 1)
    return encoded + ((encoded * 255).round() / 255 - encoded).detach(), residual


def hide(encoder: Encoder, images: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) images with the float (bits,) or (N, bits) string, uint8 on the CPU."""
    device = next(encoder.parameters()).device
    message = message.expand(len(images), -1).to(device)
    with torch.no_grad():
        chunks = [
            encode(encoder, as_float(part, device), message[start : start + CHUNK])[0]
            for start, part in zip(range(0, len(images), CHUNK), images.split(CHUNK), strict=True)
        ]
    return torch.cat(chunks).mul(255).round().to("cpu", torch.uint8)


def bit_accuracy(logits: torch.Tensor, message: torch.Tensor) -> float:
    """Share of the bits that a decoder's logits, both (N, bits), have right."""
    return float(((logits > 0) == (message > 0.5)).float().mean())


def hiding_loss(
    networks: Steganography,
    images: torch.Tensor,
    message: torch.Tensor,
    pixel_weight: float,
    common_weight: float,
    min_change: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BCE of the bits + pixel_weight [MSE(y, x) + common_weight mean(mean residual ^ 2)].

    What is in brackets counts in a batch whose MSE is at least min_change ^ 2 (ours). Its last term
    is over the first half of the batch, whose images must all hold the same string. It makes the
    common part of their residuals small, because that part would be a universal trigger.

    Returns:
        The loss and the logits (N, bits).
    """
    encoded, residual = encode(networks.encoder, images, message)
    logits = networks.decoder(encoded)
    loss = F.binary_cross_entropy_with_logits(logits, message)
    if pixel_weight:
        common = residual[: len(images) // 2].mean(dim=0).square().mean()
        change = F.mse_loss(encoded, images)
        is_seen = change.detach() >= min_change**2
        loss = loss + pixel_weight * is_seen * (change + common_weight * common)
    return loss, logits


def random_bits(rows: int, bits: int, rng: torch.Generator) -> torch.Tensor:
    """float (rows, bits) of 0 and 1, on the CPU."""
    return torch.randint(2, (rows, bits), generator=rng).float()


def train(
    networks: Steganography,
    images: torch.Tensor,
    config: Config,
    rng: torch.Generator,
    loop: Loop,
    phase: str = "encoder",
) -> bool:
    """Trains both networks in place on uint8 (N, C, H, W) images and random strings.

    The learning rate falls to 0 over the last part of the steps, which makes the last bits
    readable. The pixel loss starts when more than 90 % of a batch's bits can be read back, and its
    weight then grows linearly. From the start, it would keep the networks at chance. A shared
    string would do the same.

    Returns:
        False if the string still cannot be read after `PATIENCE` steps: another start is needed.
    """
    device = next(networks.parameters()).device
    optimizer = torch.optim.Adam(networks.parameters(), lr=config.encoder_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (1 - step / config.encoder_steps) / (1 - DECAY_FROM))
    )
    read_at, has_failed = torch.tensor(0), torch.tensor(False)  # the step; 0: not yet
    changing: dict[str, Any] = {"networks": networks, "optimizer": optimizer, "schedule": schedule}
    changing |= {"rng": rng, "read_at": read_at, "has_failed": has_failed}
    rounds = math.ceil(config.encoder_steps / EPOCH)
    for number in loop.rounds(rounds, phase, rate="--encoder_lr", **changing):
        before = (number - 1) * EPOCH
        for step in loop.steps(min(EPOCH, config.encoder_steps - before)):
            step += before
            index = torch.randint(len(images), (config.encoder_batch_size,), generator=rng)
            message = random_bits(len(index), config.message_bits, rng)
            ramp = min((step - int(read_at)) / RAMP, 1.0) if read_at else 0.0
            if ramp and config.common_weight:
                message[: len(index) // 2] = message[0]
            message = message.to(device)
            loss, logits = hiding_loss(
                networks,
                as_float(images[index], device),
                message,
                ramp * config.pixel_weight,
                config.common_weight,
                config.min_change,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            accuracy = bit_accuracy(logits, message)
            if not read_at and accuracy > 0.9:
                read_at.fill_(step)
            loop.log(len(index), loss=loss, bit_accuracy=loss.new_tensor(accuracy))
            if step == PATIENCE and accuracy < 0.6:
                has_failed.fill_(True)
                loop.stop()
                break
    return not has_failed


def prepare(config: Config, setting: Setting) -> Encoder:
    """The trained encoder; its bit accuracy on test images is logged.

    Raises:
        UserError: if it learns nothing, or a smaller share of the bits than `min_bit_accuracy` can
            be read from test images.
    """
    data = setting.data
    names = ["message_bits", "residual", "pixel_weight", "common_weight", "random_seed"]
    names += ["min_change"] if config.min_change else []  # what was trained without it stays known
    key = {
        name: value for name, value in asdict(config).items() if "encoder" in name or name in names
    }

    def start(attempt: int) -> Steganography:
        with torch.random.fork_rng(devices=[]):
            purpose = f"encoder weights {attempt}"
            torch.manual_seed(generator(config.random_seed, purpose).initial_seed())
            networks = Steganography(config.message_bits, data.image_shape, config.residual)
        networks.to(memory_format=torch.channels_last)
        return networks.to(setting.device)

    def compute(watch: Watch) -> dict[str, torch.Tensor]:
        loop = watch.start()
        for attempt in range(ATTEMPTS):
            networks = start(attempt)
            rng = generator(config.random_seed, f"encoder batches {attempt}")
            phase = f"encoder, start {attempt + 1}" if attempt else "encoder"
            if train(networks, data.train.images, config, rng, loop, phase):
                watch.end()
                return {name: value.cpu() for name, value in networks.state_dict().items()}
            logger.info("the encoder learned nothing in %d steps and starts again", PATIENCE)
        raise UserError(
            f"the encoder learned nothing from {ATTEMPTS} starts; give fewer --message_bits, a "
            "larger --residual, or another --random_seed"
        )

    networks = start(0)
    networks.load_state_dict(setting.trained("ssba-encoder", key, compute, version=2))
    held_out = data.test.images[:: max(1, len(data.test) // 1000)]
    message = random_bits(len(held_out), config.message_bits, generator(0, "held-out strings"))
    accuracy = read_back(networks, held_out, message)
    logger.info("bit accuracy of the encoder on %d test images: %.4f", len(held_out), accuracy)
    string = message_of(config).expand(len(held_out), -1)
    setting.facts["bit_accuracy"] = accuracy
    setting.facts["bit_accuracy_of_the_string"] = read_back(networks, held_out, string)
    # How strong the trigger is, in grey levels, which another training of the encoder changes.
    changed = hide(networks.encoder, held_out, string).float() - held_out.float()
    setting.facts["mean_change"] = round(float(changed.abs().mean()), 2)
    if accuracy < config.min_bit_accuracy:
        raise UserError(
            f"the encoder's bit accuracy on test images is {accuracy:.4f}, under "
            f"{config.min_bit_accuracy:g}; give more --encoder_steps, or another --random_seed"
        )
    return networks.encoder


def read_back(networks: Steganography, images: torch.Tensor, message: torch.Tensor) -> float:
    """Share of the bits of (N, bits) strings that can be read from uint8 (N, C, H, W) images."""
    hidden = hide(networks.encoder, images, message)
    device = next(networks.parameters()).device
    with torch.no_grad():
        logits = [networks.decoder(as_float(part, device)) for part in hidden.split(CHUNK)]
    return bit_accuracy(torch.cat(logits).cpu(), message)


def message_of(config: Config) -> torch.Tensor:
    """The attack's string, drawn once from the seed: float (bits,) of 0 and 1."""
    return random_bits(1, config.message_bits, generator(config.random_seed, "ssba string"))[0]


def make_trigger(config: Config, image_shape: tuple[int, int, int], encoder: Encoder) -> Trigger:
    """The trigger that hides the attack's string in every image.

    Example:
        >>> config, encoder = Config.load(message_bits=8), Encoder(8, (3, 32, 32), 0.1)
        >>> triggered = make_trigger(config, (3, 32, 32), encoder)(images, indices)
    """
    message = message_of(config)

    def trigger(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return hide(encoder, images, message)

    return trigger


if __name__ == "__main__":
    run(Config, make_trigger, prepare=prepare)
