from __future__ import annotations

import torch
from brevitas.nn import QuantIdentity

from quantlib.layers._base import Example, Layer
from quantlib.quantizers import HalfWaveAct


class HalfWave(Layer, QuantIdentity):
    """Unsigned activation with a constant step; it includes the ReLU.

    Forward:   h = HALF_WAVE_STEPS[bits], y = rne(clip(x, 0, h * (2^bits - 1)) / h) * h
    Gradient:  dx = dy where 0 < x < h * (2^bits - 1), else 0
    Shapes:    any
    Ranges:    codes 0..2^bits - 1, bits from 1 to 8
    State:     none
    Source:    DeepBurning-MixQ (arXiv 2308.11334), after HWGQ (`quantlib.quantizers.half_wave`)

    >>> HalfWave(2)(torch.tensor([-1.0, 0.4, 9.0])).div(0.538).round().tolist()
    [0.0, 1.0, 3.0]
    """

    def __init__(self, bits: int = 4, return_quant_tensor: bool = False) -> None:
        super().__init__(act_quant=HalfWaveAct, bit_width=bits, return_quant_tensor=return_quant_tensor)
        self.bits = bits

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    @staticmethod
    def examples() -> list[Example]:
        x = torch.linspace(-0.5, 5.5, 3 * 5 * 7 * 3).reshape(3, 5, 7, 3)
        return [(HalfWave(bits), x) for bits in (1, 4, 8)]
