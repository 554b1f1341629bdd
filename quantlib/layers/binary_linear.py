from __future__ import annotations

from typing import Any

import torch
from brevitas.nn import QuantLinear
from torch import nn

from quantlib.layers._base import DirectWeights, Example, Layer, brevitas_options
from quantlib.layers.fixed_point import FixedPoint
from quantlib.quantizers import BinaryWeight


class BinaryLinear(Layer, DirectWeights, QuantLinear):
    """Matrix product with weights in {-1, +1} and no scaling factor.

    Forward:   y = x sgn(weight)^T + bias
    Gradient:  through the sign: 1 where |weight| <= clip, else 0
    Shapes:    x (N, in_features), weight (out_features, in_features), y (N, out_features)
    Arguments: as torch.nn.Linear, without bias unless asked; clip, sign_of_zero, real_weights as in BinaryConv2d
    State:     `weight` (and `bias`)
    Source:    as BinaryConv2d: FracBNN (arXiv 2012.12206), `FastSign` on the weights

    >>> sorted(set(BinaryLinear(4, 3)(torch.eye(4)).abs().flatten().tolist()))
    [1.0]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        clip: float = 1.3,
        sign_of_zero: float = 0.0,
        real_weights: bool = False,
        **quant: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            weight_quant=BinaryWeight,
            weight_sign_clip=clip,
            weight_sign_of_zero=sign_of_zero,
            **brevitas_options("BinaryLinear", quant),
        )
        self.real_weights = real_weights

    @property
    def real_weights(self) -> bool:
        return bool(self.weight_quant.disable_quant)

    @real_weights.setter
    def real_weights(self, real: bool) -> None:
        self.weight_quant.disable_quant = bool(real)

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(2)
        x = torch.randn(5, 11)
        return [(nn.Sequential(FixedPoint(5, 2), m), x) for m in (BinaryLinear(11, 3), BinaryLinear(11, 7, bias=True))]
