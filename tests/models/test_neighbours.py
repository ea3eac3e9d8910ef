"""What a user's file imports: modules beside it, under any name, seen by its own code alone."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import utils
from models import build_model, model_identity
from models.neighbours import files_beside
from models.views import has_own_code
from tests.scripts import attack_flags, defense_flags, run_script
from utils.errors import UserError
from utils.files import ROOT

pytestmark = pytest.mark.usefixtures("cache")

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, size):
        super().__init__()
        self.linear = nn.Linear(3 * size**2, classes)

    def forward(self, images):
        from utils.misc import scaled
        return scaled(self.linear(images.flatten(1)))
"""
PROJECT = {
    "models/net.py": NET,
    "models/__init__.py": "from models.net import Net\n",
    "utils/__init__.py": "",
    "utils/misc.py": "def scaled(logits):\n    return 2 * logits\n",
}
FILE = """
{imports}

def build(num_classes, image_size):
    return {net}(num_classes, image_size)
"""
SPELLINGS = {
    "from": ("from models import Net", "Net"),
    "module": ("import models.net", "models.net.Net"),
    "other name": ("import models.net as nets", "nets.Net"),
    "in the function": ("", "__import__('models').Net"),
    "by text": ("import importlib", "importlib.import_module('models.net').Net"),
    "by made text": ("import importlib\nn = 'net'", "importlib.import_module(f'models.{n}').Net"),
}


def project(folder: Path, files: dict[str, str]) -> str:
    """Writes files below a folder; the `--model` value of the one named my_net.py."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return f"{folder / 'my_net.py'}:build"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("is_package", [True, False])
def test_a_file_gets_its_own_models_and_utils(
    tmp_path: Path, spelling: str, is_package: bool
) -> None:
    imports, net = SPELLINGS[spelling]
    files = dict(PROJECT)
    if not is_package:  # folders without __init__.py are packages, too
        del files["utils/__init__.py"], files["models/__init__.py"]
        if "models.net" not in imports + net and "models.{n}" not in net:
            imports, net = imports.replace("models", "models.net"), net
            net = net.replace("__import__('models').Net", "__import__('models.net').net.Net")
    name = project(tmp_path, files | {"my_net.py": FILE.format(imports=imports, net=net)})
    before = dict(sys.modules)
    model = build_model(name, 3, image_size=4)
    images = torch.rand(2, 3, 4, 4)
    linear = model.network.linear  # type: ignore[union-attr]
    assert torch.equal(model(images), 2 * linear(images.flatten(1)))  # type: ignore[operator]
    assert sys.modules["models"] is models
    assert sys.modules["utils"] is utils
    changed = {name for name, module in before.items() if sys.modules.get(name) is not module}
    assert {name for name in changed if not name.startswith("user_model_")} == set()
    assert not any(str(tmp_path) in repr(spec) for spec in sys.meta_path)


def test_a_network_of_its_own_models_is_the_user_s_code(tmp_path: Path) -> None:
    """Also one with the name of one of ours; it may take views of images in torch's order."""
    text = NET.replace("flatten(1)", "view(len(images), -1)").replace("Net", "TinyNet")
    file = FILE.format(imports="from models.tiny import TinyNet", net="TinyNet")
    for name in ("net", "tiny"):
        files = {f"models/{name}.py": text, "models/__init__.py": ""}
        files["my_net.py"] = file.replace("tiny", name)
        model = build_model(project(tmp_path / name, PROJECT | files), 3, image_size=4)
        assert has_own_code(model)
        images = torch.rand(2, 3, 4, 4)
        last = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(model(last), model(images))


def test_without_neighbours_the_project_s_own_are_found(tmp_path: Path) -> None:
    """And a file in the checkout gets them, as ever."""
    text = "from models.preactresnet import preactresnet18\n\n"
    text += "def build(num_classes, image_size):\n    return preactresnet18(num_classes)\n"
    assert build_model(project(tmp_path, {"my_net.py": text}), 3, image_size=8).network is not None
    assert files_beside(ROOT / "my_net.py", lambda path: text.encode()) == {}


def test_two_files_with_neighbours_of_one_name_do_not_meet(tmp_path: Path) -> None:
    layers = "from torch import nn\n\nclass Layer(nn.Linear):\n    number = {number}\n"
    file = FILE.format(imports="from layers import Layer", net="lambda c, s: Layer(s, c)")
    file = file.replace("lambda c, s: Layer(s, c)(num_classes, image_size)", "Layer(image_size, 3)")
    numbers = []
    for number in (1, 2):
        files = {"my_net.py": file, "layers.py": layers.format(number=number)}
        model = build_model(project(tmp_path / str(number), files), 3, image_size=4)
        numbers.append(model.network.number)
    assert numbers == [1, 2]
    assert "layers" not in sys.modules


