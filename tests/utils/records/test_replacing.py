"""A finished run that is overwritten is lost only when the new one is there."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_small
from tests.scripts import run_script
from utils.errors import Diverged, NothingToDo, UserError
from utils.files import ROOT, file_sha256
from utils.process.script import _Stop, defer_signals
from utils.records.contents import Contents
from utils.records.folders import RunFolder

SMALL = ["--dataset", "random", "--model", "tiny", "--epochs", 1]


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, but for locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def finished(path: Path, text: str = "old") -> RunFolder:
    """A finished run, which this process has claimed."""
    folder = RunFolder(path)
    folder.start(f"dataset: {text}\n")
    folder.write_summary({"is": text})
    folder.claim(overwrite=True)
    return folder


def replace(run: RunFolder, *files: str, error: BaseException | None = None) -> None:
    """A run that writes some files, and fails or ends."""
    with run.replacing():
        run.start("dataset: new\n")
        for name in files:
            run.write_text(name, "new")
        if error is not None:
            raise error
        run.write_summary({"is": "new"})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = finished(tmp_path / "demo")
    yield folder
    folder.release()


def test_the_old_run_goes_when_the_new_one_is_finished(run: RunFolder, tmp_path: Path) -> None:
    with run.replacing():
        run.start("dataset: new\n")
        assert (tmp_path / ".demo.replaced/summary.json").exists()
        run.write_summary({"is": "new"})
    assert set(content(tmp_path)) == {
        f"demo/{n}" for n in ("config.yaml", "run.json", "summary.json")
    }
    assert b"new" in (run.path / "summary.json").read_bytes()


@pytest.mark.parametrize(
    "error", [UserError("refused"), RuntimeError("defect"), KeyboardInterrupt()]
)
def test_a_run_that_fails_leaves_the_old_one(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    before = content(tmp_path)
    with pytest.raises(type(error)):
        replace(run, "log.txt", error=error)
    assert content(tmp_path) == before
    assert f"{run.path}: the earlier run is there again" in caplog.text


@pytest.mark.parametrize("error", [None, UserError("too large")])
def test_signals_are_at_once_again_after_a_run(run: RunFolder, error: UserError | None) -> None:
    """A method defers them; what fails in the middle of it does not."""
    with contextlib.suppress(UserError), run.replacing():
        defer_signals(True)
        if error is not None:
            raise error
    assert not _Stop.is_deferred


@pytest.mark.parametrize("error", [UserError("refused"), KeyboardInterrupt()])
def test_after_a_checkpoint_both_runs_are_kept(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """The new one can be resumed, also after a wrong flag; the old one is kept until then."""
    before = content(tmp_path)
    with pytest.raises(type(error)):
        replace(run, "checkpoint.pt", error=error)
    assert (run.path / "checkpoint.pt").exists()
    assert (tmp_path / ".demo.replaced/summary.json").exists()
    assert "the run that was to be replaced is kept in" in caplog.text
    with pytest.raises(UserError, match="is an interrupted run; give --resume to go on"):
        run.claim(overwrite=False)
    run.claim(overwrite=False, resume=True)
    assert (run.path / "checkpoint.pt").exists()
    both = content(tmp_path)
    run.claim(overwrite=True)  # the next one may still be refused
    assert content(tmp_path) == both
    replace(run, "checkpoint.pt")
    assert set(content(tmp_path)) == set(before)
    assert b"new" in (run.path / "summary.json").read_bytes()


@pytest.mark.parametrize("error", [UserError("refused"), Diverged("of what was prepared")])
def test_what_is_refused_before_it_begins_leaves_an_interrupted_run(
    run: RunFolder, tmp_path: Path, error: UserError
) -> None:
    """With its checkpoint, from which it can go on."""
    with pytest.raises(KeyboardInterrupt):
        replace(run, "checkpoint.pt", error=KeyboardInterrupt())
    both = content(tmp_path)
    another = RunFolder(run.path)
    another.claim(overwrite=True)
    with pytest.raises(type(error)), another.replacing():
        raise error
    assert content(tmp_path) == both


def test_a_run_that_diverged_is_not_resumed(run: RunFolder, tmp_path: Path) -> None:
    """From its checkpoint it would diverge again."""
    before = content(tmp_path)
    with pytest.raises(Diverged):
        replace(run, "log.txt", "checkpoint.pt", error=Diverged("the loss 'loss' is not finite"))
    assert content(tmp_path) == before


def test_of_a_process_that_was_killed_the_next_one_puts_the_old_run_back(
    run: RunFolder, tmp_path: Path
) -> None:
    before = content(tmp_path)
    run.start("dataset: new\n")  # without an end
    with pytest.raises(UserError, match="exists; give --overwrite to replace it"):
        run.claim(overwrite=False)
    assert content(tmp_path) == before


def test_a_finished_run_is_resumed_with_its_own_flags_alone(run: RunFolder, tmp_path: Path) -> None:
    """After an early end of the new run, `--resume` must not take the old one for it."""
    run.start("dataset: new\nlr: 0.1\n")
    with pytest.raises(UserError, match=r"ended before its first checkpoint.* give --overwrite"):
        run.claim(overwrite=False, resume=True, config="dataset: new\nlr: 0.1\n")
    assert b"old" in (run.path / "summary.json").read_bytes()
    with pytest.raises(UserError, match="is finished, and was run with --dataset old; give the"):
        run.claim(overwrite=False, resume=True, config="dataset: new\nlr: 0.1\n")
    same = "dataset: old\nsince: a later version\nresume: true\n"
    with pytest.raises(NothingToDo):
        run.claim(overwrite=False, resume=True, config=same)


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        ("index: a.txt", "index: null", False),
        ("index: null", "index: a.txt", False),
        ("clean_record: clean", "clean_record: null", False),
        ("clean_records: [a, b]", "clean_records: [a]", False),
        ("clean_records: [a, b]", "clean_records: [a, /there/b]", True),
        ("clean_records: [a, b]", "clean_records: [/there/b, a]", True),
        ("defenses: [ft, fp]", "defenses: [fp, ft]", True),
        ("defenses: [ft, fp]", "defenses: [ft]", False),
        ("shares: [0.1, 0.2]", "shares: [0.2, 0.1]", False),
        ("dataset: digits", "dataset: null", True),
        ("model: null", "model: resnet18", True),
        ("dataset_path: /a", "dataset_path: null", True),
        ("result_file: x", "result_file: /there/x", True),
    ],
)
def test_a_flag_that_is_left_out_counts_as_well(
    tmp_path: Path, before: str, now: str, is_same: bool
) -> None:
    """But for those that a run finds in the record."""
    folder = RunFolder(tmp_path / "x")
    folder.start(f"{before}\n")
    folder.write_summary({})
    what = NothingToDo if is_same else UserError
    with pytest.raises(what, match=r"is finished; nothing" if is_same else f"--{before[:4]}"):
        folder.claim(overwrite=False, resume=True, config=f"{now}\n")


def test_the_flags_of_a_finished_run_are_told_as_they_are_given(tmp_path: Path) -> None:
    """`['a']` would name a record with quotes in its name, and None one of that name."""
    folder = RunFolder(tmp_path / "x")
    folder.start("clean_records: [a, b]\nindex: null\nflip: true\n")
    folder.write_summary({})
    said = "with --clean_records [a, b], --flip true, --index null; give the same"
    with pytest.raises(UserError, match=re.escape(said)):
        folder.claim(False, resume=True, config="clean_records: []\nindex: i\nflip: false\n")


@pytest.mark.parametrize("text", [None, "", "- a\n", "\0"])
def test_a_finished_run_whose_flags_are_not_known_is_not_taken_for_another(
    run: RunFolder, text: str | None
) -> None:
    path = run.path / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"but its config\.yaml, .* is gone or damaged; put it ba"):
        run.claim(overwrite=False, resume=True, config="dataset: other\n")


def test_a_checkpoint_that_cannot_be_removed_is_no_end_of_a_finished_run(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither when it is finished, nor when it is found to be."""
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.name == "checkpoint.pt":
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    replace(run, "checkpoint.pt")
    assert run.is_done
    with pytest.raises(NothingToDo):
        run.claim(overwrite=False, resume=True, config="dataset: new\n")
    assert caplog.text.count("checkpoint.pt was not removed: Permission denied") == 2


