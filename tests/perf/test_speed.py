"""The yardstick does the work that it says, and leaves a table."""

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch

from defense import sau
from models import Classifier, build_model, prepare
from perf import literal
from perf.speed import Counting, forward_operations, interleaved, rows_of
from tests.oracle import perturbation
from tests.scripts import run_script
from utils.data.batches import as_float
from utils.data.labelled import Dataset
from utils.files import ROOT

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")


def test_the_literal_inner_loop_is_the_oracles(tiny_model: Classifier, tiny_data: Dataset) -> None:
    """Which treats one image at a time, in float64."""
    model = tiny_model.double()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.network.linear.weight.add_(0.5)  # type: ignore[union-attr, operator]
    images, labels = as_float(tiny_data.train.images).double(), tiny_data.train.labels
    config = sau.Config.load("cifar10", adv_steps=3)
    values = {"norm": "L_inf", "start": "max", "bound": 0.2, "step": 0.2, "steps": 3}
    expected = perturbation(
        model, reference, images, labels, beta_1=0.01, beta_2=1.0, generator=None, **values
    )  # type: ignore[arg-type]
    found = literal.perturbation(model.eval(), reference.eval(), images, labels, config)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_delta_in_float32_is_the_literal_one_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model, reference = (
        prepare(build_model("preactresnet18", 4), CPU, "fp32").eval() for _ in range(2)
    )
    images, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 4
    config = sau.Config.load("cifar10", adv_steps=3)
    plain = [literal.plain_network(network) for network in (model, reference)]
    expected = literal.perturbation(*plain, images, labels, config)
    assert torch.equal(sau.shared_perturbation(model, reference, images, labels, config), expected)
    assert 0 < (expected > 0).float().mean() < 1


@pytest.mark.usefixtures("small")
def test_numbers_that_measure_nothing_are_refused(
    workplace: Path, badnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--result_file", badnet, "--to", workplace / "none", "--repeats", 0]
    assert run_script(ROOT / "perf/speed.py", *flags) == 2
    assert "--repeats: 0 is not allowed; give 1 or more" in capsys.readouterr().err


def test_units_by_hand(tiny_model: Classifier, tiny_data: Dataset) -> None:
    """Of 12 images with a bound of 0, so that none is ever shared, and two steps.

    12 reference passes of the clean images, 12 of the model; 2 steps x 2 networks x 2 units; 12
    reference passes of the perturbed images; and 3 units for each of 24 images of the outer step.
    Before, two images are tried: once without gradients, and once with them, which is 3 units; and
    one image alone.
    """
    units = [0]
    config = sau.Config.load("cifar10", adv_steps=2, trigger_norm=0.0, n_rounds=1, batch_size=12)
    sau.purify(Counting(tiny_model, units), tiny_data.train.images, tiny_data.train.labels, config)
    assert units == [2 + 2 * 3 + 1 + 12 * (1 + 1 + 2 * 2 * 2 + 1 + 2 * 3)]


def test_operations_of_a_forward_pass() -> None:
    """PreAct-ResNet18 at 32 pixels: 0.56 G multiplications with an addition each."""
    count = forward_operations(build_model("preactresnet18", 10).eval(), (3, 32, 32))
    assert count == pytest.approx(2 * 0.5557e9, rel=0.01)


def test_variants_take_turns_and_the_first_turn_does_not_count() -> None:
    turns: list[str] = []
    variants = {name: lambda name=name: lambda: turns.append(name) for name in "ab"}
    seconds = interleaved(variants, 2, CPU)
    assert turns == ["a", "b"] * 3
    assert list(seconds) == ["a", "b"]
    rows = rows_of("round", {"a": 6.0, "b": 2.0}, {"b": "note"})
    assert [(row.what, row.ratio, row.note) for row in rows] == [("a", 1, ""), ("b", 3, "note")]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_it_leaves_a_table_and_a_chart(workplace: Path, badnet: Path) -> None:
    flags = ["--result_file", badnet, "--to", workplace / "speed", "--repeats", 1, "--images", 4]
    flags += ["--epoch_images", 8, "--batch_size", 4, "--device", "cpu"]
    flags += ["--parts", "round", "epoch", "share"]
    assert run_script(ROOT / "perf/speed.py", *flags) == 0
    table = pd.read_csv(workplace / "speed/speed.csv")
    assert set(table["part"]) == {"round", "round+", "epoch", "epoch+", "share"}
    assert (table["seconds"] > 0).all()
    assert table.loc[table["part"] == "round", "what"].tolist()[:2] == [
        "literal, fp32",
        "ours, fp32",
    ]
    assert (workplace / "speed/speed.png").exists()
