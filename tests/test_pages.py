"""The pages are true.

Paths and links exist, the rooms are those of the code, and figures are those that were measured.
"""

import csv
import importlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from attack import names as attacks
from attack.recipe import AttackConfig
from tests.summary_keys import check_keys
from tests.test_layers import ROWS, modules_under, row_of
from utils.files import ROOT
from utils.metrics import has_collapsed

HIDDEN = {".venv", ".git", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not HIDDEN & set(path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in ("results", ".mutants")
)
ROOMS = "analysis|attack|benchmark|config|defense|docs|interop|models|perf|results|sau|tests|utils"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def paths_of(text: str) -> list[str]:
    """What a page names that looks like a file or folder of ours.

    Args:
        text: the page, in Markdown.

    Returns:
        Paths from the root of the checkout, without repeats. `<name>` in them is `*`. Skipped are
        files that the page itself tells the reader to write, and `defense/<name>/`, which is a
        folder of a record.
    """
    invented = re.findall(r"^`([\w/.]+)`:\n\n```", text, flags=re.M)
    examples = {Path(path).stem for path in invented} | {
        Path(path).parent.name for path in invented
    }
    names = re.findall(rf"(?<![\w./<>-])((?:{ROOMS})/[\w./<>*-]*[\w/>*])", text)
    paths = [re.sub(r"<[^>]*>", "*", name) for name in names]
    return [
        path
        for path in dict.fromkeys(paths)
        if Path(path).stem not in examples and not path.endswith("*/")
    ]


def anchors_of(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    missing = [path for path in paths_of(text_of(page)) if not list(ROOT.glob(path))]
    assert missing == [], f"{page} names what does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors_of(file.resolve().relative_to(ROOT).as_posix()), target


def test_paths_are_seen_in_prose_and_in_commands() -> None:
    text = "`utils/gone.py`, [x](docs/y.md)\n\n    python perf/z.py\n\n"
    text += "config/<attack>/a.yaml, a/utils/b"
    text += "\n\n    defense/<name>/\n\n`attack/mine.py`:\n\n```python\n```\n\nattack/mine.py"
    assert paths_of(text) == ["utils/gone.py", "docs/y.md", "perf/z.py", "config/*/a.yaml"]


def test_every_make_target_that_a_page_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        target
        for page in PAGES
        for target in re.findall(r"(?:`| {4}|^)make (\w+)(?:`| *#|$)", text_of(page), flags=re.M)
    }
    assert {"demo", "test", "lint", "mutants", "results"} <= targets
    missing = [name for name in targets if not re.search(rf"^{name}:", makefile, flags=re.M)]
    assert missing == []


def test_the_table_of_rooms_has_the_rows_of_the_code() -> None:
    """Each module is in a room of the table, with the row that test_layers.py holds it to."""
    table = re.findall(r"^\| (\d) \| `([^`]+)` \|", text_of("CONTRIBUTING.md"), flags=re.M)
    rows = {re.sub(r"<\w+>", "*", room): int(number) for number, room in table}
    assert sorted(set(rows.values())) == list(range(1, len(ROWS) + 1))
    for room, number in rows.items():
        files = ROOT.glob(room) if room.endswith(".py") else (ROOT / room).rglob("*.py")
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
        methods = "*" in room and not room.startswith("utils")
        seen = {row_of(name) for name in names if not name.endswith("__init__")}
        assert number - 1 in seen, room
        assert methods or len(seen) == 1, f"{room} has modules of rows {seen}"
    rooms = [room.removesuffix("*.py") for room in rows]
    for module, path in modules_under(ROOT).items():
        file = path.relative_to(ROOT).as_posix()
        assert any(file.startswith(room) or Path(file).match(room) for room in rooms), module


def test_the_figures_of_the_readme_are_those_of_the_evidence() -> None:
    """ASR of SAU at the paper's size, and who leaves less, by results/paper/table.md."""
    page = " ".join(text_of("README.md").split())
    evidence = text_of("results/paper/table.md")
    header, _, *rows = re.findall(r"^\|(.*)\|$", evidence.split("<details>")[0], flags=re.M)
    columns = [cell.strip() for cell in header.split("|")]
    measured = {
        (cells[0], column): number[0]
        for row in rows
        for cells in [[cell.strip() for cell in row.split("|")]]
        for column, cell in zip(columns, cells, strict=True)
        if (number := re.search(r"\d+\.\d\d", cell))
    }
    attacks = "BadNets|Blended|SIG|SSBA|LF|WaNet|Input-Aware"
    figures = re.findall(rf"(\d+\.\d\d) %\s\(({attacks})\)", page)
    assert len(figures) == 7
    for asr, attack in figures:
        name = attack.lower().replace("badnets", "badnet").replace("-", "")
        assert asr == measured[name, "sau ASR"], attack
    told = {}
    for attack, pattern in (
        ("ssba", r"On SSBA, ([\w, -]+) leave less"),
        ("lf", r"on LF, ([\w,\s-]+) do;"),
        ("blended", r"on\s+Blended, ([\w,\s-]+) do;"),
        ("inputaware", r"on\s+Input-Aware, ([\w,\s-]+) do;"),
    ):
        better = re.search(pattern, page)
        assert better
        said = better[1].lower().replace("i-bau", "ibau").replace("-", "_")
        told[attack] = set(re.split(r",\s|\sand\s", said))
    assert "on SIG and WaNet, where only fine-tuning was run beside it, fine-tuning does." in page
    told |= {"sig": {"ft"}, "wanet": {"ft"}, "badnet": set()}
    for attack, names in told.items():
        scores = {
            column.removesuffix(" ASR"): float(asr)
            for (name, column), asr in measured.items()
            if name == attack and column.endswith(" ASR")
        }
        assert {defense for defense, asr in scores.items() if asr < scores["sau"]} == names


def test_the_table_of_what_comes_back_has_the_figures_of_the_evidence() -> None:
    """ASR after the defense, and after fine-tuning with 0, 2 and 5 poisoned images.

    It is in brackets if the defense has left less than half of the ACC.
    """
    page = text_of("RESULTS.md").split("## Does the backdoor stay away?")[1].split("## ")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    assert len(rows) == 12
    measured, collapsed = {}, set()
    for attack in head[1:]:
        name = attack.lower().replace("badnets", "badnet")
        with (ROOT / f"docs/stress/{name}_path.csv").open(encoding="utf-8") as file:
            accs = {(row["defense"], row["t"]): float(row["acc"]) for row in csv.DictReader(file)}
        for model, t in accs:
            if t == "1.0" and has_collapsed(accs[model, t], accs[model, "0.0"]):
                collapsed.add((model, attack))
        with (ROOT / f"docs/stress/{name}_retune.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                measured[row["model"], attack, row["poisoned_images"]] = 100 * float(row["asr"])
    for model, *cells in rows:
        for attack, cell in zip(head[1:], cells, strict=True):
            numbers = [measured.get((model, attack, count)) for count in ("", "0", "2", "5")]
            texts = ["-" if number is None else f"{number:.0f}" for number in numbers]
            text = " / ".join(texts)
            wanted = f"({text})" if (model, attack) in collapsed else text
            assert cell == wanted, (model, attack)


USUAL, HALF = "preactresnet18", "preactresnet18_half"


A_POINT = 0.01
Range = tuple[float, float]  # the least and the most that is promised


def expected(text: str, kind: str) -> dict[str, Range]:
    """What an attack's docstring promises on the digits, by score.

    "ACC >= 98 %" is at least that. "ACC 90 %" is that, up to a point more or less. The first
    promise of a score counts.

    Args:
        kind: `half of the channels` or `all2all`; "" for the usual network and one target.
    """
    text = " ".join(text.split())
    on_digits = text.partition("Expected on the embedded digits")[2].partition("CIFAR-10")[0]
    promised: dict[str, Range] = {}
    for score, sign, number in re.findall(r"(cross ACC|ACC|ASR) (>= )?([\d.]+) %", on_digits):
        value = float(number) / 100
        within = (value, 1.0) if sign else (value - A_POINT, value + A_POINT)
        promised.setdefault(score.lower().replace(" ", "_"), within)
    if kind and (other := re.search(rf"\({kind} >= ([\d.]+) %\)", on_digits)):
        promised["asr"] = float(other[1]) / 100, 1.0
    return promised


def test_promises_are_read_as_they_are_meant() -> None:
    text = """Expected on the embedded digits, if all goes well: ACC >= 98 %, ASR 90 %
    (all2all >= 70 %), cross ACC >= 95.5 %; later ASR >= 99 %. CIFAR-10: ACC >= 10 %."""
    promised = {"acc": (0.98, 1), "asr": (0.89, 0.91), "cross_acc": (0.955, 1)}
    for kind, asr in (("", promised["asr"]), ("all2all", (0.7, 1))):
        expectation = {**promised, "asr": asr}
        read = expected(text, kind)
        assert read.keys() == expectation.keys()
        for score, within in expectation.items():
            assert read[score] == pytest.approx(within)


def test_the_table_of_keys_has_those_of_the_evidence() -> None:
    """Of every method, also those that no quick test runs; earlier versions wrote fewer."""
    lines = (ROOT / "results/leaderboard/runs.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        check_keys(line["summary"], "defense" if "defense" in line else "attack")


def own_recipe(run: dict[str, Any]) -> bool:
    """Whether the attack's own values are those that it has on the digits; others vary them."""
    kind = importlib.import_module(f"attack.{run['summary']['attack']}").Config
    usual, common = kind.load("digits"), {field.name for field in fields(AttackConfig)}
    own = {field.name for field in fields(kind)} - common
    given = {name: run["config"].get(name, getattr(usual, name)) for name in own}
    return all(_plain(getattr(usual, name)) == value for name, value in given.items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_what_attacks_promise_on_the_digits_holds_in_all_published_runs() -> None:
    """By the attack's own recipe and these networks."""
    lines = [
        line
        for path in sorted(ROOT.glob("results/*/runs.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    runs = [
        run
        for run in map(json.loads, lines)
        if not {"defense", "analysis"} & set(run["summary"])
        and run["summary"].get("asr") is not None
        and (run["summary"]["dataset"], run["config"]["image_size"]) == ("digits", 16)
        and run["summary"]["model"] in (USUAL, HALF)
        and own_recipe(run)
    ]
    broken = []
    for run in runs:
        summary = run["summary"]
        kind = "half of the channels" if summary["model"] == HALF else ""
        kind = "all2all" if summary["attack_label_trans"] == "all2all" else kind
        text = importlib.import_module(f"attack.{summary['attack']}").__doc__ or ""
        for score, (least, most) in expected(text, kind).items():
            if not least - 1e-9 <= summary[score] <= most + 1e-9:
                broken.append((run["record"], score, summary[score], least, most))
    with (ROOT / "docs/far/seeds.csv").open(encoding="utf-8") as file:  # seeds 3 and 4 of these
        for row in csv.DictReader(file):
            name, all2all, _ = row["attack"].partition("_all2all")
            text = importlib.import_module(f"attack.{name}").__doc__ or ""
            promised = expected(text, "all2all" if all2all else "half of the channels")
            for score in ("acc", "asr"):
                (least, most), number = promised[score], float(row[f"{score}_before"]) / 100
                if not least - 1e-4 <= number <= most + 1e-4:  # two decimals of percent
                    broken.append((row["attack"], score, number, least, most))
    assert broken == []
    for model in (USUAL, HALF):
        found = {r["summary"]["attack"] for r in runs if r["summary"]["model"] == model}
        assert found == set(attacks())
