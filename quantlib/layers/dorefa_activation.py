from __future__ import annotations

import torch
from brevitas.nn import QuantIdentity

from quantlib.layers._base import Example, Layer
from quantlib.quantizers import DorefaAct


class DorefaActivation(Layer, QuantIdentity):
    """Unsigned activation on multiples of 2^-bits; it includes the ReLU.

    Forward:   y = min(rne(clip(x, 0, 1) * 2^bits), 2^bits - 1) / 2^bits
    Gradient:  dx = dy where 0 < x < 1, else 0
    Shapes:    any
    Ranges:    codes 0..2^bits - 1, bits from 1 to 8
    State:     none
    Source:    DoReFa-Net (arXiv 1606.06160), as in the older networks of DeepBurning-MixQ (`quantlib.quantizers.dorefa_activation`)

    >>> DorefaActivation(2)(torch.tensor([-1.0, 0.3, 2.0])).tolist()
    [0.0, 0.25, 0.75]
    """

    def __init__(self, bits: int = 4, return_quant_tensor: bool = False) -> None:
        super().__init__(act_quant=DorefaAct, bit_width=bits, return_quant_tensor=return_quant_tensor)
        self.bits = bits

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    @staticmethod
    def examples() -> list[Example]:
        x = torch.linspace(-0.2, 1.2, 3 * 5 * 7 * 3).reshape(3, 5, 7, 3)
        return [(DorefaActivation(bits), x) for bits in (1, 4, 8)]
