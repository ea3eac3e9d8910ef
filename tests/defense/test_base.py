"""The pipeline of defenses: what it says, and what a run leaves."""

import copy
import json
import logging
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from defense import anp, base, clp, ep, ft
from defense.base import Given, comparison, seen_images
from utils import plot
from utils.data.batches import spread
from utils.data.labelled import Dataset, Triggered
from utils.data.poison import PoisonedSet
from utils.errors import NothingToDo, UserError
from utils.metrics import Rate, Scores, defense_effectiveness_rating
from utils.process.script import _Stop
from utils.process.seeds import generator
from utils.records.defense import load_defense
from utils.records.folders import RunFolder
from utils.records.named import dataset_of_record, named_record
from utils.records.network import model_state
from utils.tensors import load_tensors
from utils.training import ending
from utils.training.evaluate import evaluate
from utils.training.findings import Findings, Picture, Verdict
from utils.training.watch import Watch


def scores(acc: int, asr: int | None = None) -> Scores:
    """In tenths of a percent."""
    return Scores(Rate(acc, 1000), None if asr is None else Rate(asr, 1000))


def given(labels: list[int]) -> Given:
    """Images that are nothing, with labels that are something."""
    count = len(labels)
    return Given(torch.arange(count), torch.zeros(count, 3, 8, 8), torch.tensor(labels))


# warnings


def test_more_than_ten_points_of_acc_are_too_many() -> None:
    (warning,) = base._result_warnings(scores(900), scores(799), "do this")
    assert warning == ("the defense cost more than 10 points of ACC (90.00 % -> 79.90 %); do this")


@pytest.mark.parametrize("after", [801, 900, 999])
def test_fewer_points_of_acc_are_not(after: int) -> None:
    assert base._result_warnings(scores(900), scores(after), "do this") == []


def test_exactly_ten_points_of_acc_are_not() -> None:
    """From 10 % to nothing, which is a tenth in binary, too."""
    assert base._result_warnings(scores(100), scores(0), "do this") == []


def test_an_attack_had_failed_where_asr_was_under_a_half() -> None:
    (warning,) = base._result_warnings(scores(900, 499), scores(900, 0), "do this")
    assert warning == (
        "the attack had failed before (ASR 49.90 %), so this says little of the defense"
    )
    assert base._result_warnings(scores(900, 500), scores(900, 0), "do this") == []


def test_both_warnings_may_be_given() -> None:
    assert len(base._result_warnings(scores(900, 100), scores(100, 100), "do this")) == 2


def test_lacking_classes_are_named(tiny_data: Dataset) -> None:
    findings = Findings()
    base._warn_of_classes(given([1, 1, 1]), tiny_data, findings)
    base._warn_of_classes(given([1, 1, 1]), tiny_data, findings, has_index=True)
    said = "the clean subset lacks 2 of 3 classes (ant, cat)"
    assert findings.warnings == [f"{said}; raise --ratio", f"{said}; add some of them to --index"]


def test_ten_lacking_classes_are_named_at_most(tiny_data: Dataset) -> None:
    findings = Findings()
    data = replace(tiny_data, classes=tuple("abcdefghijklm"))
    base._warn_of_classes(given([0]), data, findings)
    assert findings.warnings == [
        "the clean subset lacks 12 of 13 classes (b, c, d, e, f, g, h, i, j, k); raise --ratio"
    ]


def test_no_class_is_lacking_where_each_has_an_image(tiny_data: Dataset) -> None:
    findings = Findings()
    base._warn_of_classes(given([2, 0, 1]), tiny_data, findings)
    assert findings.warnings == []


# lines


