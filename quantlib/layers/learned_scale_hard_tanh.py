from __future__ import annotations

import math

import torch
from brevitas.nn import QuantHardTanh
from torch import nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import IntActLearnedLog2Scale
from quantlib.quantizers.functions import Gradient


class LearnedScaleHardTanh(Layer, QuantHardTanh):
    """Signed activation whose scale is learned in the log2 domain; the clip moves with the scale.

    Forward:   S = max(2^v, 2e-16), s = S / 2^(bits-1), y = clip(rne(x / s), -2^(bits-1), 2^(bits-1) - 1) * s
    Gradient:  inside -2^(bits-1) <= x / s <= 2^(bits-1) - 1: dx = g, ds = g (code - x / s); outside: dx = 0, ds = g * (nearest end);
               dv = ds * s * ln 2. gradient="brevitas" lets half a step more count as inside
    Shapes:    x and y (N, C, ...); v () or, with channels=C, (1, C, 1, 1)
    Ranges:    codes -2^(bits-1)..2^(bits-1) - 1 (not narrow: the largest value is below S)
    Arguments: bits; init, the first S; channels; gradient
    State:     `act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value`, log2 of S
    Source:    MicroNet 2019 submission of quantised ProxylessNAS, QuantHardTanh with threshold 10

    >>> LearnedScaleHardTanh(bits=3, init=4.0)(torch.tensor([-9.0, -1.4, 0.6, 9.0])).tolist()
    [-4.0, -1.0, 1.0, 3.0]
    """

    def __init__(
        self,
        bits: int = 8,
        init: float = 10.0,
        channels: int | None = None,
        gradient: Gradient = "2019",
        return_quant_tensor: bool = False,
    ) -> None:
        if not 0 < init < math.inf:
            raise ValueError(f"the first range of a learned scale is positive and finite, got init={init}")
        shape = {} if channels is None else {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (1, channels, 1, 1)}
        super().__init__(
            act_quant=IntActLearnedLog2Scale,
            bit_width=bits,
            min_val=-init,
            max_val=init,
            scale_gradient=gradient,
            return_quant_tensor=return_quant_tensor,
            **shape,
        )
        self.bits, self.channels = bits, channels

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channels={self.channels}"

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(9)
        x = 8 * torch.randn(3, 5, 3, 7)
        per_channel = nn.Sequential(FixedPoint(9, 4), LearnedScaleHardTanh(3, channels=5, gradient="brevitas"))
        return [(LearnedScaleHardTanh(4), x), (per_channel, x)]
