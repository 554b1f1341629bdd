from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.divided_clip import DividedClip
from quantlib.ops.concat import Concat


class ShiftShuffle(Layer, nn.Module):
    """Two branches joined along the channels, then rotated by a quarter: the channel shuffle that costs only addresses.

    Forward:   t = cat(first, second) of C channels, cut = floor(3 C / 4); y = cat(t[cut:], t[:cut])
    Gradient:  the inverse rotation, split
    Shapes:    first (N, C1, H, W), second (N, C2, H, W), y (N, C1 + C2, H, W)
    State:     none
    Source:    DiracDeltaNet (arXiv 1811.08634), published code. ShuffleNetV2's interleaving of two halves is torch.nn.ChannelShuffle(2)

    >>> first, second = torch.arange(4.0).reshape(1, 4, 1, 1), torch.arange(4.0, 8).reshape(1, 4, 1, 1)
    >>> ShiftShuffle()(first, second).flatten().tolist()
    [6.0, 7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    moves = True

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        cut = self._cut(first.shape[1], second.shape[1])
        rest = max(cut - first.shape[1], 0)
        parts = (first[:, cut:], second[:, rest:], first[:, :cut], second[:, :rest])
        return torch.cat([p for p in parts if p.shape[1]], 1)  # an empty part would lose the layout

    @staticmethod
    def _cut(first: int, second: int) -> int:
        return 3 * (first + second) // 4

    def lower(self, g: Any, first: Any, second: Any) -> Any:
        joined = g.add(Concat(), g.integer(first), g.integer(second))
        cut, channels = self._cut(*(g.shape(x)[0] for x in (first, second))), joined.shape[0]
        return g.rearrange(lambda t: [torch.roll(t, channels - cut, 1)], joined)[0]

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(16)

        class Halves(nn.Module):
            """The two halves of a quantized map, joined again."""

            def __init__(self) -> None:
                super().__init__()
                self.act, self.shuffle = DividedClip(3), ShiftShuffle()

            def forward(self, x: Tensor) -> Tensor:
                x = self.act(x)
                half = x.shape[1] // 2
                return self.shuffle(x[:, :half], x[:, half:])

        return [(Halves(), torch.randn(3, c, 4, 5)) for c in (8, 7, 2)]
