"""Reports say what the summaries say: means, deviations, the best, and what to beware of."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import models
from benchmark.reporting import figures, leaderboard, page, tables
from benchmark.reporting.figures import draw
from benchmark.reporting.files import made_folder
from benchmark.reporting.means import Number, Table, summarize
from benchmark.reporting.stored import UNDEFENDED, without_places
from benchmark.reporting.summaries import METRICS, read_runs
from models.tiny import TinyNet
from tests.scripts import defense_flags, run_script, trained
from utils import plot
from utils.files import ROOT
from utils.records.places import CLEAN

pytestmark = pytest.mark.usefixtures("cache")

MADE_BY = {
    "dataset": "digits",
    "model": "preactresnet18",
    "seconds": 10.0,
    "device": "cpu",
    "device_name": "x86_64",
    "precision": "fp32",
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "commit": "a" * 40,
    "config_sha256": "b" * 64,
    "warnings": [],
}


KEPT_FILES = {"runs.jsonl", "curves.csv", "table.md", "leaderboard.md"}


def scores(acc: float, asr: float | None, ra: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"acc": acc, "acc_total": 5000}
    return found if asr is None else {**found, "asr": asr, "asr_total": 4500, "ra": ra}


def attack(
    root: Path, name: str, acc: float, asr: float | None, ra: float | None = None, **more: Any
) -> Path:
    """A record's summary; its attack and seed are in its name, e.g. blended-1."""
    kind, _, seed = name.rpartition("-")
    summary = {"attack": kind, **scores(acc, asr, ra or 0.0), "seed": int(seed), **MADE_BY}
    summary |= {"attack_label_trans": "all2one", "pratio": 0.1, "train_images": 50000}
    return write(root / name, {**summary, "files": {"attack_result.pt": "c" * 64}, **more})


def defense(record: Path, label: str, acc: float, asr: float, ra: float, **more: Any) -> Path:
    """A defense's result, and its DER by its definition."""
    before = json.loads((record / "summary.json").read_text())
    drops = max(0.0, before["asr"] - asr) - max(0.0, before["acc"] - acc)
    summary = {
        "defense": label.split("-")[0],
        "attack": before["attack"],
        "before": scores(before["acc"], before["asr"], before["ra"]),
        "after": scores(acc, asr, ra),
        "der": (drops + 1) / 2,
        "seed": before["seed"],
        **MADE_BY,
        "attack_sha256": "c" * 64,
    }
    return write(record / "defense" / label, {**summary, **more})


def write(folder: Path, summary: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return folder


TABLES = ("table.md", "leaderboard.md", "table.tex", "table.csv", "runs.csv", "report.html")


@pytest.mark.parametrize("name", TABLES)
def test_a_file_that_is_no_report_is_not_replaced(
    name: str, two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is any other file written then; a report replaces an earlier one."""
    to = tmp_path / "to"
    to.mkdir()
    (to / name).write_text("my own notes\n")
    flags = ["--under", two_attacks, "--to", to, "--formats", "md,tex,csv,html"]
    assert report(*flags) == 2
    assert f"{to / name} was not written by this script" in capsys.readouterr().err
    assert [path.name for path in to.iterdir()] == [name]
    (to / name).unlink()
    assert report(*flags) == 0
    assert report(*flags) == 0


def test_a_report_without_defenses_replaces_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder where the command is given, too."""
    attack(tmp_path / "record", "blended-0", 0.9, 1.0)
    monkeypatch.chdir(tmp_path)
    for to in (tmp_path / "to", "."):
        for _ in range(2):
            assert report("--under", tmp_path / "record", "--to", to, "--formats", "md") == 0


@pytest.mark.parametrize("changes", [{"seed": 10**30}, {"asr_total": 10**30}])
def test_numbers_beyond_all_bounds_skip_a_record(
    changes: dict[str, Any], two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = two_attacks / "blended-1/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    flags = ["--under", two_attacks, "--to", tmp_path / "to", "--formats", "md,csv"]
    assert report(*flags) == 0
    assert "blended-1" in capsys.readouterr().err
    assert "blended-1" not in (tmp_path / "to/runs.csv").read_text()


@pytest.fixture
def two_attacks(tmp_path: Path) -> Path:
    """Two attacks with two seeds, each purified by two defenses, and a clean model."""
    return two_attacks_at(tmp_path / "record")


def two_attacks_at(root: Path) -> Path:
    for seed, acc, asr in ((0, 0.90, 1.0), (1, 0.94, 0.9)):
        blended = attack(root, f"blended-{seed}", acc, asr, 0.04)
        defense(blended, "ft", acc - 0.01, asr - 0.5, 0.5)
        defense(blended, "sau", acc - 0.02, 0.1 * (1 - seed), 0.8)
        sig = attack(root, f"sig-{seed}", 0.92, 0.95, 0.05)
        defense(sig, "ft", 0.93, 0.95, 0.05)
        defense(sig, "sau", 0.90, 0.15, 0.6)
    attack(root, "prototype-0", 0.95, None, pratio=None, attack_label_trans=None)
    return root


def test_results_on_other_triggered_images_are_not_put_beside_each_other(
    two_attacks: Path,
) -> None:
    """Both are of one model, whose ASR before would be another one. Which of them is stale is asked
    of the record, see tests/utils/records/test_backdoorbench.py; here it cannot be read."""
    for name, sha256 in (("ft", "a"), ("sau", "b")):
        path = two_attacks / "blended-0/defense" / name / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"triggers_sha256": sha256}))
    runs, (problem,) = read_runs(two_attacks)
    assert problem == (
        "blended-0: its results ft, sau were scored on several triggered images, and nothing says "
        "which are the record's; skipped"
    )
    of_one = runs[runs["record"].str.endswith("blended-0")]
    assert set(of_one["label"]) == {UNDEFENDED}


def test_the_pairs_of_the_page_are_of_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FT on two datasets, `null` on the easier one, where both have the same DER.

    The attack `lf` has failed, and `wanet` has two models without a seed, of which one has both:
    there, DER is 0.9 and 0.8. So the gains are 0, 0 and 0.1.
    """
    for dataset, asr in (("digits", 0.1), ("cifar10", 0.9)):
        for name in ("blended-0", "blended-1", "sig-0", "lf-0"):
            before = 0.4 if name == "lf-0" else 1.0
            record = attack(tmp_path / "record" / dataset, name, 0.9, before, dataset=dataset)
            defense(record, "ft", 0.9, asr, 0.5, dataset=dataset)
            if dataset == "digits":
                defense(record, "null", 0.9, 0.0 if name == "lf-0" else asr, 0.5)
    for name in ("wanet-0", "wanet-1"):
        # Imported, each of another model; the pratio of none is known.
        more = {"seed": None, "pratio": None, "imported_sha256": name[-1] * 64}
        record = attack(tmp_path / "record", name, 0.9, 1.0, **more)
        defense(record, "ft", 0.9, 0.4, 0.5, seed=0)
    defense(tmp_path / "record/wanet-0", "null", 0.9, 0.2, 0.5, seed=0)
    assert report("--under", tmp_path / "record", "--to", tmp_path / "report") == 0
    page = (ROOT / "docs/grids.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(code.replace('"sau"', '"null"'), names)
    assert sorted(names["gain"].round(6)) == [0.0, 0.0, 0.1]
    assert capsys.readouterr().out.startswith("3 0.0333")


def test_kept_runs_have_their_tables_beside_them(two_attacks: Path, tmp_path: Path) -> None:
    """Whatever other forms are asked for: earlier tables would be of other runs."""
    flags = ["--under", two_attacks, "--to", tmp_path / "kept", "--keep", "--formats", "csv"]
    assert report(*flags) == 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} > KEPT_FILES


def test_a_text_without_marks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.md"
    text.write_text("<!-- start results/digits/table.md -->\n")
    assert report("--rebuild", text) == 2
    assert f"{text} has no marks; write <!-- begin results/" in capsys.readouterr().err


def test_an_attack_without_its_scores_is_named(two_attacks: Path) -> None:
    """Those before its first defense stand for them; an import has none by itself."""
    path = two_attacks / "sig-0/summary.json"
    summary = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("acc", "asr")}
    path.write_text(json.dumps(summary))
    runs, problems = read_runs(two_attacks)
    assert problems == ["sig-0: has no acc; what ft had before is used"]
    assert runs.set_index(["record", "label"]).loc[("sig-0", UNDEFENDED), "acc"] == 0.92
    path.write_text(json.dumps(summary | {"imported_sha256": "d" * 64}))
    assert read_runs(two_attacks)[1] == []


def the_table(root: Path) -> Table:
    runs, problems = read_runs(root)
    assert problems == []
    (table,) = summarize(runs)
    return table


def numbers(table: Table, name: str) -> dict[tuple[str, str], Number]:
    (row,) = [r for r in (*table.main.body, *table.main.foot) if r.name == name]
    return dict(row.numbers)


def printed(table: Table, name: str, label: str) -> list[str]:
    (row,) = [r for r in (*table.main.body, *table.main.foot) if r.name == name]
    found = [row.numbers.get((label, metric)) for metric in tables.METRICS]
    return [tables.value_text(n, row) + f" {n.flags}".rstrip() for n in found if n]


def test_what_a_defense_sees_is_marked_and_does_not_compete(tmp_path: Path) -> None:
    """EP on the poisoned set leaves the least, and is not the best beside those on clean images."""
    record = attack(tmp_path, "blended-0", 0.9, 1.0)
    defense(record, "ep", 0.9, 0.0, 0.9, sees="poisoned")
    defense(record, "clp", 0.8, 0.5, 0.4, sees="nothing")
    defense(record, "sau", 0.8, 0.1, 0.8, sees="clean", purify_seconds=7.25)
    defense(record, "ft", 0.8, 0.2, 0.8)  # of earlier versions, which had no other kind
    table = the_table(tmp_path)
    found = numbers(table, "blended")
    flags = {label: found[label, "acc"].flags for label in ("ep", "clp", "sau", "ft")}
    assert {label: set("np") & set(text) for label, text in flags.items()} == {
        "ep": {"p"},
        "clp": {"n"},
        "sau": set(),
        "ft": set(),
    }
    assert [label for label in flags if found[label, "asr"].is_best] == ["sau"]
    legend = tables.legend([table.main])
    assert any(line.startswith("p: the defense sees a part of the poisoned") for line in legend)
    assert any(line.startswith("n: the defense sees no images") for line in legend)
    rows = tables.runs_csv(table.runs)
    assert "purify_seconds" in rows.splitlines()[0]
    assert ",7.25," in rows


def report(*flags: object) -> int:
    return run_script(ROOT / "benchmark/report.py", *flags)


@pytest.fixture(scope="module")
def grid_of_two_attacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kept runs of `two_attacks`, without figures, for `kept` to copy."""
    root = tmp_path_factory.mktemp("grid")
    flags = ("--under", two_attacks_at(root / "record"), "--to", root / "kept", "--keep")
    assert report(*flags, "--formats", "md") == 0
    return root / "kept"


