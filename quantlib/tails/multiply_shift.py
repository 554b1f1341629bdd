"""Find and prove clamp((n * mul + add) >> shift) for codes that were measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid
from quantlib.tails.expressions import Edge, Map
from quantlib.tails.probing import codes_of, compress, real_of


def fit_line(n: np.ndarray, codes: np.ndarray, slope: np.ndarray, grid: Grid, use: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """mul, add (C,) and shift with clamp((n*mul + add) >> shift) == codes at every used point, or None. Proven by integer
    inequalities.

    n (P, 1) or (P, C), codes (P, C), slope (C,) in codes per integer, use (P, C) bool. The smallest shift up to 40 that works for all
    channels is taken.
    """
    span = int(np.abs(n).max(initial=1)).bit_length()
    steepest = float(np.abs(slope).max(initial=0.0))
    columns = np.arange(codes.shape[1])
    few = np.unique(
        np.linspace(0, len(n) - 1, min(len(n), 1024)).astype(np.int64)
    )  # the points that decide; grows by those that refute a candidate

    def bounds(shift: int, rows: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Per channel: the largest lower and the smallest upper bound on add that these points set, and the rows that set them."""
        code = codes[rows]
        low = (code << shift) - n[rows] * np.rint(slope * 2.0**shift).astype(np.int64)
        high = low + ((1 << shift) - 1)
        low[(code <= grid.lo) | ~use[rows]] = -(2**62)
        high[(code >= grid.hi) | ~use[rows]] = 2**62
        first, last = low.argmax(0), high.argmin(0)
        return low[first, columns], high[last, columns], first, last

    def fits(shift: int) -> bool:
        return steepest * 2.0**shift < 2.0 ** (62 - span) and (steepest + max(abs(grid.lo), abs(grid.hi)) + 2) * 2.0**shift < 2.0**62

    def sample_allows(shift: int) -> bool:
        low, high, _, _ = bounds(shift, few)
        return bool((low <= high).all())

    def add_for(shift: int) -> np.ndarray | None:
        nonlocal few
        low, high = np.full(len(columns), -(2**62)), np.full(len(columns), 2**62)
        for start in range(0, len(n), 4096):
            block_low, block_high, first, last = bounds(shift, slice(start, start + 4096))
            tighter = np.concatenate([first[block_low > low], last[block_high < high]]) + start
            low, high = np.maximum(low, block_low), np.minimum(high, block_high)
            if (low > high).any():
                few = np.union1d(few, tighter)
                return None
        free_low, free_high = low == -(2**62), high == 2**62
        return np.where(free_low & free_high, 0, np.where(free_low, high, np.where(free_high, low, low + (high - low) // 2)))

    # the smallest shift that suits a sample of the points, by bisection (almost monotone), then upwards until it suits them all
    below, above = -1, 40
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if not fits(middle) or sample_allows(middle) else (middle, above)
    for shift in range(above, 41):
        if not fits(shift):
            return None
        add = add_for(shift) if sample_allows(shift) else None
        if add is not None:
            return np.rint(slope * 2.0**shift).astype(np.int64), add, shift
    return None


def fit_lines(n: np.ndarray, codes: np.ndarray, real: np.ndarray, grid: Grid) -> ops.Op | None:
    """A multiply-shift, of one line or of two with a kink, that gives exactly `codes`; None where there is none. n (P,); codes, real
    (P, C).
    """
    step = int(n[1] - n[0])
    grid = tight_grid(grid, codes)
    steps = np.diff(real, axis=0) / step
    size = np.abs(steps).max(0) + 1e-300
    left, right = real[1] - real[0], real[-1] - real[-2]
    left, right = left / step, right / step
    bent = np.abs(steps - left) > 1e-6 * size
    first = np.where(bent.any(0), bent.argmax(0), len(n))  # the interval that holds the kink, per channel
    # long lines: the slope over the whole straight part is more precise than one difference
    columns = np.arange(codes.shape[1])
    end = np.minimum(first, len(n) - 1)
    left = np.where(end > 0, (real[end, columns] - real[0]) / np.maximum(n[end] - n[0], 1), left)
    kinked = bool(bent.any())
    start = np.minimum(first + 1, len(n) - 1)
    right = np.where(start < len(n) - 1, (real[-1] - real[start, columns]) / np.maximum(n[-1] - n[start], 1), right)
    rows = np.arange(len(n))[:, None]
    if not kinked:
        line = fit_line(n[:, None], codes, left, grid, np.ones_like(codes, dtype=bool))
        if line is None:
            return None
        mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
        return ops.Requant(mul, add, line[2], grid.lo, grid.hi)
    upper = rows > first  # n >= kink uses the right line; channels without a kink use the left one everywhere
    kink = np.where(first < len(n) - 1, n[np.minimum(first + 1, len(n) - 1)], n[-1] + 1)
    two = fit_line(n[:, None], codes, left, grid, ~upper)
    one = fit_line(n[:, None], codes, right, grid, upper)
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
    line = fit_line(n, codes, slope, tight, np.ones_like(codes, dtype=bool))
    if line is None:
        return None
    mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
    return ops.Requant(mul, add, line[2], tight.lo, tight.hi)


def tight_grid(grid: Grid, codes: np.ndarray) -> Grid:
    """A clamp may be as tight as the codes that occur."""
    return Grid(int(codes.min()), int(codes.max()), grid.scale)
