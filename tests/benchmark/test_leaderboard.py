"""Leaderboards compare defenses on the same models, and call no tie a win."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark.reporting import leaderboard
from benchmark.reporting.figures import _figures, _relearned
from benchmark.reporting.kept import keep
from benchmark.reporting.leaderboard import Leaderboard, Rank, leaderboards, rank
from benchmark.reporting.means import percent, summarize
from benchmark.reporting.summaries import read_runs
from tests.benchmark.test_report import (
    HOSTILE,
    Tags,
    attack,
    defense,
    files_of,
    numbers,
    report,
    the_table,
    two_attacks,
)
from utils import plot
from utils.errors import UserError
from utils.records.folders import RunFolder

__all__ = ["two_attacks"]  # fixtures


def the_board(root: Path) -> Leaderboard:
    (board,) = leaderboards(the_table(root))
    return board


def ranks_of(board: Leaderboard) -> dict[str, str]:
    return {entry.defense: str(entry.rank or "") for entry in board.entries}


def of_models(
    attacks: Sequence[str], seeds: Sequence[int] | None = None, **der: Sequence[float]
) -> pd.DataFrame:
    """DER of some models, for `rank`; without seeds, all have the same one."""
    index = pd.MultiIndex.from_arrays([list(attacks), list(seeds or [0] * len(attacks))])
    return pd.DataFrame(der, index=index)


def analysed(record: Path, kind: str, **headline: Any) -> None:
    folder = record / "analysis" / kind
    folder.mkdir(parents=True)
    facts = {"analysis": kind.partition("_")[0], "attack": "sig", "headline": headline}
    (folder / "summary.json").write_text(json.dumps(facts))


def test_headlines_of_analyses_are_columns_where_there_are_some(two_attacks: Path) -> None:
    """SAU: blended 0.2 and 0.4, SIG 0.9 once: the mean over attacks is (0.3 + 0.9) / 2 = 0.6."""
    plain = leaderboard.markdown([the_table(two_attacks)])
    assert "re-learned" not in plain
    for name, asr in (("blended-0", 0.2), ("blended-1", 0.4), ("sig-0", 0.9)):
        clean = {"clean model": {"asr_retuned": 0.1}}
        analysed(two_attacks / name, "retune", sau={"asr_retuned": asr}, **clean)
    analysed(two_attacks / "sig-1", "path", sau={"t_half": None}, ft={"t_half": 0.875})
    analysed(two_attacks / "sig-1", "features", sau={"nearest_is_true": 0.5})
    text = leaderboard.markdown([the_table(two_attacks)])
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    last = ["ASR re-learned", "clean model re-learned", "t at ASR 50 %"]
    assert [cell.strip() for cell in head.split("|")][-4:-1] == last
    cells = {line.split("|")[1].strip(" *"): line.split("|")[-4:-1] for line in lines}
    by_defense = {name.partition("<")[0]: cell for name, cell in cells.items()}
    assert [cell.strip() for cell in by_defense["sau"]] == ["60.00", "10.00", ""]
    assert [cell.strip() for cell in by_defense["ft"]] == ["", "", "0.88"]
    assert "Of analyses" in text
    assert "Analysed: 4 of these models (blended, sig)." in text


def test_a_mean_over_some_of_the_analysed_models_says_how_many(two_attacks: Path) -> None:
    """t is a number for FT on one model, and for SAU on two, of two attacks."""
    for name, of_ft in (("blended-0", 0.5), ("sig-0", None)):
        analysed(two_attacks / name, "path", sau={"t_half": 0.25}, ft={"t_half": of_ft})
    text = leaderboard.markdown([the_table(two_attacks)])
    last = {
        row.split("|")[1].strip(" *")[:2]: row.split("|")[-2].strip()
        for row in text.splitlines()
        if row.startswith("|")
    }
    assert last["sa"] == "0.25"
    assert last["ft"] == "0.50 (1 of 2)"


def test_resamples_that_print_the_same_are_ties() -> None:
    """Both print 90.00 and 80.00, though one is always a little better."""
    der = of_models(["sig", "lf"], a=[0.9, 0.8], b=[0.90001, 0.80001])
    assert rank(der, 100) == {"a": Rank(1, 1, 2), "b": Rank(1, 1, 2)}


def test_of_a_collapsed_model_no_analysis_of_its_backdoor_counts(two_attacks: Path) -> None:
    """Of a fourth model, FT has kept 40 of 90 %. What is no backdoor's number stays."""
    defense(attack(two_attacks, "lf-0", 0.9, 1.0), "ft", 0.4, 0.0, 0.3)
    defense(two_attacks / "lf-0", "sau", 0.9, 0.0, 0.8)
    numbers = {"asr_retuned": 0.1, "t_half": 0.2, "asr_reactivated": 0.3, "clean_as_target": 0.4}
    for name in ("lf-0", "sig-0"):
        both = {"ft": numbers | {"similarity": 0.5}, "sau": numbers}
        analysed(two_attacks / name, "path", **both)
    board = the_board(two_attacks)
    ft, sau = sorted(board.entries, key=lambda entry: entry.defense)
    assert {models for _, models in sau.analyses.values()} == {2}
    assert {name: models for name, (_, models) in ft.analyses.items()} == {
        **dict.fromkeys(numbers, 1),
        "similarity": 2,
    }
    kept, _ = read_runs(two_attacks)
    assert kept.dropna(subset=["asr_retuned"])["record"].tolist() == ["lf-0", "sig-0", "sig-0"]


