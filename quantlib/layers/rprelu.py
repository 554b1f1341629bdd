from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import in_float32, kernels


class _RPReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift_x: Tensor, slope: Tensor, shift_y: Tensor) -> Tensor:
        ctx.save_for_backward(x, shift_x, slope)
        ctx.places = kernels.places(x, slope.numel()) if slope.numel() > 1 and kernels.fit(x, shift_x, slope, shift_y) else None
        if ctx.places is not None:
            y = torch.empty_like(x)
            kernels.call("rprelu", x, shift_x, slope, shift_y, y, *ctx.places, dtype=x.dtype)
            return y
        u = x + shift_x
        return u.clamp_min(0).add_(u.clamp_max(0).mul_(slope)).add_(shift_y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, shift_x, slope = ctx.saved_tensors
        if ctx.places is not None:
            dx, sums = torch.empty_like(x), x.new_empty((3, *slope.shape))
            kernels.call("rprelu_back", x, shift_x, slope, kernels.alike(grad, x), dx, sums, *ctx.places, dtype=x.dtype)
            return dx, *sums
        u = x + shift_x
        positive = torch.ops.aten.threshold_backward(grad, u, 0)
        negative = grad - positive
        grad_slope = (negative * u).sum_to_size(slope.shape)
        grad_x = positive.add_(negative.mul_(slope))
        return grad_x, grad_x.sum_to_size(slope.shape), grad_slope, grad.sum_to_size(slope.shape)


class Shift(nn.Module):
    """A learned constant per channel, `bias` of shape (1, C, 1, 1), initially 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + per_channel(self.bias, x)


def per_channel(constant: Tensor, x: Tensor) -> Tensor:
    """C constants laid along axis 1 of x; ValueError naming both sizes where they do not fit."""
    if x.dim() < 2 or x.shape[1] != constant.numel():
        raise ValueError(f"the layer has {constant.numel()} channels, its input the shape {tuple(x.shape)} (channels are axis 1)")
    return constant.reshape(1, -1, *[1] * (x.dim() - 2))


class RPReLU(Layer, nn.Module):
    """PReLU with a learned shift of either axis.

    Forward:   u = x + shift_x; y = (u if u > 0 else prelu * u) + shift_y, three learned constants per channel
    Gradient:  the exact derivative; at u = 0 the slope prelu
    Shapes:    x and y (N, C, ...)
    Arguments: channels C; initially shift_x = 0, prelu = 0.25, shift_y = 0
    State:     `shift_x.bias`, `shift_y.bias` (1, C, 1, 1), `prelu.weight` (C,)
    Source:    FracBNN (arXiv 2012.12206) after ReActNet (arXiv 2003.03488)

    >>> RPReLU(1)(torch.tensor([[-2.0], [3.0]])).tolist()
    [[-0.5], [3.0]]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_x = Shift(channels)
        self.prelu = nn.PReLU(channels)
        self.shift_y = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = in_float32(x)
        constants = (per_channel(c, x) for c in (self.shift_x.bias, self.prelu.weight, self.shift_y.bias))
        return _RPReLU.apply(x, *constants)

    def lower(self, g: Any, x: Any) -> Any:
        return g.elementwise(self, x, increasing=self.prelu.weight >= 0)

    def extra_repr(self) -> str:
        return f"channels={self.prelu.num_parameters}"

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(3)
        module = RPReLU(5)
        with torch.no_grad():
            module.shift_x.bias.normal_()
            module.shift_y.bias.normal_()
            module.prelu.weight.copy_(torch.tensor([0.25, -0.5, 0.0, 1.5, 0.1]))
        network = nn.Sequential(FixedPoint(8, 4), module, FixedPoint(9, 5))
        return [(network, 3 * torch.randn(3, 5, 3, 7)), (network, 3 * torch.randn(3, 5))]
