"""A run goes on only with what it began with: method, flags, files, images, labels, model."""

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.scripts import attack_flags, defense_flags, one_error, run_script, trained
from utils.data.labelled import Dataset
from utils.errors import UserError
from utils.files import ROOT
from utils.process import device
from utils.records.checkpoint import CHECKPOINT, Origin, digest, files_of
from utils.records.folders import RunFolder
from utils.tensors import load_tensors
from utils.training.watch import Watch

pytestmark = pytest.mark.usefixtures("small", "cache")


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of its own for each test, which may change them."""
    shutil.copytree(workplace / "images", tmp_path / "images")
    return tmp_path


def stopped(script: str, *flags: object) -> None:
    """Runs a script until the end of its first round, with a checkpoint."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.training.watch.Watch._after_round", stop)
        assert run_script(ROOT / script, *flags, "--checkpoint_every", 0) == 130


def flags_of(place: Path, name: str, **changes: object) -> list[object]:
    return attack_flags(place, name, dataset_path=place / "images", **changes)


def assert_refused(
    capsys: pytest.CaptureFixture[str], what: str, script: str, *flags: object
) -> None:
    capsys.readouterr()
    assert run_script(ROOT / script, *flags, "--resume") == 2
    error = one_error(capsys)
    assert "--resume" in error
    assert what in error


@pytest.mark.parametrize(
    ("script", "changes", "what"),
    [
        ("attack/badnet.py", {"random_seed": 1}, "--random_seed 1"),
        ("attack/badnet.py", {"pratio": 0.5}, "--pratio 0.5"),
        ("attack/badnet.py", {"epochs": 3}, "--epochs 3"),
        ("attack/blended.py", {}, "--"),
        ("attack/prototype.py", {"pratio": None}, ""),
    ],
)
def test_a_checkpoint_of_another_run(
    place: Path, capsys: pytest.CaptureFixture[str], script: str, changes: dict, what: str
) -> None:
    """It was copied into the folder of a run that was stopped as well."""

    other = flags_of(place, "other", **{"random_seed": 0, **changes})
    if changes.get("pratio", 0) is None:  # a clean model has no such flag
        at = other.index("--pratio")
        del other[at : at + 2]
    stopped("attack/badnet.py", *flags_of(place, "x"))
    stopped(script, *other)
    shutil.copy(place / "record/other/checkpoint.pt", place / "record/x/checkpoint.pt")
    before = (place / "record/x/checkpoint.pt").read_bytes()
    assert_refused(capsys, what, "attack/badnet.py", *flags_of(place, "x"))
    assert (place / "record/x/checkpoint.pt").read_bytes() == before


def brighter(place: Path, images: str = "images") -> None:
    """Done twice, it is undone."""
    path = place / images / "train/dark/3.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def one_less(place: Path) -> None:
    (place / "images/test/dark/5.png").unlink()


def swapped(place: Path) -> None:
    first, second = place / "images/train/dark/0.png", place / "images/train/bright/0.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def renamed(place: Path) -> None:
    for split in ("train", "test"):
        (place / "images" / split / "dark").rename(place / "images" / split / "a_dark")


