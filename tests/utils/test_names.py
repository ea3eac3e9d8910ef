"""Names that mean harm: of classes, attacks, weights, folders, flags. They are shown as texts."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmark import gallery
from benchmark.reporting import tables
from benchmark.reporting.sources import read_metrics
from benchmark.reporting.stored import file_stem
from benchmark.reporting.summaries import read_runs
from tests.benchmark.test_report import attack, defense, report
from tests.models.test_userfile import net
from tests.scripts import attack_flags, defense_flags, run_script
from utils import plot
from utils.errors import UserError, quoted, shown
from utils.files import ROOT
from utils.process import distributed, script
from utils.process.progress import Progress
from utils.process.script import file_log, logger

pytestmark = pytest.mark.usefixtures("cache")

NAMES = [
    r"$\frac$",
    "$",
    "a\nerror: forged\r\n",
    "\x1b[31mred\x1b]0;title\x07",
    "nul\0",
    "\udcff\ud800",
    "W" * 5000,
    "猫😀" * 50,
    "\u202egnp.exe\u2066",
    "_nolegend_",
    "%s {} \\",
    "\u2028line\x85break\x0b",
    "<b>|`*[x]($&#~^{}",
    "=1+1",
]
ids = [ascii(name)[:20] for name in NAMES]


def is_one_line(text: str) -> bool:
    return text.isprintable() and len(text) < 2500


# --- the terminal and the log -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_name_is_part_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def main() -> None:
        with file_log() as open_file:
            open_file(tmp_path / "log.txt")
            logger.info("class %s", name)
            logger.warning("warning: class %s", name)
        raise UserError(f"--x: {name} is wrong", f"--y: {name} is wrong")

    logger.handlers[:] = []
    with pytest.raises(SystemExit) as caught:
        script.run_script(main)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.removesuffix("\n").split("\n")
    starts = ["class ", "warning: class ", "error: --x: ", "error: --y: "]
    assert [line.startswith(s) for line, s in zip(lines, starts, strict=True)] == [True] * 4
    written = (tmp_path / "log.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for line, said in zip(written, lines[:2], strict=True):
        text = re.split(r" (INFO|WARNING) ", line)[2]
        assert text == said or (len(said) > 1990 and text[:900] == said[:900])
    assert all(is_one_line(line) for line in (*lines, *written))


def test_a_short_printable_text_is_shown_as_it_is() -> None:
    text = "traffic sign 猫 ± 50 %, $x$ é😀"
    assert shown(text) == text
    assert quoted(text) == text
    assert quoted([1, "a"]) == "[1, 'a']"


def test_values_are_quoted_however_large_they_are() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (10**5000, deep, "x" * 10**6, ["x" * 10**6], {"\n": "\x1b"}):
        text = quoted(value)
        assert text.isprintable()
        assert len(text) <= 120


def test_a_stream_that_lacks_a_letter_writes_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with LANG=C, and a terminal that is no UTF-8."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def main() -> None:
        print("猫")
        logger.info("猫")

    logger.handlers[:] = []
    script.run_script(main)
    for stream in streams:
        stream.flush()
        assert stream.buffer.getvalue() == b"\\u732b\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_bar_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, name) as progress:
        progress.advance()
        progress.show(name)
    text = terminal.getvalue()
    assert "\x1b[31m" not in text
    assert "\n" not in text.replace("\x1b[A", "").rstrip("\n")
    assert "forged\r" not in text


def test_problems_of_the_first_process_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the others, which are told of them."""
    told: list[UserError] = []
    monkeypatch.setattr(distributed, "from_main", told.append)
    with pytest.raises(UserError), distributed.main_alone():
        raise UserError("a\nb", "c")
    (error,) = told
    assert error.problems == ("a\nb", "c")
    monkeypatch.setattr(distributed, "from_main", lambda _: told[0])
    with pytest.raises(UserError) as caught, distributed.main_alone():
        pass
    assert caught.value.problems == ("a\nb", "c")


def test_flags_of_the_benchmark_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "report", "gallery"):
        logger.handlers[:] = []
        assert run_script(ROOT / f"benchmark/{name}.py", "x.yaml", "--a\x1b[31m\nerror: b") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert is_one_line(line)


