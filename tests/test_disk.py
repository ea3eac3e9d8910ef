"""A disk that refuses, at every file that a run writes: one line, exit code 2, nothing lost."""

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perf import stress
from tests.conftest import make_small
from tests.scripts import attack_flags, defense_flags, one_error, run_script
from utils.data import images
from utils.errors import UserError
from utils.files import ROOT
from utils.process.script import file_log, logger
from utils.records import folders
from utils.training.watch import Watch

pytestmark = pytest.mark.usefixtures("small", "cache")

REFUSED = itertools.cycle(
    OSError(number, os.strerror(number))
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
)
NOBODY = 65534
OFTEN = ("--checkpoint_every", "0")


def contents(root: Path) -> dict[str, str]:
    """sha256 by path; locks go when the process ends."""
    found = stress.contents(root)
    return {path: digest for path, digest in found.items() if not path.endswith(".lock")}


@contextlib.contextmanager
def refusing(module: object, name: str, error: OSError, opening: bool) -> Iterator[list[str]]:
    """Files of a name cannot be opened, or not be filled; gives the names of all that are asked."""
    asked: list[str] = []
    replaced = module.replaced  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def refuse(path: Path) -> Iterator[Path]:
        asked.append(path.name)
        if path.name == name and opening:
            raise error
        with replaced(path) as partial:
            yield partial
            if path.name == name:
                raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "replaced", refuse)
        yield asked


