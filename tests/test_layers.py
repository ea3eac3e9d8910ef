"""Imports go down only, and importing has no effect but definitions."""

import ast
import fnmatch
import graphlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from utils.files import ROOT

PACKAGES = ("utils", "models", "attack", "defense", "analysis", "interop", "benchmark", "perf")

# From the top down; a module is in the first row that has a pattern for it. Imports go to the rows
# below, and within a row without circles; but methods never import each other.
ROWS = (
    ("benchmark.*", "perf.*"),
    ("attack.?*", "defense.?*", "analysis.?*"),
    (
        *("attack.prototype", "attack.recipe", "attack.setting", "attack.poisoning"),
        *("attack.controlled", "defense.base", "analysis.subject", "analysis.base"),
        *("analysis.signals", "analysis.inspection", "analysis.cleanmodels"),
        "interop.*",
    ),
    ("utils.training.*",),
    ("utils.records.*",),
    ("utils.data.*",),
    ("utils.process.*",),
    ("models", "models.*"),
    ("utils.*", *PACKAGES, "utils.training", "utils.records", "utils.data", "utils.process"),
)
METHODS, PIPELINES = 1, 2
VARIANTS = {"defense.sau_far": "defense.sau"}  # stands on the method that it varies


def row_of(module: str) -> int | None:
    """The row of a module, 0 at the top; the names of pipelines and packages go before patterns."""
    for number in sorted(range(len(ROWS)), key=lambda number: number == METHODS):
        if module in ROWS[number]:
            return number
    for number, patterns in enumerate(ROWS):
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns):
            return number
    return None


def modules_under(root: Path) -> dict[str, Path]:
    """Every module of the project's packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Project modules that a file imports, at its top or inside functions.

    `from utils import plot` imports utils.plot; `from utils.data import Dataset` utils.data.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.add(inner if inner in modules else base)
    return {name for name in names if name.split(".")[0] in PACKAGES and name != module}


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, directly or around."""
    sorter = graphlib.TopologicalSorter(imports)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def violations(root: Path) -> list[str]:
    """Every import that does not go down, every circle, and every module without a row."""
    modules = modules_under(root)
    imports = {name: imports_of(name, path, modules) for name, path in modules.items()}
    wrong = []
    for module, imported_modules in imports.items():
        here = row_of(module)
        if here is None:
            wrong.append(f"{module} is in no row; give it one in ROWS")
            continue
        for imported in sorted(imported_modules):
            if imported not in modules:
                wrong.append(f"{module} imports {imported}, which is no module")
                continue
            there = row_of(imported)
            if (
                there is None
                or there < here
                or (there == here == METHODS and VARIANTS.get(module) != imported)
            ):
                wrong.append(f"{module} imports {imported}, which is not below it")
    return wrong or circles(imports)


def test_imports_go_down_only() -> None:
    assert violations(ROOT) == []


def test_every_script_finds_the_checkout_from_any_working_directory() -> None:
    """`python -m` is for the checkout's folder alone."""
    line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    scripts = {
        name: text
        for name, path in modules_under(ROOT).items()
        if not name.endswith("__main__")
        and 'if __name__ == "__main__":' in (text := path.read_text(encoding="utf-8"))
    }
    assert {"attack.prototype", "defense.sau", "analysis.all", "benchmark.run"} <= set(scripts)
    for name, text in scripts.items():
        assert line in text, name


@pytest.mark.parametrize(
    ("module", "text", "problem"),
    [
        (
            "utils/data/poison.py",
            "import utils.records.folders",
            "utils.data.poison imports utils.r",
        ),
        (
            "utils/data/poison.py",
            "from utils.records import folders",
            "utils.data.poison imports ut",
        ),
        (
            "utils/data/poison.py",
            "from ..records import folders",
            "utils.data.poison imports utils.",
        ),
        (
            "utils/data/poison.py",
            "from ..records.folders import x",
            "utils.data.poison imports util",
        ),
        ("utils/errors.py", "def f():\n    import models", "utils.errors imports models, which is"),
        (
            "utils/process/seeds.py",
            "import utils.data.poison",
            "utils.process.seeds imports utils.da",
        ),
        ("utils/data/poison.py", "from attack.lc import x", "utils.data.poison imports attack.lc"),
        ("utils/training/x.py", "import defense.base", "utils.training.x imports defense.base"),
        (
            "attack/lc.py",
            "import attack.wanet",
            "attack.lc imports attack.wanet, which is not below",
        ),
        ("defense/ft.py", "from attack import lc", "defense.ft imports attack.lc, which is not"),
        ("defense/base.py", "from attack import lc", "defense.base imports attack.lc, which is n"),
        ("attack/lc.py", "import benchmark.run", "attack.lc imports benchmark.run, which is not"),
        ("analysis/path.py", "import defense.ft", "analysis.path imports defense.ft, which is not"),
        ("analysis/all.py", "import analysis.path", "analysis.all imports analysis.path, which is"),
        ("analysis/base.py", "import analysis.path", "analysis.base imports analysis.path, which"),
        ("models/vgg.py", "import utils.process.seeds", "models.vgg imports utils.process.seeds"),
        ("utils/data/poison.py", "import utils.gone", "utils.data.poison imports utils.gone, whic"),
    ],
)
def test_the_check_finds_each_way_up(tmp_path: Path, module: str, text: str, problem: str) -> None:
    """One bad file in a tree of empty ones is one violation."""
    plant(tmp_path)
    assert violations(tmp_path) == []
    write(tmp_path, module, text)
    (wrong,) = violations(tmp_path)
    assert wrong.startswith(problem)


