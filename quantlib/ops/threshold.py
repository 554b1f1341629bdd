"""Threshold: any monotone quantizer, as sorted thresholds per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, count, loop, table, words
from quantlib.hls.call import Call, Table, by_part, each
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect, same_channels
from quantlib.ops._lattice import check_rows, check_sign, count_reached, signed

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Threshold(Op):
    """y = lo + step * #{k : sign[c] * x >= thresholds[c, k]}.

    x (C, ...) -> y of the same shape, lo..lo + step*L. thresholds (C, L) or (1, L) with non-decreasing rows, sign (C,) or (1,) of +-1.
    L = 1 with lo = -1 and step = 2 is a binary sign. GraphError for rows that decrease or another number of channels.
    """

    thresholds: np.ndarray
    sign: np.ndarray
    lo: int
    step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            self.thresholds.ndim == 2 and self.thresholds.size > 0,
            self,
            f"thresholds must be (C, L) or (1, L), got shape {self.thresholds.shape}",
        )
        expect(self.step >= 1, self, f"step {self.step} must be at least 1")
        check_rows(self, self.thresholds)
        check_sign(self, self.sign)

    @property
    def hi(self) -> int:
        return self.lo + self.step * self.thresholds.shape[1]

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        same_channels(self, "thresholds", self.thresholds.shape[0], x[0])
        same_channels(self, "sign", len(self.sign), x[0])
        return IntType(x[0].shape, self.lo, self.hi, x[0].scale, self.step)

    def evaluate(self, *x: Tensor) -> Tensor:
        count = count_reached(signed(x[0], self.sign), self.thresholds)
        if self.step != 1:
            count = count * self.step
        return count + self.lo if self.lo else count

    def magnitude(self, *x: IntType) -> int:
        return max(x[0].magnitude, int(np.abs(self.thresholds).max()), abs(self.lo), abs(self.hi), self.hi - self.lo)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle; iterations per image H*W*C/pe."""
        tables = (
            Table("thresholds", lambda: by_part(self.thresholds, y.shape[0], folding.pe)),
            Table("sign", lambda: by_part(self.sign, y.shape[0], folding.pe)),
        )
        return each(self, "threshold.hpp", (self.lo, self.step), x, y, folding.pe, self.magnitude(*x), tables)

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """pe lanes, each with its compares or binary search; the thresholds of its channels lie in a memory per lane."""
        channels, levels = self.thresholds.shape
        lane = count(levels, x[0].bits)
        stored = table(channels, levels * min(words(self, "thresholds").bits, x[0].bits + 1) + 1, folding.pe)
        return loop(y.numel // folding.pe, folding.pe * y.bits) + lane.times(folding.pe) + stored

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(5)

        def rows(c: int, n: int, lo: int, hi: int) -> np.ndarray:
            return np.sort(rng.integers(lo, hi + 1, (c, n)), 1)

        x = IntType((5, 3, 4), -100, 100)
        return [
            (cls(rows(5, 3, -110, 110), 2 * rng.integers(0, 2, 5) - 1, 0), (x,)),
            (cls(rows(1, 1, -5, 5), np.array([1]), -1, 2), (x,)),
            (cls(rows(5, 15, -110, 110), np.array([-1]), -8), (x,)),
            (cls(rows(1, 16, -100, 100), 2 * rng.integers(0, 2, 5) - 1, -16, 2), (x,)),
            (cls(rows(3, 40, -(2**30), 2**30), 2 * rng.integers(0, 2, 3) - 1, -20), (IntType((3, 2, 1), -(2**30), 2**30),)),
            (cls(rows(7, 2, -3, 4), np.array([1]), -2, 2), (IntType((7,), -3, 3, 1.0, 2),)),
            (cls(np.array([[-300, -300, 0, 0, 300]]), np.array([1]), 0), (IntType((3, 1, 1), -255, 255),)),
        ]
