"""Every analysis through its script: what it writes, what it refuses, and how it goes on."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import analysis
from analysis import base, cleanmodels, inspection
from analysis.subject import Subject, load_clean
from models import Classifier, Resize
from models.tiny import TinyNet
from tests import backdoorbench_writer as writer
from tests.scripts import one_error, run_script
from tests.summary_keys import check_keys
from tests.utils.records.test_backdoorbench import badnet, data, wanet
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.files import ROOT, file_sha256
from utils.metrics import Rate, Scores
from utils.records.attack import load_attack
from utils.records.folders import RunFolder

__all__ = ["data"]  # a fixture
NAMES = ("ft", "npd", "sau")  # of the defenses' results
EVEN = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and standard deviation


def run(records: Path, kind: str, *flags: object, record: str = "bd") -> int:
    """Exit code of an analysis's script."""
    fixed = ["--result_file", record, "--record_path", records]
    return run_script(ROOT / f"analysis/{kind}.py", *fixed, *flags)


def result(records: Path, kind: str, record: str = "bd") -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(
        (records / record / "analysis" / kind / "summary.json").read_text()
    )
    return summary


def signals_of(records: Path, kind: str, record: str = "bd") -> dict[str, Any]:
    signals: dict[str, Any] = result(records, kind, record)["findings"]["signals"]
    return signals


def rows(records: Path, kind: str, table: str, record: str = "bd") -> list[dict[str, str]]:
    path = records / record / "analysis" / kind / f"{table}.csv"
    return list(csv.DictReader(path.read_text().splitlines()))


