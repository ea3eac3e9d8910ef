"""Grad-CAM of networks whose map is known."""

import pytest
import torch
from torch import nn

from analysis import gradcam, similarity
from utils.errors import UserError


def test_grad_cam_of_a_linear_network() -> None:
    """Logit 1 is the mean of red - green: its channel has weight 1 / 4, so the map is that, scaled.

    Where green speaks against the label, the map is 0. Logit 2 is the mean of blue, and there is
    none.
    """
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    channels = torch.tensor([[0.0, 1, 0], [1, -1, 0], [0, 0, 1]])
    model[0].weight.data = channels.view(3, 3, 1, 1)
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0, 0], image[0, 1, 1, 1] = torch.tensor([0.4, 0.8]), 1.0
    cam = gradcam.class_activation(model, image, torch.tensor([1]), "0")
    assert torch.allclose(cam, torch.tensor([[[0.5, 1.0], [0.0, 0.0]]]))
    nothing = gradcam.class_activation(model, image, torch.tensor([2]), "0")
    assert nothing.abs().max() == 0
    assert gradcam.centre_of(cam[0]) == {"x": pytest.approx(7 / 12), "y": pytest.approx(0.25)}


def test_a_map_that_the_labels_do_not_come_from_is_refused_in_a_line() -> None:
    """`aside` is called, and its output is used for nothing."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.aside(images)
            return self.conv(images).mean(dim=(2, 3))

    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"^--layer: aside gives no map of features"):
        gradcam.class_activation(Aside(), images, labels, "aside")


@pytest.mark.parametrize("name", ["0", "3"])
def test_layers_that_work_in_place_change_no_analysis(name: str) -> None:
    """Of a convolution with a ReLU behind it: its map, its changes and its activations."""
    seen = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        images = torch.randint(0, 256, (6, 3, 10, 10), dtype=torch.uint8)
        cam = gradcam.class_activation(model, images / 255, torch.arange(6) % 4, name)
        change = similarity.changes(model, [name], images, 255 - images, size=4)[name]
        (gram,) = similarity.grams(model, {name: [torch.arange(4)]}, images, 4)[name]
        seen.append((cam, change, gram))
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))
