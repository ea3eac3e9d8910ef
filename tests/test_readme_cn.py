"""README_cn.md keeps up with README.md.

Code must be equal, which needs no Chinese. Where the prose no longer says the same as far as a
program can tell (parts, pictures, links, names and numbers), the tests pass and remind: as a
warning of pytest, and with `python tests/test_readme_cn.py` as lines that GitHub shows.
"""

import re
import warnings
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SWITCH = "[English](README.md) | [中文](README_cn.md)"
UNITS = {"million": 10**6, "万": 10**4}


class Block(NamedTuple):
    """A fenced block, or what stands between two blank lines."""

    line: int  # its first line in the file, from 1
    kind: str
    text: str


def kind_of(text: str) -> str:
    starts = {
        r"```(\w*)": "a fenced block",
        r"(#+) ": "a heading",
        r"\|": "a table",
        r"!\[": "a picture",
        r"- |\d+\. ": "a list",
        r"    ": "an indented block",
    }
    for start, kind in starts.items():
        if match := re.match(start, text):
            return " ".join([kind, *match.groups()])
    return "a paragraph"


def blocks_of(text: str) -> list[Block]:
    pieces = re.finditer(r"^```[\s\S]*?^```$|(?:^(?!```).*\S.*(?:\n|\Z))+", text, flags=re.M)
    return [
        Block(text.count("\n", 0, piece.start()) + 1, kind_of(piece[0]), piece[0].rstrip("\n"))
        for piece in pieces
    ]


def is_code(block: Block) -> bool:
    return block.kind.startswith(("a fenced", "an indented"))


def code_of(text: str) -> list[str]:
    """The code blocks of a page, comments aside."""
    comment = re.compile(r"(^|\s)#.*", flags=re.M)
    return [comment.sub(r"\1#", block.text) for block in blocks_of(text) if is_code(block)]


def without_evidence(text: str) -> str:
    """A page without the tables that `make results` puts in; all lines keep their numbers."""
    made = r"<!-- begin (results/\S+) -->[\s\S]*?<!-- end \1 -->"
    return re.sub(made, lambda part: "\n" * part[0].count("\n"), text)


def rows_of(block: Block) -> list[str]:
    """The rows of a table or list; any other block is one row."""
    starts = {"a table": r"\n(?=\|)", "a list": r"\n(?=- |\d+\. )"}
    return re.split(starts[block.kind], block.text) if block.kind in starts else [block.text]


def facts_of(text: str) -> Counter[str]:
    """What needs no translation: names between backticks, targets of links, numbers, empty cells.

    Numbers are as they are written, but 89 million is 8900 万 and 1,437 is 1437.
    """
    names = re.findall(r"`([^`]+)`", " ".join(text.split()))
    targets = re.findall(r"\]\(([^)]+)\)", text)
    units = "|".join(UNITS)
    numbers = [
        str(round(float(number.replace(",", "")) * UNITS[unit]))
        if unit
        else number.replace(",", "")
        for number, unit in re.findall(
            rf"(\d+(?:,\d{{3}})*(?:\.\d+)?(?:e-?\d+)?)(?:\s*({units}))?", text
        )
    ]
    cells = text.split("|")[1:-1] if text.startswith("|") else []
    empty = [f"empty cell {i}" for i, cell in enumerate(cells, 1) if not cell.strip()]
    return Counter([*names, *targets, *numbers, *empty])


def reminders(english: str, chinese: str) -> list[str]:
    """Where the Chinese page no longer follows the English one.

    Args:
        english, chinese: the pages, in Markdown.

    Returns:
        One line each; none where they agree. After the first block of another kind, where the pages
        part, nothing more is compared.
    """
    lines = []
    end = Block(0, "the end", "")
    pages = (blocks_of(without_evidence(page)) for page in (english, chinese))
    for ours, theirs in zip_longest(*pages, fillvalue=end):
        place = f"README.md:{ours.line}, README_cn.md:{theirs.line}"
        if ours.kind != theirs.kind:
            return [*lines, f"{place}: {ours.kind} in English, {theirs.kind} in Chinese"]
        if is_code(ours):
            continue
        if not re.search(r"[一-鿿]", theirs.text) and ours.kind != "a table":
            lines.append(f"{place}: not translated yet")
        rows, their_rows = rows_of(ours), rows_of(theirs)
        if len(rows) != len(their_rows):
            lines.append(f"{place}: {len(rows)} rows in English, {len(their_rows)} in Chinese")
            continue
        for row, their_row in zip(rows, their_rows, strict=True):
            here, there = facts_of(row), facts_of(their_row)
            if here != there:
                lines.append(
                    f"{place}: only in English {list(here - there)}, "
                    f"only in Chinese {list(there - here)}"
                )
    return lines


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_each_file_begins_with_the_way_to_the_other() -> None:
    for name in ("README.md", "README_cn.md"):
        title, switch = blocks_of(read(name))[:2]
        assert title.kind == "a heading #", name
        assert switch.text == SWITCH, name


