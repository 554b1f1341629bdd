"""Find and prove clamp((n * mul + add) >> shift) for codes that were measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid
from quantlib.tails.expressions import Edge, Map
from quantlib.tails.probing import codes_of, compress, real_of

BLOCK = 1 << 15  # (channel, point) pairs that are worked on at a time: they stay in the second cache
SAMPLE = 1024  # points on which a shift is tried before all of them are
FREE = 2**62  # beyond every bound on an addend
MOST = 40  # the largest shift that is tried


def fit_line(
    n: np.ndarray, codes: np.ndarray, slope: np.ndarray, grid: Grid, used: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, int] | None:
    """mul, add (C,) and shift with clamp((n*mul + add) >> shift) == codes at every used point, or None. Proven by integer
    inequalities.

    n (1, P) or (C, P), codes (C, P), slope (C,) in codes per integer; used: first and end (C,) of the points that count, None for all. The
    smallest shift up to MOST that works for all channels is taken.
    """
    channels, points = codes.shape
    span = int(np.abs(n).max(initial=1)).bit_length()
    steepest = float(np.abs(slope).max(initial=0.0))
    first, end = used or (np.zeros(channels, dtype=np.int64), np.full(channels, points))

    def fits(shift: int) -> bool:
        return steepest * 2.0**shift < 2.0 ** (62 - span) and (steepest + max(abs(grid.lo), abs(grid.hi)) + 2) * 2.0**shift < 2.0**62

    def multiplier(shift: int) -> np.ndarray:
        return np.rint(slope * 2.0**shift).astype(np.int64)

    # the smallest shift that suits a sample of the points, by bisection (almost monotone), then upwards until it suits them all
    few = np.unique(np.linspace(0, points - 1, min(points, SAMPLE)).astype(np.int64))
    sample = _Bounds(n[:, few], codes[:, few], np.searchsorted(few, first), np.searchsorted(few, end), grid)
    every = _Bounds(n, codes, first, end, grid)
    below, above = -1, MOST
    while above - below > 1:
        middle = (below + above) // 2
        allowed = not fits(middle) or sample.addends(middle, multiplier(middle)) is not None
        below, above = (below, middle) if allowed else (middle, above)
    for shift in range(above, MOST + 1):
        if not fits(shift):
            return None
        mul = multiplier(shift)
        allowed = shift == above < MOST or sample.addends(shift, mul) is not None
        found = every.addends(shift, mul) if allowed else None
        if found is not None:
            low, high = found
            free_low, free_high = low == -FREE, high == FREE
            between = np.where(free_high, low, low + (high - low) // 2)
            return mul, np.where(free_low & free_high, 0, np.where(free_low, high, between)), shift
    return None


def _blocks(channels: int, points: int) -> list[slice]:
    """The rows of a table in pieces of about BLOCK entries."""
    rows = max(1, BLOCK // points)
    return [slice(k, k + rows) for k in range(0, channels, rows)]


class _Bounds:
    """The bounds that the points first <= p < end of each channel set on the addend of a line, block of channels by block; what refuted
    the last line is tried first."""

    def __init__(self, n: np.ndarray, codes: np.ndarray, first: np.ndarray, end: np.ndarray, grid: Grid) -> None:
        self.n, self.codes, self.first, self.end, self.grid = n, codes, first, end, grid
        self.blocks = _blocks(*codes.shape)

    def addends(self, shift: int, mul: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Per channel the largest lower and the smallest upper bound, -FREE and FREE where there is none; None where they cross."""
        low, high = np.full(len(mul), -FREE), np.full(len(mul), FREE)
        for place, block in enumerate(self.blocks):
            first, end = self.first[block], self.end[block]
            start, stop = int(first.min()), int(end.max())
            if start >= stop:
                continue
            code = self.codes[block, start:stop]
            least = np.left_shift(code, shift, dtype=np.int64)
            least -= (self.n[:, start:stop] if len(self.n) == 1 else self.n[block, start:stop]) * mul[block, None]
            apart = first.max() > start or end.min() < stop
            p = np.arange(start, stop)
            used = (p >= first[:, None]) & (p < end[:, None]) if apart else True
            inner = (code > self.grid.lo) & used if apart or code.min() <= self.grid.lo else None
            low[block] = (least if inner is None else np.where(inner, least, -FREE)).max(1)
            inner = (code < self.grid.hi) & used if apart or code.max() >= self.grid.hi else None
            most = (least if inner is None else np.where(inner, least, FREE)).min(1)
            high[block] = np.where(most < FREE, most + ((1 << shift) - 1), FREE)
            if (low[block] > high[block]).any():
                self.blocks.insert(0, self.blocks.pop(place))
                return None
        return low, high


