"""Add: the sum of two edges of one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantlib.cost import Cost, adder, loop
from quantlib.hls.call import Call, each
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import lattice, stride_of

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Add(Op):
    """z = x + y, element by element.

    x, y of one shape and exactly equal scales (real meaning, element by element) -> z of that shape, x.lo + y.lo .. x.hi + y.hi.
    GraphError when shapes or scales differ: different scales need a Join, or a shared quantizer in the model.
    """

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 2, self, f"takes two inputs, got {len(x)}")
        expect(x[0].shape == x[1].shape, self, f"the shapes of {x[0]} and {x[1]} differ")
        expect(x[0].same_scale(x[1]), self, f"the scales {x[0].scale} and {x[1].scale} differ; only equal grids add exactly")
        lo, hi = x[0].lo + x[1].lo, x[0].hi + x[1].hi
        return IntType(x[0].shape, lo, hi, x[0].scale, lattice(lo, hi, stride_of(x[0]), stride_of(x[1])))

    def evaluate(self, *x: Tensor) -> Tensor:
        return x[0] + x[1]

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude + x[1].magnitude

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle; iterations per image H*W*C/pe."""
        return each(self, "add.hpp", (), x, y, folding.pe, self.magnitude(*x), ())

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """One adder per lane."""
        return loop(y.numel // folding.pe, folding.pe * y.bits) + adder(y.bits).times(folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            (cls(), (IntType((3, 4, 5), -8, 7), IntType((3, 4, 5), 0, 15))),
            (cls(), (IntType((5, 2, 1), -3, 3, 0.5, 2), IntType((5, 2, 1), -1, 5, 0.5, 6))),
            (cls(), (IntType((7,), -(2**31), 2**31 - 1), IntType((7,), -(2**31), 2**31 - 1))),
        ]
