"""The signals of an inspection, on networks whose answers are derived by hand."""

import math
import warnings

import pytest
import torch
from torch import nn

from analysis import inspection, signals
from defense import sau
from models import build_model
from tests.networks import Forked
from utils.data.labelled import Labelled


@pytest.mark.parametrize("norm", ["L_inf", "L2"])
def test_signal_a_is_what_sau_does_with_a_model_that_is_its_own_reference(norm: str) -> None:
    torch.manual_seed(3)
    model = build_model("tiny", 4).double()
    for weight in model.parameters():
        weight.data *= 4
    images, labels = torch.rand(20, 3, 8, 8).double(), torch.arange(20) % 4
    config = sau.Config.load(norm_type=norm, trigger_norm=0.3, adv_lr=0.1)
    expected = sau.shared_perturbation(model, model, images, labels, config)
    delta = signals.fooled(
        model,
        images,
        labels,
        norm=config.norm_type,
        bound=0.3,
        start="max",
        step_size=0.1,
        steps=config.adv_steps,
    )
    assert torch.equal(delta, expected)
    assert not torch.equal(delta, torch.full_like(delta, 0.3))


def test_the_smallest_move() -> None:
    """s1 >= 3 and s2 >= 4: (3, 4). s1 >= 3 alone: (3, 0). 2 s1 >= 3: 1.5. Nothing to do: 0."""
    both, one = torch.eye(2), torch.tensor([[1.0, 0.0]])
    assert signals.smallest_move(both, torch.tensor([3.0, 4.0])) == pytest.approx(5)
    assert signals.smallest_move(both, torch.tensor([3.0, -4.0])) == pytest.approx(3)
    assert signals.smallest_move(2 * one, torch.tensor([3.0])) == pytest.approx(1.5)
    assert signals.smallest_move(both, torch.tensor([0.0, -1.0])) == 0
    contradiction = torch.tensor([[1.0], [-1.0]])
    assert signals.smallest_move(contradiction, torch.tensor([1.0, 1.0])) == math.inf


def test_the_head_s_norm_is_small_for_a_class_that_is_easy_to_reach() -> None:
    """Two classes, w_0 - w_1 = (2, 0), b = (0, 1).

    Images of class 1 at 0, -1 and -2 have to gain 1, 3 and 5 to become 0: the median image needs
    s = (1.5, 0), three quarters of them 4 and s = (2, 0), all of them (2.5, 0). Images of class 0
    at 0, 0 and 1 have to gain -1, -1 and 1, so the median image is class 1 already.
    """
    weight, bias = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, 1.0])
    places = torch.tensor([0.0, -1, -2, 0, 0, 1])
    images, labels = torch.stack([places, torch.ones(6)], 1), torch.tensor([1, 1, 1, 0, 0, 0])
    for quantile, expected in ((0.5, [1.5, 0]), (0.75, [2, 0]), (1.0, [2.5, 0.5])):
        norms = signals.head_norms(images, labels, weight, bias, quantile)
        assert norms == pytest.approx(expected)


