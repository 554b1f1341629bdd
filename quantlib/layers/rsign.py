from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.layers.rprelu import Shift
from quantlib.quantizers import binary_sign


class RSign(Layer, nn.Module):
    """Binary activation with a learned threshold per channel.

    Forward:   y = sgn(x + shift_x), y = sign_of_zero where the sum is exactly 0 (0 as published; +1 or -1 make the output truly binary)
    Gradient:  1 where |x + shift_x| <= clip, else 0, to x and, summed per channel, to shift_x
    Shapes:    x and y (N, C, ...)
    State:     `shift_x.bias` (1, C, 1, 1), initially 0
    Source:    ReActNet (arXiv 2003.03488); FracBNN (arXiv 2012.12206) defines it and does not use it; clip 1.3

    >>> RSign(2)(torch.tensor([[-0.5, 0.5]])).tolist()
    [[-1.0, 1.0]]
    """

    out_bits = 1

    def __init__(self, channels: int, clip: float = 1.3, sign_of_zero: float = 0.0) -> None:
        super().__init__()
        self.shift_x = Shift(channels)
        self.clip, self.sign_of_zero = clip, sign_of_zero

    def forward(self, x: Tensor) -> Tensor:
        return binary_sign(self.shift_x(x), self.clip, self.sign_of_zero)

    def lower(self, g: Any, x: Any) -> Any:
        return g.quantize(self, x, Grid(-1, 1, 1.0, step=2 if self.sign_of_zero else 1))

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(4)
        modules = [RSign(5), RSign(5, sign_of_zero=1.0)]
        for module in modules:
            nn.init.constant_(module.shift_x.bias, 0.5)
        return [(nn.Sequential(FixedPoint(5, 2), m), torch.randn(3, 5, 3, 7)) for m in modules]