def test_the_hash_is_of_all_that_runs(tmp_path: Path) -> None:
    file = FILE.format(imports="import layers", net="layers.Net")
    name = project(tmp_path, {"my_net.py": file, "layers.py": "import sizes", "unused.py": ""})
    alone = model_identity(project(tmp_path / "alone", {"my_net.py": "import torch\n"}))
    assert alone == ("my_net.py:build", hashlib.sha256(b"import torch\n").hexdigest())

    def lines(*names: str) -> str:
        texts = [(tmp_path / name).read_bytes() for name in names]
        hashes = [hashlib.sha256(text).hexdigest() for text in texts]
        listed = [f"{digest}  {name}" for digest, name in zip(hashes, names, strict=True)]
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()

    assert model_identity(name) == ("my_net.py:build", lines("layers.py", "my_net.py"))
    (tmp_path / "sizes.py").write_text("SIDE = 3\n")  # which layers.py imports
    assert model_identity(name)[1] == lines("layers.py", "my_net.py", "sizes.py")
    (tmp_path / "sizes.py").write_text("SIDE = 4\n")
    assert model_identity(name)[1] == lines("layers.py", "my_net.py", "sizes.py")
    (tmp_path / "unused.py").write_text("SIDE = 4\n")
    assert model_identity(name)[1] == lines("layers.py", "my_net.py", "sizes.py")


def test_a_package_counts_with_all_of_its_files(tmp_path: Path) -> None:
    files = {"nets/__init__.py": "", "nets/deep/other.py": "import sizes", "sizes.py": ""}
    name = project(tmp_path, files | {"my_net.py": "def f():\n    import nets"})
    path = Path(name.rpartition(":")[0])
    beside = files_beside(path, Path.read_bytes)
    assert {
        key: [str(p.relative_to(tmp_path)) for p in paths] for key, paths in beside.items()
    } == {
        "nets": ["nets/__init__.py", "nets/deep/other.py"],
        "sizes": ["sizes.py"],
    }


def test_a_folder_of_data_is_no_module(tmp_path: Path) -> None:
    """Of an installed package's name, it is not taken for it, as Python itself does not."""
    files = {"yaml/notes.py": "", "my_net.py": "import yaml, data"}
    name = project(tmp_path, files)
    (tmp_path / "data").mkdir()
    assert files_beside(Path(name.rpartition(":")[0]), Path.read_bytes) == {}


def test_too_many_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.neighbours._MOST_FILES", 3)
    files = {f"nets/n{number}.py": "" for number in range(4)}
    name = project(tmp_path, files | {"my_net.py": "import nets"})
    with pytest.raises(UserError, match=r"imports more than 3 files beside it \(nets\); give"):
        model_identity(name)


@pytest.mark.slow
def test_a_fault_beside_the_file_is_the_user_s(tmp_path: Path) -> None:
    """At the import one line, and so in a run, with the line of the file beside."""
    file = FILE.format(imports="from models import Net", net="Net")
    broken = project(
        tmp_path, PROJECT | {"my_net.py": file, "models/net.py": "import nothing_here"}
    )
    with pytest.raises(UserError, match=r"No module named 'nothing_here'.*repair it"):
        build_model(broken, 3, image_size=4)
    late = "def scaled(logits):\n    raise SystemExit(0)\n"
    leaves = project(tmp_path / "late", PROJECT | {"my_net.py": file, "utils/misc.py": late})
    text = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from models import build_model\nfrom utils.process.script import run_script\n"
        f"run_script(lambda: build_model({leaves!r}, 3, image_size=4)(torch.rand(2, 3, 4, 4)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    place = tmp_path / "late/utils/misc.py"
    assert ended.stderr.startswith(f"error: --model: {place}, line 2: SystemExit"), ended.stderr
    assert ended.returncode == 2


def test_an_attack_and_a_defense_with_neighbours(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end, as scripts: `models` and `utils` are ours there. A changed neighbour is told."""
    file = FILE.format(imports="from models import Net", net="Net")
    name = project(workplace / "mine", PROJECT | {"my_net.py": file})
    run = [*attack_flags(workplace, "beside"), "--model", name]
    assert run_script(ROOT / "attack/badnet.py", *run) == 0
    again = [*defense_flags(workplace, "beside"), "--model", name]
    assert run_script(ROOT / "defense/ft.py", *again) == 0
    (workplace / "mine/utils/misc.py").write_text("def scaled(logits):\n    return logits\n")
    capsys.readouterr()
    assert run_script(ROOT / "defense/ft.py", *again, "--overwrite") == 2
    assert "is not the file that the record was made with" in capsys.readouterr().err
