from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import TanhWeight


class TanhConv2d(Layer, DirectWeights, QuantConv2d):
    """Convolution whose weights go through tanh onto two's-complement fractions, one scale for the tensor.

    Forward:   t = tanh(w), m = max |t|, n = 2^bits - 1; code = rne((t / 2m + 1/2) n); y = conv2d(x, (code - 2^(bits-1)) / 2^(bits-1)).
               bits=32: the raw weights
    Gradient:  straight through the rounding, exact elsewhere, the maximum included (`quantlib.quantizers.tanh_weight`)
    Shapes:    x (N, Cin, H, W), weight (Cout, Cin / groups, kh, kw), y (N, Cout, H', W')
    Ranges:    weight codes -2^(bits-1)..2^(bits-1) - 1 over 2^(bits-1): 1 bit gives {-1, 0}, with signs=True {-1, +1}
    Arguments: as torch.nn.Conv2d, without bias unless asked; bits 1 to 24, or 32 for real weights, which do not convert to integers
    State:     `weight` (and `bias`), as a plain convolution
    Source:    DiracDeltaNet (arXiv 1811.08634), published code

    >>> conv = TanhConv2d(2, 3, 1, bits=1)
    >>> set(conv.quant_weight().value.flatten().tolist()) <= {-1.0, 0.0}
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
        signs: bool = False,
        **quant: Any,
    ) -> None:
        quant = brevitas_options("TanhConv2d", quant)
        if bits != 32:
            quant |= {"weight_bit_width": bits, "weight_tanh_signs": signs and bits == 1}
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            weight_quant=None if bits == 32 else TanhWeight,
            **quant,
        )
        self.bits = bits

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(11)
        x = torch.randn(3, 4, 7, 5)
        modules = [
            TanhConv2d(4, 6, 1, bits=4),
            TanhConv2d(4, 5, 3, padding=1, bits=1),
            TanhConv2d(4, 4, (3, 1), stride=(2, 1), groups=2, bias=True, bits=1, signs=True),
            TanhConv2d(4, 2, 1, bits=8),
        ]
        return [(nn.Sequential(FixedPoint(6, 3), m), x) for m in modules]
