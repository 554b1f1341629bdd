"""MaxPool: the greatest integer of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlib.cost import Cost, Geometry, compare, loop, windowed
from quantlib.hls.call import Call, Folds
from quantlib.hls.pool import pool_call, whole_map
from quantlib.hls.window import taps_of
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import channel_scale
from quantlib.ops._window import check_window, out_shape, out_size, pad_value, pair, quad, taps_inside

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class MaxPool(Op):
    """y[c, r, q] = max over u, v of x[c, r*sh - t + u*dh, q*sw - l + v*dw]; taps outside the image are ignored.

    x (C, H, W) -> y (C, H', W') with the same interval; H' = floor((H + t + b - dh*(kh-1) - 1) / sh) + 1, or torch's ceil_mode with `ceil`.
    padding is (t, b, l, r). GraphError when a window would lie wholly outside the image or does not fit.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kernel", pair(self.kernel))
        object.__setattr__(self, "stride", pair(self.stride))
        object.__setattr__(self, "padding", quad(self.padding))
        object.__setattr__(self, "dilation", pair(self.dilation))
        check_window(self, self.kernel, self.stride, self.padding, self.dilation)

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        shape = out_shape(self, x[0], x[0].shape[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        for axis in (0, 1):
            inside = taps_inside(
                x[0].shape[1 + axis], shape[1 + axis], self.kernel[axis], self.stride[axis], self.padding[2 * axis], self.dilation[axis]
            )
            expect(int(inside.min()) > 0, self, f"padding {self.padding} leaves a window of {self.kernel} wholly outside the input {x[0]}")
        scale = channel_scale(x[0])
        return IntType(shape, x[0].lo, x[0].hi, scale, x[0].step)

    def evaluate(self, *x: Tensor) -> Tensor:
        v, (t, b, left, r) = x[0], self.padding
        if self.ceil:  # what the last windows reach beyond the padding is outside as well
            b += self.stride[0]
            r += self.stride[1]
        lowest = -math.inf if v.is_floating_point() else torch.iinfo(v.dtype).min
        y = F.max_pool2d(pad_value(v, (t, b, left, r), lowest), self.kernel, self.stride, 0, self.dilation)
        if self.ceil:
            t, b, left, r = self.padding
            rows = out_size(v.shape[2], self.kernel[0], self.stride[0], t, b, self.dilation[0], True)
            cols = out_size(v.shape[3], self.kernel[1], self.stride[1], left, r, self.dilation[1], True)
            y = y[:, :, :rows, :cols].contiguous()
        return y

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    @property
    def window(self) -> Geometry:
        """(kernel, stride, padding, dilation)"""
        return self.kernel, self.stride, self.padding, self.dilation

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        return Folds(y.shape[0], taps=(1,) if whole_map(x[0], y, self.window) else taps_of(self.kernel))

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """Window, then taps of pe channels per cycle: OH*OW * (C/pe) * kh*kw/taps iterations per image; over the whole map H*W*C/pe."""
        return pool_call("max_pool.hpp", "ql::Max", x[0], y, self.legal(x, y, folding), self.window, x[0].lo, x[0].magnitude)

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """A compare per lane and tap, behind the windows of the image; over the whole map one running maximum instead."""
        step = compare(x[0].bits) + Cost(lut=x[0].bits, ff=x[0].bits)
        if whole_map(x[0], y, self.window):
            return loop(x[0].numel // folding.pe, folding.pe * y.bits) + step.times(folding.pe)
        return windowed(x[0], y, self.window, folding, step.times(folding.taps))

    @classmethod
    def examples(cls) -> list[Example]:
        x = IntType((3, 7, 8), -128, 127)
        return [
            (cls((2, 2), (2, 2)), (x,)),
            (cls((3, 3), (2, 2), (1, 1, 1, 1)), (x,)),
            (cls((3, 2), (2, 3), (0, 1, 1, 0), ceil=True), (x,)),
            (cls((2, 2), (2, 2), ceil=True), (IntType((5, 5, 5), -3, -1, 1.0, 2),)),
            (cls((2, 3), (1, 1), (1, 0, 0, 2), (2, 1)), (IntType((1, 4, 3), 0, 1),)),
            (cls((4, 3), (4, 3)), (IntType((6, 4, 3), -7, 7),)),
        ]
