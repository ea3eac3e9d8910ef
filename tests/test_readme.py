"""Every command and Python block of the README and of the pages under docs/ runs."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import sau.models
import torch

import analysis
import attack.badnet
import defense
import utils.data.images
from models.tiny import TinyNet
from tests.scripts import run_script
from utils.files import ROOT

pytestmark = pytest.mark.usefixtures("cache")

README, *DOCS = (
    path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
SETTINGS, PYTHON = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("settings.md", "python.md")
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands() -> list[str]:
    """Each command once, in the order of the pages.

    test_interop.py runs those of the section that needs a record of BackdoorBench.
    """
    parts = [part for part in README.split("\n## ") if not part.startswith("BackdoorBench")]
    lines = [
        line.partition("#")[0].strip()
        for part in (*parts, *DOCS)
        for block in blocks("sh", part)
        for line in block.splitlines()
        if line.startswith("python ")
    ]
    return list(dict.fromkeys(lines))


def shortened(flags: list[str], workplace: Path) -> list[object]:
    """The same flags with tiny images in the place of the user's, and one epoch or round."""
    is_attack = "--save_folder_name" in flags
    short: list[object] = list(flags)
    for name, value in (
        ("--dataset", "folder"),
        ("--dataset_path", workplace / "images"),
        ("--model", f"{workplace / 'my_net.py'}:build"),
        ("--state_dict", workplace / "my_model.pt"),
        ("--bd_test_dir", workplace / "triggered"),
    ):
        if name in short:
            short[short.index(name) + 1] = value
        elif is_attack and name.startswith("--dataset"):
            short += [name, value]
    short += ["--record_path", workplace / "record", "--precision", "fp32"]
    if is_attack:
        training = [] if "--state_dict" in short else ["--epochs", 1, "--batch_size", 12]
        return [*short, *training, "--image_size", 16]
    return [*short, "--n_rounds", 1, "--ratio", 0.5]


