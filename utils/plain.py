"""Plain data as YAML: what is read is what stands there, and nothing else is made of it."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError, one_line, quoted
from utils.files import read_text

LARGEST = 1 << 16  # bytes of a YAML file, which takes some seconds to read at the worst
DEEPEST = 16  # lists and mappings in each other


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain data as YAML text, from which `parse_yaml` gives the same data.

    A text that looks like a number has quotes.
    """
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def in_one_line(value: Any) -> Any:
    """A value as one line of YAML, e.g. true, null or {a: 1}; all else as it is."""
    if isinstance(value, str):
        return value
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]
    except (yaml.YAMLError, ValueError, RecursionError):  # such as a number of thousands of digits
        return value


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
    if "set_int_max_str_digits" in reason:
        reason = "a number has thousands of digits"
    return UserError(f"{source}: not valid YAML ({reason}); write lines of 'name: value'")


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


def _as_scalar(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """A text; with double quotes if it has U+0085, which a reader takes for a space elsewhere."""
    style = '"' if "\x85" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _as_scalar)

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


def in_yaml(text: str) -> Any:
    """What a text is where it stands in a YAML file without quotes.

    Raises:
        ValueError: if it is a whole number of thousands of digits.
    """
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))