@pytest.mark.parametrize("text", ["3", "[a, b]", "{a: b}", "true", '"a\\0b"', "1" + "0" * 400])
def test_a_record_that_a_yaml_names_is_a_text(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """It is looked for before all values are checked."""
    (tmp_path / "x.yaml").write_text(f"result_file: {text}\n")
    logger.handlers[:] = []
    flags = ["--record_path", workplace / "record", "--yaml_path", tmp_path / "x.yaml"]
    assert run_script(ROOT / "defense/sau.py", *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "result_file: " in lines[0]
    assert " is not allowed; give text or null" in lines[0]
    assert all(line.startswith("error: ") and is_one_line(line) for line in lines)


def test_a_flag_that_argparse_itself_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger.handlers[:] = []
    assert run_script(ROOT / "attack/badnet.py", "--help=\x1b[31m") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert is_one_line(line)


PATHS = ["x" * 300, "x" * 5000, "\udcff", "a\x1b[31m\nb", "/dev/null/x", "a\0b", "", "/dev/zero"]


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
@pytest.mark.parametrize(
    ("script", "flag"),
    [
        *(("attack/badnet.py", flag) for flag in ("save_folder_name", "dataset_path", "model")),
        *(("attack/badnet.py", flag) for flag in ("dataset", "device", "yaml_path")),
        *(("defense/sau.py", flag) for flag in ("result_file", "bd_yaml_path", "dataset")),
        ("interop/state_dict.py", "state_dict"),
    ],
)
def test_no_value_of_a_flag_ends_in_a_traceback(
    workplace: Path, capsys: pytest.CaptureFixture[str], script: str, flag: str, path: str
) -> None:
    flags = attack_flags(workplace, "flags") if script != "interop/state_dict.py" else []
    if script == "interop/state_dict.py":
        flags = [*attack_flags(workplace, "flags")[:10], "--image_size", 16, "--model", "resnet18"]
    elif script == "defense/sau.py":
        flags = ["--record_path", workplace / "record"]
    logger.handlers[:] = []
    assert run_script(ROOT / script, *flags, f"--{flag}", path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert all(is_one_line(line) for line in lines)


@pytest.mark.parametrize("path", ["x" * 300, "/dev/null/x", "loop/x"])
def test_reports_from_and_into_paths_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    attack(tmp_path / "record", "a-0", 0.9, 0.9)
    for flags in (
        ("--under", tmp_path / path, "--to", tmp_path / "to"),
        ("--under", tmp_path / "record", "--to", tmp_path / path),
    ):
        assert report(*flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_the_state_of_a_grid_is_a_line_a_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the folder, in which a failed one's log is, has a line break in its name."""
    grid, root = tmp_path / "grid.yaml", tmp_path / "a\x1b[31m\nb"
    grid.write_text("{datasets: [digits], models: [resnet18], attacks: [badnet], seeds: [0]}")
    (root / ".grid/logs").mkdir(parents=True)
    (root / ".grid/logs/digits-resnet18-badnet-s0.failed").touch()
    assert run_script(ROOT / "benchmark/run.py", grid, "--record_path", root, "--status") == 0
    cell, total = capsys.readouterr().out.splitlines()
    assert cell.startswith("failed ")
    assert total == "1 cell: 1 failed"
    assert is_one_line(cell)


# --- figures ------------------------------------------------------------------------------------


def figures(name: str) -> Iterator[Figure]:
    """Every figure, with a name wherever it takes a text."""
    images, other = torch.rand(2, 3, 8, 8), f"{name}2"
    rows = {name: images, f"difference of {name}\nx 3": images}
    metrics = pd.DataFrame({"round": [0, 1], "acc": [0.1, 0.2], f"loss_{name}": [1.0, 2.0]})
    rounds = metrics.to_dict("records")
    points = pd.DataFrame(
        {
            "defense": [name, name, "ft"],
            "attack": [name, other, name],
            **dict.fromkeys(("asr_before", "acc_before", "asr", "acc"), 0.5),
            "seconds": [1.0, 300.0, 5.0],
            "der": [0.5, 0.9, 0.7],
        }
    )
    bars = pd.DataFrame({"acc": [0.1, 0.2]}, index=[name, other])
    yield plot.curves(rounds, "round", name)
    yield plot.image_grid(rows, {name: [f"{name} | {name}"] * 2}, name)
    yield plot.bars({name: 1.0, other: 2.0}, name, name)
    yield plot.before_after(points, {name: 1, "ft": 2}, name)
    yield plot.curves_with_bands({name: metrics, other: metrics}, name)
    yield plot.variants(bars, bars, name, name)
    yield plot.cost(points, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "x" * 200_000, "\n" * 200_000, ""])
def test_a_figure_takes_any_name_and_says_nothing(
    capfd: pytest.CaptureFixture[str], name: str
) -> None:
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures(name):
            figure.savefig(io.BytesIO(), dpi=30, format="png")
    assert capfd.readouterr().err == ""
    assert time.monotonic() - started < 60


def test_a_figure_shows_a_name_as_it_is() -> None:
    """Also between dollars, and where matplotlib skips names in a legend that begin with _."""
    for name in (r"$\alpha$ \$ 5$", "_x"):
        figure = plot.cost(
            pd.DataFrame({"defense": [name], "attack": ["a"], "seconds": [1.0], "der": [0.5]}), name
        )
        (legend,) = figure.legends
        (text,) = legend.get_texts()
        assert text.get_text().strip().replace(r"\$", "$") == name
        assert text._preprocess_math(text.get_text()) == (
            text.get_text().replace(r"\$", "$"),
            False,
        )  # type: ignore[attr-defined]


# --- tables and pages ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_report_takes_any_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In each text of a summary, in a configuration, and as a folder where it can be."""
    name = name[:90]
    texts = {"attack": name, "dataset": name, "model": name, "warnings": [name], "commit": name}
    texts |= {"device_name": name, "versions": {name: name}}
    record = attack(tmp_path / "record", "a-0", 0.9, 0.9, **texts)
    result = defense(record, "sau", 0.9, 0.1, 0.8, **texts)
    (result / "metrics.csv").write_text("round,acc,loss_a\n0,0.5,1\n1,0.6,2\n")
    (record / "config.yaml").write_text(f"name: {json.dumps(name)}\n")
    folder = (
        os.fsencode(name[:60].replace("\0", "").replace("/", ""))
        if "\ud800" not in name
        else b"\xff"
    )
    os.rename(result, os.path.join(os.fsencode(result.parent), folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flags = ("--under", tmp_path / "record", "--to", tmp_path / "to", "--keep")
        assert report(*flags, "--formats", "md,tex,csv,png,svg,html") == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(is_one_line(line) for line in lines)
    assert not [line for line in lines if line.startswith(("error", "warning"))]
    written = [path for path in (tmp_path / "to").rglob("*") if path.suffix in (".png", ".svg")]
    assert len(written) >= 6
    for path in written:
        assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,160}", path.name)
    markdown = (tmp_path / "to/table.md").read_text(encoding="utf-8")
    for line in markdown.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert cells in (0, 4 + 3 + 4, 10, 9, 8, 7, 6, 5, 4), line
    assert "<b>" not in markdown
    runs, _ = read_runs(tmp_path / "record")
    assert runs["label"].map(str.isprintable).all()
    assert read_runs(tmp_path / "to")[0].shape == read_runs(tmp_path / "record")[0].shape


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_cell_is_one_cell(name: str) -> None:
    for escaped in (tables.markdown_text(name), tables.latex_text(name)):
        assert escaped.isprintable()
    assert not re.search(r"(?<!\\)[|`*]", tables.markdown_text(name))
    latex = tables.latex_text(name)
    plain = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\{[][*]\}", "", latex)
    assert not re.search(r"[\\&%$#_{}~^<>|*\[\]]", plain)
    line = tables.as_csv(pd.DataFrame({"name": [name], "other": ["x"]})).splitlines()[1]
    assert is_one_line(line)
    assert not line.startswith(("=", "+", "@"))


@pytest.mark.parametrize("name", [*NAMES, "../../x", "/etc/passwd", "", "..", "x" * 1000])
def test_a_file_is_named_after_anything(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.+-]{0,120}", file_stem(name))
    assert file_stem("猫") != file_stem("犬")


def test_a_record_s_attack_names_no_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(2, 3, 8, 8)
    rows = {"../../outside": images, "\0": images}
    monkeypatch.setattr(gallery, "load_rows", lambda *_, **__: ("digits", images, rows))
    gallery.write([], tmp_path / "a/b")
    written = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert written == ["-.png", "..-..-outside.png", "attacks.png"]
    assert len(list((tmp_path / "a/b/attacks").iterdir())) == 2


def test_tables_that_are_too_wide_are_no_curves(tmp_path: Path) -> None:
    """Two million columns took minutes."""
    (tmp_path / "metrics.csv").write_text("round" + ",a" * 2_000_000 + "\n")
    started = time.monotonic()
    assert read_metrics(tmp_path, "round") is None
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("text", ['{"x": 1%s}' % ("0" * 5000), '{"attack": "\\ud800"}'])
def test_a_summary_that_python_cannot_read_is_left_out(tmp_path: Path, text: str) -> None:
    attack(tmp_path, "a-0", 0.9, 0.9)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/summary.json").write_text(text)
    runs, (problem,) = read_runs(tmp_path)
    assert len(runs) == 1
    assert problem.startswith("b/summary.json: is no summary of a run (")


def test_a_summary_is_a_file(tmp_path: Path) -> None:
    attack(tmp_path, "a-0", 0.9, 0.9)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/summary.json")
    runs, (problem,) = read_runs(tmp_path)
    assert len(runs) == 1
    assert problem == "b/summary.json: cannot be read (it is no regular file); skipped"


# --- a whole run --------------------------------------------------------------------------------

CLASSES = [
    b"$\\frac$\x1b[31m",
    b"a\nerror: forged\xff",
    "猫😀\u202e".encode(),
    b"_" + b"y" * 200,
]


@pytest.mark.slow
def test_a_dataset_of_any_names_is_attacked_defended_and_resumed(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, codes and line breaks in its path and classes; LANG is C."""
    images = os.path.join(os.fsencode(tmp_path), b"im\xff\n\x1b[31mages")
    rng = np.random.default_rng(0)
    for split, count in ((b"train", 12), (b"test", 6)):
        for label, name in enumerate(CLASSES):
            folder = os.path.join(images, split, name)
            os.makedirs(folder)
            for number in range(count):
                pixels = (rng.integers(0, 80, (8, 8, 3)) + 40 * label).astype(np.uint8)
                with open(os.path.join(folder, b"%d.png" % number), "wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
    mark = tmp_path / "mark"
    what = f"""
        if not os.path.exists({str(mark)!r}):
            open({str(mark)!r}, "x").close()
            os.kill(os.getpid(), signal.SIGINT)"""
    model = net(tmp_path, "forward", what, 6)
    place = tmp_path / "place"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def run(script: str, *flags: object) -> tuple[int, list[str]]:
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "error::UserWarning",
                ROOT / script,
                *map(os.fsencode, map(str, flags)),
            ],
            env=environment,
            capture_output=True,
            timeout=300,
        )
        lines = done.stderr.decode("ascii").splitlines()
        assert all(is_one_line(line) for line in lines)
        assert not [line for line in lines if line.startswith("error: forged")]
        return done.returncode, lines

    flags = attack_flags(place, "any", dataset_path=os.fsdecode(images), image_size=8, model=model)
    assert run("attack/badnet.py", *flags)[0] == 130
    assert run("attack/badnet.py", *flags, "--resume")[0] == 0
    purify = [*defense_flags(place, "any"), "--model", model]
    code, lines = run("defense/ft.py", *purify)
    assert code == 0, lines
    folder = place / "record/any"
    for log in (folder / "log.txt", folder / "defense/ft/log.txt"):
        text = log.read_text(encoding="utf-8")
        assert all(
            re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING) ", line) for line in text.splitlines()
        )
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    assert (folder / "trigger.png").stat().st_size > 1000
    assert logging.getLogger("sau") is logger
