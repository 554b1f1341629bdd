"""Two or more sources before one quantizer: thresholds on the widest for each code of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid
from quantlib.tails.expressions import ConversionError, Edge, Map, evaluate, maps, monotone, occurrences
from quantlib.tails.probing import codes_of, compress, integers, real_of
from quantlib.tails.thresholds import ENUMERATE, TABLE_LIMIT, bisected, directions, thresholds_of

if TYPE_CHECKING:
    from quantlib.lowering import Lowering


def join(g: Lowering, value: Map, edges: list[Edge], grid: Grid) -> Edge:
    """Two or more sources before one quantizer: thresholds on the widest for each code of the others."""
    wide, *narrow = sorted(edges, key=lambda e: -e.type.levels)
    sizes = tuple(e.type.levels for e in narrow)
    count, channels, levels = int(np.prod(sizes)), value.shape[0], grid.levels - 1
    remedies = (
        "Share one quantizer between the branches (SharedHardTanh, or the same QuantIdentity on both), or give one branch a "
        "quantizer or a FixedPoint grid "
        "(bits, fraction) of its own in the model, where training sees it."
    )
    if count > 1024 or count * channels * levels > TABLE_LIMIT:
        names = " and ".join(f"{e.name} {e.type}" for e in edges)
        on_the_way = dict.fromkeys(m.label for m in maps(value) if m.label != value.label)
        names += f" (through {'; '.join(on_the_way)})" if on_the_way else ""
        raise ConversionError(f"{value.label}: real-valued join of wide operands with different scales: {names}. {remedies}")
    if wide.type.levels > ENUMERATE and (not np.all(monotone(value)) or occurrences(value, wide) != 1):
        raise ConversionError(f"{value.label}: a join that is not known to be monotone in {wide.name} {wide.type}. {remedies}")
    combos = np.stack(np.meshgrid(*(integers(e.type) for e in narrow), indexing="ij"), axis=-1).reshape(count, len(narrow))

    def run(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Codes for integers n (P, C) of the wide edge and combination k (P,) of the narrow ones."""
        env: dict[object, Tensor] = {wide.name: real_of(wide, n)}
        env |= {e.name: real_of(e, combos[k, i][:, None]) for i, e in enumerate(narrow)}
        return codes_of(value, env, grid)

    t = wide.type
    thresholds = np.empty((channels, count, levels), dtype=np.int64)
    signs = np.empty((channels, count), dtype=np.int64)
    if t.levels <= ENUMERATE:
        n = integers(t)
        for k in range(count):
            codes = np.ascontiguousarray(run(n[:, None], np.full(len(n), k)).T)
            rising, falling = directions(codes)
            if not np.all(rising | falling):
                raise ConversionError(f"{value.label}: the join is not monotone in {wide.name} {t}; use a monotone activation. {remedies}")
            thresholds[:, k], sign = thresholds_of(codes, n, rising, grid, t)
            signs[:, k] = sign[:, 0]
    else:
        for k in range(count):
            fixed: dict[object, Tensor] = {e.name: real_of(e, combos[k : k + 1, i][:, None]) for i, e in enumerate(narrow)}
            one = Map(lambda x, fixed=fixed: evaluate(value, fixed | {wide.name: x}), (wide,), value.label, shape=value.shape)
            row = bisected(one, wide, grid)
            assert isinstance(row, ops.Threshold)
            thresholds[:, k], signs[:, k] = row.thresholds, row.sign
    flat, signs = _one_direction(thresholds, signs)
    op: ops.Op | None = _affine_join(value, wide, combos, narrow, flat, signs, grid, sizes)
    if op is None:
        rows = compress(flat.reshape(channels, -1), signs)
        op = ops.Join(rows[0].reshape(-1, count, levels), rows[1], grid.lo, grid.step, sizes, *_lattice(narrow))
    return g.add(op, wide, *narrow, scale=grid.scale)


def _lattice(narrow: list[Edge]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(e.type.lo for e in narrow), tuple(e.type.step for e in narrow)


def _one_direction(thresholds: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One sign per channel where all narrow codes agree."""
    same = (signs == signs[:, :1]).all()
    return thresholds, signs[:, :1] if same else signs


def _affine_join(
    value: Map,
    wide: Edge,
    combos: np.ndarray,
    narrow: list[Edge],
    thresholds: np.ndarray,
    signs: np.ndarray,
    grid: Grid,
    sizes: tuple[int, ...],
) -> ops.Op | None:
    """The rank-one form: thresholds of (sign*n << F) + offset[c][k]. Kept only if it reproduces the whole table."""
    channels, count, levels = thresholds.shape
    if value.pre is None or signs.shape[1] != 1 or levels == 0:
        return None
    t = wide.type
    ends = np.array([t.lo, t.hi], dtype=np.int64)[:, None]
    where = np.repeat(np.arange(count), 2)
    env: dict[object, Tensor] = {wide.name: real_of(wide, np.tile(ends, (count, 1)))}
    env |= {e.name: real_of(e, combos[where, i][:, None]) for i, e in enumerate(narrow)}
    real = codes_of(value, env, grid, before=True).reshape(count, 2, channels)
    slope = (real[:, 1] - real[:, 0]) / max(t.hi - t.lo, 1)  # (K, C)
    if (slope == 0).any() or not np.allclose(slope, slope[:1], rtol=1e-9, atol=0):
        return None
    distance = ((real[:, 0] - real[:1, 0]) / np.abs(slope[:1])).T  # how far combination k moves the wide operand, (C, K)
    low, high = np.where(signs > 0, t.lo, -t.hi), np.where(signs > 0, t.hi, -t.lo)
    always, never = thresholds <= low[:, :, None], thresholds > high[:, :, None]
    for fraction in range(0, 13):
        if (np.abs(distance).max() + t.magnitude + 1) * 2.0**fraction >= 2.0**50:
            return None
        offset = np.rint(distance * 2.0**fraction).astype(np.int64)
        at_most = np.where(never, 2**60, (thresholds << fraction) + offset[:, :, None])  # n = T must reach
        at_most = np.where(always, (low[:, :, None] << fraction) + offset[:, :, None], at_most)
        above = np.where(always, -(2**60), ((thresholds - 1) << fraction) + offset[:, :, None])  # n = T - 1 must not
        above = np.where(never, (high[:, :, None] << fraction) + offset[:, :, None], above)
        least, most = above.max(1) + 1, at_most.min(1)
        if (least <= most).all():
            chosen = np.where(most >= 2**60, least, most)
            if (np.diff(chosen, axis=1) < 0).any():
                continue
            rows = compress(offset, chosen, signs)
            return ops.AffineJoin(rows[0], fraction, rows[1], rows[2][:, 0], grid.lo, grid.step, sizes, *_lattice(narrow))
    return None