@pytest.fixture
def kept(grid_of_two_attacks: Path, tmp_path: Path) -> Path:
    """A folder of `results/` with the runs of `two_attacks`."""
    return Path(shutil.copytree(grid_of_two_attacks, tmp_path / "kept"))


def test_means_and_deviations_by_hand(two_attacks: Path) -> None:
    """Blended before: ACC 90 and 94, so 92 and sqrt(2 * 2^2 / 1) = 2.83; ASR 100 and 90, so 95 and
    sqrt(2 * 5^2) = 7.07. SAU leaves ASR 10 and 0: 5 and 7.07. Its DER, of each seed:
    (0.9 - 0.02 + 1) / 2 = 0.94, twice. FT: (0.5 - 0.01 + 1) / 2 = 0.745, twice.

    SIG: FT gains ACC, which changes nothing: (0 - 0 + 1) / 2 = 0.5. SAU: (0.8 - 0.02 + 1) / 2 =
    0.89. Means of the two attacks: SAU's DER (94 + 89) / 2 = 91.5, its ASR (5 + 15) / 2 = 10.
    """
    table = the_table(two_attacks)
    assert list(table.main.columns) == [UNDEFENDED, "ft", "sau"]
    assert [row.name for row in table.main.body] == ["blended", "sig"]
    assert [row.name for row in table.main.foot] == ["mean of 2 attacks", CLEAN]
    assert printed(table, "blended", UNDEFENDED) == ["92.00 ± 2.83", "95.00 ± 7.07", "4.00 ± 0.00"]
    assert printed(table, "blended", "sau")[1:] == ["5.00 ± 7.07", "80.00 ± 0.00", "94.00 ± 0.00"]
    assert printed(table, "blended", "ft")[3] == "74.50 ± 0.00"
    assert [printed(table, "sig", label)[3] for label in ("ft", "sau")] == [
        "50.00 ± 0.00",
        "89.00 ± 0.00",
    ]
    # Over seeds, the means of both are 12.5 and 7.5: sqrt(2 * 2.5^2) = 3.54.
    assert printed(table, "mean of 2 attacks", "sau")[1::2] == ["10.00 ± 3.54", "91.50 ± 0.00"]
    assert printed(table, CLEAN, UNDEFENDED) == ["95.00"]  # and no part of the mean:
    assert printed(table, "mean of 2 attacks", UNDEFENDED)[0].startswith("92.00")
    assert {row.seeds for row in table.main.body} == {2}


def test_the_best_defense_of_a_row_is_bold_and_the_undefended_never(two_attacks: Path) -> None:
    """Blended: FT has the ACC (91 over 90), SAU ASR, RA and DER. Equal as printed is both."""
    table = the_table(two_attacks)
    best = {key for key, number in numbers(table, "blended").items() if number.is_best}
    assert best == {("ft", "acc"), ("sau", "asr"), ("sau", "ra"), ("sau", "der")}
    markdown = tables.markdown([table])
    assert (
        "| blended | 2 | 92.00 ± 2.83 | 95.00 ± 7.07 | 4.00 ± 0.00 | **91.00 ± 2.83** |" in markdown
    )
    assert r"& \textbf{91.00 $\pm$ 2.83} & " in tables.latex([table])

    for seed in (0, 1):
        sig = two_attacks / f"sig-{seed}"
        defense(sig, "sau", 0.92999999, 0.15, 0.6)
    best = {key for key, number in numbers(the_table(two_attacks), "sig").items() if number.is_best}
    assert {("ft", "acc"), ("sau", "acc")} < best

    # FT with one seed of two has the best ACC of blended no longer.
    shutil.rmtree(two_attacks / "blended-1/defense/ft")
    best = {key for key, n in numbers(the_table(two_attacks), "blended").items() if n.is_best}
    assert best == set()

    for ft in two_attacks.glob("*/defense/ft"):
        shutil.rmtree(ft)
    assert "**9" not in tables.markdown([the_table(two_attacks)])  # a single one is not the best


def test_flags_stand_beside_the_numbers_that_need_them(two_attacks: Path) -> None:
    """LF failed (ASR 30 %), was run once, with another torch; FT halves ACC: 0.92 -> 0.40.

    A commit is a flag, and another recipe a column of its own.
    """
    other = {"versions": {"python": "3.11.7", "torch": "2.6.0"}}
    lf = attack(two_attacks, "lf-0", 0.92, 0.3, 0.5, **other)
    defense(lf, "ft", 0.40, 0.1, 0.2)
    defense(two_attacks / "sig-0", "sau", 0.90, 0.15, 0.6, commit="d" * 40)
    defense(two_attacks / "sig-0", "other", 0.9, 0.1, 0.6)
    defense(two_attacks / "sig-1", "other", 0.9, 0.1, 0.6, config_sha256="e" * 64)
    shutil.rmtree(two_attacks / "blended-1/defense/ft")
    table = the_table(two_attacks)

    assert printed(table, "lf", UNDEFENDED) == ["92.00 v", "30.00 a", "50.00"]
    assert printed(table, "lf", "ft") == ["40.00 c", "10.00 a", "20.00", "34.00 a"]
    rows = {row.name: row for row in table.main.body}
    assert (rows["lf"].seeds, rows["lf"].flags) == (1, "s")
    assert rows["sig"].flags == ""
    assert printed(table, "sig", "sau")[0] == "90.00 ± 0.00 g"
    assert printed(table, "sig", "other (eeeeee)")[0] == "90.00 (1) s"
    assert printed(table, "blended", "ft")[:2] == ["89.00 (1) s", "50.00 (1)"]
    # The mean has SAU against two of the three attacks; it is not compared with others.
    mean = numbers(table, "mean of 3 attacks")
    assert mean["sau", "der"].flags == "m"
    assert not mean["sau", "der"].is_best
    # FT lacks a seed of blended that SAU has.
    assert mean["ft", "acc"].flags == "cm"
    assert mean["ft", "asr"].flags == "am"

    legend = "\n".join(tables.legend([table.main]))
    assert [line[0] for line in legend.splitlines()[1:]] == list("acgmsv")
    assert "<sup>g</sup>" in tables.markdown([table])
    csv = pd.read_csv(pd.io.common.StringIO(tables.tidy([table])))
    row = csv[(csv["attack"] == "lf") & (csv["defense"] == "ft") & (csv["metric"] == "der")]
    assert row["flags"].item() == "as"


def test_a_failed_attack_and_a_collapsed_defense_win_nothing(two_attacks: Path) -> None:
    """LF fails: nothing is best. FT halves the ACC of BPP, and with it the ASR falls to 0."""
    lf = attack(two_attacks, "lf-0", 0.92, 0.3, 0.5)
    bpp = attack(two_attacks, "bpp-0", 0.92, 1.0, 0.0)
    for folder, ft in ((lf, 0.9), (bpp, 0.1)):
        defense(folder, "ft", ft, 0.0, 0.2)
        defense(folder, "sau", 0.85, 0.02, 0.8)
    table = the_table(two_attacks)
    for row in ("lf", "bpp", "mean of 4 attacks"):
        assert not any(number.is_best for number in numbers(table, row).values())


def test_numbers_of_other_models_do_not_compete(two_attacks: Path) -> None:
    """FT and SAU with two seeds of three each, one of them the same; FT lacks the bad one."""
    third = attack(two_attacks, "blended-2", 0.9, 1.0, 0.04)
    defense(third, "sau", 0.5, 0.9, 0.1)
    shutil.rmtree(two_attacks / "blended-0/defense/sau")
    table = the_table(two_attacks)
    assert printed(table, "blended", "sau")[0].endswith(" (2)")
    assert printed(table, "blended", "ft")[0].endswith(" (2)")
    for row in ("blended", "mean of 2 attacks"):
        assert not any(number.is_best for number in numbers(table, row).values())
    defense(two_attacks / "blended-0", "nad", 0.8, 0.9, 0.1)  # of the same models as FT:
    defense(two_attacks / "blended-1", "nad", 0.8, 0.9, 0.1)
    best = {key for key, n in numbers(the_table(two_attacks), "blended").items() if n.is_best}
    assert best == {("ft", metric) for metric in METRICS}


def test_without_a_majority_no_commit_is_flagged(two_attacks: Path) -> None:
    """Each run at a commit of its own: a note instead of a flag at every number."""
    for number, path in enumerate(sorted(two_attacks.rglob("summary.json"))):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | {"commit": f"{number:040d}"}))
    table = the_table(two_attacks)
    assert "g" not in table.main.flags()
    assert table.notes[-1] == f"Made by {number + 1} commits."


def test_a_mean_over_seeds_that_some_attacks_lack_has_no_deviation(two_attacks: Path) -> None:
    shutil.rmtree(two_attacks / "sig-1")
    table = the_table(two_attacks)
    assert printed(table, "mean of 2 attacks", UNDEFENDED)[0] == "92.00"


