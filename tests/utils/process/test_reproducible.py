"""The same seed gives the same bits twice in a row; --deterministic asks for it on a GPU too."""

import hashlib
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

import models
from tests.conftest import make_small
from tests.scripts import attack_flags, defense_flags, run_script
from utils.errors import UserError
from utils.files import ROOT
from utils.process.seeds import deterministic
from utils.training.watch import Watch

pytestmark = pytest.mark.usefixtures("cache")

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def fingerprint(workplace: Path, name: str, *extra: object) -> dict[str, str]:
    """sha256 of what an attack and SAU leave, metrics.csv without its times."""
    flags = attack_flags(workplace, name, epochs=1, image_size=8)
    assert run_script(ROOT / "attack/badnet.py", *flags, *extra) == 0
    flags = defense_flags(workplace, name, pgd_init="random")
    assert run_script(ROOT / "defense/sau.py", *flags, *extra) == 0
    found = {}
    root = workplace / "record" / name
    for path in sorted(root.rglob("*")):
        if path.suffix in (".pt", ".csv") or path.name == "clean_index.txt":
            content = path.read_bytes()
            if path.suffix == ".csv":
                content = pd.read_csv(path).drop(columns="seconds").to_csv().encode()
            found[str(path.relative_to(root))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.slow
def test_twice_in_a_row_is_the_same(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File by file, with the usual network."""
    network = models.CONSTRUCTORS["preactresnet18"]
    make_small(monkeypatch)
    monkeypatch.setitem(models.CONSTRUCTORS, "preactresnet18", network)
    flag = ["--deterministic"] if torch.cuda.is_available() else []
    first = fingerprint(workplace, "first", *flag)
    assert set(first) == {
        *("attack_result.pt", "poison.pt", "metrics.csv", "defense/sau/defense_result.pt"),
        *("defense/sau/clean_index.txt", "defense/sau/metrics.csv"),
    }
    assert fingerprint(workplace, "again", *flag) == first


def test_the_flag_changes_nothing_on_a_cpu_and_a_seed_everything(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    plain = fingerprint(workplace, "plain")
    assert fingerprint(workplace, "strict", "--deterministic") == plain
    seeded = fingerprint(workplace, "seeded", "--random_seed", 1)
    assert all(seeded[name] != plain[name] for name in plain)


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get(VARIABLE),
    )


@pytest.mark.parametrize("before", [None, ":16:8", ":0:0"])
def test_the_settings_hold_inside_and_are_put_back(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """A workspace that the user has chosen stays, unless cuBLAS is not deterministic with it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    outside = settings()
    with deterministic(False):
        assert settings() == outside
    with deterministic(True):
        workspace = ":16:8" if before == ":16:8" else ":4096:8"
        assert settings() == (True, False, True, False, workspace)
    assert settings() == outside
    with pytest.raises(ZeroDivisionError), deterministic(True):
        raise ZeroDivisionError
    assert settings() == outside


def test_what_cannot_be_deterministic_is_told() -> None:
    """torch names the operation; other errors pass."""
    message = (
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you "
        "set 'torch.use_deterministic_algorithms(True)'."
    )
    with pytest.raises(UserError) as caught, deterministic(True):
        raise RuntimeError(message)
    assert str(caught.value) == (
        "--deterministic: adaptive_avg_pool2d_backward_cuda cannot be so on this device; drop the "
        "flag, or give another --model"
    )
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(True):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("wanted", [False, True])
def test_the_flag_sets_it_for_the_whole_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    make_small(monkeypatch)
    seen = []
    after_round = Watch._after_round

    def look(*arguments: object) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        after_round(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Watch, "_after_round", look)
    extra = ("--deterministic",) if wanted else ()
    fingerprint(workplace, f"whole_{wanted}", *extra)
    assert seen == [wanted, wanted]
    assert not torch.are_deterministic_algorithms_enabled()
