from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantLinear
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import TanhClassifierBias, TanhClassifierWeight


class TanhLinear(Layer, DirectWeights, QuantLinear):
    """Classifier whose weights and bias go through tanh onto a grid of 1 / (2^bits - 1), each with its own largest magnitude.

    Forward:   as TanhConv2d up to the code; y = x W^T + b with W and b (code - 2^(bits-1) - 1) / n; offset=False: (code - 2^(bits-1)) / n.
               bits=32: raw weights and bias
    Gradient:  straight through the rounding, exact elsewhere, the maximum included (`quantlib.quantizers.tanh_classifier`)
    Shapes:    x (N, in_features), weight (out_features, in_features), y (N, out_features)
    Ranges:    weight codes -2^(bits-1) - 1..2^(bits-1) - 2, which take bits + 1 bits; offset=False: -2^(bits-1)..2^(bits-1) - 1. Either
               way the differences between the logits of an image are the same
    Arguments: bits 1 to 24, or 32 for real weights, which do not convert to integers
    State:     `weight` and `bias`
    Source:    DiracDeltaNet (arXiv 1811.08634), published code; there the offset is part of the arithmetic

    >>> layer = TanhLinear(4, 3, bits=8)
    >>> int((255 * layer.quant_weight().value).round().abs().max()) in (126, 129)
    True
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, bits: int = 8, offset: bool = True, **quant: Any) -> None:
        quant = brevitas_options("TanhLinear", quant)
        if bits != 32:
            quant |= {"weight_bit_width": bits, "weight_code_offset": offset}
            quant |= {"bias_quant": TanhClassifierBias, "bias_bit_width": bits, "bias_code_offset": offset}
        super().__init__(in_features, out_features, bias, weight_quant=None if bits == 32 else TanhClassifierWeight, **quant)
        self.bits, self.offset = bits, offset

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(12)
        x = torch.randn(5, 11)
        modules = [TanhLinear(11, 3), TanhLinear(11, 3, bits=4, offset=False), TanhLinear(11, 2, bias=False, bits=1)]
        return [(nn.Sequential(FixedPoint(6, 3), m), x) for m in modules]
