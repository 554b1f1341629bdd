from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantLinear
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.half_wave import HalfWave
from quantlib.quantizers import ConstantStepWeight


class ConstantStepLinear(Layer, DirectWeights, QuantLinear):
    """Matrix product whose weights lie on a grid of a constant times their standard deviation.

    Forward:   as ConstantStepConv2d with y = x W^T + bias
    Gradient:  as ConstantStepConv2d
    Shapes:    x (N, in_features), weight (out_features, in_features), y (N, out_features)
    Ranges:    weight codes -2^(bits-1)..2^(bits-1) - 1, bits from 1 to 8
    State:     `weight` and `bias`
    Source:    DeepBurning-MixQ (arXiv 2308.11334), last layer of VGGtiny, 8 bits

    >>> ConstantStepLinear(4, 3, bits=8).quant_weight().scale.shape
    torch.Size([])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, bits: int = 8, **quant: Any) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            weight_quant=ConstantStepWeight,
            weight_bit_width=bits,
            **brevitas_options("ConstantStepLinear", quant),
        )
        self.bits = bits

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(22)
        x = torch.randn(5, 11)
        return [(nn.Sequential(HalfWave(8), m), x) for m in (ConstantStepLinear(11, 3), ConstantStepLinear(11, 2, False, bits=2))]
