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
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from typing_extensions import Self

from utils.errors import UserError, one_line, quoted, shown, suggestion
from utils.files import read_text

USER_FILES = {
    "yaml_path": "YAML file whose values go over the shipped ones",
    "bd_yaml_path": "YAML file whose values go over those of --yaml_path",
}
LARGEST = 1 << 16  # bytes of a YAML file, which takes some seconds to read at the worst
DEEPEST = 16  # lists and mappings in each other
LONGEST = 4096  # characters of a text; no system takes a longer path
# Of numbers: what torch has as an integer, and what stays one in fp32 times or over a few others.
_LARGEST = {float: 1e30, int: 2**63 - 1, bool: 1}
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

    If a flag is wrong, one line says so, as everywhere.
    """

    def __init__(self, description: str | None = None, **more: Any) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; --help lists the flags")


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
        """A value for a message; a number, or true or false, that is a text in YAML has quotes."""
        is_as_text = isinstance(value, str) and re.fullmatch(
            r"[-+]?[\d.]+(e[-+]?\d+)?|true|false", value
        )
        return f"'{quoted(value)}'" if is_as_text and not self.is_flags else quoted(value)


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
        if dataset is not None and not (hint and _choices(hint)):  # else it is said later
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
        parser = Parser(None, add_help=False, allow_abbrev=False)
        for name in [*_hints(cls), *USER_FILES]:
            const = (
                "true" if _hints(cls).get(name) and _base(_hints(cls)[name]) is bool else _NO_VALUE
            )
            parser.add_argument(f"--{name}", nargs="?", const=const)
        parser.add_argument("-h", "--help", action="store_true")
        # So that -1e-4 and -inf are values, and out of range, rather than unknown flags.
        parser._negative_number_matcher = re.compile(
            r"-((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|inf|nan)$"
        )
        parsed, unknown = parser.parse_known_args(list(argv))
        given = {key: value for key, value in vars(parsed).items() if value is not None}
        wants_help = given.pop("help")
        problems = _unknown_flags(unknown, [*_hints(cls), *USER_FILES, "help"])
        for name in [name for name, value in given.items() if _lacks_value(cls, name, value)]:
            allowed = "a file" if name in USER_FILES else allowed_values(_hints(cls)[name])
            problems.append(f"--{name}: a value is missing; give {allowed}")
            del given[name]
        paths = [given.pop(name) for name in USER_FILES if name in given]
        over = [*(_Layer(path, read_yaml(Path(path))) for path in paths), _Layer("", given, True)]
        texts = {k: v for k, v in _merge([*_shipped(cls), *over]).items() if _is_text(v)}
        dataset = None if wants_help and problems else find_dataset(texts)
        layers = [*_shipped(cls, dataset), *over]
        if wants_help:
            print(_help(cls, description, _merge(layers)))
            raise SystemExit(0)
        return _build(cls, layers, problems)

    def dump(self) -> str:
        """The configuration as YAML text, which `--yaml_path` reads back."""
        values = dataclasses.asdict(self)
        plain = {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }
        return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _lacks_value(cls: type[Config], name: str, value: str) -> bool:
    """Whether a flag was given without a value; a list may be empty."""
    is_list = name in _hints(cls) and get_origin(_base(_hints(cls)[name])) is tuple
    return value == _NO_VALUE or (value == "" and not is_list)


def read_yaml(path: Path) -> dict[str, Any]:
    """One flat YAML mapping from names to values.

    Raises:
        UserError: if the file cannot be read, is not such a mapping, or names a key twice.
    """
    try:
        text = read_text(path, LARGEST)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give an existing YAML file"
        ) from None
    except ValueError as error:
        raise _not_valid(str(path), error) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """One flat YAML mapping from names to values.

    Args:
        source: what the text is of, for messages.

    Raises:
        UserError: if it is not such a mapping, or names a key twice.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except Exception as error:  # the library raises anything of what is no YAML
        raise _not_valid(source, error) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{source}: not a mapping of names to values; write lines of 'name: value'")
    return values


