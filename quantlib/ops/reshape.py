"""Reshape: the same integers under another shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, loop, reorder, same_order
from quantlib.hls.call import Call, Kernel, Port, ctype, divides, every_word, lanes_up_to, port, stream_order
from quantlib.hls.reorder import rearrange
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import carry_scale

if TYPE_CHECKING:
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
        """Passes where pixel-by-pixel order stays the same: numel/pe iterations per image; else as Rearrange."""
        index = np.arange(y.numel)
        if x[0].shape[0] != y.shape[0] and not np.array_equal(
            stream_order(index.reshape(x[0].shape)), stream_order(index.reshape(y.shape))
        ):
            return Call((rearrange(self, x[0], y, index, folding.pe),))
        pe = divides(self, "pe", folding.pe, y.shape[0])
        words = y.numel // pe
        return Call(
            (Kernel("", "reshape.hpp", "ql::pass", (words,), (Port(ctype(x[0]), pe, words),), port(y, pe), words, every_word(words)),)
        )

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Words pass by where the order of the stream stays the same; else the whole map is read, then written."""
        if same_order(x[0].shape, y.shape):
            return loop(y.numel // folding.pe, folding.pe * y.bits)
        return reorder(x[0], y, lanes_up_to(folding.pe, x[0].shape[0]), folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            (cls((60,)), (IntType((3, 4, 5), -8, 7),)),
            (cls((6, 2, 5)), (IntType((3, 4, 5), 0, 1),)),
            (cls((7,)), (IntType((7, 1, 1), -1, 1, 1.0, 2),)),
            (cls((4, 5, 1)), (IntType((4, 1, 5), -128, 127),)),
        ]
