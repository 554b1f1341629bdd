from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.half_wave import HalfWave


class SpaceToDepth(Layer, nn.Module):
    """Each block of neighbouring pixels becomes channels, position by position ("reorg").

    Forward:   y[n, (b * dy + dx) * C + c, i, j] = x[n, c, b * i + dy, b * j + dx], b = block; not the order of torch's pixel_unshuffle
    Gradient:  the inverse rearrangement
    Shapes:    x (N, C, H, W) -> y (N, b * b * C, H / b, W / b)
    Ranges:    those of x
    State:     none
    Errors:    ValueError where H or W is no multiple of the block
    Source:    UltraNet_Bypass and SkyNetBypass of DeepBurning-MixQ (arXiv 2308.11334); reorg of YOLOv2

    >>> SpaceToDepth(2)(torch.arange(8.0).reshape(1, 2, 2, 2)).flatten().tolist()
    [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    """

    moves = True

    def __init__(self, block: int = 2) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b, (n, c, h, w) = self.block, x.shape
        if h % b or w % b:
            raise ValueError(f"SpaceToDepth({b}): a map of {h}x{w} does not divide into blocks of {b}x{b}")
        y = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, b * b * c, h // b, w // b)
        return y.contiguous(memory_format=torch.channels_last) if x.is_contiguous(memory_format=torch.channels_last) else y

    def lower(self, g: Any, x: Any) -> Any:
        return g.rearrange(lambda t: [self.forward(t)], x)[0]

    def extra_repr(self) -> str:
        return f"block={self.block}"

    @staticmethod
    def examples() -> list[Example]:
        x = torch.linspace(-0.5, 3, 2 * 3 * 6 * 12).reshape(2, 3, 6, 12)
        modules = [
            nn.Sequential(HalfWave(3), SpaceToDepth(2)),
            nn.Sequential(HalfWave(2), SpaceToDepth(3)),
            nn.Sequential(SpaceToDepth(2), HalfWave(4)),
        ]
        return [(m, x) for m in modules]
