"""What an inspection says of its signals."""

import dataclasses
import math

import pytest
import torch

from analysis import inspection
from analysis.base import Results
from analysis.subject import Subject
from models import build_model
from utils.data.labelled import Dataset, Labelled


@pytest.mark.parametrize("classes", [2, 3])
def test_two_classes_have_no_signal_that_compares_a_class_with_others(
    classes: int, tiny_data: Dataset
) -> None:
    torch.manual_seed(0)
    labels = torch.arange(12) % classes
    split = Labelled(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), labels)
    data = dataclasses.replace(
        tiny_data, train=split, test=split, classes=tiny_data.classes[:classes]
    )
    model = build_model("tiny", classes).eval()
    subject = Subject(data, torch.device("cpu"), "fp32", model, "tiny")
    results = Results()
    config = inspection.Config.load(noise_steps=1, neural_cleanse=True)
    inspection.look(subject, config, results)
    of_model = results.facts["signals"]["before"]
    assert set(of_model) == {"A", "A'", "B"} | ({"C", "D"} if classes == 3 else set())
    assert any(line.startswith("no signals C, D and E") for line in results.warnings) == (
        classes == 2
    )
    assert math.isnan(of_model["A"]["z"]) or classes == 3
    assert not any("linear" in line for line in results.warnings)


def told(large: int, small: int, statistic: float) -> dict[str, dict[str, float]]:
    return {
        "A": {"top": large, "statistic": statistic},
        "A'": {"top": small, "statistic": statistic},
    }


def test_a_class_is_named_only_where_one_stands_out() -> None:
    assert inspection.headline_of({"statistic": 0.25, "top": 3}, str) == "0.250 (class 3)"
    assert inspection.headline_of({"statistic": 0.0, "top": 0}, str) == "0.000"


def test_a_conclusion_is_never_a_verdict_without_clean_models() -> None:
    def said(own: dict[str, dict[str, float]], *null: float) -> str:
        return inspection.conclusion(own, [told(0, 0, value) for value in null], str)

    assert said(told(3, 7, 1.0), 0.1).startswith("no clear signal: large steps point to class 3")
    assert "this says nothing" in said(told(3, 3, 1.0))
    assert said(told(3, 3, 0.0), -1.0).startswith("no clear signal: no image was sent")
    assert said(told(3, 3, 0.5), 0.1, 0.6).startswith("no clear signal")
    text = said(told(3, 3, 0.7), 0.1, 0.6)
    assert text.startswith("class 3 stands out in A, A', more than in each of 2 clean models")
    assert "which are few" in text
    assert text.endswith("no proof")
    assert "more than in 1 clean model, which is little: 6 say" in said(told(3, 3, 0.7), 0.1)
    assert "few" not in said(told(3, 3, 0.7), *(0.1,) * 6)


def test_a_signal_that_clean_models_lack_is_compared_with_nothing() -> None:
    """Six clean models, of which one has E, too, and a smaller one."""
    own = {**told(3, 3, 0.7), "E": {"top": 3, "statistic": 9.0}}
    null = [told(0, 0, 0.1) for _ in range(6)]
    null[0]["E"] = {"top": 1, "statistic": 1.0}
    assert "stands out in A, A', more than" in inspection.conclusion(own, null, str)
    for other in null:
        other["E"] = {"top": 1, "statistic": 1.0}
    assert "stands out in A, A', E, more than" in inspection.conclusion(own, null, str)
