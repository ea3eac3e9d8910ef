"""Typed configuration: shipped YAML <- dataset YAML <- the user's YAML <- flags.

A method's values are a frozen dataclass whose fields are `Annotated[type, Field(range,
description=...)]`. pydantic checks each value. This module adds the order of the layers, remembers
which file or flag a value came from, and reports all problems at once.
"""

import argparse
import dataclasses
import inspect
import math
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
from utils.files import as_path, at_home, read_text

USER_FILES = {
    "yaml_path": "YAML file whose values go over the shipped ones",
    "bd_yaml_path": "YAML file whose values go over those of --yaml_path",
}
LARGEST = 1 << 16  # bytes of a YAML file, which takes some seconds to read at the worst
DEEPEST = 16  # lists and mappings in each other
LONGEST = 4096  # characters of a text; no system takes a longer path
# Flags that name a file whose content is part of the recipe, in every script that has them.
FILES = frozenset({"index", "state_dict", "trigger_image"})
# And those that name a file or a folder of which the recipe has something else, or nothing.
PLACES = frozenset(
    {
        *("record_path", "result_file", "clean_record", "clean_records"),
        *("dataset_path", "bd_test_dir", "model"),
    }
)
ENDLESS = frozenset({"u"})  # thresholds, in standard deviations, that may be infinite
# Of numbers: what torch has as an integer, and what stays one in fp32 times or over a few others.
_LARGEST: dict[type, float] = {float: 1e30, int: 2**63 - 1}
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
        # Names and paths; a value of type `str` stays as it is.
        self.register("type", None, at_home)
        self.register("type", Path, as_path)
        # What begins with a minus and a number is a value, which may be wrong, and never a flag.
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)", re.IGNORECASE)

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
        """A value for a message; a text has quotes if without them it is none in YAML."""
        is_as_text = isinstance(value, str) and not isinstance(_in_yaml(value[:100]), str)
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
        over = [*(_Layer(path, read_yaml(Path(path))) for path in paths), _Layer("", given, True)]
        merged = _merge([*_shipped(cls), *over])
        texts = {key: placed(key, value) for key, value in merged.items() if _is_text(value)}
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
        return as_yaml(plain)


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain data as YAML text, in which a text that looks like a number has quotes."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def placed(name: str, value: Any) -> Any:
    """The value of a flag; if it names a file or a folder, `~` has become the user's home."""
    if name not in FILES | PLACES:
        return value
    if isinstance(value, list | tuple):
        return type(value)(placed(name, item) for item in value)
    return at_home(value) if isinstance(value, str) else value


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


def allowed_values(annotation: Any, largest: bool = False) -> str:
    """What a field accepts, in words: 'float in (0, 1]', 'one of a, b', 'int >= 1 or null'.

    Args:
        largest: say also how large a number may be if the field itself does not.
    """
    number = _numbers(annotation, largest)
    return f"{number} or the name of a class" if _may_be_a_name(annotation) else number


