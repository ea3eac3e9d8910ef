"""A small record with results of defenses, and one of a clean model, on random images."""

from pathlib import Path

import pytest

from tests.test_end_to_end import run_script
from utils.files import ROOT


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records `bd` (with results `ft`, `sau` and `npd`) and `clean`; for tests that only add to them."""
    root = tmp_path_factory.mktemp("records")
    small = ["--dataset", "random", "--model", "tiny", "--record_path", root, "--epochs", 12]
    assert run_script(ROOT / "attack/badnet.py", *small, "--save_folder_name", "bd") == 0
    assert run_script(ROOT / "attack/prototype.py", *small, "--save_folder_name", "clean") == 0
    for name in ("ft", "sau", "npd"):
        flags = ["--result_file", "bd", "--record_path", root, "--n_rounds", 2]
        assert run_script(ROOT / f"defense/{name}.py", *flags) == 0
    return root
