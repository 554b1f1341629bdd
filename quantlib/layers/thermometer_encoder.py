from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers._base import Example, Layer
from quantlib.ops.thermometer import Thermometer


class ThermometerEncoder(Layer, nn.Module):
    """Image to {-1, +1} planes: bit b of a pixel is +1 if b < level.

    Forward:   level = rne(x * 255 / resolution), always computed in float32; y[:, c * B + b] = +1 if b < level else -1
    Gradient:  none flows to the input
    Shapes:    x (N, C, H, W) -> y (N, C * B, H, W), B = round(255 / resolution): 32 planes per colour, lowest first, for 8
    Ranges:    x in [0, 1], pixel / 255. Ties go to the even level: with resolution 8, pixel 4 has level 0, pixel 12 level 2
    State:     none
    Source:    FracBNN (arXiv 2012.12206), `InputEncoder`

    >>> ThermometerEncoder(64)(torch.full((1, 1, 1, 1), 100 / 255)).flatten().tolist()
    [1.0, 1.0, -1.0, -1.0]
    """

    def __init__(self, resolution: int = 8) -> None:
        super().__init__()
        self.resolution = resolution
        self.planes = round(255 / resolution)

    def forward(self, x: Tensor) -> Tensor:
        level = ((x.detach().float() * 255) / self.resolution).round_()
        above = level.unsqueeze(2) - torch.arange(self.planes, dtype=torch.float32, device=x.device).reshape(-1, 1, 1)
        y = above.mul_(2).sub_(1).clamp_(-1, 1).flatten(1, 2)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last) if _channels_last(x) else y.to(x.dtype)

    def lower(self, g: Any, x: Any) -> Any:
        edge = g.integer(x)
        codes = np.arange(edge.type.lo, edge.type.hi + 1, edge.type.step)
        scale = np.asarray(edge.type.scale)
        if scale.size != 1:
            raise ValueError(f"a thermometer encoder reads an image of one scale, got {scale.size} of them")
        planes = self(torch.from_numpy(codes * float(scale.reshape(()))).reshape(-1, 1, 1, 1)).flatten(1) > 0
        below = (~planes).sum(0).numpy()
        if not torch.equal(planes, torch.arange(len(codes))[:, None] >= torch.from_numpy(below)):
            raise ValueError("the thermometer's planes do not rise with the pixel")
        thresholds = np.append(codes, codes[-1] + edge.type.step)[below]
        return g.add(Thermometer(thresholds[None, :]), edge, scale=1.0)

    def input_grid(self) -> Grid:
        """Raw image codes: 0..255 of scale 1/255."""
        return Grid(0, 255, 1 / 255)

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}"

    @staticmethod
    def examples() -> list[Example]:
        ramp = torch.arange(2 * 3 * 8 * 16).remainder(256).reshape(2, 3, 8, 16) / 255
        return [(ThermometerEncoder(r), ramp) for r in (4, 8, 16, 32)]


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