def test_of_how_many_analysed_models_a_control_is(two_attacks: Path) -> None:
    """SAU was analysed on two models, and one has exact purification beside it."""
    exact = {"exact purification": {"asr_retuned": 0.3}}
    analysed(two_attacks / "sig-0", "retune", sau={"asr_retuned": 0.7})
    analysed(two_attacks / "blended-0", "retune", sau={"asr_retuned": 0.7}, **exact)
    assert "| 70.00 | 30.00 (1 of 2) |" in leaderboard.markdown([the_table(two_attacks)])


def test_of_how_many_models_a_mean_is(two_attacks: Path) -> None:
    """Clean models 0 and 1: SAU on both, FT on one. Seconds: of one of SAU's models."""
    for seed, labels in ((0, ("sau",)), (1, ("sau", "ft"))):
        clean = attack(
            *(two_attacks, f"prototype-{seed}", 0.95, None), pratio=None, attack_label_trans=None
        )
        for label in labels:
            result = clean / "defense" / label
            shutil.copytree(two_attacks / "sig-0/defense" / label, result)
            facts = json.loads((result / "summary.json").read_text())
            facts |= {"attack": "prototype", "before": {"acc": 0.95}, "after": {"acc": 0.94}}
            (result / "summary.json").write_text(json.dumps(facts | {"der": None, "seed": seed}))
    path = two_attacks / "sig-0/defense/sau/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"purify_seconds": 20.0}))
    text = leaderboard.markdown([the_table(two_attacks)])
    assert "| 1.00 ± 0.00 | 20 (1 of 4) | clean |" in text
    assert "| 1.00 (1 of 2) |  | clean |" in text


def test_an_attack_that_no_model_is_left_of_is_named(two_attacks: Path) -> None:
    """LF: FT purified one model, SAU another."""
    for seed, label in ((0, "ft"), (1, "sau")):
        defense(attack(two_attacks, f"lf-{seed}", 0.9, 1.0), label, 0.9, 0.0, 0.3)
    board = the_board(two_attacks)
    said = "Not used, since none of their models has all of these defenses: lf."
    assert said in board.notes
    assert board.notes[0].startswith("Attacks: blended, sig.")
    mean = numbers(the_table(two_attacks), "mean of 3 attacks")
    assert ["m" in mean[label, "asr"].flags for label in ("ft", "sau")] == [True, True]


def test_two_recipes_of_an_attack_are_rows_and_no_attacks(two_attacks: Path) -> None:
    for seed in (2, 3):
        record = attack(two_attacks, f"sig-{seed}", 0.9, 1.0, config_sha256="f" * 64)
        for label in ("ft", "sau"):
            defense(record, label, 0.9, 0.1, 0.5)
    table = the_table(two_attacks)
    assert table.main.foot[0].name == "mean of 3 rows, 2 attacks"
    (board,) = leaderboards(table)
    assert "Counted as attacks of their own: sig (sig-2)." in board.notes


def test_what_was_analysed_otherwise_is_no_column(two_attacks: Path, caplog: Any) -> None:
    """With other settings, of another count of images, or of a model that was replaced."""
    analysed(two_attacks / "sig-0", "retune_long", sau={"asr_retuned": 0.9})
    few = {"asr_retuned": 0.8, "poisoned_images": 0}
    analysed(two_attacks / "sig-1", "retune", sau=few)
    assert "re-learned" not in leaderboard.markdown([the_table(two_attacks)])
    exact = {"exact purification": {"asr_retuned": 0.3, "poisoned_images": 5}}
    analysed(two_attacks / "sig-0", "retune", sau={"asr_retuned": 0.7}, **exact)
    text = leaderboard.markdown([the_table(two_attacks)])
    assert "70.00" in text
    assert "exact purification re-learned" in text
    path = two_attacks / "sig-0/defense/sau/summary.json"
    files = {"defense_result.pt": "0" * 64}
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    assert "re-learned" not in leaderboard.markdown([the_table(two_attacks)])
    assert "skipped; it is of another sau than is there now" in caplog.text


def analysed_with(record: Path, config: str, asr: float, **facts: Any) -> None:
    """A retuning of SAU with a configuration."""
    analysed(record, "retune", sau={"asr_retuned": asr})
    folder = record / "analysis/retune"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, **facts}))
    (folder / "config.yaml").write_text(f"clean_record: of-{record.name}\ndefenses: []\n{config}")


def test_analyses_with_other_settings_than_most_are_no_part_of_a_mean(
    two_attacks: Path, tmp_path: Path
) -> None:
    """Three of four, for one of which a later flag is not said: (0.2 + 0.4) / 2 and 0.9. The names
    of clean models do not tell settings apart. The same from what is kept."""
    for name, config, asr in (
        ("blended-0", "lr: 0.1\nlater: 1\n", 0.2),
        ("blended-1", "lr: 0.1\nlater: 1\n", 0.4),
        ("sig-0", "lr: 0.000001\n", 0.0),
        ("sig-1", "lr: 0.1\n", 0.9),
    ):
        analysed_with(two_attacks / name, config, asr)
    kept = RunFolder(tmp_path / "kept")
    kept.path.mkdir()
    keep(read_runs(two_attacks)[0]["run"], kept)
    for place in (two_attacks, kept.path):
        runs, (problem,) = read_runs(place)
        assert problem == (
            "retune of sig-0/sau: made with other settings than most of this table; skipped"
        )
        (table,) = summarize(runs)
        (board,) = leaderboards(table)
        sau = next(entry for entry in board.entries if entry.defense == "sau")
        assert sau.analyses == {"asr_retuned": (pytest.approx(0.6), 3)}


