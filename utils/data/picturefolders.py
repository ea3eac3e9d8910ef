"""Pictures in folders, one per class: which files count, and what the classes are called."""

import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from utils.data.images import IMAGE_SUFFIXES
from utils.errors import UserError


class Content(NamedTuple):
    """What is in a folder of pictures."""

    pictures: list[Path]
    others: list[Path]


def content_of(folder: Path) -> Content:
    """The picture files of a folder by name, and the other things in it.

    Hidden files are in neither list: they are notes of other programs.
    """
    pictures: list[Path] = []
    others: list[Path] = []
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):
            (pictures if file.suffix.lower() in IMAGE_SUFFIXES else others).append(file)
    return Content(pictures, others)


def class_name(folder: Path) -> str:
    """The name of a class by its folder; a letter with an accent becomes one character."""
    return unicodedata.normalize("NFC", folder.name)


def class_folders(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Class -> its folder, by name; and the files beside these folders, without hidden files.

    Raises:
        UserError: if there is no folder, or two have the same name.
    """
    if not folder.is_dir():
        raise UserError(
            f"--dataset_path: {folder} is not a folder; put one folder per class into it"
        )
    folders: dict[str, Path] = {}
    visible = [inside for inside in sorted(folder.iterdir()) if not inside.name.startswith(".")]
    for inside in visible:
        if inside.is_dir():
            other = folders.setdefault(class_name(inside), inside)
            if other != inside:
                raise UserError(
                    f"--dataset_path: {other} and {inside} have the same name, spelled in two "
                    "ways; move the images of one into the other"
                )
    if not folders:
        raise UserError(
            f"--dataset_path: {folder} has no class folders; put one folder per class into it"
        )
    return dict(sorted(folders.items(), key=_by_name(folders))), [
        inside for inside in visible if not inside.is_dir()
    ]


def _by_name(names: Iterable[str]) -> Callable[[tuple[str, Path]], tuple[int, str]]:
    """Orders classes by their names; as numbers, if all of them are."""
    are_numbers = all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
    return lambda item: (int(item[0]) if are_numbers else 0, item[0])


def skipped_warning(flag: str, path: Path, skipped: list[Path]) -> str:
    """The warning about what is in a flag's folder of images, but in no place for one."""
    return (
        f"--{flag}: {len(skipped)} files or folders are skipped, such as "
        f"{skipped[0].relative_to(path)}; pictures are in the folder of a class and have one "
        f"of the endings {' '.join(sorted(IMAGE_SUFFIXES))}"
    )
