"""Slice2d: a spatial crop or subsample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, loop
from quantlib.hls.call import Call, Kernel, divides, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import carry_scale

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Slice2d(Op):
    """y = x[:, rows[0]:rows[1]:rows[2], cols[0]:cols[1]:cols[2]].

    x (C, H, W) -> y (C, H', W'), same interval; rows and cols are (start, stop, step) with 0 <= start < stop <= size and step >= 1. The
    scale is carried along. GraphError when the slice leaves the image.
    """

    rows: tuple[int, int, int]
    cols: tuple[int, int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rows", tuple(int(v) for v in self.rows))
        object.__setattr__(self, "cols", tuple(int(v) for v in self.cols))
        expect(len(self.rows) == 3 and len(self.cols) == 3, self, f"rows {self.rows} and cols {self.cols} are (start, stop, step)")

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        expect(len(x[0].shape) == 3, self, f"the input must be (C, H, W), got {x[0]}")
        for name, (start, stop, step), size in (("rows", self.rows, x[0].shape[1]), ("cols", self.cols, x[0].shape[2])):
            expect(0 <= start < stop <= size and step >= 1, self, f"{name} {start}:{stop}:{step} do not lie in the input {x[0]}")
        shape = (x[0].shape[0], len(range(*self.rows)), len(range(*self.cols)))
        return IntType(shape, x[0].lo, x[0].hi, carry_scale(self, x, shape), x[0].step)

    def evaluate(self, *x: Tensor) -> Tensor:
        return x[0][:, :, slice(*self.rows), slice(*self.cols)].contiguous()

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle of the input: H*W*C/pe iterations per image."""
        c, h, w = x[0].shape
        pe = divides(self, "pe", folding.pe, c)

        def demand() -> tuple[np.ndarray]:
            number = np.arange(1, h * w * (c // pe) + 1).reshape(h, w, c // pe)
            return (number[slice(*self.rows), slice(*self.cols)].reshape(-1),)

        return Call((Kernel("", "slice2d.hpp", "ql::slice2d", (h, w, c // pe, *self.rows, *self.cols), (port(x[0], pe),), port(y, pe),
                            h * w * (c // pe), demand),))  # fmt: skip

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Words outside the slice are read and dropped."""
        return loop(x[0].numel // folding.pe, folding.pe * y.bits)

    @classmethod
    def examples(cls) -> list[Example]:
        x = IntType((3, 7, 6), -8, 7)
        return [
            (cls((0, 7, 2), (0, 6, 2)), (x,)),
            (cls((1, 6, 1), (2, 3, 1)), (x,)),
            (cls((1, 7, 3), (0, 6, 1)), (x,)),
            (cls((6, 7, 1), (5, 6, 4)), (IntType((1, 7, 6), -1, 1, 1.0, 2),)),
        ]
