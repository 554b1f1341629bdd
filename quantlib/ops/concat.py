"""Concat: edges side by side along the channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantlib.cost import Cost, loop
from quantlib.hls.call import Call, Folds, Kernel, divides, pixels, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import carry_scale, lattice, stride_of

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """y = the inputs one after the other along axis 0.

    x_i (C_i, ...) with equal remaining axes -> y (sum C_i, ...), the union of the intervals on the widest common lattice. Scales may
    differ: the output's then varies by channel. GraphError for fewer than two inputs or other axes.
    """

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) >= 2, self, f"takes at least two inputs, got {len(x)}")
        expect(len({t.shape[1:] for t in x}) == 1, self, f"the inputs differ behind axis 0: {', '.join(map(str, x))}")
        lo, hi = min(t.lo for t in x), max(t.hi for t in x)
        shape = (sum(t.shape[0] for t in x), *x[0].shape[1:])
        step = lattice(lo, hi, *(stride_of(t) for t in x), *(t.lo - lo for t in x))
        return IntType(shape, lo, hi, carry_scale(self, x, shape), step)

    def evaluate(self, *x: Tensor) -> Tensor:
        return torch.cat(x, 1)

    def magnitude(self, *x: IntType) -> int:
        return max(t.magnitude for t in x)

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        return Folds(math.gcd(*(t.shape[0] for t in x)))

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle, pe dividing every input's channels: H*W * (sum C_i)/pe iterations per image."""
        pe, places = divides(self, "pe", folding.pe, self.folds(x, y).pe), pixels(y)
        parts = [t.shape[0] // pe for t in x]

        def demand() -> tuple[np.ndarray, ...]:
            owner = np.tile(np.repeat(np.arange(len(parts)), parts), places)
            return tuple(np.cumsum(owner == i) for i in range(len(parts)))

        args = (places, f"ql::Parts<{', '.join(map(str, parts))}>")
        return Call(
            (Kernel("", "concat.hpp", "ql::concat", args, tuple(port(t, pe) for t in x), port(y, pe), places * sum(parts), demand),)
        )

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Words are taken from one input after the other, pixel by pixel."""
        return loop(y.numel // folding.pe, folding.pe * y.bits)

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            (cls(), (IntType((4, 3, 2), -8, 7), IntType((2, 3, 2), 0, 255))),
            (cls(), (IntType((3, 2, 2), -3, 3, 1.0, 2), IntType((3, 2, 2), -1, 1, 1.0, 2), IntType((6, 2, 2), -3, 1, 2.0, 4))),
            (cls(), (IntType((5,), -1, 0), IntType((3,), 4, 4))),
        ]
