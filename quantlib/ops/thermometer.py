"""Thermometer: each integer becomes B signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, compare, loop, table, words
from quantlib.hls.call import Call, Kernel, Table, carrier, divides, pixels, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, same_channels
from quantlib.ops._lattice import check_rows, tensor_scale

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Thermometer(Op):
    """y[c*B + b] = +1 if x[c] >= thresholds[c, b] else -1.

    x (C, ...) -> y (C*B, ...), lo -1, hi 1, step 2. thresholds (C, B) or (1, B) with non-decreasing rows. GraphError for another number
    of channels or rows that decrease.
    """

    thresholds: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            self.thresholds.ndim == 2 and self.thresholds.size > 0,
            self,
            f"thresholds must be (C, B) or (1, B), got shape {self.thresholds.shape}",
        )
        check_rows(self, self.thresholds)

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        same_channels(self, "thresholds", self.thresholds.shape[0], x[0])
        shape = (x[0].shape[0] * self.thresholds.shape[1], *x[0].shape[1:])
        return IntType(shape, -1, 1, tensor_scale(x[0]), 2)

    def evaluate(self, *x: Tensor) -> Tensor:
        v, (channels, bits) = x[0], self.thresholds.shape
        t = constant(self.thresholds, v).reshape(1, channels, bits, *[1] * (v.dim() - 2))
        return ((v.unsqueeze(2) >= t).to(v.dtype) * 2 - 1).flatten(1, 2)

    def magnitude(self, *x: IntType) -> int:
        return max(x[0].magnitude, int(np.abs(self.thresholds).max()), 2)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe signs per cycle; iterations per image H*W*C*B/pe. All channels of a pixel enter in one word."""
        channels, bits, places = x[0].shape[0], self.thresholds.shape[1], pixels(y)
        pe = divides(self, "pe", folding.pe, y.shape[0])
        parts = y.shape[0] // pe

        def thresholds() -> np.ndarray:
            return np.broadcast_to(self.thresholds, (channels, bits)).reshape(parts, pe)

        tables = (Table("source", lambda: (np.arange(channels * bits) // bits).reshape(parts, pe)), Table("thresholds", thresholds))
        args = (carrier(self.magnitude(*x)), places, parts)
        return Call((Kernel("", "thermometer.hpp", "ql::thermometer", args, (port(x[0], channels),), port(y, pe), places * parts,
                            lambda: (np.repeat(np.arange(1, places + 1), parts),), tables),))  # fmt: skip

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """One compare per output channel and lane."""
        rows, bits = self.thresholds.shape
        stored = table(rows * bits, min(words(self, "thresholds").bits, x[0].bits + 1), folding.pe)
        return loop(y.numel // folding.pe, folding.pe) + compare(x[0].bits).times(folding.pe) + stored

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(11)
        return [
            (cls(np.sort(rng.integers(0, 256, (3, 5)), 1)), (IntType((3, 4, 3), 0, 255),)),
            (cls(np.arange(8, 256, 32)[None]), (IntType((3, 2, 5), 0, 255),)),
            (cls(np.array([[0]])), (IntType((6,), -7, 7),)),
            (cls(np.sort(rng.integers(-9, 10, (5, 3)), 1)), (IntType((5, 1, 2), -8, 8, 1.0, 4),)),
        ]
