"""A small record with results of defenses, and one of a clean model, on random images."""

from pathlib import Path

import pytest

from tests.conftest import make_small
from tests.scripts import run_script
from utils.files import ROOT


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records `bd`, with results `ft`, `sau` and `npd`, and `clean`; tests only add to them."""
    root = tmp_path_factory.mktemp("records")
    small = ["--dataset", "random", "--model", "tiny", "--record_path", root, "--epochs", 12]
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert run_script(ROOT / "attack/badnet.py", *small, "--save_folder_name", "bd") == 0
        assert run_script(ROOT / "attack/prototype.py", *small, "--save_folder_name", "clean") == 0
        for name, more in (("ft", []), ("sau", []), ("npd", ["--target_layer_name", "conv"])):
            flags = ["--result_file", "bd", "--record_path", root, "--n_rounds", 2, *more]
            assert run_script(ROOT / f"defense/{name}.py", *flags) == 0
    return root
