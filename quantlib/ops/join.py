"""Join: a quantizer of several edges, as thresholds on the widest for every code of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, count, loop, memory, words
from quantlib.hls.call import Call, Table, by_part, each
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, same_channels
from quantlib.ops._lattice import check_narrow, check_rows, count_reached_at, narrow_index, set_narrow, signed

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Join(Op):
    """y = lo + step * #{j : sign[c, k] * wide >= thresholds[c, k, j]}, k the mixed-radix number of the narrow codes.

    Inputs (wide, narrow_1, narrow_2, ...) of one shape (C, ...) -> y of that shape, lo..lo + step*L. The digit of narrow_i is
    (narrow_i - lows[i]) // steps[i], the first narrow edge is the most significant; sizes = levels of the narrow edges, K = their product.
    thresholds (C, K, L) or (1, K, L) with non-decreasing rows, sign (C or 1, K or 1), because the
    direction may depend on the narrow codes (a product). GraphError when shapes, channels or lattices differ.
    """

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
        expect(
            self.thresholds.ndim == 3 and self.thresholds.size > 0,
            self,
            f"thresholds must be (C or 1, K, L), got shape {self.thresholds.shape}",
        )
        k = int(np.prod(self.sizes))
        expect(k == self.thresholds.shape[1], self, f"sizes {self.sizes} give K = {k}, thresholds have shape {self.thresholds.shape}")
        expect(self.step >= 1, self, f"step {self.step} must be at least 1")
        check_rows(self, self.thresholds)
        if self.sign.ndim == 1:
            object.__setattr__(self, "sign", self.sign[:, None])
        expect(self.sign.ndim == 2 and self.sign.shape[1] in (1, k), self, f"sign must be (C or 1, K or 1), got shape {self.sign.shape}")
        expect(bool((np.abs(self.sign) == 1).all()), self, "sign holds +1 or -1")

    @property
    def hi(self) -> int:
        return self.lo + self.step * self.thresholds.shape[2]

    def infer(self, *x: IntType) -> IntType:
        check_narrow(self, x, self.sizes, self.lows, self.steps)
        same_channels(self, "thresholds", self.thresholds.shape[0], x[0])
        same_channels(self, "sign", self.sign.shape[0], x[0])
        return IntType(x[0].shape, self.lo, self.hi, x[0].scale, self.step)

    def evaluate(self, *x: Tensor) -> Tensor:
        row = narrow_index(x[1:], self.sizes, self.lows, self.steps, self.thresholds.shape[0])
        if self.sign.shape[1] == 1:
            v = signed(x[0], self.sign[:, 0])
        else:
            v = x[0] * constant(self.sign.reshape(-1), x[0])[narrow_index(x[1:], self.sizes, self.lows, self.steps, self.sign.shape[0])]
        return count_reached_at(v, row, self.thresholds.reshape(-1, self.thresholds.shape[2])) * self.step + self.lo

    def magnitude(self, *x: IntType) -> int:
        return max(*(t.magnitude for t in x), int(np.abs(self.thresholds).max()), abs(self.lo), abs(self.hi), self.hi - self.lo)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle of every input; iterations per image H*W*C/pe."""
        digits = ", ".join(f"ql::Digit<{n}, {low}, {step}>" for n, low, step in zip(self.sizes, self.lows, self.steps, strict=True))
        tables = (
            Table("thresholds", lambda: by_part(self.thresholds, y.shape[0], folding.pe)),
            Table("sign", lambda: by_part(self.sign, y.shape[0], folding.pe)),
        )
        return each(self, "join.hpp", (self.lo, self.step, f"ql::Digits<{digits}>"), x, y, folding.pe, self.magnitude(*x), tables)

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Per lane a memory with the thresholds of every narrow code, and the compares."""
        channels, codes, levels = self.thresholds.shape
        stored = memory(max(channels // folding.pe, 1) * codes, levels * min(words(self, "thresholds").bits, x[0].bits + 1) + 1)
        return loop(y.numel // folding.pe, folding.pe * y.bits) + (count(levels, x[0].bits) + stored).times(folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(8)

        def rows(c: int, k: int, n: int, most: int) -> np.ndarray:
            return np.sort(rng.integers(-most, most + 1, (c, k, n)), 2)

        def sign(c: int) -> np.ndarray:
            return 2 * rng.integers(0, 2, c) - 1

        shape = (4, 3, 5)
        return [
            (cls(rows(4, 6, 3, 220), sign(4), -2, 1, (6,), (-3,), (1,)), (IntType(shape, -200, 200), IntType(shape, -3, 2))),
            (cls(rows(1, 8, 2, 40), sign(1), -2, 2, (2, 4), (-1, 0), (2, 1)),
             (IntType(shape, -40, 39), IntType(shape, -1, 1, 1.0, 2), IntType(shape, 0, 3))),
            (cls(rows(4, 6, 3, 40), sign(24).reshape(4, 6), 0, 1, (6,), (-3,)), (IntType(shape, -40, 39), IntType(shape, -3, 2))),
            (cls(rows(4, 3, 17, 40), sign(3)[None], 0, 1, (3,), (0,)), (IntType(shape, -40, 39), IntType(shape, 0, 2))),
            (cls(rows(6, 3, 30, 2**20), sign(1), 0, 1, (3,), (0,)), (IntType((6,), -(2**20), 2**20), IntType((6,), 0, 2))),
        ]  # fmt: skip