def test_code_is_the_same_but_for_its_comments() -> None:
    ours, theirs = code_of(read("README.md")), code_of(read("README_cn.md"))
    assert len(ours) >= 12
    for english, chinese in zip_longest(ours, theirs):
        assert english == chinese, "copy the code block of README.md into README_cn.md"


def test_the_chinese_page_follows() -> None:
    """Reminds, and never fails: who changes the English page need not know Chinese."""
    for line in reminders(read("README.md"), read("README_cn.md")):
        warnings.warn(f"to translate: {line}", stacklevel=1)


PAGE = "# A\n\nText with `code`, 3 and [a](b.md).\n\n| a | 1 |\n|---|---|\n| b | 89 million |\n"
TRANSLATION = "# 甲\n\n文字 `code` 3 [甲](b.md)。\n\n| 甲 | 1 |\n|---|---|\n| 乙 | 8900 万 |\n"


def test_pages_that_agree_need_no_reminder() -> None:
    assert reminders(PAGE, TRANSLATION) == []


@pytest.mark.parametrize(
    ("old", "new", "reminder"),
    [
        ("`code`", "`cod`", "README.md:3, README_cn.md:3: only in English ['code'], only in Ch"),
        (" 3 ", " 4 ", "README.md:3, README_cn.md:3: only in English ['3'], only in Chinese ['4']"),
        ("b.md", "c.md", "README.md:3, README_cn.md:3: only in English ['b.md'], only in Chinese"),
        ("8900 万", "890 万", "README.md:5, README_cn.md:5: only in English ['89000000'], only"),
        ("| 乙 |", "| |", "README.md:5, README_cn.md:5: only in English [], only in Chinese ['emp"),
        ("\n| 乙 | 8900 万 |", "", "README.md:5, README_cn.md:5: 3 rows in English, 2 in Chinese"),
        ("# 甲\n\n", "# 甲\n\n## 乙\n\n", "README.md:3, README_cn.md:3: a paragraph in English, a"),
        ("# 甲\n", "# A\n", "README.md:1, README_cn.md:1: not translated yet"),
        (
            "\n\n| 甲 | 1 |\n|---|---|\n| 乙 | 8900 万 |",
            "",
            "README.md:5, README_cn.md:0: a table i",
        ),
    ],
)
def test_each_difference_is_one_reminder(old: str, new: str, reminder: str) -> None:
    assert old in TRANSLATION
    (line,) = reminders(PAGE, TRANSLATION.replace(old, new, 1))
    assert line.startswith(reminder)


def test_tables_of_the_evidence_need_no_translation() -> None:
    table = "<!-- begin results/a/b.md -->\n\nAttacks: 3\n\n<!-- end results/a/b.md -->\n"
    assert reminders(PAGE + table, TRANSLATION + table.replace("3", "4")) == []
    (line,) = reminders(PAGE + table + "\nMore.\n", TRANSLATION + table + "\nMore.\n")
    assert line.endswith(": not translated yet")


def test_the_reminders_of_github_are_annotations(capsys: pytest.CaptureFixture[str]) -> None:
    annotate(PAGE, TRANSLATION.replace(" 3 ", " 4 "))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("::warning file=README_cn.md::to translate: README.md:3, ")


def annotate(english: str, chinese: str) -> None:
    """Prints reminders as GitHub's annotations."""
    for line in reminders(english, chinese):
        print(f"::warning file=README_cn.md::to translate: {line}")


if __name__ == "__main__":
    annotate(read("README.md"), read("README_cn.md"))
