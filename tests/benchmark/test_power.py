"""How well signals tell attacks from clean models, by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.power import auroc
from tests.scripts import run_script
from utils.files import ROOT, file_sha256

POWER = ROOT / "benchmark/power.py"


def test_the_area_is_the_share_of_ordered_pairs() -> None:
    """Of six pairs, 3 > 1, 3 > 2 and 2 > 1 are ordered; 2 = 2 and 1 = 1 are ties; 1 < 2."""
    assert auroc([3, 2, 1], [1, 2]) == pytest.approx((3 + 2 * 0.5) / 6)
    assert auroc([], [1]) is None


def inspection(
    root: Path, name: str, attack: str, value: float, top: int | None, **more: Any
) -> None:
    folder = root / name / "analysis/inspect"
    folder.mkdir(parents=True)
    signals = {"before": {"A": {"statistic": value, "top": top}}}
    facts = {"analysis": "inspect", "attack": attack, "dataset": "digits", "model": "tiny"}
    facts |= {"findings": {"signals": signals}, "attack_target": 0, "attack_label_trans": None}
    (folder / "summary.json").write_text(json.dumps(facts | more))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BadNets' two values are over one and over both of the clean ones: 3 of 4 pairs."""
    one = {"attack_label_trans": "all2one"}
    inspection(tmp_path, "a", "badnet", 0.9, 0, **one)
    inspection(tmp_path, "b", "badnet", 0.5, 3, **one)
    inspection(tmp_path, "c", "badnet", 0.1, 3, attack_label_trans="all2all")
    inspection(tmp_path, "d", "prototype", 0.4, 0, attack_target=None)
    inspection(tmp_path, "e", "prototype", 0.6, 0, attack_target=None)
    (tmp_path / "f/analysis/inspect").mkdir(parents=True)
    (tmp_path / "f/analysis/inspect/summary.json").write_text("[]")
    out = tmp_path / "power.csv"
    assert run_script(POWER, "--under", tmp_path, "--csv", out) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "| dataset | network | attack | attacked, clean | A AUROC, top |",
        "|---|---|---|---|---|",
        "| digits | tiny | badnet | 2, 2 | 0.75, 1/2 |",
        "| digits | tiny | badnet_all2all | 1, 2 | 0.00, - |",
        "| digits | tiny | all of these | 3, 2 | 0.50, 1/2 |",  # 3 of 6 pairs
    ]
    assert "f/analysis/inspect/summary.json: is no summary" in said.err
    assert out.read_text().splitlines()[1] == "digits,tiny,badnet,A,0.75,1,2,2,2"


def test_without_inspections_there_is_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(POWER, "--under", tmp_path) == 2
    assert "holds no inspection" in capsys.readouterr().err
    assert run_script(POWER, "--under", tmp_path / "no") == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_model_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inspected twice, copied to another folder, or under two folders that are given."""
    inspection(tmp_path, "x/a", "badnet", 0.9, 0, attack_sha256="1")
    inspection(tmp_path, "x/copy", "badnet", 0.9, 0, attack_sha256="1")
    inspection(tmp_path, "x/b", "badnet", 0.8, 0, attack_sha256="2")
    inspection(tmp_path, "x/old", "prototype", 0.1, 0)
    assert run_script(POWER, "--under", tmp_path, tmp_path / "x") == 0
    assert "| digits | tiny | badnet | 2, 1 |" in capsys.readouterr().out


def test_an_import_of_a_model_that_is_there_is_no_other_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file has other facts, and the same weights; files that have changed say nothing."""
    weights = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    contents = [
        {"attack": "external", "model": dict(sorted(weights.items()))},
        {"attack": "badnet", "model": weights},
        {"attack": "badnet", "model": weights | {"b": torch.zeros(3)}},
    ]
    for name, content in zip("abc", contents, strict=True):
        file = tmp_path / name / "attack_result.pt"
        file.parent.mkdir()
        torch.save(content, file)
        facts = {"attack_sha256": file_sha256(file), "attack_label_trans": "all2one"}
        inspection(tmp_path, name, str(content["attack"]), 0.9, 0, **facts)
    assert run_script(POWER, "--under", tmp_path) == 0
    assert "| digits | tiny | badnet | 2, 0 |" in capsys.readouterr().out
    (tmp_path / "a/attack_result.pt").write_bytes(b"another")
    assert run_script(POWER, "--under", tmp_path) == 0
    assert "| digits | tiny | external | 1, 0 |" in capsys.readouterr().out


