"""Lut: any function of a small code, as a table per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantlib.cost import Cost, loop, memory
from quantlib.hls.call import Call, Table, by_part, each
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, same_channels
from quantlib.ops._lattice import stride_of

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Lut(Op):
    """y = table[c, (x - lo_in) // step_in].

    x (C, ...) with codes lo_in, lo_in + step_in, ... -> y of the same shape, from the least to the greatest entry. table (C, levels) or
    (1, levels); its entries differ by multiples of `step`. GraphError when the input may leave the table or the lattice.
    """

    table: np.ndarray
    lo_in: int
    step_in: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            self.table.ndim == 2 and self.table.size > 0, self, f"table must be (C, levels) or (1, levels), got shape {self.table.shape}"
        )
        expect(self.step >= 1 and self.step_in >= 1, self, f"steps {self.step_in} and {self.step} must be at least 1")
        expect(
            bool(((self.table - self.table.min()) % self.step == 0).all()),
            self,
            f"the table's entries do not differ by multiples of {self.step}",
        )

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        same_channels(self, "table", self.table.shape[0], x[0])
        last = self.lo_in + self.step_in * (self.table.shape[1] - 1)
        expect(self.lo_in <= x[0].lo and x[0].hi <= last, self, f"the table covers {self.lo_in}..{last}, the input is {x[0]}")
        expect(
            (x[0].lo - self.lo_in) % self.step_in == 0 and stride_of(x[0]) % self.step_in == 0,
            self,
            f"the input {x[0]} leaves the table's step {self.step_in}",
        )
        return IntType(x[0].shape, int(self.table.min()), int(self.table.max()), x[0].scale, self.step)

    def evaluate(self, *x: Tensor) -> Tensor:
        index = (x[0].long() - self.lo_in) // self.step_in
        if self.table.shape[0] > 1:
            index += (torch.arange(self.table.shape[0], device=index.device) * self.table.shape[1]).reshape(1, -1, *[1] * (index.dim() - 2))
        return constant(self.table.reshape(-1), x[0])[index]

    def magnitude(self, *x: IntType) -> int:
        return max(x[0].magnitude, int(np.abs(self.table).max()))

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle; iterations per image H*W*C/pe. The table is spread to step 1, so that the index is a difference."""
        table = Table("table", lambda: by_part(np.repeat(self.table, self.step_in, 1), y.shape[0], folding.pe))
        return each(self, "lut.hpp", (self.lo_in,), x, y, folding.pe, self.magnitude(*x) + abs(self.lo_in), (table,))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """pe table look-ups per cycle, the tables of a lane's channels in one memory."""
        channels, levels = self.table.shape
        stored = memory(max(channels // folding.pe, 1) * levels, y.bits, folding.memory).times(folding.pe)
        return loop(y.numel // folding.pe, folding.pe * y.bits) + stored

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(6)
        return [
            (cls(rng.integers(-50, 51, (4, 16)), 0), (IntType((4, 3, 3), 0, 15),)),
            (cls(rng.integers(-50, 51, (1, 256)), -128), (IntType((3, 2, 5), -128, 127),)),
            (cls(2 * rng.integers(-3, 3, (5, 4)) + 1, -3, 2, 2), (IntType((5, 2, 2), -3, 3, 1.0, 2),)),
            (cls(rng.integers(-(2**31), 2**31, (6, 9)), -2), (IntType((6,), -1, 5),)),
            (cls(np.full((1, 3), 7), 0), (IntType((2, 1, 3), 0, 2),)),
        ]
