"""Find and prove clamp((n * mul + add) >> shift) for codes that were measured."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid
from quantlib.tails.expressions import Edge, Map
from quantlib.tails.probing import codes_of, compress, real_of

BLOCK = 1 << 15  # (channel, point) pairs that are worked on at a time: they stay in the second cache
SAMPLE = 1024  # points on which a shift is tried before all of them are
FREE = 2**62  # beyond every bound on an addend


def fit_line(n: np.ndarray, codes: np.ndarray, slope: np.ndarray, grid: Grid, use: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """mul, add (C,) and shift with clamp((n*mul + add) >> shift) == codes at every used point, or None. Proven by integer
    inequalities.

    n (1, P) or (C, P), codes (C, P), slope (C,) in codes per integer, use (C, P) bool. The smallest shift up to 40 that works for all
    channels is taken.
    """
    channels, points = codes.shape
    span = int(np.abs(n).max(initial=1)).bit_length()
    steepest = float(np.abs(slope).max(initial=0.0))

    def fits(shift: int) -> bool:
        return steepest * 2.0**shift < 2.0 ** (62 - span) and (steepest + max(abs(grid.lo), abs(grid.hi)) + 2) * 2.0**shift < 2.0**62

    def multiplier(shift: int) -> np.ndarray:
        return np.rint(slope * 2.0**shift).astype(np.int64)

    # the smallest shift that suits a sample of the points, by bisection (almost monotone), then upwards until it suits them all
    few = np.unique(np.linspace(0, points - 1, min(points, SAMPLE)).astype(np.int64))
    sample = _Bounds(n[:, few], codes[:, few], use[:, few], grid)
    every = _Bounds(n, codes, use, grid)
    below, above = -1, 40
    while above - below > 1:
        middle = (below + above) // 2
        allowed = not fits(middle) or sample.addends(middle, multiplier(middle)) is not None
        below, above = (below, middle) if allowed else (middle, above)
    for shift in range(above, 41):
        if not fits(shift):
            return None
        mul = multiplier(shift)
        found = every.addends(shift, mul) if sample.addends(shift, mul) is not None else None
        if found is not None:
            low, high = found
            free_low, free_high = low == -FREE, high == FREE
            between = np.where(free_high, low, low + (high - low) // 2)
            return mul, np.where(free_low & free_high, 0, np.where(free_low, high, between)), shift
    return None


def _blocks(table: np.ndarray) -> list[slice]:
    """The rows of a table in pieces of about BLOCK entries."""
    rows = max(1, BLOCK // table.shape[1])
    return [slice(k, k + rows) for k in range(0, len(table), rows)]


class _Bounds:
    """The bounds that points set on the addend of a line, block of channels by block; what refuted the last line is tried first."""

    def __init__(self, n: np.ndarray, codes: np.ndarray, use: np.ndarray, grid: Grid) -> None:
        self.n, self.codes, self.use, self.grid = n, codes, use, grid
        self.blocks = _blocks(codes)

    def addends(self, shift: int, mul: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Per channel the largest lower and the smallest upper bound, -FREE and FREE where there is none; None where they cross."""
        low, high = np.empty(len(mul), dtype=np.int64), np.empty(len(mul), dtype=np.int64)
        for place, block in enumerate(self.blocks):
            code, use = self.codes[block], self.use[block]
            least = (code.astype(np.int64) << shift) - (self.n if len(self.n) == 1 else self.n[block]) * mul[block, None]
            for bound, open_, free in ((low, code > self.grid.lo, -FREE), (high, code < self.grid.hi, FREE)):
                open_ &= use
                at = least if open_.all() else np.where(open_, least, free)
                bound[block] = at.max(1) if bound is low else at.min(1)
            tight = high[block] < FREE
            high[block][tight] += (1 << shift) - 1
            if (low[block] > high[block]).any():
                self.blocks.insert(0, self.blocks.pop(place))
                return None
        return low, high


def fit_lines(n: np.ndarray, codes: np.ndarray, real: np.ndarray, grid: Grid) -> ops.Op | None:
    """A multiply-shift, of one line or of two with a kink, that gives exactly `codes`; None where there is none. n (P,); codes, real
    (C, P).
    """
    grid = tight_grid(grid, codes)
    parts = [_straight(n, real[block]) for block in _blocks(codes)]
    first, left, right = (np.concatenate(column) for column in zip(*parts, strict=True))
    kinked = bool((first < len(n)).any())
    if not kinked:
        line = fit_line(n[None], codes, left, grid, np.ones_like(codes, dtype=bool))
        if line is None:
            return None
        mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
        return ops.Requant(mul, add, line[2], grid.lo, grid.hi)
    upper = np.arange(len(n)) > first[:, None]  # n >= kink uses the right line; channels without a kink use the left one everywhere
    kink = np.where(first < len(n) - 1, n[np.minimum(first + 1, len(n) - 1)], n[-1] + 1)
    two = fit_line(n[None], codes, left, grid, ~upper)
    one = fit_line(n[None], codes, right, grid, upper)
    if one is None or two is None:
        return None
    shift = max(one[2], two[2])
    mul, add, mul2, add2 = (x << (shift - s) for x, s in ((one[0], one[2]), (one[1], one[2]), (two[0], two[2]), (two[1], two[2])))
    tables = compress(*(x[:, None] for x in (mul, add, kink, mul2, add2)))
    mul, add, kink, mul2, add2 = (x[:, 0] for x in tables)
    return ops.Requant(mul, add, shift, grid.lo, grid.hi, kink, mul2, add2)


def _straight(n: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per channel of real values (C, P): the interval that holds the kink (P where there is none), and the slopes before and behind it."""
    step, last = int(n[1] - n[0]), len(n) - 1
    steps = np.diff(real, axis=1)
    steps /= step
    left, right = (real[:, 1] - real[:, 0]) / step, (real[:, -1] - real[:, -2]) / step
    size = np.maximum(steps.max(1), -steps.min(1)) + 1e-300
    steps -= left[:, None]
    bent = np.abs(steps, out=steps) > 1e-6 * size[:, None]
    first = bent.argmax(1)
    rows = np.arange(len(real))
    first = np.where(bent[rows, first], first, len(n))
    # long lines: the slope over the whole straight part is more precise than one difference
    end, start = np.minimum(first, last), np.minimum(first + 1, last)
    left = np.where(end > 0, (real[rows, end] - real[:, 0]) / np.maximum(n[end] - n[0], 1), left)
    right = np.where(start < last, (real[:, -1] - real[rows, start]) / np.maximum(n[-1] - n[start], 1), right)
    return first, left, right


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
    line = fit_line(np.ascontiguousarray(n.T), np.ascontiguousarray(codes.T), slope, tight, np.ones(codes.T.shape, dtype=bool))
    if line is None:
        return None
    mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
    return ops.Requant(mul, add, line[2], tight.lo, tight.hi)


def tight_grid(grid: Grid, codes: np.ndarray) -> Grid:
    """A clamp may be as tight as the codes that occur."""
    return Grid(int(codes.min()), int(codes.max()), grid.scale)
