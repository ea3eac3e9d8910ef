"""A run's folder: only what its mark lists is ever removed, and anything else keeps it as it is."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perf import stress
from utils.errors import NothingToDo, UserError
from utils.records import contents, folders
from utils.records.contents import Contents, is_file_name, write_mark
from utils.records.folders import RunFolder
from utils.records.places import attack_folder, defense_folder

HASH = "0123456789abcdef" * 4
# --overwrite, --resume.
ASKED = [(False, False), (True, False), (False, True)]


@pytest.fixture
def record(tmp_path: Path) -> RunFolder:
    """A finished record in which a defense has finished."""
    run = attack_folder("x", tmp_path / "record")
    written(run, "attack_result.pt", "poison.pt", "metrics.csv")
    run.write_summary({"files": {"attack_result.pt": HASH}})
    defended = defense_folder(run.path, "sau")
    written(defended, "defense_result.pt", "metrics.csv")
    defended.write_summary({"files": {"defense_result.pt": HASH}})
    return run


def written(run: RunFolder, *names: str) -> None:
    run.start("lr: 0.1\n")
    for name in names:
        run.write_text(name, f"content of {name}")


def state(root: Path) -> dict[str, str]:
    """All that stands below, folders and links too, but no lock of this process."""
    found = {str(path.relative_to(root)): os.path.realpath(path) for path in root.rglob("*")}
    found |= stress.contents(root)
    return {name: value for name, value in found.items() if not name.endswith(".lock")}


def begun(run: RunFolder, overwrite: bool = False, resume: bool = False) -> None:
    """What a script does with its folder before it works."""
    run.claim(overwrite, resume)
    run.start("lr: 0.2\n", resume)


def refused(run: RunFolder, overwrite: bool, resume: bool) -> str:
    """What is said of a folder that stays as it was, with its lock and all."""
    before, hidden = state(run.path.parent), set(run.path.parent.glob(".*"))
    with pytest.raises(UserError) as caught:
        begun(run, overwrite, resume)
    assert state(run.path.parent) == before
    assert set(run.path.parent.glob(".*")) == hidden
    assert Contents(run.path).foreign
    with pytest.raises(UserError):
        run.start("lr: 0.2\n")  # also where nobody has asked before
    assert state(run.path.parent) == before
    return str(caught.value)


# --- foreign files ------------------------------------------------------------------------------


@pytest.mark.parametrize(("overwrite", "resume"), ASKED)
@pytest.mark.parametrize(
    "files",
    [
        ["config.yaml", "chapter1.tex"],
        ["config.yaml"],
        ["config.yaml", "log.txt", "metrics.csv"],
        ["summary.json", "config.yaml", "attack_result.pt"],
        ["config.yaml", "checkpoint.pt"],
        [".config.0123abcd.tmp.yaml"],
        ["notes/chapter1.tex"],
        ["defense/sau/config.yaml"],
    ],
)
def test_a_folder_of_the_user_is_never_touched(
    tmp_path: Path, files: list[str], overwrite: bool, resume: bool
) -> None:
    """Whatever its files are called, if they are not ours."""
    for name in files:
        path = tmp_path / "record/mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    message = refused(attack_folder("mine", tmp_path / "record"), overwrite, resume)
    assert "record/mine exists and is no record (it holds " in message
    assert message.endswith("); give another name, or move it away")


def put_file(path: Path) -> None:
    path.write_text("years of work")


def put_folder(path: Path) -> None:
    path.mkdir()


def put_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(("overwrite", "resume"), ASKED)
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("place", "put"),
    [
        ("chapter1.tex", put_file),
        (".config.yaml.swp", put_file),
        (".chapter1.0123abcd.tmp.tex", put_file),
        ("thesis", put_folder),
        ("chapter1.tex", put_pipe),
        ("defense/chapter1.tex", put_file),
        ("defense/.sau.lock.txt", put_file),
        ("defense/.notes.lock", put_file),  # a lock is empty
        ("defense/link", put_link),
        ("defense/mine", put_file),
        ("defense/sau/chapter1.tex", put_file),
        ("defense/sau/defense", put_folder),
        ("defense/sau/link", put_link),
        ("defense/sau/log.txt", put_pipe),
        ("defense/.hidden", put_folder),
    ],
)
def test_a_foreign_file_anywhere_in_a_record_keeps_all_of_it(
    record: RunFolder,
    place: str,
    put: Callable[[Path], None],
    is_finished: bool,
    overwrite: bool,
    resume: bool,
) -> None:
    put(record.path / place)
    if not is_finished:
        (record.path / "summary.json").unlink()
    message = refused(record, overwrite, resume)
    assert f"is no record (it holds {place}); give another name" in message


def test_a_long_list_of_foreign_files_is_cut(record: RunFolder) -> None:
    for name in ("a\n\x1b[31m", *"bcde", "f" * 200):
        (record.path / name).write_text("")
    message = refused(record, True, False)
    assert "(it holds a\\n\\x1b[31m, b, c, ...)" in message


def test_a_foreign_file_in_one_result_keeps_it_alone(record: RunFolder) -> None:
    """Another defense of the same record runs, and the first one is refused."""
    (record.path / "defense/sau/chapter1.tex").write_text("years of work")
    begun(defense_folder(record.path, "ft"))
    assert "holds chapter1.tex" in refused(defense_folder(record.path, "sau"), True, False)


@pytest.mark.parametrize("place", ["chapter1.tex", "defense/sau/chapter1.tex"])
def test_a_file_that_comes_after_the_claim_is_kept(record: RunFolder, place: str) -> None:
    """Between the two a script reads its data, which may take an hour."""
    record.claim(overwrite=True)
    (record.path / place).write_text("years of work")
    before = state(record.path)
    with pytest.raises(UserError, match=f"it holds {place}"):
        record.start("lr: 0.2\n")
    assert state(record.path) == before


def test_a_file_that_comes_during_the_removal_is_kept(record: RunFolder) -> None:
    found = Contents(record.path)
    (record.path / "defense/sau/chapter1.tex").write_text("years of work")
    with pytest.raises(OSError, match="not empty"):
        found.remove()
    assert (record.path / "defense/sau/chapter1.tex").read_text() == "years of work"


# --- the mark -----------------------------------------------------------------------------------


def test_a_file_is_listed_before_it_is_there(tmp_path: Path) -> None:
    run = attack_folder("x", tmp_path)
    run.start("lr: 0.1\n")

    def look(path: Path) -> None:
        assert "found.csv" in json.loads((run.path / "run.json").read_text())["files"]
        path.write_text("")

    run.write("found.csv", look)
    run.write("found.csv", look)
    expected = {"written_by": "sau", "files": ["config.yaml", "log.txt", "found.csv"]}
    assert json.loads((run.path / "run.json").read_text()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '["config.yaml"]',
        "3",
        "null",
        '{"files": ["chapter1.tex"]}',
        '{"written_by": "me", "files": ["chapter1.tex"]}',
        '{"written_by": "sau", "files": "chapter1.tex"}',
        '{"written_by": "sau", "files": {"chapter1.tex": 1}}',
        '{"written_by": "sau", "files": ["chapter1.tex", 1]}',
        '{"written_by": "sau", "files": ["chapter1.tex", "../y"]}',
        '{"written_by": "sau", "files": ["chapter1.tex", "a/b"]}',
        '{"written_by": "sau", "files": ["chapter1.tex", "/etc/passwd"]}',
        '{"written_by": "sau", "files": ["chapter1.tex", ".."]}',
        '{"written_by": "sau", "files": ["chapter1.tex", ".hidden"]}',
        '{"written_by": "sau", "files": ["chapter1.tex", "a\\u0000"]}',
        '{"written_by": "sau", "files": ["chapter1.tex", "a\\n"]}',
        '{"written_by": "sau", "files": ["chapter1.tex", ""]}',
        '{"written_by": "sau", "files": ["chapter1.tex"], "more": 1}',
        '{"written_by": "sau", "files": ["chapter1.tex", "' + "a" * 300 + '"]}',
        "[" * 50_000,
        '{"written_by": "sau", "files": ["chapter1.tex"]}' + " " * 70_000,
    ],
)
@pytest.mark.parametrize(("overwrite", "resume"), ASKED)
def test_a_mark_that_is_none_lists_nothing(
    tmp_path: Path, text: str, overwrite: bool, resume: bool
) -> None:
    folder = tmp_path / "record/x"
    folder.mkdir(parents=True)
    (folder / "chapter1.tex").write_text("years of work")
    (folder / "run.json").write_text(text)
    message = refused(attack_folder("x", tmp_path / "record"), overwrite, resume)
    assert "(it holds chapter1.tex, run.json)" in message


@pytest.mark.parametrize("put", [put_pipe, put_folder])
def test_a_mark_is_a_file(record: RunFolder, put: Callable[[Path], None]) -> None:
    (record.path / "defense/sau/run.json").unlink()
    put(record.path / "defense/sau/run.json")
    assert "defense/sau/run.json" in refused(record, True, False)


def test_names_that_a_mark_may_list() -> None:
    assert all(map(is_file_name, ("config.yaml", "a b.png", "lr=0.1 (ours).csv", "猫.png")))
    assert not any(map(is_file_name, ("", ".x", "..", "a/b", "a\\b", "a\n", "a" * 201, "-x")))


def test_a_name_that_a_mark_may_not_list_is_told(tmp_path: Path) -> None:
    """As a defense of the user's own may give it to a table."""
    run = attack_folder("x", tmp_path)
    run.start("lr: 0.1\n")
    with pytest.raises(UserError, match=r"x: \.\./y\.csv is no name for a file; give at most 200"):
        run.write_text("../y.csv", "")
    assert not (tmp_path / "y.csv").exists()


