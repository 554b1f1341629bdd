from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from quantlib.layers._base import Example, Layer, brevitas_options
from quantlib.layers.half_wave import HalfWave
from quantlib.quantizers import ConstantStepWeight


class ConstantStepConv2d(Layer, QuantConv2d):
    """Convolution whose weights lie on a grid of a constant times their standard deviation; nothing of it is learned.

    Forward:   s = WEIGHT_STEPS[bits] * std(weight), q = clip(rne(weight / s), -2^(bits-1), 2^(bits-1) - 1); y = conv2d(x, q * s) (+ bias)
    Gradient:  identity to the weight, also outside the clip; none through the deviation (`quantlib.quantizers.constant_step`)
    Shapes:    x (N, Cin, H, W), weight (Cout, Cin / groups, kh, kw), y (N, Cout, H', W')
    Ranges:    weight codes -2^(bits-1)..2^(bits-1) - 1, bits from 1 to 8
    Arguments: as torch.nn.Conv2d, without bias unless asked; bits
    State:     `weight` (and `bias`), as a plain convolution
    Source:    DeepBurning-MixQ (arXiv 2308.11334), convolution of the fixed-bit networks

    >>> conv = ConstantStepConv2d(2, 3, 3, bits=3)
    >>> quantized = conv.quant_weight()
    >>> bool(((quantized.value / quantized.scale).round().abs() <= 4).all())
    True
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
        bits: int = 4,
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
            weight_quant=ConstantStepWeight,
            weight_bit_width=bits,
            **brevitas_options("ConstantStepConv2d", quant),
        )
        self.bits = bits

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(21)
        x = torch.randn(3, 4, 7, 5)
        modules = [
            ConstantStepConv2d(4, 6, 3, padding=1, bits=2),
            ConstantStepConv2d(4, 4, (3, 1), groups=4, bits=5, bias=True),
            ConstantStepConv2d(4, 3, 1, bits=8),
        ]
        return [(nn.Sequential(HalfWave(3), m), x) for m in modules]