def try_every_file(
    script: str, flags: list[object], root: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> set[str]:
    """Lets a run fail at each of its files in turn; gives their names."""
    with refusing(folders, "", OSError(), False) as asked:
        assert run_script(ROOT / script, *flags, *OFTEN) == 0
    shutil.rmtree(folder)
    before = contents(root)
    capsys.readouterr()
    for number, name in enumerate(dict.fromkeys(asked)):
        error = next(REFUSED)
        with refusing(folders, name, error, number % 2 == 0):
            assert run_script(ROOT / script, *flags, *OFTEN, "--overwrite") == 2
        assert one_error(capsys) == (
            f"error: {folder / name}: could not be written ({error.strerror}); make space or make "
            "it writable"
        )
        assert not (folder / "summary.json").exists()
        assert list(root.rglob("*.tmp*")) == []
        after = contents(root)
        assert {path: after[path] for path in before} == before
    # With the disk in order again.
    assert run_script(ROOT / script, *flags, *OFTEN, "--overwrite") == 0
    assert [path.name for path in folder.glob(".*")] == []
    return set(asked)


def test_an_attack_is_refused_any_of_its_files(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workplace / "record"
    assert run_script(ROOT / "attack/badnet.py", *attack_flags(workplace, "neighbour")) == 0
    flags = attack_flags(workplace, "refused", epochs=1, batch_size=36)
    names = try_every_file("attack/badnet.py", flags, root, capsys, root / "refused")
    assert names == {
        *("config.yaml", "checkpoint.pt", "metrics.csv", "attack_result.pt", "poison.pt"),
        *("curves.png", "trigger.png", "summary.json"),
    }


def test_a_defense_is_refused_any_of_its_files(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack's record and the result of another defense stay as they are."""
    root = workplace / "record"
    assert run_script(ROOT / "attack/badnet.py", *attack_flags(workplace, "defended")) == 0
    flags = defense_flags(workplace, "defended", batch_size=18)
    assert run_script(ROOT / "defense/ft.py", *flags) == 0
    names = try_every_file("defense/sau.py", flags, root, capsys, root / "defended/defense/sau")
    assert names == {
        *("config.yaml", "clean_index.txt", "checkpoint.pt", "metrics.csv", "defense_result.pt"),
        *("curves.png", "before_after.png", "perturbations.png", "summary.json"),
    }


@pytest.mark.parametrize("opening", [True, False])
def test_decoded_images_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], opening: bool
) -> None:
    """Before anything is trained; and half a cache file is not taken for a whole one."""
    folder = workplace / "data/cache"
    shutil.rmtree(folder, ignore_errors=True)
    images_flags = attack_flags(workplace, f"decoded_{opening}", image_size=12)
    known = set(folder.glob("*"))
    with refusing(images, "", OSError(), opening) as asked:
        assert run_script(ROOT / "attack/badnet.py", *images_flags) == 0
    (name,) = asked
    (folder / name).unlink()
    error = next(REFUSED)
    with refusing(images, name, error, opening):
        flags = (*images_flags, "--overwrite")
        assert run_script(ROOT / "attack/badnet.py", *flags) == 2
    assert one_error(capsys).startswith(f"error: {folder / name}: could not be written (")
    assert set(folder.glob("*")) | set(folder.glob(".*")) == known
    assert (workplace / f"record/decoded_{opening}/summary.json").exists()  # of the run before


def test_what_an_attack_prepares_is_refused_before_the_work(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LC's surrogate may take hours; that its cache cannot be written is told before."""
    flags = attack_flags(workplace, "prepared", surrogate_epochs=1, adv_steps=1)

    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def work(*_: object) -> None:
        raise AssertionError("work began")

    with monkeypatch.context() as patch:
        patch.setattr("attack.setting.prepare_folder", refuse)
        patch.setattr("attack.recipe.train_classifier", work)
        assert run_script(ROOT / "attack/lc.py", *flags) == 2
    error = one_error(capsys)
    assert f"{workplace / 'data/cache'}: could not be written (Read-only file system)" in error
    assert "SAU_DATA" in error
    assert not (workplace / "record/prepared").exists()


def test_a_folder_that_is_removed_in_mid_run_is_told(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends, and does not make the folder anew with half of its files."""
    flags = attack_flags(workplace, "kept", epochs=1)
    assert run_script(ROOT / "attack/badnet.py", *flags) == 0
    after_round = Watch._after_round

    def remove(watch: Watch, *rest: Any) -> None:
        assert watch._folder is not None
        shutil.rmtree(watch._folder.path)
        after_round(watch, *rest)

    monkeypatch.setattr(Watch, "_after_round", remove)
    for script, flags, folder in (
        ("attack/badnet.py", attack_flags(workplace, "gone", epochs=1), "gone"),
        ("defense/sau.py", defense_flags(workplace, "kept"), "kept/defense/sau"),
    ):
        capsys.readouterr()
        assert run_script(ROOT / script, *flags) == 2
        path = workplace / "record" / folder
        assert one_error(capsys).startswith(
            f"error: {path / 'metrics.csv'}: could not be written (No such file or directory)"
        )
        assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_log_on_a_full_disk_ends_the_run_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Python's own handler prints a traceback for each line, and goes on."""

    def log_to(path: str, later: bool) -> None:
        with file_log() as open_log:
            later or logger.warning("a line")
            open_log(Path(path))
            logger.warning("a line")

    for path, later, reason in (
        ("/dev/full", False, "No space left on device"),
        ("/dev/full", True, "No space left on device"),
        ("/nowhere/log.txt", True, "No such file or directory"),
    ):
        with pytest.raises(UserError) as caught:
            log_to(path, later)
        assert str(caught.value).startswith(f"{path}: could not be written ({reason})")
    assert capsys.readouterr().err == ""


# --- as another user ----------------------------------------------------------------------------


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As root, another user inside: root may do everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def place(workplace: Path) -> Iterator[Path]:
    """Images, a record and files that other users can reach, unlike pytest's own folders."""
    root = Path(tempfile.gettempdir()) / f"sau-test-{os.getpid()}"
    root.mkdir(mode=0o755)
    shutil.copytree(workplace / "images", root / "images")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(images, "ROOT", root)
        flags = attack_flags(root, "x", epochs=1)
        assert run_script(ROOT / "attack/badnet.py", *flags) == 0
        assert run_script(ROOT / "defense/ft.py", *defense_flags(root, "x")) == 0
    for name, text in (("index.txt", "1\n2\n"), ("x.yaml", "ratio: 0.5\n")):
        (root / name).write_text(text)
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, -1)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("path", "mode", "flags", "message"),
    [
        ("record", 0o555, ("attack",), "record/new: cannot be written (Permission denied)"),
        ("record", 0o000, ("attack",), "record/new: cannot be written (Permission denied)"),
        ("data/cache", 0o555, ("attack", "--image_size", 20), "could not be written (Permission"),
        ("images/train/dark", 0o000, ("attack",), "images/train/dark: Permission denied"),
        ("images/train/dark/3.png", 0o000, ("attack",), "3.png: cannot be read (Permission den"),
        ("x.yaml", 0o000, ("attack", "--yaml_path", "x.yaml"), "x.yaml: cannot be read (Perm"),
        ("record/x/defense", 0o555, ("defense",), "sau: cannot be written (Permission denied)"),
        ("record/x", 0o000, ("defense",), "Permission denied"),
        (
            "record/x/attack_result.pt",
            0o000,
            ("defense",),
            "(Permission denied), so it is no finished run",
        ),
        ("index.txt", 0o000, ("defense", "--index", "index.txt"), "index.txt cannot be read (Per"),
    ],
)
def test_what_a_user_may_not_do_is_told(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: str,
    mode: int,
    flags: tuple[object, ...],
    message: str,
) -> None:
    """Refused by the system itself, not by a stand-in."""
    monkeypatch.setattr(images, "ROOT", place)
    kind, *extra = (place / flag if (place / str(flag)).exists() else flag for flag in flags)
    changes = {
        str(flag).removeprefix("--"): value
        for flag, value in zip(extra[::2], extra[1::2], strict=True)
    }
    script, run = (
        ("attack/badnet.py", attack_flags(place, "new", **changes))
        if kind == "attack"
        else ("defense/sau.py", defense_flags(place, "x", **changes))
    )
    before = contents(place)
    (place / path).chmod(mode)
    try:
        with unprivileged():
            assert run_script(ROOT / script, *run) == 2
    finally:
        (place / path).chmod(0o755)
    assert message in one_error(capsys)
    assert contents(place) == before
