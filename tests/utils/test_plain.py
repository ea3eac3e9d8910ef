"""Plain data as YAML: what is written is what is read."""

import random

import pytest

from utils.plain import as_yaml, parse_yaml

BREAKS = ("\n", "\r", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\ufeff", "\0")


@pytest.mark.parametrize("letter", BREAKS, ids=ascii)
@pytest.mark.parametrize("frame", ["{}", "/d/a{}b", "{}b", "a{}", "a {} b", "a\n{}b", "a{}\nb"])
def test_every_text_comes_back(letter: str, frame: str) -> None:
    """Also of a key, an item of a list, and in what is nested."""
    text = frame.format(letter)
    for values in ({"k": text}, {text: 1}, {"k": [text]}, {"k": {"n": [{text: text}]}}):
        assert parse_yaml(as_yaml(values), "x") == values


def test_texts_of_every_length_come_back() -> None:
    """Those that are wider than a line of the file, too."""
    draw = random.Random(0)
    for length in range(1, 300, 7):
        text = "".join(draw.choices((*BREAKS, *"ab  '\"\\#:-[]{},&*!|>%@`é漢"), k=length))
        values = {"k": text, "list": [text, {"n": text}]}
        assert parse_yaml(as_yaml(values), "x") == values
