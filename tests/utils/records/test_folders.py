"""Folders of runs: whole files or none, nothing replaced unasked, names that stay inside."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from utils.errors import UserError
from utils.records.folders import RunFolder
from utils.records.places import attack_folder, defense_folder, find_record


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty folder of a run that has begun."""
    folder = RunFolder(tmp_path / "record" / "demo")
    folder.start("dataset: tiny\n")
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing ------------------------------------------------------------------------------------


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(run: RunFolder) -> None:
    run.write_text("notes.txt", "old")

    def half(path: Path) -> None:
        path.write_text("ne")
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run.write("notes.txt", half)
    assert (run.path / "notes.txt").read_text() == "old"
    assert names_in(run.path) == ["config.yaml", "notes.txt", "run.json"]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("write failed")])
def test_a_full_disk_is_told_with_the_name_of_the_file(run: RunFolder, error: Exception) -> None:
    run.write_text("notes.txt", "old")

    def full(path: Path) -> None:
        path.write_text("ne")
        raise error

    with pytest.raises(UserError) as caught:
        run.write("notes.txt", full)
    assert f"{run.path / 'notes.txt'}: could not be written ({error})" in str(caught.value)
    assert (run.path / "notes.txt").read_text() == "old"
    assert names_in(run.path) == ["config.yaml", "notes.txt", "run.json"]


def test_a_file_never_stands_half_written_under_its_name(run: RunFolder) -> None:
    """While a file is written, its name still holds the old content; the suffix is kept."""
    run.write_text("notes.txt", "old")

    def look(path: Path) -> None:
        path.write_text("new")
        assert path.suffix == ".txt"
        assert (run.path / "notes.txt").read_text() == "old"

    assert run.write("notes.txt", look) == run.path / "notes.txt"
    assert (run.path / "notes.txt").read_text() == "new"


def test_whoever_reads_the_old_file_keeps_it_whole(run: RunFolder) -> None:
    """The new file takes the name in one step instead of being written over the old one."""
    run.write_text("notes.txt", "old")
    with (run.path / "notes.txt").open() as reader:
        run.write_text("notes.txt", "new")
        assert reader.read() == "old"
    assert (run.path / "notes.txt").read_text() == "new"


def test_writing_into_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.*notes\.txt: could not be written"):
        RunFolder(tmp_path / "gone").write_text("notes.txt", "x")


def test_tensors_load_without_pickled_objects(run: RunFolder) -> None:
    run.write_tensors("values.pt", {"numbers": torch.arange(3), "names": ["a"], "size": 3})
    content = torch.load(run.path / "values.pt", weights_only=True)
    assert content["numbers"].tolist() == [0, 1, 2]
    assert (content["names"], content["size"]) == (["a"], 3)


