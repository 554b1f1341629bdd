"""SumPool: the sum of a window; an average whose divisor lives in the scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantlib.cost import Cost, Geometry, adder, adder_tree, loop, memory, windowed
from quantlib.hls.call import Call, Folds
from quantlib.hls.pool import pool_call, whole_map
from quantlib.hls.window import taps_of
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import channel_scale, lattice, stride_of
from quantlib.ops._window import check_window, out_shape, pad_value, pair, quad, taps_inside

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class SumPool(Op):
    """y[c, r, q] = sum over u, v of x[c, r*sh - t + u, q*sw - l + v]; taps outside the image add 0.

    x (C, H, W) -> y (C, H', W'), H' = floor((H + t + b - kh) / sh) + 1; interval: the number of taps inside times the input's. Global
    pooling is kernel = (H, W). padding is (t, b, l, r). GraphError when the window does not fit.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kernel", pair(self.kernel))
        object.__setattr__(self, "stride", pair(self.stride))
        object.__setattr__(self, "padding", quad(self.padding))
        check_window(self, self.kernel, self.stride, self.padding, (1, 1))

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        shape = out_shape(self, x[0], x[0].shape[0], self.kernel, self.stride, self.padding)
        rows, cols = (taps_inside(x[0].shape[1 + a], shape[1 + a], self.kernel[a], self.stride[a], self.padding[2 * a]) for a in (0, 1))
        few, many = int(rows.min() * cols.min()), int(rows.max() * cols.max())
        lo, hi = min(few * x[0].lo, many * x[0].lo), max(few * x[0].hi, many * x[0].hi)
        scale = channel_scale(x[0])
        return IntType(shape, lo, hi, scale, lattice(lo, hi, stride_of(x[0]), 0 if few == many else x[0].lo))

    def evaluate(self, *x: Tensor) -> Tensor:
        v = pad_value(x[0], self.padding, 0)
        if tuple(v.shape[2:]) == self.kernel:
            return v.sum((2, 3), keepdim=True)
        total = None
        rows, cols = ((v.shape[2 + a] - self.kernel[a]) // self.stride[a] + 1 for a in (0, 1))
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                tap = v[:, :, i : i + rows * self.stride[0] : self.stride[0], j : j + cols * self.stride[1] : self.stride[1]]
                tap = tap[:, :, :rows, :cols]
                total = tap.clone() if total is None else total.add_(tap)
        assert total is not None
        return total

    def magnitude(self, *x: IntType) -> int:
        return self.kernel[0] * self.kernel[1] * x[0].magnitude

    @property
    def window(self) -> Geometry:
        """(kernel, stride, padding, dilation)"""
        return self.kernel, self.stride, self.padding, (1, 1)

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        return Folds(y.shape[0], taps=(1,) if whole_map(x[0], y, self.window) else taps_of(self.kernel))

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """Window, then taps of pe channels per cycle: OH*OW * (C/pe) * kh*kw/taps iterations per image; over the whole map H*W*C/pe."""
        return pool_call("sum_pool.hpp", "ql::Sum", x[0], y, self.legal(x, y, folding), self.window, 0, self.magnitude(*x))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """An adder per lane and tap, behind the windows of the image; over the whole map a running sum per channel."""
        if whole_map(x[0], y, self.window):
            unit = adder(y.bits) + memory(y.shape[0] // folding.pe, y.bits)
            return loop(x[0].numel // folding.pe, folding.pe * y.bits) + unit.times(folding.pe)
        return windowed(x[0], y, self.window, folding, adder_tree(folding.taps, x[0].bits) + adder(y.bits))

    @classmethod
    def examples(cls) -> list[Example]:
        x = IntType((3, 7, 8), -128, 127)
        return [
            (cls((2, 2), (2, 2)), (x,)),
            (cls((3, 3), (2, 1), (1, 1, 0, 2)), (x,)),
            (cls((4, 5), (4, 5)), (IntType((6, 4, 5), -3, 3, 1.0, 2),)),
            (cls((2, 2), (1, 2), (1, 0, 1, 0)), (IntType((5, 3, 3), -3, 3, 1.0, 2),)),
            (cls((3, 1), (1, 1)), (IntType((1, 3, 3), 2, 5),)),
        ]
