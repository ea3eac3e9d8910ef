"""The imports of a user's file: modules beside it come first, and only its own code sees them.

So `my_net.py` can import its own `models` or `utils`, as it does if Python runs it by itself,
although this project has packages with these names.
"""

import ast
import builtins
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from utils.errors import UserError
from utils.files import ROOT

ROOMS = ("analysis", "attack", "benchmark", "defense", "interop", "models", "perf", "sau", "utils")
_MARK = "__is_of_a_user_s_file__"  # among the builtins of such modules
_MOST_FILES = 1000

Read = Callable[[Path], bytes]


def files_beside(file: Path, read: Read) -> dict[str, list[Path]]:
    """The modules that a file may import from its folder, by the first part of the imported name.

    A package counts with all of its files, also those that only `importlib` would load.

    Args:
        file: the user's file; an absolute path.
        read: gives the text of a file.

    Raises:
        UserError: if there are too many.
    """
    beside: dict[str, list[Path]] = {}
    waiting = [file]
    while waiting:
        for name in _imported_names(read(waiting.pop())):
            if name not in beside and (files := _files_of(name, file.parent)):
                beside[name] = files
                waiting += files
        if sum(map(len, beside.values())) > _MOST_FILES:
            raise UserError(
                f"--model: {file} imports more than {_MOST_FILES} files beside it "
                f"({', '.join(sorted(beside))}); give a folder with what the network needs"
            )
    return beside


def is_of_user(frame: FrameType) -> bool:
    """Whether the code of a user's file, or of a module beside it, runs in this frame."""
    return _MARK in frame.f_builtins


class Neighbours:
    """The modules beside a user's file.

    Args:
        folder: of the file.
        names: of these modules and packages, as `files_beside` gives them.
        read: gives the text of a file.
    """

    def __init__(self, folder: Path, names: Sequence[str], read: Read) -> None:
        self._finder = _Finder(folder, names, read, self.builtins())
        self._names = frozenset(names)
        self._modules: dict[str, ModuleType] = {}
        self._lock, self._depth = threading.RLock(), 0

    def builtins(self) -> dict[str, Any]:
        """Builtins for the code of the user's file, whose `import` sees the modules beside it."""

        def import_beside(name: str, *arguments: Any, **named: Any) -> ModuleType:
            with self.visible():
                return builtins.__import__(name, *arguments, **named)

        return {**vars(builtins), "__import__": import_beside, _MARK: True}

    @contextlib.contextmanager
    def visible(self) -> Iterator[None]:
        """Inside, every import sees these modules; others of these names come back at the end."""
        with self._lock:
            if not self._names or self._depth:
                yield
                return
            self._depth = 1
            others = self._taken_out()
            sys.modules.update(self._modules)
            sys.meta_path.insert(0, self._finder)
            try:
                yield
            finally:
                sys.meta_path.remove(self._finder)
                self._modules = self._taken_out()
                sys.modules.update(others)
                self._depth = 0

    def _taken_out(self) -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in self._names]
        return {name: sys.modules.pop(name) for name in names}


class _Finder(MetaPathFinder):
    """Finds the modules beside a user's file."""

    def __init__(
        self, folder: Path, names: Sequence[str], read: Read, with_builtins: Mapping[str, Any]
    ) -> None:
        self._folder, self._names = folder, frozenset(names)
        self._read, self._builtins = read, with_builtins

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._names:
            return None
        spec = PathFinder.find_spec(fullname, [str(self._folder)] if path is None else path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.path, self._read, self._builtins)
            spec.cached = None
        elif spec is not None and spec.submodule_search_locations:  # a folder without __init__.py
            places = list(spec.submodule_search_locations)
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = places
        return spec


class _Loader(SourceLoader):
    """Loads the text that is hashed, with the builtins of the user's file; keeps no bytecode."""

    def __init__(self, path: str, read: Read, with_builtins: Mapping[str, Any]) -> None:
        self._path, self._read, self._builtins = path, read, with_builtins

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str | bytes) -> bytes:
        return self._read(Path(str(path)))

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self._builtins
        super().exec_module(module)


def _imported_names(text: bytes) -> set[str]:
    """First parts of what a text imports, at its top or inside functions.

    If it calls `import_module`, any text in it may be the name of a module, or the start of one.
    """
    names: set[str] = set()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # running it will tell
        return names
    is_dynamic = b"import_module" in text or b"__import__" in text
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_dynamic:
            names.add(node.value.partition(".")[0])
    return {name for name in names if name.isidentifier()}


def _files_of(name: str, folder: Path) -> list[Path]:
    """The files of a module or package of that name in the folder; none if there is no such module.

    A folder without `__init__.py` is a package only if nothing else has that name, as in Python
    itself. A file in the checkout gets the project's own packages, as always.
    """
    if name in ROOMS and folder.resolve() == ROOT:
        return []
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is None or name in sys.builtin_module_names:
        return []
    if spec.submodule_search_locations is None:
        return [Path(spec.loader.path)] if isinstance(spec.loader, SourceFileLoader) else []
    is_regular = isinstance(spec.loader, SourceFileLoader)
    if not is_regular and name not in ROOMS and PathFinder.find_spec(name) is not None:
        return []
    return sorted(
        path for place in spec.submodule_search_locations for path in Path(place).rglob("*.py")
    )[: _MOST_FILES + 1]
