"""`sau` from Python: the project's packages beside a user's own of the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import ROOT

USER_SCRIPT = """
import sys
import torch
import models, utils.misc
import sau
from sau import Config, UserError, build_model, load_defense, purify
from sau.defense import ft

assert models.WHOSE == utils.misc.WHOSE == "mine"
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
purified = purify(model, images, labels, Config.load(n_rounds=1, batch_size=6))
assert purified is not model and purified(images).shape == (12, 3)
ft.purify(model, images, labels, ft.Config.load(n_rounds=1, batch_size=6))
assert build_model("tiny", 3)(images).shape == (12, 3)
try:
    purify(model, 255 * images, labels, Config.load(n_rounds=1))
except UserError as error:
    print(error)
try:
    load_defense("nowhere")
except UserError as error:
    print(error)

assert models.WHOSE == utils.misc.WHOSE == "mine"
ours = {"attack", "defense", "interop", "models", "utils"}
taken = {name for name in sys.modules if name.split(".")[0] in ours}
assert taken == {"models", "utils", "utils.misc"}, taken
print(Config.__module__, sau.utils.errors.UserError is UserError)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's script with its own `models` and `utils`."""
    for name in ("models/__init__.py", "utils/__init__.py", "utils/misc.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("WHOSE = 'mine'\n", encoding="utf-8")
    (tmp_path / "script.py").write_text(USER_SCRIPT, encoding="utf-8")
    return tmp_path


def test_a_script_keeps_its_own_models_and_utils(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    pixels, nowhere, last = ended.stdout.splitlines()
    assert pixels.startswith("images: pixels reach from")
    assert nowhere.startswith("nowhere")
    assert last == "sau.defense.sau True"


@pytest.mark.slow
def test_every_module_of_the_project_is_found_under_the_package(tmp_path: Path) -> None:
    """Also those that import others inside functions get the project's own."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("attack", "defense", "interop", "models", "utils")
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert len(names) > 60
    text = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module('sau.' + name)\n"
        f"print([name for name in sys.modules if name.split('.')[0] in {['models', 'utils']}])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", text],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_outside_of_a_checkout_it_says_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "sau").mkdir()
    (tmp_path / "sau/__init__.py").write_bytes((ROOT / "sau/__init__.py").read_bytes())
    ended = subprocess.run(
        [sys.executable, "-c", "import sau"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "is no checkout of the project" in ended.stderr.splitlines()[-1]


def test_installing_it_puts_no_other_name_on_the_import_path() -> None:
    """An editable install of packages that are all in one folder would put that folder there.

    Listing a part with its own folder is what keeps setuptools from it; see pyproject.toml.
    """
    editable_wheel = pytest.importorskip("setuptools.command.editable_wheel")
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = table["tool"]["setuptools"]
    packages, folders = setuptools["packages"], setuptools["package-dir"]
    assert editable_wheel._simple_layout(["sau"], {"sau": "sau"}, ROOT)
    assert not editable_wheel._simple_layout(packages, folders, ROOT)


def test_a_script_may_import_its_own_models_after_sau(folder: Path) -> None:
    """Nor does the checkout stand in the path of processes that it starts."""
    (folder / "script.py").write_text(
        """
import sys

before = list(sys.path)
import sau
from sau.defense import anp, sau_far
assert sys.path == before
import models, utils.misc
assert models.WHOSE == utils.misc.WHOSE == "mine"
""",
        encoding="utf-8",
    )
    program = f"import sys; sys.path.append({str(ROOT)!r}); exec(open('script.py').read())"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
