"""What a method finds beside the model: kept, said once, judged, and written at the end."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from utils.metrics import Rate, Scores
from utils.records.folders import RunFolder
from utils.tensors import load_tensors
from utils.training import ending
from utils.training.findings import Findings, Picture, Verdict


def full() -> Findings:
    findings = Findings()
    findings.say("a line", level=0.25, pruned_channels=3, name="a", nothing=None)
    findings.warn("a warning")
    torch.manual_seed(0)
    findings.pictures["triggers"] = Picture(
        "two triggers",
        {
            "mask": torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1),
            "stamped": torch.rand(2, 3, 4, 4).requires_grad_(),
        },
        captions={"mask": ["class 0", "class 1"]},
        is_labelled=False,
        is_compared=True,
    )
    findings.tables["norms"] = [{"class": 0, "norm": 1.5}, {"class": 1, "norm": 2.5}]
    findings.tables["pruned"] = []
    findings.verdict = Verdict(True, (2, 0), (0.5, 0.0, 7.25))
    return findings


@pytest.mark.parametrize("found", [full, Findings])
def test_findings_come_back_from_a_file(found: Callable[[], Findings], tmp_path: Path) -> None:
    """As a checkpoint keeps them: by `torch.save`, read as plain data and tensors."""
    findings = found()
    torch.save(findings.state_dict(), tmp_path / "state.pt")
    back = Findings()
    back.facts["earlier"] = 1  # what stood there goes
    back.load_state_dict(load_tensors(tmp_path / "state.pt"))
    assert back.facts == findings.facts
    assert back.warnings == findings.warnings
    assert back.tables == findings.tables
    assert back.verdict == findings.verdict
    assert back.pictures.keys() == findings.pictures.keys()
    for name, picture in findings.pictures.items():
        other = back.pictures[name]
        assert isinstance(other, Picture)
        assert other.rows.keys() == picture.rows.keys()
        assert all(torch.equal(other.rows[row], picture.rows[row]) for row in picture.rows)
        assert not any(images.requires_grad for images in other.rows.values())
        for field in ("title", "captions", "is_labelled", "is_compared"):
            assert getattr(other, field) == getattr(picture, field)


def test_a_state_is_a_copy() -> None:
    """What is found later does not get into a state that was taken before."""
    findings = full()
    state = findings.state_dict()
    findings.say("more", late=1)
    findings.warn("another")
    findings.tables["norms"].append({"class": 2, "norm": 3.0})
    findings.tables["norms"][0]["norm"] = 9.0
    findings.pictures["late"] = findings.pictures["triggers"]
    assert "late" not in state["facts"]
    assert state["warnings"] == ["a warning"]
    assert state["tables"]["norms"] == [{"class": 0, "norm": 1.5}, {"class": 1, "norm": 2.5}]
    assert list(state["pictures"]) == ["triggers"]


def test_what_makes_a_picture_is_not_kept_and_not_lost() -> None:
    """It is not called for a state, which has none of it; a run that goes on states it again."""

    def never() -> Picture:
        raise AssertionError("nobody draws it")

    findings = full()
    findings.pictures["perturbations"] = never
    state = findings.state_dict()
    assert list(state["pictures"]) == ["triggers"]
    back = Findings()
    back.pictures["perturbations"] = never
    back.load_state_dict(state)
    assert sorted(back.pictures) == ["perturbations", "triggers"]
    assert back.pictures["perturbations"] is never


def test_a_warning_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    findings = Findings()
    with caplog.at_level(logging.INFO, "sau"):
        for text in ("one", "two", "one"):
            findings.warn(text)
    assert findings.warnings == ["one", "two"]
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "warning: one"),
        ("WARNING", "warning: two"),
    ]


def test_a_line_is_logged_and_its_facts_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    findings = Findings()
    with caplog.at_level(logging.INFO, "sau"):
        findings.say("level 0.2", level=0.2)
        findings.say("level 0.3", level=0.3, channels=4)
    assert findings.facts == {"level": 0.3, "channels": 4}
    assert findings.warnings == []
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "level 0.2"),
        ("INFO", "level 0.3"),
    ]


def record_of(
    attack: str, target: int | None, label_map: str | None, has_trigger: bool = True
) -> Any:
    """What `judged` reads of a record."""
    return SimpleNamespace(
        attack=attack,
        triggered=object() if has_trigger else None,
        attack_target=target,
        attack_label_trans=label_map,
    )


ALL2ONE = record_of("badnet", 2, "all2one")
ALL2ALL = record_of("badnet", None, "all2all")
CLEAN = record_of("prototype", None, None, has_trigger=False)
UNKNOWN = record_of("external", None, None, has_trigger=False)
TOLD = record_of("external", 2, "all2one", has_trigger=False)  # told its target, not its trigger
HALF_TOLD = record_of("external", None, "all2one", has_trigger=False)
WORKS = Scores(Rate(9, 10), asr=Rate(5, 10))


@pytest.mark.parametrize(
    ("record", "targets", "is_right", "target_found"),
    [
        (ALL2ONE, (2,), True, True),
        (ALL2ONE, (0, 2), True, True),
        (ALL2ONE, (0,), True, False),
        (ALL2ONE, None, False, False),
        (ALL2ALL, (1,), True, None),
        (ALL2ALL, None, False, None),
        (CLEAN, None, True, None),
        (CLEAN, (2,), False, None),
        (UNKNOWN, (2,), None, None),
        (UNKNOWN, None, None, None),
        (TOLD, (2,), True, True),
        (TOLD, None, False, False),
        (HALF_TOLD, (2,), None, None),
    ],
)
def test_a_verdict_is_judged_by_what_the_record_tells(
    record: Any, targets: tuple[int, ...] | None, is_right: bool | None, target_found: bool | None
) -> None:
    """A clean model is right to be called clean; without a known truth nothing is judged."""
    verdict = Verdict(targets is not None, targets or (), (0.0, 1.0, 2.0))
    assert ending.judged(verdict, record, WORKS) == {
        "is_backdoored": targets is not None,
        "targets": targets or (),
        "suspicion": (0.0, 1.0, 2.0),
        "is_right": is_right,
        "target_found": target_found,
    }


@pytest.mark.parametrize("targets", [None, (2,), (0,)])
@pytest.mark.parametrize("record", [ALL2ONE, ALL2ALL])
def test_of_an_attack_that_had_failed_no_verdict_is_right_or_wrong(
    record: Any, targets: tuple[int, ...] | None
) -> None:
    """It is hardly there, whatever the record says of its target."""
    verdict = Verdict(targets is not None, targets or (), (0.0, 1.0, 2.0))
    judged = ending.judged(verdict, record, Scores(Rate(9, 10), asr=Rate(4, 10)))
    assert (judged["is_right"], judged["target_found"]) == (None, None)
    assert judged["is_backdoored"] == verdict.is_backdoored


def finished(folder: Path, findings: Findings, **more: Any) -> Mapping[str, Any]:
    """The summary of a run that has left one file, a.txt."""
    run_folder = RunFolder(folder)
    folder.mkdir()
    run_folder.write_text("a.txt", "abc")
    ending.finish_run(
        run_folder,
        findings,
        facts={"defense": "anp"},
        pictures=[folder / "triggers.png"],
        files=["a.txt", "absent.txt"],
        run={"seconds": 1.5},
        **{"warnings": [], "result": "ACC 1\nASR 2", **more},
    )
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_the_end_of_a_run_writes_the_tables_that_have_rows(tmp_path: Path) -> None:
    finished(tmp_path / "run", full())
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["a.txt", "norms.csv", "summary.json"]  # `pruned` has no rows
    table = pd.read_csv(tmp_path / "run" / "norms.csv")
    assert table.to_dict("records") == [{"class": 0, "norm": 1.5}, {"class": 1, "norm": 2.5}]


def test_the_summary_holds_facts_findings_warnings_and_hashes(tmp_path: Path) -> None:
    """sha256 of "abc" is the standard's own example; files that do not exist have none.

    A warning that was given twice stands once, those of the method first.
    """
    warnings = ["of the data", "a warning", "of the data"]
    assert finished(tmp_path / "run", full(), warnings=warnings) == {
        "defense": "anp",
        "findings": {"level": 0.25, "pruned_channels": 3, "name": "a", "nothing": None},
        "warnings": ["a warning", "of the data"],
        "seconds": 1.5,
        "files": {"a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    }


def test_a_run_that_found_nothing_has_no_findings(tmp_path: Path) -> None:
    summary = finished(tmp_path / "run", Findings())
    assert list(summary) == ["defense", "warnings", "seconds", "files"]
    assert summary["warnings"] == []


def test_the_end_logs_what_nobody_has_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The findings' own warnings were logged when they were given."""
    findings = full()
    caplog.clear()
    with caplog.at_level(logging.INFO, "sau"):
        finished(tmp_path / "run", findings, warnings=["of the data"])
    assert [record.message for record in caplog.records] == [
        "warning: of the data",
        "ACC 1",
        "ASR 2",
        f"record: {tmp_path / 'run'}",
        f"picture: {tmp_path / 'run' / 'triggers.png'}",
    ]


def test_a_run_without_a_result_logs_no_empty_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sau"):
        finished(tmp_path / "run", Findings(), result="")
    assert [record.message for record in caplog.records] == [
        f"record: {tmp_path / 'run'}",
        f"picture: {tmp_path / 'run' / 'triggers.png'}",
    ]


def test_a_verdict_is_plain_data(tmp_path: Path) -> None:
    verdict = ending.judged(Verdict(True, (2,), (0.0, 1.0)), ALL2ONE, WORKS)
    assert json.loads(json.dumps(verdict))["targets"] == [2]
    assert asdict(Verdict(False)) == {"is_backdoored": False, "targets": (), "suspicion": ()}