@pytest.mark.parametrize("change", [brighter, one_less, swapped, renamed])
def test_images_or_labels_that_were_changed(
    place: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    stopped("attack/badnet.py", *flags_of(place, "x"))
    change(place)
    what = "the images and labels of folder"
    assert_refused(capsys, what, "attack/badnet.py", *flags_of(place, "x"))


def test_a_trigger_s_picture_that_was_changed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = place / "trigger.png"
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(picture)
    flags = flags_of(place, "x", trigger_image=picture)
    stopped("attack/blended.py", *flags)
    Image.fromarray(np.full((16, 16, 3), 201, np.uint8)).save(picture)
    assert_refused(capsys, "--trigger_image", "attack/blended.py", *flags)


def test_an_emptied_configuration_is_written_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it does not let another recipe pass."""
    stopped("attack/badnet.py", *flags_of(place, "x"))
    path = place / "record/x/config.yaml"
    for text in ("", "lr: 3\n", "\0", "- a\n"):
        path.write_text(text)
        assert_refused(capsys, "--pratio", "attack/badnet.py", *flags_of(place, "x", pratio=0.5))
    assert run_script(ROOT / "attack/badnet.py", *flags_of(place, "x"), "--resume") == 0
    assert "pratio: 0.25\n" in path.read_text()


def test_a_configuration_as_it_was_stays(place: Path) -> None:
    """A resumed run leaves the files of one that was never stopped."""
    stopped("attack/badnet.py", *flags_of(place, "x"))
    before = (place / "record/x/config.yaml").read_bytes()
    assert run_script(ROOT / "attack/badnet.py", *flags_of(place, "x"), "--resume") == 0
    assert (place / "record/x/config.yaml").read_bytes() == before


def test_another_number_of_threads_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    stopped("attack/badnet.py", *flags_of(place, "x"))
    capsys.readouterr()
    torch.set_num_threads(threads + 1)
    try:
        assert run_script(ROOT / "attack/badnet.py", *flags_of(place, "x"), "--resume") == 0
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().err.splitlines() if "begun with" in line]
    assert lines == [
        f"warning: --resume: begun with threads {threads}, now {threads + 1}; the last digits may "
        "differ"
    ]


def test_other_versions_and_another_commit_are_said_in_the_log_and_the_summary(
    attacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run is stopped once more, and goes on as it did last."""
    flags = [*defense_flags(attacked, "x", batch_size=5), "--checkpoint_every", 0]
    after_batch = Watch._after_batch

    def stopped_after_a_batch(*more: object) -> None:
        def stop(self: Watch, batches: int) -> None:
            after_batch(self, batches)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Watch, "_after_batch", stop)
            assert run_script(ROOT / "defense/ft.py", *flags, *more) == 130

    monkeypatch.setattr(device, "_git_commit", lambda: "abc")
    stopped_after_a_batch()
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda package: "9.9.9" if package == "torch" else version(package)
    )
    monkeypatch.setattr(device, "_git_commit", lambda: None)
    stopped_after_a_batch("--resume")
    assert run_script(ROOT / "defense/ft.py", *flags, "--resume") == 0
    said = (
        f"--resume: begun with commit abc, now unknown; torch {version('torch')}, now 9.9.9; the "
        "last digits may differ"
    )
    result = attacked / "record/x/defense/ft"
    assert json.loads((result / "summary.json").read_text())["warnings"].count(said) == 1
    assert (result / "log.txt").read_text().count(f"warning: {said}\n") == 1


def test_the_same_conditions_are_not_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped("attack/badnet.py", *flags_of(place, "x"))
    capsys.readouterr()
    assert run_script(ROOT / "attack/badnet.py", *flags_of(place, "x"), "--resume") == 0
    assert "begun with" not in capsys.readouterr().err


