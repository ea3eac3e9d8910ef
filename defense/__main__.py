"""Lists the defenses: name, paper, what it sees, idea.

    python -m defense
    python -m defense --markdown     the table of README.md

The list is made from the first lines of each file's docstring, and from the bases of its `Config`.
"""

from types import ModuleType

import defense
from defense.base import HeldOut
from utils.process.methods import Method, as_markdown, as_text, cited, methods_of, run_list

_IMAGES = {
    "nothing": "nothing",
    "clean": "clean images",
    "poisoned": "a part of the poisoned training set",
}


def images_in_words(module: ModuleType) -> str:
    """The images that a defense is given, in words."""
    held_out = ", a part held out" if issubclass(module.Config, HeldOut) else ""
    return _IMAGES[module.Config.load().sees] + held_out


def methods() -> list[Method]:
    """All defenses, by year and then by name."""
    return methods_of(defense, images_in_words)


def table() -> str:
    """The table of README.md."""
    return as_markdown(
        methods(),
        ("defense", "name", "paper", "sees", "idea"),
        lambda method: (
            f"`defense/{method.name}.py`",
            method.label,
            cited(method),
            method.sees,
            method.idea,
        ),
    )


if __name__ == "__main__":
    run_list("defense", str(__doc__), lambda: as_text(methods(), "sees"), table)
