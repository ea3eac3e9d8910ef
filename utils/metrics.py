"""Scores of a classifier as pure functions of plain numbers."""

from dataclasses import asdict, dataclass, fields

FAILED_ASR = 0.5  # under it an attack is said to have failed
COLLAPSED = 0.5  # share of the ACC before, under which a model is said to have collapsed


@dataclass(frozen=True)
class Rate:
    """A share with its counts: `hits` of `total`."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """hits / total in [0, 1]; NaN if nothing was counted."""
        return self.hits / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} %" if self.total else "-"


@dataclass(frozen=True)
class Scores:
    """Clean accuracy, attack success rate, robust accuracy; without a trigger only ACC.

    `cross_acc` is the accuracy on images with another image's trigger, or with a distorted one,
    which must not work; only some attacks have it.
    """

    acc: Rate
    asr: Rate | None = None
    ra: Rate | None = None
    cross_acc: Rate | None = None

    @property
    def attack_failed(self) -> bool:
        """Whether there is a trigger, and it does not work."""
        return self.asr is not None and self.asr.value < FAILED_ASR

    def rates(self) -> dict[str, Rate]:
        """The rates that exist, by name, in the order of the fields."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: rate for name, rate in named.items() if rate is not None}

    def values(self) -> dict[str, float]:
        """The rates that exist as numbers in [0, 1]."""
        return {name: rate.value for name, rate in self.rates().items()}

    def counts(self) -> dict[str, float | int]:
        """acc, acc_hits, acc_total, asr, ... as `summary.json` keeps them."""
        flat: dict[str, float | int] = {}
        for name, rate in self.rates().items():
            flat[name] = rate.value
            flat |= {f"{name}_{key}": count for key, count in asdict(rate).items()}
        return flat

    def __str__(self) -> str:
        return "  ".join(f"{rate_label(name)} {rate}" for name, rate in self.rates().items())


def has_collapsed(acc: float, before: float) -> bool:
    """Whether a model has lost more than half of its ACC, so that a low ASR of it means nothing."""
    return acc < COLLAPSED * before


def rate_label(name: str) -> str:
    """How a rate's name is printed: ACC, ASR, RA, cross ACC."""
    return name.removesuffix("acc").replace("_", " ") + "ACC" if "acc" in name else name.upper()


def defense_effectiveness_rating(before: Scores, after: Scores) -> float | None:
    """DER = [max(0, dASR) - max(0, dACC) + 1] / 2 with d = before - after, in [0, 1].

    Zhu et al., *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization*,
    ICCV 2023. Reducing ASR raises it, losing ACC lowers it, gaining ACC changes nothing.

    Returns:
        None where there is no ASR.
    """
    if before.asr is None or after.asr is None:
        return None
    return rating(before.acc.value - after.acc.value, before.asr.value - after.asr.value)


def rating(acc_drop: float, asr_drop: float) -> float:
    """DER of what ACC and ASR have lost, each in [-1, 1]."""
    return (max(0.0, asr_drop) - max(0.0, acc_drop) + 1) / 2
