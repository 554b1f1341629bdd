from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.layers.shift2d import CROSS, Shift2d
from quantlib.layers.tanh_conv2d import TanhConv2d


class ShiftConv2d(Layer, nn.Sequential):
    """Shift, then a 1x1 convolution: what stands for a 3x3 convolution in DiracDeltaNet.

    Forward:   y = TanhConv2d(Shift2d(x)), the two layers `shift` and `conv` in a row; take them singly where something stands between
    Gradient:  of the two layers
    Shapes:    x (N, Cin, H, W), y (N, Cout, H, W)
    Ranges:    weight codes as TanhConv2d; only the 1x1 convolution multiplies
    Arguments: bits and signs of TanhConv2d, moves of Shift2d
    State:     `conv.weight` (Cout, Cin, 1, 1) (and `conv.bias`)
    Source:    DiracDeltaNet (arXiv 1811.08634)

    >>> ShiftConv2d(5, 8, bits=4)(torch.ones(1, 5, 6, 6)).shape
    torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = False,
        *,
        bits: int = 4,
        signs: bool = False,
        moves: Sequence[tuple[int, int]] = CROSS,
    ) -> None:
        conv = TanhConv2d(in_channels, out_channels, 1, bias=bias, bits=bits, signs=signs)
        super().__init__(OrderedDict(shift=Shift2d(in_channels, moves), conv=conv))

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(15)
        x = torch.randn(3, 6, 4, 5)
        return [(nn.Sequential(FixedPoint(5, 2), m), x) for m in (ShiftConv2d(6, 3), ShiftConv2d(6, 4, bits=1, bias=True))]
