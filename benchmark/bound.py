"""The bound of the paper, measured: four risks of a model before, during and after SAU.

    python benchmark/bound.py --result_file badnet_demo --rounds 0,1,2,4,8,16 --to bound

Wei, Zhang, Zha, Wu (NeurIPS 2023) bound the backdoor risk by the risk of shared adversarial
examples. S is the ball in which SAU looks for perturbations. Of N triggered test images, none of
the target's class, D_s are those with which the trigger fools the backdoored model h_bd. For a
model h,

    R_bd     share of the N images that are in D_s and whose trigger also fools h
    R_share  ... in D_s and have a d in S with h(x + d) = h_bd(x + d), a wrong label
    R_sub    ... in D_s and have a d in S with a wrong label h(x + d)
    R_adv    share of the N images that have a d in S with a wrong label h(x + d)

If the trigger itself stays in S, R_bd <= R_share <= R_sub <= R_adv. If it leaves S, as SIG's does,
the first of these does not hold, and the table says how many triggers are in S.

The last three risks ask for the worst d, which nobody can compute. They are estimated from below:
by SAU's own search from each of its starts, by the same search against h alone, and by the trigger
itself where it is in S. So R_share can only be larger than what is printed. The images are test
images: this is a measurement, and nothing is chosen by it. SAU runs here with the recipe of the
record's dataset, on the clean images that `defense/sau.py` would be given.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defense import sau
from defense.base import seen_images
from models import prepare
from models.modes import evaluating
from utils.config import Parser, check_least
from utils.data.batches import as_float, spread
from utils.data.labelled import Dataset
from utils.errors import UserError, quoted
from utils.perturb import Start
from utils.process.device import pick_device, pick_precision
from utils.process.script import logger, run_script
from utils.process.seeds import generator
from utils.records import places
from utils.records.attack import AttackRecord, load_attack
from utils.training import ending
from utils.training.loop import Loop

STARTS: tuple[Start, ...] = ("max", "zero", "min", "random")
RISKS = {"bd": "R_bd", "share": "R_share", "sub": "R_sub", "adv": "R_adv"}
_ROUNDING = 1e-4  # pixels, of triggers that were rounded to bytes and back


@dataclass(frozen=True)
class Images:
    """Test images with their trigger.

    Attributes:
        clean, triggered: float (N, C, H, W) in [0, 1].
        labels, targets: int64 (N,), the true ones and the attacker's; they differ everywhere.
    """

    clean: torch.Tensor
    triggered: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor

    def rows(self, start: int, end: int) -> "Images":
        """The images from position `start` up to `end`."""
        return Images(*(getattr(self, f.name)[start:end] for f in dataclasses.fields(self)))


def in_ball(delta: torch.Tensor, config: sau.Config) -> torch.Tensor:
    """Which perturbations are in the ball in which SAU looks.

    Shape:
        (N, C, H, W) -> bool (N,).
    """
    order = {"L_inf": torch.inf, "L1": 1, "L2": 2}.get(config.norm_type)
    if order is None:  # Reg is no bound
        return torch.ones(len(delta), dtype=torch.bool, device=delta.device)
    norms = torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)
    return norms <= config.trigger_norm * (1 + _ROUNDING) + _ROUNDING


@torch.no_grad()
def risks(
    model: nn.Module, reference: nn.Module, images: Images, config: sau.Config
) -> dict[str, int]:
    """Counts of images: `total`, `fooled` (D_s), `inside` (triggers in S), and the four risks.

    Args:
        model, reference: h and h_bd.
        images: N of them.
    """
    counts = dict.fromkeys(("total", "fooled", "inside", *RISKS), 0)
    draws = generator(config.random_seed, "risks")
    with evaluating(model, reference):
        for first in range(0, len(images.labels), config.batch_size):
            part = images.rows(first, first + config.batch_size)
            for name, value in _risks_in_batch(model, reference, part, config, draws).items():
                counts[name] += value
    return counts


def _risks_in_batch(
    model: nn.Module,
    reference: nn.Module,
    images: Images,
    config: sau.Config,
    draws: torch.Generator,
) -> dict[str, int]:
    """The counts of `risks` for a single batch.

    Args:
        draws: of the random start of a search.
    """
    is_fooled = reference(images.triggered).argmax(1) == images.targets
    trigger = images.triggered - images.clean
    is_inside = in_ball(trigger, config)
    candidates = [trigger * is_inside.view(-1, 1, 1, 1)]  # no perturbation where it is outside
    for start in STARTS:
        of_start = dataclasses.replace(config, pgd_init=start)
        for other in (reference, model):  # shared examples, and plain ones
            with torch.enable_grad():
                candidates.append(
                    sau.shared_perturbation(
                        model, other, images.clean, images.labels, of_start, generator=draws
                    )
                )
    is_shared, is_wrong = torch.zeros_like(is_fooled), torch.zeros_like(is_fooled)
    for delta in candidates:
        label = model(images.clean + delta).argmax(1)
        wrong = label != images.labels
        is_wrong |= wrong
        is_shared |= wrong & (label == reference(images.clean + delta).argmax(1))
    still = model(images.triggered).argmax(1) == images.targets
    return {
        "total": len(images.labels),
        "fooled": int(is_fooled.sum()),
        "inside": int(is_inside.sum()),
        "bd": int((is_fooled & still).sum()),
        "share": int((is_fooled & is_shared).sum()),
        "sub": int((is_fooled & is_wrong).sum()),
        "adv": int(is_wrong.sum()),
    }


def images_of(attack: AttackRecord, data: Dataset, most: int, device: torch.device) -> Images:
    """Evenly spaced triggered test images of a record.

    Args:
        data: the record's dataset.
        most: how many, at most.

    Raises:
        UserError: if the record has none.
    """
    triggered = attack.triggered
    if triggered is None:
        raise UserError(f"{attack.folder}: has no triggered images; give the record of an attack")
    chosen = spread(len(triggered.index), most)
    test = data.test.at(triggered.index[chosen])
    return Images(
        as_float(test.images, device),
        as_float(triggered.images[chosen], device),
        test.labels.to(device),
        triggered.targets[chosen].to(device),
    )


def measured(
    attack: AttackRecord, config: sau.Config, rounds: Sequence[int], most: int
) -> list[dict[str, Any]]:
    """The risks after some rounds of SAU, a row each; round 0 is the backdoored model.

    Args:
        rounds: ascending.
        most: test images, at most.
    """
    device = pick_device(config.device)
    reference = prepare(
        attack.build(config.model), device, pick_precision(config.precision, device)
    )
    data = attack.load_dataset(config.dataset_path)
    images = images_of(attack, data, most, device)
    given = seen_images(config, attack, data)
    rows: list[dict[str, Any]] = []

    def measure(number: int, model: nn.Module) -> None:
        if number in rounds:
            rows.append({"round": number, **risks(model, reference, images, config)})
            logger.info("round %d: %s", number, said(rows[-1]))

    measure(0, reference)
    loop = Loop(lambda number, total, losses, state: measure(number, state["model"]))
    sau.purify(reference, given.images, given.labels, config, loop)
    return rows


def said(row: dict[str, Any]) -> str:
    """A row as text, in percent of all images."""
    shares = (f"{title} {100 * row[name] / row['total']:.1f} %" for name, title in RISKS.items())
    return "  ".join(shares)


def rounds_of(text: str) -> list[int]:
    """The numbers of `--rounds`, ascending.

    Raises:
        UserError: if one is no number of a round, or has more than six digits.
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*\d{1,6}\s*", part) for part in parts):
        raise UserError(
            f"--rounds: {quoted(text)} is not allowed; give numbers of rounds up to 999999, like "
            "0,1,2,4"
        )
    return sorted({int(part) for part in parts})