def test_an_analysis_of_other_triggered_images_is_no_column(
    two_attacks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same model: fine-tuning does not see them."""
    path = two_attacks / "sig-0/defense/sau/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"triggers_sha256": "a"}))
    analysed_with(two_attacks / "sig-0", "", 0.2, triggers_sha256="a")
    assert the_table(two_attacks).runs["asr_retuned"].notna().sum() == 1
    path.write_text(path.read_text().replace('"a"', '"b"'))
    assert the_table(two_attacks).runs["asr_retuned"].notna().sum() == 0
    assert "retune: skipped; it looked at other triggered images than sau" in caplog.text


def test_analyses_by_another_commit_or_version_than_most_are_marked(two_attacks: Path) -> None:
    for name, commit, torch in (
        ("blended-0", "a", "2.1"),
        ("blended-1", "a", "2.1"),
        ("sig-0", "b", "2.1"),
    ):
        analysed_with(
            two_attacks / name, "", 0.2, commit=commit, versions={"torch": torch}, device="cpu"
        )
    flags = {entry.defense: entry.flags for entry in the_board(two_attacks).entries}
    assert flags == {"sau": "g", "ft": ""}
    path = two_attacks / "sig-0/analysis/retune/summary.json"
    path.write_text(path.read_text().replace("2.1", "2.2").replace('"b"', '"a"'))
    assert the_board(two_attacks).entries[0].flags == "v"


def test_what_was_learned_again_is_a_heat_map_beside_its_control(two_attacks: Path) -> None:
    """Blended: SAU 0.2 and 0.4, FT not measured, a clean model 0.1 and 0.3."""
    assert "heat-relearned" not in [name for name, *_ in _figures(the_table(two_attacks), True)]
    for name, asr, of_clean in (("blended-0", 0.2, 0.1), ("blended-1", 0.4, 0.3)):
        control = {"clean model": {"asr_retuned": of_clean}}
        analysed(two_attacks / name, "retune", sau={"asr_retuned": asr}, **control)
    table = the_table(two_attacks)
    assert "heat-relearned" in [name for name, *_ in _figures(table, True)]
    values = _relearned(table, table.runs[table.runs["label"].isin(table.labels())])
    assert values.columns.tolist() == ["a clean model", "sau"]
    assert values.index.tolist() == ["blended"]
    assert values.loc["blended"].tolist() == pytest.approx([0.2, 0.3])


def test_attacks_with_one_model_are_named(two_attacks: Path) -> None:
    said = "One model for {}: the intervals do not say what other seeds change there."
    assert "One model" not in leaderboard.markdown([the_table(two_attacks)])
    shutil.rmtree(two_attacks / "sig-1")
    assert said.format("sig") in leaderboard.markdown([the_table(two_attacks)])
    shutil.rmtree(two_attacks / "blended-1")
    assert said.format("each attack") in leaderboard.markdown([the_table(two_attacks)])


def test_headlines_are_kept_with_the_runs(two_attacks: Path, tmp_path: Path) -> None:
    """What is no number of a report, or from behind a link, is not."""
    headline = {"asr_retuned": 0.2, "t_half": 1e9, "other": 3}
    analysed(two_attacks / "sig-0", "retune", sau=headline)
    elsewhere = tmp_path / "elsewhere"
    analysed(elsewhere, "similarity", sau={"similarity": 0.5})
    (two_attacks / "sig-0/analysis/similarity").symlink_to(elsewhere / "analysis/similarity")
    runs, problems = read_runs(two_attacks)
    assert problems == []
    kept = RunFolder(tmp_path / "kept")
    kept.path.mkdir()
    keep(runs["run"], kept)
    lines = [json.loads(line) for line in (kept.path / "runs.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "analyses" in line]
    assert (line["record"], line["defense"]) == ("sig-0", "sau")
    assert line["analyses"] == {"asr_retuned": 0.2}
    again, _ = read_runs(kept.path)
    assert again["asr_retuned"].max() == 0.2


def test_runs_that_could_not_be_read_again_are_not_kept(
    two_attacks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte more than is read, of letters with two bytes, or a wider table."""
    path = two_attacks / "sig-0/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "\u00e9" * 100}))
    runs, _ = read_runs(two_attacks)
    kept = RunFolder(tmp_path / "kept")
    kept.path.mkdir()
    keep(runs["run"], kept)
    texts = [(kept.path / name).read_bytes() for name in ("runs.jsonl", "curves.csv")]
    limits = {"_LARGEST_GRID": max(map(len, texts)), "WIDEST": len(texts[1].partition(b"\n")[0])}
    for name, limit in limits.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"benchmark.reporting.kept.{name}", limit)
            keep(runs["run"], kept)
            patch.setattr(f"benchmark.reporting.kept.{name}", limit - 1)
            with pytest.raises(UserError, match=r"--keep: .* runs are too many for"):
                keep(runs["run"], kept)


