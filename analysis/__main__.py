"""Lists the analyses: name, paper, what the record must have, idea.

    python -m analysis
    python -m analysis --markdown     the table of README.md

The list is made from the first lines of each file's docstring, and from its `Config`.
"""

from types import ModuleType

import analysis
from analysis.subject import Controlled
from utils.process.methods import Method, as_markdown, as_text, cited, methods_of, run_list


def needs(module: ModuleType) -> str:
    """What a record must have, in words; a clean model, the control, may be missing.

    Poisoned images are those of the training set. A record that has them has triggered ones, too.
    """
    parts = {
        "poisoned images": module.Config.needs_poison,
        "triggered images": module.Config.needs_trigger and not module.Config.needs_poison,
        "defenses": module.Config.needs_defenses,
        "clean control": issubclass(module.Config, Controlled),
    }
    return ", ".join(name for name, is_needed in parts.items() if is_needed) or "nothing more"


def methods() -> list[Method]:
    """All analyses, by year and then by name."""
    return methods_of(analysis, needs)


def table() -> str:
    """The table of README.md."""
    return as_markdown(
        methods(),
        ("analysis", "paper", "the record needs", "idea"),
        lambda method: (
            f"`analysis/{method.name}.py`",
            cited(method),
            method.sees,
            method.idea,
        ),
    )


if __name__ == "__main__":
    run_list("analysis", str(__doc__), lambda: as_text(methods(), "the record needs"), table)
