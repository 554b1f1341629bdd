"""The tail rule itself: which way of running the tail suits its sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantlib.ir import Grid
from quantlib.tails.expressions import Edge, Map, monotone, occurrences
from quantlib.tails.joins import join
from quantlib.tails.thresholds import ENUMERATE, FEW_LEVELS, MANY_INTEGERS, bisected, enumerated

if TYPE_CHECKING:
    from quantlib.lowering import Lowering


SOME_LEVELS = 1023  # up to here the thresholds of a wide interval are found by bisection before a multiply-shift is tried
EVERY_LIMIT = 1 << 22  # (integer, channel) pairs up to which running every integer is cheaper than bisection


def tail(g: Lowering, value: Map, edges: list[Edge], grid: Grid) -> Edge:
    edges = [g.expand(e, value.shape) for e in edges]
    if len(edges) > 1:
        return join(g, value, edges, grid)
    (edge,) = edges
    t, levels = edge.type, grid.levels - 1
    few = levels <= FEW_LEVELS or (levels <= SOME_LEVELS and t.levels * t.shape[0] > EVERY_LIMIT)
    known = bool(np.all(monotone(value))) and occurrences(value, edge) == 1
    wide = t.levels > ENUMERATE if known else t.levels > MANY_INTEGERS
    op = bisected(value, edge, grid) if few and wide else enumerated(value, edge, grid)
    out = g.add(op, edge, scale=grid.scale)
    g.tails[out.name] = (value, edge, grid)
    return out
