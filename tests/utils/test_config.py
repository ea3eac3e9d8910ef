"""Typed configuration: the order of its layers, its checks, and every shipped YAML file."""

import dataclasses
import importlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import yaml
from pydantic import Field
from pydantic.fields import FieldInfo

from attack.recipe import TrainingConfig
from defense import sau
from tests.conftest import NO_FILES, put_no_file
from utils import config as configuration
from utils.config import OF_ONE_RUN, Config
from utils.data.datasets import DatasetName
from utils.errors import UserError, suggestion
from utils.files import ROOT
from utils.plain import read_yaml
from utils.values import Endless, OrName, allowed_values, base_of

# What ways to write a number, a boolean, or nothing are for a number, a boolean, and a name.
TEXTS = {
    "7": 7,
    "+1": 1.0,
    "-0": 0,
    "0": 0,
    "1": 1,
    "1e3": 1000.0,
    "1e-4": 0.0001,
    "1.e3": 1000.0,
    ".5": 0.5,
    "+.5": 0.5,
    "5.": 5.0,
    "inf": math.inf,
    ".inf": math.inf,
    ".INF": math.inf,
    "true": True,
    "yes": True,
    "on": True,
    "False": False,
    "no": False,
    "off": False,
    "~": None,
    "null": None,
    "none": None,
    "None": None,
    # Of YAML 1.1 these are 8, 511, 16, 1, 1000, 90, 90.5 and so on.
    **{text: text for text in ("010", "08", "0777", "00.5", "0o10", "0x10", "0b1", "1_000")},
    **{text: text for text in ("1:30", "1:30.5", "190:20:30", "y", "n", "t", "Infinity", "1e")},
}


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Config):
    dataset: Annotated[Literal["digits", "cifar10"], Field(description="which images")]
    lr: Annotated[float, Field(gt=0, le=1, description="step size")]
    lr_scheduler: Annotated[Literal["constant", "cosine"], Field(description="its course")]


@dataclass(frozen=True, kw_only=True)
class ToyConfig(BaseConfig):
    rounds: Annotated[int, Field(ge=1, description="passes over the images")]
    side: Annotated[int | None, Field(ge=1, description="side of the patch, pixels")]
    flip: Annotated[bool, Field(description="mirror the images")]
    widths: Annotated[tuple[int, ...], Field(description="channels by stage")]
    name: Annotated[str | None, Field(description="name of the result")]


SHIPPED = {
    "base/default.yaml": "dataset: digits\nlr: 0.1\nlr_scheduler: constant\n",
    "base/cifar10.yaml": "lr: 0.2\nlr_scheduler: cosine\n",
    "toy/config.yaml": "rounds: 3\nside: null\nflip: false\nwidths: [1, 2]\nname: null\n",
    "toy/cifar10.yaml": "rounds: 5\n",
}


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the two classes into `box/base.py` and `box/toy.py` of a folder, with their YAML."""
    for name, text in SHIPPED.items():
        path = tmp_path / "config" / "box" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for owner, stem in ((BaseConfig, "base"), (ToyConfig, "toy")):
        module = ModuleType(f"box.{stem}")
        module.__file__ = str(tmp_path / "box" / f"{stem}.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(owner, "__module__", module.__name__)
    return tmp_path


def from_flags(*argv: str) -> ToyConfig:
    return ToyConfig.from_command_line(argv, "a toy")


def problems(*argv: str) -> list[str]:
    """The lines of the error that flags lead to."""
    with pytest.raises(UserError) as caught:
        from_flags(*argv)
    return str(caught.value).splitlines()


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- layers -------------------------------------------------------------------------------------


def test_each_layer_goes_over_those_before_it(toy: Path) -> None:
    """lr is 0.1 in the shipped file, and one tenth more in every later layer."""
    first = write(toy, "lr: 0.3\n", "first.yaml")
    second = write(toy, "lr: 0.4\n", "second.yaml")
    argv: list[str] = []
    found = [from_flags().lr]
    for more in (
        ["--dataset", "cifar10"],
        ["--yaml_path", first],
        ["--bd_yaml_path", second],
        ["--lr", "0.5"],
    ):
        argv += more
        found.append(from_flags(*argv).lr)
    assert found == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_bd_yaml_path_goes_over_yaml_path_in_any_order_of_flags(toy: Path) -> None:
    first = write(toy, "lr: 0.3\n", "first.yaml")
    second = write(toy, "lr: 0.4\n", "second.yaml")
    assert from_flags("--bd_yaml_path", second, "--yaml_path", first).lr == 0.4


def test_a_method_goes_over_the_pipeline(toy: Path) -> None:
    """The base says cosine for cifar10; the toy's own file, read after both of the base's, wins."""
    assert from_flags("--dataset", "cifar10").lr_scheduler == "cosine"
    shipped = toy / "config" / "box" / "toy" / "config.yaml"
    shipped.write_text(SHIPPED["toy/config.yaml"] + "lr_scheduler: constant\n", encoding="utf-8")
    assert from_flags("--dataset", "cifar10").lr_scheduler == "constant"


def test_the_dataset_of_a_users_file_picks_the_dataset_yaml(toy: Path) -> None:
    path = write(toy, "dataset: cifar10\n")
    config = from_flags("--yaml_path", path)
    assert (config.dataset, config.lr, config.rounds) == ("cifar10", 0.2, 5)


def test_find_dataset_sees_all_values_and_picks_the_dataset_yaml() -> None:
    config = ToyConfig.from_command_line(
        ["--name", "cifar10"], "a toy", find_dataset=lambda values: values["name"]
    )
    assert (config.lr, config.rounds) == (0.2, 5)


def test_load_takes_shipped_values_and_overrides() -> None:
    expected = ToyConfig(
        dataset="digits",
        lr=0.1,
        lr_scheduler="constant",
        rounds=9,
        side=None,
        flip=False,
        widths=(1, 2),
        name=None,
    )
    assert ToyConfig.load(rounds=9) == expected


def test_load_applies_the_files_of_the_dataset() -> None:
    assert ToyConfig.load("cifar10").rounds == 5
    assert ToyConfig.load(dataset="cifar10").rounds == 5
    assert ToyConfig.load("cifar10", rounds=2).rounds == 2


def test_load_reports_every_bad_override() -> None:
    with pytest.raises(UserError) as caught:
        ToyConfig.load(rouns=4, lr="0.5", flip=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "rouns" in lines[0]
    assert "did you mean rounds?" in lines[0]
    assert "lr: '0.5' is not allowed; give float in (0, 1]" in lines[1]


def test_a_class_of_a_module_without_a_file_has_no_shipped_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a notebook, whose `__main__` has no `__file__`."""
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    monkeypatch.setattr(ToyConfig, "__module__", "notebook")
    config = ToyConfig.load(rounds=1, side=2, flip=True, widths=(3,), name="x")
    assert config.lr == 0.1  # of the base, which has a file


