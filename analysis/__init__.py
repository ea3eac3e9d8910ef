"""Analyses, one file per analysis."""

from pathlib import Path

RETUNED_WITH = 5  # poisoned images, of the re-learned ASR that retune and reports give
_PIPELINES = (
    *("__init__", "__main__", "all"),
    *("base", "subject", "inspection", "cleanmodels", "signals"),
)


def names() -> list[str]:
    """The names of all analyses."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in stems if name not in _PIPELINES)
