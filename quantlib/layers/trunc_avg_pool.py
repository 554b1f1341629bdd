from __future__ import annotations

from typing import Any

import numpy as np
import torch
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from quantlib.layers._base import Example, Layer
from quantlib.ops.requant import Requant
from quantlib.ops.sum_pool import SumPool


class _Replace(Function):
    """Forward: the second argument; gradient: straight to the first."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class TruncAvgPool(Layer, nn.Module):
    """Average pooling as hardware does it: integer sum, then a right shift that drops bits; the scale stays that of the input.

    Forward:   code = floor(sum of the window's codes / 2^shift), y = code * scale. With the default shift = ceil(log2(kh * kw)) the
               result is kh * kw / 2^shift times the true mean (49/64 for 7x7): the network is trained that way
    Gradient:  g / 2^shift to each input of the window; none to the scale
    Shapes:    x (N, C, H, W) -> y (N, C, H', W'), H' = (H + 2 p - kh) // stride + 1
    Ranges:    input codes lo..hi give lo' = (K lo) >> shift .. (K hi) >> shift, K = kh * kw: no more bits than the input has
    Arguments: kernel_size, stride (that of the window unless given), padding (adds code 0), shift
    State:     none
    Errors:    TypeError unless x is a quantized tensor of zero point 0: set return_quant_tensor=True on the activation before
    Source:    MicroNet 2019 submission of quantised ProxylessNAS, final pool (floor of the exact integer; the published float floor can be
               one too low where the sum is a multiple of 2^shift)

    >>> activation = LearnedScaleReLU(bits=4, init=15.0, return_quant_tensor=True)
    >>> TruncAvgPool(2)(activation(torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]]))).value.flatten().round().tolist()
    [2.0]
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        shift: int | None = None,
        return_quant_tensor: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding = _pair(kernel_size), _pair(padding)
        self.stride = self.kernel_size if stride is None else _pair(stride)
        self.shift = (self.kernel_size[0] * self.kernel_size[1] - 1).bit_length() if shift is None else int(shift)
        self.return_quant_tensor = return_quant_tensor

    def forward(self, x: IntQuantTensor) -> IntQuantTensor | Tensor:
        if not isinstance(x, IntQuantTensor):
            raise TypeError("TruncAvgPool sums integer codes and needs a quantized tensor: return_quant_tensor=True on the layer before")
        if bool((x.zero_point != 0).any()):
            raise TypeError("TruncAvgPool needs codes whose zero point is 0; a QuantSign has none")
        smooth = nn.functional.avg_pool2d(x.value, self.kernel_size, self.stride, self.padding, divisor_override=2**self.shift)
        with torch.no_grad():
            codes = (x.value / x.scale).round_()
            sums = nn.functional.avg_pool2d(codes, self.kernel_size, self.stride, self.padding, divisor_override=1)
            exact = (sums * 2.0**-self.shift).floor_().mul_(x.scale)
        value = _Replace.apply(smooth, exact)
        return x.set(value=value) if self.return_quant_tensor else value

    def lower(self, g: Any, x: Any) -> Any:
        (top, left), edge = self.padding, g.integer(x)
        total = g.add(SumPool(self.kernel_size, self.stride, (top, top, left, left)), edge)
        lo, hi = total.type.lo >> self.shift, total.type.hi >> self.shift
        op = Requant(mul=np.array([1]), add=np.array([0]), shift=self.shift, lo=lo, hi=hi)
        return g.add(op, total, scale=edge.type.scale)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, shift={self.shift}"

    @staticmethod
    def examples() -> list[Example]:
        from quantlib.layers.learned_scale_hard_tanh import LearnedScaleHardTanh
        from quantlib.layers.learned_scale_relu import LearnedScaleReLU

        torch.manual_seed(11)
        x = 4 * torch.randn(3, 5, 7, 7)
        unsigned = nn.Sequential(LearnedScaleReLU(4, return_quant_tensor=True), TruncAvgPool(7, return_quant_tensor=False))
        signed = nn.Sequential(LearnedScaleHardTanh(4, return_quant_tensor=True), TruncAvgPool(3, 2, 1, return_quant_tensor=False))
        return [(unsigned, x), (signed, x)]
