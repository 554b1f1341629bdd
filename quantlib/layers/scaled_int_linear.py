from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantLinear
from brevitas.quant import IntBias
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.fixed_point import FixedPoint
from quantlib.layers.learned_scale_relu import LearnedScaleReLU
from quantlib.quantizers import NarrowIntWeightPerChannelMaxAbs, NarrowIntWeightPerTensorMaxAbs


class ScaledIntLinear(Layer, DirectWeights, QuantLinear):
    """Matrix product whose weights are narrow-range integers times a scale, per output or per tensor.

    Forward:   as ScaledIntConv2d with y = x W^T + bias
    Gradient:  as ScaledIntConv2d; with bias_bits, straight through the bias inside its range, 0 outside
    Shapes:    x (N, in_features), weight (out_features, in_features), y (N, out_features)
    Ranges:    weight codes -q..q, q = 2^(bits-1) - 1; with bias_bits the bias is rounded to the accumulator's scale s_x * s_w and clipped
               to -2^(bias_bits-1)..2^(bias_bits-1) - 1: the input must then be a quantized tensor (return_quant_tensor=True before)
    State:     `weight` and `bias`
    Source:    MicroNet 2019 submission of quantised ProxylessNAS: 4 bits, one scale, bias at the accumulator's width

    >>> layer = ScaledIntLinear(4, 3, bits=4, per_channel=False)
    >>> layer.quant_weight().scale.shape
    torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        per_channel: bool = True,
        bias_bits: int | None = None,
        **quant: Any,
    ) -> None:
        if bias_bits is not None:
            quant |= {"bias_quant": IntBias, "bias_bit_width": bias_bits}
        super().__init__(
            in_features,
            out_features,
            bias,
            weight_quant=NarrowIntWeightPerChannelMaxAbs if per_channel else NarrowIntWeightPerTensorMaxAbs,
            weight_bit_width=bits,
            **brevitas_options("ScaledIntLinear", quant),
        )

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(7)
        x = torch.randn(5, 11)
        rounded = nn.Sequential(
            LearnedScaleReLU(4, return_quant_tensor=True), ScaledIntLinear(11, 3, bits=4, per_channel=False, bias_bits=12)
        )
        modules = [ScaledIntLinear(11, 3, bits=4), ScaledIntLinear(11, 2, bias=False, bits=3, per_channel=False)]
        return [(rounded, x), *((nn.Sequential(FixedPoint(6, 3), m), x) for m in modules)]
