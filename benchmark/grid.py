"""A grid of runs in one YAML: datasets x models x attacks x pratio x seeds, and defenses on each.

    datasets: [digits]
    models: [preactresnet18]
    attacks:
      badnet:
      badnet_all2all: {script: badnet, attack_label_trans: all2all}
    defenses:
      ft:
      sau_short: {script: sau, n_rounds: 2}
    analyses:
      retune:
    seeds: [0, 1, 2]

The entries under a name are flags of its script; without `script`, the name is that of the script.
`attack_flags` are for all attacks, and `defense_flags` for all defenses that have these flags.
`pratios: [0.1, 0.05]` is one more axis; an attack with its own `pratio` ignores it. A defense that
looks at the poisoned training set is not run on a clean model, because that has no such set.

An analysis of a record runs when all of the record's defenses are done. Clean models of the grid
(`prototype`) with the same dataset and network are its controls, if it has some and its flags name
none: that of the same seed, or all of them. Of a clean model, only analyses run that need no
trigger.
"""

import re
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from utils.config import OF_ONE_RUN, placed
from utils.errors import UserError, quoted, suggestion
from utils.plain import read_yaml
from utils.records.contents import NAME
from utils.values import advice

OF_GRID = ("save_folder_name", "record_path", "result_file", "random_seed", *OF_ONE_RUN)


def _unique(values: Any) -> Any:
    """Raises ValueError if an item of a list is there twice."""
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{twice[0]} is there twice; give it once")
    return values


def _as_mapping(value: Any) -> Any:
    """A list of names as a mapping from names to no flags; a name without a value likewise."""
    if isinstance(value, list):
        if any(isinstance(name, dict | list) for name in value):
            raise ValueError("a list has names alone; leave out the dashes where names have flags")
        return {name: {} for name in _unique(value)}
    if isinstance(value, str):
        raise ValueError("give names in a list, like [badnet, blended], or names with flags")
    if isinstance(value, dict):
        return {name: {} if flags is None else flags for name, flags in value.items()}
    return value


def _not_of_grid(flags: dict[str, Any]) -> dict[str, Any]:
    for name in OF_GRID:
        if name in flags:
            raise ValueError(f"{name} is set by the grid itself; remove it")
    if not isinstance(script := flags.get("script", ""), str):
        raise ValueError(f"script: {quoted(script)} is not allowed; give the name of a script")
    return {name: placed(name, value) for name, value in flags.items()}


def _networks(models: list[str]) -> list[str]:
    """The networks; raises ValueError if one is there twice."""
    networks: list[str] = _unique(placed("model", models))
    return networks


def _additional(directives: dict[str, Any]) -> dict[str, Any]:
    """The directives; raises ValueError if one is none, or is the program's own."""
    for name, value in directives.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]+", name):
            raise ValueError(f"{_told(name)} is no option of sbatch; give one like nice or qos")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{name}: {_told(value)} is not allowed; give a text in one line")
        plain = name.replace("-", "_")
        if plain in _OF_SLURM:
            raise ValueError(f"{name} is not allowed; give {_OF_SLURM[plain]} in slurm")
        if plain in _OF_PROGRAM:
            raise ValueError(f"{name} is set by the grid itself; remove it")
    return directives


# Options of sbatch that are keys of the grid's `slurm`, and that the program needs for itself.
_OF_SLURM = {
    **{"time": "timeout_min", "mem": "mem_gb", "cpus_per_task": "cpus_per_task"},
    **{"partition": "partition", "gpus_per_node": "gpus_per_node", "array": "array"},
}
_OF_PROGRAM = (
    *("job_name", "dependency", "signal", "requeue", "no_requeue", "kill_on_invalid_dep"),
    *("output", "error", "open_mode", "wrap", "parsable", "wait"),
)
Single = bool | int | float | str
Flags = Annotated[dict[str, Single | list[Single] | None], AfterValidator(_not_of_grid)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Axis = Annotated[dict[Name, Flags], BeforeValidator(_as_mapping), Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Slurm(_Part):
    """The resources that a SLURM job of this grid asks for."""

    partition: str | None = None
    timeout_min: Annotated[int, Field(ge=1)] = 60
    mem_gb: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    cpus_per_task: Annotated[int, Field(ge=1)] = 2
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    array: bool = False
    cells_per_job: Annotated[int, Field(ge=1)] = 1
    parallelism: Annotated[int, Field(ge=1)] = 256
    directives: Annotated[dict[str, bool | int | str], AfterValidator(_additional)] = {}

    @model_validator(mode="after")
    def _has_one_kind_of_jobs(self) -> "Slurm":
        if self.array and self.cells_per_job > 1:
            raise ValueError("array: true needs cells_per_job: 1; drop one of them")
        return self


class Grid(_Part):
    """The YAML file."""

    datasets: Axis
    models: Annotated[list[str], AfterValidator(_networks)] = Field(min_length=1)
    attacks: Axis
    pratios: Annotated[list[float], AfterValidator(_unique)] = []
    defenses: Annotated[dict[Name, Flags], BeforeValidator(_as_mapping)] = {}
    analyses: Annotated[dict[Name, Flags], BeforeValidator(_as_mapping)] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], AfterValidator(_unique)] = Field(
        min_length=1
    )
    attack_flags: Flags = {}
    defense_flags: Flags = {}
    slurm: Slurm = Slurm()

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, content: Any) -> Any:
        """A key that may be left out may have nothing below it, as when that is commented out."""
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        if not isinstance(content, dict):
            return content
        return {key: of for key, of in content.items() if of is not None or key not in optional}

    @model_validator(mode="after")
    def _has_axes_that_count(self) -> "Grid":
        """An axis is in the names of records, so that no flag may say something else."""
        for_attacks = {
            "attack_flags": self.attack_flags,
            **{f"datasets.{name}": flags for name, flags in self.datasets.items()},
        }
        of_attacks = {f"attacks.{name}": flags for name, flags in self.attacks.items()}
        axes = {"dataset": "datasets", "model": "models"}
        for where, flags in {**for_attacks, **of_attacks}.items():
            for name, axis in axes.items():
                if name in flags:
                    raise ValueError(f"{where}: {name} is an axis of the grid; give it in {axis}")
        for name, flags in self.analyses.items():
            if "defenses" in flags:
                raise ValueError(f"analyses.{name}: defenses is set by the grid itself; remove it")
        for where, flags in for_attacks.items():
            if self.pratios and "pratio" in flags:
                raise ValueError(f"{where}: pratio is an axis of the grid; leave one of them out")
        return self


