"""What a method is given is checked before it begins."""

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.training.guard import check_given


def test_a_network_of_one_class_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    images, labels = torch.rand(3, 3, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match="it tells one class; give a network with two or more"):
        check_given(network, images, labels, needs_images=True, needs_labels=True)


def test_a_copy_is_tried_with_a_black_image() -> None:
    """Also where a method sees no images."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    none = torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.int64)
    check_given(network, *none, needs_images=False, needs_labels=False)
    plain = network.forward
    network.forward = lambda images: plain(images * 2 - 1)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^model: a copy of the network computes with the weights"):
        check_given(network, *none, needs_images=False, needs_labels=False)
