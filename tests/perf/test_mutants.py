"""The copy of the checkout that mutmut changes."""

import ast
import subprocess
from pathlib import Path

import pytest

from defense import names
from perf import mutants
from utils.errors import UserError
from utils.files import ROOT


def test_a_decorated_function_is_decorated_by_a_call() -> None:
    source = (
        '"""A."""\n\n\n@checked\ndef purify(a):\n    return a\n\n\n@other\ndef f():\n    pass\n'
    )
    expected = (
        '"""A."""\n\n\ndef purify(a):\n    return a\n\n\npurify = checked(purify)\n'
        "\n\n@other\ndef f():\n    pass\n"
    )
    assert mutants.undecorated(source) == expected


def test_every_purify_can_be_changed() -> None:
    """mutmut skips functions with decorators; none is left on a purify."""
    for name in names():
        source = mutants.undecorated((ROOT / f"defense/{name}.py").read_text(encoding="utf-8"))
        (function,) = (
            node
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name == "purify"
        )
        assert function.decorator_list == []
        assert source.count("\npurify = checked(purify)\n") == 1


def test_the_copy_follows_the_checkout(tmp_path: Path) -> None:
    root, to = tmp_path / "root", tmp_path / "copy"
    (root / "defense").mkdir(parents=True)
    (root / "defense/a.py").write_text("@checked\ndef purify():\n    pass\n")
    (root / "b.py").write_text("@checked\ndef f():\n    pass\n")
    (root / "own.txt").write_text("not tracked")
    for call in (["init", "-q"], ["add", "defense", "b.py"]):
        subprocess.run(["git", *call], cwd=root, check=True)
    mutants.copied(root, to)
    assert (to / "defense/a.py").read_text().endswith("purify = checked(purify)\n")
    assert (to / "b.py").read_text() == "@checked\ndef f():\n    pass\n"
    assert not (to / "own.txt").exists()

    (to / "mutants").mkdir()
    (to / "mutants/kept.py").write_text("")
    time = (to / "b.py").stat().st_mtime_ns
    subprocess.run(["git", "rm", "-q", "-f", "defense/a.py"], cwd=root, check=True)
    mutants.copied(root, to)
    assert not (to / "defense/a.py").exists()
    assert (to / "mutants/kept.py").exists()
    assert (to / "b.py").stat().st_mtime_ns == time


def test_without_mutmut_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("sys.argv", ["mutants.py"])
    monkeypatch.setattr(mutants, "COPY", tmp_path / "copy")
    with pytest.raises(UserError, match=r"mutmut: is not there; run pip install"):
        mutants.main()
    assert not (tmp_path / "copy").exists()


def test_the_files_and_tests_that_are_named_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    settings = tomllib.loads(text)["tool"]["mutmut"]
    for pattern in settings["only_mutate"] + settings["pytest_add_cli_args_test_selection"]:
        assert list(ROOT.glob(pattern)), pattern
