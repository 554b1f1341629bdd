"""AffineJoin: a quantizer of several edges that is affine in the widest, as one table of offsets and one row of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, adder, count, loop, memory, table, words
from quantlib.hls.call import Call, Table, by_part, each
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, same_channels
from quantlib.ops._lattice import check_narrow, check_rows, check_sign, count_reached, narrow_index, set_narrow, signed

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class AffineJoin(Op):
    """y = lo + step * #{j : ((sign[c] * wide) << shift) + offset[c, k] >= thresholds[c, j]}, k the number of the narrow codes.

    Inputs (wide, narrow_1, narrow_2, ...) of one shape (C, ...) -> y of that shape, lo..lo + step*L. The digit of narrow_i is
    (narrow_i - lows[i]) // steps[i], the first narrow edge is the most significant; sizes = levels of the narrow edges, K = their product.
    offset (C, K) or (1, K), thresholds (C, L) or (1, L) with non-decreasing rows, sign (C,) or (1,). C*(K + L) numbers say what a Join
    says with C*K*L. GraphError when shapes, channels or lattices differ.
    """

    offset: np.ndarray
    shift: int
    thresholds: np.ndarray
    sign: np.ndarray
    lo: int
    step: int
    sizes: tuple[int, ...]
    lows: tuple[int, ...]
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        set_narrow(self, self.sizes, self.lows, self.steps)
        expect(self.offset.ndim == 2 and self.thresholds.ndim == 2 and self.thresholds.size > 0, self,
               f"offset is (C or 1, K) and thresholds (C or 1, L), got shapes {self.offset.shape} and {self.thresholds.shape}")  # fmt: skip
        k = int(np.prod(self.sizes))
        expect(k == self.offset.shape[1], self, f"sizes {self.sizes} give K = {k}, offset has shape {self.offset.shape}")
        expect(self.step >= 1 and 0 <= self.shift < 62, self, f"step {self.step} and shift {self.shift} make no sense")
        check_rows(self, self.thresholds)
        check_sign(self, self.sign)

    @property
    def hi(self) -> int:
        return self.lo + self.step * self.thresholds.shape[1]

    def infer(self, *x: IntType) -> IntType:
        check_narrow(self, x, self.sizes, self.lows, self.steps)
        for name, value in (("offset", self.offset), ("thresholds", self.thresholds), ("sign", self.sign)):
            same_channels(self, name, value.shape[0], x[0])
        return IntType(x[0].shape, self.lo, self.hi, x[0].scale, self.step)

    def evaluate(self, *x: Tensor) -> Tensor:
        row = narrow_index(x[1:], self.sizes, self.lows, self.steps, self.offset.shape[0])
        v = signed(x[0], self.sign) * (1 << self.shift) + constant(self.offset.reshape(-1), x[0])[row]
        return count_reached(v, self.thresholds) * self.step + self.lo

    def magnitude(self, *x: IntType) -> int:
        sums = (x[0].magnitude << self.shift) + int(np.abs(self.offset).max())
        return max(*(t.magnitude for t in x), sums, int(np.abs(self.thresholds).max()), abs(self.lo), abs(self.hi), self.hi - self.lo)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle of every input; iterations per image H*W*C/pe."""
        digits = ", ".join(f"ql::Digit<{n}, {low}, {step}>" for n, low, step in zip(self.sizes, self.lows, self.steps, strict=True))
        tables = (
            Table("offset", lambda: by_part(self.offset, y.shape[0], folding.pe)),
            Table("thresholds", lambda: by_part(self.thresholds, y.shape[0], folding.pe)),
            Table("sign", lambda: by_part(self.sign, y.shape[0], folding.pe)),
        )
        args = (self.shift, self.lo, self.step, f"ql::Digits<{digits}>")
        return each(self, "affine_join.hpp", args, x, y, folding.pe, self.magnitude(*x), tables)

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Per lane a memory with the offset of every narrow code, one sum, and the compares."""
        channels, codes = self.offset.shape
        bits = max(x[0].bits + self.shift, words(self, "offset").bits) + 1
        stored = memory(max(channels // folding.pe, 1) * codes, words(self, "offset").bits)
        levels = self.thresholds.shape[1]
        rows = table(self.thresholds.shape[0], levels * bits + 1, folding.pe)
        return loop(y.numel // folding.pe, folding.pe * y.bits) + (adder(bits) + count(levels, bits) + stored).times(folding.pe) + rows

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(9)

        def rows(c: int, n: int, most: int) -> np.ndarray:
            return np.sort(rng.integers(-most, most + 1, (c, n)), 1)

        def sign(c: int) -> np.ndarray:
            return 2 * rng.integers(0, 2, c) - 1

        shape = (4, 3, 5)
        return [
            (cls(rng.integers(-500, 501, (4, 6)), 4, rows(4, 3, 3000), sign(4), -2, 1, (6,), (-3,), (1,)),
             (IntType(shape, -200, 200), IntType(shape, -3, 2))),
            (cls(rng.integers(-50, 51, (1, 8)), 0, rows(4, 2, 80), sign(1), -2, 2, (2, 4), (-1, 0), (2, 1)),
             (IntType(shape, -40, 39), IntType(shape, -1, 1, 1.0, 2), IntType(shape, 0, 3))),
            (cls(rng.integers(-500, 501, (6, 3)), 2, rows(1, 30, 2**22), sign(6), 0, 1, (3,), (0,)),
             (IntType((6,), -(2**20), 2**20), IntType((6,), 0, 2))),
        ]  # fmt: skip
