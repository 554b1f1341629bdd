from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.layers._base import Example
from quantlib.layers.learned_scale_hard_tanh import LearnedScaleHardTanh
from quantlib.layers.scaled_int_conv2d import ScaledIntConv2d


class SharedHardTanh(LearnedScaleHardTanh):
    """One signed quantizer for both addends of a residual join and for their sum, so that the add is an integer add.

    Forward:   as LearnedScaleHardTanh; add(identity, body) = self(identity + self(body)), where `identity` has come through this module.
               In integers clip(code_identity + code_body, lo, hi): the last call only clamps.
    Gradient:  as LearnedScaleHardTanh at each use; the uses sum into the one scale
    Shapes:    x and y (N, C, H, W)
    Ranges:    codes -2^(bits-1)..2^(bits-1) - 1 of one scale everywhere
    State:     that of LearnedScaleHardTanh, once per place that registers the module
    Source:    MicroNet 2019 submission of quantised ProxylessNAS: created at a unit without shortcut, reused by the shortcut units after it

    >>> shared = SharedHardTanh(bits=4, init=8.0)
    >>> shared.add(shared(torch.tensor([6.2])), torch.tensor([4.9])).tolist()
    [7.0]
    """

    def add(self, identity: Any, body: Tensor) -> Any:
        """The residual join. identity: an output of this module (or of an equal-scale one); body: real values before their quantizer."""
        return self(identity + self(body))

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(10)
        return [(SharedHardTanh(4), 8 * torch.randn(3, 5, 3, 7)), (_Residual(), 8 * torch.randn(3, 2, 3, 7))]


class _Residual(nn.Module):
    """The smallest network with a shared join."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.conv = SharedHardTanh(4), ScaledIntConv2d(2, 2, 3, padding=1, bits=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        joined: Tensor = self.shared.add(x, self.conv(x))
        return joined
