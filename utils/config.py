"""Typed configuration: shipped YAML <- dataset YAML <- the user's YAML <- flags.

A method's values are a frozen dataclass whose fields are `Annotated[type, Field(range,
description=...)]`. pydantic checks each value. This module adds the order of the layers, remembers
which file or flag a value came from, and reports all problems at once.
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    NoReturn,
    TypeVar,
    get_origin,
    get_type_hints,
)

from typing_extensions import Self

from utils.errors import UserError, quoted, shown, suggestion
from utils.files import CONFIG_FILE, MARK, as_path, at_home
from utils.plain import as_yaml, in_one_line, in_yaml, read_yaml
from utils.values import advice, allowed_values, base_of, check, choices, field_info, is_text

USER_FILES = {
    "yaml_path": "YAML file whose values go over the shipped ones",
    "bd_yaml_path": "YAML file whose values go over those of --yaml_path",
}
# Flags that name a file whose content is part of the recipe, in every script that has them.
FILES = frozenset({"index", "state_dict", "trigger_image"})
# Flags that name a file or a folder whose path is no part of the recipe. It has something else of
# it, or nothing.
PLACES = frozenset(
    {
        *("record_path", "result_file", "clean_record", "clean_records"),
        *("dataset_path", "bd_test_dir", "model"),
    }
)
# What a run does with a folder that is there; no file says it, since files are used again.
OF_ONE_RUN = ("resume", "overwrite")
_NO_VALUE = "\0"  # a flag that was given without its value
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")  # no path, and no hidden file

C = TypeVar("C", bound="Config")


class Group(Enum):
    """Groups of flags, in the order in which `--help` shows them below the method's own flags.

    A group in the annotation of a field holds for this field and for those after it in the class,
    up to the next group: `lr: Annotated[float, Field(gt=0), Group.TRAINING]`. Fields before the
    first group are the method's own.
    """

    POISONING = "Poisoning and target"
    SEEN = "What the defense sees"
    SELECTION = "Selection on held-out images"
    INVERSION = "Inversion of the trigger"
    RECORD = "Record and folder"
    DATA = "Data"
    NETWORK = "Network"
    TRAINING = "Training"
    RUNNING = "Running: seed, device, precision"


class Parser(argparse.ArgumentParser):
    """Flags of a script; `--help` shows the description as it is.

    If a flag is wrong, one line says so, as everywhere. The beginning of a flag is no flag: it
    would mean another one as soon as there is a new flag.
    """

    def __init__(self, description: str | None = None, **more: Any) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )
        # Names and paths; a value of type `str` stays as it is.
        self.register("type", None, _text)
        self.register("type", Path, _path)
        # What begins with a minus and a number is a value, which may be wrong, and never a flag.
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; --help lists the flags")


def check_least(flags: argparse.Namespace, **least: int) -> None:
    """Checks the numbers of a script's flags.

    Args:
        least: the smallest one that is allowed, by the flag's name.

    Raises:
        UserError: if a number is smaller.
    """
    for name, bound in least.items():
        number = getattr(flags, name)
        if number is not None and number < bound:
            raise UserError(f"--{name}: {number} is not allowed; give {bound} or more")


def _path(text: str) -> Path | None:
    """The path of a script's flag, which is empty if a shell's variable was."""
    return as_path(_text(text, "path"))


def _text(text: str, what: str = "value") -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the {what} is empty; give one, or leave the flag out")
    try:
        return at_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Layer(NamedTuple):
    """Values of one source: a file, or the flags, whose text is converted ("0.1" -> 0.1).

    Attributes:
        others: names that are allowed in it although the class has no such field.
    """

    source: str
    values: Mapping[str, Any]
    is_flags: bool = False
    others: frozenset[str] = frozenset()

    def where(self, key: str) -> str:
        return f"--{quoted(key)}" if self.is_flags else f"{self.source}: {quoted(key)}"

    def shown(self, value: object) -> str:
        """A value for a message, as YAML has it; a text has quotes if without them it is none."""
        if self.is_flags:
            return quoted(value)
        if isinstance(value, str):
            is_bare = value.strip() and isinstance(in_yaml(value[:100]), str)
            return quoted(value) if is_bare else f"'{quoted(value)}'"
        return quoted(in_one_line(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every method's configuration.

    The defaults of a class are `config/<folder>/<module>/default.yaml` (or `config.yaml`), then
    `<dataset>.yaml` beside it, for the module of each class from the base down to itself. A
    module's files may set fields of all configuration classes of that module; each class takes
    those that it has.

    Attributes:
        yaml_folder: the name of that folder if it is not the module's; for this class only.
        flags_title: what `--help` writes over the flags that belong to no `Group`.
    """

    yaml_folder: ClassVar[str]
    flags_title: ClassVar[str] = "This method"

    def __post_init__(self) -> None:
        """Checks the values, also those of `dataclasses.replace`; `load` says more of its own.

        Raises:
            UserError: naming every value that is not allowed.
        """
        layer = _Layer("config", vars(self))
        errors = []
        for name, annotation in _hints(type(self)).items():
            try:
                check(annotation, layer.values[name], is_flag=False)
            except ValueError:
                errors.append(_refusal(layer, name, annotation))
        if errors:
            raise UserError(*errors)

    @classmethod
    def load(cls, dataset: str | None = None, **overrides: Any) -> Self:
        """The YAML files' values plus overrides.

        Args:
            dataset: name whose `<dataset>.yaml` files apply; None for the one that the files name.
            overrides: values by field name.

        Raises:
            UserError: naming every unknown field and every value that is not allowed.
        """
        hint = _hints(cls).get("dataset")
        if dataset is not None and not (hint and choices(hint)):  # else it is said later
            _require_known(cls, dataset)
        if dataset is None:
            dataset = {**_merge(_shipped(cls)), **overrides}.get("dataset")
        elif "dataset" in _hints(cls):
            overrides = {"dataset": dataset, **overrides}
        over = _Layer("override", overrides)
        return _build(cls, [*_shipped(cls, dataset), over])

    @classmethod
    def from_command_line(
        cls,
        argv: Sequence[str],
        description: str,
        find_dataset: Callable[[Mapping[str, Any]], str | None] = lambda values: values.get(
            "dataset"
        ),
    ) -> Self:
        """The YAML files' values, then the user's files, then flags.

        Args:
            argv: flags, without the program's name. `--help` prints each with its resolved value
                and exits with code 0.
            description: text that `--help` shows first.
            find_dataset: takes the values given so far, and returns the dataset whose YAML files
                apply, or None.

        Raises:
            UserError: naming every unknown flag or key and every value that is not allowed.
        """
        parser = Parser(None, add_help=False)
        for name in [*_hints(cls), *USER_FILES]:
            const = (
                "true"
                if _hints(cls).get(name) and base_of(_hints(cls)[name]) is bool
                else _NO_VALUE
            )
            parser.add_argument(f"--{name}", nargs="?", const=const, type=str)
        parser.add_argument("-h", "--help", action="store_true")
        parsed, unknown = parser.parse_known_args([word for word in argv if word != "--"])
        given = {key: value for key, value in vars(parsed).items() if value is not None}
        wants_help = given.pop("help")
        problems = _unknown_flags(unknown, [*_hints(cls), *USER_FILES, "help"])
        if "--" in argv:
            problems.append("--: is no flag; leave it out, because every word belongs to a flag")
        for name in [name for name, value in given.items() if _lacks_value(cls, name, value)]:
            allowed = "a file" if name in USER_FILES else allowed_values(_hints(cls)[name])
            problems.append(f"--{name}: a value is missing; give {allowed}")
            del given[name]
        paths = [at_home(given.pop(name)) for name in USER_FILES if name in given]
        files = [_Layer(path, _read_users_file(Path(path))) for path in paths]
        problems += [
            f"{layer.where(name)}: true is not allowed in a file; give the flag --{name} instead"
            for layer in files
            for name in OF_ONE_RUN
            if name in _hints(cls) and layer.values.get(name) is True
        ]
        over = [*files, _Layer("", given, True)]
        merged = _merge([*_shipped(cls), *over])
        texts = {key: placed(key, value) for key, value in merged.items() if is_text(value)}
        dataset = None if wants_help and problems else find_dataset(texts)
        layers = [*_shipped(cls, dataset), *over]
        if wants_help:
            print(_help(cls, description, _merge(layers)))
            raise SystemExit(0)
        return _build(cls, layers, problems)

    def dump(self) -> str:
        """The configuration as YAML text, which `--yaml_path` reads back.

        It lacks `OF_ONE_RUN`, so that nobody who uses a record's values again replaces the record.
        """
        values = dataclasses.asdict(self)
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if key not in OF_ONE_RUN
        }
        return as_yaml(plain)