def test_what_was_inspected_with_other_settings_or_is_not_known_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one model, a folder whose name comes first has another value."""
    inspection(tmp_path, "a", "badnet", 0.9, 0, attack_sha256="1")
    inspection(tmp_path, "clean", "prototype", 0.5, 0, attack_sha256="2")
    inspection(tmp_path, "other", "badnet", 0.1, 0, attack_sha256="1")
    (tmp_path / "other/analysis/inspect").rename(tmp_path / "a/analysis/again")
    inspection(tmp_path, "theirs", "external", 0.1, 0, attack_sha256="3", attack_target=None)
    assert run_script(POWER, "--under", tmp_path) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[2:] == ["| digits | tiny | badnet | 1, 1 | 1.00, - |"]
    assert "a/analysis/again/summary.json: skipped, only analysis/inspect counts" in said.err
    assert "theirs/analysis/inspect/summary.json: skipped, nothing says whether" in said.err


def test_a_model_whose_attack_failed_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, asr in (("a", 0.5), ("b", 0.49), ("c", None), ("d", "no number")):
        inspection(tmp_path, name, "badnet", 0.9, 0, attack_label_trans="all2one")
        (tmp_path / name / "summary.json").write_text(json.dumps({"asr": asr}))
    assert run_script(POWER, "--under", tmp_path) == 0
    said = capsys.readouterr()
    assert "| badnet | 3, 0 |" in said.out
    assert said.err.count("b/analysis/inspect/summary.json: skipped, the attack failed") == 1


def test_a_class_that_does_not_stand_out_is_no_hit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in summaries of earlier versions, which named the first of classes that tied at 0."""
    for name, statistic, top in (("a", 0.0, 0), ("b", 0.5, None), ("c", 0.5, 0)):
        inspection(tmp_path, name, "badnet", statistic, top, attack_label_trans="all2one")
    assert run_script(POWER, "--under", tmp_path) == 0
    assert "| badnet | 3, 0 | -, 1/3 |" in capsys.readouterr().out


def test_a_signal_that_only_some_models_have_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Z` comes after A in the alphabet, and `0` before it."""
    for name, attack in (("a", "badnet"), ("b", "badnet"), ("c", "prototype")):
        signals = {"A": {"statistic": 1.0, "top": 0}}
        signals |= {"Z": signals["A"], "0": signals["A"]} if name == "a" else {}
        findings = {"signals": {"before": signals}}
        inspection(tmp_path, name, attack, 0, 0, findings=findings, attack_label_trans="all2one")
    assert run_script(POWER, "--under", tmp_path) == 0
    row = "| badnet | 2, 1 | -, 1/1 (of 1, 0) | 0.50, 2/2 | -, 1/1 (of 1, 0) |"
    assert row in capsys.readouterr().out


def test_datasets_and_networks_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each, the backdoored model has the larger value; over both, in three of four pairs."""
    for content, high in (("abcdef0123", 0.9), ("fedcba9876", 0.4)):
        for attack, value in (("badnet", high), ("prototype", high - 0.2)):
            more = {"inputs": {"dataset": content, "--model": "same"}, "dataset": "folder"}
            inspection(tmp_path, f"{attack}-{content}", attack, value, 0, **more)
    assert run_script(POWER, "--under", tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "badnet" in line]
    assert [line.split(" | ")[0] for line in lines] == ["| folder abcdef01", "| folder fedcba98"]
    assert all("| tiny |" in line and "1.00" in line for line in lines)


def test_a_file_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection(tmp_path, "a", "badnet", 0.9, 0)
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    for path, message in (
        (tmp_path / "no/p.csv", "cannot be written; give a file in an existing folder"),
        (tmp_path, "cannot be written; give a file in an existing folder"),
        (tmp_path / "mine.csv", "mine.csv was not written by this script; give another"),
    ):
        assert run_script(POWER, "--under", tmp_path, "--csv", path) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.out == ""
    for _ in range(2):  # its own table is replaced
        assert run_script(POWER, "--under", tmp_path, "--csv", tmp_path / "p.csv") == 0


def test_foreign_names_and_numbers_do_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection(tmp_path, "a", "badnet", 0.9, 0, dataset="x|y\nz", model="a,b.py:net")
    inspection(tmp_path, "b", "blended", float("nan"), 0)
    out = tmp_path / "power.csv"
    assert run_script(POWER, "--under", tmp_path, "--csv", out) == 0
    said = capsys.readouterr()
    assert r"| x\|y\nz | a,b.py:net | badnet | 1, 0 |" in said.out
    assert len(said.out.splitlines()) == 3
    assert "b/analysis/inspect/summary.json: is no summary" in said.err
    (row,) = csv.DictReader(out.open())
    assert (row["dataset"], row["model"]) == ("x|y\nz", "a,b.py:net")
