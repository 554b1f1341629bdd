"""Requant: multiply, add, shift, clamp, with at most one kink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, adder, compare, loop, multiply, table, words
from quantlib.hls.call import Call, Table, by_part, each
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect, floor_shift, per_channel, same_channels

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Requant(Op):
    """y = clamp((x * mul[c] + add[c]) >> shift, lo, hi) where x >= kink[c], else with mul2[c], add2[c]; the shift is arithmetic.

    x (C, ...) -> y of the same shape, lo..hi. Constants are (C,) or (1,); without kink there is one branch. Stands for a quantizer
    with many levels when it was proven to reproduce it. GraphError for incomplete branches or another number of channels.
    """

    mul: np.ndarray
    add: np.ndarray
    shift: int
    lo: int
    hi: int
    kink: np.ndarray | None = None
    mul2: np.ndarray | None = None
    add2: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        second = (self.kink, self.mul2, self.add2)
        expect(
            all(v is None for v in second) or all(v is not None for v in second), self, "kink, mul2 and add2 come together or not at all"
        )
        expect(0 <= self.shift < 62 and self.lo <= self.hi, self, f"shift {self.shift} and interval {self.lo}..{self.hi} make no sense")
        expect(all(v.ndim == 1 for v in self.constants.values()), self, "constants are (C,) or (1,)")

    @property
    def constants(self) -> dict[str, np.ndarray]:
        names = ("mul", "add", "kink", "mul2", "add2")
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        for name, value in self.constants.items():
            same_channels(self, name, len(value), x[0])
        return IntType(x[0].shape, self.lo, self.hi, x[0].scale)

    def evaluate(self, *x: Tensor) -> Tensor:
        v = x[0] * per_channel(self.mul, x[0]) + per_channel(self.add, x[0])
        if self.kink is not None and self.mul2 is not None and self.add2 is not None:
            below = x[0] * per_channel(self.mul2, x[0]) + per_channel(self.add2, x[0])
            v = v.where(x[0] >= per_channel(self.kink, x[0]), below)
        return floor_shift(v, self.shift).clamp(self.lo, self.hi)

    def magnitude(self, *x: IntType) -> int:
        most = max(x[0].magnitude, abs(self.lo), abs(self.hi), *(int(np.abs(v).max()) for v in self.constants.values()))
        for mul, add in ((self.mul, self.add), (self.mul2, self.add2)):
            if mul is not None and add is not None:
                most = max(most, int(np.abs(mul).max()) * x[0].magnitude + int(np.abs(add).max()))
        return most

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle; iterations per image H*W*C/pe."""

        def factors() -> np.ndarray:
            values = list(self.constants.values())
            channels = max(len(v) for v in values)
            return by_part(np.stack([np.broadcast_to(v, (channels,)) for v in values], 1), y.shape[0], folding.pe)

        args = (self.shift, self.lo, self.hi, self.kink is not None)
        return each(self, "requant.hpp", args, x, y, folding.pe, self.magnitude(*x), (Table("factors", factors),))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Per lane a product, a sum, a free shift and two compares for the clamp; a kink adds one compare and wider tables."""
        mul, add = words(self, "mul", "mul2"), words(self, "add", "add2")
        product = x[0].bits + mul.bits
        lane = multiply(x[0].bits, mul.bits) + adder(max(product, add.bits)) + compare(max(product, add.bits)).times(2)
        stored = mul.bits + add.bits
        if self.kink is not None:
            lane += compare(x[0].bits)
            stored = 2 * stored + words(self, "kink").bits
        channels = max(len(v) for v in self.constants.values())
        return loop(y.numel // folding.pe, folding.pe * y.bits) + lane.times(folding.pe) + table(channels, stored, folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(7)

        def r(n: int, most: int) -> np.ndarray:
            return rng.integers(-most, most + 1, n)

        x = IntType((5, 4, 3), -5000, 5000)
        return [
            (cls(r(5, 300), r(5, 90000), 12, -128, 127), (x,)),
            (cls(np.array([37]), np.array([-1000]), 9, 0, 255), (x,)),
            (cls(r(5, 300), r(1, 90000), 10, -128, 127, r(5, 2000), r(5, 300), r(5, 90000)), (x,)),
            (cls(np.array([1]), np.array([0]), 0, -9, 9, np.array([0]), np.array([2]), np.array([1])), (IntType((3,), -31, 31),)),
            (cls(r(2, 2**30), r(2, 2**40), 33, -32768, 32767), (IntType((2, 3, 3), -(2**20), 2**20),)),
        ]
