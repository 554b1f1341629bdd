from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import BinaryWeight


class BinaryConv2d(Layer, DirectWeights, QuantConv2d):
    """Convolution with weights in {-1, +1} and no scaling factor.

    Forward:   y = conv2d(x, sgn(weight)), ordinary zero padding: a padded position adds 0, not -1
    Gradient:  through the sign: 1 where |weight| <= clip, else 0 (`quantlib.quantizers.binary_sign`)
    Shapes:    x (N, Cin, H, W), weight (Cout, Cin / groups, kh, kw), y (N, Cout, H', W')
    Ranges:    a weight that is exactly 0 stays `sign_of_zero` (0 as published: then the integer weights need two bits)
    Arguments: as torch.nn.Conv2d, without bias unless asked; real_weights=True bypasses the sign (first of the two training steps); the
               attribute of that name switches it at any time
    State:     `weight` (and `bias`)
    Source:    FracBNN (arXiv 2012.12206), `BinaryConv2d`, clip 1.3

    >>> conv = BinaryConv2d(2, 3, 3, padding=1)
    >>> sorted(set(conv(torch.ones(1, 2, 5, 5))[0, :, 2, 2].abs().remainder(2).tolist()))
    [0.0]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        clip: float = 1.3,
        sign_of_zero: float = 0.0,
        real_weights: bool = False,
        **quant: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            weight_quant=BinaryWeight,
            weight_sign_clip=clip,
            weight_sign_of_zero=sign_of_zero,
            **brevitas_options("BinaryConv2d", quant),
        )
        self.real_weights = real_weights

    @property
    def real_weights(self) -> bool:
        return bool(self.weight_quant.disable_quant)

    @real_weights.setter
    def real_weights(self, real: bool) -> None:
        self.weight_quant.disable_quant = bool(real)

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(1)
        x = torch.randn(3, 4, 7, 5)
        modules = [BinaryConv2d(4, 6, 3, stride=2, padding=1), BinaryConv2d(4, 2, (1, 3), groups=2, bias=True)]
        return [(nn.Sequential(FixedPoint(5, 2), m), x) for m in modules]
