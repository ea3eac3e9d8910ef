"""What a method finds on its way beside the model: facts, warnings, pictures, tables, a verdict.

A method states them; a pipeline turns them into `summary.json`, PNG and CSV.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

logger = logging.getLogger("sau")


@dataclass(frozen=True)
class Verdict:
    """Whether a model has a backdoor, by what a method measured on it.

    Attributes:
        is_backdoored: the verdict.
        targets: the classes to which a trigger sends images, the most suspicious first.
        suspicion: a number for each class; larger is more suspicious. Its unit is the method's.
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
        captions: name of a row -> N texts. A row without captions gets the labels that the model
            gives its images before and after, where `is_labelled`.
        is_labelled: whether the rows are images that the model can be asked about.
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
        pictures: by the name of the file, without its ending; or what makes one, which is called
            only where somebody draws it.
        tables: likewise; each is a list of rows, which have the same names.
        verdict: None where the method gives none.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, Picture | Callable[[], Picture]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    verdict: Verdict | None = None

    def warn(self, text: str) -> None:
        """Logs a warning now, and keeps it for the summary; once, however often it is given."""
        if text not in self.warnings:
            logger.warning("warning: %s", text)
            self.warnings.append(text)

    def say(self, text: str, **facts: Any) -> None:
        """Logs a line, and keeps facts for the summary."""
        logger.info("%s", text)
        self.facts |= facts

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, pictures included, so that a resumed run has all that it found.

        What makes a picture is left to the resumed run, which states it again.
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
        """Puts back what `state_dict` gave."""
        self.facts = dict(state["facts"])
        self.warnings = list(state["warnings"])
        self.pictures |= {name: Picture(**picture) for name, picture in state["pictures"].items()}
        self.tables = {name: list(rows) for name, rows in state["tables"].items()}
        self.verdict = None if state["verdict"] is None else Verdict(**state["verdict"])
