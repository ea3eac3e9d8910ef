"""All: every analysis of a record by one command; the dataset is loaded once.

    python analysis/all.py --result_file badnet_demo --clean_record clean_demo

Each analysis runs with its own values of `config/analysis/`; to change one, run it by itself. What
a record cannot have is skipped with a line: a clean model has no trigger, for example. With
`--resume`, analyses that are finished stay as they are. With `--overwrite` each is made anew, and
replaces the earlier one when it is finished; after an interruption, `--resume` keeps those earlier
ones that were not reached, and says which they are.
"""

import dataclasses
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import analysis
from analysis.base import AnalysisConfig, Kind, analyse, check_current, kinds, what_lacks
from analysis.subject import Controlled, open_subject
from utils.errors import NothingToDo, PutBack, UserError, listed
from utils.process.script import logger, run_script
from utils.records import places
from utils.records.named import dataset_of_record
from utils.values import Distinct


@dataclass(frozen=True, kw_only=True)
class Config(Controlled):
    kinds: Annotated[
        tuple[str, ...],
        Field(description="names of analyses; none: all that python -m analysis lists"),
        Distinct,
    ]


def chosen(config: Config) -> list[Kind]:
    """The analyses that the flags name.

    Raises:
        UserError: for a name that is none.
    """
    wrong = [name for name in config.kinds if name not in analysis.names()]
    if wrong:
        raise UserError(
            f"--kinds: {listed(wrong)}: no analysis; give {', '.join(analysis.names())}"
        )
    return [kind for kind in kinds() if kind.name in config.kinds or not config.kinds]


def config_of(kind: Kind, config: Config, dataset: str) -> AnalysisConfig:
    """The configuration of one analysis: its own values, with the flags that all of them share."""
    names = {field.name for field in dataclasses.fields(kind.config)}
    values = {name: value for name, value in vars(config).items() if name in names}
    if "clean_records" in names and config.clean_record is not None:
        values["clean_records"] = (config.clean_record,)
    values.pop("dataset")
    of_kind = kind.config.load(dataset, **values)
    return dataclasses.replace(of_kind, dataset=config.dataset)  # as by its own script


def look_at_all(config: Config) -> None:
    """Runs the analyses; what is wrong with one of them does not keep the others from running.

    Raises:
        UserError: before anything is computed, if an earlier result may not be replaced; at the
            end, with the problems of those that failed.
    """
    wanted = chosen(config)
    subject = open_subject(config)
    assert subject.attack is not None
    waiting: list[tuple[Kind, AnalysisConfig]] = []
    problems: list[str] = []
    for kind in wanted:
        lacking = what_lacks(kind.config, subject)
        if lacking:
            logger.info("%s: skipped, since the record %s", kind.name, lacking)
            continue
        of_kind = config_of(kind, config, subject.data.name)
        try:
            folder = places.analysis_folder(subject.attack.folder, kind.name)
            folder.claim(config.overwrite, config.resume, config=of_kind.dump())
            waiting.append((kind, of_kind))
        except NothingToDo as done:
            try:
                check_current(folder, kind.name, subject, of_kind)
                logger.info("%s: kept, since %s", kind.name, done)
            except UserError as error:
                problems += _in_own_flags(error, kind.name)
        except PutBack as error:
            problems += error.problems
        except UserError as error:
            raise UserError(*_in_own_flags(error, kind.name)) from None
    for number, (kind, of_kind) in enumerate(waiting, start=1):
        begun = places.analysis_folder(subject.attack.folder, kind.name).checkpoint
        started = time.monotonic()
        logger.info("%d of %d: %s", number, len(waiting), kind.name)
        try:
            of_kind = dataclasses.replace(of_kind, resume=config.resume and begun.exists())
            analyse(of_kind, kind.name, kind.look, subject)
        except UserError as error:
            problems += [f"{kind.name}: {text}" for text in _in_own_flags(error, kind.name)]
        logger.info("%s: %.1f s in all", kind.name, time.monotonic() - started)
    if problems:
        raise UserError(*problems)


def _in_own_flags(error: UserError, kind: str) -> list[str]:
    """What is wrong with one analysis, with the flags of this script in the place of its own."""

    def told(text: str) -> str:
        text = text.replace("--clean_records:", "--clean_record:")
        # Several clean models can be given only to the analysis itself.
        text = re.sub(
            r"--clean_records \[([^,\]]*)\]", lambda it: f"--clean_record {it[1] or 'null'}", text
        )
        others = f"give the same (or leave {kind} out of --kinds)"
        return re.sub("give the same(?=$|, or --overwrite)", others, text)

    return [told(text) for text in error.problems]


def main() -> None:
    """Looks at a record in every way."""
    look_at_all(Config.from_command_line(sys.argv[1:], __doc__ or "", dataset_of_record))


if __name__ == "__main__":
    run_script(main)
