"""Files are whole or not there, and what killed processes leave is removed."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from utils import files, locks
from utils.errors import UserError
from utils.files import (
    ROOT,
    absolute,
    as_path,
    not_written,
    prepare_folder,
    remove_strays,
    replaced,
    temporary_folder,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("old")

    def fail() -> NoReturn:
        with replaced(tmp_path / "x.txt") as partial:
            partial.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "x.txt").read_text() == "old"
    assert names_in(tmp_path) == ["x.txt"]


def test_the_first_error_is_told_even_if_cleaning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux refuses to remove from a read-only file system even what is not there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="No space left"), replaced(tmp_path / "x.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")


KILLED = """
import sys, time
from pathlib import Path
from utils.files import replaced
with replaced(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    """While the process lives its file is left alone; after SIGKILL it is removed."""
    call = [sys.executable, "-c", KILLED, str(tmp_path / "x.pt")]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        remove_strays(tmp_path)
        assert len(names_in(tmp_path)) == 1
        process.kill()
    assert len(names_in(tmp_path)) == 1
    remove_strays(tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.skipif(locks.WINDOWS, reason="open files cannot be removed there")
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_another_process_takes_for_a_stray_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    """Between opening and locking it, the other process has locked, or already removed it."""
    lock, taken = locks.lock, []

    def late(handle: int, shared: bool = False) -> bool:
        if len(taken) < 4:
            taken.append(handle)
            if is_gone:
                for path in tmp_path.iterdir():
                    path.rmdir() if path.is_dir() else path.unlink()
                return lock(handle, shared)
            return False
        return lock(handle, shared)

    monkeypatch.setattr(locks, "lock", late)
    with replaced(tmp_path / "x.txt") as partial:
        partial.write_text("new")
    assert names_in(tmp_path) == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "new"
    (tmp_path / "x.txt").unlink()
    assert len(taken) == 4
    taken.clear()
    with temporary_folder(tmp_path, "made") as folder:
        assert names_in(tmp_path) == [folder.name]
    assert names_in(tmp_path) == []


@pytest.mark.skipif(locks.WINDOWS, reason="folders cannot be opened there")
def test_a_folder_that_is_removed_before_it_is_locked_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = Path.mkdir, []

    def made_and_removed(self: Path, *arguments: int, **flags: bool) -> None:
        mkdir(self, *arguments, **flags)
        made.append(self.name)
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    with temporary_folder(tmp_path, "made") as folder:
        assert names_in(tmp_path) == [folder.name]
    assert len(set(made)) == 2


def test_only_strays_are_removed(tmp_path: Path) -> None:
    """Of the names asked for, folders too; nothing of the user's, and nothing that is locked."""
    for name in (".x.0123abcd.tmp.pt", ".y.89abcdef.tmp", ".vimrc.tmp", "x.tmp", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / ".x.zip.0123abcd.tmp" / "inside").mkdir(parents=True)
    with (tmp_path / ".y.89abcdef.tmp").open() as other:
        assert locks.lock(other.fileno(), shared=True)
        remove_strays(tmp_path, "x")
        assert ".x.0123abcd.tmp.pt" not in names_in(tmp_path)
        assert ".x.zip.0123abcd.tmp" in names_in(tmp_path)
        remove_strays(tmp_path)
        assert names_in(tmp_path) == [".vimrc.tmp", ".y.89abcdef.tmp", "notes.txt", "x.tmp"]
    remove_strays(tmp_path)
    assert names_in(tmp_path) == [".vimrc.tmp", "notes.txt", "x.tmp"]


def test_a_folder_is_prepared_for_work_that_ends_in_it(tmp_path: Path) -> None:
    """Cleaned and empty; a file in its place is told before the work."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".x.0123abcd.tmp.bin").write_text("half")
    prepare_folder(tmp_path / "cache")
    prepare_folder(tmp_path / "new" / "cache")
    assert names_in(tmp_path / "cache") == names_in(tmp_path / "new" / "cache") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        prepare_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/.y.tmp"), "Disk quota exceeded"),
        (OSError("Cannot save file"), "Cannot save file"),
        (RuntimeError("[enforce fail at x.cc:7] . unexpected pos 5"), "the disk is full, or the f"),
    ],
)
def test_errors_of_writing_are_told_in_one_line(error: Exception, reason: str) -> None:
    assert str(not_written(Path("a/x.pt"), error)).startswith(
        f"a/x.pt: could not be written ({reason}"
    )


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell does not see to it in `--record_path=~/records`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert as_path("~/records") == tmp_path / "records"
    assert absolute("~/records") == str(tmp_path / "records")
    assert as_path("a~b") == Path("a~b")
    assert as_path(None) is None
    assert as_path("~\ud800/a") == Path("~\ud800/a")
    assert as_path("~a\0/b") == Path("~a\0/b")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("file/x", "file: cannot be written (Not a directory); move away what stands in its place"),
        ("file", "file: cannot be written (File exists); move away what stands in its place"),
        ("loop", "loop: cannot be written (File exists); move away what stands in its place"),
        ("loop/x", "written (Too many levels of symbolic links); move away what stands in its"),
        ("x" * 300, "cannot be written (File name too long); give a shorter path"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="it says it in other words")
def test_advice_is_about_what_the_system_refuses(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError) as caught, files.writable(tmp_path / name):
        (tmp_path / name).mkdir()
    assert told in str(caught.value)
    assert "make it writable" not in str(caught.value)