@pytest.mark.parametrize("name", ["config.yaml", "found.csv"])
def test_a_mark_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = attack_folder("x", tmp_path)
    run.start("lr: 0.1\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "write_mark", full)
    with pytest.raises(UserError, match=r"x/\w+\.\w+: could not be written \(No space left"):
        run.start("lr: 0.1\n") if name == "config.yaml" else run.write_text(name, "")
    assert not (run.path / "found.csv").exists()


# --- what killed processes leave ----------------------------------------------------------------


@pytest.mark.parametrize("names", [[], [".run.0123abcd.tmp.json"]])
def test_an_empty_folder_is_free_also_with_half_a_mark(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "x").mkdir()
    for name in names:
        (tmp_path / "x" / name).write_text("half")
    begun(attack_folder("x", tmp_path))
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"run.json", "config.yaml"}


class Killed(BaseException):
    """In the place of SIGKILL."""


def counted(function: Callable[..., None], left: Iterator[int]) -> Callable[..., None]:
    """The function, as long as anything is left."""

    def call(path: Path, **rest: bool) -> None:
        if next(left, None) is None:
            raise Killed
        function(path, **rest)

    return call


@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_removal_can_be_killed_anywhere(
    record: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_earlier: bool
) -> None:
    """What is left is known as ours, is no finished run, and the same command goes on."""
    if is_earlier:
        for mark in record.path.rglob("run.json"):
            mark.unlink()
    shutil.move(record.path, tmp_path / "whole")
    for number in range(100):
        shutil.rmtree(record.path, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", record.path)
        left = iter(range(number))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", counted(Path.unlink, left))
            patch.setattr(Path, "rmdir", counted(Path.rmdir, left))
            try:
                Contents(record.path).remove()
                break
            except Killed:
                whole = stress.contents(tmp_path / "whole")
                assert not record.is_done or whole.items() <= stress.contents(record.path).items()
        begun(record, overwrite=True)
        assert {path.name for path in record.path.iterdir()} == {"run.json", "config.yaml"}
    assert number > 10
    assert list(record.path.iterdir()) == []


def test_a_run_that_was_killed_after_its_summary_is_finished(record: RunFolder) -> None:
    """Its checkpoint goes, and what it was writing."""
    record.write_checkpoint({"loop": {}, "rows": [], "seconds": 1.0})
    (record.path / ".checkpoint.0123abcd.tmp.pt").write_text("half")
    with pytest.raises(UserError, match="x exists; give --overwrite"):
        record.claim(overwrite=False)
    with pytest.raises(NothingToDo, match="x is finished; nothing is left to do"):
        record.claim(overwrite=False, resume=True)
    names = {path.name for path in record.path.iterdir()}
    assert not names & {"checkpoint.pt", ".checkpoint.0123abcd.tmp.pt"}
    assert {path.name for path in record.path.parent.iterdir()} == {"x"}


def test_locks_that_killed_processes_left_in_a_record_go_with_it(record: RunFolder) -> None:
    (record.path / "defense/.ft.lock").touch()
    begun(record, overwrite=True)
    assert not (record.path / "defense").exists()


def test_finished_results_are_not_replaced_unasked(record: RunFolder) -> None:
    """Where somebody has removed the summary of their attack alone."""
    (record.path / "summary.json").unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match="x exists; give --overwrite"):
            record.claim(overwrite=False, resume=resume)
    begun(record, overwrite=True)


