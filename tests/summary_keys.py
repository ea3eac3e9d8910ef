"""The table of record/README.md: which keys the summary of each kind of run has."""

import re
from typing import Any

from utils.files import ROOT

KINDS = ("attack", "state_dict", "import", "defense", "analysis")


def keys_of(kind: str) -> dict[str, bool]:
    """Key -> whether each run of a kind has it, by the table.

    Args:
        kind: one of `KINDS`.
    """
    text = (ROOT / "record/README.md").read_text(encoding="utf-8")
    table = text.partition("## Keys of summary.json")[2].partition("\n## ")[0]
    keys = {}
    for line in (line for line in table.splitlines() if line.startswith("| `")):
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        said = dict(zip(KINDS, cells, strict=False))[kind]
        assert said in ("yes", "some", ""), line
        keys |= {key: said == "yes" for key in re.findall(r"`(\w+)`", first) if said}
    return keys


def check_keys(summary: dict[str, Any], kind: str) -> None:
    """That a summary has the keys that the table says, and no other."""
    keys = keys_of(kind)
    assert set(summary) - set(keys) == set()
    assert {key for key, is_always in keys.items() if is_always} - set(summary) == set()
