"""ACC, ASR and RA of a model whose predictions are known."""

import math

import pytest
import torch
from torch import nn

import utils.training.evaluate
from models import Resize, build_model
from utils.data.labelled import Dataset, Labelled
from utils.data.poison import LabelMap, triggered_test_set
from utils.errors import UserError
from utils.metrics import Rate, Scores
from utils.training.evaluate import confusion, evaluate, head_features, predict

CPU = torch.device("cpu")


class Reader(nn.Module):
    """Predicts the class that the first pixel names; in train mode, the class after it."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        named = (images[:, 0, 0, 0] * 255).round().long() + self.training
        return nn.functional.one_hot(named % self.num_classes, self.num_classes).float()


def images_naming(*classes: int) -> torch.Tensor:
    """uint8 (N, 3, 2, 2) with the class in every pixel."""
    named = torch.tensor(classes, dtype=torch.uint8).view(-1, 1, 1, 1)
    return named.expand(-1, 3, 2, 2).contiguous()


@pytest.fixture
def data() -> Dataset:
    """Six test images of three classes; the model takes the last one for a 0."""
    split = Labelled(images_naming(0, 0, 1, 1, 2, 0), torch.tensor([0, 0, 1, 1, 2, 2]))
    return Dataset("named", split, split, ("a", "b", "c"), (0.0,) * 3, (1.0,) * 3)


def name_zero_except_image_3(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A trigger after which the model says 0, and which fails on image 3."""
    changed = images.clone()
    changed[:, :, 0, 0] = 0
    changed[index == 3] = images[index == 3]
    return changed


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_predictions_come_in_order_whatever_the_batches(batch_size: int) -> None:
    found = predict(Reader(), images_naming(2, 0, 1, 1, 0, 2), CPU, batch_size)
    assert found.tolist() == [2, 0, 1, 1, 0, 2]
    assert found.dtype == torch.int64


def test_one_image_and_none_have_as_many_predictions() -> None:
    assert predict(Reader(), images_naming(2), CPU).tolist() == [2]
    none = predict(Reader(), images_naming(), CPU)
    assert (none.tolist(), none.dtype) == ([], torch.int64)


def test_predictions_are_the_same_from_bytes_and_from_floats() -> None:
    images = images_naming(2, 0, 1)
    assert torch.equal(predict(Reader(), images, CPU), predict(Reader(), images.float() / 255, CPU))


def test_the_model_predicts_in_eval_mode_and_gets_its_mode_back() -> None:
    """In train mode the answers would be 0 1 2."""
    model = Reader().train()
    assert predict(model, images_naming(2, 0, 1), CPU).tolist() == [2, 0, 1]
    assert model.training


@pytest.mark.parametrize("row", [[math.nan, 0, 1], [0, 1, math.nan], [0, math.inf, math.inf]])
def test_logits_without_a_largest_number_are_no_prediction(row: list[float]) -> None:
    """argmax would take NaN for a class."""

    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images), 3)
            logits[images[:, 0, 0, 0] > 1.5 / 255] = torch.tensor(row)
            return logits

    assert predict(Broken(), images_naming(0, 1), CPU).tolist() == [0, 0]
    with pytest.raises(UserError, match=r"logits for 2 of 4 images are NaN or infinite"):
        predict(Broken(), images_naming(0, 2, 1, 2), CPU, batch_size=2)


