"""Modes of networks: kept statistics of BatchNorm, and whether images are mixed."""

import copy

import pytest
import torch
from torch import nn

from models.modes import keeping_statistics, mixes_images
from tests.networks import Norms, conv_net, copied, differing, problem
from utils.process import distributed

# keeping_statistics


def test_batchnorm_uses_the_batch_s_statistics_and_keeps_its_own() -> None:
    network = conv_net().train()
    images, _ = problem()
    other = copy.deepcopy(network)
    before = copied(network.state_dict())
    with torch.no_grad():
        with keeping_statistics(network):
            logits = network(images)
        expected = other(images)
        in_eval_mode = other.eval()(images)
    assert differing(network.state_dict(), before) == []
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, in_eval_mode)
    with torch.no_grad():  # and outside they move again
        network(images)
    assert differing(network.state_dict(), before) == [
        f"{name}.{part}"
        for name in ("bn1", "bn2")
        for part in ("running_mean", "running_var", "num_batches_tracked")
    ]


def test_eval_mode_stays_eval_mode_where_statistics_are_kept() -> None:
    network = conv_net()
    images, _ = problem()
    with torch.no_grad():
        expected = network(images)
        with keeping_statistics(network):
            assert torch.equal(network(images), expected)


def test_instance_norm_keeps_its_statistics_too() -> None:
    """In eval mode it uses them, as before."""
    network = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.InstanceNorm2d(3))
    images = torch.rand(2, 3, 4, 4)
    other = copy.deepcopy(network)
    before = copied(network.state_dict())
    with keeping_statistics(network):
        assert torch.equal(network(images), other(images))
    assert differing(network.state_dict(), before) == []
    expected = network.eval()(images)
    with keeping_statistics(network):
        assert torch.equal(network(images), expected)
    assert network[0].track_running_stats
    assert not network[1].track_running_stats


def test_statistics_move_again_after_an_error_and_only_where_they_did() -> None:
    network = Norms()
    with keeping_statistics(network):
        assert not any(module.track_running_stats for module in (*network.z, network.flat))
    with pytest.raises(ZeroDivisionError), keeping_statistics(network):
        raise ZeroDivisionError
    assert network.z[0].track_running_stats
    assert network.z[1].track_running_stats
    assert network.flat.track_running_stats
    assert not network.a.track_running_stats


def test_batchnorm_of_several_processes_keeps_its_statistics_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes with the same images: twice the sums and twice the count, the same moments."""
    network = conv_net().train()
    images, _ = problem()
    alone = copy.deepcopy(network)(images)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "total", lambda values: 2 * values)
    distributed._synchronise(network)
    assert type(network.bn1) is distributed._BatchNorm2d
    before = copied(network.state_dict())
    with torch.no_grad(), keeping_statistics(network):
        logits = network(images)
    assert torch.allclose(logits, alone, rtol=0, atol=1e-10)
    assert differing(network.state_dict(), before) == []
    with torch.no_grad():
        network(images)
    assert len(differing(network.state_dict(), before)) == 6


# mixes_images


def test_images_are_mixed_by_batchnorm_without_running_statistics() -> None:
    assert not mixes_images(conv_net())
    assert mixes_images(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()))
    assert not mixes_images(nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)))