def _numbers(annotation: Any, largest: bool) -> str:
    base, bounds = _base(annotation), _bounds(annotation)
    options = [option for option in get_args(base) if option is not type(None)]
    if get_origin(base) is Literal:
        return "one of " + ", ".join(map(str, options))
    if get_origin(base) is tuple:
        return f"a list of {allowed_values(options[0], largest)}, separated by commas"
    null = ""
    if options:
        base, null = options[0], " or null"
    if largest and base in _LARGEST:
        bounds |= {} if {"le", "lt"} & bounds.keys() else {"le": _LARGEST[base]}
        bounds |= {} if {"ge", "gt"} & bounds.keys() else {"ge": -_LARGEST[base]}
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

    Numbers are decimal, as on the command line: 1e-4 is one. 010, 0x10, 1:30, 1_000 and dates are
    texts. It refuses tags, references, keys that are repeated or are no plain values, and data that
    are nested too deeply.
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


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _Loader, or any other reader, would read as a number."""


_WHOLE = r"-?(0|[1-9][0-9]*)"  # with a plus it may be the name of a class
_DECIMAL = r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1
# What a text without quotes is, with its first letters. All else is text.
for _kind, _pattern, _first in (
    ("null", "~|null|Null|NULL|none|None|NONE|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|yes|Yes|YES|on|On|ON", list("tTyYoO")),
    ("bool", "false|False|FALSE|no|No|NO|off|Off|OFF", list("fFnNoO")),
    ("int", _WHOLE, list("-+0123456789")),
    ("float", f"{_DECIMAL}|{_NOT_FINITE}", list("-+.0123456789iInN")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"({_pattern})\Z"), _first
        )


def _in_yaml(text: str) -> Any:
    """What a text is where it stands in a YAML file without quotes.

    Raises:
        ValueError: if it is a whole number of thousands of digits.
    """
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


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
                checked = _check(hints[key], value, layer.is_flags)
                if key not in ENDLESS and not all(map(_is_within, _each(checked))):
                    raise ValueError("is too large")
                values[key] = placed(key, checked)
            except ValueError:
                refused.add(key)
                allowed = _advice(hints[key], value, layer.is_flags, key in ENDLESS)
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


def _check(annotation: Any, value: Any, is_flag: bool) -> Any:
    """The value as the field's type, which it must have; that of a flag is a text."""
    base = _base(annotation)
    options = [base, *get_args(base)]
    if get_origin(base) is tuple:
        items = _items(value) if is_flag else value
        if not isinstance(items, list | tuple):
            raise ValueError("no list")
        checked = [_check(get_args(base)[0], item, is_flag) for item in items]
        return TypeAdapter(annotation).validate_python(checked)
    if isinstance(value, str) and not _is_text(value):
        raise ValueError("no text that a system takes")
    if is_flag and type(None) in options and _in_yaml(value) is None:
        if value == "~" and str in options:  # null in a file, and the user's home in a shell
            raise ValueError("could mean two things")
        value = None
    elif _may_be_a_name(annotation) and isinstance(value, str) and value.strip():
        if type(_in_yaml(value.strip())) is not int:  # 007 and 1.0 are names
            return value
        value = _in_yaml(value.strip())  # a number in quotes is one
    elif is_flag and any(kind in options for kind in (bool, int, float)):
        value = _in_yaml(value.strip())
    if is_flag and bool in options and type(value) is int and value in (0, 1):
        value = bool(value)  # as many scripts write it
    return TypeAdapter(annotation).validate_python(value, strict=True)


def _items(text: str) -> list[str]:
    """Those of a list on the command line, with or without the brackets of YAML and `--help`."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    return inner.split(",") if inner else []


def _each(value: Any) -> Sequence[Any]:
    """The items of a list, or the value itself."""
    return value if isinstance(value, list | tuple) else [value]


def _is_within(value: Any) -> bool:
    """Whether a number is not too large; true of what is no number."""
    return type(value) not in _LARGEST or abs(value) <= _LARGEST[type(value)]


def _advice(annotation: Any, value: Any, is_flag: bool, endless: bool) -> str:
    """What to give instead of a value that is not allowed."""
    allowed = allowed_values(annotation)
    if allowed.startswith("text") and isinstance(value, str):
        if value == "~":
            return f"{allowed}, or ~/ for your home"
        return f"{allowed}, of at most {LONGEST} characters and without NUL"
    if allowed.startswith("text") and isinstance(value, bool | int | float):
        return f"{allowed}, in quotes"
    if _may_be_a_name(annotation) and isinstance(value, bool | float):
        return f"{allowed}, in quotes"
    is_list = get_origin(_base(annotation)) is tuple
    item = get_args(_base(annotation))[0] if is_list else annotation
    if not {int, float} & {_base(item), *get_args(_base(item))}:
        return allowed
    given = [_number(part) for part in (_items(value) if is_flag and is_list else _each(value))]
    if not endless and not all(map(_is_within, given)):
        allowed = allowed_values(annotation, largest=True)
    if not endless and any(isinstance(part, float) and not math.isfinite(part) for part in given):
        return f"{'finite numbers' if is_list else 'a finite number'}: {allowed}"
    if any(isinstance(part, str) and re.match(r"[-+]?0\d", part) for part in given):
        return f"{allowed}, without a zero in front"
    return allowed


def _number(value: Any) -> Any:
    """The number that a text is; everything else as it is."""
    return _in_yaml(value.strip()) if isinstance(value, str) and len(value) < LONGEST else value


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