def users_files(workplace: Path) -> None:
    """my_net.py as it stands on the page, its weights, and a triggered test image of each class."""
    (source,) = (block for block in blocks("python") if block.startswith("# my_net.py\n"))
    (workplace / "my_net.py").write_text(source, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(source, "my_net.py", "exec"), names)
    torch.save(names["build"](3, 16).state_dict(), workplace / "my_model.pt")
    for position, name in ((0, "bright"), (6, "dark"), (12, "striped")):
        folder = workplace / "triggered" / name
        folder.mkdir(parents=True)
        shutil.copy(workplace / "images/test" / name / "0.png", folder / f"{position}.png")


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_commands_run_in_the_order_of_the_pages(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(commands()) >= 20
    users_files(workplace)
    for command in commands():
        _, script, *flags = shlex.split(command)
        if flags == ["--help"]:
            assert run_script(ROOT / script, *flags) == 0
            assert "--random_seed" in capsys.readouterr().out
        elif script == "benchmark/run.py":
            assert run_script(ROOT / script, *flags, "--status") == 0
            assert "digits-preactresnet18-badnet-s0/sau" in capsys.readouterr().out
        elif script == "benchmark/report.py":
            folders = ["--under", workplace / "record", "--to", workplace / "report"]
            assert run_script(ROOT / script, *folders) == 0
            assert "badnet" in (workplace / "report/table.md").read_text()
        elif script.startswith("analysis/"):
            where = ["--record_path", workplace / "record", "--precision", "fp32"]
            assert run_script(ROOT / script, *flags, *where) == 0, command
        else:
            assert run_script(ROOT / script, *shortened(flags, workplace)) == 0, command


@pytest.mark.usefixtures("small")
def test_make_demo_loses_nothing(workplace: Path) -> None:
    """The name of its record is that of all pages, so the user may have one of that name."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(NAME)", "badnet_demo")
    recipe = re.findall(r"^\t\$\(BIN\)/python (\S+\.py) (.*badnet_demo.*)$", makefile, flags=re.M)
    assert [script for script, _ in recipe] == ["attack/badnet.py", "defense/sau.py"]

    def demo() -> list[int]:
        return [
            run_script(ROOT / script, *shortened(shlex.split(flags), workplace))
            for script, flags in recipe
        ]

    def files() -> dict[Path, bytes]:
        paths = [path for path in record.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path: path.read_bytes() for path in paths}

    record = workplace / "record/badnet_demo"
    assert demo() == [0, 0]
    result = shortened(["--result_file", "badnet_demo"], workplace)
    assert run_script(ROOT / "defense/ft.py", *result) == 0
    finished = files()
    assert demo() == [0, 0]
    assert files() == finished
    (record / "defense/sau/summary.json").unlink()  # as if it had failed
    assert demo() == [0, 0]
    assert files().keys() == finished.keys()
    assert (record / "defense/ft/summary.json").read_bytes() in finished.values()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_flags_of_the_settings_table_are_taken(workplace: Path) -> None:
    """Each row's flags, with an attack or with SAU."""
    table = SETTINGS[SETTINGS.index("| want | flags |") :]
    groups = [
        shlex.split(flags) for flags in re.findall(r"`(--[^`]+)`", table) if "file.txt" not in flags
    ]
    assert len(groups) >= 9
    for number, flags in enumerate(groups):
        if flags[0] == "--device":
            continue  # not on every machine
        if flags[0].removeprefix("--") not in attack.badnet.Config.__dataclass_fields__:
            if flags[0] == "--ratio":
                flags = ["--ratio", "0.25"]  # of 36 images
            run = shortened(["--result_file", "flags0"], workplace)
            run += ["--overwrite", *flags]
            assert run_script(ROOT / "defense/sau.py", *run) == 0, flags
            continue
        if "--attack_target" in flags:
            flags = ["--attack_target", "2", "--pratio", "0.1"]  # three classes, 36 images
        run = shortened(["--save_folder_name", f"flags{number}"], workplace)
        if "vgg19_bn" in flags:
            run += ["--image_size", 32]
        assert run_script(ROOT / "attack/badnet.py", *run, *flags) == 0, flags


@pytest.mark.usefixtures("small")
def test_the_yaml_example_is_taken(workplace: Path, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(blocks("yaml", SETTINGS)[0], encoding="utf-8")
    run = shortened(["--save_folder_name", "yaml"], workplace)
    assert run_script(ROOT / "attack/badnet.py", "--yaml_path", path, *run) == 0
    written = (workplace / "record/yaml/config.yaml").read_text()
    assert "pratio: 0.05" in written
    assert "lr: 0.01\n" in written


@pytest.mark.usefixtures("small")
def test_the_python_examples_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sau.models.CONSTRUCTORS, "preactresnet18", TinyNet)
    monkeypatch.setattr("torchvision.models.resnet18", TinyNet)
    monkeypatch.chdir(workplace)
    run = shortened(["--save_folder_name", "badnet_demo", "--overwrite"], workplace)
    assert run_script(ROOT / "attack/badnet.py", *run) == 0
    run = shortened(["--result_file", "badnet_demo"], workplace)
    assert run_script(ROOT / "defense/sau.py", *run, "--overwrite") == 0

    api, _ = blocks("python")
    assert len([line for line in api.splitlines() if line]) <= 4
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
    names: dict[str, Any] = {"model": model, "images": images, "labels": labels}
    exec(compile(api, "README.md", "exec"), names)
    assert names["purified"] is not model
    assert names["demo"](torch.rand(2, 3, 16, 16)).shape == (2, 3)

    own_model, again, export, record = blocks("python", PYTHON)
    names = {}
    exec(compile(own_model, "python.md", "exec"), names)
    assert names["purified"] is not names["model"]
    exec(compile(again, "python.md", "exec"), names)
    assert names["purified"](torch.rand(2, 3, 16, 16)).shape == (2, 3)
    exec(compile(export, "python.md", "exec"), names)
    assert names["logits"].shape == (5, 3)
    capsys.readouterr()
    exec(compile(record, "python.md", "exec"), {})
    assert capsys.readouterr().out == "preactresnet18 3 0\n"


def test_two_defenses_are_compared_in_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the twelve attacks of a grid of `results/`."""
    report = ["--under", ROOT / "results/digits", "--to", tmp_path / "report", "--formats", "csv"]
    assert run_script(ROOT / "benchmark/report.py", *report) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (compared,) = blocks("python", (ROOT / "docs/grids.md").read_text(encoding="utf-8"))
    exec(compile(compared, "grids.md", "exec"), {})
    attacks, gain, p = capsys.readouterr().out.split()
    assert int(attacks) == 12
    assert 0 < float(p) < 1
    assert -1 < float(gain) < 1


def test_the_scripts_of_the_methods_tables_are_all_there_are() -> None:
    scripts = {f"defense/{name}.py" for name in defense.names()}
    scripts |= {f"attack/{name}.py" for name in [*attack.names(), "prototype"]}
    rows = re.findall(r"`python (attack/(\w+)\.py)(?: --save_folder_name (\w+)_demo)?`", README)
    assert all(record in (name, "") for _, name, record in rows)
    listed = {path for path, _, _ in rows}
    analyses = set(re.findall(r"^\| `analysis/(\w+)\.py`", README, flags=re.M))
    assert analyses == set(analysis.names())
    assert listed | set(re.findall(r"^\| `(defense/\w+\.py)`", README, flags=re.M)) == scripts
    assert utils.data.images.ROOT  # the cache of these tests is the workplace's
