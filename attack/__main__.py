"""Lists the attacks: name, paper, threat model, idea.

    python -m attack
    python -m attack --markdown     the table of README.md

The list is made from the first lines of each file's docstring.
"""

import re
from types import ModuleType

import attack
from utils.process.methods import Method, as_markdown, as_text, cited, methods_of, run_list


def threat_model(module: ModuleType) -> str:
    """What the attacker changes, from the docstring; "" if the docstring does not say it."""
    text = " ".join((module.__doc__ or "").split())
    sentence = re.search(r"Threat model: ([^.]+)\.", text)
    return sentence[1] if sentence else ""


def methods() -> list[Method]:
    """All attacks, by year and then by name."""
    return methods_of(attack, threat_model)


def table() -> str:
    """The table of README.md."""
    titles = ("attack", "paper", "threat model", "idea", "clean, triggered, change", "command")
    return as_markdown(
        methods(),
        titles,
        lambda method: (
            method.label,
            cited(method),
            method.sees,
            method.idea,
            f"![{method.label}](docs/attacks/{method.name}.png)",
            f"`python attack/{method.name}.py --save_folder_name {method.name}_demo`",
        ),
    )


if __name__ == "__main__":
    run_list("attack", str(__doc__), lambda: as_text(methods(), "threat model"), table)
