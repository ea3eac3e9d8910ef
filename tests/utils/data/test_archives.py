"""Archives: downloaded whole or not at all, checked, extracted whole or not at all."""

import hashlib
import io
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

from utils.data.archives import Archive, extract_all
from utils.errors import UserError

FILES = {"signs/train/1.txt": b"one", "signs/2.txt": b"two", "readme.txt": b"not wanted"}


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return content.getvalue()


def described(content: bytes, name: str = "signs.zip") -> Archive:
    return Archive(f"http://nowhere.invalid/{name}", hashlib.md5(content).hexdigest(), "signs")


class Response(io.BytesIO):
    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Length": "100"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the network sends, one answer a request; none is no network."""
    answers: list[bytes] = []

    def urlopen(url: str, timeout: float) -> Response:
        if not answers:
            raise OSError("no route to host")
        return Response(answers.pop(0))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return answers


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", [zipped, tarred])
def test_an_archive_is_downloaded_and_its_content_extracted(
    tmp_path: Path, served: list[bytes], kind: type
) -> None:
    name = "signs.zip" if kind is zipped else "signs.tar.gz"
    content = kind()
    served.append(content)
    extract_all("signs", tmp_path / "data", [described(content, name)])
    assert listing(tmp_path / "data") == [name, "signs/2.txt", "signs/train/1.txt"]
    assert (tmp_path / "data/signs/train/1.txt").read_bytes() == b"one"
    extract_all("signs", tmp_path / "data", [described(content, name)])  # no second request


def test_an_archive_in_the_folder_is_used(tmp_path: Path, served: list[bytes]) -> None:
    (tmp_path / "signs.zip").write_bytes(zipped())
    extract_all("signs", tmp_path, [described(zipped())])
    assert (tmp_path / "signs/2.txt").exists()


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_damaged_archive_in_the_folder_is_named_and_kept(
    tmp_path: Path, served: list[bytes], kept: int
) -> None:
    """It is the user's file: it is neither removed nor extracted, and nothing is downloaded."""
    (tmp_path / "signs.zip").write_bytes(zipped()[:kept])
    with pytest.raises(UserError) as caught:
        extract_all("signs", tmp_path, [described(zipped())])
    assert f"{tmp_path / 'signs.zip'}: is damaged or incomplete" in str(caught.value)
    assert listing(tmp_path) == ["signs.zip"]


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, served: list[bytes]) -> None:
    served.append(zipped()[:20])
    with pytest.raises(UserError, match=r"download failed \(what came is damaged or incomplete"):
        extract_all("signs", tmp_path, [described(zipped())])
    assert listing(tmp_path) == []


def test_without_a_network_all_missing_archives_and_the_folder_are_named(
    tmp_path: Path, served: list[bytes]
) -> None:
    (tmp_path / "there.zip").write_bytes(zipped())
    archives = [
        Archive("http://nowhere.invalid/there.zip", hashlib.md5(zipped()).hexdigest(), "signs"),
        Archive("http://nowhere.invalid/first.zip", "0", "first"),
        Archive("http://nowhere.invalid/second.zip", "0", "second"),
    ]
    with pytest.raises(UserError) as caught:
        extract_all("signs", tmp_path, archives)
    text = str(caught.value)
    assert "no route to host" in text
    assert f"put first.zip, second.zip into {tmp_path}" in text
    assert "there.zip" not in text
    assert len(text.splitlines()) == 1


def test_an_extraction_that_fails_leaves_nothing_half_done(
    tmp_path: Path, served: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second file."""
    (tmp_path / "signs.zip").write_bytes(zipped())
    real = zipfile.ZipFile.extract

    def extract(self: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> str:
        if member.filename == "signs/2.txt":
            raise OSError(28, "No space left on device")
        return real(self, member, path)

    monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        extract_all("signs", tmp_path, [described(zipped())])
    assert listing(tmp_path) == ["signs.zip"]
    assert not (tmp_path / "signs").exists()


def test_an_archive_never_writes_outside(tmp_path: Path, served: list[bytes]) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("signs/1.txt", "one")
        archive.writestr("../../outside.txt", "two")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "signs.zip").write_bytes(content.getvalue())
    extract_all("signs", folder, [described(content.getvalue())])
    assert "a/b/signs/1.txt" in listing(tmp_path)
    assert not any("outside" in name for name in listing(tmp_path))
