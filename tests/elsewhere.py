"""Runs scripts on a system that lacks what Windows lacks; `test_platforms.py` starts it.

    python tests/elsewhere.py import MODULE MODULE ...
    python tests/elsewhere.py help SCRIPT SCRIPT ...
    python tests/elsewhere.py run COMMAND COMMAND ...    # with Windows' rules, on a tiny network
    python tests/elsewhere.py hold FOLDER                # has a run's lock until its input ends

Windows' rules: a file that is open or mapped is not removed or renamed, nor is a folder that holds
one, and no folder is opened.
"""

import contextlib
import importlib
import mmap
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
NAMES: dict[Any, tuple[str, ...]] = {
    os: (
        *("fork", "mkfifo", "sched_getaffinity", "getuid", "geteuid", "killpg", "setsid", "nice"),
        *("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "getpgid", "chown"),
    ),
    signal: (
        *("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGXFSZ"),
        *("alarm", "setitimer", "pthread_sigmask"),
    ),
    mmap: ("MADV_DONTNEED", "MADV_WILLNEED", "MADV_SEQUENTIAL"),
}


def take_away() -> None:
    """Makes absent what Windows has not."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for home, names in NAMES.items():
        for name in names:
            if hasattr(home, name):
                delattr(home, name)


def in_use() -> set[str]:
    """Paths that this process has open or mapped."""
    paths = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the list itself
            paths.add(os.readlink(f"/proc/self/fd/{handle}"))
    for line in Path("/proc/self/maps").read_bytes().decode("utf-8", "replace").splitlines():
        paths.update(line.split(maxsplit=5)[5:])
    return paths


def keep_rules(place: Path) -> None:
    """Windows' rules for what is in a folder, from now on."""
    top = f"{place.resolve()}{os.sep}"

    def refuse(path: Any) -> None:
        whole = os.path.abspath(os.fsdecode(path))
        if whole.startswith(top):
            for held in in_use():
                if held == whole or held.startswith(f"{whole}{os.sep}"):
                    sys.stderr.write(f"against the rules: {whole}, while {held} is open\n")
                    traceback.print_stack(limit=12)
                    raise PermissionError(13, "Permission denied", whole)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.remove" and arguments[1] == -1:
            refuse(arguments[0])
        elif event == "os.rename":
            refuse(arguments[0])
            refuse(arguments[1])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            # Python's rmtree opens folders, but not so on Windows.
            is_ours = sys._getframe(1).f_code.co_filename.startswith(str(ROOT))
            if is_ours and path.startswith(top) and os.path.isdir(path):
                raise PermissionError(13, "Permission denied", path)

    sys.addaudithook(hook)


def script(path: str, *flags: str) -> None:
    """Runs a script; its exit code 0 is no end of this process."""
    sys.argv = [path, *flags]
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def main() -> None:
    what, *rest = sys.argv[1:]
    if what in ("run", "hold"):  # on Windows these two do their work without the modules
        import filelock  # noqa: F401
        import psutil  # noqa: F401
    take_away()
    sys.path.insert(0, str(ROOT))
    if what == "import":
        for name in rest:
            importlib.import_module(name)
    elif what == "help":
        for name in rest:
            script(name, "--help")
    else:
        from utils import locks

        locks.WINDOWS = True
        if what == "hold":
            from utils.records.folders import RunFolder

            RunFolder(Path(rest[0])).lock()
            print("held", flush=True)
            sys.stdin.read()
        else:
            keep_rules(Path.cwd())
            for command in rest:
                script(*command.split())


if __name__ == "__main__":
    main()
