from __future__ import annotations

import torch
from brevitas.nn import QuantIdentity

from quantlib.layers._base import Example, Layer
from quantlib.quantizers import QuantSignAct


class QuantSign(Layer, QuantIdentity):
    """k-bit symmetric activation without zero.

    Forward:   y = rne((clamp(x, -1, 1) + 1) / d) * d - 1, d = 2 / (2^bits - 1)
    Gradient:  dx = dy where -1 < x < 1, else 0
    Shapes:    any
    Ranges:    2^bits levels -1, -1 + d, ..., 1; as a quantized tensor scale d, zero point (2^bits - 1) / 2, codes 0..2^bits - 1
    State:     none
    Source:    FracBNN (arXiv 2012.12206), `QuantSign` (`quantlib.quantizers.quant_sign`)

    >>> [round(v, 3) for v in QuantSign(2)(torch.tensor([-2.0, -0.1, 0.0, 0.9])).tolist()]
    [-1.0, -0.333, 0.333, 1.0]
    """

    def __init__(self, bits: int = 2, return_quant_tensor: bool = False) -> None:
        super().__init__(act_quant=QuantSignAct, bit_width=bits, return_quant_tensor=return_quant_tensor)
        self.bits = bits

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    @staticmethod
    def examples() -> list[Example]:
        x = torch.linspace(-1.5, 1.5, 3 * 5 * 7 * 3).reshape(3, 5, 7, 3)
        return [(QuantSign(1), x), (QuantSign(2), x), (QuantSign(4), x)]