def test_means_and_deviations_by_hand(two_attacks: Path) -> None:
    """SAU. Blended, by seed: DER 0.94 and 0.94, ASR 0.1 and 0, RA 0.8, ACC lost 0.02 twice.
    SIG, twice: DER 0.89, ASR 0.15, RA 0.6, ACC lost 0.02. Means over attacks: DER 0.915,
    ASR (0.05 + 0.15) / 2 = 0.1, RA 0.7, ACC lost 0.02. Worst is SIG with 0.15. Of the seeds, the
    ASRs over attacks are 0.125 and 0.075, so the deviation is sqrt(2 * 0.025^2) = 0.0354.

    FT: DER (0.745 + 0.5) / 2 = 0.6225; it gains 0.01 ACC against SIG and loses 0.01 against
    blended, on average 0. Blended's ASR of seed 0 is 0.5 and of seed 1 is 0.4, SIG's 0.95: SIG is
    the worst.

    On the clean model of ACC 0.95, SAU has 0.93 and FT 0.96. SAU took 7 and 9 s against blended,
    and 20 s against one model of SIG, on average (8 + 20) / 2.
    """
    clean = attack(two_attacks, "prototype-0", 0.95, None, pratio=None, attack_label_trans=None)
    for label, acc in (("sau", 0.93), ("ft", 0.96)):
        result = clean / "defense" / label
        shutil.copytree(two_attacks / "sig-0/defense" / label, result)
        facts = json.loads((result / "summary.json").read_text())
        facts |= {"attack": "prototype", "before": {"acc": 0.95}, "after": {"acc": acc}}
        (result / "summary.json").write_text(json.dumps(facts | {"der": None}))
    for seed, seconds in ((0, 7.0), (1, 9.0)):
        record = two_attacks / f"blended-{seed}"
        acc = (0.90, 0.94)[seed] - 0.02
        defense(record, "sau", acc, 0.1 * (1 - seed), 0.8, purify_seconds=seconds)
    path = two_attacks / "sig-0/defense/sau/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"purify_seconds": 20.0}))
    board = the_board(two_attacks)
    assert [entry.defense for entry in board.entries] == ["sau", "ft"]
    sau, ft = board.entries
    assert sau.der.mean == pytest.approx(0.915)
    assert sau.asr.mean == pytest.approx(0.1)
    assert sau.asr.sd == pytest.approx(0.025 * 2**0.5)
    assert (sau.worst_asr, sau.worst_attack) == (pytest.approx(0.15), "sig")
    assert sau.ra is not None
    assert sau.ra.mean == pytest.approx(0.7)
    assert sau.acc_lost.mean == pytest.approx(0.02)
    assert sau.clean_acc_lost is not None
    assert sau.clean_acc_lost.mean == pytest.approx(0.02)
    assert sau.purify_seconds is not None
    assert (sau.purify_seconds.mean, sau.sees) == (14.0, "clean")
    assert ft.der.mean == pytest.approx(0.6225)
    assert (ft.worst_asr, ft.worst_attack) == (pytest.approx(0.95), "sig")
    assert ft.acc_lost.mean == pytest.approx(0)
    assert ft.clean_acc_lost is not None
    assert ft.clean_acc_lost.mean == pytest.approx(-0.01)
    assert ft.purify_seconds is None
    line = "| **sau** | 1 (1 to 1) | 2 | 91.50 ± 0.00 | 10.00 ± 3.54 | 15.00 sig | 70.00 ± 0.00 | "
    line += "2.00 ± 0.00 | 2.00 | 14 (3 of 4) | clean |"
    text = leaderboard.markdown([the_table(two_attacks)])
    assert line in text
    assert "| ft | 2 (2 to 2) | 1 |" in text
    assert " 0.00 ± 0.00 | -1.00 |  | clean |" in text  # no -0.00, and no seconds
    assert "Attacks: blended, sig. Backdoored models: 4." in text
    assert "The attacks are few" in text
    gained = replace(ft, acc_lost=replace(ft.acc_lost, mean=-1e-7))
    assert leaderboard.cells(gained, board)[6].text == "0.00"
    assert "Rank: by mean DER. In brackets: its 95 % interval" in text


def test_equal_defenses_share_a_place_and_every_place_that_they_may_have() -> None:
    """A and B are the same, C is worse: A and B are 1, each from 1 to 2; C is 3."""
    values = [0.9, 0.8, 0.7, 0.95]
    der = of_models("wxyz", a=values, b=values, c=[0.5] * 4)
    c, both = frozenset("c"), frozenset("ab")
    assert rank(der) == {"a": Rank(1, 1, 2, c), "b": Rank(1, 1, 2, c), "c": Rank(3, 3, 3, both)}


def test_a_difference_in_one_attack_is_no_win() -> None:
    """A is better by far in one attack of six, and equal in all others. A resample lacks that
    attack in (5/6)^6 = 33 % of all cases, and then they are equal: B may be first, and does not
    differ from A.

    C is worse in each attack, so in each resample.
    """
    der = of_models("uvwxyz", a=[0.9] * 6, b=[0.5] + [0.9] * 5, c=[0.4] * 6)
    c, both = frozenset("c"), frozenset("ab")
    assert rank(der) == {"a": Rank(1, 1, 2, c), "b": Rank(2, 1, 2, c), "c": Rank(3, 3, 3, both)}


def test_a_seed_is_drawn_for_all_attacks_at_once() -> None:
    """With seed 0, A wins each of forty attacks by 0.4, and with seed 1 it loses each by 0.2. Both
    draws are seed 1 in 1 of 4 resamples, whatever the attacks are, and then B is the first.

    With a draw for each attack, the difference would be 0.1 ± 0.3 / sqrt(80): never under 0. Nor is
    it so if both are the means over seeds, of one seed.
    """
    attacks = [f"{number:02}" for number in range(40)]
    twice = [name for name in attacks for _ in range(2)]
    der = of_models(twice, [0, 1] * 40, a=[0.9, 0.5] * 40, b=[0.5, 0.7] * 40)
    assert rank(der) == {"a": Rank(1, 1, 2), "b": Rank(2, 1, 2)}
    means = of_models(attacks, a=[0.7] * 40, b=[0.6] * 40)
    assert rank(means) == {"a": Rank(1, 1, 1, frozenset("b")), "b": Rank(2, 2, 2, frozenset("a"))}