@pytest.mark.parametrize("flag", ["trigger_image", "model"])
def test_a_finished_run_is_resumed_with_its_own_files_alone(
    run: RunFolder, tmp_path: Path, flag: str
) -> None:
    """The same flags name another content; the user would take the old model for the new one."""
    file = tmp_path / "given.py"
    file.write_text("one")
    config = f"{flag}: {file}{':build' if flag == 'model' else ''}\n"
    run.start(config)
    run.write_summary({"inputs": {f"--{flag}": file_sha256(file), "dataset": "0" * 64}})
    with pytest.raises(NothingToDo):
        run.claim(overwrite=False, resume=True, config=config)
    file.write_text("two")
    with pytest.raises(UserError, match=rf"was run with another content of --{flag} .*given\.py"):
        run.claim(overwrite=False, resume=True, config=config)


def test_a_process_that_was_killed_at_its_end_leaves_the_new_run(
    run: RunFolder, tmp_path: Path
) -> None:
    run.start("dataset: new\n")
    run.write_summary({"is": "new"})
    with pytest.raises(NothingToDo):
        run.claim(overwrite=False, resume=True)
    assert not (tmp_path / ".demo.replaced").exists()
    assert b"new" in (run.path / "summary.json").read_bytes()


def test_a_file_of_the_user_s_is_never_taken_away(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From what was set aside; the new run is finished all the same."""
    with run.replacing():
        run.start("dataset: new\n")
        (tmp_path / ".demo.replaced/mine.txt").write_text("mine")
        run.write_summary({"is": "new"})
    assert (tmp_path / ".demo.replaced/mine.txt").read_text() == "mine"
    assert "what this run replaced was not removed" in caplog.text
    assert run.is_done


def test_something_in_the_way_is_refused(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / ".demo.replaced").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match="is in the way; move it"):
        replace(run)
    assert content(tmp_path) == before


def test_finished_results_inside_are_kept_with_an_unfinished_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    folder.start("dataset: old\n")
    finished(folder.path / "defense/ft")
    before = content(tmp_path)
    folder.claim(overwrite=True)
    with pytest.raises(UserError, match="refused"):
        replace(folder, error=UserError("refused"))
    assert content(tmp_path) == before


def test_a_record_knows_results_that_are_being_replaced(run: RunFolder) -> None:
    """They go with it."""
    finished(run.path / "defense/sau").start("dataset: new\n")
    contents = Contents(run.path)
    assert contents.foreign == []
    contents.remove()
    assert not (run.path / "defense").exists()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("attack/badnet", ["--lr", "1e30"], "is not finite in epoch 1"),
        ("defense/fst", ["--select_layer_name", "typo"], "is no layer of this network"),
        ("defense/ft", ["--lr", "1e30"], "is not finite in round 1"),
        ("analysis/gradcam", ["--layer", "typo"], "is no layer of this network"),
        ("analysis/inspect", ["--clean_records", "bd"], "is the record of an attack"),
    ],
)
def test_a_wrong_flag_beside_overwrite_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    script: str,
    flags: list[object],
    message: str,
) -> None:
    make_small(monkeypatch)
    attacked = [ROOT / "attack/badnet.py", *SMALL, "--record_path", tmp_path]
    assert run_script(*attacked, "--save_folder_name", "bd") == 0
    command = [ROOT / f"{script}.py", "--record_path", tmp_path]
    if script.startswith("attack"):
        command += [*SMALL, "--save_folder_name", "bd"]
    else:
        few = ["--probes", 20, "--noise_steps", 1, "--noise_images", 1]
        command += ["--result_file", "bd", *(few if "inspect" in script else [])]
        assert run_script(*command) == 0
    before = content(tmp_path)
    assert run_script(*command, "--overwrite", *flags) == 2
    assert message in capsys.readouterr().err
    assert content(tmp_path) == before
