"""The lock of a folder, by which only one process writes it."""

import atexit
import contextlib
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from utils import locks
from utils.errors import UserError
from utils.files import writable
from utils.process.script import logger

# By the lock's path: the open file, and the folders that were made for it.
_LOCKS: dict[str, tuple[int, list[Path]]] = {}


class Lock:
    """A locked file beside a folder; the process that has it may write the folder.

    Args:
        folder: which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder.with_name(f".{folder.name}.lock")

    def take(self) -> bool:
        """Takes it; the system gives it back when this process ends.

        Returns:
            Whether it is the lock of a process that was killed.

        Raises:
            UserError: if another process has it, or something else stands in its place.
        """
        path = self._file
        held = _LOCKS.get(os.path.realpath(path))
        if held is not None and os.fstat(held[0]).st_nlink:
            return False
        tries_until = time.monotonic() + 0.5  # somebody may just ask whether it is taken
        created: list[Path] = []
        try:
            with writable(self._folder):
                while (taken := self._try_lock(created)) is None:
                    if time.monotonic() > tries_until:
                        raise UserError(
                            f"{self._folder}: another process is writing it; wait for it, or give "
                            "another name"
                        )
                    time.sleep(0.05)
        except BaseException:
            _remove_empty(created)
            raise
        handle, is_left = taken
        _LOCKS[os.path.realpath(path)] = (handle, created)
        atexit.register(self.release)
        return is_left

    def wait(self, what: str) -> None:
        """Takes it once no other process has it; where there are no locks, it goes on without.

        Args:
            what: the other process makes, for the line that says that this one waits.
        """
        is_said = False
        while True:
            try:
                self.take()  # which itself tries for half a second
                return
            except UserError:
                if not self.is_taken:
                    return
            if not is_said:
                logger.info("%s: another process makes it; waiting for it", what)
                is_said = True

    def _try_lock(self, created: list[Path]) -> tuple[int, bool] | None:
        """The open lock, and whether it was there before; None if another process has it.

        Args:
            created: gets the folders that are made for it, the innermost first.
        """
        path = self._file
        absent = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        created.extend(parent for parent in absent if parent not in created)
        is_left = False
        try:
            try:
                handle = locks.open_no_link(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                handle, is_left = locks.open_no_link(path, os.O_RDWR), True
        except FileNotFoundError:  # the process before has just removed it, or its folder
            return None
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            os.close(handle)
            raise UserError(f"{path}: is no lock of this program; move it away")
        try:
            if locks.lock(handle) and os.fstat(handle).st_nlink:
                return handle, is_left
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # another process has it, or has just removed it
        return None

    def release(self) -> None:
        """Gives it back, and removes its file and the folders that were made for it."""
        handle, created = _LOCKS.pop(os.path.realpath(self._file), (None, []))
        if handle is None:
            return
        if locks.WINDOWS:  # an open file cannot be removed, by which nobody loses a lock either
            os.close(handle)
        with contextlib.suppress(OSError):  # its folder may be gone, or read-only by now
            # Without a name by now, the file of that name is another process's.
            if locks.WINDOWS or os.fstat(handle).st_nlink:
                locks.patiently(self._file.unlink)
        if not locks.WINDOWS:
            os.close(handle)
        _remove_empty(created)

    @property
    def is_taken(self) -> bool:
        """Whether another process has it."""
        return is_locked(self._file)


def is_locked(lock: Path) -> bool:
    """Whether another process has a lock."""
    if os.path.realpath(lock) in _LOCKS:
        return False
    try:
        handle = locks.open_no_link(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not locks.lock(handle, shared=True)
    except OSError:
        return False
    finally:
        os.close(handle)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, from the innermost on, as long as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
