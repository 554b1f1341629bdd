"""The window stage shared by convolutions and pools: what ql_window.hpp does, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlib.cost import iterations, rows_needed
from quantlib.hls.call import Kernel, Port, ctype, port
from quantlib.ir import IntType


def taps_of(kernel: Sequence[int]) -> tuple[int, ...]:
    """Window positions that a word may hold: one, a column of the window, all of it."""
    return tuple(sorted({1, kernel[0], kernel[0] * kernel[1]}))


@dataclass(frozen=True)
class Window:
    """A sliding window over x with `lanes` channels per word; per pixel `groups` groups are written one after the other, each with all
    its taps.

    kernel, stride, dilation are (rows, columns), padding is (t, b, l, r), out the number of windows (rows, columns).
    taps (one of `taps_of(kernel)`) window positions lie in one word of taps * lanes values:
      1        words (group, row, column, part)
      kh       a column per word, its rows one after the other: words (group, column, part)
      kh * kw  a window per word, columns one after the other: words (group, part). Each column of the image is fetched once per output
               row and kept in shift registers as long as windows need it.
    Iterations per image: fill + sum over output rows r of max(fetches, reads(r)); nothing overlaps between images.
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
    taps: int = 1

    @property
    def parts(self) -> int:
        """Words of one group of a pixel."""
        return self.x.shape[0] // self.groups // self.lanes

    @property
    def row_words(self) -> int:
        return self.x.shape[2] * self.groups * self.parts

    @property
    def words(self) -> int:
        """Words of one window."""
        return self.groups * self.kernel[0] * self.kernel[1] * self.parts // self.taps

    @property
    def slides(self) -> bool:
        """Whether columns are kept in shift registers."""
        return self.kernel[1] > 1 and self.taps == self.kernel[0] * self.kernel[1]

    @property
    def span(self) -> int:
        """Columns from the first to the last of a window."""
        return (self.kernel[1] - 1) * self.dilation[1] + 1

    @property
    def step(self) -> int:
        """Columns fetched between two windows: none twice, and none that no window needs."""
        return min(self.stride[1], self.span)

    @property
    def fetches(self) -> int:
        """Words taken from the line buffer per output row."""
        if not self.slides:
            return self.out[1] * self.words
        return ((self.out[1] - 1) * self.step + self.span) * self.groups * self.parts

    @property
    def needs(self) -> tuple[int, ...]:
        return rows_needed(self.x.shape[1], self.out[0], self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    def need(self, r: int) -> int:
        """Input rows output row r needs, counted from the top."""
        return self.needs[r]

    def reads(self, r: int) -> int:
        """Words read while output row r is written: what row r + 1 needs, and behind the last row what is left."""
        return (self.needs[r + 1] - self.needs[r]) * self.row_words

    @property
    def fill(self) -> int:
        return self.need(0) * self.row_words

    @property
    def silence(self) -> int:
        """Most iterations without a write while input is at hand: the fill, and the first columns of a row."""
        return self.fill + (self.span - 1) * self.groups * self.parts * self.slides

    @property
    def iterations(self) -> int:
        return iterations(self.needs, self.row_words, self.fetches)

    @property
    def rows(self) -> int:
        """Rows of the line buffer."""
        return min((self.kernel[0] - 1) * self.dilation[0] + 1 + self.stride[0], self.x.shape[1])

    def demand(self) -> tuple[np.ndarray]:
        """In the phase of an output row, fetches and reads are spread evenly; in one iteration the write comes before the read."""
        fetches = self.fetches
        if self.slides:  # the last column of a window completes its words
            pixel = self.groups * self.parts
            columns = self.span - 1 + self.step * np.arange(self.out[1], dtype=np.int64)
            writes = (columns[:, None] * pixel + np.arange(1, pixel + 1)).reshape(-1)
        else:
            writes = np.arange(1, fetches + 1, dtype=np.int64)
        phases: dict[int, np.ndarray] = {}  # rows that read alike write alike
        rows = []
        for r in range(self.out[0]):
            reads = self.reads(r)
            if reads not in phases:
                length = max(reads, fetches)
                phases[reads] = (-(-writes * length // fetches) - 1) * reads // length
            rows.append(self.need(r) * self.row_words + phases[reads])
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
        output = Port(ctype(self.x), self.taps * self.lanes, self.out[0] * self.out[1] * self.words)
        return Kernel("window", "ql_window.hpp", "ql::window", args, (port(self.x, self.lanes),), output, self.iterations, self.demand)
