"""BatchNorm whose gradient in eval mode is fast on a GPU."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; parameters, state dict and numbers are the same.

    In eval mode it is a linear map of the features, and so its gradient is that map without the
    shift. torch computes it in another memory order, which is slower on a GPU, and copies it back.

    Shape:
        (N, C, H, W) float -> (N, C, H, W) float.
    """

    does_the_same = True

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if (
            features.device.type != "cuda"
            or self.training
            or not (torch.is_grad_enabled() and features.requires_grad)
            or not self.affine
            or self.weight.requires_grad
            or self.bias.requires_grad
            or self.running_mean is None
            or self.running_var is None
        ):
            return super().forward(features)
        moments = self.running_mean, self.running_var
        return _Linear.apply(features, *moments, self.weight, self.bias, self.eps)


class _Linear(torch.autograd.Function):
    """BatchNorm in eval mode, with a gradient only for the features."""

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(variance, weight)
        ctx.eps = eps
        return F.batch_norm(features, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        variance, weight = ctx.saved_tensors
        zero = torch.zeros_like(weight)
        map_ = F.batch_norm(gradient, zero, variance, weight, zero, eps=ctx.eps)
        return map_, None, None, None, None, None
