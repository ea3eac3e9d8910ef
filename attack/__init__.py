"""Attacks, one file per attack."""

from pathlib import Path

_PIPELINES = (
    *("__init__", "__main__"),
    *("recipe", "setting", "poisoning", "controlled", "prototype"),
)


def names() -> list[str]:
    """The names of all attacks, without `prototype`, which trains a clean model."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in stems if name not in _PIPELINES)
