"""Multiply: the product of two edges, the second one a map or one gate per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, loop, memory, multiply
from quantlib.hls.call import Call, Kernel, carrier, divides, pixels, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Multiply(Op):
    """z = x * y, element by element; y of shape (C, 1, 1) is one factor per channel (the gate of a squeeze-excite block).

    x (C, ...), y of the same shape or (C, 1, 1) -> z of x's shape, between the least and the greatest product of the ends; the scales
    multiply. GraphError for other shapes.
    """

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 2, self, f"takes two inputs, got {len(x)}")
        expect(x[1].shape in (x[0].shape, self.gate(x[0])), self, f"{x[1]} is neither of the shape of {x[0]} nor one factor per channel")
        ends = [a * b for a in (x[0].lo, x[0].hi) for b in (x[1].lo, x[1].hi)]
        return IntType(x[0].shape, min(ends), max(ends), np.asarray(x[0].scale) * np.asarray(x[1].scale))

    @staticmethod
    def gate(x: IntType) -> tuple[int, ...]:
        """The shape of one factor per channel."""
        return (x.shape[0], *[1] * (len(x.shape) - 1))

    def evaluate(self, *x: Tensor) -> Tensor:
        return x[0] * x[1]

    def magnitude(self, *x: IntType) -> int:
        return max(x[0].magnitude * x[1].magnitude, x[0].magnitude, x[1].magnitude)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle, H*W*C/pe iterations per image. A gate is read with the first pixel and kept."""
        pe = divides(self, "pe", folding.pe, y.shape[0])
        words, parts, gated = y.numel // pe, y.shape[0] // pe, x[1].shape != x[0].shape
        every = np.arange(1, words + 1)
        args = (carrier(self.magnitude(*x)), pixels(y), parts, gated)
        ports = tuple(port(t, pe) for t in x)
        return Call((Kernel("", "multiply.hpp", "ql::multiply", args, ports, port(y, pe), words,
                            lambda: (every, np.minimum(every, prod(x[1].shape) // pe))),))  # fmt: skip

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """One multiplier per lane, and a memory of the gates."""
        kept = memory(y.shape[0] // folding.pe, folding.pe * x[1].bits) if x[1].shape != x[0].shape else Cost()
        return loop(y.numel // folding.pe, folding.pe * y.bits) + multiply(x[0].bits, x[1].bits).times(folding.pe) + kept

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            (cls(), (IntType((4, 3, 5), -8, 7, 0.5), IntType((4, 1, 1), 0, 255, 0.25))),
            (cls(), (IntType((3, 4, 2), 0, 15), IntType((3, 4, 2), -3, 3, 1.0, 2))),
            (cls(), (IntType((6,), -(2**15), 2**15 - 1), IntType((6,), -(2**15), 2**15 - 1))),
            (cls(), (IntType((2, 1, 1), 3, 9), IntType((2, 1, 1), -7, -5))),
        ]