def summary(records: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((records / "bd/defense" / name / "summary.json").read_text())
    return read


def change(path: Path, **values: Any) -> None:
    """Changes values of a result, and its hash in `summary.json`."""
    torch.save({**torch.load(path, weights_only=True), **values}, path)
    summary = path.with_name("summary.json")
    content = json.loads(summary.read_text())
    content["files"][path.name] = file_sha256(path)
    summary.write_text(json.dumps(content))


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    return one_error(capsys).removeprefix("error: ")


def test_the_ends_of_the_path_have_the_counts_of_the_summaries(records: Path) -> None:
    """npd changes the architecture, so it is skipped with a line. The clean model is a control."""
    flags = ["--save_folder_name", "ends", "--clean_record", "clean"]
    assert run(records, "path", *flags) == 0
    table = rows(records, "ends", "path")
    for name in ("ft", "sau"):
        points = {row["t"]: row for row in table if row["defense"] == name}
        assert len(points) == 16
        for t, when in (("0.0", "before"), ("1.0", "after")):
            stored = summary(records, name)[when]
            counts = {key: value for key, value in stored.items() if key.endswith(("_hits", "l"))}
            assert len(counts) == 6
            assert {key: int(points[t][key]) for key in counts} == counts
    assert {row["defense"] for row in table} == {"ft", "sau", "clean model"}
    clean = json.loads((records / "clean/summary.json").read_text())
    (of_clean,) = [r for r in table if (r["defense"], r["t"]) == ("clean model", "1.0")]
    assert int(of_clean["acc_hits"]) == clean["acc_hits"]
    written = result(records, "ends")
    (warning,) = written["warnings"]
    assert warning.startswith("npd: skipped, since this defense has changed the architecture")
    of_results = {name: summary(records, name)["files"]["defense_result.pt"] for name in NAMES}
    of_clean_model = {"clean model": clean["files"]["attack_result.pt"]}
    record = json.loads((records / "bd/summary.json").read_text())
    of_record = {"before": record["files"]["attack_result.pt"]}
    assert written["models"] == of_results | of_clean_model | of_record


def test_summaries_have_the_keys_that_the_page_says(records: Path) -> None:
    check_keys(json.loads((records / "bd/summary.json").read_text()), "attack")
    check_keys(json.loads((records / "clean/summary.json").read_text()), "attack")
    for name in NAMES:
        check_keys(summary(records, name), "defense")
    look = ("--save_folder_name", "keys", "--overwrite")
    assert run(records, "confusion", *look) == 0
    check_keys(result(records, "keys"), "analysis")


def test_scores_that_a_summary_has_otherwise_are_told(fresh: Path) -> None:
    """At both ends: the model before, and the purified one."""
    path = fresh / "bd/defense/ft/summary.json"
    content = json.loads(path.read_text())
    content["before"]["acc_hits"] += 1
    content["after"]["ra_hits"] += 1
    path.write_text(json.dumps(content))
    assert run(fresh, "path", "--defenses", "ft", "--t_steps", 1) == 0
    lines = [line.partition(";")[0] for line in result(fresh, "path")["warnings"]]
    assert lines[1:] == [
        "ft: acc_hits at t = 0 differ from its summary",
        "ft: ra_hits at t = 1 differ from its summary",
    ]


def test_the_path_with_statistics_that_are_measured(records: Path) -> None:
    flags = ["--bn", "reestimate", "--defenses", "ft", "--t_steps", 2]
    assert run(records, "path", "--save_folder_name", "measured", *flags) == 0
    table = rows(records, "measured", "path")
    assert [row["t"] for row in table] == ["0.0", "0.5", "1.0", "1.5"]
    assert {row["bn"] for row in table} == {"reestimate"}


@pytest.mark.slow
def test_all_of_them_by_one_command(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind writes its picture, its tables and a summary, and no weight of a model changes."""
    before = (records / "bd/attack_result.pt").read_bytes()
    assert run(records, "all", "--clean_record", "clean") == 0
    for kind in analysis.names():
        folder = records / "bd/analysis" / kind
        files = {path.name for path in folder.iterdir()}
        assert {f"{kind}.png", "summary.json", "config.yaml", "log.txt", "run.json"} <= files, kind
        assert any(name.endswith(".csv") for name in files), kind
        written = result(records, kind)
        assert (written["analysis"], written["attack"]) == (kind, "badnet")
        assert written["headline"], kind
        assert written["conclusion"], kind
    assert (records / "bd/attack_result.pt").read_bytes() == before

    retuned = result(records, "retune")["headline"]
    assert set(retuned) == {"ft", "sau", "npd", "clean model", "exact purification"}
    for name in ("ft", "sau", "npd"):
        assert retuned[name]["asr"] == summary(records, name)["after"]["asr"]
    assert set(result(records, "stealth")["models"]) == {"before"}  # it looks at no defense
    reactivated = result(records, "reactivate")
    assert "clean model" in reactivated["headline"]
    assert not any("clean_record" in warning for warning in reactivated["warnings"])
    assert set(result(records, "similarity")["headline"]) == {"ft", "sau", "clean model"}
    confusion = rows(records, "confusion", "confusion")
    counted = sum(int(row["count"]) for row in confusion if row["model"] == "sau")
    assert counted == 100 + 90  # test images, and triggered ones
    assert set(signals_of(records, "inspect")) == {"before", "ft", "sau", "npd"}

    capsys.readouterr()
    assert run(records, "all", "--clean_record", "clean") == 2  # nothing is replaced
    assert "give --overwrite" in refusal(capsys)
    assert run(records, "all", "--clean_record", "clean", "--resume") == 0
    assert capsys.readouterr().err.count("nothing is left to do") == len(analysis.names())


def test_all_of_them_in_bf16(records: Path) -> None:
    """What a GPU computes in, and a processor that can."""
    shorter = {
        "path": ["--t_steps", 2],
        "retune": ["--n_rounds", 1, "--poisoned_images", "0,2"],
    }
    for kind in analysis.names():
        fixed = ["--precision", "bf16", "--save_folder_name", f"{kind}_bf16"]
        fixed += [] if kind == "stealth" else ["--defenses", "ft"]  # it looks at none
        assert run(records, kind, *fixed, *shorter.get(kind, [])) == 0, kind
        assert result(records, f"{kind}_bf16")["precision"] == "bf16"


@pytest.mark.slow
def test_of_a_clean_model_only_the_inspection_is_left(records: Path) -> None:
    assert run(records, "all", record="clean") == 0
    assert [path.name for path in (records / "clean/analysis").glob("*/summary.json")] == [
        "summary.json"
    ]
    assert set(signals_of(records, "inspect", "clean")) == {"before"}


def test_without_a_clean_model_the_conclusion_says_what_it_lacks(records: Path) -> None:
    flags = ["--defenses", "ft", "--outer_steps", 1]
    assert run(records, "reactivate", "--save_folder_name", "alone", *flags) == 0
    (warning,) = result(records, "alone")["warnings"]
    assert warning.startswith("no --clean_record: whether such a perturbation also fools a model")
    assert set(result(records, "alone")["headline"]) == {"ft"}


@pytest.mark.slow
def test_an_inspection_is_compared_with_clean_models(records: Path) -> None:
    """One that is named, and two that are trained, and are there the next time."""
    few = ["--probes", 60, "--noise_steps", 2, "--noise_images", 2, "--defenses", "ft"]
    flags = [*few, "--clean_records", "clean", "--train_clean", 2, "--save_folder_name", "compared"]
    assert run(records, "inspect", *flags) == 0
    signals = rows(records, "compared", "signals")
    kinds = {row["model"]: row["kind"] for row in signals}
    assert list(kinds.values()) == ["record", "purified", "clean", "clean", "clean"]
    trained = [name for name in kinds if re.fullmatch(r"clean-[0-9a-f]{8}-s100[01]", name)]
    assert len(trained) == 2
    (own,) = [row for row in signals if row["model"] == "before" and row["signal"] == "A"]
    others = [float(r["statistic"]) for r in signals if r["kind"] == "clean" and r["signal"] == "A"]
    at_least = sum(value >= float(own["statistic"]) for value in others)
    assert float(own["p"]) == (1 + at_least) / 4
    epochs = (records / trained[0] / "config.yaml").read_text()
    assert "epochs: 12\n" in epochs  # the recipe of the record, not the shipped one

    when = [(records / name / "summary.json").stat().st_mtime_ns for name in trained]
    assert run(records, "inspect", *flags, "--overwrite") == 0
    assert [(records / name / "summary.json").stat().st_mtime_ns for name in trained] == when


def test_an_inspection_needs_no_record(records: Path, tmp_path: Path) -> None:
    """It says of the same weights what it says of the record."""
    state = torch.load(records / "bd/attack_result.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "mine.pt")
    few = ["--probes", 60, "--noise_steps", 2, "--noise_images", 2]
    flags = ["--state_dict", tmp_path / "mine.pt", "--model", "tiny", "--dataset", "random"]
    flags += ["--record_path", records, "--save_folder_name", "mine"]
    assert run_script(ROOT / "analysis/inspect.py", *flags, *few) == 0
    assert run(records, "inspect", *few, "--save_folder_name", "same") == 0
    written = result(records, "inspect", "mine")
    assert written["attack"] is None
    own = signals_of(records, "inspect", "mine")["before"]
    assert own == signals_of(records, "same")["before"]
    assert set(own["A"]) == {"statistic", "top", "entropy", "z"}
    sent = sum(int(row["count"]) for row in rows(records, "same", "matrix") if row["signal"] == "A")
    assert sent == 60 * 4  # each probe, for the record's model and three purified ones


def test_a_foreign_model_gets_no_place_in_a_record(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(records / "bd/attack_result.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "mine.pt")
    flags = ["--state_dict", tmp_path / "mine.pt", "--model", "tiny", "--dataset", "random"]
    flags += ["--record_path", records, "--save_folder_name", "clean"]
    assert run_script(ROOT / "analysis/inspect.py", *flags) == 2
    assert "clean is the record of another model; give a new name" in refusal(capsys)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_name_of_an_inspection_without_a_record_is_taken(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """Its folder is no record, and holds no file of the user's that could be moved away."""
    state = torch.load(records / "bd/attack_result.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "mine.pt")
    few = ["--probes", 20, "--noise_steps", 1, "--noise_images", 1]
    flags = ["--state_dict", tmp_path / "mine.pt", "--model", "tiny", "--dataset", "random"]
    flags += ["--record_path", tmp_path / "record", "--save_folder_name"]
    assert run_script(ROOT / "analysis/inspect.py", *flags, "mine", *few) == 0
    before = result(tmp_path / "record", "inspect", "mine")
    assert run_script(ROOT / "interop/state_dict.py", *flags, "mine", *more) == 2
    expected = "mine holds the inspection of a model that has no record; give another name"
    assert expected in refusal(capsys)
    assert result(tmp_path / "record", "inspect", "mine") == before
    assert run_script(ROOT / "interop/state_dict.py", *flags, "other") == 0


def test_a_foreign_model_has_no_defenses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--state_dict", tmp_path / "0.pt", "--model", "tiny", "--dataset", "random"]
    flags += ["--record_path", tmp_path, "--save_folder_name", "mine", "--defenses", "ft,sau"]
    assert run_script(ROOT / "analysis/inspect.py", *flags) == 2
    assert "--defenses: a model without a record has no results of defenses" in refusal(capsys)


def test_a_foreign_model_that_guesses_is_doubted(records: Path, tmp_path: Path) -> None:
    """As one with another normalization does."""
    state = torch.load(records / "bd/attack_result.pt", weights_only=True)["model"]
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, tmp_path / "0.pt")
    few = ["--probes", 20, "--noise_steps", 1, "--noise_images", 1]
    flags = ["--state_dict", tmp_path / "0.pt", "--model", "tiny", "--dataset", "random"]
    flags += ["--record_path", tmp_path, "--save_folder_name", "mine", "--neural_cleanse", "true"]
    assert run_script(ROOT / "analysis/inspect.py", *flags, *few) == 0
    warnings = result(tmp_path, "inspect", "mine")["warnings"]
    assert any(line.startswith("ACC is only") for line in warnings)
    assert any(line.startswith("the model has no signal E") for line in warnings)


def test_neural_cleanse_is_read_where_it_was_run(records: Path) -> None:
    few = ["--probes", 60, "--noise_steps", 2, "--noise_images", 2, "--defenses", "ft"]
    home = records / "bd/defense/nc"
    home.mkdir()
    norms = "".join(f"{label},{9 - label},0\n" for label in range(10))
    (home / "norms.csv").write_text(f"class,mask_norm,index\n{norms}")
    flags = [*few, "--neural_cleanse", "true", "--save_folder_name", "cleanse", "--overwrite"]
    lacking = "before: no signal E; run defense/nc.py --result_file bd first"
    try:
        for sha256, warnings in (
            (None, [lacking]),  # it is not finished
            ("0" * 64, [lacking]),  # of another attack
            (load_attack(records / "bd").sha256, []),
        ):
            if sha256 is not None:
                (home / "summary.json").write_text(json.dumps({"attack_sha256": sha256}))
            assert run(records, "inspect", *flags, "--clean_records", "clean") == 0
            of_clean = "clean: no signal E; run defense/nc.py --result_file clean first"
            assert result(records, "cleanse")["warnings"] == [of_clean, *warnings]
            signals = signals_of(records, "cleanse")["before"]
            assert ("E" in signals) == (not warnings)
    finally:
        shutil.rmtree(home)
    assert signals["E"]["top"] == 9


def test_an_interrupted_analysis_goes_on_after_its_last_step(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the fifth step begins; the first four are not computed again."""
    flags = ["--save_folder_name", "cut", "--defenses", "ft", "--t_steps", 4]
    assert run(records, "path", *flags) == 0
    whole = rows(records, "cut", "path")
    assert run(records, "path", *flags, "--overwrite") == 0  # with itself: the same bits
    assert rows(records, "cut", "path") == whole

    steps: list[str] = []
    step = base.Results.step

    def dying(self: base.Results, name: str, compute: Any) -> Any:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(name)
        return step(self, name, compute)

    with monkeypatch.context() as patch:
        patch.setattr(base.Results, "step", dying)
        assert run(records, "path", *flags, "--overwrite") == 130
    assert not (records / "bd/analysis/cut/summary.json").exists()

    computed: list[str] = []

    def watched(self: base.Results, name: str, compute: Any) -> Any:
        return step(self, name, lambda: (computed.append(name), compute())[1])

    monkeypatch.setattr(base.Results, "step", watched)
    assert run(records, "path", *flags, "--resume") == 0
    assert len(computed) == 7 - 4
    assert rows(records, "cut", "path") == whole


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("path", ["--defenses", "ft,anp"], r"--defenses: anp: no finished result in .*ft, npd, sa"),
        ("path", ["--defenses", "ft,ft"], r"--defenses: ft,ft is not allowed; .* each once"),
        ("path", ["--dataset", "digits"], r"--dataset: digits, but the record says random; leave"),
        ("path", ["--save_folder_name", "../x"], r"--save_folder_name: ../x is not a name"),
        (
            "retune",
            ["--clean_record", "nobody"],
            r"--clean_record: nobody is no record; train a cl.*py --save_folder_name nobody$",
        ),
        (
            "retune",
            ["--clean_record", "no/defense/ft"],
            r"--clean_record: no/defense/ft is no record; .*prototype.py, and give its name$",
        ),
        ("retune", ["--clean_record", "bd"], r"--clean_record: bd is the record of an attack \(ba"),
        (
            "retune",
            ["--poisoned_images", ""],
            r"--poisoned_images: a value is needed; give numb",
        ),
        ("retune", ["--lr", "1e30"], r"--lr: with 1e\+30 the loss is not finite; give a smaller"),
        ("retune", ["--poisoned_images", "300"], r"--poisoned_images: 300: there are only 20 ima"),
        ("gradcam", ["--layer", "conv7"], r"--layer: conv7 is no layer of this network"),
        ("gradcam", ["--layer", "linear"], r"--layer: linear gives no map of features"),
        ("path", ["--bn", "reestimate", "--ratio", 1e-6], r"--ratio: 1e-06 of \d+ training images"),
        ("inspect", ["--clean_records", "bd"], r"--clean_records: bd is the record of an attac"),
        ("inspect", ["--state_dict", "x.pt"], r"--dataset: a value is needed with --state_dict"),
        ("inspect", ["--image_size", 64], r"--image_size: is for --state_dict; a record has its o"),
        ("inspect", ["--clean_records", "clean,clean"], r"--clean_records: clean,clean is not all"),
        ("all", ["--kinds", "path,path"], r"--kinds: path,path is not allowed; .* each once"),
        ("all", ["--kinds", "path,paths"], r"--kinds: paths: no analysis; give confusion, featu"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    records: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    flags: list[object],
    message: str,
) -> None:
    """Before the work: nothing is written, but where only the work can tell."""
    if not {"--save_folder_name", "--kinds"} & set(flags):
        flags = [*flags, "--save_folder_name", "refused", "--overwrite"]
    assert run(records, kind, *flags) == 2
    assert re.match(message, refusal(capsys))
    folder = records / "bd/analysis/refused"
    assert folder.exists() == ("--lr" in flags)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fresh(records: Path, tmp_path: Path) -> Path:
    """Record `bd` with its results, and without analyses; tests may change it."""
    shutil.copytree(records / "bd", tmp_path / "bd", ignore=shutil.ignore_patterns("analysis"))
    return tmp_path


def test_a_result_that_was_about_to_be_replaced_is_named(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = fresh / "bd/defense"
    (home / "ft").rename(home / ".ft.replaced")
    assert run(fresh, "path", "--defenses", "ft") == 2
    kept = f"--defenses: ft: no finished result in {home} (the run that it replaces is kept in "
    assert f"{kept}{home}/.ft.replaced); give some of npd, sau" in refusal(capsys)


def test_what_an_overwriting_run_has_not_replaced_is_kept(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the first of two: the earlier ones stay until they are made anew."""
    flags = ["--kinds", "path,weights"]
    assert run(fresh, "all", *flags, "--defenses", "ft") == 0

    def dying(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base.Results, "step", dying)
        assert run(fresh, "all", *flags, "--overwrite") == 130
    for kind in ("path", "weights"):
        assert result(fresh, kind)["defenses"] == ["ft"], kind
    assert run(fresh, "all", *flags, "--defenses", "ft", "--resume") == 0
    assert run(fresh, "all", *flags, "--overwrite") == 0
    for kind in ("path", "weights"):
        assert result(fresh, kind)["defenses"] == ["ft", "npd", "sau"], kind
        assert not (fresh / f"bd/analysis/.{kind}.replaced").exists(), kind


def test_all_goes_on_beside_an_earlier_one_that_is_there_again(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process that was to replace the first of three was killed before its checkpoint."""
    assert run(fresh, "confusion") == run(fresh, "similarity") == 0
    home = fresh / "bd/analysis"
    (home / "confusion").rename(home / ".confusion.replaced")
    capsys.readouterr()
    assert run(fresh, "all", "--kinds", "confusion,similarity,weights", "--resume") == 2
    said = capsys.readouterr().err
    assert f"similarity: kept, since {home}/similarity is finished" in said
    assert said.endswith(
        f"error: --resume: {home}/confusion: the run that was to replace it ended before its first "
        "checkpoint, and the earlier one is there again; give --overwrite to replace it\n"
    )
    assert result(fresh, "weights")
    assert result(fresh, "confusion")


def test_an_analysis_of_all_goes_on_by_its_own_script(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = base.Results.step
    steps: list[str] = []

    def dying(self: base.Results, name: str, compute: Any) -> Any:
        if len(steps) % 3 == 2:
            steps.append(name)
            raise KeyboardInterrupt
        steps.append(name)
        return step(self, name, compute)

    with monkeypatch.context() as patch:
        patch.setattr(base.Results, "step", dying)
        assert run(fresh, "all", "--kinds", "path") == 130
        assert run(fresh, "path", "--resume") == 130
    assert run(fresh, "all", "--kinds", "path", "--resume") == 0


def test_a_model_that_re_learning_has_destroyed_is_not_taken_for_a_purified_one(
    fresh: Path,
) -> None:
    flags = ["--defenses", "ft", "--lr", 1e5, "--poisoned_images", "0,5"]
    assert run(fresh, "retune", *flags) == 0
    written = result(fresh, "retune")
    numbers = written["headline"]["ft"]
    assert numbers["acc_retuned"] < 0.2
    assert (numbers["asr_retuned"], numbers["poisoned_images"]) == (None, 5)
    (line,) = [line for line in written["warnings"] if line.startswith("ft: ")]
    assert re.match(r"ft: has collapsed while it was tuned \(ACC 45.00 % -> .*\), so its ASR", line)
    assert line in written["conclusion"]
    assert not any("after 5 poisoned images" in line for line in written["conclusion"])


def test_of_a_defense_that_has_destroyed_the_model_nothing_follows(fresh: Path) -> None:
    """Of one that always says 1: a perturbation does not work on it, and its ASR passes 50 %."""
    for name in ("ft", "twin"):
        shutil.copytree(fresh / "bd/defense/sau", fresh / "bd/defense" / name, dirs_exist_ok=True)
        path = fresh / "bd/defense" / name / "defense_result.pt"
        state = torch.load(path, weights_only=True)["model"]
        (bias,) = [key for key in state if key.endswith("linear.bias")]
        state[bias][1] = 1e4
        change(path, model=state)
    path = fresh / "bd/defense/ft/summary.json"
    content = json.loads(path.read_text())
    content["after"]["acc"] = 0.1  # that of the twin is not told
    path.write_text(json.dumps(content))
    for kind, flags, unsaid in (
        ("path", ["--t_steps", 1], ["t_half"]),
        ("reactivate", ["--outer_steps", 1], ["asr_reactivated", "clean_as_target"]),
        ("confusion", [], []),
    ):
        assert run(fresh, kind, "--defenses", "ft,twin", *flags) == 0
        written = result(fresh, kind)
        (line,) = [line for line in written["warnings"] if "has collapsed" in line]
        assert line == (
            "ft: has collapsed (ACC 45.00 % -> 10.00 %), so its ASR says nothing of a backdoor"
        )
        assert line in written["conclusion"]
        said = [line for line in written["conclusion"] if line.startswith("ft: ")]
        assert len(said) == (1 if unsaid else 2)
        for name in ("ft", "twin"):
            numbers = written["headline"][name]
            assert [numbers[key] is None for key in unsaid] == [name == "ft"] * len(unsaid)


def test_what_re_learning_makes_of_a_destroyed_model_says_nothing(fresh: Path) -> None:
    """Tuning may give it its ACC back."""
    path = fresh / "bd/defense/ft/summary.json"
    content = json.loads(path.read_text())
    content["after"]["acc"] = 0.1
    path.write_text(json.dumps(content))
    assert run(fresh, "retune", "--defenses", "ft", "--poisoned_images", "5") == 0
    written = result(fresh, "retune")
    numbers = written["headline"]["ft"]
    assert numbers["acc_retuned"] > 0.2
    assert numbers["asr_retuned"] is None
    (line,) = [line for line in written["conclusion"] if line.startswith("ft: ")]
    assert line.startswith("ft: has collapsed (ACC 45.00 % -> 10.00 %)")


@pytest.mark.parametrize("share", [0.49, 0.5])
def test_a_look_at_an_attack_that_had_failed_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """All of them say it in the same words."""
    scores = Scores(Rate(90, 100), Rate(round(100 * share), 100), Rate(1, 100))
    monkeypatch.setattr(Subject, "scores", scores)
    for kind in ("confusion", "weights"):
        assert run(fresh, kind, "--defenses", "ft") == 0
        said = [line for line in result(fresh, kind)["warnings"] if "had failed" in line]
        assert said == [
            "the attack had failed (ASR 49.00 %), so this says little of a backdoor and of "
            "defenses against it"
        ] * (share < 0.5)


def test_no_result_is_called_as_the_model_before(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would stand in its place."""
    flags = ["--result_file", "bd", "--record_path", fresh, "--save_folder_name", "before"]
    assert run_script(ROOT / "defense/ft.py", *flags) == 2
    assert "before is what tables call the model before the defense" in refusal(capsys)
    (fresh / "bd/defense/ft").rename(fresh / "bd/defense/before")
    assert run(fresh, "confusion") == 2
    assert "rename the folder, or name other results with --defenses" in refusal(capsys)
    assert run(fresh, "confusion", "--defenses", "sau") == 0


def test_what_a_record_lacks_is_said(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(records, "retune", record="clean") == 2
    assert "has no triggered images" in refusal(capsys)
    assert run(records, "weights", record="clean") == 2
    assert "has no finished result of a defense" in refusal(capsys)


def test_a_record_without_poisoned_training_images_has_the_other_analyses(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of a model that was trained elsewhere, which has triggered test images alone."""
    path = fresh / "bd/poison.pt"
    content = torch.load(path, weights_only=True)
    parts = ("train_index", "train_images", "train_labels", "train_kinds")
    change(path, **{name: content[name][:0] for name in parts})
    assert run(fresh, "all", "--kinds", "confusion,retune,reactivate") == 0
    said = capsys.readouterr().err
    for kind in ("retune", "reactivate"):
        assert f"{kind}: skipped, since the record has no poisoned training images" in said
        assert run(fresh, kind) == 2
        assert "has no poisoned training images, which this analysis needs" in refusal(capsys)
    (folder,) = (fresh / "bd/analysis").glob("[!.]*")
    assert folder.name == "confusion"


@pytest.mark.parametrize(("make", "is_told"), [(badnet, False), (wanet, True)])
def test_poisoned_images_that_a_model_has_not_seen_are_told(
    tmp_path: Path, data: Dataset, make: Any, is_told: bool
) -> None:
    """Of WaNet, which has cross samples, also if cross test images are missing."""
    attack = load_attack(writer.write(tmp_path / "theirs", make(data)))
    model = attack.build()
    subject = Subject(data, torch.device("cpu"), "fp32", model, "tiny", attack=attack)
    results = base.Results()
    assert len(subject.poisoned_images(results).index) > 0
    assert [line.endswith("the model has not seen them") for line in results.warnings] == (
        [True] * is_told
    )


def test_a_result_that_is_damaged_is_refused_before_the_work(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (fresh / "bd/defense/sau/defense_result.pt").open("ab") as file:
        file.write(b"more")
    assert run(fresh, "retune") == 2
    said = refusal(capsys)
    assert "defense_result.pt: is not the file that summary.json describes" in said
    assert said.endswith("or name others with --defenses")
    assert not (fresh / "bd/analysis/retune/config.yaml").exists()
    assert run(fresh, "confusion", "--defenses", "ft") == 0


def made_anew(folder: Path) -> None:
    """As after a whole run."""
    for name in ("defense_result.pt", "summary.json"):
        shutil.copyfile(folder.with_name("sau") / name, folder / name)


def being_made_anew(folder: Path) -> None:
    """As in the middle of a run."""
    folder.rename(folder.with_name(".ft.replaced"))
    folder.mkdir()


@pytest.mark.parametrize("kind", ["confusion", "weights"])
@pytest.mark.parametrize("replaced", [made_anew, being_made_anew])
def test_a_result_that_is_replaced_meanwhile_is_not_taken_for_the_one_before(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    replaced: Callable[[Path], None],
) -> None:
    """The summary would have the sha256 of one model and the numbers of another."""
    monkeypatch.setattr(base, "tell_doubts", lambda *_: replaced(fresh / "bd/defense/ft"))
    assert run(fresh, kind, "--defenses", "ft") == 2
    said = refusal(capsys)
    assert said.endswith("ft/defense_result.pt: was changed since the run began; run it again")
    assert not (fresh / "bd/analysis" / kind / "summary.json").exists()


def test_a_finished_analysis_of_a_result_that_was_made_anew_is_not_taken_for_done(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for script in ("confusion", "all"):
        flags = ["--kinds", "confusion,weights"] if script == "all" else []
        assert run(fresh, script, *flags, "--overwrite") == 0
        assert run(fresh, script, *flags, "--resume") == 0
        again = ["--result_file", "bd", "--record_path", fresh, "--n_rounds", 1, "--overwrite"]
        assert run_script(ROOT / "defense/ft.py", *again, "--lr", f"0.00{len(script)}") == 0
        assert run(fresh, script, *flags, "--resume") == 2
        said = capsys.readouterr().err
        assert "was made with another ft than is there now; give --overwrite" in said


def test_all_does_not_take_an_analysis_with_other_flags_for_its_own(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fresh, "all", "--kinds", "confusion,weights") == 0
    flags = ["--kinds", "confusion,weights", "--resume", "--random_seed", 5]
    assert run(fresh, "all", *flags) == 2
    assert "was run with --random_seed 0; give the same" in refusal(capsys)
    assert run(fresh, "all", *flags[:-2]) == 0


def test_all_says_in_its_own_flags_how_an_analysis_was_run(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says to give again is taken; the inspection alone takes several clean models."""
    for name in ("bd", "clean"):
        ignored = shutil.ignore_patterns("analysis", "sau", "npd")
        shutil.copytree(records / name, tmp_path / name, ignore=ignored)
    flags = ["--kinds", "inspect,path", "--resume"]
    assert run(tmp_path, "all", *flags) == 0
    assert run(tmp_path, "all", *flags, "--clean_record", "clean") == 2
    said = refusal(capsys)
    assert "inspect is finished, and was run with --clean_record null; give the same (or le" in said
    assert said.endswith("leave inspect out of --kinds), or --overwrite to replace it")
    assert run(tmp_path, "all", *flags, "--clean_record", "null") == 0
    assert run(tmp_path, "all", *flags[:2], "--clean_record", "clean", "--overwrite") == 0
    assert run(tmp_path, "all", *flags) == 2
    assert "and was run with --clean_record clean; give the same (or leave " in refusal(capsys)


def test_a_result_that_is_not_finished_is_left_out_with_a_word(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "bd/defense/sau/summary.json").unlink()
    assert run(fresh, "weights") == 0
    assert "warning: left out, because not finished: sau" in capsys.readouterr().err
    assert "sau" not in result(fresh, "weights")["defenses"]


def test_all_goes_on_beside_what_it_may_not_take_for_done(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clean model is no part of an analysis that has no control; a new result is missing."""
    assert run(fresh, "confusion") == 0
    clean = ["--result_file", "bd", "--record_path", fresh, "--n_rounds", 1]
    assert run_script(ROOT / "defense/ft.py", *clean, "--save_folder_name", "new") == 0
    kinds = ["--kinds", "confusion,weights", "--resume"]
    assert run(fresh, "all", *kinds) == 2
    assert "confusion: was made without new; give --overwrite" in refusal(capsys)
    assert result(fresh, "weights")["defenses"] == ["ft", "new", "npd", "sau"]
    assert run(fresh, "all", "--kinds", "weights", "--resume") == 0


def test_a_finished_inspection_is_of_its_models(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint, and clean records that are named."""
    few = ["--probes", 20, "--noise_steps", 1, "--noise_images", 1]
    for name in ("bd", "clean"):
        shutil.copytree(records / name, tmp_path / name, ignore=shutil.ignore_patterns("analysis"))
        state = torch.load(records / name / "attack_result.pt", weights_only=True)["model"]
        torch.save(state, tmp_path / f"{name}.pt")
    flags = ["--model", "tiny", "--dataset", "random", "--save_folder_name", "mine"]
    flags += ["--record_path", tmp_path, *few]
    script = ROOT / "analysis/inspect.py"
    assert run_script(script, *flags, "--state_dict", tmp_path / "bd.pt") == 0
    assert run_script(script, *flags, "--state_dict", tmp_path / "bd.pt", "--resume") == 0
    assert run_script(script, *flags, "--state_dict", tmp_path / "clean.pt", "--resume") == 2
    assert f"was run with --state_dict {tmp_path / 'bd.pt'}; give the same" in refusal(capsys)
    more = ["--resume", "--probes", 21, "--steps", 7]
    assert run_script(script, *flags, "--state_dict", tmp_path / "bd.pt", *more) == 2
    assert "finished, and was run with --probes 20, --steps" in refusal(capsys)
    shutil.copyfile(tmp_path / "clean.pt", tmp_path / "bd.pt")
    assert run_script(script, *flags, "--state_dict", tmp_path / "bd.pt", "--resume") == 2
    assert "was run with another content of --state_dict" in refusal(capsys)
    named = [*few, "--clean_records", "clean", "--defenses", "ft"]
    assert run(tmp_path, "inspect", *named) == 0
    again = ["--dataset", "random", "--model", "tiny", "--record_path", tmp_path, "--epochs", 1]
    again += ["--save_folder_name", "clean", "--overwrite"]
    assert run_script(ROOT / "attack/prototype.py", *again) == 0
    assert run(tmp_path, "inspect", *named, "--resume") == 2
    assert "was made with another clean than is there now" in refusal(capsys)


def test_models_of_one_name_are_not_taken_for_one(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(records / "clean", tmp_path / "clean")
    flags = ["--save_folder_name", "twins", "--probes", 20, "--overwrite"]
    assert run(records, "inspect", *flags, "--clean_records", f"{tmp_path}/clean,clean") == 2
    assert "another model here is called clean, too" in refusal(capsys)
    assert run(records, "inspect", *flags, "--clean_records", "clean", record="clean") == 2
    assert "clean is the model that is inspected" in refusal(capsys)


def test_a_copied_clean_model_does_not_count_twice(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each model more halves, at the best, the smallest share that a table can have."""
    shutil.copytree(records / "clean", tmp_path / "copied")
    flags = ["--save_folder_name", "copies", "--clean_records", f"clean,{tmp_path}/copied"]
    assert run(records, "inspect", *flags) == 2
    assert refusal(capsys) == (
        f"--clean_records: {tmp_path}/copied is the same model as clean, and would count twice; "
        "leave one out"
    )


def test_a_clean_model_of_other_images_is_refused_by_the_flag_that_named_it(records: Path) -> None:
    """Another place of the record's images, as for a dataset that was moved, would not help."""
    images = load_attack(records / "bd").load_dataset()
    for other, message in (
        (replace(images, name="digits"), "was trained on random, and the record on digits"),
        (
            replace(images, test=images.train),
            "was trained on other images or classes than the record",
        ),
    ):
        with pytest.raises(UserError, match=f"^--clean_record: clean {message}.*same dataset$"):
            load_clean("clean", "--clean_record", str(records), other)


def test_all_gives_the_inspection_its_clean_model(records: Path, tmp_path: Path) -> None:
    for name in ("bd", "clean"):
        ignored = shutil.ignore_patterns("analysis", "sau", "npd")
        shutil.copytree(records / name, tmp_path / name, ignore=ignored)
    flags = ["--kinds", "inspect", "--clean_record", "clean"]
    assert run(tmp_path, "all", *flags) == 0
    assert {row["kind"] for row in rows(tmp_path, "inspect", "signals")} == {
        *("record", "purified", "clean"),
    }
    assert "clean" in result(tmp_path, "inspect")["models"]


def test_a_finished_analysis_of_another_kind_is_not_taken_for_this_one(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their flags differ, so that the kind is asked for where no flag tells it."""
    flags = ["--defenses", "ft", "--save_folder_name", "mine"]
    assert run(fresh, "weights", *flags) == 0
    assert run(fresh, "weights", *flags, "--resume") == 0
    path = fresh / "bd/analysis/mine/summary.json"
    path.write_text(path.read_text().replace('"analysis": "weights"', '"analysis": "confusion"'))
    capsys.readouterr()
    assert run(fresh, "weights", *flags, "--resume") == 2
    said = capsys.readouterr().err
    assert "analysis/mine is a result of confusion; give another --save_folder_name" in said


def test_a_clean_model_of_another_network_is_skipped_with_a_line(
    records: Path, fresh: Path
) -> None:
    other = ["--dataset", "random", "--model", "preactresnet18_half", "--epochs", 1]
    flags = [*other, "--record_path", fresh, "--save_folder_name", "other"]
    assert run_script(ROOT / "attack/prototype.py", *flags) == 0
    few = ["--defenses", "ft", "--shares", "0.5,0.5", "--clean_record", "other"]
    assert run(fresh, "similarity", *few) == 0
    inspected = ["--probes", 20, "--noise_steps", 1, "--noise_images", 1, "--defenses", "ft"]
    assert run(fresh, "inspect", *inspected, "--clean_records", "other") == 0
    said = "other is a preactresnet18_half, not a tiny: as a control it says little"
    assert said in result(fresh, "inspect")["warnings"]
    warnings = result(fresh, "similarity")["warnings"]
    assert any(
        "skipped, since it has other shapes of weights than the record's tiny" in line
        for line in warnings
    )
    assert not any("no --clean_record" in line for line in warnings)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("epochs: 2\nlr: 0.1\n", "epochs: 2\nlr: 0.1\nseed: 3\n", ""),
        ("epochs: 2\nlr: 0.1\n", "epochs: 3\nlr: 0.2\n", "epochs 3, not 2, lr 0.2, not 0.1"),
        (
            "epochs: 2\nrandom_rotation: 10\npratio: 0.1\n",
            "epochs: 2\n",
            "random_rotation of no kind, not 10",
        ),
        ("epochs: 2\n", "", ""),  # not known
        ("", "epochs: 2\n", ""),
    ],
)
def test_a_clean_model_that_was_trained_otherwise_is_told(
    records: Path, fresh: Path, before: str, now: str, said: str
) -> None:
    shutil.copytree(records / "clean", fresh / "clean")
    for name, text in (("bd", before), ("clean", now)):
        (fresh / name / "config.yaml").write_text(text)
    few = ["--defenses", "ft", "--shares", "0.5,0.5", "--clean_record", "clean"]
    assert run(fresh, "similarity", *few) == 0
    inspected = ["--probes", 20, "--noise_steps", 1, "--noise_images", 1, "--defenses", "ft"]
    assert run(fresh, "inspect", *inspected, "--clean_records", "clean") == 0
    for kind, what in (("similarity", "the clean model"), ("inspect", "clean")):
        told = [line for line in result(fresh, kind)["warnings"] if "as a control" in line]
        line = f"{what} was trained with {said}: as a control it says less"
        assert told == ([line] if said else [])


def test_a_clean_model_that_gets_other_images_is_skipped_with_a_line(
    records: Path, fresh: Path
) -> None:
    """Its weights are of no use between the normalization or the Resize of the record's model."""
    data = load_attack(records / "bd").load_dataset()
    network = TinyNet(len(data.classes))
    subject = Subject(data, torch.device("cpu"), "fp32", Classifier(network, *EVEN), "tiny")
    resized = nn.Sequential(Resize(32), network)
    for network_of_clean, constants, reason in (
        (network, EVEN, None),
        (network, ((0.4, 0.5, 0.5), EVEN[1]), "another normalization"),
        (network, (EVEN[0], (0.5, 0.5, 0.4)), "another normalization"),
        (resized, EVEN, "other shapes of weights, another size of images in the network"),
    ):
        clean = Classifier(network_of_clean, *constants)
        results = base.Results()
        seen = replace(subject, clean=clean).same_clean_network(results)
        assert seen is (clean if reason is None else None)
        lines = [f"the clean model is skipped, since it has {reason} than the record's tiny"]
        assert results.warnings == ([] if reason is None else lines)
    both = [Classifier(nn.Sequential(Resize(size), network), *EVEN) for size in (32, 16)]
    results = base.Results()
    assert replace(subject, model=both[0], clean=both[1]).same_clean_network(results) is None
    assert "another size of images in the network" in results.warnings[0]
    path = fresh / "clean/attack_result.pt"
    shutil.copytree(records / "clean", fresh / "clean")
    change(path, mean=[0.1, 0.1, 0.1])
    flags = ["--defenses", "ft", "--t_steps", 1, "--clean_record", "clean"]
    assert run(fresh, "path", *flags) == 0
    assert {row["defense"] for row in rows(fresh, "path", "path")} == {"ft"}
    assert "since it has another normalization" in result(fresh, "path")["warnings"][0]


def test_a_result_inside_a_record_is_not_taken_for_one(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a defense, or of an analysis; the record that it is in is named."""
    assert run(records, "stealth", "--save_folder_name", "inside", "--overwrite") == 0
    for kind, name in (("defense", "ft"), ("analysis", "inside")):
        folder = records / "bd" / kind / name
        said = f"{folder}: is a result in the {kind}/ of a record, and no record itself; give "
        for flags in (["--result_file", folder], ["--clean_record", folder]):
            capsys.readouterr()
            assert run(records, "path", *flags, "--save_folder_name", "x", "--overwrite") == 2
            assert refusal(capsys) == said + str(records / "bd")


def test_a_result_of_another_attack_is_refused(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = records / "bd/defense/ft/summary.json"
    text = path.read_text()
    path.write_text(text.replace(json.loads(text)["attack_sha256"], "0" * 64))
    try:
        assert run(records, "weights", "--save_folder_name", "other") == 2
    finally:
        path.write_text(text)
    assert "is of another attack than the record that is there" in refusal(capsys)


def test_an_attack_that_is_replaced_takes_its_analyses_with_it(tmp_path: Path) -> None:
    small = ["--dataset", "random", "--model", "tiny", "--record_path", tmp_path, "--epochs", 1]
    attack = [ROOT / "attack/badnet.py", *small, "--save_folder_name", "bd"]
    assert run_script(*attack) == 0
    assert run(tmp_path, "confusion") == 0
    assert run_script(*attack, "--overwrite") == 0
    assert not (tmp_path / "bd/analysis").exists()


def test_a_user_s_file_in_the_folder_is_never_touched(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(records, "stealth", "--save_folder_name", "notes") == 0
    note = records / "bd/analysis/notes/mine.txt"
    note.write_text("mine")
    assert run(records, "stealth", "--save_folder_name", "notes", "--overwrite") == 2
    assert "it holds mine.txt" in refusal(capsys)
    assert note.read_text() == "mine"


def test_a_checkpoint_of_something_else_is_refused(records: Path) -> None:
    folder = RunFolder(records / "bd/analysis/strange")
    with pytest.raises(base.UserError, match="the checkpoint is not of this run"):
        base._done_before({"loop": {"done": {"a": 3}}})
    assert not folder.path.exists()


def test_a_record_of_a_built_in_set_that_names_a_folder_is_read(fresh: Path) -> None:
    """Earlier versions took `--dataset_path` with them, and ignored it."""
    change(fresh / "bd/attack_result.pt", dataset_path=str(fresh / "gone"))
    assert load_attack(fresh / "bd").load_dataset().name == "random"


def test_clean_models_of_other_content_are_other_ones(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same recipe with other images, or another file of the user, makes another record."""
    monkeypatch.setattr(cleanmodels, "train", lambda *_: None)
    config = inspection.Config.load(
        "digits", record_path=str(tmp_path), train_clean=1, model="tiny"
    )

    def name(images: Dataset, sha256: str | None) -> str:
        subject: Any = SimpleNamespace(
            attack=None, model_sha256=sha256, model_name="tiny", data=images
        )
        (found,) = cleanmodels.train_clean(subject, config, 1)
        return found

    changed = replace(tiny_data.train, images=255 - tiny_data.train.images)
    others = {name(replace(tiny_data, train=changed), None), name(tiny_data, "ab")}
    assert len({name(tiny_data, None), *others}) == 3
    assert name(tiny_data, None) == name(tiny_data, None)


TRAINING = """
import sys
from pathlib import Path
from utils.records.folders import RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("begun", flush=True)
sys.stdin.readline()
folder.path.mkdir()
(folder.path / "summary.json").write_text("{}")
"""


def test_of_two_inspections_one_waits_for_the_clean_models_of_the_other(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = inspection.Config.load(
        "digits", record_path=str(tmp_path), train_clean=1, model="tiny"
    )
    subject: Any = SimpleNamespace(
        attack=None, model_sha256=None, model_name="tiny", data=tiny_data
    )
    trained: list[str] = []
    monkeypatch.setattr(cleanmodels, "train", lambda config, *_: trained.append(config))
    (name,) = cleanmodels.train_clean(subject, config, 1)
    assert len(trained) == 1
    command = [sys.executable, "-c", TRAINING, tmp_path / name]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "begun\n"
        end = other.stdin
        logger = SimpleNamespace(info=lambda *_: (end.write("\n"), end.flush()))
        monkeypatch.setattr("utils.records.lock.logger", logger)  # what says that it waits
        assert cleanmodels.train_clean(subject, config, 1) == [name]
    assert len(trained) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_analysis_whose_record_was_renamed_goes_on(
    fresh: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And whose clean model is named by its folder; the steps that were done are not lost."""
    step = base.Results.step
    steps: list[str] = []

    def counted(self: base.Results, name: str, compute: Any) -> Any:
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(self, name, lambda: (steps.append(name), compute())[1])

    flags = ["--defenses", "ft", "--t_steps", 1]
    shutil.copytree(records / "clean", fresh / "clean", ignore=shutil.ignore_patterns("analysis"))
    monkeypatch.setattr(base.Results, "step", counted)
    assert run(fresh, "path", *flags, "--clean_record", "clean") == 130
    shutil.copytree(fresh / "bd", fresh / "new", ignore=shutil.ignore_patterns("*.lock"))
    assert run(fresh, "path", *flags, "--resume", record="new") == 2
    assert "was run with --clean_record clean; give the same" in refusal(capsys)
    other = [*flags, "--clean_record", fresh / "clean", "--resume"]
    monkeypatch.setattr(base.Results, "step", step)
    assert run(fresh, "path", *other, record="new") == 0
    assert "done before: 2 steps" in capsys.readouterr().err
    assert run(fresh, "path", *other, record="new") == 0
    assert run(fresh, "path", *flags, "--resume", record="new") == 2
    assert "was run with --clean_record" in refusal(capsys)
    assert run(fresh, "all", "--kinds", "path", "--defenses", "ft", "--resume", record="new") == 2
    said = capsys.readouterr().err
    assert "was run with --clean_record" in said