def main() -> None:
    """Parses the flags, measures, and writes `<record>.csv` and `<record>.png`."""
    parser = Parser(__doc__)
    parser.add_argument("--result_file", required=True, help="record of an attack")
    parser.add_argument("--record_path", type=Path, help="folder of all records")
    parser.add_argument(
        "--dataset_path", help="where the images are now; the record's path if not given"
    )
    parser.add_argument("--rounds", default="0,1,2,4,8,16", help="rounds after which to measure")
    parser.add_argument("--images", type=int, default=300, help="test images, at most, >= 1")
    parser.add_argument("--random_seed", type=int, default=0, help="seed of SAU, >= 0")
    parser.add_argument("--model", help="your network, file.py:function, if the record has one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    flags = parser.parse_args()
    rounds = rounds_of(flags.rounds)
    check_least(flags, images=1, random_seed=0)
    attack = load_attack(places.find_record(flags.result_file, flags.record_path))
    attack.check_model(flags.model)
    config = sau.Config.load(
        attack.dataset,
        random_seed=flags.random_seed,
        n_rounds=max(rounds),
        dataset_path=flags.dataset_path,
        model=flags.model,
        device=flags.device,
    )
    name = attack.folder.name
    folder = places.made_folder(flags.to)  # before the work
    places.refuse_foreign(flags.to / f"{name}.csv", "round,total,", "--to")
    rows = measured(attack, config, rounds, flags.images)
    folder.write_metrics(rows, f"{name}.csv")

    import pandas as pd

    from utils import charts

    table = pd.DataFrame(rows).set_index("round")
    shares = {title: 100 * table[key] / table["total"] for key, title in RISKS.items()}
    inside = f"{rows[0]['inside']} of {rows[0]['total']} triggers are in S"
    title = f"{attack.attack} on {attack.dataset}, SAU round by round; {inside}"
    figure = charts.curves_of({"risk": pd.DataFrame(shares)}, "round", title, spaced=True)
    ending.save_figure(folder, f"{name}.png", figure)
    logger.info("table and figure: %s", flags.to / name)


if __name__ == "__main__":
    run_script(main)