def test_numpy_s_numbers_and_paths_become_plain_values() -> None:
    config = ToyConfig.load(
        lr=np.float32(0.5),
        rounds=np.int64(2),
        flip=np.bool_(True),
        widths=[np.int32(3), 4],
        name=Path("a/b"),
    )
    assert config == ToyConfig.load(lr=0.5, rounds=2, flip=True, widths=(3, 4), name="a/b")
    given = (config.lr, config.rounds, config.flip, *config.widths, config.name)
    assert [type(value) for value in given] == [float, int, bool, int, int, str]
    assert yaml.safe_load(config.dump())["rounds"] == 2
    for wrong in (np.float64(2.5), np.bool_(True), Path("2")):
        with pytest.raises(UserError, match=r"rounds: .* is not allowed; give int"):
            ToyConfig.load(rounds=wrong)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ToyConfig.load().lr = 0.5  # type: ignore[misc]


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.e-4", ".1e-3", "1.0e-4", "0.0001"])
def test_every_way_to_write_a_number_is_a_number(toy: Path, text: str) -> None:
    assert from_flags("--yaml_path", write(toy, f"lr: {text}\n")).lr == 0.0001


@pytest.mark.parametrize("text", ["e-4", "1e", "1e-4x", "v1e-4"])
def test_text_that_only_resembles_a_number_stays_text(toy: Path, text: str) -> None:
    assert from_flags("--yaml_path", write(toy, f"name: {text}\n")).name == text


@dataclass(frozen=True, kw_only=True)
class Kinds(Config):
    """A field of every kind, each of which may be missing."""

    number: Annotated[float | None, Field(description="a number")] = None
    count: Annotated[int | None, Field(description="a whole number")] = None
    is_on: Annotated[bool | None, Field(description="a boolean")] = None
    name: Annotated[str | None, Field(description="a text")] = None
    attack_target: Annotated[int | None, Field(ge=0, description="a label or a name"), OrName] = (
        None
    )
    shares: Annotated[tuple[float, ...], Field(description="numbers")] = ()
    u: Annotated[float | None, Field(ge=0, description="a threshold"), Endless] = None