class Slopes:
    """The slopes of real functions of the integers n, straight but for one kink; the values come piece by piece.

    `first` (C,) is the interval that holds the kink (P where there is none), `left` and `right` are the slopes before and behind it.
    """

    def __init__(self, n: np.ndarray, channels: int) -> None:
        self.n, self.step = n, int(n[1] - n[0])
        self.starts: list[int] = []  # the first interval of every piece
        self.seen = 0  # intervals so far
        self.extremes: list[tuple[np.ndarray, np.ndarray]] = []
        self.head = self.tail = np.empty((channels, 0))

    def see(self, real: np.ndarray) -> None:
        """The values (C, p) of the next integers."""
        self.head = np.concatenate([self.head, real[:, : 2 - self.head.shape[1]]], 1) if self.head.shape[1] < 2 else self.head
        real = np.concatenate([self.tail[:, -1:], real], 1)
        self.tail = real[:, -2:].copy()
        if real.shape[1] > 1:
            steps = self._steps(real)
            self.starts.append(self.seen)
            self.seen += steps.shape[1]
            self.extremes.append((steps.min(1), steps.max(1)))

    def _steps(self, real: np.ndarray) -> np.ndarray:
        return np.diff(real, axis=1) / self.step

    def settle(self, values: Callable[[int, int], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """first, left, right; values(a, b) gives the real values (C, b - a) of n[a:b] once more."""
        n, last, head, tail = self.n, len(self.n) - 1, self.head, self.tail
        left, right = (head[:, 1] - head[:, 0]) / self.step, (tail[:, -1] - tail[:, -2]) / self.step
        least, most = (np.stack(column, 1) for column in zip(*self.extremes, strict=True))  # (C, pieces)
        limit = 1e-6 * (np.maximum(most.max(1), -least.min(1)) + 1e-300)
        bent = np.maximum(most - left[:, None], left[:, None] - least) > limit[:, None]
        first, at_end, at_start = np.full(len(left), len(n)), tail[:, -1].copy(), tail[:, -1].copy()
        where = np.where(bent.any(1), bent.argmax(1), -1)
        for piece in np.unique(where[where >= 0]):
            rows = np.flatnonzero(where == piece)
            a = self.starts[piece]
            b = self.starts[piece + 1] if piece + 1 < len(self.starts) else last
            real = values(a, b + 1)[rows]
            inside = (np.abs(self._steps(real) - left[rows, None]) > limit[rows, None]).argmax(1)
            k = np.arange(len(rows))
            first[rows], at_end[rows], at_start[rows] = a + inside, real[k, inside], real[k, inside + 1]
        # long lines: the slope over the whole straight part is more precise than one difference
        end, start = np.minimum(first, last), np.minimum(first + 1, last)
        left = np.where(end > 0, (at_end - head[:, 0]) / np.maximum(n[end] - n[0], 1), left)
        right = np.where(start < last, (tail[:, -1] - at_start) / np.maximum(n[-1] - n[start], 1), right)
        return first, left, right


def fit_lines(n: np.ndarray, codes: np.ndarray, first: np.ndarray, left: np.ndarray, right: np.ndarray, grid: Grid) -> ops.Op | None:
    """A multiply-shift, of one line or of two with a kink, that gives exactly `codes`; None where there is none. n (P,); codes (C, P);
    first, left, right (C,) as `Slopes` finds them.
    """
    grid, points = tight_grid(grid, codes), len(n)
    if not (first < points).any():
        line = fit_line(n[None], codes, left, grid)
        if line is None:
            return None
        mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
        return ops.Requant(mul, add, line[2], grid.lo, grid.hi)
    # n >= kink uses the right line; channels without a kink use the left one everywhere
    behind = np.minimum(first + 1, points)
    kink = np.where(first < points - 1, n[np.minimum(behind, points - 1)], n[-1] + 1)
    two = fit_line(n[None], codes, left, grid, (np.zeros_like(behind), behind))
    one = fit_line(n[None], codes, right, grid, (behind, np.full_like(behind, points)))
    if one is None or two is None:
        return None
    shift = max(one[2], two[2])
    mul, add, mul2, add2 = (x << (shift - s) for x, s in ((one[0], one[2]), (one[1], one[2]), (two[0], two[2]), (two[1], two[2])))
    tables = compress(*(x[:, None] for x in (mul, add, kink, mul2, add2)))
    mul, add, kink, mul2, add2 = (x[:, 0] for x in tables)
    return ops.Requant(mul, add, shift, grid.lo, grid.hi, kink, mul2, add2)


def fit_between(
    value: Map, edge: Edge, thresholds: np.ndarray, sign: np.ndarray, low: np.ndarray, high: np.ndarray, grid: Grid
) -> ops.Op | None:
    """A multiply-shift that agrees at both sides of every threshold and at the ends; both functions are monotone, so it agrees
    everywhere.
    """
    inside = np.clip(thresholds, low, high)
    points = np.concatenate(
        [np.broadcast_to(low, (len(sign), 1)), np.clip(inside - 1, low, high), inside, np.broadcast_to(high, (len(sign), 1))], axis=1
    )
    n = (sign * points).T  # (P, C)
    env: dict[object, Tensor] = {edge.name: real_of(edge, n)}
    codes, real = codes_of(value, env, grid), codes_of(value, env, grid, before=True)
    tight = tight_grid(grid, codes)
    first, last = points.argmin(1), points.argmax(1)  # ends, unless the code moves only in between
    moves = (thresholds > low) & (thresholds <= high)
    where = np.arange(thresholds.shape[1])
    left = 1 + thresholds.shape[1] + np.where(moves.any(1), np.where(moves, where, 10**9).min(1), 0)
    right = 1 + thresholds.shape[1] + np.where(moves.any(1), np.where(moves, where, -1).max(1), 0)
    first, last = np.where(left < right, left, first), np.where(left < right, right, last)
    columns = np.arange(len(sign))
    run = n[last, columns] - n[first, columns]
    slope = np.where(run != 0, (real[last, columns] - real[first, columns]) / np.where(run == 0, 1, run), 0.0)
    line = fit_line(np.ascontiguousarray(n.T), np.ascontiguousarray(codes.T), slope, tight)
    if line is None:
        return None
    mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
    return ops.Requant(mul, add, line[2], tight.lo, tight.hi)


def tight_grid(grid: Grid, codes: np.ndarray) -> Grid:
    """A clamp may be as tight as the codes that occur."""
    return Grid(int(codes.min()), int(codes.max()), grid.scale)