def _read_users_file(path: Path) -> dict[str, Any]:
    """The values of a file that the user gives, which may be the config.yaml of a record.

    Those of earlier versions have also what their own command did with the folder.

    Raises:
        UserError: as `read_yaml`.
    """
    values = read_yaml(path)
    is_of_record = path.name == CONFIG_FILE and path.with_name(MARK).exists()
    return {k: v for k, v in values.items() if not (is_of_record and k in OF_ONE_RUN)}


def placed(name: str, value: Any) -> Any:
    """The value of a flag; if it names a file or a folder, `~` has become the user's home."""
    if name not in FILES | PLACES:
        return value
    if isinstance(value, list | tuple):
        return type(value)(placed(name, item) for item in value)
    return at_home(value) if isinstance(value, str) else value


def _lacks_value(cls: type[Config], name: str, value: str) -> bool:
    """Whether a flag was given without a value, or with a blank one; a list may be empty."""
    is_list = name in _hints(cls) and get_origin(base_of(_hints(cls)[name])) is tuple
    return value == _NO_VALUE or not (value.strip() or is_list)


def _hints(cls: type) -> dict[str, Any]:
    """Annotations of the dataclass fields, base class first."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _shipped(cls: type[Config], dataset: str | None = None) -> list[_Layer]:
    """The YAML files of a class, base class first, in each folder the general one first."""
    layers: dict[Path, _Layer] = {}  # each file once
    for owner in reversed(cls.__mro__):
        file = getattr(sys.modules[owner.__module__], "__file__", None)  # a notebook has none
        if owner is Config or not issubclass(owner, Config) or not file:
            continue
        script = Path(file).resolve()
        root = script.parents[1]
        folder = root / "config" / script.parent.name / vars(owner).get("yaml_folder", script.stem)
        names = ["default", "config"]
        if isinstance(dataset, str) and _FILE_NAME.fullmatch(dataset):  # else it is refused later
            names.append(dataset)
        for name in names:
            path = folder / f"{name}.yaml"
            if path.exists() and path not in layers:
                source = str(path.relative_to(root))
                layers[path] = _Layer(source, read_yaml(path), others=_fields_of_module(owner))
    return list(layers.values())


def _require_known(cls: type[Config], dataset: str) -> None:
    """Raises UserError if no YAML file is for this dataset; there is one for each known dataset."""
    files = getattr(sys.modules[cls.__module__], "__file__", None)
    root = Path(files).resolve().parents[1] / "config" if files else Path()
    datasets = {path.stem for path in root.glob("*/*/*.yaml")} - {"default", "config"}
    if datasets and dataset not in datasets:
        raise UserError(
            f"dataset: {shown(dataset, 100)} is unknown{suggestion(str(dataset), datasets)}; give "
            f"one of {', '.join(sorted(datasets))}"
        )


def _fields_of_module(owner: type[Config]) -> frozenset[str]:
    """The names of the fields of all configuration classes that the module of one defines."""
    classes = [
        value
        for value in vars(sys.modules[owner.__module__]).values()
        if isinstance(value, type)
        and issubclass(value, Config)
        and dataclasses.is_dataclass(value)
        and value.__module__ == owner.__module__
    ]
    return frozenset(field.name for class_ in classes for field in dataclasses.fields(class_))


def _merge(layers: Iterable[_Layer]) -> dict[str, Any]:
    return {key: value for layer in layers for key, value in layer.values.items()}


def _build(cls: type[C], layers: Sequence[_Layer], problems: Sequence[str] = ()) -> C:
    """Checks every value of every layer; then later layers replace values of earlier ones."""
    errors = list(problems)
    hints = _hints(cls)
    values: dict[str, Any] = {}
    refused = {problem.split(":")[0].removeprefix("--") for problem in problems}
    for layer in layers:
        for key, value in layer.values.items():
            if key not in hints and key in layer.others:
                continue
            if key not in hints:
                errors.append(
                    f"{layer.where(key)}: unknown name{suggestion(key, hints)}; --help lists them"
                )
                continue
            try:
                values[key] = placed(key, check(hints[key], value, layer.is_flags))
            except ValueError:
                refused.add(key)
                errors.append(_refusal(layer, key, hints[key]))
    missing = [key for key in hints if key not in values and key not in refused]
    if "dataset" in refused:  # whose own file has the others
        missing = []
    errors += [f"--{key}: a value is needed; give {allowed_values(hints[key])}" for key in missing]
    if errors:
        raise UserError(*errors)
    return cls(**values)


def _refusal(layer: _Layer, key: str, annotation: Any) -> str:
    """The message about a value that is not allowed."""
    value = layer.values[key]
    texts = choices(annotation) if isinstance(value, str) else ()
    close = suggestion(str(value), texts) if texts else ""
    given = f"{layer.where(key)}: {layer.shown(value)}"
    return f"{given} is not allowed{close}; give {advice(annotation, value)}"


def _unknown_flags(unknown: Sequence[str], names: Iterable[str]) -> list[str]:
    """The message about words of a command line that belong to no flag."""
    flags = [f"--{name}" for name in names]
    problems = []
    for previous, word in zip(["", *unknown], unknown, strict=False):
        flag = word.split("=")[0]
        if word.startswith("-"):
            problems.append(
                f"{quoted(flag)}: unknown flag{suggestion(flag, flags)}; --help lists them"
            )
        elif not previous.startswith("-") or "=" in previous:  # else the unknown flag's value
            problems.append(f"{quoted(word)}: belongs to no flag; write --name value")
    return problems


def _help(cls: type[Config], description: str, values: Mapping[str, Any]) -> str:
    """The text of `--help`: the description, then the flags in groups, the method's own first."""
    lines = [description.strip(), "", "flags, with their values as resolved from the YAML files:"]
    hints = _hints(cls)
    for title, names in _groups(cls).items():
        lines += ["", title]
        for name in names:
            info = field_info(hints[name])
            value = values.get(name)
            lines.append(f"  --{name} {shown(in_one_line(value))}")
            lines.append(
                f"        {info.description if info else ''} [{allowed_values(hints[name])}]"
            )
    lines += ["", "Your own files"]
    lines += [f"  --{name} FILE\n        {text}" for name, text in USER_FILES.items()]
    return "\n".join(lines)


def _groups(cls: type[Config]) -> dict[str, list[str]]:
    """Title -> names of fields: the method's own first, then in the order of `Group`."""
    hints = _hints(cls)
    titles: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        title = cls.flags_title
        for name in inspect.get_annotations(owner):
            marks = getattr(hints.get(name), "__metadata__", ())
            title = next((mark.value for mark in marks if isinstance(mark, Group)), title)
            titles.setdefault(name, title)
    order = (cls.flags_title, *(group.value for group in Group))
    groups = {title: [name for name in hints if titles[name] == title] for title in order}
    return {title: names for title, names in groups.items() if names}
