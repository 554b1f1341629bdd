"""Thresholds that lie on a line: clamp((a * clamp(n) + b) >> s) counts the reached ones in one multiplication.

n is clamped between the point before the first threshold and the last one. The expression is monotone in sign*n, so it is right everywhere
when it is right on both sides of every threshold. For a slope a, threshold k asks b >= k*2^s - a*t[k], and the point before it
b < k*2^s - a*(t[k] - 1): there is such a b if the greatest of the first lies below the least of the second. All of it is computed in
integers. At both ends of the inner interval, so between them, a*n + b lies in int32; the product and b wrap around 2^32, the sum is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST = 4  # levels; fewer are compared as fast
WORK = 1 << 26  # channels * levels^2: pairs of thresholds looked at
MENDED = 0.05  # channels without a line that are worth an exception
NONE = 1 << 62


@dataclass(frozen=True)
class Lines:
    """lo + #{k: sign*n >= thresholds[c][k]} =
    clamp(int32(mul[c] * clamp(n, low[c], high[c]) + add[c]) >> shift, lo, lo + levels) where proven[c]; elsewhere all are 0."""

    low: np.ndarray
    high: np.ndarray
    mul: np.ndarray
    add: np.ndarray
    shift: int
    proven: np.ndarray


def through(thresholds: np.ndarray, sign: np.ndarray, lo: int, span: tuple[int, int]) -> Lines:
    """Lines through thresholds (C, levels), ascending, with sign (C,), for n in span. Raises nothing: what has no line is not proven."""
    levels, sign = thresholds.shape[1], sign[:, None]
    low, high = np.where(sign > 0, span[0], -span[1]), np.where(sign > 0, span[1], -span[0])
    thresholds = np.clip(thresholds, low, high + 1)
    first, last = np.maximum(thresholds[:, :1] - 1, low), np.minimum(thresholds[:, -1:], high)
    at, before = np.minimum(thresholds, high), np.maximum(thresholds - 1, low)
    must, must_not = thresholds <= high, thresholds > low
    least, greatest = _slopes(at, before, must, must_not)
    slope = np.where(np.isinf(greatest), least + 0.5, (least + np.minimum(greatest, 2 * least + 1)) / 2)

    largest = max(abs(lo - levels), abs(lo + 2 * levels)) + 2  # before and behind a step that is all levels high
    shift = max(31 - int(largest).bit_length(), 0)
    a = np.minimum(np.rint(slope * 2.0**shift), (1 << 31) - 1).astype(np.int64)
    codes, steep = (lo + np.arange(1, levels + 1)) << shift, a[:, None]
    floor = np.where(must, codes - steep * at, -NONE).max(1)
    ceiling = np.where(must_not, codes - 1 - steep * before, NONE).min(1)
    b = np.where(floor == -NONE, ceiling, np.where(ceiling == NONE, floor, floor + (ceiling - floor) // 2))
    sign, first, last = sign[:, 0], first[:, 0], last[:, 0]
    proven = (floor <= ceiling) & (a * first + b >= -(1 << 31)) & (a * last + b < 1 << 31)
    wrapped = ((b + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
    parts = np.where(sign > 0, first, -last), np.where(sign > 0, last, -first), a * sign, wrapped
    smallest, greatest, mul, add = (np.where(proven, v, 0) for v in parts)
    return Lines(smallest, greatest, mul, add, shift, proven)


def _slopes(at: np.ndarray, before: np.ndarray, must: np.ndarray, must_not: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which slopes (C,) every two thresholds allow a line: d levels apart, it rises by more than d from before[j] to at[j + d],
    and by less than d from at[j] to before[j + d]."""
    least, greatest = np.zeros(len(at)), np.full(len(at), np.inf)
    for d in range(1, at.shape[1]):
        rise = np.where(must[:, d:] & must_not[:, :-d], at[:, d:] - before[:, :-d], NONE).min(1)
        least = np.maximum(least, d / rise)
        run = np.where(must[:, :-d] & must_not[:, d:], before[:, d:] - at[:, :-d], 0).max(1)
        greatest = np.minimum(greatest, np.where(run > 0, d / np.maximum(run, 1), np.inf))
    return least, greatest
