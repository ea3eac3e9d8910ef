"""Files: only regular ones are read; they are written whole or not at all; strays are removed."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from utils import locks
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the checkout
# In the folder of a run; its other files are named in utils/records/contents.py.
MARK, CONFIG_FILE = "run.json", "config.yaml"

# Errors of the system whose reasons the user can remove; they are never a defect of the program.
REFUSALS = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS),  # not allowed, read-only
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full: the disk, the quota, the file
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ),  # no path that it can take
        *(errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENXIO),  # not what it has to be
    )
)

# The largest files that are read, in bytes: of text, of tables, pictures and lists, of tensors.
TEXT, TABLE, TENSORS = 1 << 24, 1 << 28, 1 << 34

_DIGITS = 8  # of the random part of a temporary name, which differs between machines, too


def opened(path: Path, largest: int = TABLE) -> IO[bytes]:
    """A regular file to read from; every file that may come from a stranger is opened in this way.

    A pipe, a device, a folder, or a link to one of these, is refused without waiting for it.

    Args:
        largest: size in bytes; see `TEXT`, `TABLE`, `TENSORS`.

    Raises:
        OSError: if it is no regular file, larger, or cannot be opened; `strerror` says why.
    """
    handle = locks.open_at_once(path, os.O_RDONLY)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > largest:
            raise OSError(errno.EFBIG, f"it is larger than {largest:,} bytes", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, largest: int = TABLE) -> bytes:
    """The content of a file; see `opened`.

    Raises:
        OSError: as `opened`.
    """
    with opened(path, largest) as file:
        return file.read(largest)


def read_text(path: Path, largest: int = TEXT) -> str:
    """The text of a file in UTF-8, without a byte-order mark; see `opened`.

    Raises:
        OSError: as `opened`.
        ValueError: if it is no UTF-8.
    """
    return read_bytes(path, largest).decode("utf-8-sig")  # some editors put the mark before it


def read_object(path: Path, largest: int = TEXT) -> dict[str, Any]:
    """The object of a JSON file; see `opened`.

    Raises:
        OSError: as `opened`.
        ValueError: if it is no JSON, nested too deep, or no object.
    """
    try:
        content = json.loads(read_text(path, largest))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    return content


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, hexadecimal.

    Raises:
        OSError: as `opened`.
    """
    digest = hashlib.sha256()
    with opened(path, TENSORS) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; at the end it is flushed and takes the file's name.

    If anything goes wrong, an earlier file of that name stays as it is, and the temporary file is
    removed. The temporary file is open and locked. Those of killed processes are not locked.

    Raises:
        OSError: if the file cannot be written.
    """
    while True:
        partial = path.with_name(f".{path.stem}.{_token()}.tmp{path.suffix}")
        with _removed_at_end(partial):
            with partial.open("w+b") as file:
                if not _lock(file.fileno()):
                    continue
                yield partial
                os.fsync(file.fileno())
            locks.patiently(functools.partial(os.replace, partial, path))
            return


@contextlib.contextmanager
def temporary_folder(folder: Path, name: str) -> Iterator[Path]:
    """A new folder, removed at the end, that `remove_strays` knows by its name.

    Raises:
        OSError: if it cannot be made.
    """
    while True:
        partial = folder / f".{name}.{_token()}.tmp"
        with contextlib.ExitStack() as stack:
            if locks.WINDOWS:
                guard = stack.enter_context(_removed_at_end(_guard_of(partial)))
                stack.enter_context(guard.open("wb"))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir()
            if not locks.WINDOWS:
                try:
                    handle = os.open(partial, os.O_RDONLY)
                except FileNotFoundError:  # another process took it for a stray
                    continue
                stack.callback(os.close, handle)
                if not _lock(handle):
                    continue
            yield partial
            return


def prepare_folder(folder: Path) -> None:
    """Makes a folder if it is not there, and cleans it of strays, before work that ends in it.

    Raises:
        OSError: if nothing can be written into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_strays(folder)
    with temporary_folder(folder, "try"):
        pass