# --- records of earlier versions ----------------------------------------------------------------


@pytest.fixture
def earlier(record: RunFolder) -> RunFolder:
    """As a version without marks has left it."""
    for mark in record.path.rglob("run.json"):
        mark.unlink()
    return record


def test_an_earlier_record_is_replaced_if_asked(earlier: RunFolder) -> None:
    with pytest.raises(UserError, match="x exists; give --overwrite"):
        earlier.claim(overwrite=False)
    begun(earlier, overwrite=True)
    assert {path.name for path in earlier.path.iterdir()} == {"run.json", "config.yaml"}


def test_an_earlier_run_goes_on(tmp_path: Path) -> None:
    run = attack_folder("x", tmp_path)
    config = "checkpoint_every: 1\nsave_folder_name: x\nrecord_path: null\n"
    run.start(config)
    run.write_checkpoint({"loop": {}, "rows": [], "seconds": 1.0})
    run.write_text("metrics.csv", "")
    (run.path / "run.json").unlink()
    run = RunFolder(run.path)
    run.claim(overwrite=False, resume=True)
    assert run.start(config, resume=True) is not None
    run.write_text("curves.png", "")
    expected = ["checkpoint.pt", "config.yaml", "metrics.csv", "log.txt", "curves.png"]
    assert json.loads((run.path / "run.json").read_text())["files"] == expected
    assert Contents(run.path).foreign == []


