"""`benchmark/recompress.py`: photographs that are compressed once more."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark import recompress
from utils.errors import UserError

SMOOTH = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with two pictures of noise each, in both parts."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(recompress.compressed(pixels, 75)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_a_copy_has_the_same_folders_and_the_printed_error(photos: Path, tmp_path: Path) -> None:
    mean = recompress.copy(photos, tmp_path / "copy", quality=50, images=1)
    paths = sorted(path.relative_to(tmp_path / "copy") for path in tmp_path.glob("copy/*/*/*"))
    assert [str(path) for path in paths] == [
        f"{part}/{name}/00000.png" for part in ("test", "train") for name in ("cat", "dog")
    ]
    errors = [
        recompress.error(
            np.asarray(Image.open(photos / path.with_stem("0"))),
            np.asarray(Image.open(tmp_path / "copy" / path)),
        )
        for path in paths
    ]
    assert mean == pytest.approx(np.mean(errors))


def test_the_blocks_of_the_second_compression_lie_elsewhere() -> None:
    """With the same blocks, a picture that was JPEG before would hardly change."""
    once = recompress.compressed(
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), 75
    )
    same_blocks = recompress.error(once, recompress.compressed(once, 75))
    assert recompress.error(once, recompress.compressed_again(once, 75)) > 2 * same_blocks


def test_a_picture_stays_where_it_was() -> None:
    assert recompress.error(SMOOTH, recompress.compressed_again(SMOOTH, 95)) < 60
    assert recompress.compressed_again(SMOOTH, 95).shape == (32, 32, 3)


def test_a_lower_quality_is_farther_from_the_photographs() -> None:
    first, both, second = recompress.errors_of_patches(75)
    assert second < first < both < first + second
    assert recompress.errors_of_patches(30)[1] > both
    assert recompress.errors_of_patches(30)[0] == first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["photos", "copy", "--quality", "0"], "--quality: 0 is not allowed; give 1 to 95"),
        (["photos", "copy", "--images", "0"], "--images: 0 is not allowed; give 1 or more"),
        (["nothing", "copy"], "^source: nothing/train is not a folder"),
        (["photos", "photos"], "photos: exists already; give a new folder"),
        (["photos", "photos/train/cat/copy"], "copy: is in photos, which it would change"),
        (["photos", "a_file/copy"], "to: a_file cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said(
    photos: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("a_file").touch()
    monkeypatch.setattr("sys.argv", ["recompress.py", *flags])
    with pytest.raises(UserError, match=message):
        recompress.main()


def test_the_distance_to_lossless_files_is_scaled(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of 41.5 where patches have 29.6 after a first one of 58.7: 82 to lossless files."""
    monkeypatch.setattr(recompress, "errors_of_patches", lambda quality: (58.7, 80.4, 29.6))
    monkeypatch.setattr(recompress, "copy", lambda *arguments: 41.5)
    monkeypatch.setattr("sys.argv", ["recompress.py", str(photos), str(tmp_path / "copy")])
    with caplog.at_level(logging.INFO, logger="sau"):
        recompress.main()
    assert "given files to lossless: 82, copy to lossless: 113" in caplog.text


def test_what_an_interrupted_copy_left_is_no_copy(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(pixels: recompress.Pixels, quality: int) -> recompress.Pixels:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recompress, "compressed_again", fails)
        with pytest.raises(KeyboardInterrupt):
            recompress.copy(photos, tmp_path / "copy", 50, 2)
    assert not (tmp_path / "copy").exists()
    recompress.copy(photos, tmp_path / "copy", 50, 2)
    assert len(list(tmp_path.glob("copy/*/*/*.png"))) == 8
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["copy", "photos"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), OSError("full")])
def test_a_disk_that_is_full_is_told_with_the_copy(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    """The system's error names no file, and that of some formats not even a reason of its own."""
    save = Image.Image.save

    def fails(image: Image.Image, to: object, *more: str, **options: int) -> None:
        if isinstance(to, Path):
            raise failure
        save(image, to, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(UserError) as refused:
        recompress.copy(photos, tmp_path / "copy", 50, 2)
    reason = failure.strerror or "full"
    assert str(refused.value).startswith(f"{tmp_path / 'copy'}: could not be written ({reason});")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_every_picture_is_copied_whatever_its_name(photos: Path, tmp_path: Path) -> None:
    (photos / "train" / "cat" / "0.png").rename(photos / "train" / "cat" / "1.bmp.png")
    Image.new("L", (5, 3)).save(photos / "train" / "cat" / "1.jpg")
    (photos / "train" / "cat" / "readme.txt").write_text("no picture")
    recompress.copy(photos, tmp_path / "copy", 50, 9)
    assert len(list(tmp_path.glob("copy/train/cat/*.png"))) == 3
