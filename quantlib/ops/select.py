"""Select: channels picked by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantlib.cost import Cost, loop, memory
from quantlib.hls.call import Call, Kernel, Table, divides, lanes_up_to, pixels, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import carry_scale

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Select(Op):
    """y[c] = x[channels[c]]: chunks, splits, shuffles, channel slices and repeats.

    x (C, ...) -> y (C', ...), same interval; channels (C',) in 0..C-1, in any order and with repeats. The scale is carried along.
    GraphError when a channel does not exist.
    """

    channels: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.channels.ndim == 1 and self.channels.size > 0, self, f"channels must be (C',), got shape {self.channels.shape}")

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        low, high = int(self.channels.min()), int(self.channels.max())
        expect(low >= 0 and high < x[0].shape[0], self, f"channels {low}..{high} do not exist in {x[0]}")
        shape = (len(self.channels), *x[0].shape[1:])
        return IntType(shape, x[0].lo, x[0].hi, carry_scale(self, x, shape), x[0].step)

    def evaluate(self, *x: Tensor) -> Tensor:
        return x[0].index_select(1, torch.tensor(self.channels, device=x[0].device))

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """Writes a pixel while it reads the next: (H*W + 1) * max(C/li, C'/pe) iterations, li the largest divisor of C up to pe."""
        pe, li, places = divides(self, "pe", folding.pe, y.shape[0]), lanes_up_to(folding.pe, x[0].shape[0]), pixels(y)
        words_in, words_out = x[0].shape[0] // li, y.shape[0] // pe

        def demand() -> tuple[np.ndarray]:
            n, at = np.divmod(np.arange(places * words_out), words_out)
            return (np.minimum((n + 1) * words_in + np.minimum(at, words_in), places * words_in),)

        table = Table("channels", lambda: self.channels.reshape(words_out, pe))
        return Call((Kernel("", "select.hpp", "ql::select", (places, words_in, words_out), (port(x[0], li),), port(y, pe),
                            (places + 1) * max(words_in, words_out), demand, (table,)),))  # fmt: skip

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """The channels of a pixel are stored twice (one is written while the other is read) and picked; one pixel more per image."""
        lanes, places = lanes_up_to(folding.pe, x[0].shape[0]), y.numel // y.shape[0]
        cycles = (places + 1) * max(x[0].shape[0] // lanes, y.shape[0] // folding.pe)
        return loop(cycles, folding.pe * y.bits) + memory(2 * x[0].shape[0] // lanes, lanes * x[0].bits)

    @classmethod
    def examples(cls) -> list[Example]:
        x = IntType((6, 3, 2), -8, 7)
        return [
            (cls(np.array([0, 2, 4, 1, 3, 5])), (x,)),
            (cls(np.array([3, 4])), (x,)),
            (cls(np.array([5, 5, 0, 1, 5, 2, 2, 3, 4])), (x,)),
            (cls(np.array([4, 0, 3])), (IntType((5,), -1, 1, 1.0, 2),)),
        ]