def test_the_table_at_the_end() -> None:
    """Right-aligned columns of 24 characters."""
    before = Scores(Rate(9, 10), Rate(4, 5), Rate(1, 5))
    after = Scores(Rate(8, 10), Rate(0, 5), Rate(3, 5))
    assert comparison(before, after, 0.8512).splitlines() == [
        "                      before                   after",
        "ACC           90.00 % (9/10)          80.00 % (8/10)",
        "ASR            80.00 % (4/5)            0.00 % (0/5)",
        "RA             20.00 % (1/5)           60.00 % (3/5)",
        "DER                                          85.12 %",
    ]


def test_the_table_without_a_trigger_has_acc_alone() -> None:
    lines = comparison(scores(900), scores(800), None).splitlines()
    assert [line.split()[0] for line in lines] == ["before", "ACC"]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (clp.Config.load("digits"), "sees no images"),
        (anp.Config.load("digits"), "2 clean images of 12"),
        (ep.Config.load("digits"), "2 of the 12 images of the poisoned training set"),
    ],
)
def test_a_line_says_what_is_given(config: Any, line: str, tiny_data: Dataset) -> None:
    assert base._said_of(given([0, 1]), config, tiny_data) == line


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        ((True, (1, 2), True, True), "verdict: backdoored, target 1 (bee), 2 (cat); right"),
        (
            (True, (1,), True, False),
            "verdict: backdoored, target 1 (bee); right, but the target is another class",
        ),
        ((True, (0,), False, None), "verdict: backdoored, target 0 (ant); wrong"),
        ((True, (0,), None, None), "verdict: backdoored, target 0 (ant); the record does not tell"),
        ((False, (), True, None), "verdict: no backdoor found; right"),
        ((False, (), False, False), "verdict: no backdoor found; wrong"),
    ],
)
def test_a_line_says_the_verdict(verdict: tuple[Any, ...], line: str, tiny_data: Dataset) -> None:
    names = ("is_backdoored", "targets", "is_right", "target_found")
    assert base._said_of_verdict(dict(zip(names, verdict, strict=True)), tiny_data) == line


def test_of_an_attack_that_had_failed_a_verdict_is_not_called_right(tiny_data: Dataset) -> None:
    verdict = {"is_backdoored": True, "targets": (1,), "is_right": None, "target_found": None}
    line = "verdict: backdoored, target 1 (bee); the attack had failed, so it is neither right nor "
    assert base._said_of_verdict(verdict, tiny_data, attack_failed=True) == f"{line}wrong"


# the record


def test_a_record_is_needed() -> None:
    with pytest.raises(UserError, match="--result_file: a value is needed"):
        named_record(None, None)


def test_a_record_is_looked_for_in_the_checkout_without_a_path() -> None:
    with pytest.raises(UserError, match=r"--result_file: no_such is no record in \S+/record; "):
        named_record("no_such", None)