def test_a_seed_is_that_of_the_model_whatever_that_of_the_defense(
    two_attacks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defense by hand has seed 0 on every record.

    The deviations over seeds stay those of `test_means_and_deviations_by_hand`, and what says how
    many seeds there are says two.
    """
    before = numbers(the_table(two_attacks), "mean of 2 attacks")["ft", "acc"]
    assert before.sd is not None
    for path in two_attacks.glob("*/defense/*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 0}))
    for record in ("blended-0", "blended-1"):
        with_curves(two_attacks / record)
    table = the_table(two_attacks)
    assert numbers(table, "mean of 2 attacks")["ft", "acc"] == before
    (board,) = leaderboard.leaderboards(table)
    entry = next(entry for entry in board.entries if entry.defense == "ft")
    assert entry.asr.sd == pytest.approx(0.05 / 2**0.5)
    facts, _ = tables.made_by(table)
    assert set(facts[facts["attack"] != CLEAN]["seeds"]) == {"0, 1"}
    said: list[Any] = []
    monkeypatch.setattr(plot, "before_after", lambda points, seeds, title: said.append(seeds))
    monkeypatch.setattr(plot, "curves_with_bands", lambda panels, title: said.append(title))
    list(figures._figures(table, has_gallery=True))
    assert said[0] == {"ft": 2, "sau": 2}
    assert all("up to 2 seeds" in str(title) for title in said[1:])


def test_an_analysis_that_has_not_ended_is_no_record(two_attacks: Path) -> None:
    """Nor is it said to be one that is left out."""
    record = two_attacks / "sig-0"
    for folder in (record, record / "analysis/path"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text("{}")
        (folder / "config.yaml").write_text("")
    runs, problems = read_runs(two_attacks)
    assert problems == []
    assert "path" not in " ".join(runs["record"])


@pytest.mark.parametrize("name", ["defense", "analysis"])
@pytest.mark.parametrize("below", ["", "grid"])
def test_a_folder_of_records_may_have_the_name_of_a_folder_inside_one(
    two_attacks: Path, tmp_path: Path, name: str, below: str
) -> None:
    expected = the_table(two_attacks).runs
    moved = tmp_path / "other" / below / name
    moved.parent.mkdir(parents=True)
    two_attacks.rename(moved)
    found = the_table(tmp_path / "other").runs
    assert len(found) == len(expected)
    assert sorted(found["acc"]) == sorted(expected["acc"])
    assert sorted(found["label"]) == sorted(expected["label"])


def test_a_mean_without_the_worse_seed_does_not_win(two_attacks: Path) -> None:
    """SAU again, as a result of another name, but without its worse seed against blended."""
    for name in ("blended-0", "blended-1", "sig-0", "sig-1"):
        shutil.copytree(two_attacks / name / "defense/sau", two_attacks / name / "defense/other")
    shutil.rmtree(two_attacks / "blended-0/defense/other")
    mean = numbers(the_table(two_attacks), "mean of 2 attacks")
    assert mean["other", "asr"].mean < mean["sau", "asr"].mean
    assert (mean["other", "asr"].flags, mean["other", "asr"].is_best) == ("m", False)
    assert (mean["sau", "asr"].flags, mean["sau", "asr"].is_best) == ("", True)
    assert mean[UNDEFENDED, "asr"].flags == ""


def test_a_mean_says_of_how_many_attacks_it_is(two_attacks: Path) -> None:
    """A model of unknown origin has an ACC alone, and no defense was run on it."""
    attack(two_attacks, "external-0", 0.92, None)
    table = the_table(two_attacks)
    name = "mean of 3 attacks"
    assert "(" not in printed(table, name, UNDEFENDED)[0]
    assert [cell.split(" (")[1] for cell in printed(table, name, UNDEFENDED)[1:]] == ["2)", "2)"]
    assert [" (2)" in cell for cell in printed(table, name, "sau")] == [True] * 4


def test_clean_models_alone_are_a_table_too(tmp_path: Path) -> None:
    """Two recipes are two rows and no attacks; of one recipe and seed one is skipped."""
    for name, config in (
        ("prototype-0", "b" * 64),
        ("prototype-1", "e" * 64),
        ("prototype-2", "b" * 64),
    ):
        more = {"pratio": None, "attack_label_trans": None, "seed": 0, "config_sha256": config}
        attack(tmp_path / "record", name, 0.9, None, **more)
    runs, (problem,) = read_runs(tmp_path / "record")
    assert set(runs["attack"]) == {CLEAN, f"{CLEAN} (prototype-1)"}
    assert problem.startswith("prototype-2: is of the same attack and seed as prototype-0")
    assert report("--under", tmp_path / "record", "--to", tmp_path / "to") == 0


def test_a_long_warning_is_cut_and_costs_nothing(two_attacks: Path) -> None:
    path = two_attacks / "sig-0/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["x" * 1000]}))
    runs, problems = read_runs(two_attacks)
    assert problems == []
    assert [len(text) for texts in runs["warnings"] for text in texts] == [300]


def test_another_recipe_of_the_same_seed_is_a_row_of_its_own(two_attacks: Path) -> None:
    """The names of a grid's variants; a repeat of the same recipe is skipped and named."""
    facts = json.loads((two_attacks / "sig-0/summary.json").read_text())
    for seed in (0, 1, 2):  # more seeds than sig itself
        strong = {"config_sha256": "e" * 64, "seed": seed}
        write(two_attacks / f"sig_strong-s{seed}", facts | strong)
    write(two_attacks / "sig_s2-s0", facts | {"config_sha256": "f" * 64})
    write(two_attacks / "sig-00", facts)
    runs, problems = read_runs(two_attacks)
    counts = runs[runs["label"] == UNDEFENDED].groupby("attack").size().to_dict()
    assert counts == {"blended": 2, CLEAN: 1, "sig": 2, "sig (sig_s2)": 1, "sig (sig_strong)": 3}
    assert problems == ["sig-00: is of the same attack and seed as sig-0; skipped"]


def test_of_two_records_of_one_model_the_one_with_more_results_is_used(two_attacks: Path) -> None:
    """Whatever its name; what is lost with the other one is said."""
    shutil.copytree(two_attacks / "sig-0", two_attacks / "zzz")
    shutil.rmtree(two_attacks / "sig-0/defense/ft")
    runs, problems = read_runs(two_attacks)
    assert problems == ["sig-0: is of the same attack and seed as zzz; skipped, with its sau"]
    assert set(runs.loc[runs["record"] == "zzz", "label"]) == {UNDEFENDED, "ft", "sau"}
    assert "sig-0" not in set(runs["record"])


def test_sizes_of_test_sets_are_said_and_small_ones_flagged(two_attacks: Path) -> None:
    """4,500 triggered images are many; of 324, one is 100 / 324 = 0.31 points."""
    assert the_table(two_attacks).notes == (
        "50,000 training and 5,000 test images, 4,500 of them triggered for ASR and RA.",
    )
    attack(two_attacks, "sig-0", 0.9, 1.0, asr_total=324)
    (note,) = the_table(two_attacks).notes
    assert "324 or 4,500 of them triggered" in note
    assert note.endswith("Small test set: one image is up to 0.31 points.")


def test_what_is_not_the_same_is_told_apart(two_attacks: Path) -> None:
    """All-to-all is a row, another dataset, network or number of images a table."""
    attack(two_attacks, "badnet-0", 0.9, 0.9, attack_label_trans="all2all")
    attack(two_attacks, "badnet-1", 0.9, 0.9)
    names = [row.name for row in the_table(two_attacks).main.body]
    assert names == ["badnet", "badnet_all2all", "blended", "sig"]

    attack(two_attacks, "wanet-0", 0.9, 0.9, dataset="gtsrb")
    attack(two_attacks, "wanet-1", 0.9, 0.9, model="vgg19_bn")
    attack(two_attacks, "wanet-2", 0.9, 0.9, train_images=10000)
    found = summarize(read_runs(two_attacks)[0])
    assert len(found) == 4
    assert len({table.name for table in found}) == 4  # they name files
    assert [len(table.main.body) for table in found].count(1) == 3


def test_an_attack_with_several_pratios_has_a_table_for_each(two_attacks: Path) -> None:
    """Otherwise a row says its own: here SIG, run with 5 % where the others have 10 %."""
    for seed in (0, 1):
        path = two_attacks / f"sig-{seed}/summary.json"
        path.write_text(path.read_text().replace('"pratio": 0.1', '"pratio": 0.05'))
    table = the_table(two_attacks)
    assert [row.name for row in table.main.body] == ["blended", "sig (5 %)"]
    csv = pd.read_csv(pd.io.common.StringIO(tables.tidy([table])))
    assert set(csv["attack"]) == {"blended", "sig", CLEAN}

    attack(two_attacks, "blended-2", 0.9, 0.9, pratio=0.01)
    found = summarize(read_runs(two_attacks)[0])
    assert [table.title.rpartition(" pratio ")[2] for table in found] == ["1 %", "5 %", "10 %"]
    assert all(table.main.foot[-1].name == CLEAN for table in found)


def test_tables_by_pratio_go_by_what_was_asked_for(two_attacks: Path) -> None:
    """SIG may poison a little less than it is asked for: 9.85 % of 10, 4.9 % of 5."""
    for seed, asked, is_share in ((0, 0.1, 0.0985), (1, 0.05, 0.049)):
        for kind, pratio in (("blended", asked), ("sig", is_share)):
            path = two_attacks / f"{kind}-{seed}/summary.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"pratio": pratio}))
            (path.parent / "config.yaml").write_text(f"pratio: {asked}\n")
    found = {t.title.rpartition(" ")[0][-4:]: t for t in summarize(read_runs(two_attacks)[0])}
    rows = {name: [row.name for row in table.main.body] for name, table in found.items()}
    assert rows == {"o 10": ["blended", "sig (9.85 %)"], "io 5": ["blended", "sig (4.9 %)"]}


def test_kept_numbers_of_analyses_are_not_lost(
    two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same runs again, from where nobody has analysed them. Of another model they would go."""
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    path = two_attacks / "sig-0/defense/sau/summary.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"files": {"defense_result.pt": "d" * 64}})
    )
    shutil.copytree(two_attacks, plain)
    folder = two_attacks / "sig-0/analysis/retune"
    folder.mkdir(parents=True)
    facts = {"analysis": "retune", "headline": {"sau": {"asr_retuned": 0.25}}}
    facts |= {"models": {"sau": "d" * 64}}
    (folder / "summary.json").write_text(json.dumps(facts))
    (folder.parents[1] / "config.yaml").write_text("pratio: 0.1\n")
    flags = ("--to", kept, "--keep", "--formats", "md")
    assert report("--under", two_attacks, *flags) == 0
    before = (kept / "runs.jsonl").read_bytes()
    assert report("--under", kept, plain, *flags) == 2
    said = capsys.readouterr().err
    assert ": sig-0 has a configuration, and sig-0, which is of the same model, has not;" in said
    shutil.copy(folder.parents[1] / "config.yaml", plain / "sig-0")
    assert report("--under", kept, plain, *flags) == 2
    said = capsys.readouterr().err
    assert ": sig-0/sau has asr_retuned of its analyses, and sig-0/defense/sau, which is" in said
    assert (kept / "runs.jsonl").read_bytes() == before
    path = plain / "sig-0/defense/sau/summary.json"
    path.write_text(path.read_text().replace("d" * 64, "e" * 64))
    assert report("--under", kept, plain, *flags) == 0
    assert "asr_retuned" not in (kept / "runs.jsonl").read_text()


def test_a_damaged_line_ends_a_rebuild(
    two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, text = tmp_path / "results/digits", tmp_path / "RESULTS.md"
    assert report("--under", two_attacks, "--to", grid, "--keep", "--formats", "md") == 0
    text.write_text(
        "".join(f"<!-- {kind} results/digits/table.md -->\n" for kind in ("begin", "end"))
    )
    assert report("--rebuild", text) == 0
    runs = grid / "runs.jsonl"
    runs.write_text(runs.read_text().replace('{"record": "sig-1"', '{"record: "sig-1"', 1))
    before = [path.read_bytes() for path in (text, grid / "table.md")]
    capsys.readouterr()
    assert report("--rebuild", text) == 2
    assert "runs.jsonl:11: is no run (Invalid JSON" in capsys.readouterr().err
    assert [path.read_bytes() for path in (text, grid / "table.md")] == before


def test_variants_have_a_table_of_their_own(two_attacks: Path) -> None:
    """Best per column: without `beta_2` SAU has a DER of (0.5 + 1) / 2 = 75 against 94 as it is."""
    for seed in (0, 1):
        blended = two_attacks / f"blended-{seed}"
        asr = json.loads((blended / "summary.json").read_text())["asr"]
        defense(blended, "sau-beta_2_0", 0.95, asr - 0.5, 0.4)
    table = the_table(two_attacks)
    assert list(table.main.columns) == [UNDEFENDED, "ft", "sau"]
    grid = table.ablations["sau"]
    assert [row.name for row in grid.body] == ["sau", "sau-beta_2_0"]
    assert list(grid.columns) == ["blended"]
    der = {row.name: row.numbers["blended", "der"] for row in grid.body}
    assert (der["sau"].rounded(), der["sau-beta_2_0"].rounded()) == (94.0, 75.0)
    assert (der["sau"].is_best, der["sau-beta_2_0"].is_best) == (True, False)
    assert "Variants of sau:" in tables.markdown([table])
    stem = f"{table.name}-variants-sau-blended"
    figures = draw(table, made_folder(two_attacks / "figures"), ["png"], [stem])
    assert list(figures) == ["Variants of sau against blended"]


def test_a_name_with_an_underscore_is_no_variant(two_attacks: Path) -> None:
    """As docs/settings.md says of a second result of a defense."""
    for record in ("blended-0", "blended-1", "sig-0", "sig-1"):
        for name in ("sau_L2", "sau-L2"):
            defense(two_attacks / record, name, 0.95, 0.5, 0.4, defense="sau")
    table = the_table(two_attacks)
    assert list(table.main.columns) == [UNDEFENDED, "ft", "sau", "sau_L2"]
    assert [row.name for row in table.ablations["sau"].body] == ["sau", "sau-L2"]
    boards = leaderboard.leaderboards(table)
    ranked = {entry.defense for board in boards for entry in board.entries}
    assert ranked == {"ft", "sau", "sau_L2"}


def test_what_made_the_numbers(two_attacks: Path) -> None:
    """What all share is said once; a recipe that a summary does not have is a dash."""
    path = two_attacks / "sig-0/summary.json"
    path.write_text(path.read_text().replace('"config_sha256"', '"other"'))
    for seed, seconds in ((0, 1234.4), (1, 1239.6)):
        result = two_attacks / f"sig-{seed}/defense/sau/summary.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": seconds}))
        result = two_attacks / f"sig-{seed}/summary.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": None}))
    facts, note = tables.made_by(the_table(two_attacks))
    assert list(facts) == ["attack", "defense", "seeds", "seconds", "config"]
    by_cell = facts.set_index(["attack", "defense"])
    assert by_cell.loc[("sig", UNDEFENDED), "config"] == "-; bbbbbbbbbbbb"
    assert by_cell.loc[("sig", "sau"), "seeds"] == "0, 1"
    assert by_cell.loc[("sig", "sau"), "seconds"] == "1,234 to 1,240"
    assert by_cell.loc[("blended", "sau"), "seconds"] == "10"
    assert by_cell.loc[("sig", UNDEFENDED), "seconds"] == "-"
    assert "All: commit aaaaaaaaaa; versions python 3.11.7 torch 2.14.1; device cpu" in note


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "object"),
        ("{}", "attack"),
        ('{"attack": "sig", "dataset": "digits", "acc": NaN}', "acc"),
        ('{"attack": "sig", "dataset": "digits", "acc": 99.0}', "acc"),
        ('{"attack": "sig", "dataset": "digits", "acc": "0.9"}', "acc"),
        ('{"attack": "sig", "dataset": "digits"}', "has no scores"),
        ("[" * 100_000, "Invalid JSON"),
        (" " * (2 << 20), "larger than"),
    ],
)
def test_a_broken_summary_is_named_in_one_line_and_the_rest_goes_on(
    two_attacks: Path, content: str, reason: str
) -> None:
    broken = two_attacks / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text(content)
    runs, (problem,) = read_runs(two_attacks)
    assert set(runs["record"]) == {"blended-0", "blended-1", "prototype-0", "sig-0", "sig-1"}
    assert problem.startswith("broken")
    assert reason in problem
    assert "\n" not in problem


def test_runs_that_are_not_finished_are_named(two_attacks: Path) -> None:
    for place in ("sig-0/defense/half", "late"):
        folder = two_attacks / place
        folder.mkdir(parents=True)
        for name in ("run.json", "config.yaml"):
            (folder / name).write_text("{}")
    problems = read_runs(two_attacks)[1]
    assert problems == ["left out, because not finished: late, sig-0/defense/half"]


def test_results_of_a_record_that_is_not_finished_are_left_out_with_it(two_attacks: Path) -> None:
    """As when it is being trained again: warning, count and tables say the same."""
    again = two_attacks / "blended-1"
    (again / "summary.json").unlink()
    for name in ("run.json", "config.yaml"):
        (again / name).write_text("{}")
    runs, problems = read_runs(two_attacks)
    assert problems == ["left out, because not finished: blended-1 (with its ft, sau)"]
    assert "blended-1" not in set(runs["record"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"der": 0.99}, "DER is 0.99, but 0.89 of ACC and ASR before and after"),
        ({"after": scores(0.9, None, None)}, "there is a DER, but no ASR before and after"),
    ],
)
def test_a_result_that_contradicts_itself_is_skipped(
    two_attacks: Path, changes: dict[str, Any], reason: str
) -> None:
    """Of SIG, SAU takes 0.8 of the ASR and 0.02 of the ACC: (0.8 - 0.02 + 1) / 2 = 0.89."""
    path = two_attacks / "sig-0/defense/sau/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    runs, problems = read_runs(two_attacks)
    where = path.relative_to(two_attacks)
    assert problems == [f"{where}: is no summary of a run ({reason}); skipped"]
    assert not ((runs["record"] == "sig-0") & (runs["label"] == "sau")).any()


def test_what_cannot_be_trusted_is_skipped_and_said(two_attacks: Path, tmp_path: Path) -> None:
    """A second record of one seed, a result of a model that is gone, links."""
    attack(two_attacks, "sig-7", 0.5, 0.5, seed=0)
    defense(two_attacks / "sig-0", "stale", 0.9, 0.1, 0.8, attack_sha256="f" * 64)
    (two_attacks / "linked").mkdir()
    (two_attacks / "linked/summary.json").symlink_to(two_attacks / "sig-0/summary.json")
    (two_attacks / "away").symlink_to(attack(tmp_path / "other", "lf-0", 0.9, 0.9))
    runs, problems = read_runs(two_attacks)
    assert set(runs["record"]) == {"blended-0", "blended-1", "prototype-0", "sig-0", "sig-1"}
    assert "stale" not in set(runs["label"])
    text = "\n".join(problems)
    assert "sig-7: is of the same attack and seed as sig-0; skipped" in text
    assert "stale: purified another model than this record has now" in text
    assert "linked/summary.json: cannot be read (it is a link)" in text
    assert len(problems) == 3


def test_a_record_without_scores_of_its_own_has_those_before_a_defense(tmp_path: Path) -> None:
    """Records of BackdoorBench have no summary, imported ones only some of it."""
    sig = attack(tmp_path, "sig-0", 0.92, 0.95, 0.05)
    defense(sig, "sau", 0.90, 0.15, 0.6)
    (sig / "summary.json").unlink()
    lf = attack(tmp_path, "lf-0", 0.91, 0.93, 0.02)
    defense(lf, "sau", 0.90, 0.15, 0.6)
    facts = {"attack": "lf", "dataset": "digits", "model_name": "preactresnet18"}
    write(lf, {**facts, "imported_sha256": "0" * 64})
    runs, problems = read_runs(tmp_path)
    assert problems == []
    before = runs[runs["label"] == UNDEFENDED].set_index("attack")
    assert before["acc"].to_dict() == {"lf": 0.91, "sig": 0.92}
    assert set(before["model"]) == {"preactresnet18"}


@pytest.fixture
def three_attacks(two_attacks: Path) -> Path:
    """`two_attacks`, and LF with another pratio, which is in the name of its row."""
    for seed in (0, 1):
        lf = attack(two_attacks, f"lf-{seed}", 0.9, 1.0, pratio=0.05)
        for label in ("ft", "sau"):
            defense(lf, label, 0.9, 0.2, 0.7)
    return two_attacks


def test_a_report_of_some_attacks_has_no_other_in_any_of_its_files(
    three_attacks: Path, tmp_path: Path
) -> None:
    """Without blended, SAU has a DER of (89 + 90) / 2. The clean model stays; of LF alone, the row
    and the title's pratio are those of all attacks. A part is a part in each of its titles.
    """
    to = tmp_path / "to"
    flags = ("--under", three_attacks, "--to", to, "--attacks")
    assert report(*flags, "sig", "--attacks", "lf (5 %)", "--formats", "md,tex,csv,html") == 0
    texts = {path.name: path.read_text() for path in to.iterdir() if path.is_file()}
    assert len(texts) == 7
    assert not [name for name, text in texts.items() if "blended" in text]
    title = "digits, preactresnet18, pratio 10 %, 2 of 3 attacks"
    for name in ("table.md", "leaderboard.md", "report.html"):
        assert title in texts[name]
    assert title.replace("%", r"\%") in texts["table.tex"]
    assert "| **sau** | 1 (1 to 2) | none | 89.50 " in texts["leaderboard.md"]
    assert "Attacks: lf (5 %), sig. Backdoored models: 4." in texts["leaderboard.md"]
    assert all(f"\n| {row} |" in texts["table.md"] for row in ("mean of 2 attacks", CLEAN))
    runs = pd.read_csv(to / "runs.csv")
    assert sorted(set(runs["record"])) == ["lf-0", "lf-1", "prototype-0", "sig-0", "sig-1"]
    assert report(*flags, "lf (5 %)", "--formats", "md") == 0
    text = (to / "table.md").read_text()
    assert "pratio 10 %, 1 of 3 attacks" in text
    assert "| lf (5 %) | 2 |" in text


def test_a_report_of_all_attacks_by_name_is_that_of_all(
    three_attacks: Path, tmp_path: Path
) -> None:
    flags = ("--under", three_attacks, "--formats", "md,csv", "--to")
    assert report(*flags, tmp_path / "all") == 0
    names = ("sig", "blended", "lf (5 %)")
    assert report(*flags, tmp_path / "named", "--attacks", *names) == 0
    files = sorted(files_of(tmp_path / "all"))
    assert files == sorted(files_of(tmp_path / "named"))
    for name in files:
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_a_table_that_has_none_of_the_attacks_is_left_out(
    two_attacks: Path, tmp_path: Path
) -> None:
    attack(two_attacks, "lf-0", 0.9, 0.9, model="vgg19_bn")
    flags = ("--under", two_attacks, "--to", tmp_path / "to", "--formats", "md,csv")
    assert report(*flags, "--attacks", "lf") == 0
    text = (tmp_path / "to/table.md").read_text()
    assert text.startswith("**digits, vgg19_bn, pratio 10 %**")
    assert "preactresnet18" not in text
    assert pd.read_csv(tmp_path / "to/runs.csv")["record"].tolist() == ["lf-0"]


def test_some_attacks_cannot_be_kept_nor_take_the_place_of_all(
    kept: Path, three_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No row of a kept grid, and no table of one, is lost; names are those of the rows."""
    before = {name: (kept / name).read_bytes() for name in files_of(kept)}
    to = tmp_path / "to"
    for flags, problem in (
        (["--to", kept, "--keep", "--attacks", "sig"], "--attacks: is not for --keep, which keeps"),
        (["--to", to, "--keep", "--attacks", "sig"], "--attacks: is not for --keep, which keeps"),
        (["--to", kept, "--attacks", "sig"], f"--attacks: {kept} keeps all attacks, and its"),
        (
            ["--to", to, "--attacks", "sig", "lf", "no"],
            "--attacks: lf, no is in no table; give some of blended, lf (5 %), sig\n",
        ),
        (["--to", to, "--attacks", CLEAN], f"--attacks: {CLEAN} is in no table; give some of"),
        (["--to", to, "--attacks", "sig", "sig"], "--attacks: sig is given twice; give it once"),
        (["--to", to, "--attacks"], "argument --attacks: expected at least one argument"),
    ):
        assert report("--under", three_attacks, *flags) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("error:") == error.count("\n") == 1
    assert not to.exists()
    assert {name: (kept / name).read_bytes() for name in files_of(kept)} == before
    assert report("--rebuild", tmp_path / "none.md", "--attacks", "sig") == 2
    assert "--rebuild: takes no other flag" in capsys.readouterr().err


def test_an_empty_folder_or_a_wrong_flag_is_one_line_and_exit_code_2(
    tmp_path: Path, two_attacks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for flags, problem in (
        (["--under", tmp_path / "empty", "--to", tmp_path / "to"], "has no finished record"),
        (["--under", "nothing", "--to", tmp_path / "to"], "--under: nothing is no folder"),
        (["--under", two_attacks, "--to", tmp_path / "file"], "cannot be made"),
        (["--under", two_attacks], "--to: a value is needed"),
        (["--rebuild", tmp_path / "none.md"], "cannot be read"),
        (["--rebuild", tmp_path / "none.md", "--keep"], "takes no other flag"),
        (["--rebuild", tmp_path / "none.md", "--formats", "md"], "takes no other flag"),
        (
            ["--under", two_attacks, "--to", tmp_path / "to", "--formats", "md,pdf"],
            "--formats: pdf is not allowed; give some of md,tex,csv,png,svg,html",
        ),
        (["--under", two_attacks, two_attacks, "--to", tmp_path / "to"], "is given twice"),
    ):
        assert report(*flags) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("error:") == error.count("\n") == 1
    assert not (tmp_path / "to").exists()


def test_latex_is_balanced_and_escaped(two_attacks: Path) -> None:
    attack(two_attacks, "lf-0", 0.9, 0.9, attack=r"50% \input{x} a_b #1 $x^2$ ~ & {", commit="&%")
    text = tables.latex(summarize(read_runs(two_attacks)[0]))
    assert r"50\% \textbackslash{}input\{x\} a\_b \#1 \$x\textasciicircum{}2\$" in text
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    bare = re.sub(r"\\[{}&%$#_\\]", "", "\n".join(lines))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not set("#%") & set(bare)
    for name in ("table*", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])  # type: ignore[index]
    rows = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(rows) == 1 + 3 + 2
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns} == {2 + 3 + 4 + 4}


class Tags(HTMLParser):
    """Collects tags and text; fails if tags do not close each other in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x_y^2$ | a"


def test_texts_of_files_stay_texts_on_the_page(two_attacks: Path, tmp_path: Path) -> None:
    more = {"attack": HOSTILE, "device_name": HOSTILE, "warnings": [HOSTILE], "commit": HOSTILE}
    record = attack(two_attacks, "lf-0", 0.9, 0.9, **more)
    result = defense(record, "sau", 0.9, 0.1, 0.8, **more)
    result.rename(result.with_name("sau-<b>$x$"))
    (record / "config.yaml").write_text(f"name: {json.dumps('</pre>' + HOSTILE)}\n")
    (result.with_name("sau-<b>$x$") / "metrics.csv").write_text(
        f"round,acc,asr,ra,loss_{'$x$'}\n0,0.9,0.9,0.0,1\n1,0.9,7.5,what,1\n"
    )
    flags = ("--formats", "md,html")
    assert report("--under", two_attacks, "--to", tmp_path / "to", *flags) == 0
    tags = Tags((tmp_path / "to/report.html").read_text())
    assert len(tags.all("script")) == 1
    assert not tags.all("b")
    assert all(str(image["src"]).startswith("data:image/webp;") for image in tags.all("img"))
    assert any(HOSTILE in text for text in tags.texts)
    assert any("</pre><script>alert(1)" in text for text in tags.texts)
    markdown = (tmp_path / "to/table.md").read_text()
    assert "<script" not in markdown
    assert r"\| a" in markdown


def test_the_page_needs_nothing_and_its_tables_sort(two_attacks: Path, tmp_path: Path) -> None:
    """Cells have their numbers as they are, for the script, which the page's policy allows."""
    assert report("--under", two_attacks, "--to", tmp_path / "to", "--formats", "html") == 0
    text = (tmp_path / "to/report.html").read_text()
    tags = Tags(text)
    assert not tags.all("link")
    assert not [tag for tag, found in tags.found if "src" in found and tag != "img"]
    assert all(str(link["href"]).startswith("#") for link in tags.all("a"))
    assert "default-src 'none'" in str(tags.all("meta"))
    columns, board = 2 + 3 + 4 + 4, 11
    assert len(tags.all("button")) == columns + board
    cells = [found for found in tags.all("td") if "data-sort" in found]
    assert len(cells) == 4 * (columns - 1) + 2 * (board - 1)
    assert repr((0.9 + 0.94) / 2) in [cell["data-sort"] for cell in cells]
    assert "prefers-color-scheme: dark" in text
    assert len(tags.all("details")) == 1 + 5  # what made the numbers, and five records


def test_the_page_shows_the_pictures_of_a_record_s_analyses(two_attacks: Path) -> None:
    """Those behind a link are not shown."""
    home = two_attacks / "sig-0/analysis/path"
    home.mkdir(parents=True)
    Image.new("L", (8, 8)).save(home / "path.png")
    (two_attacks / "sig-0/analysis/linked").symlink_to(home)
    runs, _ = read_runs(two_attacks)
    tags = Tags(page.render("title", summarize(runs), {}, []))
    assert [image["alt"] for image in tags.all("img")].count("analysis: path") == 1


def test_pictures_are_inlined_up_to_a_size(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    Image.effect_noise((600, 400), 90).save(picture)
    (tmp_path / "linked.png").symlink_to(picture)
    (tmp_path / "junk.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    Image.new("1", (8000, 8000)).save(tmp_path / "huge.png")
    pictures = page.Pictures(150_000)
    shown = pictures.from_file(picture, "curves", width=300)
    assert shown is not None
    assert (shown.width, shown.height) == (300, 200)
    reasons = {}
    for name in ("linked", "junk", "huge"):
        skipped = pictures.from_file(tmp_path / f"{name}.png", name)
        assert skipped is not None
        assert skipped.address == ""
        reasons[name] = skipped.reason
    assert "is a link" in reasons["linked"]
    assert "cannot be read" in reasons["junk"]
    assert "too many pixels" in reasons["huge"]
    full = page.Pictures(1000).from_file(picture, "curves")
    assert full is not None
    assert "the page is large enough" in full.reason
    assert pictures.from_file(tmp_path / "none.png", "none") is None


def kept_lines(grid: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (grid / "runs.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found}


def with_curves(record: Path) -> Path:
    """Gives an attack and its results metrics, of which those of SAU have losses of its own."""
    (record / "metrics.csv").write_text("epoch,loss,seconds,acc,asr,ra\n1,0.25,2.5,0.9,1.0,0.0\n")
    for label, loss in (("ft", "loss"), ("sau", "loss_shared")):
        (record / "defense" / label / "metrics.csv").write_text(
            f"round,acc,asr,ra,seconds,{loss}\n0,0.9,0.95,0.05,0.0,\n"
            f"1,0.30000000000000004,0.1,0.6,1.5,0.1\n"
        )
    return record


@pytest.mark.slow
def test_kept_runs_make_the_same_report_byte_by_byte(two_attacks: Path, tmp_path: Path) -> None:
    """Tables, figures and page; and hold no path of this machine, no weights, no log."""
    sau = with_curves(two_attacks / "sig-0") / "defense/sau"
    (sau / "config.yaml").write_text(
        "record_path: /home/me/record\ndataset_path: /home/me/images\nindex: null\nlr: 0.1\n"
    )
    (sau / "log.txt").write_text("/home/me")
    (sau / "defense_result.pt").write_bytes(b"weights")
    path = two_attacks / "sig-1/summary.json"
    path.write_text(path.read_text().replace('"preactresnet18"', '"/home/me/net.py:build"'))
    assert report("--under", two_attacks, "--to", tmp_path / "before") == 0
    kept = tmp_path / "results/digits"
    assert report("--under", two_attacks, "--to", kept, "--keep") == 0
    names = files_of(kept)
    assert {n for n in names if "figures" not in n} == KEPT_FILES
    assert {Path(name).suffix for name in names if "figures" in name} == {".png"}
    (line,) = [
        ln for ln in kept_lines(kept) if (ln["record"], ln.get("defense")) == ("sig-0", "sau")
    ]
    assert line["summary"] == json.loads((sau / "summary.json").read_text())
    config = {"record_path": None, "dataset_path": "images", "index": None, "lr": 0.1}
    assert line["config"] == config
    assert len(kept_lines(kept)) == 4 + 8 + 1
    for name in ("runs.jsonl", "curves.csv"):
        assert "/home" not in (kept / name).read_text()
    before = {name: (kept / name).read_bytes() for name in names}

    shutil.rmtree(two_attacks)
    assert report("--under", kept, "--to", tmp_path / "after") == 0
    assert files_of(tmp_path / "after") == files_of(tmp_path / "before")
    for name in files_of(tmp_path / "before"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert report("--under", kept, "--to", kept, "--keep", "--formats", "md") == 0
    assert {name: (kept / name).read_bytes() for name in files_of(kept)} == before


def test_curves_are_one_tidy_table(two_attacks: Path, tmp_path: Path) -> None:
    """Each row says whose it is, a cell that a run has no value for is empty, bits stay."""
    with_curves(two_attacks / "sig-0")
    flags = ("--keep", "--formats", "md")
    assert report("--under", two_attacks, "--to", tmp_path / "kept", *flags) == 0
    assert (tmp_path / "kept/curves.csv").read_text() == (
        "record,defense,epoch,round,seconds,acc,asr,ra,loss,loss_shared\n"
        "sig-0,,1,,2.5,0.9,1.0,0.0,0.25,\n"
        "sig-0,ft,,0,0.0,0.9,0.95,0.05,,\n"
        "sig-0,ft,,1,1.5,0.30000000000000004,0.1,0.6,0.1,\n"
        "sig-0,sau,,0,0.0,0.9,0.95,0.05,,\n"
        "sig-0,sau,,1,1.5,0.30000000000000004,0.1,0.6,,0.1\n"
    )
    runs, _ = read_runs(tmp_path / "kept")
    (metrics,) = [r.metrics for r in runs["run"] if r.key == ("sig-0", "sau")]
    assert list(metrics) == ["round", "seconds", "acc", "asr", "ra", "loss_shared"]
    assert metrics["acc"].tolist() == [0.9, 0.30000000000000004]
    assert [r.metrics for r in runs["run"] if r.key == ("sig-1", "sau")] == [None]


def test_runs_of_others_are_added_to_kept_ones(
    two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new attack, and of one that is kept a new result and another of an earlier name."""
    kept, mine = tmp_path / "kept", tmp_path / "mine"
    flags = ("--to", kept, "--keep", "--formats", "md")
    with_curves(two_attacks / "sig-0")
    assert report("--under", two_attacks, *flags) == 0
    before = kept_lines(kept)
    for label in ("clp", "ft", "sau"):
        defense(attack(mine, "sig-0", 0.92, 0.95, 0.05), label, 0.91, 0.05, 0.6)
    with_curves(mine / "sig-0")
    shutil.rmtree(mine / "sig-0/defense/ft")
    defense(attack(mine, "lf-0", 0.9, 0.9), "ft", 0.9, 0.4, 0.5)

    shown = (kept / "runs.jsonl").read_bytes()
    assert report("--under", mine, *flags) == 2  # would lose what is there
    problem = capsys.readouterr().err
    assert "runs.jsonl:1: blended-0 is not among the runs that were read; give --under" in problem
    assert (kept / "runs.jsonl").read_bytes() == shown

    assert report("--under", kept, mine, *flags) == 0
    after = {(line["record"], line.get("defense")): line["summary"] for line in kept_lines(kept)}
    assert len(after) == len(before) + 3
    assert after["sig-0", "sau"]["after"]["acc"] == 0.91
    untouched = [ln for ln in before if (ln["record"], ln.get("defense")) != ("sig-0", "sau")]
    assert all(after[ln["record"], ln.get("defense")] == ln["summary"] for ln in untouched)
    curves = (kept / "curves.csv").read_text()
    assert [curves.count(f"sig-0,{name},") for name in ("", "ft", "sau", "clp")] == [1, 2, 2, 0]
    table = (kept / "table.md").read_text()
    assert "clp" in table
    assert "| lf |" in table

    # A line that was written by hand does the same as a folder.
    by_hand = tmp_path / "by_hand"
    assert report("--under", two_attacks, "--to", by_hand, "--keep", "--formats", "md") == 0
    lines = (by_hand / "runs.jsonl").read_text().splitlines()
    line = json.loads((mine / "lf-0/summary.json").read_text())
    lines.insert(2, json.dumps({"record": "lf-0", "summary": line}))
    (by_hand / "runs.jsonl").write_text("\n".join(lines))
    assert report("--under", by_hand, "--to", by_hand, "--keep", "--formats", "md") == 0
    assert "| lf |" in (by_hand / "table.md").read_text()


def test_two_models_are_no_record(
    two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(tmp_path / "mine", "sig-0", 0.9, 0.9, files={"attack_result.pt": "d" * 64})
    assert report("--under", two_attacks, tmp_path / "mine", "--to", tmp_path / "to") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--under: sig-0 stands for two models" in error
    assert not (tmp_path / "to").exists()


SIG = '{"attack": "sig", "dataset": "digits", "acc": 0.9}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f'{{"record": "x", "summary": {SIG[:-9]}', "is no run (Invalid JSON"),
        ("[1]", "is no run ("),
        ("<<<<<<< HEAD", "is no run (Invalid JSON"),
        ('{"summary": {}}', "is no run (record: Field required)"),
        ('{"record": ["x"], "summary": {}}', "is no run (record: Input should be a valid string)"),
        ('{"record": "", "summary": {}}', "is no run (record: "),
        ('{"record": "x"}', "is no run (summary: Field required)"),
        ('{"record": "x", "summary": [1]}', "is no run (summary: "),
        ('{"record": "x", "summary": {}}', "is no summary of a run (attack: Field required)"),
        (f'{{"record": "x", "summary": {SIG.replace("0.9", "NaN")}}}', "of a run (acc"),
        (f'{{"record": "x", "summary": {SIG.replace("0.9", "9.0")}}}', "of a run (acc"),
        (f'{{"record": "x", "summary": {SIG.replace("acc", "of")}}}', "has no scores"),
        (f'{{"record": "sig-0", "summary": {SIG}}}', "is of the same run as runs.jsonl:"),
        ("[" * 100_000, "is no run (Invalid JSON"),
        ('{"record": 1%s}' % ("0" * 5000), "is no run (Invalid JSON"),
    ],
)
def test_a_broken_line_is_named_and_never_lost(
    kept: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    """The rest is read; and what keeps runs there refuses, so that the line can be mended."""
    lines = (kept / "runs.jsonl").read_text()
    (kept / "runs.jsonl").write_text(f"{lines}\n{line}")
    runs, (problem,) = read_runs(kept)
    assert set(runs["record"]) == {"blended-0", "blended-1", "prototype-0", "sig-0", "sig-1"}
    assert problem.startswith("runs.jsonl:15: ")
    assert reason in problem
    assert "\n" not in problem
    capsys.readouterr()
    assert report("--under", kept, "--to", kept, "--keep", "--formats", "md") == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert "runs.jsonl:15: " in error
    assert (kept / "runs.jsonl").read_text() == f"{lines}\n{line}"


@pytest.mark.parametrize("kind", ["latin", "link", "folder"])
def test_files_of_a_grid_that_cannot_be_read_are_never_lost(
    two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    kept = tmp_path / "kept"
    with_curves(two_attacks / "sig-0")
    assert report("--under", two_attacks, "--to", kept, "--keep", "--formats", "md") == 0
    for name in ("curves.csv", "runs.jsonl"):
        path = kept / name
        before = path.read_bytes()
        path.unlink()
        if kind == "link":
            path.symlink_to(two_attacks / "sig-0/summary.json")
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_bytes(b"record,defense\n\xff\n")
        capsys.readouterr()
        assert report("--under", two_attacks, "--to", kept, "--keep", "--formats", "md") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert name in error
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n", "its first columns are not record and defense"),
        ("record,defense,round,acc\nsig-0,sau,0,0.9,1,1\nx,y,1,2,3,4,5,6\n", "no table"),
        ("record,defense" + ",a" * 10_000, "too many columns"),
        ("", "no table"),
        ("record,defense,round,acc\nsig-0,sau,what,0.9\nsig-0,sau,1,7.5\nsig-0,sau,2", None),
        ("record,defense,acc\nsig-0,sau,0.5\n", "has no column round"),
    ],
)
def test_broken_curves_are_drawn_without(
    kept: Path, caplog: pytest.LogCaptureFixture, text: str, reason: str | None
) -> None:
    (kept / "curves.csv").write_text(text)
    caplog.clear()
    runs, problems = read_runs(kept)
    assert problems == []
    rows = {run.key: run.metrics for run in runs["run"]}
    assert (rows["sig-0", "sau"] is None) == (reason is not None)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (reason is not None)
    assert all("\n" not in text and (reason or "") in text for text in warnings)


def test_curves_of_runs_that_are_not_there_are_not_lost(
    two_attacks: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a copy of a record has its summary alone."""
    (kept / "curves.csv").write_text("record,defense,round,acc\nlf-0,sau,1,0.5\n")
    assert report("--under", two_attacks, "--to", kept, "--keep", "--formats", "md") == 2
    assert "curves.csv: has rows of lf-0/sau, and no run with metrics" in capsys.readouterr().err
    assert "lf-0" in (kept / "curves.csv").read_text()


def test_a_grid_that_is_kept_in_another_one_brings_its_curves(
    two_attacks: Path, tmp_path: Path
) -> None:
    """Its runs are called after its folder, and the rows of its own `curves.csv` are not."""
    with_curves(two_attacks / "sig-0")
    flags = ("--keep", "--formats", "md")
    assert report("--under", two_attacks, "--to", tmp_path / "kept/g", *flags) == 0
    assert report("--under", tmp_path / "kept", "--to", tmp_path / "up", *flags) == 0
    rows = (tmp_path / "kept/g/curves.csv").read_text()
    assert rows.count("\nsig-0,") == 5
    assert (tmp_path / "up/curves.csv").read_text() == rows.replace("\nsig-0,", "\ng/sig-0,")
    runs, _ = read_runs(tmp_path / "kept")
    drawn = {run.key for run in runs["run"] if run.metrics is not None}
    assert drawn == {("g/sig-0", name) for name in (None, "ft", "sau")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("record,defense,round,acc\nlf-0,sau,1,0.5\n", "has rows of lf-0/sau, and no run with"),
        ("record,defense,round,acc\nsig-0,sau,x,0.5\n", "has rows of sig-0/sau, and no run with"),
        ("a,b\n1,2\n", "is no table of curves (its first columns are not record and defense)"),
    ],
)
def test_curves_of_a_grid_that_cannot_be_kept_elsewhere_end_it(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (kept / "curves.csv").write_text(text)
    flags = ("--under", kept, "--to", tmp_path / "up", "--formats", "md")
    assert report(*flags, "--keep") == 2
    assert f"error: {kept / 'curves.csv'}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "up").exists()
    assert report(*flags) == 0


def test_curves_that_are_left_out_are_named(
    two_attacks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of runs for which a later folder has none, and what is too large or a link."""
    copy = Path(shutil.copytree(two_attacks, tmp_path / "copy"))
    with_curves(two_attacks / "sig-0")
    assert [run.metrics is None for run in read_runs(copy, two_attacks)[0]["run"]].count(False) == 3
    _, problems = read_runs(two_attacks, copy)
    assert problems == [
        f"{where}: has curves, and {where}, which is used in its place, has none; left out"
        for where in ("sig-0", "sig-0/defense/ft", "sig-0/defense/sau")
    ]
    metrics = two_attacks / "sig-0/metrics.csv"
    metrics.write_text(metrics.read_text() + "\n" * (5 << 20))
    (copy / "sig-0/metrics.csv").symlink_to(metrics)
    for record, reason in ((two_attacks, "larger than"), (copy, "a link")):
        caplog.clear()
        (run,) = [r for r in read_runs(record)[0]["run"] if r.key == ("sig-0", None)]
        assert run.metrics is None
        assert f"sig-0/metrics.csv: no table (it is {reason}" in caplog.text


def test_grids_under_a_folder_are_read_at_any_depth(two_attacks: Path, tmp_path: Path) -> None:
    """Beside folders of records; each record is called after where it is."""
    flags = ("--keep", "--formats", "md")
    assert report("--under", two_attacks, "--to", tmp_path / "all/a", *flags) == 0
    attack(tmp_path / "all/b", "lf-0", 0.9, 0.9)
    runs, problems = read_runs(tmp_path / "all")
    assert problems == []
    assert {"a/sig-0", "b/lf-0"} < set(runs["record"])
    assert len(runs) == 13 + 1


def test_a_report_inside_the_records_is_not_read_as_records(two_attacks: Path) -> None:
    flags = ("--record_path", two_attacks, "--to", two_attacks / "report", "--keep")
    flags += ("--formats", "md")
    assert report(*flags) == 0
    first = (two_attacks / "report/table.md").read_text()
    assert report(*flags) == 0
    assert (two_attacks / "report/table.md").read_text() == first


def test_what_a_killed_report_was_writing_goes_with_the_next(
    two_attacks: Path, tmp_path: Path
) -> None:
    """Of its own files alone: the folder may be the user's."""
    to = tmp_path / "to"
    ours = (".table.0123abcd.tmp.md", ".table.0123abcd.tmp.tex", "records/r/.x.0123abcd.tmp")
    theirs = ("chapter1.tex", ".chapter1.0123abcd.tmp.tex", ".table.md.swp")
    for name in (*ours, *theirs):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text("half")
    assert report("--under", two_attacks, "--to", to, "--formats", "md,tex") == 0
    assert all((to / name).exists() for name in theirs)
    assert [name for name in ours if (to / name).exists()] == ["records/r/.x.0123abcd.tmp"]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("/home/me/data", "data"),
        ("~/data/", "data"),
        (r"C:\me\data", "data"),
        ("/home/me/net.py:build", "net.py:build"),
        ("data/mine", "data/mine"),
        ({"a": ["/b/c", 1, None]}, {"a": ["c", 1, None]}),
    ],
)
def test_places_are_reduced_to_names(value: object, plain: object) -> None:
    assert without_places(value) == plain


def test_marked_parts_are_made_again(two_attacks: Path, tmp_path: Path) -> None:
    """What is between the marks goes, all else stays; of the figures, those that are shown come."""
    grid = tmp_path / "results/digits"
    assert report("--under", two_attacks, "--to", grid, "--keep") == 0
    table = (grid / "table.md").read_text()
    drawn = {path.name: path for path in (grid / "figures").iterdir()}
    (shown,) = [name for name in drawn if name.endswith("-cost.png")]
    picture = drawn[shown].read_bytes()
    for path in drawn.values():
        path.unlink()
    text = tmp_path / "RESULTS.md"
    begin, end = (f"<!-- {kind} results/digits/table.md -->" for kind in ("begin", "end"))
    rest = f"\n![c](results/digits/figures/{shown})\n![b](docs/{shown[:-9]}-before-after.png)\n"
    rest += f"\nAs good as `{begin}`.\n"
    text.write_text(f"# Results\n\n{begin}\ntyped by hand: 99.9\n{end}\n{rest}")
    (grid / "table.md").write_text("typed by hand")
    assert report("--rebuild", text) == 0
    expected = f"# Results\n\n{begin}\n\n{table}\n{end}\n{rest}"
    assert text.read_text() == expected
    assert (grid / "table.md").read_text() == table
    assert [path.name for path in (grid / "figures").iterdir()] == [shown]
    assert drawn[shown].read_bytes() == picture
    assert report("--rebuild", text) == 0
    assert text.read_text() == expected


def test_a_text_that_is_rebuilt_keeps_its_line_ends_and_stays_a_link(
    two_attacks: Path, tmp_path: Path
) -> None:
    grid = tmp_path / "results/digits"
    assert report("--under", two_attacks, "--to", grid, "--keep", "--formats", "md") == 0
    table = (grid / "table.md").read_text().rstrip("\n").replace("\n", "\r\n")
    begin, end = (f"<!-- {kind} results/digits/table.md -->" for kind in ("begin", "end"))
    (tmp_path / "real").mkdir()
    real, text = tmp_path / "real/text.md", tmp_path / "RESULTS.md"
    rest = "\x0cpage\u2028line\x85no end of the line"
    real.write_bytes(f"{begin}\r\nold\r\n{end}\r\n{rest}".encode())
    text.symlink_to(real)
    assert report("--rebuild", text) == 0
    assert text.is_symlink()
    expected = f"{begin}\r\n\r\n{table}\r\n\r\n{end}\r\n{rest}"
    assert real.read_bytes() == expected.encode()


def test_a_byte_order_mark_is_no_part_of_a_text_and_stays(
    two_attacks: Path, tmp_path: Path
) -> None:
    """As editors on Windows write it: before the text that is rebuilt, and before kept files."""
    grid, text = tmp_path / "results/digits", tmp_path / "RESULTS.md"
    with_curves(two_attacks / "sig-0")
    assert report("--under", two_attacks, "--to", grid, "--keep", "--formats", "md") == 0
    kept = {name: (grid / name).read_bytes() for name in KEPT_FILES}
    for name, content in kept.items():
        (grid / name).write_bytes(b"\xef\xbb\xbf" + content)
    begin, end = (f"<!-- {kind} results/digits/table.md -->" for kind in ("begin", "end"))
    text.write_bytes(f"\ufeff{begin}\nold\n{end}\n".encode())
    assert report("--rebuild", text) == 0
    table = kept["table.md"].decode().rstrip("\n")
    assert text.read_bytes() == f"\ufeff{begin}\n\n{table}\n\n{end}\n".encode()
    assert report("--under", grid, "--to", grid, "--keep", "--formats", "md") == 0
    assert {name: (grid / name).read_bytes() for name in KEPT_FILES} == kept


def test_a_file_in_the_place_of_the_figures_is_told_before_anything_is_written(
    two_attacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    to.mkdir()
    (to / "figures").touch()
    assert report("--under", two_attacks, "--to", to) == 2
    assert "figures cannot be made" in capsys.readouterr().err
    assert [path.name for path in to.iterdir()] == ["figures"]


@pytest.mark.parametrize("flag", ["--to", "--record_path"])
def test_an_empty_path_is_refused(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """That of a shell's variable that is not set: it would be the working directory."""
    assert report(f"{flag}=") == 2
    assert f"{flag}: the path is empty; give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("marks", "problem"),
    [
        (["begin results/x/table.md"], "has no end"),
        (["end results/x/table.md"], "RESULTS.md:1: <!-- end results/x/table.md --> has no other"),
        (["begin a/table.md", "begin b/table.md"], "RESULTS.md:2:"),
        (["begin a/table.md", "end b/table.md"], "RESULTS.md:2:"),
        (["begin ../table.md", "end ../table.md"], "is no table.md or leaderboard.md beside it"),
        (["begin a/secret.md", "end a/secret.md"], "is no table.md or leaderboard.md beside it"),
        (["begin a/table.md", "end a/table.md"], "is no folder"),
    ],
)
def test_wrong_marks_change_nothing(
    tmp_path: Path, marks: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "RESULTS.md"
    text.write_text("".join(f"<!-- {mark} -->\n" for mark in marks))
    before = text.read_text()
    assert report("--rebuild", text) == 2
    assert problem in capsys.readouterr().err
    assert text.read_text() == before


@pytest.mark.parametrize(
    "line",
    [
        "  <!-- begin results/x/table.md -->",
        "<!--begin results/x/table.md-->",
        "<!-- Begin results/x/table.md -->",
        "<!--- begin results/x/table.md -->",
        "<!-- begin  results/x/table.md -->",
        "<!-- begin results/my grid/table.md -->",
        "- <!-- begin results/x/table.md -->",
        "<!-- end -->",
        "<!-- begin results/x/table.md",
    ],
)
def test_a_line_that_looks_like_a_mark_is_told(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its table would stay as it was; comments about something else are none of ours."""
    text = tmp_path / "RESULTS.md"
    text.write_text("<!-- begin of the second part -->\n<!-- the end -->\n")
    assert report("--rebuild", text) == 2
    assert "RESULTS.md has no marks" in capsys.readouterr().err
    text.write_text(f"one\n{line}\ntwo\n")
    assert report("--rebuild", text) == 2
    assert f"RESULTS.md:2: {line.strip()} is no mark; write it alone" in capsys.readouterr().err
    assert text.read_text() == f"one\n{line}\ntwo\n"


@pytest.mark.slow
def test_results_of_this_repository_are_up_to_date(tmp_path: Path) -> None:
    """No number in the tables of pages and of results/ is typed by hand: they come out again."""
    pages = ("RESULTS.md", "README.md", "README_cn.md")
    if not all((ROOT / name).exists() for name in (*pages, "results")):
        pytest.skip("this checkout shows no results")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    texts = {}
    for name in pages:
        text = (ROOT / name).read_text(encoding="utf-8").replace("![", "[")  # draws nothing
        assert "<!-- begin results/" in text, name
        texts[tmp_path / name] = text
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert report("--rebuild", *texts) == 0
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, "make results"
    shipped = sorted((ROOT / "results").rglob("*.md"))
    assert shipped
    for path in shipped:
        assert (tmp_path / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), "make results"


def test_results_are_few_files_and_show_all_their_figures() -> None:
    """Of each grid its runs, curves and tables; figures that no page shows belong into a report."""
    if not (ROOT / "results").is_dir():
        pytest.skip("this checkout shows no results")
    pages = [ROOT / "RESULTS.md", *ROOT.glob("README*.md"), ROOT / "benchmark/README.md"]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    for grid in (ROOT / "results").iterdir():
        files = {name for name in files_of(grid) if not name.startswith("figures")}
        assert files - {"report.html"} == KEPT_FILES
        for figure in (grid / "figures").iterdir():
            assert f"results/{grid.name}/figures/{figure.name}" in text, f"remove {figure}"


@pytest.mark.slow
def test_a_real_record_has_it_all(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gallery, curves, figures in both formats; what is missing is skipped without a word."""
    monkeypatch.setitem(models.CONSTRUCTORS, "preactresnet18", TinyNet)  # with real pictures
    record = trained(workplace, "pictured", monkeypatch)
    assert run_script(ROOT / "defense/ft.py", *defense_flags(workplace, record.name)) == 0
    records, to = tmp_path / "records", tmp_path / "to"
    shutil.copytree(record, records / "x")
    assert report("--under", records, "--to", to) == 0
    stems = {path.stem.rpartition("pratio-25-")[2] for path in (to / "figures").glob("*.png")}
    assert stems == {"before-after", "curves-ft", "cost", "triggers", "heat-asr", "heat-ra"}
    for path in (to / "figures").glob("*.png"):
        assert path.with_suffix(".svg").exists()
        assert Image.open(path).width > 500
    tags = Tags((to / "report.html").read_text())
    alternatives = [image["alt"] for image in tags.all("img")]
    assert {"curves", "trigger", "labels before and after"} < set(alternatives)

    bare = tmp_path / "bare"
    for path in records.rglob("summary.json"):
        target = bare / path.relative_to(records)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert report("--under", bare, "--to", tmp_path / "again") == 0
    assert (tmp_path / "again/table.md").read_bytes() == (to / "table.md").read_bytes()


@pytest.mark.slow
def test_a_gallery_is_not_replaced_by_a_poorer_one(
    workplace: Path, badnet: Path, tmp_path: Path
) -> None:
    """With the tensors of one of two attacks the earlier picture stays, another is not begun."""
    records = tmp_path / "records"
    shutil.copytree(badnet, records / "a")
    facts = json.loads((badnet / "summary.json").read_text())
    (records / "b").mkdir()
    (records / "b/summary.json").write_text(json.dumps(facts | {"attack": "blended"}))
    assert report("--under", records, "--to", tmp_path / "to") == 0
    (picture,) = (tmp_path / "to/figures").glob("*triggers.png")
    picture.write_bytes(b"of both attacks")
    assert report("--under", records, "--to", tmp_path / "to") == 0
    assert picture.read_bytes() == b"of both attacks"
    shutil.rmtree(records / "b")
    assert report("--under", records, "--to", tmp_path / "to") == 0
    assert picture.read_bytes() != b"of both attacks"


def test_the_lowest_panel_of_each_column_has_an_axis_with_numbers() -> None:
    """Of four defenses in two lines, the second and the third have no panel under them."""
    rates = {"acc_before": 0.9, "asr_before": 1.0, "acc": 0.8, "asr": 0.2}
    points = pd.DataFrame([{"defense": d, "attack": "sig", **rates} for d in "abcd"])
    figure = plot.before_after(points, dict.fromkeys("abcd", 2), "title")
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_xlabel() for axis in axes] == ["", *["ASR, percent"] * 3]
    has_numbers = [axis.xaxis.get_tick_params()["labelbottom"] for axis in axes]
    assert has_numbers == [False, True, True, True]


def test_bands_reach_from_the_lowest_to_the_highest_seed() -> None:
    """ACC 90 and 70 in round 2: a mean of 80 and a band from 70 to 90. One seed's round 1 is left
    out, because a mean that changes its seeds jumps."""
    seeds = pd.DataFrame({"round": [0, 1, 2, 0, 2], "acc": [1.0, 0.5, 0.9, 1.0, 0.7]})
    axis = plot.curves_with_bands({"sig": seeds}, "bands").axes[0]
    (line,) = axis.lines
    assert line.get_xdata().tolist() == [0, 2]
    assert line.get_ydata() == pytest.approx([100, 80])
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    assert {round(y) for x, y in corners if x == 2} == {70, 90}


def test_a_method_s_own_bar_is_told_from_its_variants() -> None:
    means = pd.DataFrame({"acc": [0.9, 0.5]}, index=["sau", "sau-beta_2_0"])
    axis = plot.variants(means, means * float("nan"), "sau", "bars").axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([90, 50])
    assert [bar.get_hatch() for bar in axis.patches] == ["//", None]


@pytest.mark.parametrize(
    ("deviations", "told"),
    [
        ([None, None], "bars: percent, one seed"),
        ([None, 0.1], "bars: percent, bars of one standard deviation"),
    ],
)
def test_a_title_names_bars_of_deviations_only_where_there_are_some(
    deviations: list[float | None], told: str
) -> None:
    names = ["sau", "sau-beta_2_0"]
    means = pd.DataFrame({"acc": [0.9, 0.5]}, index=names)
    spread = pd.DataFrame({"acc": deviations}, index=names, dtype=float)
    assert " ".join(plot.variants(means, spread, "sau", "bars").get_suptitle().split()) == told
