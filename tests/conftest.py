"""Tiny real things that several test modules share."""

import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
import utils.data.images
from models import Classifier
from models.tiny import TinyNet
from tests.scripts import own_signals, trained
from utils import plot
from utils.data.labelled import Dataset, Labelled

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: threads of their own, and of the scripts that they run, would only wait.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A script's set-up of the program's logger ends with the test that ran it."""
    logger = logging.getLogger("sau")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """What a script makes of signals ends with the test that ran it."""
    with own_signals():
        yield


class Picture:
    """In the place of a figure."""

    def savefig(self, path: Path, **_: object) -> None:
        path.write_bytes(b"a picture")


def make_small(patch: pytest.MonkeyPatch) -> None:
    """The scripts' usual network and pictures become ones that take no time."""
    patch.setitem(models.CONSTRUCTORS, "preactresnet18", TinyNet)
    for name in ("curves", "image_grid"):
        patch.setattr(plot, name, lambda *_: Picture())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_small` for a test's time."""
    make_small(monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: a long one at the end would keep one process of many busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Halves of characters, which some tests log, would end the processes of pytest-xdist."""

    def whole(text: object) -> str:
        return str(text).encode("utf-8", "backslashreplace").decode("utf-8")

    report = yield
    report.sections = [(name, whole(text)) for name, text in report.sections]
    if report.failed and whole(report.longrepr) != str(report.longrepr):
        report.longrepr = whole(report.longrepr)
    return report


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three classes (a bright, a dark and a striped one) and no records."""
    root = tmp_path_factory.mktemp("workplace")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("bright", "dark", "striped")):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (16, 16, 3)) + (150, 0, 0)[label]
                if label == 2:
                    pixels[::2] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def cache(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images of the scripts are kept there, not in the checkout."""
    monkeypatch.setattr(utils.data.images, "ROOT", workplace)


@pytest.fixture(scope="module")
def badnet(workplace: Path) -> Path:
    """The record of one BadNets run with the tiny network, for tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return trained(workplace, "shared", patch)


LINKS = {"zero": "/dev/zero", "nowhere": "/nowhere/x"}
NO_FILES = ("pipe", *LINKS, "itself", "above", "sparse", "folder")


def put_no_file(path: Path, kind: str) -> None:
    """Something that is no regular file of sane size, one of `NO_FILES`, at a free path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(200 * 10**9)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({**LINKS, "itself": path, "above": path.parent}[kind])


@pytest.fixture
def tiny_data() -> Dataset:
    """Random 8x8 images of three classes: 12 for training, 9 for testing, labels 0 1 2 0 1 2 ..."""
    source = torch.Generator().manual_seed(0)
    splits = [
        Labelled(
            torch.randint(0, 200, (count, 3, 8, 8), dtype=torch.uint8, generator=source),
            torch.arange(count) % 3,
        )
        for count in (12, 9)
    ]
    return Dataset(
        "tiny", splits[0], splits[1], ("ant", "bee", "cat"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    )


@pytest.fixture
def tiny_model() -> Classifier:
    """A small network for `tiny_data`."""
    torch.manual_seed(0)
    return models.build_model("tiny", 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