@pytest.mark.parametrize(("quantile", "norm"), [(0.5, 0.3), (1.0, 0.5)])
def test_the_share_of_images_that_is_sent_to_a_class_is_a_flag(
    quantile: float, norm: float
) -> None:
    """Logits (x, 1 - x). Images of class 1 at 0, 0.2 and 0.4 have to gain 1, 0.6 and 0.2.

    A move by s gains 2 s. Those of class 0, at 1, 0.8 and 0.6, have as far to class 1.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[1.0], [-1]]), torch.tensor([0.0, 1])
    pixels = torch.tensor([0, 51, 102, 255, 204, 153], dtype=torch.uint8).view(6, 1, 1, 1)
    probes = Labelled(pixels, torch.tensor([1, 1, 1, 0, 0, 0]))
    config = inspection.Config.load(quantile=quantile)
    signal = signals.signals_of(model, probes, config, torch.device("cpu"))["C"]()
    assert signal["facts"]["norm"] == pytest.approx(norm, rel=1e-5)


def test_the_p_value_of_the_largest_margin() -> None:
    """Others 1 and 3: mean 2, variance 2, so shape 2, scale 1, and F(x) = 1 - (1 + x) exp(-x)."""
    below = 1 - 5 * math.exp(-4)
    assert signals.log_p_value([1.0, 4.0, 3.0]) == pytest.approx(math.log(1 - below**3))
    assert signals.log_p_value([-1.0, 1.0, 5.0]) == 0
    assert signals.log_p_value([2.0, 2.0, 5.0]) == 0
    assert signals.log_p_value([1.0, 3.0, math.inf]) == 0
    with warnings.catch_warnings(action="error"):  # torch's, of a variance of one number
        assert signals.log_p_value([1.0, 3.0]) == 0


def test_larger_margins_have_smaller_p_values_as_far_as_numbers_go() -> None:
    """Others 1 and 3 again; where 1 - F is small, p is 3 (1 + x) exp(-x), here up to e^-10^9."""
    margins = [30.0, 36, 37, 40, 231, 300, 660, 670, 680, 700, 745, 746, 1e4, 1e9]
    values = [signals.log_p_value([1.0, 3.0, x]) for x in margins]
    expected = [math.log(3) + math.log1p(x) - x for x in margins]
    assert values == pytest.approx(expected, rel=1e-9)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("x", [30.0, 300, 650, 680, 740, 760, 2000, 14700, 1e6])
def test_the_tail_of_the_gamma_law_is_that_of_laws_with_a_formula(x: float) -> None:
    """1 - F is erfc(sqrt x) for shape 1/2, and exp(-x) sum_{k < n} x^k / k! for shape n."""
    half = float(torch.special.log_ndtr(-torch.tensor(2 * x).double().sqrt())) + math.log(2)
    assert signals.log_gamma_tail(0.5, x) == pytest.approx(half, rel=1e-12)
    for n in (1, 7, 200, 10_000):
        k = torch.arange(n, dtype=torch.float64)
        whole = float((k * math.log(x) - torch.lgamma(k + 1)).logsumexp(0)) - x
        if whole > -1e-9:  # of a law whose middle is beyond x
            continue
        assert signals.log_gamma_tail(n, x) == pytest.approx(whole, rel=1e-11)


def test_signal_d_goes_on_where_p_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 3 * 1001 exp(-1000) = 10^-430.8."""
    margins = [1.0, 1000.0, 3.0]
    monkeypatch.setattr(signals, "largest_margin", lambda model, label, *_: margins[label])
    probes = Labelled(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    model, config = build_model("tiny", 3), inspection.Config.load()
    signal = signals.signals_of(model, probes, config, torch.device("cpu"))[signals.NOISE]()
    expected = 1000 / math.log(10) - math.log10(3003)
    assert signal["statistic"] == pytest.approx(expected)
    assert (signal["top"], signal["facts"]) == (1, {"p_gamma": 0})


class Convolved(Forked):
    """A convolution gives its logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.block["used"](images).mean((2, 3))


def test_a_head_of_other_floats_is_one_as_well() -> None:
    model = Forked().double()
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    assert signals.has_linear_head(model, torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("network", [Forked, Convolved])
def test_only_a_network_with_a_linear_head_has_a_signal_of_it(network: type[nn.Module]) -> None:
    images, model, has_head = torch.rand(2, 3, 8, 8), network(), network is Forked
    assert signals.has_linear_head(model, images[:1]) == has_head
    probes = Labelled(images, torch.tensor([0, 1]))
    computed = signals.signals_of(model, probes, inspection.Config.load(), torch.device("cpu"))
    assert (signals.HEAD in computed) == has_head


def test_the_largest_margin_is_that_of_the_brightest_image() -> None:
    """Logits (mean, -mean): the margin of class 0 is 2 for a white image; that of class 1 is 0."""

    class Brightness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.mean(dim=(1, 2, 3)).unsqueeze(1)
            return torch.cat([mean, -mean], dim=1)

    config = inspection.Config.load(noise_lr=2.0, noise_steps=100)
    margins = [signals.largest_margin(Brightness(), k, (1, 2, 2), config) for k in (0, 1)]
    assert margins == pytest.approx([2, 0], abs=1e-4)


def transferred(images: torch.Tensor, delta: torch.Tensor, rounds: int = 1) -> list[float]:
    """Of images of one pixel, which are class 1 from 0.5 on; with their perturbation, all are."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1]])
    model[1].bias.data = torch.tensor([0.5, -0.5])
    predictions, adversarial = (images >= 0.5).long(), torch.ones(len(images), dtype=torch.int64)
    images, delta = images.view(-1, 1, 1, 1), delta.view(-1, 1, 1, 1)
    return signals.transferred(model, images, predictions, adversarial, delta, rounds)


def test_a_perturbation_that_works_on_other_images_is_transferred() -> None:
    """All perturbations of dark images make any image bright.

    Of 24 images, the first 12 are dark. Bright ones are not fooled. Dark image j gets the
    perturbation of j + 1, which is a fooling one for the first eleven.
    """
    images = torch.cat([torch.zeros(12), torch.ones(12)])
    shares = transferred(images, 1 - images)
    assert math.isnan(shares[0])
    assert shares[1] == 1


def test_images_that_are_of_the_class_anyway_are_not_counted_as_transferred() -> None:
    """Every second image is bright. Of dark ones, 0 and 0.4 in turn, each goes just to 0.6.

    In the first round only bright images get a perturbation that fooled, which is no transfer. In
    the second one 0 goes to 0.2 and 0.4 to 1, so half of the perturbations are transferred.
    """
    images = torch.tensor([0.0, 1, 0.4, 1]).repeat(6)
    assert transferred(images, (0.6 - images).relu(), rounds=2)[1] == 0.5


@pytest.mark.parametrize(("count", "share"), [(9, math.nan), (10, 1.0)])
def test_fewer_than_ten_pairs_are_no_share(count: int, share: float) -> None:
    """Each dark image gets the perturbation of the next one, and the last that of the first."""
    shares = transferred(torch.zeros(count), torch.ones(count))
    assert shares[1] == pytest.approx(share, nan_ok=True)


def test_what_is_outstanding() -> None:
    """Norms 1, 4, 5, 6: median 4.5, deviations 3.5, 0.5, 0.5, 1.5, so MAD 1."""
    signal = signals.outstanding([4.0, 1.0, 5.0, 6.0])
    assert signal.top == 1
    assert signal.by_class == pytest.approx([4.5 / 4, 4.5, 0.9, 0.75])
    assert signal.statistic == pytest.approx(3.5 / 1.4826)


def test_of_two_norms_none_stands_out() -> None:
    """Whatever they are, it would be 1 / 1.4826, up to the rounding that a comparison would see."""
    for norms in ([1.0, 9.0], [1.0, 9.0, math.inf]):
        signal = signals.outstanding(norms)
        assert (signal.statistic, signal.top) == (0, 0)
    nothing = signals.outstanding([math.nan, math.inf])
    assert (nothing.statistic, nothing.top) == (0, None)


def test_of_several_classes_that_are_most_suspicious_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever their numbers are: 0 may be the target."""
    assert signals.outstanding([1.0, 1.0, 5.0, 6.0]).top is None
    images = torch.rand(4, 3, 8, 8)
    model = build_model("tiny", 4).eval()
    for head in model.modules():
        if isinstance(head, nn.Linear):
            head.weight.data.zero_()  # nothing moves a label
    probes = Labelled(images, torch.arange(4))
    found = signals.signals_of(model, probes, inspection.Config.load(), torch.device("cpu"))
    for name in ("A", "A'", "B"):
        signal = found[name]()
        assert (signal["statistic"], signal["top"]) == (0, None), name
    monkeypatch.setattr(signals, "transferred", lambda *_: [math.nan, 0.0, math.nan, math.nan])
    assert found["B"]()["top"] is None
    assert inspection.headline_of({"statistic": 0.25, "top": None}, str) == "0.250"
    several = {name: {"top": None, "statistic": 0.5} for name in ("A", "A'")}
    text = "no clear signal: large steps point to several classes, small ones to several classes"
    assert inspection.conclusion(several, [], str) == text
    one = several | {"A": {"top": 3, "statistic": 0.5}}
    text = "no clear signal: large steps point to class 3, small ones to several classes"
    assert inspection.conclusion(one, [], str) == text
