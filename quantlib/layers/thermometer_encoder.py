from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers._base import Example, Layer
from quantlib.ops.thermometer import Thermometer
from quantlib.tails import Map


class ThermometerEncoder(Layer, nn.Module):
    """Image to {-1, +1} planes: bit b of a pixel is +1 if b < level.

    Forward:   level = rne(x * 255 / resolution), always computed in float32; y[:, c * B + b] = +1 if b < level else -1
    Gradient:  none flows to the input
    Shapes:    x (N, C, H, W) -> y (N, C * B, H, W), B = round(255 / resolution): 32 planes per colour, lowest first, for 8
    Ranges:    x in [0, 1], pixel / 255, or uint8 pixels (then y is float32). Ties go to the even level: with resolution 8,
               pixel 4 has level 0, pixel 12 level 2
    State:     none
    Source:    FracBNN (arXiv 2012.12206), `InputEncoder`

    >>> ThermometerEncoder(64)(torch.full((1, 1, 1, 1), 100 / 255)).flatten().tolist()
    [1.0, 1.0, -1.0, -1.0]
    """

    out_bits = 1

    def __init__(self, resolution: int = 8) -> None:
        super().__init__()
        self.resolution = resolution
        self.planes = round(255 / resolution)

    def level(self, x: Tensor) -> Tensor:
        """Number of planes that are +1, before clipping to 0..planes, as float32 integers."""
        return ((x.detach().float() * 255) / self.resolution).round_()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float() / 255
        half_steps = torch.arange(
            1, 2 * self.planes, 2, dtype=torch.float32, device=x.device
        )  # 2 level - (2b + 1) is odd: its sign is the bit
        level = self.level(x).mul_(2)
        if x.is_contiguous(memory_format=torch.channels_last):
            return (level.permute(0, 2, 3, 1).unsqueeze(-1) - half_steps).clamp_(-1, 1).flatten(3).permute(0, 3, 1, 2).to(x.dtype)
        return (level.unsqueeze(2) - half_steps.reshape(-1, 1, 1)).clamp_(-1, 1).flatten(1, 2).to(x.dtype)

    def lower(self, g: Any, x: Any) -> Any:
        edge = x if isinstance(x, Map) else g.integer(x)
        if isinstance(edge, Map) or np.asarray(edge.type.scale).size > 1:  # real values, or one scale per channel: levels first
            edge = g.quantize(lambda t: self.level(t).clamp_(0, self.planes).to(t.dtype), edge, Grid(0, self.planes, 1.0))
            return g.add(Thermometer(np.arange(1, self.planes + 1)[None, :]), edge, scale=1.0)
        codes = np.arange(edge.type.lo, edge.type.hi + 1, edge.type.step)
        level = self.level(torch.from_numpy(codes * float(edge.type.scale))).numpy()
        after = np.append(codes, codes[-1] + edge.type.step)
        thresholds = [
            after[np.searchsorted(level, plane, side="right")] for plane in range(self.planes)
        ]  # the first code with level > plane
        return g.add(Thermometer(np.array([thresholds])), edge, scale=1.0)

    def input_grid(self) -> Grid:
        """Raw image codes: 0..255 of scale 1/255."""
        return Grid(0, 255, 1 / 255)

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}"

    @staticmethod
    def examples() -> list[Example]:
        ramp = torch.arange(2 * 3 * 8 * 16).remainder(256).reshape(2, 3, 8, 16) / 255
        return [(ThermometerEncoder(r), ramp) for r in (4, 8, 16, 32)]