@pytest.mark.parametrize(
    "summary",
    [
        *("{}", "[]", "{", '{"files": []}', '{"files": {}}', '{"files": {"attack_result.pt": 1}}'),
        *('{"files": {"attack_result.pt": "0"}}', f'{{"files": {{"chapter1.tex": "{HASH}"}}}}'),
    ],
)
@pytest.mark.parametrize("place", ["", "defense/sau"])
def test_a_summary_that_is_none_of_ours_makes_no_record(
    earlier: RunFolder, summary: str, place: str
) -> None:
    (earlier.path / place / "summary.json").write_text(summary)
    assert "is no record (it holds" in refused(earlier, True, False)


@pytest.mark.parametrize("place", ["chapter1.tex", "defense/sau/chapter1.tex", "run.json"])
def test_an_earlier_record_with_a_foreign_file_is_kept(earlier: RunFolder, place: str) -> None:
    (earlier.path / place).write_text("{}")
    assert f"(it holds {place})" in refused(earlier, True, False)


def test_a_mark_lists_what_a_folder_holds(tmp_path: Path) -> None:
    """A name that is listed and is a folder, or a link, is none of ours."""
    write_mark(tmp_path, ["a", "b", "c"])
    (tmp_path / "a").write_text("")
    assert Contents(tmp_path).foreign == []
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert Contents(tmp_path).foreign == ["b", "c"]
    assert contents.MARK == "run.json"


# --- locks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [put_file, put_pipe, put_link, put_folder])
def test_what_is_no_lock_is_not_taken_for_one(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / ".x.lock")
    before = state(tmp_path)
    with pytest.raises(UserError, match=r"x\S*: (is no lock of this program|cannot be written)"):
        attack_folder("x", tmp_path).claim(overwrite=True)
    assert os.path.lexists(tmp_path / ".x.lock")
    assert state(tmp_path) == before


def test_a_lock_goes_with_the_folders_that_were_made_for_it(tmp_path: Path) -> None:
    """Not with those that somebody uses by then, and not with another process's lock."""
    run = RunFolder(tmp_path / "a/b/x")
    run.claim(overwrite=False)
    run.release()
    assert list(tmp_path.iterdir()) == []
    run.claim(overwrite=False)
    (tmp_path / "a/notes.txt").write_text("of the user")
    (tmp_path / "a/b/.x.lock").unlink()
    (tmp_path / "a/b/.x.lock").touch()
    run.release()
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "notes.txt", ".x.lock"}
    (tmp_path / "a/b/.x.lock").unlink()


def test_a_lock_that_was_removed_is_taken_again(tmp_path: Path) -> None:
    """As an attack does that replaces a record, in the process that ran a defense of it."""
    run = attack_folder("x", tmp_path)
    run.claim(overwrite=False)
    (tmp_path / ".x.lock").unlink()
    run.claim(overwrite=False)
    assert (tmp_path / ".x.lock").exists()


def test_who_is_refused_holds_no_lock(record: RunFolder) -> None:
    with pytest.raises(UserError, match="x exists"):
        record.claim(overwrite=False)
    assert not list(record.path.parent.glob(".*"))