def read_grid(path: Path) -> Grid:
    """Reads and checks a grid's file, except the flags.

    Raises:
        UserError: naming keys that are missing, unknown, or have a value that is not allowed; of
            many, the first twenty.
    """
    content = read_yaml(path)
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        problems: dict[Place, str] = {}  # one for each place, whatever was tried there
        for problem in error.errors():
            place = _place(problem, content)
            key = problem["loc"] if "[key]" in problem["loc"] else place
            problems.setdefault(key, f"{path}: {_said(problem, place)}")
        said, more = list(problems.values())[:_MOST_SAID], len(problems) - _MOST_SAID
        raise UserError(*said, *([f"{path}: and {more} more"] if more > 0 else [])) from None


_MOST_SAID = 20  # mistakes, of which each says what is allowed
Place = tuple[int | str, ...]

# What may be given at a key, and inside of it.
_ALLOWED = {
    "datasets": "names in a list, or names with flags",
    "models": "a list of networks",
    "attacks": "names in a list, or names with flags",
    "pratios": "a list of numbers",
    "defenses": "names in a list, or names with flags",
    "analyses": "names in a list, or names with flags",
    "seeds": "a list of whole numbers",
    "attack_flags": "names of flags with their values",
    "defense_flags": "names of flags with their values",
    "slurm": f"some of {', '.join(Slurm.model_fields)}, with their values",
}
_ITEMS = {
    "models": "the name of a network",
    "pratios": "a finite number, without quotes",
    "seeds": "a whole number from 0 to 4294967295, without quotes or a zero in front",
    "directives": "true, false, a whole number or a text",
}
_FLAG = "true, false, a number, a text, null, or a list of these"
_NAME = "letters, digits, _ . + - with a letter, a digit or _ first, and quotes around a number"


def _place(problem: Any, content: Any) -> Place:
    """The keys and positions in a file of what pydantic found, without the types that it tried."""
    place: list[int | str] = []
    for part in problem["loc"]:
        if problem["type"] != "missing":
            try:
                content = content[part]
            except (LookupError, TypeError):
                break
        place.append(part)
    return tuple(place)


def _said(problem: Any, place: Place) -> str:
    """What is wrong at a place of the file, or in the file as a whole, and what is allowed."""
    where = ".".join(map(quoted, place))
    if problem["type"] == "value_error":
        said = problem["msg"].removeprefix("Value error, ")
        return f"{where}: {said}" if where else str(said)
    if problem["type"] == "missing":
        return f"{where}: is missing; give {_ALLOWED[str(place[0])]}"
    if problem["type"] == "extra_forbidden":
        names = list((Slurm if place[0] == "slurm" else Grid).model_fields)
        return f"{where}: unknown name{suggestion(str(place[-1]), names)}; give {', '.join(names)}"
    value = _told(problem["input"])
    if problem["loc"][-1] == "[key]":
        return f"{'.'.join(map(quoted, place[:1]))}: {value} is no name; give {_NAME}"
    return f"{where}: {value} is not allowed; give {_allowed(place, problem['input'])}"


def _allowed(place: Place, value: Any) -> str:
    """What may be given at a place of the file instead of a value."""
    first, *inside = map(str, place)
    if not inside:
        return _ALLOWED[first] + (", one or more" if Grid.model_fields[first].is_required() else "")
    if first == "slurm":
        if inside[0] == "directives":
            return _ITEMS["directives"]
        hints = get_type_hints(Slurm, include_extras=True)
        return advice(hints[inside[0]], value)
    if first in _ITEMS:
        return _ITEMS[first]
    is_name = len(inside) == 1 and not first.endswith("_flags")
    return _ALLOWED["attack_flags"] if is_name else _FLAG


def _told(value: Any) -> str:
    """As `quoted`; a text between quotation marks."""
    return f"'{quoted(value)}'" if isinstance(value, str) else quoted(value)