def test_the_check_finds_circles(tmp_path: Path) -> None:
    plant(tmp_path)
    write(tmp_path, "utils/data/a.py", "from utils.data import b")
    write(tmp_path, "utils/data/b.py", "import utils.data.poison")
    write(tmp_path, "utils/data/poison.py", "import utils.data.a")
    (wrong,) = violations(tmp_path)
    assert wrong.count(" imports ") == 3


def test_the_check_lets_imports_down_pass(tmp_path: Path) -> None:
    plant(tmp_path)
    write(tmp_path, "models/vgg.py", "from utils.errors import UserError")
    write(tmp_path, "models/__init__.py", "import torch\nfrom models.vgg import vgg")
    write(tmp_path, "attack/prototype.py", "from models import vgg\nfrom attack import recipe")
    write(tmp_path, "attack/lc.py", "from attack.prototype import run\nimport utils.data.poison")
    write(tmp_path, "utils/records/folders.py", "import utils.process.seeds, utils.data.poison")
    assert violations(tmp_path) == []


def plant(root: Path) -> None:
    """Empty files, one or two for each row."""
    names = ("utils/data/poison", "utils/records/folders", "utils/process/seeds", "utils/errors")
    methods = ("attack/lc", "attack/wanet", "attack/recipe", "defense/ft", "benchmark/run")
    methods += ("analysis/path", "analysis/all")
    rooms = ("training", "records", "data", "process")
    for name in (*names, *methods, *(f"{package}/__init__" for package in PACKAGES)):
        write(root, f"{name}.py", "")
    for room in rooms:
        write(root, f"utils/{room}/__init__.py", "")
    write(root, "defense/base.py", "")
    write(root, "analysis/base.py", "")


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


# Other people's packages, loaded before the watch begins: what they do is theirs.
FOREIGN = (
    "matplotlib.figure",
    "pandas",
    "pydantic",
    "sklearn",
    "torch",
    "torchvision.transforms.v2",
    "tqdm.contrib.logging",
    "yaml",
)

# Imports every module by itself: what an earlier one loaded of the project is forgotten, so that
# none works only after another.
WATCHED_IMPORTS = """
import importlib, os, sys
root, packages, foreign, modules = sys.argv[1], *(text.split() for text in sys.argv[2:])
sys.path.insert(0, root)
sys.dont_write_bytecode = True
for name in foreign:
    importlib.import_module(name)
effects = []

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if flags & writes:
            effects.append(f"opens {path} for writing")
    elif event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "subprocess.Popen"):
        effects.append(f"{event} {arguments[0]}")

sys.addaudithook(watch)
for module in modules:
    for loaded in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[loaded]
    importlib.import_module(module)
    for effect in effects:
        sys.stderr.write(f"{module}: {effect}\\n")
    effects.clear()
"""


def watched_imports(
    root: Path, modules: Iterable[str], folder: Path, foreign: Iterable[str] = ()
) -> str:
    """What importing prints, writes, starts or raises in a fresh interpreter; nothing if well."""
    lists = (" ".join(names) for names in (PACKAGES, foreign, modules))
    found = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORTS, str(root), *lists],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return found.stdout + found.stderr + (f"exit code {found.returncode}" * (found.returncode != 0))


@pytest.mark.slow
def test_importing_any_module_prints_nothing_and_writes_nothing(tmp_path: Path) -> None:
    modules = modules_under(ROOT)
    assert {"utils.data.batches", "models", "attack.badnet", "defense.sau"} <= set(modules)
    assert watched_imports(ROOT, modules, tmp_path, FOREIGN) == ""
    assert list(tmp_path.iterdir()) == []


# They take seconds, and only some scripts need them, some of the time.
HEAVY = ("jinja2", "matplotlib", "pandas", "scipy", "sklearn", "torchvision")
LOADED = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for module in sys.argv[2].split():
    importlib.import_module(module)
print(*sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[3].split())))
"""


def test_scripts_start_without_what_only_draws_and_reads() -> None:
    """`--help` and a wrong flag are answered without libraries that take longer than they do."""
    rooms = ("attack.", "defense.", "analysis.", "interop.")
    scripts = ("benchmark.run", "benchmark.report", "benchmark.gallery", "benchmark.power")
    modules = [name for name in modules_under(ROOT) if name.startswith(rooms) or name in scripts]
    call = [sys.executable, "-c", LOADED, str(ROOT), " ".join(modules), " ".join(HEAVY)]
    answer = subprocess.run(call, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []


def test_the_watch_sees_prints_and_writes(tmp_path: Path) -> None:
    write(tmp_path, "utils/loud.py", "print('hello')")
    write(tmp_path, "utils/busy.py", "open('left_behind.txt', 'w').close()")
    write(tmp_path, "utils/tidy.py", "open(__file__).close()")
    seen = watched_imports(tmp_path, ["utils.loud", "utils.busy", "utils.tidy"], tmp_path)
    assert "hello" in seen
    assert "utils.busy: opens left_behind.txt for writing" in seen
    assert "utils.tidy" not in seen
