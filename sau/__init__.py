"""The project from Python: `from sau import Config, load_defense, purify`.

    from sau.defense import ft                  # any other defense: ft.Config, ft.purify
    from sau.defense.nc import Config, purify

The packages of the checkout are loaded as `sau.defense`, `sau.models`, `sau.utils` and so on, so
that your own `models` and `utils` stay yours. `pip install -e .` in the checkout makes it known to
Python everywhere.
"""

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("attack", "defense", "interop", "models", "utils")

if not all((ROOT / room).is_dir() for room in ROOMS):
    raise ImportError(
        f"sau: {ROOT} is no checkout of the project; clone it, and `pip install -e .` there"
    )
__path__ = [str(ROOT)]


class _Finder(MetaPathFinder):
    """Finds `sau.utils.config` in utils/config.py."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package != __name__ or rest.partition(".")[0] not in ROOMS:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Gives a module an `import` that finds the project's own packages under `sau`."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        before = sys.path.count(str(ROOT))
        super().exec_module(module)
        while sys.path.count(str(ROOT)) > before:  # scripts put it first, for their own imports
            sys.path.remove(str(ROOT))


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    room = name.partition(".")[0]
    if level or room not in ROOMS:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    package = builtins.__import__(f"{__name__}.{name}", globals, locals, fromlist or (), 0)
    return package if fromlist else sys.modules[f"{__name__}.{room}"]


sys.meta_path.insert(0, _Finder())

if TYPE_CHECKING:
    from defense.sau import Config, purify
    from models import build_model
    from utils.errors import UserError
    from utils.records.defense import load_defense
else:
    from sau.defense.sau import Config, purify
    from sau.models import build_model
    from sau.utils.errors import UserError
    from sau.utils.records.defense import load_defense

__all__ = ["Config", "UserError", "build_model", "load_defense", "purify"]