def test_a_record_is_looked_for_under_the_record_path(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert named_record("x", str(tmp_path)) == tmp_path / "x"


def test_without_a_record_no_dataset_s_values_apply() -> None:
    assert dataset_of_record({}) is None
    assert dataset_of_record({"result_file": None}) is None


def test_the_dataset_is_the_record_s(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text("dataset: digits\n")
    values = {"result_file": "x", "record_path": str(tmp_path)}
    assert dataset_of_record(values) == "digits"


# before_after.png


@pytest.mark.parametrize(
    ("count", "positions"),
    [(3, [0, 1, 2]), (8, [*range(8)]), (15, [*range(0, 15, 2)]), (1, [0])],
)
def test_up_to_eight_positions_are_spread_evenly(count: int, positions: list[int]) -> None:
    assert spread(count, 8).tolist() == positions


def test_the_script_of_a_defense_is_named_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` gives what the flags and the record's dataset say, the file's name and the method."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text("dataset: digits\n")
    flags = ["--lr", "3", "--result_file", "x", "--record_path", str(tmp_path)]
    seen: list[Any] = []
    monkeypatch.setattr(base, "run_script", lambda main: main())
    monkeypatch.setattr(base, "defend", lambda *given: seen.append(given))
    modules = {ft.__name__: ft}
    monkeypatch.setattr(base, "sys", SimpleNamespace(modules=modules, argv=["ft.py", *flags]))
    base.run(ft.Config, ft.purify)
    ((config, name, purify),) = seen
    assert (config.lr, name, purify) == (3, "ft", ft.purify)
    assert config.batch_size == ft.Config.load("digits").batch_size != ft.Config.load().batch_size


def test_help_begins_with_what_the_module_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "run_script", lambda main: main())
    modules = {ft.__name__: ft}
    monkeypatch.setattr(base, "sys", SimpleNamespace(modules=modules, argv=["ft.py", "--help"]))
    with pytest.raises(SystemExit):
        base.run(ft.Config, ft.purify)
    assert str(ft.__doc__).splitlines()[0] in capsys.readouterr().out


# a whole run, with a record that is on no disk


class Record(SimpleNamespace):
    """What `defend` asks of a record; `asked` keeps the flags that it hands over."""

    @property
    def identity(self) -> dict[str, str]:
        return {"attack_sha256": self.sha256}

    def require_triggers(self, summary: dict[str, Any], folder: Path) -> None:
        assert "triggers_sha256" not in summary

    def check_model(self, name: str | None) -> None:
        self.asked.append(("check", name))

    def build(self, name: str | None) -> nn.Module:
        self.asked.append(("build", name))
        return copy.deepcopy(self.model)

    def load_dataset(self, path: str | None) -> Dataset:
        self.asked.append(("data", path))
        return self.data


@pytest.fixture
def record(
    tiny_data: Dataset, tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Record:
    """tmp_path/x: BadNets on `tiny_data`; test images 1 and 2 have a white trigger, target 0."""
    index = torch.tensor([1, 2])
    found = Record(
        asked=[],
        data=tiny_data,
        model=tiny_model,
        folder=tmp_path / "x",
        sha256="abc",
        attack="badnet",
        model_name="tiny",
        state=model_state(tiny_model),
        num_classes=3,
        image_shape=(3, 8, 8),
        mean=tiny_data.mean,
        std=tiny_data.std,
        dataset="digits",
        attack_target=0,
        attack_label_trans="all2one",
        triggered=Triggered(
            torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), index * 0, index, index
        ),
        poison_index=None,
        model_sha256=None,
        network_size=None,
    )
    found.folder.mkdir()
    monkeypatch.setattr(base, "load_attack", lambda folder: {found.folder: found}[folder])
    return found


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the figures are given, which take no time here."""
    calls: list[Any] = []
    for name in ("image_grid", "curves"):
        monkeypatch.setattr(plot, name, lambda *given: calls.append(given) or Figure())
    return calls


def config(record: Record, **changes: Any) -> Any:
    """FT's: two rounds, half of the images."""
    where = {"result_file": "x", "record_path": str(record.folder.parent), "device": "cpu"}
    values = {"n_rounds": 2, "ratio": 0.5, "random_seed": 3, "precision": "fp32"}
    return replace(ft.Config.load("digits", **where, **values), **changes)


def never_ant(model: Any, images: Any, labels: Any, config: Any, loop: Any = None) -> nn.Module:
    """A copy that never says 0."""
    model = copy.deepcopy(model)
    model.network.linear.bias.data[0] = -1e4
    for number in loop.rounds(getattr(config, "n_rounds", 1), model=model):
        loop.log(1, loss=torch.tensor(float(number)))
    return model


def summary_of(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def test_a_run_is_told_in_its_summary(record: Record) -> None:
    test = (record.data.test, record.triggered, torch.device("cpu"))
    before = evaluate(record.model, *test)
    folder = base.defend(config(record), "never", never_ant)
    after = evaluate(load_defense(folder.path), *test)
    assert folder.path == record.folder / "defense" / "never"
    assert load_tensors(folder.path / "defense_result.pt")["defense"] == "never"
    summary = summary_of(folder)
    assert summary["before"] == before.counts()
    assert summary["after"] == after.counts() != before.counts()
    assert summary["der"] == defense_effectiveness_rating(before, after)
    told = ("defense", "attack", "seed", "dataset", "model", "sees", "attack_sha256", "rounds")
    assert [summary[name] for name in told] == [
        *("never", "badnet", 3, "digits", "tiny", "clean", "abc", 2)
    ]
    assert summary["seen_images"] == summary["clean_images"] == 6
    assert sorted(summary["files"]) == ["clean_index.txt", "defense_result.pt"]
    assert 0 <= summary["purify_seconds"] <= summary["seconds"] + 0.1
    assert summary["purify_seconds"] == round(summary["purify_seconds"], 2)
    assert summary["precision"] == "fp32"
    assert "verdict" not in summary
    warnings = base._result_warnings(before, after, ft.Config.advice)
    assert summary["warnings"] == [*record.data.warnings, *warnings]


def test_a_run_leaves_its_rows_its_images_and_its_pictures(
    record: Record, drawn: list[Any]
) -> None:
    folder = base.defend(config(record), "never", never_ant)
    rows = pd.read_csv(folder.path / "metrics.csv")
    assert rows["round"].tolist() == [0, 1, 2]
    assert rows["acc"].notna().tolist() == [True, False, True]  # every second one
    index = [int(line) for line in (folder.path / "clean_index.txt").read_text().split()]
    assert index == seen_images(config(record), record, record.data).index.tolist()
    (metrics, unit, title), (grid, texts, name) = drawn
    assert (len(metrics), unit, title) == (
        3,
        "round",
        "never against badnet on tiny, target 0 (ant)",
    )
    assert name == f"{title}: test images; label before | after"
    assert len(grid["triggered"]) == 2
    assert all(text.split(" | ")[1] in ("1 (bee)", "2 (cat)") for text in texts["triggered"])
    predicted = record.model(torch.ones(2, 3, 8, 8)).argmax(1).tolist()
    names = [record.data.named(label) for label in predicted]
    assert [text.split(" | ")[0] for text in texts["triggered"]] == names
    assert {path.name for path in folder.path.glob("*.png")} == {"curves.png", "before_after.png"}


def test_the_record_gets_the_flags_that_are_for_it(record: Record) -> None:
    base.defend(config(record, model="a", dataset_path="b"), "never", never_ant)
    assert record.asked == [("check", "a"), ("build", "a"), ("data", "b")]
    with pytest.raises(UserError, match="--dataset: cifar10, but the record says digits"):
        base.defend(config(record, dataset="cifar10", overwrite=True), "never", never_ant)


def test_the_folder_has_the_name_that_is_given(record: Record) -> None:
    folder = base.defend(config(record, save_folder_name="other"), "never", never_ant)
    assert folder.path == record.folder / "defense" / "other"
    with pytest.raises(UserError):
        base.defend(config(record, save_folder_name="other"), "never", never_ant)
    base.defend(config(record, save_folder_name="other", overwrite=True), "never", never_ant)
    with pytest.raises(NothingToDo):
        base.defend(config(record, save_folder_name="other", resume=True), "never", never_ant)


def test_a_method_is_given_the_model_the_images_and_the_seed(record: Record) -> None:
    seen: list[Any] = []

    def look(model: Any, images: Any, labels: Any, config: Any, loop: Any = None) -> nn.Module:
        seen.append((model, images, labels, config, torch.rand(3)))
        return copy.deepcopy(model)

    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        base.defend(config(record, random_seed=seed), name, look)
    model, images, labels, flags, noise = seen[0]
    ones = torch.ones(1, 3, 8, 8)
    assert torch.allclose(model.eval()(ones), record.model.eval()(ones), atol=1e-6)
    index = seen_images(flags, record, record.data).index
    assert torch.equal(images, record.data.train.images[index])
    assert torch.equal(labels, record.data.train.labels[index])
    assert flags == config(record)
    assert torch.equal(noise, seen[1][4])
    assert not torch.equal(noise, seen[2][4])


def test_a_method_that_changes_what_it_is_given_changes_a_copy(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture shows what the model before and the one after say."""
    captions: list[list[str]] = []
    draw = ending.draw_before_after
    monkeypatch.setattr(
        ending,
        "draw_before_after",
        lambda folder, caption, *rest: (
            captions.append(caption(record.triggered.images)),
            draw(folder, caption, *rest),
        )[1],
    )

    def in_place(model: Any, images: Any, labels: Any, config: Any, loop: Any = None) -> nn.Module:
        model.network.linear.bias.data[2] = 1e4
        return model

    model = copy.deepcopy(record.model).eval()
    before = base.predict(model, record.triggered.images, torch.device("cpu")).tolist()
    assert 2 not in before
    base.defend(config(record), "always", in_place)
    names = record.data.named
    assert captions == [[f"{names(label)} | {names(2)}" for label in before]]


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda model: None, "the defense's purify gave NoneType; return the purified nn.Module"),
        (lambda model: (model, 1), "the defense's purify gave tuple; return the purified"),
        (nn.Sequential, "other: it gave a network that is not the record's"),
    ],
)
def test_what_is_no_model_of_the_record_is_refused_before_it_is_scored(
    record: Record, give: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Any] = []
    monkeypatch.setattr(Watch, "finish", lambda self, model: scored.append(model))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        base.defend(config(record), "other", lambda model, *_: give(model))
    assert scored == []


def test_a_checked_method_that_gives_no_network_is_refused(tiny_model: nn.Module) -> None:
    @base.checked
    def forgets(model: Any, images: Any, labels: Any, config: ft.Config, loop: Any = None) -> Any:
        return None

    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    with pytest.raises(UserError, match=r"^the defense.s purify gave NoneType; return"):
        forgets(tiny_model, images, labels, ft.Config.load(batch_size=2))


def test_a_run_without_a_trigger_draws_no_images(
    record: Record, drawn: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sau")
    record.triggered = None
    folder = base.defend(config(record), "never", never_ant)
    assert len(drawn) == 1
    assert summary_of(folder)["der"] is None
    log = folder.log.read_text(encoding="utf-8")
    assert not (folder.path / "before_after.png").exists()
    assert log.count("the record has no triggered images: ACC alone is reported") == 1
    assert "DER" not in log.replace("no ASR or DER", "")


def test_the_summary_has_the_rounds_that_were_run(record: Record) -> None:
    def purify(model: Any, images: Any, labels: Any, config: Any, loop: Any) -> nn.Module:
        for number in loop.rounds(5, model=model):
            loop.log(1, loss=torch.tensor(1.0))
            if number == 3:
                loop.stop()
        return model

    folder = base.defend(config(record, n_rounds=5), "early", purify)
    assert summary_of(folder)["rounds"] == 3


def test_a_method_that_sees_nothing_is_given_nothing(record: Record) -> None:
    where = {"result_file": "x", "record_path": str(record.folder.parent)}
    flags = clp.Config.load("digits", **where, n_rounds=2)
    folder = base.defend(flags, "never", never_ant)
    summary = summary_of(folder)
    assert [summary[name] for name in ("sees", "seen_images", "clean_images")] == [
        *("nothing", 0, 0)
    ]
    assert list(summary["files"]) == ["defense_result.pt"]
    rows = pd.read_csv(folder.path / "metrics.csv")
    assert rows["round"].tolist() == [0, 1, 2]
    assert rows["acc"].notna().all()


def test_the_method_s_seconds_are_told_to_hundredths(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Watch.finish

    def after(watch: Watch, model: nn.Module) -> Scores:
        scores = finish(watch, model)
        watch.training_seconds = 1.23456
        return scores

    monkeypatch.setattr(Watch, "finish", after)
    folder = base.defend(config(record), "never", never_ant)
    assert summary_of(folder)["purify_seconds"] == 1.23


def test_a_method_that_sees_poisoned_images_is_told_so(record: Record) -> None:
    """Images 1 and 4 are white; half of the training set is given, as it is stored."""
    record.poison_index = torch.tensor([1, 4])
    zeros = torch.zeros(2, dtype=torch.int64)
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    poisoned = PoisonedSet(record.data.train, record.poison_index, white, zeros, zeros.byte())
    record.poisoned_set = lambda data: poisoned
    where = {"result_file": "x", "record_path": str(record.folder.parent), "device": "cpu"}
    flags = ep.Config.load("digits", **where, ratio=0.5, precision="fp32")
    seen: list[torch.Tensor] = []

    def look(model: Any, images: Any, labels: Any, config: Any, loop: Any = None) -> nn.Module:
        seen.append(images)
        return never_ant(model, images, labels, config, loop)

    folder = base.defend(flags, "look", look)
    summary = summary_of(folder)
    assert summary["sees"] == "poisoned"
    assert summary["clean_images"] == 0
    assert sorted(summary["files"]) == ["defense_result.pt", "poisoned_index.txt"]
    text = (folder.path / "poisoned_index.txt").read_text(encoding="utf-8")
    index = torch.tensor([int(line) for line in text.split()])
    assert len(index) == summary["seen_images"]
    assert torch.equal(seen[0], poisoned.at(index).images)
    assert not any("the clean subset lacks" in warning for warning in summary["warnings"])


@pytest.mark.parametrize("flag", [True, False])
def test_a_method_runs_as_deterministically_as_its_flag_says(
    flag: bool, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(base, "deterministic", lambda wanted: nullcontext(asked.append(wanted)))
    base.defend(config(record, deterministic=flag), "never", never_ant)
    assert asked == [flag]


def test_another_number_of_images_than_wanted_is_warned_of(record: Record) -> None:
    """Of 12 images, 4 of each class, a tenth is one; one of each class is drawn."""
    folder = base.defend(config(record, ratio=0.1), "never", never_ant)
    assert any(
        warning.startswith("--ratio: 0.1 of 12 training images would be 1, but 3 are drawn")
        for warning in summary_of(folder)["warnings"]
    )


def test_lacking_classes_are_warned_of_where_the_images_are_clean(
    record: Record, tmp_path: Path
) -> None:
    path = tmp_path / "index.txt"
    path.write_text("0\n3\n")
    folder = base.defend(config(record, index=str(path)), "never", never_ant)
    assert summary_of(folder)["warnings"][0] == (
        "the clean subset lacks 2 of 3 classes (bee, cat); add some of them to --index"
    )


def test_what_a_method_found_is_told_and_drawn(
    record: Record, drawn: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def finds(model: Any, images: Any, labels: Any, config: Any, loop: Any = None) -> nn.Module:
        loop.findings.verdict = Verdict(True, (0,), (2.0, 1.0, 1.0))
        loop.findings.pictures["found"] = Picture("a picture", {"row": torch.zeros(1, 3, 8, 8)})
        return never_ant(model, images, labels, config, loop)

    with caplog.at_level(logging.INFO, "sau"):
        folder = base.defend(config(record), "finds", finds)
    verdict = summary_of(folder)["verdict"]
    assert (verdict["is_right"], verdict["target_found"], verdict["targets"]) == (True, True, [0])
    assert (folder.path / "found.png").exists()
    _, texts, title = drawn[-1]
    assert title == "finds against badnet on tiny, target 0 (ant): a picture"
    assert len(texts["row"]) == 1
    assert " | " in texts["row"][0]
    messages = [entry.message for entry in caplog.records]
    assert "verdict: backdoored, target 0 (ant); right" in messages
    assert any(message.startswith("DER") for message in messages)
    assert messages[:2] == [
        "finds against badnet on tiny, target 0 (ant): tiny, cpu, fp32",
        "6 clean images of 12",
    ]
    assert messages[2].startswith("before  ACC ")
    log = folder.log.read_text(encoding="utf-8")
    for message in messages:
        assert message in log


# a run that is cut off


def drifting(ends_at: tuple[int, int] | None = None) -> Any:
    """A method that moves a bias by what it draws; it breaks off in a round's batch."""

    def purify(model: Any, images: Any, labels: Any, config: Any, loop: Any = None) -> nn.Module:
        model = copy.deepcopy(model)
        order = generator(config.random_seed, "batches")
        for number in loop.rounds(config.n_rounds, model=model, order=order):
            for batch, index in enumerate(loop.batches(len(images), 2, order), 1):
                if (number, batch) == ends_at:
                    raise InterruptedError
                drift = index[0] + torch.rand(())
                model.network.linear.bias.data[0] += drift
                loop.log(len(index), loss=drift)
        return model

    return purify


@pytest.fixture
def signals() -> Iterator[None]:
    """Signals are not put off when a test ends."""
    yield
    _Stop.is_deferred = False


def cut(record: Record, **flags: Any) -> None:
    """A run into record/x/defense/cut that ends in the last batch of the second round."""
    with pytest.raises(InterruptedError):
        base.defend(config(record, **flags), "cut", drifting((2, 3)))


@pytest.mark.usefixtures("signals")
def test_a_run_that_was_cut_off_goes_on(record: Record, caplog: pytest.LogCaptureFixture) -> None:
    """It comes to the same weights and losses; the log has both parts, the time is of both."""
    caplog.set_level(logging.INFO, "sau")
    whole = base.defend(config(record), "whole", drifting())
    cut(record, checkpoint_every=0.0)
    file = record.folder / "defense" / "cut" / "checkpoint.pt"
    torch.save({**load_tensors(file), "seconds": 1000.0}, file)
    folder = base.defend(config(record, resume=True), "cut", drifting())
    one, two = (model_state(load_defense(run.path)) for run in (whole, folder))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [
        pd.read_csv(run.path / "metrics.csv").drop(columns="seconds") for run in (whole, folder)
    ]
    pd.testing.assert_frame_equal(*rows)
    assert folder.log.read_text(encoding="utf-8").count("before  ACC") == 2
    assert 1000 <= summary_of(folder)["seconds"] < 1100
    assert not file.exists()


@pytest.mark.usefixtures("signals")
def test_a_run_without_a_checkpoint_begins_anew(
    record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first one would have been after an hour; the log has the second run alone."""
    caplog.set_level(logging.INFO, "sau")
    cut(record, checkpoint_every=3600.0)
    assert not (record.folder / "defense" / "cut" / "checkpoint.pt").exists()
    folder = base.defend(config(record, resume=True), "cut", drifting())
    assert folder.log.read_text(encoding="utf-8").count("before  ACC") == 1
    assert pd.read_csv(folder.path / "metrics.csv")["round"].tolist() == [0, 1, 2]


@pytest.mark.usefixtures("signals")
def test_a_run_goes_on_with_its_own_flags_alone(record: Record) -> None:
    cut(record, checkpoint_every=0.0)
    with pytest.raises(UserError, match="was run with --lr "):
        base.defend(config(record, resume=True, lr=0.5), "cut", drifting())


@pytest.mark.usefixtures("signals")
def test_a_finished_result_of_another_attack_is_not_taken_for_one(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder was copied or restored; before, the same call says that nothing is left to do."""
    base.defend(config(record), "cut", never_ant)
    with pytest.raises(NothingToDo):
        base.defend(config(record, resume=True), "cut", never_ant)
    other = copy.copy(record)
    other.sha256 = "def"
    monkeypatch.setattr(base, "load_attack", lambda _: other)
    with pytest.raises(UserError, match="is of another attack than the record"):
        base.defend(config(record, resume=True), "cut", never_ant)
