from __future__ import annotations

import torch
from torch import nn

from quantlib.layers._base import Example, Layer
from quantlib.layers._weight_bits import WeightBitsConv2d
from quantlib.layers.half_wave import HalfWave
from quantlib.quantizers import ConstantStepWeight


class ConstantStepConv2d(Layer, WeightBitsConv2d):
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

    weights = ConstantStepWeight

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