@pytest.fixture
def attacked(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        trained(place, "x", patch, dataset_path=place / "images")
    return place


def test_an_index_file_that_was_changed(attacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = attacked / "index.txt"
    index.write_text("0\n1\n2\n13\n25\n")
    flags = defense_flags(attacked, "x", index=index, batch_size=5)
    stopped("defense/ft.py", *flags)
    index.write_text("0\n1\n2\n14\n25\n")
    assert_refused(capsys, "--index", "defense/ft.py", *flags)


def test_a_finished_defense_is_resumed_with_the_images_that_it_saw(
    attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --index it would see others."""
    index = attacked / "index.txt"
    index.write_text("0\n1\n2\n13\n25\n")
    flags = defense_flags(attacked, "x", batch_size=5)
    assert run_script(ROOT / "defense/ft.py", *flags, "--index", index) == 0
    assert_refused(capsys, f"was run with --index {index}", "defense/ft.py", *flags)
    moved = index.rename(attacked / "moved.txt")
    assert run_script(ROOT / "defense/ft.py", *flags, "--index", moved, "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert_refused(capsys, "--index", "defense/ft.py", *flags, "--index", attacked / "none.txt")
    moved.write_text("0\n1\n2\n13\n26\n")
    assert_refused(capsys, "was run with --index", "defense/ft.py", *flags, "--index", moved)


def test_a_finished_defense_is_of_the_record_s_dataset_and_network(
    attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which it is given or not."""
    flags = defense_flags(attacked, "x")
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    same = ["--dataset", "folder", "--model", "preactresnet18"]
    assert run_script(ROOT / "defense/ft.py", *flags, *same, "--resume") == 0
    for other in (["--dataset", "digits"], ["--model", "tiny"]):
        assert run_script(ROOT / "defense/ft.py", *flags, *other, "--resume") == 2
        assert "but the record says" in capsys.readouterr().err


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_finished_record_that_is_damaged_has_not_all_that_it_says(
    attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user would go on to the defenses."""
    flags = flags_of(attacked, "x")
    for name in ("attack_result.pt", "poison.pt", "summary.json"):
        path = attacked / "record/x" / name
        content = path.read_bytes()
        for spoil in (emptied, halved, *([Path.unlink] if path.suffix == ".pt" else [])):
            spoil(path)
            capsys.readouterr()
            assert run_script(ROOT / "attack/badnet.py", *flags, "--resume") == 2
            assert f"/x{'' if path.suffix == '.json' else f'/{name}'}: " in capsys.readouterr().err
        path.write_bytes(content)
    assert run_script(ROOT / "attack/badnet.py", *flags, "--resume") == 0


def test_a_finished_attack_is_not_resumed_with_other_images(
    attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (attacked / "images").rename(attacked / "moved")
    flags = flags_of(attacked, "x")
    at = flags.index("--dataset_path")
    flags[at + 1] = attacked / "moved"
    assert run_script(ROOT / "attack/badnet.py", *flags, "--resume") == 0
    assert run_script(ROOT / "attack/badnet.py", *flags[:at], *flags[at + 2 :], "--resume") == 0
    for path in (attacked / "moved/train/dark").iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    capsys.readouterr()
    assert run_script(ROOT / "attack/badnet.py", *flags, "--resume") == 2
    assert "--dataset_path: " in (told := capsys.readouterr().err)
    assert "is finished, with other images than those in " in told


def test_a_finished_run_is_not_taken_for_one_of_another_method(
    attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All flags of which the other one has as well."""
    flags = flags_of(attacked, "x")
    at = flags.index("--pratio")
    flags[at : at + 2] = []
    assert_refused(capsys, "is the record of badnet", "attack/prototype.py", *flags)
    flags = defense_flags(attacked, "x")
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    path = attacked / "record/x/defense/ft/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"defense": "other"}))
    assert_refused(capsys, "is a result of other", "defense/ft.py", *flags)


NETWORK = """
from beside import width
from torch import nn


def build(num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, width), nn.ReLU(),
                         nn.Linear(width, num_classes))
"""


@pytest.fixture
def own_network(place: Path) -> Path:
    """A network in two files."""
    (place / "code").mkdir()
    (place / "code/beside.py").write_text("width = 5\n")
    (place / "code/net.py").write_text(NETWORK)
    return place / "code"


def test_what_is_named_in_another_way_is_the_same(
    place: Path, own_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A renamed record, and images, a list and a network that were moved, of the same content."""
    index = place / "index.txt"
    index.write_text("0\n1\n2\n13\n25\n")
    net = f"{own_network}/net.py:build"
    assert run_script(ROOT / "attack/badnet.py", *flags_of(place, "x", model=net)) == 0
    given = {"batch_size": 5, "n_rounds": 2}
    flags = defense_flags(place, "x", model=net, index=index, **given)
    whole = place / "record/x/defense/ft"
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    expected = load_tensors(whole / "defense_result.pt")["model"]
    shutil.rmtree(whole)
    stopped("defense/ft.py", *flags)

    record = place / "record/y"  # without the lock, which this process keeps
    shutil.copytree(place / "record/x", record, ignore=shutil.ignore_patterns("*.lock"))
    shutil.rmtree(place / "record/x")
    moved = {"model": f"{own_network.rename(place / 'moved')}/net.py:build"}
    moved |= {"index": index.rename(place / "list.txt")}
    moved |= {"dataset_path": shutil.move(place / "images", place / "pictures")}
    flags = defense_flags(place, str(record), **moved, **given)
    assert run_script(ROOT / "defense/ft.py", *flags, "--resume") == 0
    found = load_tensors(record / "defense/ft/defense_result.pt")["model"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    config = (record / "defense/ft/config.yaml").read_text()
    assert str(place / "list.txt") in config
    assert run_script(ROOT / "defense/ft.py", *flags, "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().err


def test_an_attack_whose_images_and_network_were_moved_goes_on(
    place: Path, own_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(place, "x", model=f"{own_network}/net.py:build")
    stopped("attack/badnet.py", *flags)
    moved = {"model": f"{own_network.rename(place / 'moved')}/net.py:build"}
    moved |= {"dataset_path": shutil.move(place / "images", place / "pictures")}
    flags = attack_flags(place, "x", **moved)
    other = (place / "moved/beside.py").rename(place / "kept.py")
    (place / "moved/beside.py").write_text("width = 6\n")
    assert_refused(capsys, "was run with --model", "attack/badnet.py", *flags)
    other.replace(place / "moved/beside.py")
    (place / "moved/net.py").rename(place / "moved/other.py")
    renamed = attack_flags(place, "x", **moved | {"model": f"{place}/moved/other.py:build"})
    assert_refused(capsys, "net.py:build", "attack/badnet.py", *renamed)
    (place / "moved/other.py").rename(place / "moved/net.py")
    brighter(place, "pictures")
    assert_refused(capsys, "the images and labels of folder", "attack/badnet.py", *flags)
    brighter(place, "pictures")  # as it was
    assert run_script(ROOT / "attack/badnet.py", *flags, "--resume") == 0
    assert run_script(ROOT / "attack/badnet.py", *flags, "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().err


def test_an_attack_that_was_run_again(attacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder keeps the defense that was stopped, as a restored copy would."""
    flags = defense_flags(attacked, "x")
    stopped("defense/ft.py", *flags)
    kept = shutil.move(attacked / "record/x/defense", attacked / "kept")
    again = flags_of(attacked, "x", random_seed=5)
    assert run_script(ROOT / "attack/badnet.py", *again, "--overwrite") == 0
    shutil.move(kept, attacked / "record/x/defense")
    assert_refused(capsys, "the record", "defense/ft.py", *flags)


def test_the_checkpoint_of_another_defense(
    attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped("defense/ft.py", *defense_flags(attacked, "x"))
    stopped("defense/ft.py", *defense_flags(attacked, "x", save_folder_name="y", random_seed=3))
    folder = attacked / "record/x/defense"
    shutil.copy(folder / "y/checkpoint.pt", folder / "ft/checkpoint.pt")
    assert_refused(capsys, "--random_seed 3", "defense/ft.py", *defense_flags(attacked, "x"))
    stopped("defense/sau.py", *defense_flags(attacked, "x"))
    shutil.copy(folder / "sau/checkpoint.pt", folder / "ft/checkpoint.pt")
    assert_refused(capsys, "--", "defense/ft.py", *defense_flags(attacked, "x"))


# --- parts --------------------------------------------------------------------------------------


def begun(path: Path, origin: Origin) -> RunFolder:
    folder = RunFolder(path)
    folder.start("lr: 0.1\n", origin=origin)
    folder.write_checkpoint({"loop": {}, "rows": [], "seconds": 1.0})
    return folder


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"method": "b"}, "the method"),
        ({"files": {"--index": "2" * 64}}, "--index"),
        ({"files": {}}, "--index"),
        ({"tensors": {"labels": [torch.zeros(3)]}}, "labels"),
        ({"tensors": {}}, "labels"),
    ],
)
def test_each_source_counts(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    values: dict[str, Any] = {
        "method": "a",
        "files": {"--index": "1" * 64},
        "tensors": {"labels": [torch.ones(3)]},
    }
    folder = begun(tmp_path / "x", Origin(**values))
    found = RunFolder(folder.path).start("lr: 0.1\n", resume=True, origin=Origin(**values))
    assert found == {"loop": {}, "rows": [], "seconds": 1.0}
    with pytest.raises(UserError, match=f"another content of {what};"):
        RunFolder(folder.path).start("lr: 0.1\n", True, origin=Origin(**{**values, **changes}))


def test_content_is_hashed_only_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a short run does not read all images once more."""
    asked = []
    monkeypatch.setattr(
        "utils.records.checkpoint.digest", lambda values: asked.append(values) or "0"
    )
    folder = RunFolder(tmp_path / "x")
    folder.start("lr: 0.1\n", origin=Origin(tensors={"labels": [torch.ones(3)]}))
    assert asked == []
    for _ in range(2):
        folder.write_checkpoint({"loop": {}, "rows": [], "seconds": 1.0})
    assert len(asked) == 1


def test_a_digest_tells_values_types_and_shapes(tiny_data: Dataset) -> None:
    values = torch.arange(10_000)
    same = [digest([values]), digest([values.clone()]), digest(iter([values]))]
    assert len(set(same)) == 1
    others = [values.view(2, -1), values.int(), values.flip(0), values[:-1], values + 1]
    changed = values.clone()
    changed[-1] += 1
    found = {
        *same,
        *(digest([other]) for other in [*others, changed]),
        digest([]),
        digest([values] * 2),
    }
    assert len(found) == 9
    assert len(digest(tiny_data.tensors())) == 64


def test_the_files_of_flags(tmp_path: Path) -> None:
    path = tmp_path / "index.txt"
    path.write_text("abc")
    flags = {"index": str(path), "folder": str(tmp_path), "lr": 0.1, "none": None, "nul": "a\0b"}
    flags |= {"long": "x" * 5000, "odd": "\udcff", "absent": str(tmp_path / "y")}
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc"
    assert files_of(flags) == {"--index": sha256}


GOOD = {"loop": {"round": 1}, "rows": [{"epoch": 1, "loss": 0.5, "seconds": 2.0}], "seconds": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"loop": [1]},
        {"loop": None},
        {"rows": {"a": 1}},
        {"rows": [1]},
        {"rows": [{"loss": "0.5"}]},
        {"rows": [{"loss": torch.ones(1)}]},
        {"rows": [{"loss": None}]},
        {"rows": [{"loss": True}]},
        {"rows": [{"lo ss": 1}]},
        {"rows": [{"x" * 100: 1}]},
        {"rows": [{"loss\x1b": 1}]},
        {"rows": [{3: 1}]},
        {"rows": [{"phase": 3}]},
        {"phase_rows": [{"phase": "x" * 300}]},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": "x"},
        {"training_seconds": -1.0},
        {"flags": [1]},
        {"flags": {3: 1}},
        {"flags": {"lr": {"a": 1}}},
        {"sources": {"a": 3}},
        {"sources": "abc"},
        {"conditions": {"threads": [1]}},
        {"model_sha256": 3},
    ],
)
def test_a_checkpoint_of_other_content_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    CHECKPOINT.validate_python(GOOD | {"phase_rows": [{"phase": "a", "round": 1}]})
    folder = begun(tmp_path / "x", Origin())
    content = load_tensors(folder.path / "checkpoint.pt") | changes
    torch.save(content, folder.path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: is not a checkpoint of this program \("):
        RunFolder(folder.path).start("lr: 0.1\n", resume=True)


def test_the_mark_and_summary_are_no_part_of_this(tmp_path: Path) -> None:
    """What `start` leaves is a folder that can be claimed again."""
    folder = begun(tmp_path / "x", Origin())
    folder.write_summary({"files": {}})
    assert json.loads((folder.path / "summary.json").read_text()) == {"files": {}}
    assert not (folder.path / "checkpoint.pt").exists()


def test_a_checkpoint_that_claims_a_network_is_refused(tmp_path: Path) -> None:
    """The run's flags name none."""
    folder = begun(tmp_path / "x", Origin())
    content = load_tensors(folder.path / "checkpoint.pt") | {"model_sha256": "ab" * 32}
    torch.save(content, folder.path / "checkpoint.pt")
    with pytest.raises(UserError, match="another content of the network;"):
        RunFolder(folder.path).start("lr: 0.1\n", resume=True)
