"""The four risks on models of one pixel, by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmark import bound
from benchmark.bound import Images, in_ball, risks, rounds_of
from defense import sau
from tests.conftest import make_small
from tests.scripts import run_script
from utils.errors import UserError
from utils.files import ROOT


class Steps(nn.Module):
    """Class 1 where the pixel is above a limit, class 0 elsewhere; no gradient leads there."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        above = images.flatten(1) - self.limit
        return torch.cat([-above, above], dim=1)


def pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


# All of class 0; the trigger adds 0.3 and is to give class 1.
CLEAN = pixels(0.1, 0.3, 0.45)
IMAGES = Images(CLEAN, CLEAN + 0.3, torch.zeros(3).long(), torch.ones(3).long())


def of(model: float, reference: float, radius: float) -> dict[str, int]:
    config = sau.Config.load("digits", trigger_norm=radius, batch_size=2)
    return risks(Steps(model), Steps(reference), IMAGES, config)


def test_the_backdoored_model_itself() -> None:
    """Above 0.5 is class 1: triggers 0.6 and 0.75 fool it. With 0.3 in S both have a shared d."""
    assert of(0.5, 0.5, radius=0.3) == {
        **{"total": 3, "fooled": 2, "inside": 3},
        **{"bd": 2, "share": 2, "sub": 2, "adv": 2},
    }


def test_a_purified_model_has_smaller_risks() -> None:
    """With its limit at 0.7 only 0.75 is still fooled by the trigger, or by anything in S."""
    assert of(0.7, 0.5, radius=0.3) == {
        **{"total": 3, "fooled": 2, "inside": 3},
        **{"bd": 1, "share": 1, "sub": 1, "adv": 1},
    }


def test_adversarial_images_that_no_trigger_fools_count_in_the_last_risk_alone() -> None:
    """h gives 0.1 + 0.3 class 1, too, but the trigger does not fool h_bd there."""
    assert of(0.35, 0.5, radius=0.3) == {
        **{"total": 3, "fooled": 2, "inside": 3},
        **{"bd": 2, "share": 2, "sub": 2, "adv": 3},
    }


def test_a_wrong_label_that_h_bd_does_not_give_is_no_shared_one() -> None:
    """S reaches 0.55, where h is wrong and h_bd is not; the trigger is outside of S."""
    counts = of(0.4, 0.6, radius=0.1)
    assert (counts["fooled"], counts["inside"]) == (1, 0)
    assert (counts["bd"], counts["share"], counts["sub"], counts["adv"]) == (1, 0, 1, 1)


def test_triggers_outside_of_the_ball_break_the_bound() -> None:
    counts = of(0.5, 0.5, radius=0.02)
    assert counts["inside"] == 0
    assert counts["bd"] == 2 > counts["share"] == 0


@pytest.mark.parametrize(
    ("norm", "radius", "inside"),
    [
        ("L_inf", 0.2, [True, False]),
        ("L1", 0.5, [True, False]),
        ("L2", 0.3, [True, False]),
        ("L2", 0.7, [True, True]),
        ("Reg", 0.0, [True, True]),
    ],
)
def test_balls(norm: str, radius: float, inside: list[bool]) -> None:
    """Two pixels of 0.2, and 0.6 and 0."""
    delta = torch.tensor([[0.2, -0.2], [0.6, 0.0]]).view(2, 1, 1, 2)
    config = sau.Config.load("digits", norm_type=norm, trigger_norm=radius)
    assert in_ball(delta, config).tolist() == inside


def test_rounds() -> None:
    assert rounds_of("4,0, 1,4") == [0, 1, 4]
    for text in ("", "1,x", "-1", "1.5", "0,1000000", "9" * 5000):
        with pytest.raises(UserError, match=r"--rounds: .* is not allowed"):
            rounds_of(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--images 0 --to y", "--images: 0 is not allowed"),
        ("--random_seed -1 --to y", "--random_seed: -1 is not allowed; give 0 or more"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bound.py", "--result_file", "x", *flags.split()])
    with pytest.raises(UserError, match=message):
        bound.main()


def test_a_record_of_your_own_network_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is named by --model, as for every other script."""
    make_small(monkeypatch)
    model = tmp_path / "mine.py"
    model.write_text(
        "from torch import nn\n"
        "def build(num_classes, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))\n"
    )
    where = ["--record_path", tmp_path, "--model", f"{model}:build"]
    record = ["--dataset", "random", "--epochs", 1, "--save_folder_name", "mine"]
    assert run_script(ROOT / "attack/badnet.py", *record, *where) == 0
    few = ["--result_file", "mine", "--rounds", "0,1", "--images", 9]
    flags = [*few, "--to", tmp_path / "out"]
    assert run_script(ROOT / "benchmark/bound.py", *flags, *where) == 0
    capsys.readouterr()
    (tmp_path / "taken").write_text("a file")
    assert run_script(ROOT / "benchmark/bound.py", *few, *where, "--to", tmp_path / "taken") == 2
    assert "taken cannot be made" in capsys.readouterr().err
    nobody = ["--result_file", "nobody", "--to", tmp_path / "empty"]
    assert run_script(ROOT / "benchmark/bound.py", *nobody, *where) == 2
    assert not (tmp_path / "empty").exists()
    assert (tmp_path / "out/mine.csv").read_text().count("\n") == 3
    assert run_script(ROOT / "benchmark/bound.py", *flags, *where[:2]) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.usefixtures("cache", "small")
def test_images_that_were_moved_are_named(
    workplace: Path, badnet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--result_file", badnet, "--rounds", "0", "--images", 3, "--to", workplace / "out"]
    moved = (workplace / "images").rename(workplace / "moved")
    try:
        assert run_script(ROOT / "benchmark/bound.py", *flags) == 2
        assert "give the one that has them with --dataset_path" in caplog.text
        assert run_script(ROOT / "benchmark/bound.py", *flags, "--dataset_path", moved) == 0
    finally:
        moved.rename(workplace / "images")
    assert (workplace / "out/shared.csv").read_text().count("\n") == 2
