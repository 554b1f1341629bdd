from __future__ import annotations

import torch
from torch import nn

from quantlib.layers._base import Example, Layer
from quantlib.layers._weight_bits import WeightBitsConv2d
from quantlib.layers.dorefa_activation import DorefaActivation
from quantlib.quantizers import DorefaWeight


class DorefaConv2d(Layer, WeightBitsConv2d):
    """Convolution whose weights pass a tanh and lie on multiples of a power of two.

    Forward:   u = tanh(w) / max |tanh(w)|, h = 2^(bits-1), q = clip(rne(u * h), -h, h - 1); y = conv2d(x, q / h) (+ bias)
    Gradient:  straight through rounding and clip, then that of tanh and of the maximum (`quantlib.quantizers.dorefa_weight`)
    Shapes:    x (N, Cin, H, W), weight (Cout, Cin / groups, kh, kw), y (N, Cout, H', W')
    Ranges:    weight codes -2^(bits-1)..2^(bits-1) - 1, bits from 2 to 8
    Arguments: as torch.nn.Conv2d, without bias unless asked; bits
    State:     `weight` (and `bias`), as a plain convolution
    Source:    DoReFa-Net (arXiv 1606.06160), as in the older networks of DeepBurning-MixQ

    >>> DorefaConv2d(2, 3, 3, bits=4).quant_weight().scale.item()
    0.125
    """

    weights = DorefaWeight

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(23)
        x = torch.randn(3, 4, 7, 5)
        modules = [DorefaConv2d(4, 6, 3, padding=1, bits=4), DorefaConv2d(4, 2, 1, groups=2, bias=True, bits=8)]
        return [(nn.Sequential(DorefaActivation(4), m), x) for m in modules]