def test_a_logit_of_minus_infinity_is_a_probability_of_zero() -> None:
    class Sure(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([-math.inf, 0.0]).expand(len(images), 2)

    assert predict(Sure(), images_naming(0, 1), CPU).tolist() == [1, 1]


def test_a_network_that_enlarges_images_gets_fewer_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = []

    def at_once(_: torch.device, side: int) -> int:
        sides.append(side)
        return 2

    monkeypatch.setattr(utils.training.evaluate, "images_at_once", at_once)
    images = torch.zeros(3, 3, 4, 5, dtype=torch.uint8)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    nn.init.zeros_(network[2].weight)
    nn.init.constant_(network[2].bias, 1)
    for model in (network, nn.Sequential(Resize(7), network)):
        assert predict(model, images, CPU).tolist() == [0, 0, 0]
        assert head_features(model, images).tolist() == [[0.0] * 3] * 3
    assert sides == [5, 5, 7, 7]


class Placed(nn.Module):
    """Keeps the positions of its first images for all later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.positions: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            self.positions = torch.ones(images.shape[2:])
        return self.linear((images * self.positions).mean((2, 3)))


def test_what_a_network_keeps_while_it_is_scored_can_be_trained_with() -> None:
    model, images = Placed(), torch.rand(2, 3, 4, 4, requires_grad=True)
    predict(model, images.detach(), CPU)
    model(images).sum().backward()
    assert images.grad is not None


def test_acc_counts_the_clean_test_set(data: Dataset) -> None:
    """Five of six: the last image is taken for a 0."""
    assert evaluate(Reader(), data.test, None, CPU) == Scores(Rate(5, 6))


def test_all_to_one_counts_images_of_other_classes(data: Dataset) -> None:
    """Target 0 leaves images 2 to 5 with the labels 1 1 2 2.

    With the trigger the model says 0 1 0 0: three hits of four, and one true label of four.
    """
    triggered = triggered_test_set(data, name_zero_except_image_3, "all2one", 0)
    assert evaluate(Reader(), data.test, triggered, CPU) == Scores(
        Rate(5, 6), asr=Rate(3, 4), ra=Rate(1, 4)
    )


def test_all_to_all_counts_every_image(data: Dataset) -> None:
    """The targets of labels 0 0 1 1 2 2 are 1 1 2 2 0 0; the model says 0 0 0 1 0 0.

    Two hits of six (images 4 and 5), three true labels of six (images 0, 1 and 3).
    """
    triggered = triggered_test_set(data, name_zero_except_image_3, "all2all", 0)
    assert evaluate(Reader(), data.test, triggered, CPU) == Scores(
        Rate(5, 6), asr=Rate(2, 6), ra=Rate(3, 6)
    )


def test_cross_images_count_with_their_true_labels(data: Dataset) -> None:
    """They name 0 1 1 1 2 2 where 0 0 1 1 2 2 is true: five of six."""
    triggered = triggered_test_set(data, name_zero_except_image_3, "all2one", 0)
    cross = Labelled(images_naming(0, 1, 1, 1, 2, 2), data.test.labels)
    scores = evaluate(Reader(), data.test, triggered, CPU, cross=cross)
    assert scores.cross_acc == Rate(5, 6)
    assert scores.asr == Rate(3, 4)


@pytest.mark.parametrize("label_map", ["all2one", "all2all"])
def test_scores_do_not_depend_on_the_batch_size(data: Dataset, label_map: LabelMap) -> None:
    triggered = triggered_test_set(data, name_zero_except_image_3, label_map, 0)
    small = evaluate(Reader(), data.test, triggered, CPU, batch_size=1)
    assert small == evaluate(Reader(), data.test, triggered, CPU, batch_size=5)


def test_the_batch_size_is_that_of_every_pass(data: Dataset) -> None:
    """Six images in fours: 4 and 2."""
    sizes = []

    class Counting(Reader):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return super().forward(images)

    evaluate(Counting(), data.test, None, CPU, batch_size=4)
    assert sizes == [4, 2]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_longer_side_counts(shape: tuple[int, int]) -> None:
    assert utils.training.evaluate._side(Reader(), torch.zeros(1, 3, *shape)) == 6


def test_confusion_counts_true_classes_in_rows() -> None:
    matrix = confusion(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_penultimate_features_are_what_the_head_gets() -> None:
    torch.manual_seed(0)
    model = build_model("tiny", 3).eval()
    images = torch.rand(5, 3, 8, 8)
    before_head = head_features(model, images)
    assert torch.allclose(model.network.linear(before_head), model(images), atol=1e-6)