KINDS: dict[str, Any] = {
    **{"number": None, "count": None, "is_on": None, "name": None, "attack_target": None},
    **{"shares": (), "u": None},
}
REFUSED = "refused"


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Kinds` in a module that has no YAML files."""
    monkeypatch.setitem(sys.modules, "box.kinds", ModuleType("box.kinds"))
    monkeypatch.setattr(Kinds, "__module__", "box.kinds")


def refused(*argv: str) -> str:
    """The one line of the error that flags of `Kinds` lead to."""
    missing = [
        f"--{name}={'[]' if value == () else 'null'}"
        for name, value in KINDS.items()
        if f"--{name}" not in argv
    ]
    with pytest.raises(UserError) as caught:
        Kinds.from_command_line([*missing, *argv], "")
    (problem,) = caught.value.problems
    return problem


def taken(toy: Path, name: str, text: str) -> tuple[Any, Any]:
    """The value, or that it is refused, of a text as a flag and in a YAML file."""
    written = f"[{text}]" if name == "shares" else text
    rest = "".join(
        f"{key}: {'[]' if value == () else 'null'}\n" for key, value in KINDS.items() if key != name
    )
    ways = (
        ["--yaml_path", write(toy, rest, "rest.yaml"), f"--{name}={text}"],
        ["--yaml_path", write(toy, f"{rest}{name}: {written}\n", "all.yaml")],
    )
    values = []
    for argv in ways:
        try:
            values.append(getattr(Kinds.from_command_line(argv, ""), name))
        except UserError as error:
            (problem,) = error.problems
            assert " is not allowed" in problem
            values.append(REFUSED)
    return values[0], values[1]


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_flag_and_a_file_read_the_same(toy: Path, text: str, name: str) -> None:
    """Or one of them refuses it; neither reads it as something else than the other."""
    by_flag, in_file = taken(toy, name, text)
    assert REFUSED in (by_flag, in_file) or by_flag == in_file
    meant = TEXTS[text]
    if meant is None and name not in ("shares", "name"):
        assert by_flag == in_file is None
    elif name in ("number", "count", "is_on", "u"):
        kinds = {"number": (int, float), "count": (int,), "is_on": (bool,), "u": (int, float)}[name]
        allowed = type(meant) in kinds and (name == "u" or meant != math.inf)
        assert in_file == (meant if allowed else REFUSED)
        is_number = name == "is_on" and type(meant) is int and meant in (0, 1)
        assert by_flag == (bool(meant) if is_number else in_file)
    elif name == "attack_target":
        assert by_flag == (meant if type(meant) is int else text)
        assert in_file == (meant if type(meant) in (int, str) else REFUSED)
    elif name == "shares":
        allowed = type(meant) in (int, float) and meant != math.inf
        assert by_flag == in_file == ((meant,) if allowed else REFUSED)


@pytest.mark.parametrize("text", ["conv,bn", "conv, bn", "[conv, bn]", " [ conv ,bn ] "])
def test_items_of_a_list_have_no_blanks_around_them(text: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Layers(Config):
        layers: Annotated[tuple[str, ...], Field(description="names")] = ()

    assert Layers.from_command_line([f"--layers={text}"], "").layers == ("conv", "bn")


def test_what_is_wrong_with_a_number_is_said(toy: Path) -> None:
    path = write(toy, "rounds: 010\nwidths: [007]\nlr: 1:30\n")
    zero = "without a zero in front"
    assert problems("--yaml_path", path) == [
        f"{path}: rounds: 010 is not allowed; give int >= 1, {zero}",
        f"{path}: widths: ['007'] is not allowed; give a list of int, separated by commas, {zero}",
        f"{path}: lr: 1:30 is not allowed; give float in (0, 1]",
    ]
    assert problems("--rounds", "010") == [
        f"--rounds: 010 is not allowed; give int >= 1, {zero}",
    ]


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize(
    ("flag", "value", "advice"),
    [
        ("count", "99999999999999999999", "int in [-9223372036854775807, 9223372036854775807] or"),
        ("attack_target", str(2**63), "int in [0, 9223372036854775807] or null or the name of a c"),
        ("number", "inf", "a finite number: float in [-1e+30, 1e+30] or null"),
        ("number", "-.inf", "a finite number: float in [-1e+30, 1e+30] or null"),
        ("number", "nan", "a finite number: float in [-1e+30, 1e+30] or null"),
        ("number", "1e31", "float in [-1e+30, 1e+30] or null"),
        ("count", "inf", "a finite number: int in [-9223372036854775807, 9223372036854775807]"),
        ("shares", "0,1e400", "finite numbers: a list of float in [-1e+30, 1e+30], separated by"),
        ("shares", "1e38,0", "a list of float in [-1e+30, 1e+30], separated by commas"),
        ("u", "-inf", "float >= 0 or null"),
        ("u", "nan", "float >= 0 or null"),
    ],
)
def test_a_number_that_is_too_large_is_told_the_limit(flag: str, value: str, advice: str) -> None:
    assert refused(f"--{flag}", value).startswith(
        f"--{flag}: {value} is not allowed; give {advice}"
    )


@pytest.mark.parametrize("text", ["3", "4,5,6", "4, 5, 6", "[4, 5, 6]", "[]", "'4,5'"])
def test_a_list_in_a_file_is_written_as_a_flag_is(toy: Path, text: str) -> None:
    by_flag = from_flags(f"--widths={text.strip(chr(39))}")
    assert from_flags("--yaml_path", write(toy, f"widths: {text}\n")) == by_flag
    assert ToyConfig.load(widths=yaml.safe_load(text)) == by_flag


def test_names_in_a_file_are_written_as_a_flag_is(toy: Path) -> None:
    for text in ("layer3", "layer3,layer4", "layer3, layer4", "[layer3, layer4]", "null"):
        path = write(toy, f"attention_layers: {text}\n")
        values = []
        for argv in ([f"--attention_layers={text}"], ["--yaml_path", path]):
            try:
                config = CONFIGS["defense/nad"].from_command_line(argv, "", lambda values: "digits")
                values.append(config.attention_layers)
            except UserError:
                values.append(REFUSED)
        assert REFUSED in values if text == "null" else values[0] == values[1]


@pytest.mark.parametrize("line", ["widths: ['3']", "widths: [true]", "widths: [2.0]", "widths: x"])
def test_the_items_of_a_list_in_a_file_have_their_type(toy: Path, line: str) -> None:
    path = write(toy, f"{line}\n")
    (problem,) = problems("--yaml_path", path)
    assert problem.endswith("is not allowed; give a list of int, separated by commas")


@pytest.mark.usefixtures("kinds")
def test_a_threshold_may_be_infinite(toy: Path) -> None:
    """Of `u` alone; the configuration that is written reads back the same."""
    missing = [
        f"--{name}={'[]' if value == () else 'null'}"
        for name, value in KINDS.items()
        if name != "u"
    ]
    config = Kinds.from_command_line([*missing, "--u", "inf"], "")
    assert config.u == math.inf
    path = write(toy, config.dump())
    assert Kinds.from_command_line(["--yaml_path", path], "") == config


def test_a_whole_number_is_fine_for_a_float(toy: Path) -> None:
    lr = from_flags("--yaml_path", write(toy, "lr: 1\n")).lr
    assert lr == 1
    assert type(lr) is float


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--lr", "1e-4"], "lr", 0.0001),
        (["--lr=0.25"], "lr", 0.25),
        (["--rounds", "7"], "rounds", 7),
        (["--side", "4"], "side", 4),
        (["--side", "null"], "side", None),
        (["--side", "None"], "side", None),
        (["--flip"], "flip", True),
        (["--flip", "--lr", "0.5"], "flip", True),
        (["--flip", "false"], "flip", False),
        (["--widths", "4,5,6"], "widths", (4, 5, 6)),
        (["--widths", "[4, 5, 6]"], "widths", (4, 5, 6)),
        (["--widths", "[]"], "widths", ()),
        (["--name", "null"], "name", None),
        (["--name", "17"], "name", "17"),
    ],
)
def test_flags_become_the_type_of_their_field(argv: list[str], field: str, value: Any) -> None:
    found = getattr(from_flags(*argv), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "key", "allowed"),
    [
        ('lr: "0.1"', "lr", "float in (0, 1]"),
        ("lr: fast", "lr", "float in (0, 1]"),
        ("lr: true", "lr", "float in (0, 1]"),
        ("lr: null", "lr", "float in (0, 1]"),
        ("lr: [0.1]", "lr", "float in (0, 1]"),
        ("rounds: 2.5", "rounds", "int >= 1"),
        ("rounds: true", "rounds", "int >= 1"),
        ('rounds: "3"', "rounds", "int >= 1"),
        ("side: big", "side", "int >= 1 or null"),
        ("flip: 1", "flip", "true or false"),
        ('flip: "true"', "flip", "true or false"),
        ("dataset: mnist", "dataset", "one of digits, cifar10"),
        ("dataset: 3", "dataset", "one of digits, cifar10"),
        ("widths: 3.5", "widths", "a list of int, separated by commas"),
        ("widths: [wide]", "widths", "a list of int, separated by commas"),
        ("name: 3", "name", "text or null, in quotes"),
        ("name: no", "name", "text or null, in quotes"),
    ],
)
def test_a_yaml_value_of_the_wrong_type_is_refused(
    toy: Path, line: str, key: str, allowed: str
) -> None:
    path = write(toy, line + "\n")
    (problem,) = problems("--yaml_path", path)
    assert problem.startswith(f"{path}: {key}: ")
    assert problem.endswith(f"is not allowed; give {allowed}")


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("lr", "abc", "float in (0, 1]"),
        ("lr", "true", "float in (0, 1]"),
        ("rounds", "2.5", "int >= 1"),
        ("rounds", "null", "int >= 1"),
        ("flip", "maybe", "true or false"),
        ("dataset", "mnist", "one of digits, cifar10"),
        ("widths", "1,wide", "a list of int, separated by commas"),
    ],
)
def test_a_flag_of_the_wrong_type_is_refused(flag: str, value: str, allowed: str) -> None:
    assert problems(f"--{flag}", value) == [f"--{flag}: {value} is not allowed; give {allowed}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "0"),
        ("lr", "1.0001"),
        ("lr", "-0.1"),
        ("lr", "nan"),
        ("lr", "inf"),
        ("rounds", "0"),
        ("rounds", "-3"),
        ("side", "0"),
    ],
)
def test_a_value_out_of_range_is_refused(toy: Path, key: str, value: str) -> None:
    (by_flag,) = problems(f"--{key}", value)
    assert by_flag.startswith(f"--{key}: {value} is not allowed; give ")
    in_yaml = {"nan": ".nan", "inf": ".inf"}.get(value, value)
    path = write(toy, f"{key}: {in_yaml}\n")
    (by_file,) = problems("--yaml_path", path)
    assert by_file.startswith(f"{path}: {key}: ")


def test_infinity_is_refused_where_no_upper_bound_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite learning rate or radius passes `> 0`, and breaks the run only after it began."""

    @dataclass(frozen=True, kw_only=True)
    class Open(Config):
        lr: Annotated[float, Field(gt=0, description="step size")]

    monkeypatch.setattr(Open, "__module__", "box.toy")
    with pytest.raises(UserError, match="inf is not allowed"):
        Open.from_command_line(["--lr", "inf"], "")
    with pytest.raises(UserError, match="1e38 is not allowed"):  # Adam divides it by 1 - beta
        Open.from_command_line(["--lr", "1e38"], "")


def test_a_small_negative_number_is_a_value_and_not_a_flag() -> None:
    """argparse alone takes -1e-4 for the name of a flag, and --lr for one without a value."""
    assert problems("--lr", "-1e-4") == ["--lr: -1e-4 is not allowed; give float in (0, 1]"]


# --- problems -----------------------------------------------------------------------------------


def test_a_misspelt_key_names_its_file_and_the_nearest_name(toy: Path) -> None:
    path = write(toy, "rouns: 4\n")
    assert problems("--yaml_path", path) == [
        f"{path}: rouns: unknown name (did you mean rounds?); --help lists them"
    ]


def test_a_misspelt_key_in_a_shipped_file_is_refused_too(toy: Path) -> None:
    (toy / "config" / "box" / "toy" / "cifar10.yaml").write_text("rouns: 5\n", encoding="utf-8")
    (problem,) = problems("--dataset", "cifar10")
    assert "config/box/toy/cifar10.yaml: rouns" in problem.replace("\\", "/")


@pytest.mark.parametrize("argv", [["--rouns=4"], ["--rouns", "4"], ["--rouns"]])
def test_a_misspelt_flag_is_one_problem_with_the_nearest_name(argv: list[str]) -> None:
    (problem,) = problems(*argv)
    assert problem.startswith("--rouns: unknown flag (did you mean --rounds?)")


def test_an_abbreviated_flag_is_not_guessed() -> None:
    """--round could only be --rounds today, but would change meaning with a new flag."""
    assert any("--round: unknown flag" in line for line in problems("--round=4"))
    parser = configuration.Parser()
    command = parser.add_subparsers().add_parser("go")
    for one, words in ((parser, ["--round=4"]), (command, ["--round", "4"])):
        one.add_argument("--rounds")
        with pytest.raises(UserError, match="--round"):
            one.parse_args(words)


def test_no_script_has_a_parser_of_another_kind() -> None:
    """Which would guess flags, and say what is wrong in its own way."""
    rooms = ("analysis", "attack", "benchmark", "defense", "interop", "models", "perf", "utils")
    scripts = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(scripts) > 50
    made = [path for path in scripts if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert made == []  # that of `utils.config` has it for its base


@pytest.mark.parametrize("value", ["-1,2", "-0.5,0,0", "-.5", "-.inf,1", "-1, 2", "-3x"])
def test_a_value_that_begins_with_a_minus_is_one(value: str) -> None:
    assert problems("--lr", value) == [f"--lr: {value} is not allowed; give float in (0, 1]"]
    parser = configuration.Parser()
    parser.add_argument("--rounds")
    assert parser.parse_args(["--rounds", value]).rounds == value


def test_a_list_may_begin_with_a_minus() -> None:
    assert from_flags("--widths", "-1,2").widths == (-1, 2)


@pytest.mark.parametrize("argv", [["--", "--rounds", "4"], ["--rounds", "--", "4"], ["--"]])
def test_two_dashes_alone_are_said_to_be_no_flag(argv: list[str]) -> None:
    """For argparse every word after them is a value, also one that is the name of a flag."""
    message = "--: is no flag; leave it out, because every word belongs to a flag"
    assert problems(*argv) == [message]
    assert problems(*argv, "--rouns=4")[0].startswith("--rouns: unknown flag (did you mean")


def test_text_that_belongs_to_no_flag_is_named() -> None:
    (problem,) = problems("--lr", "0.5", "stray")
    assert problem.startswith("stray: ")


def test_a_number_in_quotes_is_shown_with_them(toy: Path) -> None:
    """In a YAML file, the quotes are what is wrong."""
    path = write(toy, 'rounds: "3"\n', "quotes.yaml")
    assert problems("--yaml_path", path) == [f"{path}: rounds: '3' is not allowed; give int >= 1"]


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [("lr", "float in (0, 1]"), ("yaml_path", "a file"), ("bd_yaml_path", "a file")],
)
def test_a_flag_without_its_value_is_named(flag: str, allowed: str) -> None:
    assert problems(f"--{flag}") == [f"--{flag}: a value is missing; give {allowed}"]
    assert problems(f"--{flag}", "") == problems(f"--{flag}")  # an unset variable of a shell
    assert problems(f"--{flag}", "--rounds", "2") == problems(f"--{flag}")


def test_a_flag_that_is_given_twice_has_its_last_value() -> None:
    assert from_flags("--lr", "0.5", "--lr=0.2", "--flip", "--flip", "false").lr == 0.2


def test_all_problems_are_reported_together_each_with_its_source(toy: Path) -> None:
    first = write(toy, "lr: fast\nrouns: 1\n", "first.yaml")
    second = write(toy, "flip: 3\n", "second.yaml")
    found = problems(
        "--yaml_path", first, "--bd_yaml_path", second, "--rounds", "0", "--side", "--nmae=x"
    )
    starts = [
        f"{first}: lr: fast",
        f"{first}: rouns: unknown name",
        f"{second}: flip: 3",
        "--rounds: 0",
        "--side: a value is missing",
        "--nmae: unknown flag (did you mean --name?)",
    ]
    assert len(found) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in found) == 1, start


def test_a_bad_value_is_reported_even_if_a_later_layer_replaces_it(toy: Path) -> None:
    path = write(toy, "lr: fast\n")
    (problem,) = problems("--yaml_path", path, "--lr", "0.5")
    assert problem.startswith(f"{path}: lr")


def test_a_value_that_no_layer_gives_is_asked_for(toy: Path) -> None:
    (toy / "config" / "box" / "toy" / "config.yaml").write_text(
        "side: null\nflip: false\nwidths: []\nname: null\n", encoding="utf-8"
    )
    assert problems() == ["--rounds: a value is needed; give int >= 1"]
    assert from_flags("--rounds", "2").rounds == 2


def test_a_needed_value_is_asked_for_beside_a_problem_with_a_longer_name(toy: Path) -> None:
    """No layer gives lr; the problem with lr_scheduler, whose name begins alike, is another one."""
    (toy / "config" / "box" / "base" / "default.yaml").write_text(
        "dataset: digits\nlr_scheduler: constant\n", encoding="utf-8"
    )
    found = problems("--lr_scheduler", "linear")
    assert sorted(line.split(":")[0] for line in found) == ["--lr", "--lr_scheduler"]


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr: 0.1\nrounds: 2\nlr: 0.2\n", "'lr' stands twice"),
        ("- lr\n- rounds\n", "not a mapping"),
        ("just text\n", "not a mapping"),
        ("3: x\n", "not a mapping"),
        ("lr: [0.1\n", "not valid YAML"),
        ("lr: 0.1\n---\nlr: 0.2\n", "not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("name: !!int ''\n", "tags (tag:yaml.org,2002:int) are not read"),
        ("name: !!bool foo\n", "tags (tag:yaml.org,2002:bool) are not read"),
        ("name: !!timestamp x\n", "tags (tag:yaml.org,2002:timestamp) are not read"),
        ("name: ! x\n", "tags (!) are not read"),
        ("!!map {name: x}\n", "tags (tag:yaml.org,2002:map) are not read"),
        ("!!set {name}\n", "tags (tag:yaml.org,2002:set) are not read"),
        ("%TAG ! !x\n---\nname: !y x\n", "tags (!xy) are not read"),
        ("<<: {lr: 0.1}\n", "<<: unknown name"),
        ("? [lr]\n: 0.1\n", "a key is a list or a mapping"),
        ("lr: " + "[" * 60_000, "more than 16 lists and mappings in each other"),
        ("- " * 30_000, "more than 16 lists and mappings in each other"),
        ("lr: 1" + "0" * 60_000 + "\n", "not valid YAML"),
        ("lr: 0x" + "f" * 60_000 + "\n", "fff is not allowed; give float in (0, 1]"),
        ("lr: 1" + ":1" * 30_000 + ".5\n", ":1.5 is not allowed; give float in (0, 1]"),
        ("lr: 1" + "0" * 4000 + "\n", "give float in (0, 1]"),
        ("name: [" + "1," * 30_000 + "]\n", "name: [1, 1, 1"),
        ("name: {a: \x1b[31m}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_flat_mapping_is_refused(toy: Path, text: str, reason: str) -> None:
    path = write(toy, text)
    (problem,) = problems("--yaml_path", path)
    assert problem.startswith(f"{path}: ")
    assert problem.count(path) == 1
    assert reason in problem
    assert len(problem) < 600


@pytest.mark.parametrize("text", ["2024-01-01", "2024-13-45", "=", "<<"])
def test_dates_and_marks_are_texts(toy: Path, text: str) -> None:
    assert from_flags("--yaml_path", write(toy, f"name: {text}\n")).name == text


@pytest.mark.parametrize("pair", ["{}:\n", "a{}: 1\n"])
def test_time_grows_with_the_number_of_keys_alone(tmp_path: Path, pair: str) -> None:
    """Each key was once compared with all others: four times the keys, sixteen times the time."""

    def seconds(count: int) -> float:
        path = tmp_path / f"{count}.yaml"
        path.write_text("".join(pair.format(chr(0x4E00 + number)) for number in range(count)))
        start = time.process_time()
        read_yaml(path)
        return time.process_time() - start

    few, many = (min(seconds(count) for _ in range(3)) for count in (1500, 6000))
    assert many / few < 10


@pytest.mark.parametrize("kind", [*NO_FILES, "no text"])
def test_what_is_no_file_of_text_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.yaml"
    if kind == "no text":
        path.write_bytes(b"lr: \xff\n")
    else:
        put_no_file(path, kind)
    with pytest.raises(UserError, match=rf"^{path}: (cannot be read|not valid YAML)") as caught:
        read_yaml(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../base/default", "{toy}/x", "x" * 300, "\0", "\udc80", ".", ""])
def test_a_dataset_that_is_a_path_picks_no_file(
    toy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is refused as a dataset, and nothing is opened for it."""
    write(toy, "rounds: 7\n", "x.yaml")
    read: list[Path] = []

    def reading(path: Path) -> dict[str, Any]:
        read.append(path.relative_to(toy / "config/box"))
        return read_yaml(path)

    monkeypatch.setattr(configuration, "read_yaml", reading)
    with pytest.raises(UserError, match=r"^override: dataset: .* is not allowed; give one of"):
        ToyConfig.load(name.format(toy=toy))
    assert set(map(str, read)) == {"base/default.yaml", "toy/config.yaml"}


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097])
def test_a_text_that_no_system_takes_is_refused(toy: Path, name: str) -> None:
    path = write(toy, f"name: {json.dumps(name)}\n")
    (problem,) = problems("--yaml_path", path)
    assert "is not allowed; give text or null, of at most 4096 characters and without" in problem
    assert len(problem) < 400
    assert problems("--name", name) == [problem.replace(f"{path}: name", "--name")]


@pytest.mark.parametrize("blank", ["", " ", "\t \n"])
def test_a_blank_text_is_no_value(toy: Path, blank: str) -> None:
    """As of a variable that is not set; it would be the present folder, or one without a name."""
    path = write(toy, f"name: {json.dumps(blank)}\n")
    escaped = json.dumps(blank)[1:-1]
    assert problems("--yaml_path", path) == [
        f"{path}: name: '{escaped}' is not allowed; give text or null, not blank"
    ]
    assert problems("--name", blank) == ["--name: a value is missing; give text or null"]
    assert problems("--yaml_path", blank) == ["--yaml_path: a value is missing; give a file"]
    parser = configuration.Parser()
    parser.add_argument("--model")
    with pytest.raises(UserError, match="the value is empty; give one, or leave the flag out"):
        parser.parse_args(["--model", blank])


@pytest.mark.parametrize("text", [",", "conv,", ",conv", "[conv, , bn]"])
def test_a_list_has_no_blank_items(toy: Path, text: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Layers(Config):
        layers: Annotated[tuple[str, ...], Field(description="names")] = ()

    with pytest.raises(UserError, match="is not allowed; give a list of text"):
        Layers.from_command_line([f"--layers={text}"], "")
    assert problems(f"--widths={text.replace('conv', '1').replace('bn', '2')}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lr: yes", "lr: true"),
        ("lr: ~", "lr: null"),
        ("lr: {a: 1}", "lr: {a: 1}"),
        ("lr: [no, none]", "lr: [false, null]"),
        ("lr: .inf", "lr: .inf"),
    ],
)
def test_a_value_is_shown_as_yaml_has_it(toy: Path, line: str, told: str) -> None:
    (problem,) = problems("--yaml_path", write(toy, f"{line}\n"))
    assert f": {told} is not allowed" in problem


@pytest.mark.parametrize("text", ["+20", "20.0", "2e1"])
def test_a_whole_number_has_digits_alone(toy: Path, text: str) -> None:
    """With a plus it may be the name of a class, so that it is no whole number elsewhere either."""
    expected = "is not allowed; give int >= 1, in digits alone"
    (problem,) = problems("--yaml_path", write(toy, f"rounds: {text}\n"))
    assert problem.endswith(expected)
    assert problems("--rounds", text) == [f"--rounds: {text} {expected}"]
    assert problems("--lr", text) == [f"--lr: {text} is not allowed; give float in (0, 1]"]


def test_a_number_of_thousands_of_digits_is_told_without_python_s_words(toy: Path) -> None:
    (problem,) = problems("--yaml_path", write(toy, f"rounds: {'9' * 6000}\n"))
    assert "(a number has thousands of digits)" in problem


def test_an_empty_home_is_no_root(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    for argv in (["--yaml_path=~/x"], ["--record_path=~/x"]):
        with pytest.raises(UserError, match=r"^HOME: is empty, but ~/x is in it; set HOME, or "):
            CONFIGS["defense/ft"].from_command_line(argv, "")


def test_a_text_of_bytes_that_are_no_utf_8_is_kept(toy: Path) -> None:
    """As Python gives such paths; the YAML that is written reads back the same."""
    name = os.fsdecode(b"/tmp/\xff\xfe")
    config = from_flags("--name", name)
    assert config.name == name
    assert from_flags("--yaml_path", write(toy, config.dump())) == config


def test_bytes_that_are_no_text_are_refused(toy: Path) -> None:
    path = toy / "mine.yaml"
    path.write_bytes(b"lr: \xff\xfe\n")
    (problem,) = problems("--yaml_path", str(path))
    assert problem.startswith(f"{path}: not valid YAML")


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(toy: Path, name: str) -> None:
    path = str(toy / name)
    (problem,) = problems("--yaml_path", path)
    assert problem.startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_file_changes_nothing(toy: Path, text: str) -> None:
    assert from_flags("--yaml_path", write(toy, text)) == from_flags()


# --- help and dump ------------------------------------------------------------------------------


def test_help_prints_each_field_with_its_resolved_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        from_flags("--dataset", "cifar10", "--side", "4", "--name", "x", "-h")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("a toy\n")
    lines = [line.strip() for line in text.splitlines()]
    for line in (
        "--dataset cifar10",
        "--lr 0.2",
        "--lr_scheduler cosine",
        "--rounds 5",
        "--side 4",
        "--name x",
        "--flip false",
        "--yaml_path FILE",
        "--bd_yaml_path FILE",
    ):
        assert line in lines
    for field in dataclasses.fields(ToyConfig):
        assert any(line.startswith(f"--{field.name} ") for line in lines)
    assert "passes over the images [int >= 1]" in lines


@dataclass(frozen=True, kw_only=True)
class Grouped(Config):
    """Groups that are not in the order in which help shows them."""

    first: Annotated[int, Field(description="no group")]
    lr: Annotated[float, Field(description="step size"), configuration.Group.TRAINING]
    wd: Annotated[float, Field(description="the same group")]
    data: Annotated[str, Field(description="which images"), configuration.Group.DATA]
    epochs: Annotated[int, Field(description="again"), configuration.Group.TRAINING]


@dataclass(frozen=True, kw_only=True)
class Method(Grouped):
    flags_title = "This toy"

    own: Annotated[int, Field(description="of the method, whatever the base's last group is")]
    path: Annotated[str, Field(description="of a base's group"), configuration.Group.DATA]


def test_help_groups_flags_by_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A mark holds up to the next one in its class; a field without one is the method's."""
    with pytest.raises(SystemExit):
        Method.from_command_line(["--help", "--lr", "0.5"], "a toy")
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line for line in lines if line and not line.startswith("      ")] == [
        *("This toy", "  --first null", "  --own null"),
        *("Data", "  --data null", "  --path null"),
        *("Training", "  --lr 0.5", "  --wd null", "  --epochs null"),
        *("Your own files", "  --yaml_path FILE", "  --bd_yaml_path FILE"),
    ]


def test_help_comes_even_with_bad_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        from_flags("-h", "--lr", "fast", "--rouns=4")
    assert caught.value.code == 0
    assert "--rounds 3" in capsys.readouterr().out


def test_help_comes_without_the_dataset_if_flags_are_bad(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flag without its value may be the very one that names the dataset."""
    with pytest.raises(SystemExit) as caught:
        ToyConfig.from_command_line(
            ["--help", "--name"], "a toy", find_dataset=lambda values: values["absent"]
        )
    assert caught.value.code == 0
    assert "--rounds 3" in capsys.readouterr().out


def test_dump_reads_back_equal(toy: Path) -> None:
    config = from_flags("--lr", "1e-5", "--widths", "4,5", "--flip", "--name", "ünïcode 猫")
    path = write(toy, config.dump(), "dumped.yaml")
    assert from_flags("--yaml_path", path) == config


@pytest.mark.parametrize(
    "name",
    [*TEXTS, "1e5", "17", "0x1F", "2024-01-01", "a: b", "#x", ".nan", "-inf", "NONE", "+7"],
)
def test_dump_keeps_text_as_text(toy: Path, name: str) -> None:
    """A name that YAML, or this program's wider notion of a number, would read otherwise."""
    config = dataclasses.replace(ToyConfig.load(), name=name)
    path = write(toy, config.dump(), "dumped.yaml")
    assert from_flags("--yaml_path", path) == config
    assert yaml.safe_load(config.dump())["name"] == name  # by other programs


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[float, Field(gt=0, le=1)], "float in (0, 1]"),
        (Annotated[float, Field(ge=0, lt=1)], "float in [0, 1)"),
        (Annotated[int, Field(ge=1)], "int >= 1"),
        (Annotated[float, Field(gt=0)], "float > 0"),
        (Annotated[float, Field(le=2)], "float <= 2"),
        (Annotated[float, Field(lt=2)], "float < 2"),
        (Annotated[int | None, Field(ge=1)], "int >= 1 or null"),
        (Annotated[bool, Field()], "true or false"),
        (str, "text"),
        (Annotated[str | None, Field()], "text or null"),
        (Annotated[Literal["a", "b"], Field()], "one of a, b"),
        (Annotated[tuple[float, ...], Field()], "a list of float, separated by commas"),
    ],
)
def test_allowed_values_in_words(annotation: Any, words: str) -> None:
    assert allowed_values(annotation) == words


def test_suggestion_is_the_nearest_name_or_nothing() -> None:
    assert suggestion("epoch", ["epochs", "lr"]) == " (did you mean epochs?)"
    assert suggestion("zzz", ["epochs", "lr"]) == ""
    assert suggestion("", ["", "lr"]) == ""


# --- what the repository ships ------------------------------------------------------------------


def shipped_configs() -> dict[str, type[Config]]:
    """Script, as "attack/badnet", to the configuration that it reads from the command line."""
    scripts: dict[str, type[Config]] = {"attack/prototype": TrainingConfig}
    for folder in ("attack", "defense", "analysis", "interop"):
        for path in sorted((ROOT / folder).glob("*.py")):
            module = importlib.import_module(f"{folder}.{path.stem}")
            for name in ("Config", "DefenseConfig", "RecordConfig", "AnalysisConfig"):
                owner = getattr(module, name, None)
                if isinstance(owner, type) and owner.__module__ == module.__name__:
                    scripts[f"{folder}/{vars(owner).get('yaml_folder', path.stem)}"] = owner
    return scripts


CONFIGS = shipped_configs()
YAML_FILES = sorted((ROOT / "config").rglob("*.yaml"))


# Flags of texts that are no paths.
NAMES = {
    *("attention_layers", "dataset", "defenses", "device", "kinds", "layer"),
    *("save_folder_name", "select_layer_name", "target_layer_name"),
}


@pytest.mark.parametrize("script", CONFIGS)
def test_each_flag_of_a_text_is_said_to_be_a_path_or_not(script: str) -> None:
    """A new one goes into `FILES` or `PLACES` of `utils.config`, or into `NAMES` here."""
    hints = configuration._hints(CONFIGS[script])
    texts = {
        name
        for name, annotation in hints.items()
        if str in (base := base_of(annotation), *get_args(base))
    }
    paths = configuration.FILES | configuration.PLACES
    assert texts <= paths | NAMES
    assert not (paths & hints.keys()) - texts
    assert not paths & NAMES
    assert not configuration.FILES & configuration.PLACES


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("attack/badnet", "dataset_path"),
        ("attack/badnet", "record_path"),
        ("attack/badnet", "model"),
        ("attack/blended", "trigger_image"),
        ("defense/ft", "index"),
        ("defense/ft", "result_file"),
        ("analysis/retune", "clean_record"),
        ("analysis/inspect", "clean_records"),
        ("analysis/inspect", "state_dict"),
        ("interop/state_dict", "state_dict"),
        ("interop/state_dict", "bd_test_dir"),
    ],
)
def test_a_tilde_is_the_home_in_each_flag_of_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    """As a flag, in files that are named in this way themselves, and from Python."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    is_list = name == "clean_records"
    path = write(tmp_path, f"{name}: {['~/x', 'y'] if is_list else '~/x'}\n")
    seen: list[Any] = []

    def find_dataset(values: Any) -> str:
        seen.append(values.get(name))
        return "digits"

    for argv in (["--yaml_path", path], ["--yaml_path=~/mine.yaml"], [f"--{name}=~/x,y"]):
        argv = argv if is_list else [word.removesuffix(",y") for word in argv]
        config = CONFIGS[script].from_command_line(argv, "", find_dataset)
        expected = str(tmp_path / "x")
        assert getattr(config, name) == ((expected, "y") if is_list else expected)
        assert is_list or seen[-1] == expected  # before the record is looked for
    of_python = CONFIGS[script].load("digits", **{name: ("~/x",) if is_list else "~/x"})
    assert getattr(of_python, name) == ((str(tmp_path / "x"),) if is_list else str(tmp_path / "x"))


def test_a_tilde_in_other_flags_stays(toy: Path) -> None:
    assert from_flags("--name", "~/x").name == "~/x"


def test_a_tilde_is_the_home_in_the_flags_of_other_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    parser = configuration.Parser()
    command = parser.add_subparsers(parser_class=configuration.Parser).add_parser("go")
    for each in (parser, command):
        each.add_argument("--to", type=Path)
        each.add_argument("--under", type=Path, nargs="+")
        each.add_argument("--model")
    argv = ["--to=~/x", "--under", "~/a", "b", "--model=~/net.py:build"]
    for words in (argv, ["go", *argv]):
        flags = parser.parse_args(words)
        assert flags.to == tmp_path / "x"
        assert flags.under == [tmp_path / "a", Path("b")]
        assert flags.model == f"{tmp_path / 'net.py:build'}"


@pytest.mark.parametrize("script", [name for name in CONFIGS if name.startswith("attack/")])
def test_help_shows_an_attack_s_flags_by_what_they_are_for(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of all attacks in their groups, and only the attack's under its title."""
    with pytest.raises(SystemExit):
        CONFIGS[script].from_command_line(["--help"], "")
    group, groups = "", {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  --"):
            groups[line.split()[0].removeprefix("--")] = group
        elif line and not line.startswith(" "):
            group = line
    expected = {
        "save_folder_name": "Record and folder",
        "checkpoint_every": "Record and folder",
        "image_size": "Data",
        "pretrained": "Network",
        "epochs": "Training",
        "eval_every": "Training",
        "deterministic": "Running: seed, device, precision",
    }
    is_clean = script == "attack/prototype"
    if not is_clean:
        expected |= dict.fromkeys(("pratio", "attack_label_trans"), "Poisoning and target")
    assert expected.items() <= groups.items()
    base = CONFIGS[script] if is_clean else CONFIGS[script].__bases__[0]
    method = {field.name for field in dataclasses.fields(CONFIGS[script])}
    method -= {field.name for field in dataclasses.fields(base)}
    assert {name for name, title in groups.items() if title == "This attack"} == method


@pytest.mark.parametrize("script", CONFIGS)
def test_a_record_s_values_say_nothing_about_its_folder(toy: Path, script: str) -> None:
    """Who uses them again would replace the finished record, or be told to resume it."""
    flags = [f"--{name}" for name in OF_ONE_RUN if name in get_type_hints(CONFIGS[script])]
    config = CONFIGS[script].from_command_line(flags, "", lambda values: "digits")
    assert not {"overwrite", "resume"} & yaml.safe_load(config.dump()).keys()
    again = CONFIGS[script].from_command_line(
        ["--yaml_path", write(toy, config.dump())], "", lambda values: "digits"
    )
    assert again == dataclasses.replace(config, **{flag[2:]: False for flag in flags})


@pytest.mark.parametrize("name", OF_ONE_RUN)
def test_what_an_earlier_record_says_about_its_folder_does_not_count(toy: Path, name: str) -> None:
    """Earlier versions wrote it into config.yaml; in a file of the user's it is refused."""
    path = write(toy, f"lr: 0.5\n{name}: true\n", "config.yaml")
    for flag in ("--yaml_path", "--bd_yaml_path"):
        with pytest.raises(UserError) as caught:
            CONFIGS["attack/badnet"].from_command_line([flag, path], "")
        assert caught.value.problems == (
            f"{path}: {name}: true is not allowed in a file; give the flag --{name} instead",
        )
    write(toy, '{"written_by": "sau", "files": ["config.yaml"]}', "run.json")
    config = CONFIGS["attack/badnet"].from_command_line(["--yaml_path", path], "")
    assert (config.lr, getattr(config, name)) == (0.5, False)
    config = CONFIGS["attack/badnet"].from_command_line(["--yaml_path", path, f"--{name}"], "")
    assert getattr(config, name) is True


@pytest.mark.parametrize("name", OF_ONE_RUN)
def test_a_file_may_say_no_to_what_is_of_one_run(toy: Path, name: str) -> None:
    path = write(toy, f"{name}: false\n")
    config = CONFIGS["attack/badnet"].from_command_line(["--yaml_path", path], "")
    assert getattr(config, name) is False


def test_every_method_has_a_configuration() -> None:
    assert {"attack/prototype", "attack/badnet", "defense/base", "defense/sau"} <= set(CONFIGS)


@pytest.mark.parametrize("dataset", get_args(DatasetName))
@pytest.mark.parametrize("script", CONFIGS)
def test_shipped_values_are_valid_for_every_dataset(script: str, dataset: str) -> None:
    assert isinstance(CONFIGS[script].load(dataset), CONFIGS[script])


@pytest.mark.parametrize(
    ("dataset", "epochs", "schedule", "size", "flip", "rounds"),
    [
        ("cifar10", 100, "cosine", 32, True, 100),
        ("cifar100", 100, "cosine", 32, False, 100),
        ("gtsrb", 50, "cosine_100", 32, False, 100),
        ("tiny", 200, "reduce_on_plateau", 64, False, 20),
    ],
)
def test_published_recipes(
    dataset: str, epochs: int, schedule: str, size: int, flip: bool, rounds: int
) -> None:
    """BackdoorBench's training, SAU's rounds; SGD with 0.01, 0.9, 5e-4, batches of 128."""
    recipe = CONFIGS["attack/badnet"].load(dataset)
    assert (recipe.epochs, recipe.lr_scheduler, recipe.image_size) == (epochs, schedule, size)
    assert (recipe.flip, recipe.crop_padding, recipe.batch_size) == (flip, 4, 128)
    assert (recipe.lr, recipe.sgd_momentum, recipe.wd) == (0.01, 0.9, 5e-4)
    sau = CONFIGS["defense/sau"].load(dataset)
    assert (sau.n_rounds, sau.ratio, sau.batch_size, sau.lr) == (rounds, 0.05, 256, 1e-4)
    assert CONFIGS["defense/ft"].load(dataset).flip == flip
    assert CONFIGS["attack/inputaware"].load(dataset).epochs == epochs - 25


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_shipped_yaml_is_read_by_a_script_and_names_fields_only(path: Path) -> None:
    script = "/".join(path.relative_to(ROOT / "config").parts[:-1])
    assert script in CONFIGS
    assert path.stem in {"default", "config", *get_args(DatasetName)}
    module = sys.modules[CONFIGS[script].__module__]
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Config)
        and value.__module__ == module.__name__
    ]
    fields = {field.name for owner in classes for field in dataclasses.fields(owner)}
    assert set(read_yaml(path)) <= fields


def test_every_flag_of_a_base_has_one_home() -> None:
    """No file of a method repeats what its base's files say for the same dataset."""
    for path in YAML_FILES:
        folder, method = path.relative_to(ROOT / "config").parts[:2]
        base = {"attack": "prototype", "defense": "base"}.get(folder)
        if base is None or method == base:
            continue
        dataset = path.stem if path.stem in get_args(DatasetName) else None
        name = "config.yaml" if folder == "defense" else "default.yaml"
        general = read_yaml(ROOT / "config" / folder / base / name)
        special = ROOT / "config" / folder / base / f"{dataset}.yaml"
        known = general | (read_yaml(special) if special.exists() else {})
        own = path.with_name(name)
        overridden = set(read_yaml(own)) if dataset and own.exists() else set()
        own_fields = CONFIGS[f"{folder}/{method}"].__annotations__
        for field, value in read_yaml(path).items():
            is_new = field in own_fields or field in overridden
            assert is_new or known.get(field, object()) != value, f"{path}: {field}"


@pytest.mark.parametrize("script", CONFIGS)
def test_defaults_live_in_yaml_and_meanings_in_the_class(script: str) -> None:
    hints = get_type_hints(CONFIGS[script], include_extras=True)
    for field in dataclasses.fields(CONFIGS[script]):
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
        marks = getattr(hints[field.name], "__metadata__", ())
        infos = [mark for mark in marks if isinstance(mark, FieldInfo)]
        assert any(info.description for info in infos), field.name


def test_references_and_huge_files_are_refused(tmp_path: Path) -> None:
    """Nine lines of references to references would unfold to a gigabyte."""
    bomb = "a: &a [1, 1, 1]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path = tmp_path / "x.yaml"
    for text, reason in ((bomb, "references"), ("a: 1\n" * 300_000, "larger than 65,536 bytes")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            read_yaml(path)


@pytest.mark.parametrize("name", ["cifr10", "../x", "default", "", "\0", "CIFAR10"])
def test_a_dataset_without_a_file_is_refused_by_name(name: str) -> None:
    """A defense has no list of datasets, since records name theirs."""
    with pytest.raises(UserError, match=r"^dataset: .* is unknown.*; give one of cifar10, "):
        sau.Config.load(name)
    assert sau.Config.load("cifar10").n_rounds == 100


def test_values_are_checked_wherever_they_come_from() -> None:
    """Also those of `dataclasses.replace`, which `load` does not see; all problems at once."""
    config = sau.Config.load("digits")
    assert dataclasses.replace(config, lr=0.5).lr == 0.5
    with pytest.raises(UserError) as refused:
        dataclasses.replace(config, lr=-1.0, n_rounds=-1, trigger_norm=math.nan, norm_type="L3")
    assert {line.partition(" is not allowed")[0] for line in refused.value.problems} == {
        *("config: lr: -1.0", "config: n_rounds: -1", "config: trigger_norm: .nan"),
        "config: norm_type: L3",
    }
