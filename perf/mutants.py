"""Mutants: changes one thing at a time, and asks the tests whether they notice; hours on two cores.

    python perf/mutants.py                              # all; continues where it stopped
    python perf/mutants.py 'defense.sau.*'              # those of one file
    python perf/mutants.py --show defense.sau.x_examples__mutmut_7      # the change of one

mutmut, which does the work, skips decorated functions, and so the `purify` of every defense. So it
runs on a copy of the checkout, `.mutants/`, in which `@checked` over a `purify` has become the call
`purify = checked(purify)` below it. `[tool.mutmut]` in pyproject.toml names the files and tests.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Parser
from utils.errors import UserError
from utils.files import ROOT
from utils.process.script import run_script

COPY = ROOT / ".mutants"
MARK = "checked"


def undecorated(source: str) -> str:
    """A method file in which `@checked` is a call below the function."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef):
            marks = [mark.lineno - 1 for mark in node.decorator_list if ast.unparse(mark) == MARK]
            if marks:
                lines.insert(int(node.end_lineno or 0), f"\n\n{node.name} = {MARK}({node.name})")
                del lines[marks[0]]
    return "\n".join(lines) + "\n"


def copied(root: Path, to: Path) -> None:
    """Makes `to` a copy of a checkout's tracked files; those that are the same stay untouched."""
    listing = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True)
    names = [name for name in listing.stdout.decode().splitlines() if (root / name).is_file()]
    for name in names:
        content = (root / name).read_bytes()
        if Path(name).parent == Path("defense"):
            content = undecorated(content.decode()).encode()
        path = to / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in to.rglob("*"):
        inside = path.relative_to(to)
        if path.is_file() and inside.parts[0] != "mutants" and inside.as_posix() not in names:
            path.unlink()


def main() -> None:
    """Copies the checkout and runs mutmut there."""
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help="mutants, or patterns of them; all")
    parser.add_argument("--show", help="a mutant whose change is shown; nothing is run")
    flags = parser.parse_args()
    mutmut = Path(sys.executable).parent / "mutmut"
    if not mutmut.exists():
        raise UserError(f"{mutmut}: is not there; run pip install -r requirements-dev.txt")
    copied(ROOT, COPY)
    calls = [["show", flags.show]] if flags.show else [["run", *flags.names], ["results"]]
    for call in calls:  # one thread, since each mutant is a fork of the program
        code = subprocess.run(
            [mutmut, *call], cwd=COPY, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    run_script(main)
