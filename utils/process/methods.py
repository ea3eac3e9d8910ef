"""The list of methods: what `python -m attack` and `python -m defense` print, and the README shows.

A method's file is the only source. Its docstring begins like this (the paper may be missing):

    Name: what it does in a few words.

    Author, Author. *Title of the paper.* Venue 2023, arXiv 2307.10562. ...
"""

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

from utils.config import Parser
from utils.process.script import run_script


class Method(NamedTuple):
    """What a list says of a method.

    Attributes:
        name: of its file, without the ending.
        label: as papers write it.
        idea: what it does, in a few words.
        paper: authors, venue and year; "" if there is none.
        link: address of the paper; "" if the docstring has no number of arXiv.
        year: of the paper; 0 if there is none.
        sees: the images that a defense is given, or what an attacker changes.
    """

    name: str
    label: str
    idea: str
    paper: str
    link: str
    year: int
    sees: str


_PAPER = re.compile(
    r"(?P<authors>[^*]+)\. \*[^*]+\*\s(?P<venue>[^,.]*?)\s?(?P<year>\d{4})"
    r"(?:, arXiv (?P<number>\d+\.\d+))?"
)


def describe(name: str, docstring: str, sees: str) -> Method:
    """What a list says of a method.

    Args:
        name: of its file, without the ending.
        docstring: of its module.
        sees: the images that a defense is given, or what an attacker changes.
    """
    first, _, rest = docstring.partition("\n\n")
    label, colon, idea = " ".join(first.split()).partition(": ")
    sentence = (idea if colon else label).split(". ")[0].rstrip(".")
    facts = _PAPER.match(" ".join(rest.split()))
    return Method(
        name=name,
        label=label if colon else name,
        idea=sentence,
        paper=_cited(facts) if facts else "",
        link=f"https://arxiv.org/abs/{facts['number']}" if facts and facts["number"] else "",
        year=int(facts["year"]) if facts else 0,
        sees=sees,
    )


def _cited(facts: re.Match[str]) -> str:
    """A paper in short: "Wei et al., NeurIPS 2023"."""
    authors = facts["authors"].split(", ")
    short = " & ".join(authors) if len(authors) <= 2 else f"{authors[0]} et al."
    return f"{short}, {facts['venue'] or 'arXiv'} {facts['year']}"


def methods_of(package: ModuleType, sees: Callable[[ModuleType], str]) -> list[Method]:
    """The methods of a package, by year and then by name.

    Args:
        package: `attack` or `defense`.
        sees: from a method's module to the images that it is given, or what an attacker changes.
    """
    modules = (importlib.import_module(f"{package.__name__}.{name}") for name in package.names())
    described = [
        describe(module.__name__.rpartition(".")[2], module.__doc__ or "", sees(module))
        for module in modules
    ]
    return sorted(described, key=lambda method: (method.year, method.name))


def as_text(methods: Iterable[Method], sees: str) -> str:
    """Two lines for each method, below a line that explains them.

    Args:
        sees: the title of what a defense is given, or an attacker changes.
    """
    rows = [("name", "paper", sees, "idea")]
    for method in methods:
        paper = ", ".join(filter(None, (method.label, method.paper)))
        rows.append((method.name, paper, method.sees, method.idea.replace("`", "")))
    names, papers = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = []
    for name, paper, given, idea in rows:
        lines += [f"{name:{names}}  {paper:{papers}}  {given}".rstrip(), f"{'':{names}}  {idea}"]
    return "\n".join(lines)


def as_markdown(
    methods: Iterable[Method], titles: Sequence[str], row: Callable[[Method], Sequence[str]]
) -> str:
    """A table as README.md has it.

    Args:
        titles: of the columns.
        row: the cells of a method.
    """
    lines = [
        "".join(f" {cell} |" if cell else " |" for cell in cells)
        for cells in (titles, *map(row, methods))
    ]
    return "\n".join(f"|{line}" for line in (lines[0], "---|" * len(titles), *lines[1:]))


def cited(method: Method) -> str:
    """The paper of a method as a link, where its address is known."""
    return f"[{method.paper}]({method.link})" if method.link else method.paper


def run_list(
    package: str, description: str, text: Callable[[], str], markdown: Callable[[], str]
) -> None:
    """Runs `python -m attack` or `python -m defense`: prints one of the two texts.

    Args:
        package: "attack" or "defense".
        description: what `--help` says.
        text: makes the list for a terminal.
        markdown: makes the table for README.md.
    """

    def main() -> None:
        parser = Parser(description, prog=f"python -m {package}")
        parser.add_argument("--markdown", action="store_true", help="the table of README.md")
        print((markdown if parser.parse_args().markdown else text)())

    run_script(main)
