"""One source before a quantizer, stored as thresholds, as a multiply-shift or as a table."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid, IntType
from quantlib.tails.expressions import ConversionError, Edge, Map, evaluate, every, monotone, occurrences
from quantlib.tails.multiply_shift import fit_between, fit_lines
from quantlib.tails.probing import by_probe, codes_of, compress, integers, real_along, real_of, snap_codes, units_of

ENUMERATE = 4096  # integers of an interval that are always run one by one
FEW_LEVELS = 31  # up to here a quantizer's output is stored as thresholds; above, a proven multiply-shift is preferred
TABLE_LIMIT = 1 << 20  # entries of the largest table that is worth storing
PROBE_LIMIT = 1 << 26  # (integer, channel) pairs over which a multiply-shift is proven one by one
PIECE = 1 << 17  # (integer, channel) pairs that are run at a time
MANY_INTEGERS = 1 << 16  # the same where a tail is not declared monotone, and bisection would be wrong


def enumerated(value: Map, edge: Edge, grid: Grid) -> ops.Op:
    """Every integer of the interval, one by one."""
    t = edge.type
    narrow = every(value, "uniform") and np.asarray(t.scale).size == 1 and np.asarray(grid.scale).size == 1
    channels = 1 if narrow else t.shape[0]
    if t.levels * channels > PROBE_LIMIT:
        raise ConversionError(
            f"{value.label}: {grid.levels} output levels on an accumulator of {t.levels} integers ({t}); use fewer output "
            f"bits, or a FixedPoint step in between"
        )
    n = integers(t)
    lines = grid.step == 1 and grid.levels - 1 > FEW_LEVELS and value.pre is not None and len(n) > 2
    codes, units = _every_integer(value, edge, grid, n, narrow, lines)
    if grid.levels - 1 <= FEW_LEVELS:
        rising, falling = directions(codes)
        if np.all(rising | falling):
            return threshold_op(codes, n, rising, grid, t)
    if lines:
        op = fit_lines(n, codes, units, grid)
        if op is not None:
            return op
    rising, falling = directions(codes)
    is_monotone = bool(np.all(rising | falling))
    if is_monotone and grid.levels - 1 <= 255 and grid.levels < len(n):
        return threshold_op(codes, n, rising, grid, t)
    (table,) = compress(codes.astype(np.int64))
    if table.size > TABLE_LIMIT:
        raise ConversionError(
            f"{value.label}: the function from accumulator to code is {'no multiply-shift' if is_monotone else 'not monotone'} "
            f"and its table would have "
            f"{table.size} entries; use fewer bits, a FixedPoint step, or a monotone activation"
        )
    return ops.Lut(table, t.lo, t.step, grid.step)


def _every_integer(value: Map, edge: Edge, grid: Grid, n: np.ndarray, narrow: bool, lines: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes (C, P) of all integers n (P,), and with `lines` the real values before the quantizer, in steps; C is 1 where narrow."""
    channels = 1 if narrow else edge.shape[0]
    codes = np.empty((channels, len(n)), dtype=np.int32 if max(-grid.lo, grid.hi) < 1 << 30 else np.int64)
    units = np.empty((channels, len(n)) if lines else (0, 0))
    codes_of(value, {edge.name: real_of(edge, n[:1, None], narrow)}, grid, narrow=narrow)  # refuses constants that change inside a channel
    per_piece = max(1, PIECE // channels)
    for start in range(0, len(n), per_piece):
        piece = slice(start, start + per_piece)
        env: dict[object, Tensor] = {edge.name: real_along(edge, n[piece], narrow)}
        inner = {id(a): evaluate(a, env) for a in value.args}
        real = [inner[id(a)] for a in value.args]
        with torch.no_grad():
            codes[:, piece] = snap_codes(value, by_probe(value.fn(*real)), grid, narrow).T
            if lines and value.pre:
                units[:, piece] = units_of(value, by_probe(value.pre(*real)), grid, narrow).T
    return codes, units


def directions(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of codes (C, P) never fall, and which never rise."""
    lower, upper = codes[:, :-1], codes[:, 1:]
    return np.all(lower <= upper, axis=1), np.all(lower >= upper, axis=1)


def threshold_op(codes: np.ndarray, n: np.ndarray, rising: np.ndarray, grid: Grid, t: IntType) -> ops.Op:
    thresholds, sign = compress(*thresholds_of(codes, n, rising, grid, t))
    return ops.Threshold(thresholds, sign[:, 0], grid.lo, grid.step)


def thresholds_of(codes: np.ndarray, n: np.ndarray, rising: np.ndarray, grid: Grid, t: IntType) -> tuple[np.ndarray, np.ndarray]:
    """From codes (C, P) that are monotone in n (P,): thresholds (C, L) on sign * n, and sign (C, 1). Never true: one above the interval."""
    sign = np.where(rising, 1, -1)[:, None]
    channels = len(codes)
    rows = (codes - grid.lo) // grid.step + grid.levels * np.arange(channels)[:, None]
    reached = np.bincount(rows.reshape(-1), minlength=channels * grid.levels).reshape(channels, -1)  # integers per code
    first = np.cumsum(reached, axis=1)[:, :-1]  # (C, L): how many lie below each level
    up, down = np.append(n, n[-1] + 1), np.append(-n[::-1], 1 - n[0])  # sign * n, ascending
    return np.where(sign > 0, up[first], down[first]), sign


def bisected(value: Map, edge: Edge, grid: Grid) -> ops.Op:
    """All (channel, level) at once; only where the tail is declared monotone."""
    t = edge.type
    if not np.all(monotone(value)) or occurrences(value, edge) != 1:
        raise ConversionError(
            f"{value.label}: a step that is not known to be monotone follows an accumulator of {t.levels} integers ({t}), too "
            f"many to run one by one "
            f"(limit {MANY_INTEGERS}); use a monotone activation (PReLU slopes >= 0), or a FixedPoint or other quantizer right "
            f"after the accumulator"
        )
    channels, count = value.shape[0], grid.levels - 1
    low, high = codes_of(value, {edge.name: real_of(edge, np.array([[t.lo], [t.hi]]))}, grid)
    sign = np.where(high < low, -1, 1)[:, None]
    levels = grid.lo + grid.step * np.arange(1, grid.levels)
    # invariant: code(sign * n) < level at `below`, >= level at `above`; the ends are virtual.
    low_end, high_end = np.where(sign > 0, t.lo, -t.hi), np.where(sign > 0, t.hi, -t.lo)
    below, above = np.broadcast_to(low_end - 1, (channels, count)).copy(), np.broadcast_to(high_end + 1, (channels, count)).copy()
    while (above - below > 1).any():
        middle = (below + above) // 2
        middle = np.clip(middle, low_end, high_end)
        codes = codes_of(value, {edge.name: real_of(edge, (sign * middle).T)}, grid).T
        reached = codes >= levels
        open_ = above - below > 1
        above = np.where(open_ & reached, middle, above)
        below = np.where(open_ & ~reached, middle, below)
    if count > FEW_LEVELS and grid.step == 1 and value.pre is not None:
        op = fit_between(value, edge, above, sign, low_end, high_end, grid)
        if op is not None:
            return op
    if count > FEW_LEVELS and above.size > TABLE_LIMIT:
        raise ConversionError(
            f"{value.label}: no multiply-shift gives its {grid.levels} levels, and {above.size} thresholds are too many; use "
            f"fewer output bits"
        )
    thresholds, sign = compress(above, sign)
    return ops.Threshold(thresholds, sign[:, 0], grid.lo, grid.step)
