"""README_cn.md keeps up with README.md: the same parts, commands, pictures, links and numbers.

Blocks are compared one by one, tables row by row. Whether a sentence means the same is for its
reader to check.
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SWITCH = "[English](README.md) | [中文](README_cn.md)"
HEADINGS = {
    "SAU: Shared Adversarial Unlearning": "SAU：共享对抗遗忘（Shared Adversarial Unlearning）",
    "Try it": "快速上手",
    "The paper's setting": "论文中的实验设置",
    "Datasets and models": "数据集与模型",
    "Your own images": "使用自己的图像",
    "Your own model": "使用自己的模型",
    "Your own model, in Python": "在 Python 中净化自己的模型",
    "BackdoorBench records": "BackdoorBench 的记录",
    "Settings": "配置",
    "Methods": "方法",
    "Records": "记录",
    "Long runs": "长时间运行",
    "Grids and reports": "实验网格与报告",
    "Records in Python": "在 Python 中读取记录",
    "Troubleshooting": "常见问题",
    "Citation": "引用",
}
PLACEHOLDERS = {
    "<true class>": "<真实类别>",
    "<position in the test set>": "<在测试集中的序号>",
}
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


def blocks_of(name: str) -> list[Block]:
    text = (ROOT / name).read_text(encoding="utf-8")
    pieces = re.finditer(r"^```[\s\S]*?^```$|(?:^(?!```).*\S.*(?:\n|\Z))+", text, flags=re.M)
    return [
        Block(text.count("\n", 0, piece.start()) + 1, kind_of(piece[0]), piece[0].rstrip("\n"))
        for piece in pieces
    ]


def pairs() -> list[tuple[Block, Block]]:
    """The blocks of the two files side by side."""
    nothing = Block(0, "nothing", "")
    found = list(zip_longest(blocks_of("README.md"), blocks_of("README_cn.md"), fillvalue=nothing))
    for english, chinese in found:
        assert english.kind == chinese.kind, (
            f"README.md:{english.line} is {english.kind}: {english.text[:60]!r}, "
            f"README_cn.md:{chinese.line} is {chinese.kind}: {chinese.text[:60]!r}"
        )
    return found


def rows(english: Block, chinese: Block) -> list[tuple[str, str, str]]:
    """What can be compared in two prose blocks, and where: a table's and a list's rows."""
    here = f"README.md:{english.line}, README_cn.md:{chinese.line}"
    if english.kind not in ("a table", "a list"):
        return [(here, english.text, chinese.text)]
    starts = r"\n(?=\|)" if english.kind == "a table" else r"\n(?=- |\d+\. )"
    ours, theirs = re.split(starts, english.text), re.split(starts, chinese.text)
    assert len(ours) == len(theirs), f"{here}: {len(ours)} rows and {len(theirs)} rows"
    return [(f"{here}, row {i}", *row) for i, row in enumerate(zip(ours, theirs, strict=True), 1)]


def code(text: str) -> list[str]:
    """What stands between backticks, by which commands, flags, files and messages are named."""
    spans = re.findall(r"`([^`]+)`", " ".join(text.split()))
    for english, chinese in PLACEHOLDERS.items():
        spans = [span.replace(english, chinese) for span in spans]
    return spans


def targets(text: str) -> list[str]:
    """Of pictures and links."""
    return re.findall(r"\]\(([^)]+)\)", text)


def numbers(text: str) -> list[str]:
    """As they are written, but 89 million is 8900 万 and 1,437 is 1437."""
    found = re.findall(rf"(\d+(?:,\d{{3}})*(?:\.\d+)?(?:e-?\d+)?)(?:\s*({'|'.join(UNITS)}))?", text)
    return [
        str(round(float(number.replace(",", "")) * UNITS[unit]))
        if unit
        else number.replace(",", "")
        for number, unit in found
    ]


def cells(text: str) -> list[str]:
    """Which cells of a table's row are empty, and which are not."""
    if not text.startswith("|"):
        return []
    found = text.split("|")[1:-1]
    return [f"cell {i}: {'text' if cell.strip() else 'empty'}" for i, cell in enumerate(found, 1)]


def test_each_file_begins_with_the_way_to_the_other() -> None:
    for name in ("README.md", "README_cn.md"):
        title, switch = blocks_of(name)[:2]
        assert title.kind == "a heading #", name
        assert switch.text == SWITCH, name


def test_headings_are_translated() -> None:
    levels: dict[str, list[tuple[str, str]]] = {}
    for name in ("README.md", "README_cn.md"):
        levels[name] = [
            (level, title)
            for block in blocks_of(name)
            if block.kind.startswith("a heading")
            for level, title in [block.text.split(" ", 1)]
        ]
    unknown = [title for _, title in levels["README.md"] if title not in HEADINGS]
    assert not unknown, f"README.md has headings that HEADINGS here does not translate: {unknown}"
    wanted = [(level, HEADINGS[title]) for level, title in levels["README.md"]]
    for heading, found in zip_longest(wanted, levels["README_cn.md"]):
        assert heading == found, f"README_cn.md should have {heading} where it has {found}"
    assert list(HEADINGS) == [title for _, title in levels["README.md"]]


def test_code_is_the_same_but_for_its_comments() -> None:
    found = [pair for pair in pairs() if pair[0].kind.startswith(("a fenced", "an indented"))]
    assert len(found) >= 20
    for english, chinese in found:
        place = f"README.md:{english.line}, README_cn.md:{chinese.line}"
        comment = r"(^|\s)#.*"
        ours, theirs = (
            [re.sub(comment, r"\1#", line) for line in block.text.splitlines()]
            for block in (english, chinese)
        )
        for our, their in zip_longest(ours, theirs):
            assert our == their, place


@pytest.mark.parametrize("facts", [code, targets, numbers, cells])
def test_prose_and_tables_name_the_same(facts: Callable[[str], list[str]]) -> None:
    compared = 0
    for english, chinese in pairs():
        if english.kind.startswith(("a fenced", "an indented")):
            continue
        for place, ours, theirs in rows(english, chinese):
            here, there = Counter(facts(ours)), Counter(facts(theirs))
            assert here == there, (
                f"{place}: only in README.md {list(here - there)}, "
                f"only in README_cn.md {list(there - here)}"
            )
            compared += here.total()
    assert compared >= 20


def test_every_paragraph_is_in_chinese() -> None:
    for block in blocks_of("README_cn.md"):
        if block.kind.startswith(("a paragraph", "a list", "a heading")):
            for line in block.text.splitlines():
                assert re.search(r"[一-鿿]", line), f"README_cn.md:{block.line}"