def remove_strays(folder: Path, name: str = "*") -> None:
    """Removes files that killed processes were writing in a folder, but none that is being written.

    Args:
        name: of the files that were to be written, without the temporary suffix; a pattern.
    """
    for stray in folder.glob(f".{name}.{'[0-9a-f]' * _DIGITS}.tmp*"):
        with contextlib.suppress(OSError):  # another process has it, or has just removed it
            if locks.WINDOWS:
                _guard_of(stray).unlink(missing_ok=True)  # refused while it is open
                _remove(stray)
                continue
            handle = locks.open_no_link(stray, os.O_RDONLY if stray.is_dir() else os.O_RDWR)
            try:
                if locks.lock(handle):
                    _remove(stray)
            finally:
                os.close(handle)


def is_stray(name: str, names: Collection[str]) -> bool:
    """Whether a name is one under which `replaced` writes a file of one of the names."""
    match = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{{_DIGITS}}}\.tmp(\.[^.]+)?", name, re.DOTALL)
    return match is not None and f"{match[1]}{match[2] or ''}" in names


def not_written(path: Path, error: Exception) -> UserError:
    """The message for the user about an error while a file was written."""
    reason = getattr(error, "strerror", None) or str(error)
    if "enforce fail" in reason:  # torch.save does not say why
        reason = "the disk is full, or the file larger than allowed"
    return UserError(f"{path}: could not be written ({reason}); make space or make it writable")


def _token() -> str:
    return secrets.token_hex(_DIGITS // 2)


@contextlib.contextmanager
def _removed_at_end(file: Path) -> Iterator[Path]:
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # a read-only folder refuses this even if it is gone
            file.unlink()


def _guard_of(folder: Path) -> Path:
    """On Windows a folder cannot be opened, so this file is open while the folder is written."""
    return folder.with_name(f"{folder.name}.open")


def _remove(stray: Path) -> None:
    shutil.rmtree(stray) if stray.is_dir() else stray.unlink()


def _lock(handle: int) -> bool:
    """Whether the file is locked; if not, another process takes it for a stray, or took it."""
    if locks.WINDOWS:
        return True
    try:
        return locks.lock(handle, shared=True) and os.fstat(handle).st_nlink > 0
    except OSError:  # some network file systems have no locks
        return True


def at_home(text: str) -> str:
    """A flag's text; a `~` that it begins with is the user's home, as in a shell.

    Raises:
        UserError: if the home is empty, because the path would lead to the system's root.
    """
    if os.environ.get("HOME") == "" and (text == "~" or text.startswith("~/")):
        raise UserError(f"HOME: is empty, but {text} is in it; set HOME, or give the whole path")
    try:
        return os.path.expanduser(text)
    except ValueError:  # what comes after it can be no name of a user
        return text


def as_path(text: str | None) -> Path | None:
    """A flag's path; see `at_home`, because a shell leaves the `~` of `--flag=~/x` as it is."""
    return None if text is None else Path(at_home(text))


def absolute(text: str | None) -> str | None:
    """A flag's path as a record keeps it."""
    return None if text is None else os.path.abspath(at_home(text))


def has_working_folder() -> bool:
    """Whether the folder to which relative paths belong is still there."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def writable(path: Path, advice: str = "make it writable") -> Iterator[None]:
    """Raises UserError, naming the path, if the system refuses something inside.

    Args:
        advice: what to do where the system would take such a path, but does not let us write there.
    """
    try:
        yield
    except OSError as error:
        where = path
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP):
            named = Path(error.filename or path)  # e.g. that of a lock
            where = next((p for p in (named, *named.parents) if os.path.lexists(p)), path)
            advice = "move away what stands in its place, or give another path"
        elif error.errno == errno.ENAMETOOLONG:
            advice = "give a shorter path"
        elif error.errno not in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
            errno.EDQUOT,
        ):
            advice = "give another path"
        raise UserError(f"{where}: cannot be written ({error.strerror}); {advice}") from None


def refuse_link(path: Path) -> None:
    """Raises UserError if the path is a link."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link; give another name, or remove it")
