from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers._base import Example, Layer
from quantlib.quantizers import image_floor
from quantlib.quantizers.constant_steps import REAL, WEIGHT_STEPS


class ImageFloor(Layer, nn.Module):
    """The leading bits of 8-bit pixels, in front of the first convolution.

    Forward:   y = floor(x * 2^bits) / 2^bits, without a clip; bits=32: x itself
    Gradient:  0 (32 bits: dx = dy)
    Shapes:    any
    Ranges:    x = pixel / 256; codes 0..2^bits - 1, that is pixel >> (8 - bits). The graph's input are the pixels 0..255, of scale 1/256
    State:     none
    Errors:    ValueError for another bit width than 1..8 or 32
    Source:    DeepBurning-MixQ (arXiv 2308.11334), image quantizer (`quantlib.quantizers.image_floor`)

    >>> ImageFloor(3)(torch.tensor([31 / 256, 32 / 256, 255 / 256])).tolist()
    [0.0, 0.125, 0.875]
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if bits not in WEIGHT_STEPS and bits != REAL:
            raise ValueError(f"an image keeps 1 to 8 bits, or 32 for all of them, got {bits}")
        self.bits = int(bits)

    def forward(self, x: Tensor) -> Tensor:
        return image_floor(x, self.bits)

    def lower(self, g: Any, x: Any) -> Any:
        edge = g.integer(x)
        pixels = edge.type.scale.size == 1 and float(edge.type.scale.reshape(-1)[0]) == 1 / 256
        if self.bits == REAL or (pixels and self.bits == 8):
            return edge
        ends = torch.tensor([edge.type.lo, edge.type.hi], dtype=torch.float64) * float(edge.type.scale.max())
        low, high = (image_floor(ends, self.bits) * 2**self.bits).long().tolist()
        return g.quantize(self, edge, Grid(low, high, 2.0**-self.bits), uniform=True)

    @property
    def out_bits(self) -> int:
        """Bits of the codes it gives."""
        return min(self.bits, 8)

    def input_grid(self) -> Grid:
        """Raw pixels: 0..255 of scale 1/256."""
        return Grid(0, 255, 1 / 256)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    @staticmethod
    def examples() -> list[Example]:
        ramp = torch.arange(2 * 3 * 8 * 16).remainder(256).reshape(2, 3, 8, 16) / 256
        return [(ImageFloor(bits), ramp) for bits in (1, 5, 8)]
