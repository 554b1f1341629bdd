from __future__ import annotations

import math

import torch
from brevitas.nn import QuantReLU
from torch import nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import UintActLearnedLog2Scale
from quantlib.quantizers.functions import Gradient


class LearnedScaleReLU(Layer, QuantReLU):
    """Unsigned activation whose scale is learned in the log2 domain, per tensor or per channel.

    Forward:   S = max(2^v, 2e-16), s = S / (2^bits - 1), y = clip(rne(relu(x) / s), 0, 2^bits - 1) * s; the largest value is S
    Gradient:  inside 0 <= x / s <= 2^bits - 1: dx = g, ds = g (code - x / s); above: dx = 0, ds = g (2^bits - 1); dv = ds * s * ln 2.
               gradient="brevitas" lets half a step more count as inside (`quantlib.quantizers.learned_scale`)
    Shapes:    x and y (N, C, ...); v () or, with channels=C, (1, C, 1, 1)
    Ranges:    codes 0..2^bits - 1
    Arguments: bits; init, the first S; channels for one scale per channel (before a depthwise convolution); gradient
    State:     `act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value`, log2 of S
    Source:    MicroNet 2019 submission of quantised ProxylessNAS, QuantReLU with max_val 6

    >>> LearnedScaleReLU(bits=2, init=3.0)(torch.tensor([-1.0, 1.4, 2.6, 9.0])).round().tolist()
    [0.0, 1.0, 3.0, 3.0]
    """

    def __init__(
        self,
        bits: int = 8,
        init: float = 6.0,
        channels: int | None = None,
        gradient: Gradient = "2019",
        return_quant_tensor: bool = False,
    ) -> None:
        if not 0 < init < math.inf:
            raise ValueError(f"the first range of a learned scale is positive and finite, got init={init}")
        shape = {} if channels is None else {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (1, channels, 1, 1)}
        super().__init__(
            act_quant=UintActLearnedLog2Scale,
            bit_width=bits,
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
        torch.manual_seed(8)
        x = 4 * torch.randn(3, 5, 3, 7)
        per_channel = LearnedScaleReLU(5, channels=5)
        with torch.no_grad():
            next(per_channel.parameters()).add_(torch.randn(1, 5, 1, 1))
        return [(LearnedScaleReLU(4), x), (nn.Sequential(FixedPoint(9, 4), per_channel), x), (LearnedScaleReLU(2, gradient="brevitas"), x)]
