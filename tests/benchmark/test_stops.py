"""`benchmark/stops.py`: SAU that stops by itself beside all rounds."""

import json
import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmark import stops
from tests.scripts import run_script
from utils.errors import UserError
from utils.files import ROOT


def write_result(home: Path, asr: list[float], seconds: float, best: int | None = None) -> None:
    """A result whose ASR falls by round, from before the first one."""
    home.mkdir(parents=True)
    summary = {
        "after": {"acc": 0.9, "asr": asr[-1], "ra": 0.8},
        "purify_seconds": seconds,
        "findings": {} if best is None else {"best_round": best},
    }
    (home / "summary.json").write_text(json.dumps(summary))
    lines = [f"{number},{value}" for number, value in enumerate(asr)]
    (home / "metrics.csv").write_text("\n".join(["round,asr", *lines]) + "\n")


@pytest.fixture
def under(tmp_path: Path) -> Path:
    """Record `a` with both results, record `b` with one, and a file."""
    write_result(tmp_path / "a/defense/sau", [1.0, 0.6, 0.2, 0.1], 40.0)
    write_result(tmp_path / "a/defense/sau_auto", [1.0, 0.5, 0.3], 10.0, best=1)
    table = "round,acc,share\n1,0.75,0.25\n2,1.0,0.5\n"
    (tmp_path / "a/defense/sau_auto/held_out.csv").write_text(table)
    write_result(tmp_path / "b/defense/sau", [1.0, 0.5], 40.0)
    (tmp_path / "runs.log").write_text("no record")
    return tmp_path


def test_a_pair_by_hand(under: Path) -> None:
    """It kept round 1 and ended after 2 of 3; 10 of 40 s."""
    (pair,) = stops.read(under)
    assert pair.row == {
        **{"record": "a", "kept": 1, "ended": 2, "rounds": 3, "time": 0.25},
        **{"acc_auto": 0.9, "acc": 0.9, "asr_auto": 0.3, "asr": 0.1, "ra_auto": 0.8, "ra": 0.8},
    }
    assert pair.curves.index.dtype == int  # so that the figure's ticks stand at rounds
    assert pair.curves[stops.SIGNAL].dropna().to_dict() == {1: 0.5, 2: 0.5}
    assert pair.curves[stops.ASR].dropna().to_dict() == {1: 0.5, 2: 0.3}
    assert pair.curves[stops.ASR_ALL].to_dict() == {1: 0.6, 2: 0.2, 3: 0.1}
    row = "| a | 90.00 / 10.00 / 80.00 | 90.00 / 30.00 / 80.00 | 1 | 2 of 3 | 25 % |"
    assert stops.markdown([pair]).splitlines()[2] == row


def test_the_files(under: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "report"
    assert run_script(ROOT / "benchmark/stops.py", "--under", under, "--to", to) == 0
    assert "| a | 90.00" in capsys.readouterr().out
    curves = pd.read_csv(to / "curves.csv")
    assert curves["round"].tolist() == [1, 2, 3]
    assert curves[stops.ASR].isna().tolist() == [False, False, True]
    assert pd.read_csv(to / "stops.csv")["time"].tolist() == [0.25]
    assert (to / "stops.png").exists()


def test_panels_are_named_by_attack_and_seed_if_these_tell_them_apart() -> None:
    def names(*records: str) -> list[str]:
        return stops.titles([stops.Pair(name, {}, {}, pd.DataFrame()) for name in records])

    assert names("digits-net_half-sig-s0", "digits-net_half-sig-s1", "a") == [
        "sig-s0",
        "sig-s1",
        "a",
    ]
    two_networks = ["digits-net-sig-s0", "digits-other-sig-s0"]
    assert names(*two_networks, "digits-net-lf-s0") == [*two_networks, "lf-s0"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sau_auto/held_out.csv", "round\n1\n"),
        ("sau_auto/held_out.csv", None),
        ("sau_auto/summary.json", "[]"),
        ("sau/summary.json", '{"after": {}}'),
        ("sau/summary.json", '{"after": {"acc": 0.9}, "purify_seconds": 40}'),
        (
            "sau/summary.json",
            '{"after": {"acc": "x", "asr": 0, "ra": 1}, "purify_seconds": 40}',
        ),
        ("sau_auto/summary.json", '{"findings": null, "after": {}, "purify_seconds": 1}'),
        ("sau_auto/held_out.csv", "round,acc,share\n1,1e308,0\n2,0.5,0.5\n"),
    ],
)
def test_what_cannot_be_compared_does_not_end_the_table(
    under: Path, caplog: pytest.LogCaptureFixture, file: str, content: str | None
) -> None:
    """A clean model has no ASR; a part too small to be held out leaves no file."""
    shutil.copytree(under / "a", under / "c")
    path = under / "c/defense" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="sau"):
        assert [pair.name for pair in stops.read(under)] == ["a"]
    assert "c: skipped; its results lack what is compared" in caplog.text


def test_results_of_two_models_are_no_pair(under: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, sha256 in (("sau", "1"), ("sau_auto", "2")):
        path = under / f"a/defense/{name}/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attack_sha256": sha256}))
    assert stops.read_pair(under / "a") is None
    assert "a: skipped; its results lack what is compared (they purified two" in caplog.text


def test_what_has_no_pair_is_refused(under: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is no folder"):
        stops.read(under / "none")
    with pytest.raises(UserError, match="has usable results sau_auto and sau; run"):
        stops.read(under / "b")
    (tmp_path / "stops.csv").write_text("mine")
    assert run_script(ROOT / "benchmark/stops.py", "--under", under, "--to", tmp_path) == 2
    assert (tmp_path / "stops.csv").read_text() == "mine"
    flags = ["--under", under, "--to", under / "runs.log"]
    assert run_script(ROOT / "benchmark/stops.py", *flags) == 2
