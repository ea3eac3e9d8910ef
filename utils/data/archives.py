"""Archives of datasets: found or downloaded, checked against their checksum, extracted whole."""

import hashlib
import os
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from utils.errors import UserError, one_line
from utils.files import remove_strays, replaced, temporary_folder, writable
from utils.process import distributed
from utils.process.progress import Progress
from utils.process.script import logger

_MIB = 1 << 20

_may_write = True


@dataclass(frozen=True)
class Archive:
    """A published archive.

    Attributes:
        url: where it is downloaded from; ends with its file name.
        md5: checksum as published, hexadecimal.
        content: the file or folder inside that is wanted.
    """

    url: str
    md5: str
    content: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@contextmanager
def nothing_written() -> Iterator[None]:
    """Inside, `extract_all` refuses missing files, and makes, removes and loads nothing.

    For folders that a record names: a stranger who made the record may have named any folder.
    """
    global _may_write
    before, _may_write = _may_write, False
    try:
        yield
    finally:
        _may_write = before


def check_place(folder: Path) -> None:
    """Refuses a folder for downloads if the one around it is not there either: a typing error.

    Inside of `nothing_written` any folder will do, because none is made.
    """
    if _may_write and not folder.is_dir() and not folder.parent.is_dir():
        raise UserError(
            f"--dataset_path: {folder} is no folder, and {folder.parent} is none either; give the "
            "folder that has the dataset, or a new one in a folder that is there"
        )


def extract_all(dataset: str, folder: Path, archives: Sequence[Archive]) -> None:
    """Puts the content of each archive into a folder; what is there already stays.

    An archive that is in the folder is used; a missing one is downloaded into it. If there are
    several processes, the first one does this, and the others wait.

    Raises:
        UserError: if an archive is damaged, cannot be downloaded, or the folder not be written; if
            something is missing inside of `nothing_written`.
    """
    with distributed.main_alone() as is_mine:
        if is_mine:
            _extract_missing(dataset, folder, archives)


def _extract_missing(dataset: str, folder: Path, archives: Sequence[Archive]) -> None:
    missing = [archive for archive in archives if not (folder / archive.content).exists()]
    if missing and not _may_write:
        raise UserError(
            f"--dataset {dataset}: the record names {folder}, which has no {missing[0].content}; "
            "nothing is written there because a record says so; give the folder with --dataset_path"
        )
    for archive in missing:
        with writable(folder, "make space or make it writable"):
            folder.mkdir(parents=True, exist_ok=True)
        file = folder / archive.name
        for name in (file.stem, file.name):  # of a download, of an extraction
            remove_strays(folder, name)
        if not file.exists():
            try:
                _download(archive, file)
            except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
                reason = one_line(error)
                wanted = [each.name for each in missing if not (folder / each.name).exists()]
                raise UserError(
                    f"--dataset {dataset}: not found and the download failed ({reason}); put "
                    f"{', '.join(wanted)} into {folder}, or name the folder that has the data with "
                    "--dataset_path"
                ) from None
        elif _md5(file) != archive.md5:
            raise UserError(
                f"{file}: is damaged or incomplete (its md5 is not {archive.md5}); remove it and "
                "run again to download it, or put a whole one there"
            )
        with writable(folder, "make space or make it writable"):
            _extract(file, folder, archive.content)


def _download(archive: Archive, file: Path) -> None:
    """Downloads a file; it gets its name only when it is whole.

    Raises:
        OSError: if the connection fails or the file cannot be written.
        ValueError: if the checksum differs.
    """
    logger.info("downloading %s to %s", archive.url, file)
    digest = hashlib.md5(usedforsecurity=False)
    with replaced(file) as partial:
        with (
            urllib.request.urlopen(archive.url, timeout=60) as response,
            partial.open("wb") as out,
            Progress(
                int(response.headers.get("Content-Length") or 0) // _MIB, archive.name, "MiB"
            ) as progress,
        ):
            while chunk := response.read(_MIB):
                out.write(chunk)
                digest.update(chunk)
                progress.advance()
        if digest.hexdigest() != archive.md5:
            raise ValueError(f"what came is damaged or incomplete: its md5 is not {archive.md5}")


def _extract(file: Path, folder: Path, content: str) -> None:
    """Extracts beside the place, then moves, so that the files in the place are always whole."""
    logger.info("extracting %s", file)
    with temporary_folder(folder, file.name) as partial:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                with Progress(len(members), "extracting", "file") as progress:
                    for member in members:
                        archive.extract(member, partial)  # never leaves the folder
                        progress.advance()
        else:
            with tarfile.open(file) as archive_tar:
                archive_tar.extraction_filter = getattr(tarfile, "data_filter", None)
                with Progress(len(archive_tar.getmembers()), "extracting", "file") as progress:
                    for entry in archive_tar.getmembers():
                        archive_tar.extract(entry, partial)
                        progress.advance()
        (folder / content).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / content, folder / content)


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with (
        _readable(file),
        file.open("rb") as content,
        Progress(file.stat().st_size // _MIB, f"checking {file.name}", "MiB") as progress,
    ):
        while chunk := content.read(_MIB):
            digest.update(chunk)
            progress.advance()
    return digest.hexdigest()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); make it readable") from None
