from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import NarrowIntWeightPerChannelMaxAbs, NarrowIntWeightPerTensorMaxAbs


class ScaledIntConv2d(Layer, DirectWeights, QuantConv2d):
    """Convolution whose weights are narrow-range integers times a scale, the largest magnitude of each output channel.

    Forward:   q = 2^(bits-1) - 1; s_c = max(max |w_c|, 2e-16) / q; y = conv2d(x, clip(rne(w / s), -q, q) * s) (+ bias)
    Gradient:  straight through rounding and clip, and through the scale to the largest element of each channel
               (`quantlib.quantizers.max_abs`)
    Shapes:    x (N, Cin, H, W), weight (Cout, Cin / groups, kh, kw), y (N, Cout, H', W')
    Ranges:    weight codes -q..q, bits from 2 to 8
    Arguments: as torch.nn.Conv2d, without bias unless asked; bits; per_channel=False: one scale for the tensor
    State:     `weight` (and `bias`), as a plain convolution
    Source:    MicroNet 2019 submission of quantised ProxylessNAS; Brevitas Int8WeightPerChannelFloat with scaling_min_val=2e-16

    >>> conv = ScaledIntConv2d(2, 3, 3, bits=4)
    >>> quantized = conv.quant_weight()
    >>> int((quantized.value / quantized.scale).round().abs().max())
    7
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
        bits: int = 8,
        per_channel: bool = True,
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
            weight_quant=NarrowIntWeightPerChannelMaxAbs if per_channel else NarrowIntWeightPerTensorMaxAbs,
            weight_bit_width=bits,
            **brevitas_options("ScaledIntConv2d", quant),
        )

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(6)
        x = torch.randn(3, 4, 7, 5)
        modules = [
            ScaledIntConv2d(4, 6, 3, padding=1, bits=4),
            ScaledIntConv2d(4, 4, (3, 1), stride=(2, 1), groups=4, bits=5, bias=True),
            ScaledIntConv2d(4, 3, 1, bits=8, per_channel=False),
        ]
        return [(nn.Sequential(FixedPoint(6, 3), m), x) for m in modules]
