"""The lists of methods: what they read, what they print, and that README.md has them."""

from types import ModuleType

import pytest

import analysis.__main__
import attack.__main__
import defense.__main__
from tests.scripts import run_script
from utils.files import ROOT
from utils.process.methods import Method, as_markdown, as_text, describe

PACKAGES = {"attack": attack, "defense": defense, "analysis": analysis}
LISTS = {name: package.__main__ for name, package in PACKAGES.items()}
WITHOUT_PAPER = ("ft", "sau_far", "confusion", "inspect", "weights")
every_list = pytest.mark.parametrize("package", LISTS)


def paper(docstring: str) -> tuple[str, str, int]:
    method = describe("x", f"X: an idea.\n\n{docstring}", "")
    return method.paper, method.link, method.year


def test_a_method_is_described_by_how_its_docstring_begins() -> None:
    docstring = """FT-X: tunes: with care,
    slowly. Sees no images.

    Wu, Wang. *A Title, with
    2 lines.* NeurIPS
    2021, arXiv 2110.14430. More text, of 1999.

    Threat model: none.
    """
    assert describe("ft_x", docstring, "nothing") == Method(
        name="ft_x",
        label="FT-X",
        idea="tunes: with care, slowly",
        paper="Wu & Wang, NeurIPS 2021",
        link="https://arxiv.org/abs/2110.14430",
        year=2021,
        sees="nothing",
    )


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Li. *T.* ICLR 2020.", ("Li, ICLR 2020", "", 2020)),
        ("Li, Wu. *T.* IEEE S&P 2019. More.", ("Li & Wu, IEEE S&P 2019", "", 2019)),
        ("Li, Wu, Ma. *T.* ICLR 2020 (so).", ("Li et al., ICLR 2020", "", 2020)),
        (
            "Li, Wu, Ma. *T.* 2017, arXiv 1708.06733. In 2020 more.",
            ("Li et al., arXiv 2017", "https://arxiv.org/abs/1708.06733", 2017),
        ),
        ("No paper at all, in 2020.", ("", "", 0)),
        ("", ("", "", 0)),
    ],
)
def test_papers_are_cited_in_short(docstring: str, expected: tuple[str, str, int]) -> None:
    assert paper(docstring) == expected


@pytest.mark.parametrize(("docstring", "idea"), [("", ""), ("Inverts an edge.", "Inverts an edge")])
def test_a_docstring_without_a_name_is_listed_by_its_file(docstring: str, idea: str) -> None:
    method = describe("edge", docstring, "")
    assert (method.label, method.idea) == ("edge", idea)


TWO = (
    Method("a_method", "A", "with `--flag`", "Li, ICLR 2020", "https://x", 2020, "nothing"),
    Method("b", "B", "idea", "", "", 0, "images"),
)


def test_text_has_its_columns_below_each_other_and_no_marks() -> None:
    assert as_text(TWO, "sees").splitlines() == [
        "name      paper             sees",
        "          idea",
        "a_method  A, Li, ICLR 2020  nothing",
        "          with --flag",
        "b         B                 images",
        "          idea",
    ]


def test_markdown_has_a_row_for_each_method_and_empty_cells() -> None:
    table = as_markdown(TWO, ("name", "paper"), lambda method: (method.name, method.paper))
    assert table.splitlines() == [
        "| name | paper |",
        "|---|---|",
        "| a_method | Li, ICLR 2020 |",
        "| b | |",
    ]


@every_list
def test_every_method_is_listed_by_year_with_a_paper_and_what_it_sees(package: str) -> None:
    methods = LISTS[package].methods()
    assert sorted(method.name for method in methods) == PACKAGES[package].names()
    assert [method.year for method in methods] == sorted(method.year for method in methods)
    for method in methods:
        assert method.sees
        assert method.idea
        assert bool(method.paper) == (method.name not in WITHOUT_PAPER)


def test_what_a_defense_sees_is_what_its_configuration_says() -> None:
    sees = {method.name: method.sees for method in defense.__main__.methods()}
    assert (sees["clp"], sees["ft"], sees["anp"], sees["ep"]) == (
        "nothing",
        "clean images",
        "clean images, a part held out",
        "a part of the poisoned training set",
    )


def test_what_an_attacker_changes_is_the_threat_model() -> None:
    sees = {method.name: method.sees for method in attack.__main__.methods()}
    assert sees["badnet"] == "data poisoning, dirty label"
    assert sees["sig"] == "data poisoning, clean label"
    assert sees["wanet"] == "control of training, dirty label"
    assert attack.__main__.threat_model(ModuleType("x", "No such sentence.")) == ""


def test_what_an_analysis_needs_is_what_its_configuration_says() -> None:
    needs = {method.name: method.sees for method in analysis.__main__.methods()}
    assert (needs["path"], needs["stealth"], needs["retune"], needs["inspect"]) == (
        "defenses, clean control",
        "triggered images",
        "poisoned images, defenses, clean control",
        "nothing more",
    )


@every_list
def test_the_list_is_printed_in_lines_of_100_columns(
    package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_list(package) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(PACKAGES[package].names())
    assert max(map(len, lines)) <= 100


@every_list
def test_readme_has_the_table(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If not: put what `python -m attack --markdown` (or defense) prints between the marks."""
    assert run_list(package, "--markdown") == 0
    table = capsys.readouterr().out
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = (f"<!-- {mark} python -m {package} -->" for mark in ("begin", "end"))
    assert text.split(begin)[1].split(end)[0].strip("\n") + "\n" == table


@every_list
@pytest.mark.parametrize("flags", [["badnet"], ["--markdwon"], ["--mark"]])
def test_wrong_flags_are_one_line(
    package: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_list(package, *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"error: unrecognized arguments: {flags[0]}; --help lists the flags"
    ]


@every_list
def test_help_says_both_uses(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_list(package, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: python -m {package} [-h] [--markdown]" in text
    assert f"    python -m {package} --markdown" in text


def run_list(package: str, *flags: str) -> int:
    """Exit code of `python -m` with a package, in this process."""
    return run_script(ROOT / package / "__main__.py", *flags)
