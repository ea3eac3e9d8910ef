"""Locks of open files, which the system gives back when the process ends, however it ends.

Linux and macOS have `flock`, which also has shared locks: several processes can look at the same
time whether a file is locked. Elsewhere filelock is used. It has no shared locks, so two processes
that look at the same moment may each take the other for the owner.

Windows refuses to remove or rename a file that is open. This protects a file that is being written
there. A lock would stop even its own process from writing; see `utils.files`.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WINDOWS = os.name == "nt"
PATIENCE = 2.0  # seconds that somebody may read what is to be replaced

# What systems call it that a pipe is not waited for, a terminal not taken, bytes not translated.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_at_once(path: Path, flags: int) -> int:
    """Opens a file without waiting for it, and without passing it on to other programs.

    Raises:
        OSError: if the system refuses.
    """
    return os.open(path, flags | _FLAGS, 0o644)


def open_no_link(path: Path, flags: int) -> int:
    """As `open_at_once`, but never what a link leads to.

    Raises:
        OSError: if it is a link, or the system refuses.
    """
    handle = open_at_once(path, flags | _NO_LINK)
    try:
        if not _NO_LINK and stat.S_ISLNK(os.lstat(path).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def lock(handle: int, shared: bool = False) -> bool:
    """Locks an open file until it is closed, if nobody else has locked it.

    Args:
        shared: whether others may have such a lock, too; only where the system knows it.

    Returns:
        False if another process has locked it. On a system without locks, this is never so.

    Raises:
        OSError: if the file system has no locks.
    """
    if fcntl is None:
        return _lock_elsewhere(handle)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_elsewhere(handle: int) -> bool:
    import filelock  # here, because it warns where it is not needed

    try:
        return filelock.lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return True


def patiently(change: Callable[[], None]) -> None:
    """Replaces or removes a file; on Windows tries again for a while if somebody has it open.

    Raises:
        OSError: if the system refuses.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return change()
        except PermissionError:
            if not WINDOWS or time.monotonic() > until:
                raise
        time.sleep(0.02)