def _not_valid(source: str, error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(f"{source}: not valid YAML ({reason}); write lines of 'name: value'")


def _choices(annotation: Any) -> tuple[str, ...]:
    """The texts that a field accepts, if they are listed."""
    base = _base(annotation)
    return tuple(map(str, get_args(base))) if get_origin(base) is Literal else ()


class OrName:
    """Mark of a field whose number may also be given by a name, which is looked up later."""


def _may_be_a_name(annotation: Any) -> bool:
    return OrName in getattr(annotation, "__metadata__", ())


def allowed_values(annotation: Any) -> str:
    """What a field accepts, in words: 'float in (0, 1]', 'one of a, b', 'int >= 1 or null'."""
    number = _numbers(annotation)
    return f"{number} or the name of a class" if _may_be_a_name(annotation) else number


def _numbers(annotation: Any) -> str:
    base, bounds = _base(annotation), _bounds(annotation)
    options = [option for option in get_args(base) if option is not type(None)]
    if get_origin(base) is Literal:
        return "one of " + ", ".join(map(str, options))
    if get_origin(base) is tuple:
        return f"a list of {allowed_values(options[0])}, separated by commas"
    null = ""
    if options:
        base, null = options[0], " or null"
    name = {bool: "true or false", str: "text"}.get(base, getattr(base, "__name__", str(base)))
    texts = {key: f"{n:g}" if isinstance(n, float) else str(n) for key, n in bounds.items()}
    low = next((m + texts[key] for key, m in (("ge", "["), ("gt", "(")) if key in texts), "")
    high = next((texts[key] + m for key, m in (("le", "]"), ("lt", ")")) if key in texts), "")
    if low and high:
        return f"{name} in {low}, {high}{null}"
    if low:
        return f"{name} {'>=' if low[0] == '[' else '>'} {low[1:]}{null}"
    if high:
        return f"{name} {'<=' if high[-1] == ']' else '<'} {high[:-1]}{null}"
    return name + null


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain values: null, true, numbers, texts, and lists and mappings of them.

    It reads 1e-4 as a number and a date as text. It refuses tags, references, keys that are
    repeated or are no plain values, and data that are nested too deeply.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):  # a few lines of them unfold to gigabytes
            raise yaml.YAMLError("references (*name) are not read")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags ({quoted(event.tag)}) are not read")
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} lists and mappings in each other")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a key is a list or a mapping")
            if key.value in seen:
                raise yaml.YAMLError(f"{quoted(key.value)!r} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# Merge keys (<<), dates and = are the text that they are.
_PLAIN = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")]
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _Loader would read as a number."""


# YAML 1.1 asks for a dot and a signed exponent in a float; people write 1e-4.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _hints(cls: type) -> dict[str, Any]:
    """Annotations of the dataclass fields, base class first."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _base(annotation: Any) -> Any:
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _field_info(annotation: Any) -> FieldInfo | None:
    return next(
        (m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, FieldInfo)), None
    )


def _bounds(annotation: Any) -> dict[str, float]:
    info = _field_info(annotation)
    constraints = info.metadata if info else []
    return {
        key: getattr(m, key)
        for m in constraints
        for key in ("ge", "gt", "le", "lt")
        if hasattr(m, key)
    }


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
    """Raises UserError if no YAML file is of this dataset; each one has some."""
    files = getattr(sys.modules[cls.__module__], "__file__", None)
    root = Path(files).resolve().parents[1] / "config" if files else Path()
    known = {path.stem for path in root.glob("*/*/*.yaml")} - {"default", "config"}
    if known and dataset not in known:
        raise UserError(
            f"dataset: {shown(dataset, 100)} is unknown{suggestion(str(dataset), known)}; give one "
            f"of {', '.join(sorted(known))}"
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
                errors.append(f"{layer.where(key)}: unknown name{suggestion(key, hints)}")
                continue
            try:
                values[key] = _check(hints[key], value, layer.is_flags)
            except ValueError:
                refused.add(key)
                allowed = allowed_values(hints[key])
                if allowed.startswith("text") and isinstance(value, str):
                    allowed += f", of at most {LONGEST} characters and without NUL"
                choices = _choices(hints[key]) if isinstance(value, str) else ()
                close = suggestion(str(value), choices) if choices else ""
                given = f"{layer.where(key)}: {layer.shown(value)}"
                errors.append(f"{given} is not allowed{close}; give {allowed}")
    missing = [key for key in hints if key not in values and key not in refused]
    if "dataset" in refused:  # whose own file has the others
        missing = []
    errors += [f"--{key}: a value is needed; give {allowed_values(hints[key])}" for key in missing]
    if errors:
        raise UserError(*errors)
    return cls(**values)


def _check(annotation: Any, value: Any, is_text: bool) -> Any:
    """The value as the field's type; YAML values must have that type already, flags are text."""
    if is_text and value.lower() in ("null", "none") and type(None) in get_args(_base(annotation)):
        value = None
    if get_origin(_base(annotation)) is tuple:
        if is_text:  # 1,2,3, with or without the brackets that YAML and --help write
            inner = value.strip().removeprefix("[").removesuffix("]")
            value = inner.split(",") if inner else []
        return TypeAdapter(annotation).validate_python(value)
    if isinstance(value, str) and not _is_text(value):
        raise ValueError("no text that a system takes")
    if _may_be_a_name(annotation) and isinstance(value, str) and value.strip():
        if not re.fullmatch(r"0|-?[1-9][0-9]*", value.strip()):  # 007 and 1.0 are names
            return value
        is_text = True  # a number in quotes is one
    checked = TypeAdapter(annotation).validate_python(value, strict=not is_text)
    if isinstance(checked, float | int) and not abs(checked) <= _LARGEST[type(checked)]:
        raise ValueError(f"is too large; give at most {_LARGEST[type(checked)]:g}")
    return checked


def _is_text(value: object) -> bool:
    """Whether it is a text that may be a name or a path."""
    return isinstance(value, str) and len(value) <= LONGEST and "\0" not in value


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
    """The description, then the flags by what they are for, those of the method first."""
    lines = [description.strip(), "", "flags, with their values as resolved from the YAML files:"]
    hints = _hints(cls)
    for title, names in _groups(cls).items():
        lines += ["", title]
        for name in names:
            info = _field_info(hints[name])
            value = values.get(name)
            if not isinstance(value, str):
                value = yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
            lines.append(f"  --{name} {shown(value)}")
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
