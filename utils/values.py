"""A value by the annotation of its field: whether it is allowed, and in words what is."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import numpy as np
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from utils.plain import in_yaml

LONGEST = 4096  # characters of a text; no system takes a longer path
# The largest numbers by type. Torch has no larger integers. A float of this size is still finite in
# fp32 after it is multiplied with a few others, or divided by them.
_LARGEST: dict[type, float] = {float: 1e30, int: 2**63 - 1}


def choices(annotation: Any) -> tuple[str, ...]:
    """The texts that a field accepts, if they are listed."""
    base = base_of(annotation)
    return tuple(map(str, get_args(base))) if get_origin(base) is Literal else ()


class OrName:
    """The mark of a field whose number may also be given by a name, which is looked up later."""


class Endless:
    """The mark of a field whose number may be infinite, such as a threshold that nothing passes."""


class Distinct:
    """The mark of a list of names, none of which may stand in it twice."""


def may_be_a_name(annotation: Any) -> bool:
    """Whether a field has the mark `OrName`."""
    return OrName in getattr(annotation, "__metadata__", ())


def is_endless(annotation: Any) -> bool:
    """Whether a field has the mark `Endless`."""
    return Endless in getattr(annotation, "__metadata__", ())


def is_distinct(annotation: Any) -> bool:
    """Whether a field has the mark `Distinct`."""
    return Distinct in getattr(annotation, "__metadata__", ())


def allowed_values(annotation: Any, largest: bool = False) -> str:
    """What a field accepts, in words: 'float in (0, 1]', 'one of a, b', 'int >= 1 or null'.

    Args:
        largest: say also how large a number may be if the field itself does not.
    """
    number = _numbers(annotation, largest)
    return f"{number} or the name of a class" if may_be_a_name(annotation) else number


def _numbers(annotation: Any, largest: bool) -> str:
    base, bounds = base_of(annotation), bounds_of(annotation)
    options = [option for option in get_args(base) if option is not type(None)]
    if get_origin(base) is Literal:
        return "one of " + ", ".join(map(str, options))
    if get_origin(base) is tuple:
        once = ", each once" if is_distinct(annotation) else ""
        return f"a list of {allowed_values(options[0], largest)}, separated by commas{once}"
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


def base_of(annotation: Any) -> Any:
    """The type that a field has without its range and its marks."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def field_info(annotation: Any) -> FieldInfo | None:
    """The range and the description of a field, if it has them."""
    return next(
        (m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, FieldInfo)), None
    )


def bounds_of(annotation: Any) -> dict[str, float]:
    """The range of a number, by `ge`, `gt`, `le` and `lt`."""
    info = field_info(annotation)
    constraints = info.metadata if info else []
    return {
        key: getattr(m, key)
        for m in constraints
        for key in ("ge", "gt", "le", "lt")
        if hasattr(m, key)
    }


def check(annotation: Any, value: Any, is_flag: bool) -> Any:
    """The value as the field's type, which it must have; that of a flag is a text.

    NumPy's numbers and paths become plain numbers and texts, so that a file can keep them.

    Raises:
        ValueError: if it is not allowed.
    """
    checked = _typed(annotation, value, is_flag)
    if not is_endless(annotation) and not all(map(_is_within, _each(checked))):
        raise ValueError("is too large")
    return checked


def _typed(annotation: Any, value: Any, is_flag: bool) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    base = base_of(annotation)
    options = [base, *get_args(base)]
    if get_origin(base) is tuple:
        is_in_text = isinstance(value, str)  # also in a file: 1,2 is a text in YAML
        checked = [_typed(get_args(base)[0], item, is_in_text) for item in items_of(value)]
        if is_distinct(annotation) and len(set(checked)) < len(checked):
            raise ValueError("stands twice")
        return TypeAdapter(annotation).validate_python(checked)
    if isinstance(value, str) and not is_text(value):
        raise ValueError("no text that a system takes")
    if is_flag and type(None) in options and in_yaml(value) is None:
        if value == "~" and str in options:  # null in a file, and the user's home in a shell
            raise ValueError("could mean two things")
        value = None
    elif may_be_a_name(annotation) and isinstance(value, str) and value.strip():
        if type(in_yaml(value.strip())) is not int:  # 007 and 1.0 are names
            return value
        value = in_yaml(value.strip())  # a number in quotes is one
    elif is_flag and any(kind in options for kind in (bool, int, float)):
        value = in_yaml(value.strip())
    if is_flag and bool in options and type(value) is int and value in (0, 1):
        value = bool(value)  # as many scripts write it
    return TypeAdapter(annotation).validate_python(value, strict=True)


def items_of(value: Any) -> Sequence[Any]:
    """The items of a list, or of a text that is one, with or without YAML's brackets."""
    if not isinstance(value, str):
        return _each(value)
    inner = value.strip().removeprefix("[").removesuffix("]")
    return [item.strip() for item in inner.split(",")] if inner else []


def _each(value: Any) -> Sequence[Any]:
    """The items of a list, or the value itself."""
    return value if isinstance(value, list | tuple) else [value]


def _is_within(value: Any) -> bool:
    """Whether a value is no number, or one that is not too large."""
    return type(value) not in _LARGEST or abs(value) <= _LARGEST[type(value)]


def advice(annotation: Any, value: Any) -> str:
    """What to give instead of a value that is not allowed."""
    allowed = allowed_values(annotation)
    if allowed.startswith("text") and isinstance(value, str):
        if value == "~":
            return f"{allowed}, or ~/ for your home"
        if not value.strip():
            return f"{allowed}, not blank"
        return f"{allowed}, of at most {LONGEST} characters and without NUL"
    if allowed.startswith("text") and isinstance(value, bool | int | float):
        return f"{allowed}, in quotes"
    if may_be_a_name(annotation) and isinstance(value, bool | float):
        return f"{allowed}, in quotes"
    is_list = get_origin(base_of(annotation)) is tuple
    item = get_args(base_of(annotation))[0] if is_list else annotation
    kinds = {base_of(item), *get_args(base_of(item))}
    if not {int, float} & kinds:
        return allowed
    endless = is_endless(annotation)
    given = [_number(part) for part in (items_of(value) if is_list else _each(value))]
    if not endless and not all(map(_is_within, given)):
        allowed = allowed_values(annotation, largest=True)
    if not endless and any(isinstance(part, float) and not math.isfinite(part) for part in given):
        return f"{'finite numbers' if is_list else 'a finite number'}: {allowed}"
    if not is_list and float not in kinds and any(map(_is_whole_float, given)):
        return f"{allowed}, in digits alone"
    if any(isinstance(part, str) and re.match(r"[-+]?0\d", part) for part in given):
        return f"{allowed}, without a zero in front"
    return allowed


def _number(value: Any) -> Any:
    """The number that a text stands for; any other value is returned as it is."""
    return in_yaml(value.strip()) if isinstance(value, str) and len(value) < LONGEST else value


def _is_whole_float(value: object) -> bool:
    """Whether a whole number was written as +20, 20.0 or 2e1, which no integer field accepts."""
    return isinstance(value, float) and value.is_integer()


def is_text(value: object) -> bool:
    """Whether a value is a text that may be a name or a path."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= LONGEST
        and not value.isspace()
        and "\0" not in value
    )
