from __future__ import annotations

import torch
from brevitas.nn import QuantIdentity
from torch import nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import UintActDividedClip


class DividedClip(Layer, QuantIdentity):
    """Activation clipped at a learned a, then divided by it: results lie on {0..n} * R / n whatever a is.

    So all activations with one R and bits share one scale, and may be concatenated or passed on without rescaling.

    Forward:   a = |scale_coef|, u = clip(x, 0, a), n = 2^bits - 1; y = R rne(n u / a) / n; bits=32: y = R u / a. ReLU is part of the clip
    Gradient:  dx = g R / a inside, half at 0 and a, 0 outside; d scale_coef = sign(scale_coef) sum g R ((1 + sign(x - a)) / 2a - u / a^2)
               (`quantlib.quantizers.divided_clip`)
    Shapes:    any
    Ranges:    codes 0..n
    Arguments: bits 1 to 24, or 32 for a clip that rounds nothing and does not convert to integers; output_range R; init, the first
               scale_coef (R unless given)
    State:     `act_quant.fused_activation_quant_proxy.tensor_quant.scale_coef` (1,)
    Source:    DiracDeltaNet (arXiv 1811.08634), published code: R is 2, 6 behind the first convolution, 10 behind the last

    >>> DividedClip(bits=2, output_range=3.0, init=1.5)(torch.tensor([-1.0, 0.4, 1.0, 9.0])).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(self, bits: int = 4, output_range: float = 2.0, init: float | None = None, return_quant_tensor: bool = False) -> None:
        if output_range <= 0 or init == 0:
            raise ValueError(f"output_range is positive and init not 0, got output_range={output_range}, init={init}")
        super().__init__(
            act_quant=UintActDividedClip,
            bit_width=bits,
            output_range=output_range,
            clip_init=output_range if init is None else init,
            return_quant_tensor=return_quant_tensor,
        )
        self.bits, self.output_range = bits, output_range

    @property
    def scale_coef(self) -> nn.Parameter:
        """The learned clip; a is its magnitude."""
        return self.act_quant.fused_activation_quant_proxy.tensor_quant.scale_coef  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"bits={self.bits}, output_range={self.output_range}"

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(13)
        x = 3 * torch.randn(3, 5, 3, 7)
        negative = DividedClip(3, init=-1.75)
        return [
            (DividedClip(4), x),
            (nn.Sequential(FixedPoint(9, 4), DividedClip(8, 6.0)), x),
            (nn.Sequential(FixedPoint(7, 4), negative), x),
        ]
