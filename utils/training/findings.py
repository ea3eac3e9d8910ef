"""What a method finds in addition to the model: facts, warnings, pictures, tables, a verdict.

A method states them; a pipeline turns them into `summary.json`, PNG and CSV.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, PlainValidator, StringConstraints, TypeAdapter, with_config
from typing_extensions import TypedDict

from utils.tensors import text_up_to

logger = logging.getLogger("sau")


@dataclass(frozen=True)
class Verdict:
    """Whether a model has a backdoor, as a method measured it.

    Attributes:
        is_backdoored: the verdict.
        targets: the classes to which a trigger sends images, the most suspicious first.
        suspicion: a number for each class; larger is more suspicious. Its unit is the method's. An
            infinite one is null in `summary.json`.
    """

    is_backdoored: bool
    targets: tuple[int, ...] = ()
    suspicion: tuple[float, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Rows of images for one PNG.

    Attributes:
        title: what the picture shows.
        rows: name -> float (N, C, H, W) in [0, 1]; the rows have the same N.
        captions: name of a row -> N texts. If `is_labelled`, a row without captions gets the labels
            that the models before and after give its images.
        is_labelled: whether the rows are images that a model can label.
        is_compared: whether the amplified difference of the first two rows is drawn below them.
    """

    title: str
    rows: Mapping[str, torch.Tensor]
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_labelled: bool = True
    is_compared: bool = False


@dataclass
class Findings:
    """What was found so far.

    Attributes:
        facts: plain data by name.
        warnings: lines for the user; see `warn`.
        pictures: by the name of the file, without its ending; or a function that makes one, which
            is called only if the picture is drawn.
        tables: by the name of the file; each is a list of rows, which have the same names.
        verdict: None if the method gives none.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, Picture | Callable[[], Picture]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    verdict: Verdict | None = None

    def warn(self, text: str) -> None:
        """Logs a warning now, and keeps it for the summary; a repeated warning only once."""
        if text not in self.warnings:
            logger.warning("warning: %s", text)
            self.warnings.append(text)

    def warn_without_loss(self, **weights: float) -> None:
        """Warns if all weights of a loss are 0, so that it has no gradient.

        Args:
            weights: by the name of the flag.
        """
        if not any(weights.values()):
            flags = " and ".join(f"--{name}" for name in weights)
            verb = "is" if len(weights) == 1 else "are"
            more = "" if len(weights) == 1 else " one of them"
            self.warn(f"{flags} {verb} 0, so no loss is left to learn from; give{more} more than 0")

    def say(self, text: str, **facts: Any) -> None:
        """Logs a line, and keeps facts for the summary."""
        logger.info("%s", text)
        self.facts |= facts

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, also of pictures, so that a resumed run has all earlier findings.

        Functions that make pictures are not included; the resumed run states them again.
        """
        return {
            "facts": dict(self.facts),
            "warnings": list(self.warnings),
            "pictures": {
                name: {
                    "title": picture.title,
                    "rows": {
                        row: images.detach().cpu().contiguous()
                        for row, images in picture.rows.items()
                    },
                    "captions": {row: list(texts) for row, texts in picture.captions.items()},
                    "is_labelled": picture.is_labelled,
                    "is_compared": picture.is_compared,
                }
                for name, picture in self.pictures.items()
                if isinstance(picture, Picture)
            },
            "tables": {name: [dict(row) for row in rows] for name, rows in self.tables.items()},
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: if it is of another kind.
        """
        kept = _KEPT.validate_python(state)
        self.facts = dict(kept["facts"])
        self.warnings = list(kept["warnings"])
        self.pictures |= {
            name: Picture(**_checked_picture(name, picture))
            for name, picture in kept["pictures"].items()
        }
        self.tables = {name: list(rows) for name, rows in kept["tables"].items()}
        self.verdict = None if kept["verdict"] is None else Verdict(**kept["verdict"])


def _plain(value: Any) -> Any:
    """A value that JSON can hold.

    Raises:
        ValueError: if it cannot.
    """
    parts = value.items() if isinstance(value, dict) else ()
    if isinstance(value, (list, tuple)):
        for part in value:
            _plain(part)
    elif isinstance(value, dict) and all(isinstance(key, str) for key, _ in parts):
        for _, part in parts:
            _plain(part)
    elif not isinstance(value, (str, bool, int, float, type(None))):
        raise ValueError(f"a {type(value).__name__} is no plain data")
    return value


# What a checkpoint has of findings. Names become those of files and columns.
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}$")]
_Text = Annotated[str, text_up_to(10_000, least=0)]


def _cell(value: Any) -> Any:
    """A plain value that is no container."""
    if isinstance(value, (list, tuple, dict)):
        raise ValueError("a table has a cell of several values")
    return _plain(value)


class _KeptVerdict(TypedDict):
    is_backdoored: Annotated[bool, Field(strict=True)]
    targets: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    suspicion: tuple[float, ...]


class _Kept(TypedDict):
    facts: dict[_Name, Annotated[Any, PlainValidator(_plain)]]
    warnings: list[_Text]
    pictures: dict[_Name, dict[str, Any]]
    tables: dict[_Name, list[dict[_Text, Annotated[Any, PlainValidator(_cell)]]]]
    verdict: _KeptVerdict | None


@with_config(ConfigDict(extra="forbid"))
class _KeptPicture(TypedDict):
    title: _Text
    rows: dict[_Text, Any]
    captions: dict[_Text, list[_Text]]
    is_labelled: Annotated[bool, Field(strict=True)]
    is_compared: Annotated[bool, Field(strict=True)]


_KEPT = TypeAdapter(_Kept)
_KEPT_PICTURE = TypeAdapter(_KeptPicture)
_MOST_SHOWN = 1 << 28  # values of a picture's rows


def _checked_picture(name: str, kept: Mapping[str, Any]) -> _KeptPicture:
    """A picture whose rows are images of one number and one size.

    Raises:
        ValueError: if it is of another kind.
    """
    picture = _KEPT_PICTURE.validate_python(kept)
    rows = list(picture["rows"].values())
    if not rows or not all(
        isinstance(row, torch.Tensor)
        and row.dtype == torch.float32
        and row.dim() == 4
        and row.shape == rows[0].shape
        and 0 < row.numel() <= _MOST_SHOWN
        and bool(row.isfinite().all())
        for row in rows
    ):
        raise ValueError(f"the rows of the picture {name} are no images of one size")
    if any(len(texts) not in (0, len(rows[0])) for texts in picture["captions"].values()):
        raise ValueError(f"the picture {name} has more or fewer captions than images")
    return picture
