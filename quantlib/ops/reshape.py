"""Reshape: the same integers under another shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantlib.cost import Cost
from quantlib.ir import GraphError, IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import carry_scale

if TYPE_CHECKING:
    from quantlib.hls.call import Call

    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    """y = x read in C order (channel-major), written into `shape`.

    x any shape -> y `shape` with as many elements, same interval. The scale is carried along. GraphError when the counts differ.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        expect(math.prod(self.shape) == x[0].numel, self, f"{x[0]} does not reshape to {self.shape}")
        return IntType(self.shape, x[0].lo, x[0].hi, carry_scale(self, x, self.shape), x[0].step)

    def evaluate(self, *x: Tensor) -> Tensor:
        return x[0].reshape(x[0].shape[0], *self.shape)

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        raise GraphError("no kernel yet")

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Only the counters of the stages around it change."""
        return Cost(cycles=y.numel // folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            (cls((60,)), (IntType((3, 4, 5), -8, 7),)),
            (cls((6, 2, 5)), (IntType((3, 4, 5), 0, 1),)),
            (cls((7,)), (IntType((7, 1, 1), -1, 1, 1.0, 2),)),
            (cls((4, 5, 1)), (IntType((4, 1, 5), -128, 127),)),
        ]
