"""The window stage shared by convolutions and pools: what ql_window.hpp does, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlib.hls.call import Kernel, port
from quantlib.ir import IntType


@dataclass(frozen=True)
class Window:
    """A sliding window over x with `lanes` channels per word; per pixel `groups` groups are written one after the other, each with all
    its taps.

    kernel, stride, dilation are (rows, columns), padding is (t, b, l, r), out the number of windows (rows, columns).
    Iterations per image: fill + sum over output rows r of max(OUT, reads(r)); nothing overlaps between images.
    """

    x: IntType
    lanes: int
    groups: int
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    out: Sequence[int]
    outside: int = 0

    @property
    def parts(self) -> int:
        """Words of one group of a pixel."""
        return self.x.shape[0] // self.groups // self.lanes

    @property
    def row_words(self) -> int:
        return self.x.shape[2] * self.groups * self.parts

    @property
    def out_words(self) -> int:
        """Words written per output row."""
        return self.out[1] * self.groups * self.kernel[0] * self.kernel[1] * self.parts

    def need(self, r: int) -> int:
        """Input rows output row r needs, counted from the top."""
        return min(max(r * self.stride[0] - self.padding[0] + (self.kernel[0] - 1) * self.dilation[0] + 1, 0), self.x.shape[1])

    def reads(self, r: int) -> int:
        """Words read while output row r is written: what row r + 1 needs, and behind the last row what is left."""
        return ((self.need(r + 1) if r + 1 < self.out[0] else self.x.shape[1]) - self.need(r)) * self.row_words

    @property
    def fill(self) -> int:
        return self.need(0) * self.row_words

    @property
    def iterations(self) -> int:
        return self.fill + sum(max(self.out_words, self.reads(r)) for r in range(self.out[0]))

    @property
    def rows(self) -> int:
        """Rows of the line buffer."""
        return min((self.kernel[0] - 1) * self.dilation[0] + 1 + self.stride[0], self.x.shape[1])

    def demand(self) -> tuple[np.ndarray]:
        """In the phase of an output row, writes and reads are spread evenly; in one iteration the write comes before the read."""
        rows = []
        for r in range(self.out[0]):
            reads, words = self.reads(r), self.out_words
            length = max(reads, words)
            iteration = -(-np.arange(1, words + 1, dtype=np.int64) * length // words) - 1
            rows.append(self.need(r) * self.row_words + iteration * reads // length)
        return (np.concatenate(rows),)

    def stage(self) -> Kernel:
        _, h, w = self.x.shape
        args = (
            h,
            w,
            self.groups,
            self.parts,
            *self.kernel,
            *self.stride,
            self.padding[0],
            self.padding[2],
            *self.dilation,
            *self.out,
            self.outside,
        )
        output = port(self.x, self.lanes)
        output = type(output)(output.ctype, output.lanes, self.out_words * self.out[0])
        return Kernel("window", "ql_window.hpp", "ql::window", args, (port(self.x, self.lanes),), output, self.iterations, self.demand)