def test_an_attack_that_has_none_of_the_drawn_seeds_keeps_its_own() -> None:
    """Ten attacks, each with another seed: as many are drawn as there are, so it is as with one
    seed. A wins nine by 0.1 and loses one by 0.2. B is the first if that one is drawn four times or
    more: of a binomial distribution (10, 1/10), in 1.3 % of the resamples.

    If attacks without a drawn seed were left out, it would be 6.4 %: 6.5 draws would be left.
    """
    der = of_models("qrstuvwxyz", range(10), a=[0.8] * 10, b=[0.7] * 9 + [1.0])
    assert rank(der) == {"a": Rank(1, 1, 1, frozenset("b")), "b": Rank(2, 2, 2, frozenset("a"))}


def test_defenses_whose_intervals_overlap_may_differ() -> None:
    """A is above B by 0.1 in each attack, so in each resample. C is 1 in two of four attacks and 0
    in the others: in 1 of 16 resamples each, its mean is 1, and it is the first, or 0, the last.
    """
    der = of_models("wxyz", a=[0.55] * 4, b=[0.45] * 4, c=[1.0, 1.0, 0.0, 0.0])
    assert rank(der) == {
        "a": Rank(1, 1, 2, frozenset("b")),
        "b": Rank(3, 2, 3, frozenset("a")),
        "c": Rank(2, 1, 3),
    }


def test_what_differs_from_none_above_it_may_be_the_first(tmp_path: Path) -> None:
    """DER of four attacks. A: 1 and 0.5, twice each; B: the other way round; C: always 0.74; D:
    always 0.73. The means of A and B are 0.75, and their sum is 1.5 in each resample, so one of
    them is above C. But each is below C in 5 of 16 resamples. So C does not differ from either,
    and may be the first, although its interval begins with 2. D differs from C.
    """
    for index, name in enumerate(("badnet", "blended", "lf", "sig")):
        record = attack(tmp_path, f"{name}-0", 0.9, 1.0)
        ders = {"a": (1.0, 0.5)[index % 2], "b": (0.5, 1.0)[index % 2], "c": 0.74, "d": 0.73}
        for label, der in ders.items():
            defense(record, label, 0.9, 2 - 2 * der, 0.5)
    board = the_board(tmp_path)
    assert [(str(e.rank), e.defense, e.differs_from, e.is_first) for e in board.entries] == [
        ("1 (1 to 4)", "a", "none", True),
        ("1 (1 to 4)", "b", "none", True),
        ("3 (2 to 3)", "c", "4", True),
        ("4 (3 to 4)", "d", "3", False),
    ]
    text = leaderboard.markdown([the_table(tmp_path)])
    assert "| **c**<sup>s</sup> | 3 (2 to 3) | 4 | 74.00 |" in text
    assert "it is not corrected for many pairs" in text
    assert [leaderboard.cells(e, board)[1].sort for e in board.entries] == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("differs", "text"),
    [
        ("", "none"),
        ("bdefg", "1, 4 to 7"),
        ("bdef", "1, 4, 6"),
        ("bdfg", "1, 4 (d), 6, 7"),
        ("cg", "2 (c), 7"),
    ],
)
def test_ranks_of_those_that_differ(differs: str, text: str) -> None:
    """Of X, whose rank is 2: B is 1, C has 2 as well, D and E share 4, F is 6 and G is 7."""
    places = {"b": 1, "c": 2, "d": 4, "e": 4, "f": 6, "g": 7}
    ranks = {name: Rank(place, 1, 7) for name, place in places.items()}
    ranks["x"] = Rank(2, 1, 7, frozenset(differs))
    assert leaderboard.differing("x", ranks) == text


