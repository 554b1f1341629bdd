from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers._base import Example, Layer
from quantlib.quantizers import fixed_point
from quantlib.quantizers.functions import ROUNDINGS, Rounding


class FixedPoint(Layer, nn.Module):
    """A fixed-point grid stated in the model, so that training sees it: where real values join, or where a datapath keeps few bits.

    Forward:   n = R(x * 2^fraction), y = n * 2^-fraction
    Gradient:  dx = dy inside the word, 0 outside; without saturation dx = dy
    Shapes:    any
    Ranges:    n in -2^(bits-1)..2^(bits-1) - 1. Values outside go to the nearest end (saturation) or wrap modulo 2^bits
    Arguments: rounding: "half_up" (ties towards +infinity), "half_even", "floor", "to_zero"
    State:     none; one object may be used at many places
    Errors:    ValueError for an unknown rounding and for fewer than 2 or more than 32 bits
    Source:    `quantlib.quantizers.fixed_point`; ap_fixed<bits, bits - fraction, ...> of the HLS tools

    >>> FixedPoint(8, 2)(torch.tensor([0.125, -0.125, 99.0])).tolist()
    [0.25, 0.0, 31.75]
    >>> FixedPoint(16, 7).R(torch.tensor([3, -3]), 1).tolist()
    [2, -1]
    """

    def __init__(self, bits: int, fraction: int, rounding: Rounding = "half_up", saturation: bool = True) -> None:
        super().__init__()
        if not 2 <= bits <= 32:
            raise ValueError(f"a fixed-point word has 2 to 32 bits, got {bits}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        self.bits, self.fraction, self.rounding, self.saturation = int(bits), int(fraction), rounding, bool(saturation)

    @property
    def lo(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def hi(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def out_bits(self) -> int:
        return self.bits

    @property
    def grid(self) -> Grid:
        return Grid(self.lo, self.hi, 2.0**-self.fraction)

    def forward(self, x: Tensor) -> Tensor:
        return fixed_point(x, self.bits, self.fraction, self.rounding, self.saturation)

    def lower(self, g: Any, x: Any) -> Any:
        return g.quantize(self, x, self.grid, monotone=self.saturation, uniform=True)

    def R(self, v: Tensor, shift: int) -> Tensor:
        """v / 2^shift rounded and brought into the word, on integer tensors; shift 0 only saturates (or wraps)."""
        if v.is_floating_point():
            raise TypeError(f"R takes integer tensors, got {v.dtype}; real numbers go through the layer itself")
        if shift:
            half = 1 << (shift - 1)
            if self.rounding == "half_up":
                v = (v + half) >> shift
            elif self.rounding == "half_even":
                v = (v + half - 1 + ((v >> shift) & 1)) >> shift
            elif self.rounding == "to_zero":
                v = torch.where(v < 0, -((-v) >> shift), v >> shift)
            else:
                v = v >> shift
        return v.clamp(self.lo, self.hi) if self.saturation else ((v - self.lo) & (2**self.bits - 1)) + self.lo

    def extra_repr(self) -> str:
        return f"bits={self.bits}, fraction={self.fraction}, rounding={self.rounding}, saturation={self.saturation}"

    @staticmethod
    def examples() -> list[Example]:
        x = torch.arange(-150, 150).reshape(4, 5, 3, 5) / 8
        modules: list[nn.Module] = [FixedPoint(6, 1, rounding) for rounding in ("half_up", "half_even", "floor", "to_zero")]
        return [(m, x) for m in [*modules, nn.Sequential(FixedPoint(8, 3), FixedPoint(5, 2, saturation=False))]]
