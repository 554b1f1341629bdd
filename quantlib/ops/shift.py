"""Shift: every channel moved by its own whole number of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from quantlib.cost import Cost, compare, loop, memory, table
from quantlib.hls.call import Call, Kernel, Table, by_part, divides, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, same_channels
from quantlib.ops._lattice import channel_scale, lattice, stride_of

if TYPE_CHECKING:
    from quantlib.schedule import Folding

LAG = 4  # words between the write and the nearest read of the line buffer: more than a memory's latency, so the loop keeps II = 1


@dataclass(frozen=True, eq=False)
class Shift(Op):
    """y[c, r, q] = x[c, r + dy[c], q + dx[c]], 0 outside the map: a depthwise convolution with one-hot kernels, without a multiplier.

    x (C, H, W) -> y of the same shape, the interval widened to hold 0 where something moves; dy, dx (C,) or (1,) in pixels. In hardware a
    line buffer that every channel reads at its own distance. GraphError for another rank or number of channels.
    """

    dy: np.ndarray
    dx: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            self.dy.ndim == 1 and self.dy.shape == self.dx.shape, self, f"dy {self.dy.shape} and dx {self.dx.shape} must be (C,) or (1,)"
        )

    @property
    def moves(self) -> bool:
        return bool(self.dy.any() or self.dx.any())

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        expect(len(x[0].shape) == 3, self, f"the input must be (C, H, W), got {x[0]}")
        same_channels(self, "dy", len(self.dy), x[0])
        lo, hi = (min(x[0].lo, 0), max(x[0].hi, 0)) if self.moves else (x[0].lo, x[0].hi)
        step = lattice(lo, hi, stride_of(x[0]), x[0].lo) if self.moves else x[0].step
        return IntType(x[0].shape, lo, hi, channel_scale(x[0]), step)

    def evaluate(self, *x: Tensor) -> Tensor:
        _, channels, height, width = x[0].shape
        far = int(max(np.abs(self.dy).max(), np.abs(self.dx).max()))
        padded = F.pad(x[0], (far, far, far, far))
        dy, dx = (constant(np.broadcast_to(d, channels), x[0]).long() + far for d in (self.dy, self.dx))
        channel, row, column = (constant(np.arange(n), x[0]).long() for n in (channels, height, width))
        return padded[:, channel[:, None, None], row[:, None] + dy[:, None, None], column + dx[:, None, None]]

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    def ring(self, x: IntType, parts: int) -> tuple[np.ndarray, int, int]:
        """(distance, delay, size) in pixels: how far behind the newest pixel each channel reads, the lag of the output behind the input,
        and the pixels held."""
        offset = self.dy * x.shape[2] + self.dx
        delay = max(int(offset.max()), 0) + -(-LAG // parts)
        distance = delay - offset
        return distance, delay, int(distance.max()) + 1

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle, each from its own bank of the line buffer: (H*W + delay) * C/pe iterations per image."""
        pe = divides(self, "pe", folding.pe, y.shape[0])
        (channels, height, width), parts = x[0].shape, y.shape[0] // pe
        distance, delay, size = self.ring(x[0], parts)
        words = height * width * parts

        def demand() -> tuple[np.ndarray]:
            return (np.minimum(np.arange(1, words + 1) + delay * parts, words),)

        tables = (
            Table("dy", lambda: by_part(self.dy, channels, pe)),
            Table("dx", lambda: by_part(self.dx, channels, pe)),
            Table("distance", lambda: by_part(distance, channels, pe)),
        )
        args = (height, width, parts, delay, size)
        return Call((Kernel("", "shift.hpp", "ql::shift", args, (port(x[0], pe),), port(y, pe), words + delay * parts, demand, tables),))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Per lane a bank of the line buffer, the addresses, and two comparisons with the border; no multiplier."""
        pe, parts = folding.pe, y.shape[0] // folding.pe
        _, delay, size = self.ring(x[0], parts)
        pixels = x[0].shape[1] * x[0].shape[2]
        cycles, places = (pixels + delay) * parts, size.bit_length()
        bank = memory(size * parts, x[0].bits) + compare(places).times(2) + Cost(lut=places, ff=places)
        addresses = table(len(self.dy), places + 2 * x[0].shape[2].bit_length(), pe)
        return loop(cycles, pe * y.bits, delay / (pixels + delay)) + bank.times(pe) + addresses

    @classmethod
    def examples(cls) -> list[Example]:
        i = np.arange(7) % 5
        dy, dx = np.array([-1, 0, 0, 0, 1]), np.array([0, -1, 0, 1, 0])
        return [
            (cls(dy[i], dx[i]), (IntType((7, 5, 6), 0, 15),)),
            (cls(np.array([2, -1, 0, 3]), np.array([-2, 1, 0, 4])), (IntType((4, 4, 3), -8, 7),)),
            (cls(np.array([-1]), np.array([0])), (IntType((6, 3, 4), 5, 11, 1.0, 2),)),
            (cls(np.array([0, 0]), np.array([0, 0])), (IntType((2, 3, 3), -3, 3, 1.0, 2),)),
            (cls(np.array([-1, 1, 0, 0]), np.array([0, 0, 1, -1])), (IntType((4, 1, 1), -(2**20), 2**20),)),
        ]
