"""Imports go down only, and importing has no effect but definitions."""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from utils.files import ROOT

PACKAGES = ("utils", "models", "attack", "defense", "interop", "benchmark")

# From the bottom up; the first pattern that fits a module gives its layer. Packages themselves are
# empty files, except models, whose __init__ gathers the networks of its own package.
LAYERS = (
    ("utils", 0),
    ("attack", 0),
    ("defense", 0),
    ("interop", 0),
    ("benchmark", 0),
    ("utils.errors", -1),
    ("utils.process.distributed", 1),
    ("models.batchnorm", 0),
    ("models.convolution", 0),
    ("models.neighbours", 0),
    ("models", 1),
    ("models.parts", 3),
    ("models.*", 1),
    ("utils.locks", -1),
    ("utils.files", 0),
    ("utils.tensors", 2),
    ("utils.config", 1),
    ("utils.metrics", 1),
    ("utils.perturb", 1),
    ("utils.runtime", 2),
    ("utils.records.weights", 3),
    ("utils.data", 3),
    ("utils.data.images", 4),
    ("utils.data.archives", 3),
    ("utils.data.datasets", 5),
    ("utils.data.poison", 4),
    ("utils.data.emblem", 5),
    ("utils.training.evaluate", 4),
    ("utils.backdoorbench", 4),
    ("utils.train", 6),
    ("utils.records.contents", 2),
    ("utils.records.folders", 5),
    ("utils.records.attack", 6),
    ("utils.plot", 6),
    ("utils.training.watch", 7),
    ("utils.training", 0),
    ("utils.records", 0),
    ("utils.training.findings", 3),
    ("utils.training.state", 3),
    ("utils.training.guard", 5),
    ("utils.training.selection", 3),
    ("utils.training.parts", 3),
    ("utils.training.sgd", 7),
    ("utils.training.pruning", 7),
    ("utils.training.ending", 7),
    ("utils.records.schema", 5),
    ("utils.records.checkpoint", 4),
    ("utils.records.defense", 7),
    ("attack.prototype", 8),
    ("defense.base", 8),
    ("interop.*", 8),
    ("attack.controlled", 9),
    ("attack.*", 10),
    ("defense.*", 10),
    ("benchmark.literal", 11),
    ("benchmark.grid", 11),
    ("benchmark.run", 13),
    ("benchmark.summaries", 9),
    ("benchmark.means", 10),
    ("benchmark.sources", 10),
    ("benchmark.tables", 11),
    ("benchmark.report", 13),
    ("benchmark.variants", 13),
    ("benchmark.hostile", 9),
    ("benchmark.fuzz", 14),
    ("benchmark.stress", 15),
    ("benchmark.*", 12),
)


def layer(module: str) -> int | None:
    return next((number for name, number in LAYERS if fnmatch.fnmatchcase(module, name)), None)


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


def violations(root: Path) -> list[str]:
    """Every import that does not go strictly down, and every module without a layer."""
    modules = modules_under(root)
    found = []
    for module, path in modules.items():
        here = layer(module)
        if here is None:
            found.append(f"{module} has no layer; give it one in LAYERS")
            continue
        for imported in sorted(imports_of(module, path, modules)):
            if imported not in modules:
                found.append(f"{module} imports {imported}, which is no module")
                continue
            there = layer(imported)
            is_own_package = module == "models" and imported.startswith("models.")
            if there is None or (there >= here and not is_own_package):
                found.append(f"{module} (layer {here}) imports {imported} (layer {there})")
    return found


def test_imports_go_down_only() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "text", "problem"),
    [
        (
            "utils/data.py",
            "import utils.data.poison",
            "utils.data (layer 3) imports utils.data.poison",
        ),
        (
            "utils/data.py",
            "from utils import poison",
            "utils.data (layer 3) imports utils.data.poison",
        ),
        ("utils/data.py", "from . import poison", "utils.data (layer 3) imports utils.data.poison"),
        (
            "utils/data.py",
            "from .poison import x",
            "utils.data (layer 3) imports utils.data.poison",
        ),
        ("utils/errors.py", "def f():\n    import utils.data", "utils.errors (layer -1) imports"),
        (
            "utils/records/attack.py",
            "import utils.train",
            "utils.records.attack (layer 6) imports utils.train",
        ),
        ("utils/data.py", "from attack.lc import x", "utils.data (layer 3) imports attack.lc"),
        ("attack/lc.py", "import attack.wanet", "attack.lc (layer 10) imports attack.wanet"),
        ("defense/ft.py", "from attack import lc", "defense.ft (layer 10) imports attack.lc"),
        ("models/vgg.py", "from models import x", "models.vgg (layer 1) imports models (layer 1)"),
        ("utils/data.py", "import utils.gone", "utils.data imports utils.gone, which is no module"),
        ("utils/new.py", "", "utils.new has no layer"),
    ],
)
def test_the_check_finds_each_way_up(tmp_path: Path, module: str, text: str, problem: str) -> None:
    """One bad file in a tree of empty ones is one violation."""
    for name in ("utils/data", "utils/poison", "utils/train", "attack/lc", "attack/wanet"):
        write(tmp_path, f"{name}.py", "")
    for package in PACKAGES:
        write(tmp_path, f"{package}/__init__.py", "")
    assert violations(tmp_path) == []
    write(tmp_path, module, text)
    (found,) = violations(tmp_path)
    assert found.startswith(problem)


def test_the_check_lets_imports_down_pass(tmp_path: Path) -> None:
    for package in PACKAGES:
        write(tmp_path, f"{package}/__init__.py", "")
    write(tmp_path, "models/vgg.py", "from utils.errors import UserError")
    write(tmp_path, "models/__init__.py", "import torch\nfrom models.vgg import vgg")
    write(tmp_path, "utils/errors.py", "import sys")
    write(tmp_path, "attack/prototype.py", "from models import vgg\nfrom utils import errors")
    write(tmp_path, "attack/lc.py", "from attack.prototype import run\nimport utils.errors")
    assert violations(tmp_path) == []


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


def test_importing_any_module_prints_nothing_and_writes_nothing(tmp_path: Path) -> None:
    modules = modules_under(ROOT)
    assert {"utils.data", "models", "attack.badnet", "defense.sau"} <= set(modules)
    assert watched_imports(ROOT, modules, tmp_path, FOREIGN) == ""
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_prints_and_writes(tmp_path: Path) -> None:
    write(tmp_path, "utils/loud.py", "print('hello')")
    write(tmp_path, "utils/busy.py", "open('left_behind.txt', 'w').close()")
    write(tmp_path, "utils/tidy.py", "open(__file__).close()")
    seen = watched_imports(tmp_path, ["utils.loud", "utils.busy", "utils.tidy"], tmp_path)
    assert "hello" in seen
    assert "utils.busy: opens left_behind.txt for writing" in seen
    assert "utils.tidy" not in seen
