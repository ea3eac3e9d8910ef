"""The end of a run: facts of the run, pictures of what was found."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from defense import ft
from models import Classifier
from utils import plot
from utils.data.labelled import Dataset, Triggered
from utils.metrics import Rate, Scores
from utils.records.folders import RunFolder
from utils.records.recipe import recipe_sha256
from utils.training import ending
from utils.training.findings import Findings, Picture

CPU = torch.device("cpu")


def test_facts_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's sum is of the values as a YAML file has them."""
    config = ft.Config.load(random_seed=3)
    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: 100.0))
    facts = ending.run_facts(config, 100 - 12.345, CPU, "fp32", {"--index": "a" * 64})
    values = dataclasses.asdict(config)
    assert facts["config_sha256"] == recipe_sha256(values)
    assert facts["inputs"] == {"--index": "a" * 64}
    assert facts["seconds"] == 12.3
    assert facts["device"] == "cpu"
    assert facts["precision"] == "fp32"
    assert any("memory" in name or "mib" in name for name in facts)


def test_the_result_is_logged_before_the_summary_says_that_the_run_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody runs a finished run again, so a kill in between would leave a log without it."""
    caplog.set_level("INFO")
    run = RunFolder(tmp_path / "x")
    run.start("lr: 0.1\n")
    logged: list[str] = []

    def killed(summary: object) -> None:
        logged.extend(caplog.messages)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_summary", killed)
    with pytest.raises(KeyboardInterrupt):
        ending.finish_run(
            run,
            Findings(),
            facts={},
            warnings=["the attack failed"],
            result="ACC 9\nASR 1",
            pictures=[],
            files=[],
            run={},
        )
    assert logged == ["warning: the attack failed", "ACC 9", "ASR 1"]


def test_a_line_a_rate() -> None:
    scores = Scores(Rate(9, 10), Rate(1, 3), cross_acc=Rate(0, 0))
    assert ending.table(scores).splitlines() == [
        "ACC        90.00 %  (9 of 10)",
        "ASR        33.33 %  (1 of 3)",
        "cross ACC        -  (0 of 0)",
    ]


def test_a_difference_is_amplified_and_says_how_much() -> None:
    clean = torch.full((1, 1, 1, 2), 0.25)
    changed = torch.tensor([0.5, 0.125]).view(1, 1, 1, 2)
    ((name, shown),) = ending.difference(clean, changed).items()
    assert name == "difference\nx 4"
    assert shown.flatten().tolist() == [1.0, 0.25]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `image_grid` is given."""
    calls: list[Any] = []
    monkeypatch.setattr(plot, "image_grid", lambda *given: calls.append(given) or Figure())
    return calls


def pictures(folder: Path, **named: Any) -> list[Path]:
    run = RunFolder(folder / "x")
    run.start("lr: 0.1\n")
    findings = Findings(pictures=named)
    return ending.draw_findings(run, findings, lambda images: ["asked"] * len(images), "ft")


def two_rows(**more: Any) -> Picture:
    rows = {"clean": torch.zeros(2, 3, 4, 4), "changed": torch.full((2, 3, 4, 4), 0.5)}
    return Picture("two rows", rows, **more)


def test_each_picture_is_a_file(tmp_path: Path, drawn: list[Any]) -> None:
    """Also one that is made only now."""
    paths = pictures(tmp_path, a=two_rows(), b=two_rows)
    assert paths == [tmp_path / "x" / "a.png", tmp_path / "x" / "b.png"]
    assert all(path.stat().st_size > 0 for path in paths)
    assert [title for _, _, title in drawn] == ["ft: two rows"] * 2
    assert torch.equal(drawn[0][0]["changed"], torch.full((2, 3, 4, 4), 0.5))


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({}, {"clean": ["asked"] * 2, "changed": ["asked"] * 2}),
        ({"is_labelled": False}, {}),
        ({"captions": {"changed": ["p", "q"]}}, {"clean": ["asked"] * 2, "changed": ["p", "q"]}),
        ({"captions": {"changed": ["p", "q"]}, "is_labelled": False}, {"changed": ["p", "q"]}),
    ],
)
def test_rows_without_captions_get_the_models_labels(
    more: dict[str, Any], texts: dict[str, list[str]], tmp_path: Path, drawn: list[Any]
) -> None:
    pictures(tmp_path, a=two_rows(**more))
    assert drawn[0][1] == texts


def test_the_first_two_rows_are_compared_if_asked(tmp_path: Path, drawn: list[Any]) -> None:
    rows = dict(two_rows().rows) | {"third": torch.ones(2, 3, 4, 4)}
    pictures(tmp_path, a=Picture("three rows", rows, is_compared=True), b=two_rows())
    assert list(drawn[0][0]) == ["clean", "changed", "third", "difference\nx 2"]
    assert torch.equal(drawn[0][0]["difference\nx 2"], torch.ones(2, 3, 4, 4))
    assert list(drawn[0][1]) == ["clean", "changed", "third"]
    assert list(drawn[1][0]) == ["clean", "changed"]


def test_few_triggered_images_are_shown_once_each(
    tmp_path: Path, drawn: list[Any], tiny_data: Dataset, tiny_model: Classifier
) -> None:
    index = torch.tensor([1, 4, 7])
    labels, targets = tiny_data.test.labels[index], torch.zeros(3, dtype=torch.int64)
    triggered = Triggered(tiny_data.test.images[index], targets, labels, index)
    run = RunFolder(tmp_path)
    run.start("lr: 0.1\n")
    ending.draw_trigger(run, tiny_model, tiny_data, triggered, "badnet", CPU)
    assert torch.equal(255 * drawn[0][0]["clean"], tiny_data.test.images[index].float())


def test_clean_and_triggered_images_stand_below_each_other(
    tiny_data: Dataset, tmp_path: Path, drawn: list[Any]
) -> None:
    """Test images 5, 1 and 7, beside themselves with a white trigger."""
    index = torch.tensor([5, 1, 7])
    triggered = Triggered(
        torch.full((3, 3, 8, 8), 255, dtype=torch.uint8), index % 3, index * 0, index
    )
    folder = RunFolder(tmp_path / "x")
    folder.start("lr: 0.1\n")

    def caption(images: torch.Tensor) -> list[str]:
        return [f"{len(images)} of {images.dtype}"] * len(images)

    path = ending.draw_before_after(folder, caption, triggered, tiny_data, "a title")
    assert path == tmp_path / "x" / "before_after.png"
    assert path.exists()
    ((rows, captions, title),) = drawn
    assert list(rows) == list(captions) == ["clean", "triggered"]
    assert torch.equal(rows["clean"], tiny_data.test.images[index] / 255)
    assert torch.equal(rows["triggered"], torch.ones(3, 3, 8, 8))
    assert captions["clean"] == captions["triggered"] == ["3 of torch.float32"] * 3
    assert title == "a title: test images; label before | after"


def test_a_figure_is_saved_sharply(tmp_path: Path) -> None:
    """160 dots an inch."""
    run = RunFolder(tmp_path / "x")
    run.start("lr: 0.1\n")
    path = ending.save_figure(run, "a.png", Figure(figsize=(2, 1)))
    width = int.from_bytes(path.read_bytes()[16:20], "big")
    assert (path, width) == (tmp_path / "x" / "a.png", 320)