def test_metrics_read_back(run: RunFolder) -> None:
    """A row without a value, or with NaN, has an empty cell, which reads as missing."""
    none = float("nan")
    run.write_metrics([{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": none, "acc": 0.9}])
    assert (run.path / "metrics.csv").read_bytes() == (
        b"epoch,loss,acc\n1,0.3333333333333333,\n2,,0.9\n"
    )
    expected = pd.DataFrame({"epoch": [1.0, 2.0], "loss": [1 / 3, none], "acc": [none, 0.9]})
    read = pd.read_csv(run.path / "metrics.csv", dtype=str).astype(float)
    pd.testing.assert_frame_equal(read, expected)


def test_a_summary_is_json_and_makes_the_run_done(run: RunFolder) -> None:
    assert not run.is_done
    run.write_summary({"class": "猫", "acc": 0.5})
    assert run.is_done
    text = (run.path / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"class": "猫", "acc": 0.5}
    assert "猫" in text


def test_a_summary_has_null_for_what_json_has_no_number_for(run: RunFolder) -> None:
    """Python would write NaN and Infinity, which other languages refuse to read."""
    facts = {"z": math.inf, "p": [0.5, math.nan, (-math.inf, 1)], "deep": {"x": {"y": math.nan}}}
    run.write_summary({**facts, "is": True, "n": None, "text": "nan"})
    written = json.loads((run.path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written == {
        "z": None,
        "p": [0.5, None, [None, 1]],
        "deep": {"x": {"y": None}},
        "is": True,
        "n": None,
        "text": "nan",
    }


def test_a_finished_run_is_overwritten_only_if_asked(run: RunFolder) -> None:
    run.claim(overwrite=False)  # unfinished: may be written again
    run.write_summary({})
    with pytest.raises(UserError, match=r"demo exists; give --overwrite"):
        run.claim(overwrite=False)
    run.claim(overwrite=True)


def test_a_run_starts_in_an_empty_folder(run: RunFolder) -> None:
    run.write_text("old.txt", "x")
    run.start("lr: 0.1\n")
    assert names_in(run.path) == ["config.yaml", "run.json"]
    assert (run.path / "config.yaml").read_text() == "lr: 0.1\n"


def test_a_run_without_a_checkpoint_is_said_to_start_anew(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert run.start("lr: 0.1\n", resume=True) is None
    assert caplog.messages == [f"--resume: {run.path} has no checkpoint; the run starts anew"]
    caplog.clear()
    run.write_checkpoint({"loop": {}, "rows": [], "seconds": 1.0})
    assert run.start("lr: 0.1\n", resume=True) is not None
    assert run.start("lr: 0.1\n") is None
    assert not caplog.messages


def test_a_folder_that_no_run_made_is_not_emptied(tmp_path: Path) -> None:
    """`--record_path ~ --save_folder_name Documents` must not cost anyone their documents."""
    (tmp_path / "Documents").mkdir()
    (tmp_path / "Documents" / "thesis.txt").write_text("years of work")
    folder = attack_folder("Documents", tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="Documents"):
            start_as_a_script_does(folder, overwrite)
        assert (tmp_path / "Documents" / "thesis.txt").read_text() == "years of work"


def start_as_a_script_does(folder: RunFolder, overwrite: bool) -> None:
    folder.claim(overwrite)
    folder.start("lr: 0.1\n")


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    start_as_a_script_does(attack_folder("demo", tmp_path), overwrite=False)
    assert names_in(tmp_path / "demo") == ["config.yaml", "run.json"]


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(UserError, match="demo"):
        start_as_a_script_does(attack_folder("demo", tmp_path), overwrite=False)
    assert (tmp_path / "demo").read_text() == "a file"


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "badnet_0.1", "a+b-c", "2024", "a..b", "_x"])
def test_a_name_becomes_a_folder_of_the_records(tmp_path: Path, name: str) -> None:
    assert attack_folder(name, tmp_path).path == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "-x", ".hidden", "a b", "x\n", "é"]
)
def test_a_name_that_could_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--save_folder_name"):
        attack_folder(name, tmp_path)


def test_a_defense_writes_into_the_record_it_read(tmp_path: Path) -> None:
    assert defense_folder(tmp_path, "sau").path == tmp_path / "defense" / "sau"
    with pytest.raises(UserError, match="--save_folder_name: \\.\\./x is not a name"):
        defense_folder(tmp_path, "../x")


def test_a_record_is_found_by_its_name_or_its_folder(run: RunFolder) -> None:
    assert find_record("demo", run.path.parent) == run.path
    assert find_record(str(run.path), run.path.parent / "elsewhere") == run.path


def test_a_record_s_folder_ends_with_its_own_name(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is beside the folder, of that name: each way to say it leads to the same lock."""
    inside = run.path / "defense"
    inside.mkdir()
    records = run.path.parent / "elsewhere"
    monkeypatch.chdir(run.path)
    assert find_record(".", records) == run.path.resolve()
    monkeypatch.chdir(inside)
    assert find_record("..", records) == run.path.resolve()
    assert find_record(str(inside / ".."), records) == run.path.resolve()
    assert find_record(f"{run.path}/", records) == run.path
    assert find_record("demo/", run.path.parent) == run.path


@pytest.mark.parametrize("name", ["/", "//", "/.."])
def test_the_root_of_all_folders_is_no_record(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--result_file: {name} is no record in"):
        find_record(name, tmp_path)


def test_a_record_that_is_a_link_is_refused_however_it_is_named(run: RunFolder) -> None:
    """Its lock would have another name; the folder of all records may be a link."""
    run.write_tensors("attack_result.pt", {})
    records = run.path.parent
    (records / "link").symlink_to("demo")
    for name in ("link", str(records / "link"), str(records / "link") + "/"):
        with pytest.raises(UserError, match=r"--result_file: .*link is a link; give the"):
            find_record(name, records)
    with pytest.raises(UserError, match=r"give one of demo$"):
        find_record("nobody", records)
    (records.parent / "all").symlink_to(records)
    assert find_record("demo", records.parent / "all").name == "demo"


def test_an_unknown_record_is_refused_with_those_that_exist(run: RunFolder) -> None:
    run.write_tensors("attack_result.pt", {})
    records = run.path.parent
    (records / "unrelated").mkdir()
    with pytest.raises(UserError) as caught:
        find_record("dmeo", records)
    assert str(caught.value).startswith(f"--result_file: dmeo is no record in {records}")
    assert str(caught.value).endswith("give one of demo")


@pytest.mark.parametrize("name", ["demo", "RECORDS/demo", "RECORDS/demo/"])
def test_of_a_record_that_was_being_replaced_the_finished_one_is_named(
    run: RunFolder, name: str
) -> None:
    """Its process was killed after it had set the finished one aside; --resume puts that back."""
    run.write_summary({})
    run.claim(overwrite=True)
    run._set_aside()
    run.release()
    records = run.path.parent
    assert [path.name for path in records.iterdir() if path.is_dir()] == [".demo.replaced"]
    kept = f"is kept in {records}/.demo.replaced"
    message = f"--clean_record: {run.path} was about to be replaced, .* {kept}.*; the command "
    with pytest.raises(UserError, match=f"^{message}of its attack with --resume puts it back$"):
        find_record(name.replace("RECORDS", str(records)), records, "--clean_record")
    with pytest.raises(UserError, match="the earlier one is there again"):
        run.claim(overwrite=False, resume=True)
    assert find_record("demo", records) == run.path


def test_a_folder_that_is_not_there_is_told_with_its_place(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is not looked for in the folder of all records."""
    run.write_tensors("attack_result.pt", {})
    records = run.path.parent
    monkeypatch.chdir(run.path)
    message = f"other/demo is no record in {records}, and there is no folder {run.path}/other/demo;"
    with pytest.raises(UserError, match=f"^--result_file: {message} give one of demo$"):
        find_record("other/demo", records)


def test_of_many_records_the_nearest_are_offered(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"record{number}").mkdir()
        (tmp_path / f"record{number}/attack_result.pt").write_text("")
    with pytest.raises(UserError, match=r"give one of record7, .* more$"):
        find_record("recrd7", tmp_path)


def test_without_any_record_the_user_is_told_to_run_an_attack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run an attack first"):
        find_record("demo", tmp_path)


def test_only_names_that_can_be_given_are_offered(tmp_path: Path) -> None:
    """A record that was copied to a folder with a space is given by its path."""
    for name in ("good", "a copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "attack_result.pt").write_text("")
    with pytest.raises(UserError, match=r"nobody is no record in .*; give one of good$"):
        find_record("nobody", tmp_path)
