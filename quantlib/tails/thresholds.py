"""One source before a quantizer, stored as thresholds, as a multiply-shift or as a table."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid, IntType
from quantlib.tails.expressions import ConversionError, Edge, Map, evaluate, every, monotone, occurrences
from quantlib.tails.multiply_shift import Slopes, fit_between, fit_lines
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
    probe = _Probe(value, edge, grid, n, narrow)
    slopes = Slopes(n, channels) if lines else None
    codes = probe.codes(slopes)
    if grid.levels - 1 <= FEW_LEVELS:
        rising, falling = directions(codes)
        if np.all(rising | falling):
            return threshold_op(codes, n, rising, grid, t)
    if slopes is not None:
        op = fit_lines(n, codes, *slopes.settle(probe.units), grid)
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


class _Probe:
    """Runs an expression on integers n (P,) of its edge, all channels at once, or one where all share one function (narrow)."""

    def __init__(self, value: Map, edge: Edge, grid: Grid, n: np.ndarray, narrow: bool) -> None:
        self.value, self.edge, self.grid, self.n, self.narrow = value, edge, grid, n, narrow
        self.channels = 1 if narrow else edge.shape[0]
        env: dict[object, Tensor] = {edge.name: real_of(edge, n[:1, None], narrow)}
        codes_of(value, env, grid, narrow=narrow)  # refuses constants that change inside a channel

    def _inner(self, start: int, stop: int) -> list[Tensor]:
        env: dict[object, Tensor] = {self.edge.name: real_along(self.edge, self.n[start:stop], self.narrow)}
        inner = {id(a): evaluate(a, env) for a in self.value.args}
        return [inner[id(a)] for a in self.value.args]

    def _units(self, real: list[Tensor]) -> np.ndarray:
        assert self.value.pre is not None
        return units_of(self.value, by_probe(self.value.pre(*real)), self.grid, self.narrow).T

    def codes(self, slopes: Slopes | None) -> np.ndarray:
        """The codes (C, P) of all integers, in the narrowest type; `slopes` sees the real values before the quantizer, in steps."""
        value, grid, reach = self.value, self.grid, max(-self.grid.lo, self.grid.hi)
        found = np.empty((self.channels, len(self.n)), dtype=np.int16 if reach < 1 << 15 else np.int32 if reach < 1 << 31 else np.int64)
        size = max(1, PIECE // self.channels)
        for start in range(0, len(self.n), size):
            real = self._inner(start, start + size)
            with torch.no_grad():
                found[:, start : start + size] = snap_codes(value, by_probe(value.fn(*real)), grid, self.narrow).T
                if slopes is not None:
                    slopes.see(self._units(real))
        return found

    def units(self, start: int, stop: int) -> np.ndarray:
        """The real values (C, stop - start) before the quantizer, in steps."""
        real = self._inner(start, stop)
        with torch.no_grad():
            return self._units(real)


def directions(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of codes (C, P) never fall, and which never rise."""
    lower, upper = codes[:, :-1], codes[:, 1:]
    return np.all(lower <= upper, axis=1), np.all(lower >= upper, axis=1)


def threshold_op(codes: np.ndarray, n: np.ndarray, rising: np.ndarray, grid: Grid, t: IntType) -> ops.Op:
    thresholds, sign = compress(*thresholds_of(codes, n, rising, grid, t))
    return ops.Threshold(thresholds, sign[:, 0], grid.lo, grid.step)


def below_levels(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """How many codes of each row (C, P) lie below each level but the first, (C, L)."""
    channels = len(codes)
    rows = (codes.astype(np.int64) - grid.lo) // grid.step + grid.levels * np.arange(channels)[:, None]
    reached = np.bincount(rows.reshape(-1), minlength=channels * grid.levels).reshape(channels, -1)
    return np.cumsum(reached, axis=1)[:, :-1]


def thresholds_of(codes: np.ndarray, n: np.ndarray, rising: np.ndarray, grid: Grid, t: IntType) -> tuple[np.ndarray, np.ndarray]:
    """From codes (C, P) that are monotone in n (P,): thresholds (C, L) on sign * n, and sign (C, 1). Never true: one above the interval."""
    sign, first = np.where(rising, 1, -1)[:, None], below_levels(codes, grid)
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
    count = grid.levels - 1
    low, high = codes_of(value, {edge.name: real_of(edge, np.array([[t.lo], [t.hi]]))}, grid)
    sign = np.where(high < low, -1, 1)[:, None]
    levels = grid.lo + grid.step * np.arange(1, grid.levels)
    # invariant: code(sign * n) < level at `below`, >= level at `above`; the ends are virtual.
    low_end, high_end = np.where(sign > 0, t.lo, -t.hi), np.where(sign > 0, t.hi, -t.lo)
    places = low_end + (high_end - low_end) * np.arange(count + 1) // max(count, 1)  # evenly: many steps for the price of one
    first = below_levels(codes_of(value, {edge.name: real_of(edge, (sign * places).T)}, grid).T, grid)
    places = np.concatenate([low_end - 1, places, high_end + 1], axis=1)
    below, above = np.take_along_axis(places, first, 1), np.take_along_axis(places, first + 1, 1)
    while (open_ := above - below > 1).any():
        middle = below + above
        middle >>= 1
        np.clip(middle, low_end, high_end, out=middle)
        reached = codes_of(value, {edge.name: real_of(edge, (sign * middle).T)}, grid).T >= levels
        np.copyto(above, middle, where=open_ & reached)
        np.copyto(below, middle, where=open_ & ~reached)
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