def test_a_model_without_a_seed_shares_its_draws_with_no_other(
    two_attacks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[pd.DataFrame] = []
    monkeypatch.setattr(leaderboard, "rank", lambda der: made.append(der) or rank(der, 10))
    for name in ("lf-0", "bpp-0"):
        record = attack(two_attacks, name, 0.9, 1.0, seed=None)
        for label in ("ft", "sau"):
            defense(record, label, 0.9, 0.0, 0.8)
    leaderboards(the_table(two_attacks))
    seeds = made[0].index.get_level_values(1)
    assert seeds.tolist() == [0, 1, "bpp-0", "lf-0", 0, 1]


def test_an_attack_counts_as_much_as_another_whatever_its_seeds() -> None:
    """B wins X with four seeds by 0.1; A wins Y with its one seed by 0.2: A is first."""
    der = of_models("xxxxy", [0, 1, 2, 3, 0], a=[0.8] * 5, b=[0.9] * 4 + [0.6])
    places = rank(der)
    assert (places["a"].place, places["b"].place) == (1, 2)


def test_resamples_are_those_of_attacks_crossed_with_seeds() -> None:
    """Interval and differences are what drawing one by one gives.

    Sixty defenses with DERs that depend on the attack and the seed; of 4 seeds, no attack has all.
    By 2,000 slow draws, the middle one's interval differs by at most 2 places from the fast one.
    It differs from the same defenses, but for those whose slow share is within 1.5 points of
    97.5 %: four standard errors of it.
    """
    generator = np.random.default_rng(3)
    seeds_of = [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    models = [(attack, seed) for attack, seeds in enumerate(seeds_of) for seed in seeds]
    of_attack, of_seed = generator.uniform(size=(5, 60)), generator.uniform(size=(4, 60))
    noise = generator.uniform(size=(len(models), 60)) / 5
    level = np.linspace(0, 0.8, 60)
    values = (
        np.array([of_attack[a] + 4 * of_seed[s] for a, s in models]) / 8 + noise + level / 2
    ) / 2
    der = pd.DataFrame(values, pd.MultiIndex.from_tuples(models), [str(i) for i in range(60)])
    all_means = []
    for _ in range(2000):
        drawn = generator.integers(4, size=4)
        of_drawn = []
        for a in generator.integers(5, size=5):
            own = [values[models.index((a, s))] for s in drawn if s in seeds_of[a]]
            own = own or [values[models.index((a, s))] for s in seeds_of[a]]
            of_drawn.append(np.mean(own, axis=0))
        all_means.append(np.mean(of_drawn, axis=0))
    means = np.array(all_means)
    places = (means > means[:, 30:31]).sum(axis=1) + 1
    low, high = np.quantile(places, [0.025, 0.975])
    fast = rank(der)["30"]
    assert fast.low is not None
    assert fast.high is not None
    assert abs(fast.low - low) <= 2
    assert abs(fast.high - high) <= 2
    assert high - low > 10
    middle = means[:, 30:31]
    share = np.maximum((means > middle).mean(axis=0), (means < middle).mean(axis=0))
    sure = {str(i) for i in range(60) if share[i] > 0.99}
    unsure = {str(i) for i in range(60) if 0.96 <= share[i] <= 0.99}
    assert len(sure) > 10
    assert sure <= fast.differs <= sure | unsure


def test_what_was_not_run_on_the_same_attacks_is_not_compared(two_attacks: Path) -> None:
    """CLP and FT were run on blended alone, so there is a board of SAU and ABL on both attacks, and
    one of all four on blended. On SIG, FT would be far worse than CLP is on blended.
    """
    for seed in (0, 1):
        shutil.rmtree(two_attacks / f"sig-{seed}/defense/ft")
        defense(two_attacks / f"blended-{seed}", "clp", 0.9, 0.3, 0.5)
        for name in ("blended", "sig"):
            defense(two_attacks / f"{name}-{seed}", "abl", 0.9, 0.9, 0.1)
    both, blended = leaderboards(the_table(two_attacks))
    assert [entry.defense for entry in both.entries] == ["sau", "abl"]
    assert "Not run on all of these attacks: clp, ft." in both.notes
    assert [entry.defense for entry in blended.entries] == ["sau", "clp", "ft", "abl"]
    assert blended.notes[0] == "Attacks: blended. Backdoored models: 2."
    # One attack says nothing about others.
    assert ranks_of(blended) == {"sau": "1", "clp": "2", "ft": "3", "abl": "4"}
    assert not any(entry.is_first for entry in blended.entries)
    assert any("no interval" in note for note in blended.notes)


def test_defenses_that_share_no_model_of_an_attack_are_compared_once(two_attacks: Path) -> None:
    """SAU has SIG with seed 0 and FT with seed 1; ABL was run on blended alone."""
    shutil.rmtree(two_attacks / "sig-0/defense/ft")
    shutil.rmtree(two_attacks / "sig-1/defense/sau")
    for seed in (0, 1):
        defense(two_attacks / f"blended-{seed}", "abl", 0.9, 0.9, 0.1)
    board = the_board(two_attacks)
    assert {entry.defense for entry in board.entries} == {"sau", "ft", "abl"}
    assert board.notes[0] == "Attacks: blended. Backdoored models: 2."
    assert not any(note.startswith("Not run on") for note in board.notes)


def test_places_are_those_of_the_numbers_that_are_printed() -> None:
    """0.99985 and 0.9998 print as 99.98 or 99.99, as Python rounds them; NumPy rounds otherwise."""
    for low in range(9000, 10000):
        pair = [low / 20000 + 0.5, (low + 1) / 20000 + 0.5]
        ranks = rank(of_models("x", a=pair[:1], b=pair[1:]))
        is_equal = f"{percent(pair[0]):.2f}" == f"{percent(pair[1]):.2f}"
        assert (ranks["a"].place, ranks["b"].place) == ((1, 1) if is_equal else (2, 1))


def test_seeds_that_one_defense_lacks_are_not_used(two_attacks: Path) -> None:
    """SAU's run on blended, seed 1, is gone, so FT's DER there, which is 0.03, is not used."""
    shutil.rmtree(two_attacks / "blended-1/defense/sau")
    defense(two_attacks / "blended-1", "ft", 0.0, 0.9, 0.0)
    board = the_board(two_attacks)
    ft = board.entries[1]
    assert ft.der.mean == pytest.approx(0.6225)
    assert board.notes[0] == "Attacks: blended, sig. Backdoored models: 3."
    assert "Not used, since some of these defenses lack their models: 1 run." in board.notes


def test_one_defense_alone_has_no_rank_and_none_has_no_board(two_attacks: Path) -> None:
    for path in two_attacks.glob("*/defense/ft"):
        shutil.rmtree(path)
    assert ranks_of(the_board(two_attacks)) == {"sau": ""}
    assert "Rank:" not in leaderboard.markdown([the_table(two_attacks)])
    for path in two_attacks.glob("sig-*/defense/sau"):
        path.rename(path.with_name("ft"))
    assert leaderboards(the_table(two_attacks)) == []
    assert "nothing to compare" in leaderboard.markdown([the_table(two_attacks)])


def test_what_sees_poisoned_images_has_no_rank(two_attacks: Path) -> None:
    """EP is the best by DER, stands first, and wins nothing. CLP sees nothing, and competes."""
    for folder in (*two_attacks.glob("blended-*"), *two_attacks.glob("sig-*")):
        acc = json.loads((folder / "summary.json").read_text())["acc"]
        defense(folder, "ep", acc, 0.0, 0.9, sees="poisoned")
        defense(folder, "clp", acc, 0.01, 0.9, sees="nothing")
    board = the_board(two_attacks)
    found = [
        (entry.defense, str(entry.rank), entry.is_first, entry.sees) for entry in board.entries
    ]
    assert found == [
        ("ep", "None", False, "poisoned"),
        ("clp", "1 (1 to 1)", True, "nothing"),
        ("sau", "2 (2 to 2)", False, "clean"),
        ("ft", "3 (3 to 3)", False, "clean"),
    ]
    assert [entry.flags for entry in board.entries] == ["p", "n", "", ""]


def test_models_whose_attack_failed_are_not_used(two_attacks: Path) -> None:
    """LF failed, and one model of SIG: nothing changes but a sentence, and SIG's second model."""
    before = the_board(two_attacks)
    lf = attack(two_attacks, "lf-0", 0.92, 0.3, 0.5)
    sig = attack(two_attacks, "sig-2", 0.92, 0.49, 0.5)
    for label in ("ft", "sau"):
        defense(lf, label, 0.5, 0.0, 0.8)
        defense(sig, label, 0.4, 0.0, 0.8)  # it collapsed there, which does not count either
    after = the_board(two_attacks)
    assert after.entries == before.entries
    (note,) = (note for note in after.notes if note not in before.notes)
    assert note.startswith("Not used, since the attack failed (ASR under 50 %")
    assert note.endswith(": lf (1), sig (1).")


def test_if_all_attacks_failed_nobody_wins(two_attacks: Path) -> None:
    shutil.rmtree(two_attacks)
    for name in ("lf-0", "sig-0"):
        failed = attack(two_attacks, name, 0.92, 0.3, 0.5)
        defense(failed, "ft", 0.9, 0.3, 0.5)
        defense(failed, "sau", 0.9, 0.0, 0.8)
    board = the_board(two_attacks)
    assert [(e.defense, e.flags, e.is_first) for e in board.entries] == [
        ("sau", "as", False),
        ("ft", "as", False),
    ]
    assert not any("attack failed" in note for note in board.notes)


def test_a_collapsed_defense_wins_nothing(two_attacks: Path) -> None:
    assert [entry.is_first for entry in the_board(two_attacks).entries] == [True, False]
    for seed in (0, 1):
        defense(two_attacks / f"sig-{seed}", "sau", 0.4, 0.0, 0.4)
    collapsed = the_board(two_attacks)
    assert [(e.defense, e.flags, e.is_first) for e in collapsed.entries] == [
        ("sau", "c", False),
        ("ft", "", False),
    ]


def test_rows_in_the_columns_of_backdoorbench(two_attacks: Path, tmp_path: Path) -> None:
    """A row for each attack and result, means over seeds: blended before has 0.92, 0.95, 0.04."""
    assert report("--under", two_attacks, "--to", tmp_path / "to", "--formats", "csv") == 0
    rows = pd.read_csv(tmp_path / "to/backdoorbench.csv")
    columns = "dataset,backbone,attack,defense,pratio,test_acc,test_asr,test_ra"
    assert ",".join(rows.columns) == columns
    first = rows[(rows["attack"] == "blended") & (rows["defense"] == "no defense")]
    names = ["digits", "preactresnet18", "blended", "no defense", 0.1]
    assert first.to_numpy().tolist() == [[*names, *map(pytest.approx, (0.92, 0.95, 0.04))]]
    assert len(rows) == 2 * 3
    assert rows["attack"].unique().tolist() == ["blended", "sig"]

    attack(two_attacks, "blended-2", 0.5, 0.6, train_images=100)  # of another table: no repeat
    assert report("--under", two_attacks, "--to", tmp_path / "to", "--formats", "csv") == 0
    rows = pd.read_csv(tmp_path / "to/backdoorbench.csv")
    undefended = rows[(rows["attack"] == "blended") & (rows["defense"] == "no defense")]
    assert sorted(undefended["test_acc"]) == [0.5, pytest.approx(0.92)]
    # What tells the two apart follows, and nothing else.
    assert ",".join(rows.columns) == f"{columns},train_images"
    assert sorted(undefended["train_images"]) == [100, 50_000]


def test_a_report_has_leaderboards_and_heat_maps(two_attacks: Path, tmp_path: Path) -> None:
    """Kept runs make the same leaderboard.md; --rebuild puts it between marks that name it."""
    kept = tmp_path / "results/digits"
    assert report("--under", two_attacks, "--to", kept, "--keep") == 0
    text = (kept / "leaderboard.md").read_text()
    assert text == leaderboard.markdown([the_table(two_attacks)])
    stem = "figures/digits-preactresnet18-pratio-10-heat"
    assert {f"{stem}-asr.png", f"{stem}-ra.png"} <= files_of(kept)
    begin, end = (f"<!-- {kind} results/digits/leaderboard.md -->" for kind in ("begin", "end"))
    (tmp_path / "RESULTS.md").write_text(f"{begin}\ntyped by hand\n{end}\n")
    (kept / "leaderboard.md").write_text("typed by hand")
    assert report("--rebuild", tmp_path / "RESULTS.md") == 0
    assert (tmp_path / "RESULTS.md").read_text() == f"{begin}\n\n{text}\n{end}\n"
    assert (kept / "leaderboard.md").read_text() == text


def test_names_stay_texts(two_attacks: Path, tmp_path: Path) -> None:
    record = attack(two_attacks, "lf-0", 0.9, 0.9, attack=HOSTILE)
    for label in ("sau", "ft"):
        defense(record, label, 0.9, 0.8, 0.1)
    for path in list(two_attacks.glob("*/defense/ft")):
        path.rename(path.with_name("=ft <b>"))
    assert report("--under", two_attacks, "--to", tmp_path / "to") == 0
    text = (tmp_path / "to/leaderboard.md").read_text()
    assert "<script" not in text
    assert "=ft &lt;b&gt;" in text
    assert "'=ft" in (tmp_path / "to/backdoorbench.csv").read_text()
    assert not Tags((tmp_path / "to/report.html").read_text()).all("b")


def test_a_heat_map_is_darker_where_less_is_left_and_has_its_numbers() -> None:
    """In grey too: the lightness of 0, 50 and 100 % goes up by at least 60 of 255 each time."""
    values = pd.DataFrame({"ft": [0.0, 0.5], "sau": [1.0, float("nan")]}, index=["badnet", "sig"])
    figure = plot.heat_map(values, "title")
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.0", "100.0", "50.0"]
    (picture,) = axis.get_images()
    colours = picture.cmap(picture.norm([0, 50, 100]), bytes=True)[None, :, :3]
    grey = np.asarray(Image.fromarray(colours).convert("L"), dtype=int)[0]
    assert (np.diff(grey) > 60).all(), grey


class Browser:
    """A headless Chromium, spoken to through a pipe: JSON messages that end with a zero byte.

    `problems` has each exception, error in the console, and refusal by the page's policy.
    """

    def __init__(self, program: str, home: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The browser reads its descriptor 3 and writes 4; first they are moved out of the way.
        script = 'exec 8<&"$1" 9>&"$2"; exec 3<&8 4>&9; shift 2; exec "$@"'
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        flags += ("--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={home}")
        command = ["bash", "-c", script, "-", str(to_read), str(to_write), program, *flags]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdin=quiet, stdout=quiet, stderr=quiet
        )
        os.close(to_read)
        os.close(to_write)
        self._received = b""
        self._count = 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._received += data
        first, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        method, parameters = message.get("method", ""), message.get("params", {})
        is_bad = parameters.get("type") in ("error", "warning", "assert")
        is_bad |= parameters.get("entry", {}).get("level") in ("error", "warning")
        if method == "Runtime.exceptionThrown" or (
            method in ("Runtime.consoleAPICalled", "Log.entryAdded") and is_bad
        ):
            self.problems.append(first.decode())
        return message

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.as_uri())
        while self.value("document.readyState") != "complete":
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript has as its value."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def press(self, x: float, y: float) -> None:
        """Presses and releases the left button of the mouse at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))


@pytest.fixture
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        opened = Browser(program, Path(home))
        yield opened
        opened.close()


FIRST_ROWS = "[...document.querySelectorAll('.board tbody tr')].map(r => r.cells[0].dataset.sort)"


@pytest.mark.slow
def test_the_page_works_in_a_real_browser(
    two_attacks: Path, tmp_path: Path, browser: Browser
) -> None:
    """No error; clicks sort, both ways, empty cells last; nothing but tables is wider than the
    window, letters are at least 12 px, and the defense's name stays in view when a table scrolls.

    DER: SAU 91.5, FT 62.25, NC 50. Names: FT, NC, SAU. Seconds: NC 120, SAU 7, FT none.
    """
    for folder in (*two_attacks.glob("blended-*"), *two_attacks.glob("sig-*")):
        before = json.loads((folder / "summary.json").read_text())
        defense(
            folder, "nc", before["acc"], before["asr"], 0.0, purify_seconds=120.0, sees="nothing"
        )
        path = folder / "defense/sau/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"purify_seconds": 7.0}))
    assert report("--under", two_attacks, "--to", tmp_path / "to") == 0
    browser.resize(1400)
    browser.open(tmp_path / "to/report.html")
    assert browser.value(FIRST_ROWS) == ["sau", "ft", "nc"]

    def click(heading: str) -> list[str]:
        box = browser.value(
            f"(b => {{ b.scrollIntoView({{block: 'center'}}); const r = b.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })([...document.querySelectorAll("
            f"'.board thead button')].find(b => b.textContent === '{heading}'))"
        )
        browser.press(*box)
        rows: list[str] = browser.value(FIRST_ROWS)
        return rows

    assert click("DER") == ["nc", "ft", "sau"]
    assert click("DER") == ["sau", "ft", "nc"]
    assert click("defense") == ["ft", "nc", "sau"]
    assert click("defense") == ["sau", "nc", "ft"]
    assert click("purify seconds") == ["sau", "nc", "ft"]
    assert click("purify seconds") == ["nc", "sau", "ft"]
    assert click("rank") == ["sau", "ft", "nc"]
    assert click("sees") == ["sau", "ft", "nc"]
    assert click("sees") == ["nc", "sau", "ft"]
    assert click("rank") == ["sau", "ft", "nc"]
    sorted_by = "[...document.querySelectorAll('.board [aria-sort]')].map(h => h.textContent)"
    assert browser.value(sorted_by) == ["rank"]
    for width in (1400, 390):
        browser.resize(width)
        assert browser.value("innerWidth") == width
        assert browser.value("document.documentElement.scrollWidth") <= width
        smallest = "Math.min(...[...document.querySelectorAll('td, th, p, li, small')]"
        smallest += ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        assert browser.value(smallest) >= 12
        browser.value("document.querySelector('.board').scrollIntoView()")
        table = "document.querySelector('.board')"
        browser.value(f"{table}.parentElement.scrollLeft = 1000")
        left = browser.value(f"{table}.tBodies[0].rows[0].cells[0].getBoundingClientRect().left")
        assert 0 <= left < 60
        is_wider = browser.value(f"{table}.scrollWidth > {table}.parentElement.clientWidth")
        assert is_wider == (width == 390)
        browser.picture(tmp_path / f"{width}.png")
        assert Image.open(tmp_path / f"{width}.png").width == width
    assert browser.problems == []
