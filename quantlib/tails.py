"""The tail rule: from an integer accumulator to the next quantizer by running the trained modules, never by algebra.

Between an integer edge and a quantizer lie elementwise steps with per-channel constants. They are kept as an expression (Map over Edges). At the quantizer
the expression runs in float64 on integers of the edge's interval, laid on the batch axis, (P, C, 1, 1): on all of them up to 4,096, else by bisection where
monotonicity is declared. The codes that come back are the definition; Threshold, Requant, Lut and Join only store them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid, IntType

if TYPE_CHECKING:
    from quantlib.lowering import Lowering

ENUMERATE = 4096  # integers of an interval that are always run one by one
MANY_INTEGERS = 1 << 16  # the same where a tail is not declared monotone, and bisection would be wrong
FEW_LEVELS = 31  # up to here a quantizer's output is stored as thresholds; above, a proven multiply-shift is preferred
TABLE_LIMIT = 1 << 20  # entries of the largest table that is worth storing
SOME_LEVELS = 1023  # up to here the thresholds of a wide interval are found by bisection before a multiply-shift is tried
EVERY_LIMIT = 1 << 22  # (integer, channel) pairs up to which running every integer is cheaper than bisection
PROBE_LIMIT = 1 << 25  # (integer, channel) pairs over which a multiply-shift is proven one by one


class ConversionError(ValueError):
    """The model cannot be turned into integers exactly; the message names the place in the user's model and what would work."""


@dataclass(frozen=True, eq=False)
class Edge:
    """An integer edge of the graph under construction: real value = type.scale * n."""

    name: str
    type: IntType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape


@dataclass(frozen=True, eq=False)
class RealInput:
    """The network's input before its own input quantizer: real numbers."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Map:
    """An elementwise function with per-channel constants, still real.

    fn takes and returns tensors of any batch size in full or reduced layout (P, C, 1, 1) / (P, C).
    monotone: for fixed other arguments fn is monotone in each argument (True, False, or one bool per channel).
    affine: fn is a*x + b per channel in each argument. uniform: its constants are the same for all channels.
    pre: where fn ends in a quantizer, the same function without that quantizer (for slopes). shift: (edge, bias) where this is scale*n + bias of a layer.
    """

    fn: Callable[..., Tensor]
    args: tuple[Value, ...]
    label: str
    monotone: bool | np.ndarray = True
    affine: bool = False
    uniform: bool = False
    pre: Callable[..., Tensor] | None = None
    shift: tuple[Edge, np.ndarray] | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", tuple(np.broadcast_shapes(*(a.shape for a in self.args))))


@dataclass(frozen=True, eq=False)
class Move:
    """A pool or rearrangement met before the quantizer: it moves behind the quantizer, or in front of the elementwise steps, where that is exact.

    apply makes the integer op(s). kind: "move" only rearranges elements, "max" is max pooling, "mean" average pooling, "pad" adds zeros.
    index: for "move", the flat position in the concatenated arguments of every output element (-1 is a zero of "pad").
    """

    kind: str
    apply: Callable[..., Edge]
    args: tuple[Value, ...]
    shape: tuple[int, ...]
    label: str
    index: np.ndarray | None = None


Value = Edge | RealInput | Map | Move


# ---------------------------------------------------------------- expressions


def parts(value: Value) -> Iterator[Value]:
    """Every distinct part of an expression, the arguments of Moves included, leaves first."""
    seen: set[int] = set()

    def visit(v: Value) -> Iterator[Value]:
        if id(v) in seen:
            return
        seen.add(id(v))
        for a in getattr(v, "args", ()):
            yield from visit(a)
        yield v

    return visit(value)


def frontier(value: Value) -> list[Edge | RealInput | Move]:
    """The leaves of an elementwise expression: edges, the real input, and Moves, each once."""
    found: dict[object, Any] = {}

    def visit(v: Value) -> None:
        if isinstance(v, Map):
            for a in v.args:
                visit(a)
        else:
            found.setdefault(v.name if isinstance(v, Edge) else id(v), v)

    visit(value)
    return list(found.values())


def _key(leaf: Value) -> object:
    return leaf.name if isinstance(leaf, Edge) else id(leaf)


def evaluate(value: Value, env: Mapping[object, Tensor], before: bool = False) -> Tensor:
    """Run an elementwise expression on tensors for its leaves (keyed by edge name, else id). before: leave out the quantizer at its end."""
    memo: dict[int, Tensor] = {}

    def run(v: Value, pre: bool) -> Tensor:
        if not isinstance(v, Map):
            return env[_key(v)]
        if pre and v.pre is not None:
            return v.pre(*(run(a, False) for a in v.args))
        if id(v) not in memo:
            memo[id(v)] = v.fn(*(run(a, False) for a in v.args))
        return memo[id(v)]

    with torch.no_grad():
        return run(value, before)


def occurrences(value: Value, leaf: Value) -> int:
    """On how many paths the leaf enters the expression."""
    if not isinstance(value, Map):
        return int(_key(value) == _key(leaf))
    return sum(occurrences(a, leaf) for a in value.args)


def monotone(value: Value) -> bool | np.ndarray:
    if not isinstance(value, Map):
        return True
    result: bool | np.ndarray = value.monotone
    for a in value.args:
        result = np.logical_and(result, monotone(a))
    return result


def every(value: Value, attribute: str) -> bool:
    """Whether all Maps of an elementwise expression have the attribute (affine, uniform)."""
    return not isinstance(value, Map) or (getattr(value, attribute) and all(every(a, attribute) for a in value.args))


def layout(shape: tuple[int, ...], channels: np.ndarray) -> Tensor:
    """(P, C) numbers in the reduced layout of an edge: (P, C, 1, ...)."""
    return torch.from_numpy(np.ascontiguousarray(channels, dtype=np.float64)).reshape(len(channels), -1, *[1] * (len(shape) - 1))


def channel_scale(scale: np.ndarray | float, shape: tuple[int, ...], label: str) -> np.ndarray:
    """A scale as (C,) or (1,); a scale that changes inside a channel has no place in a tail."""
    scale = np.asarray(scale, dtype=np.float64)
    if scale.size == 1:
        return scale.reshape(1)
    full = np.broadcast_to(scale, shape).reshape(shape[0], -1)
    if not (full == full[:, :1]).all():
        raise ConversionError(f"{label}: the scale changes within a channel; quantize before the reshape, or with one scale")
    return np.ascontiguousarray(full[:, 0])


def substitute(value: Map, old: Value, new: Value) -> Map:
    """The same elementwise expression as one Map over `new`, which takes the place of its only leaf `old`."""
    direct = lambda t: evaluate(value, {_key(old): t})  # noqa: E731
    before = lambda t: evaluate(value, {_key(old): t}, before=True)  # noqa: E731
    single = occurrences(value, old) == 1
    return Map(
        direct, (new,), value.label, monotone=monotone(value) if single else False, affine=every(value, "affine"), uniform=every(value, "uniform"),
        pre=before if value.pre else None, shape=new.shape,
    )  # fmt: skip


# ---------------------------------------------------------------- moves


def settle(g: Lowering, value: Value, grid: Grid) -> Edge:
    """Make an edge out of a real expression whose values lie on `grid` (it ends in a quantizer)."""
    if isinstance(value, Edge):
        return value
    if isinstance(value, Move):
        return value.apply(g, *(settle(g, a, grid) for a in value.args))
    leaves = frontier(value)
    moves = [leaf for leaf in leaves if isinstance(leaf, Move)]
    if not moves:
        if isinstance(leaves[0], RealInput) and isinstance(value, Map):
            if len(leaves) > 1:
                raise ConversionError(f"{value.label}: the real input of the network meets another value before it is quantized; quantize it first")
            return g.front(value, leaves[0], grid)
        assert isinstance(value, Map)
        return tail(g, value, [leaf for leaf in leaves if isinstance(leaf, Edge)], grid)
    assert isinstance(value, Map)
    if len(leaves) == 1 and _commutes(value, moves[0], grid):
        move = moves[0]
        return move.apply(g, *(settle(g, substitute(value, move, a), grid) for a in move.args))
    return settle(g, _pull_all(g, value), grid)


def _spatial(move: Move) -> bool:
    """Whether a Move keeps every channel in its place."""
    if move.kind in ("max", "mean", "pad"):
        return True
    channels = channel_map(move)
    return channels is not None and len(move.args) == 1 and move.shape[0] == move.args[0].shape[0] and (channels == np.arange(len(channels))).all()


def _commutes(value: Map, move: Move, grid: Grid) -> bool:
    """Whether quantizing first and moving then gives the same integers."""
    if move.kind == "mean":
        return False
    uniform = every(value, "uniform") and np.asarray(grid.scale).size == 1
    if move.kind == "move":
        return uniform or _spatial(move)
    probe = layout(move.shape, np.array([[-1e12], [0.0], [1e12]]).repeat(move.shape[0], 1))
    low, zero, high = evaluate(value, {id(move): probe})
    if move.kind == "pad":
        return bool((zero == 0).all())
    return bool(np.all(monotone(value)) and occurrences(value, move) == 1 and (high >= low).all())


def channel_map(move: Move) -> np.ndarray | None:
    """For each output channel, the channel of the concatenated arguments it reads from; None where that changes inside a channel."""
    assert move.index is not None
    owner = np.concatenate([np.arange(a.shape[0]).repeat(int(np.prod(a.shape[1:]))) + base for a, base in zip(move.args, _bases(move), strict=True)])
    channels = owner[move.index.reshape(move.shape[0], -1)]
    return channels[:, 0] if (channels == channels[:, :1]).all() else None


def _bases(move: Move) -> list[int]:
    return np.cumsum([0, *(a.shape[0] for a in move.args)])[:-1].tolist()


def _pull_all(g: Lowering, value: Map) -> Map:
    """Replace every Move below an elementwise expression by elementwise steps over moved edges."""
    memo: dict[int, Value] = {}

    def visit(v: Value) -> Value:
        if id(v) not in memo:
            if isinstance(v, Move):
                memo[id(v)] = pull(g, v)
            elif isinstance(v, Map):
                args = tuple(visit(a) for a in v.args)
                memo[id(v)] = v if args == v.args else Map(v.fn, args, v.label, v.monotone, v.affine, v.uniform, v.pre, shape=v.shape)
            else:
                memo[id(v)] = v
        return memo[id(v)]

    result = visit(value)
    assert isinstance(result, Map)
    return result


def pull(g: Lowering, move: Move) -> Value:
    """Move(Map(f, edge)) as Map(f', Move(edge)), where that is exact."""
    args = [pull(g, a) if isinstance(a, Move) else _pull_all(g, a) if isinstance(a, Map) else a for a in move.args]
    edges = []
    for a in args:
        leaves = frontier(a)
        if len(leaves) != 1 or not isinstance(leaves[0], Edge):
            raise ConversionError(f"{move.label}: it works on the real-valued result of a join or on the real input; put a quantizer in front of it")
        edges.append(leaves[0])
    f, edge = args[0], edges[0]
    if move.kind == "move":
        return _pull_move(g, move, args, edges)
    if not isinstance(f, Map):
        return move.apply(g, edge)
    if move.kind == "mean":
        if every(f, "affine") and not getattr(move.apply, "padded", False):
            return substitute(f, edge, move.apply(g, edge))
        raise ConversionError(
            f"{move.label}: an average of real values that went through {f.label} has no integers; put a quantizer in front of the pooling "
            "(QuantIdentity, QuantReLU, a SharedHardTanh or FixedPoint), or pool before the nonlinearity"
        )
    if move.kind == "max" and np.all(monotone(f)) and occurrences(f, edge) == 1:
        ends = layout(edge.shape, np.stack([edge.type.lo * _scale(edge), edge.type.hi * _scale(edge)]))
        low, high = evaluate(f, {edge.name: ends}).reshape(2, edge.shape[0]).numpy()
        sign = np.where(high < low, -1, 1)
        if (sign == 1).all():
            return substitute(f, edge, move.apply(g, edge))
        t, zeros = edge.type, np.zeros(len(sign), dtype=np.int64)
        bound = t.magnitude
        flipped = g.add(ops.Requant(sign, zeros, 0, -bound, bound), edge, scale=t.scale)
        flip = torch.from_numpy(sign).double()
        back = lambda x: x * flip.reshape(1, -1, *[1] * (x.dim() - 2))  # noqa: E731
        return substitute(f, edge, Map(back, (move.apply(g, flipped),), move.label, affine=True))
    raise ConversionError(f"{move.label}: it does not commute with {f.label}, which comes before it; put a quantizer in front of it")


def _scale(edge: Edge) -> np.ndarray:
    return np.broadcast_to(channel_scale(edge.type.scale, edge.shape, edge.name), edge.shape[:1])


def _pull_move(g: Lowering, move: Move, args: list[Value], edges: list[Edge]) -> Value:
    moved = move.apply(g, *edges)
    if not any(isinstance(a, Map) for a in args):
        return moved
    channels = channel_map(move)
    if channels is None:
        raise ConversionError(f"{move.label}: it mixes channels whose values are not quantized yet; put a quantizer in front of it")
    bases = _bases(move)
    choice = np.searchsorted(np.array([*bases[1:], np.inf]), channels, side="right")
    plans = []
    for i, a in enumerate(args):  # outputs that read argument i: which of its channels, and which copy of that channel
        outs = np.flatnonzero(choice == i)
        chans = channels[outs] - bases[i]
        slots = np.array([int((chans[:j] == c).sum()) for j, c in enumerate(chans)], dtype=np.int64)
        plans.append((a, edges[i], outs, chans, slots))

    def run(x: Tensor) -> Tensor:
        """Lay each value on the channel it came from (copies along the batch axis), run the steps there, and read the results back."""
        p, result = len(x), torch.empty_like(x)
        flat, out = x.reshape(p, x.shape[1], -1), result.reshape(p, x.shape[1], -1)
        for a, edge, outs, chans, slots in plans:
            if not len(outs):
                continue
            copies, spatial = int(slots.max()) + 1, flat.shape[2]
            t = x.new_zeros(copies, spatial, p, edge.shape[0])
            t[slots, :, :, chans] = flat[:, outs].permute(1, 2, 0)
            value = evaluate(a, {edge.name: t.reshape(-1, edge.shape[0], *[1] * (len(edge.shape) - 1))}).reshape(t.shape)
            out[:, outs] = value[slots, :, :, chans].permute(2, 0, 1)
        return out.reshape(x.shape)

    flags = [np.all(monotone(a)) and occurrences(a, e) == 1 for a, e in zip(args, edges, strict=True)]
    return Map(run, (moved,), move.label, monotone=all(flags), affine=all(every(a, "affine") for a in args))


# ---------------------------------------------------------------- codes


def codes_of(value: Map, env: Mapping[object, Tensor], grid: Grid, before: bool = False, narrow: bool = False) -> np.ndarray:
    """Integer codes (P, C) that the expression gives on real inputs; with before, real values in units of the grid's scale; narrow: C is 1."""
    return units_of(value, evaluate(value, env, before), grid, narrow) if before else snap_codes(value, evaluate(value, env), grid, narrow)


def units_of(value: Map, real: Tensor, grid: Grid, narrow: bool = False) -> np.ndarray:
    """Real values (P, C, 1, ...) in units of the grid's scale, as (P, C)."""
    channels = 1 if narrow else value.shape[0]
    real = real.reshape(real.shape[0], -1)
    if real.shape[1] not in (1, channels):
        raise ConversionError(f"{value.label}: an elementwise step has constants that change inside a channel; only per-channel constants can be folded")
    scale = torch.from_numpy(channel_scale(grid.scale, value.shape, value.label).copy())
    return (real / scale).expand(-1, channels).numpy()


def snap_codes(value: Map, real: Tensor, grid: Grid, narrow: bool = False) -> np.ndarray:
    """Quantized real values as integer codes, with proof that they lie on the grid."""
    units = units_of(value, real, grid, narrow)
    n = np.rint(units)
    off = np.abs(units - n).max(initial=0)
    if np.isnan(off):
        raise ConversionError(f"{value.label}: NaN comes out of the layers before this quantizer; a parameter or a running variance is broken")
    if off > 1e-6:
        raise ConversionError(f"{value.label}: the quantizer gives values that are not on its grid (scale {grid.scale})")
    n = n.astype(np.int64)
    if n.min() < grid.lo or n.max() > grid.hi or (grid.step > 1 and ((n - grid.lo) % grid.step).any()):
        raise ConversionError(f"{value.label}: the quantizer gives codes outside {grid.lo}..{grid.hi} (step {grid.step})")
    return n


def real_of(edge: Edge, n: np.ndarray, narrow: bool = False) -> Tensor:
    """fl(scale * n) of integers (P, C) or (P, 1), in the reduced layout; narrow: one channel stands for all."""
    scale = _scale(edge)[:1] if narrow else _scale(edge)
    return layout(edge.shape, n * scale)


def integers(t: IntType) -> np.ndarray:
    return np.arange(t.lo, t.hi + 1, t.step, dtype=np.int64)


def compress(*tables: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tables with one row per channel become one row when all channels agree in all of them."""
    if all((t == t[:1]).all() for t in tables):
        return tuple(np.ascontiguousarray(t[:1]) for t in tables)
    return tables


def tail(g: Lowering, value: Map, edges: list[Edge], grid: Grid) -> Edge:
    edges = [g.expand(e, value.shape) for e in edges]
    if len(edges) > 1:
        return join(g, value, edges, grid)
    (edge,) = edges
    t, levels = edge.type, grid.levels - 1
    few = levels <= FEW_LEVELS or (levels <= SOME_LEVELS and t.levels * t.shape[0] > EVERY_LIMIT)
    known = bool(np.all(monotone(value))) and occurrences(value, edge) == 1
    wide = t.levels > ENUMERATE if known else t.levels > MANY_INTEGERS
    op = _bisected(value, edge, grid) if few and wide else _enumerated(value, edge, grid)
    out = g.add(op, edge, scale=grid.scale)
    g.tails[out.name] = (value, edge, grid)
    return out


def _enumerated(value: Map, edge: Edge, grid: Grid) -> ops.Op:
    """Every integer of the interval, one by one."""
    t = edge.type
    narrow = every(value, "uniform") and np.asarray(t.scale).size == 1 and np.asarray(grid.scale).size == 1
    channels = 1 if narrow else t.shape[0]
    if t.levels * channels > PROBE_LIMIT:
        raise ConversionError(
            f"{value.label}: {grid.levels} output levels on an accumulator of {t.levels} integers ({t}); use fewer output bits, or a FixedPoint step in between"
        )
    n = integers(t)
    lines = grid.step == 1 and grid.levels - 1 > FEW_LEVELS and value.pre is not None and len(n) > 2
    pieces = []  # of (P, C), or (P, 1) where all channels share one function
    for p in np.array_split(n, -(-len(n) * channels // (1 << 20))):
        env = {edge.name: real_of(edge, p[:, None], narrow)}
        inner = {id(a): evaluate(a, env) for a in value.args}
        real = [inner[id(a)] for a in value.args]
        with torch.no_grad():
            codes = snap_codes(value, value.fn(*real), grid, narrow)
            pieces.append((codes, units_of(value, value.pre(*real), grid, narrow) if lines and value.pre else codes))
    codes, units = (np.concatenate([p[k] for p in pieces]) for k in (0, 1))
    difference = np.diff(codes, axis=0)
    rising, falling = (difference >= 0).all(0), (difference <= 0).all(0)
    is_monotone = bool((rising | falling).all())
    if grid.levels - 1 <= FEW_LEVELS and is_monotone:
        return _thresholds_op(*compress(*_thresholds(codes, n, rising, grid, t)), grid)
    if lines:
        op = _requant(n, codes, units, grid)
        if op is not None:
            return op
    if is_monotone and grid.levels - 1 <= 255 and grid.levels < len(n):
        return _thresholds_op(*compress(*_thresholds(codes, n, rising, grid, t)), grid)
    (table,) = compress(np.ascontiguousarray(codes.T))
    if table.size > TABLE_LIMIT:
        raise ConversionError(
            f"{value.label}: the function from accumulator to code is {'no multiply-shift' if is_monotone else 'not monotone'} and its table would have "
            f"{table.size} entries; use fewer bits, a FixedPoint step, or a monotone activation"
        )
    return ops.Lut(table, t.lo, t.step, grid.step)


def _thresholds_op(thresholds: np.ndarray, sign: np.ndarray, grid: Grid) -> ops.Op:
    return ops.Threshold(thresholds, sign[:, 0], grid.lo, grid.step)


def _thresholds(codes: np.ndarray, n: np.ndarray, rising: np.ndarray, grid: Grid, t: IntType) -> tuple[np.ndarray, np.ndarray]:
    """From codes (P, C) that are monotone in n (P,): thresholds (C, L) on sign * n, and sign (C, 1). Never true: one above the interval."""
    sign = np.where(rising, 1, -1)
    ordered = np.where(rising, codes, codes[::-1])
    signed = np.where(rising, n[:, None], -n[::-1, None])  # (P, C), ascending
    levels = grid.lo + grid.step * np.arange(1, grid.levels)
    first = np.stack([(ordered < level).sum(0) for level in levels], axis=1)  # (C, L)
    above = np.concatenate([signed, signed[-1:] + 1]).T
    return np.take_along_axis(above, first, axis=1), sign[:, None]


def _bisected(value: Map, edge: Edge, grid: Grid) -> ops.Op:
    """All (channel, level) at once; only where the tail is declared monotone."""
    t = edge.type
    if not np.all(monotone(value)) or occurrences(value, edge) != 1:
        raise ConversionError(
            f"{value.label}: a step that is not known to be monotone follows an accumulator of {t.levels} integers ({t}), too many to run one by one "
            f"(limit {MANY_INTEGERS}); use a monotone activation (PReLU slopes >= 0), or a FixedPoint or other quantizer right after the accumulator"
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
        op = _requant_between(value, edge, above, sign, low_end, high_end, grid)
        if op is not None:
            return op
    if count > FEW_LEVELS and above.size > TABLE_LIMIT:
        raise ConversionError(f"{value.label}: no multiply-shift gives its {grid.levels} levels, and {above.size} thresholds are too many; use fewer output bits")
    thresholds, sign = compress(above, sign)
    return _thresholds_op(thresholds, sign, grid)


def _requant_between(
    value: Map, edge: Edge, thresholds: np.ndarray, sign: np.ndarray, low: np.ndarray, high: np.ndarray, grid: Grid
) -> ops.Op | None:
    """A multiply-shift that agrees at both sides of every threshold and at the ends; both functions are monotone, so it agrees everywhere."""
    inside = np.clip(thresholds, low, high)
    points = np.concatenate([np.broadcast_to(low, (len(sign), 1)), np.clip(inside - 1, low, high), inside, np.broadcast_to(high, (len(sign), 1))], axis=1)
    n = (sign * points).T  # (P, C)
    env = {edge.name: real_of(edge, n)}
    codes, real = codes_of(value, env, grid), codes_of(value, env, grid, before=True)
    tight = _tight(grid, codes)
    first, last = points.argmin(1), points.argmax(1)  # ends, unless the code moves only in between
    moves = (thresholds > low) & (thresholds <= high)
    where = np.arange(thresholds.shape[1])
    left = 1 + thresholds.shape[1] + np.where(moves.any(1), np.where(moves, where, 10**9).min(1), 0)
    right = 1 + thresholds.shape[1] + np.where(moves.any(1), np.where(moves, where, -1).max(1), 0)
    first, last = np.where(left < right, left, first), np.where(left < right, right, last)
    columns = np.arange(len(sign))
    run = n[last, columns] - n[first, columns]
    slope = np.where(run != 0, (real[last, columns] - real[first, columns]) / np.where(run == 0, 1, run), 0.0)
    line = _line(n, codes, slope, tight, np.ones_like(codes, dtype=bool))
    if line is None:
        return None
    mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
    return ops.Requant(mul, add, line[2], tight.lo, tight.hi)


def _tight(grid: Grid, codes: np.ndarray) -> Grid:
    """A clamp may be as tight as the codes that occur."""
    return Grid(int(codes.min()), int(codes.max()), grid.scale)


# ---------------------------------------------------------------- multiply-shift


def _line(n: np.ndarray, codes: np.ndarray, slope: np.ndarray, grid: Grid, use: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """mul, add (C,) and shift with clamp((n*mul + add) >> shift) == codes at every used point, or None. Proven by integer inequalities.

    n (P, 1) or (P, C), codes (P, C), slope (C,) in codes per integer, use (P, C) bool. The smallest shift up to 40 that works for all channels is taken.
    """
    span = int(np.abs(n).max(initial=1)).bit_length()
    steepest = float(np.abs(slope).max(initial=0.0))
    columns = np.arange(codes.shape[1])
    few = np.unique(np.linspace(0, len(n) - 1, min(len(n), 1024)).astype(np.int64))  # the points that decide; grows by those that refute a candidate

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


def _requant(n: np.ndarray, codes: np.ndarray, real: np.ndarray, grid: Grid) -> ops.Op | None:
    """A multiply-shift, of one line or of two with a kink, that gives exactly `codes`; None where there is none. n (P,); codes, real (P, C)."""
    step = int(n[1] - n[0])
    grid = _tight(grid, codes)
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
        line = _line(n[:, None], codes, left, grid, np.ones_like(codes, dtype=bool))
        if line is None:
            return None
        mul, add = (x[:, 0] for x in compress(line[0][:, None], line[1][:, None]))
        return ops.Requant(mul, add, line[2], grid.lo, grid.hi)
    upper = rows > first  # n >= kink uses the right line; channels without a kink use the left one everywhere
    kink = np.where(first < len(n) - 1, n[np.minimum(first + 1, len(n) - 1)], n[-1] + 1)
    two = _line(n[:, None], codes, left, grid, ~upper)
    one = _line(n[:, None], codes, right, grid, upper)
    if one is None or two is None:
        return None
    shift = max(one[2], two[2])
    mul, add, mul2, add2 = (x << (shift - s) for x, s in ((one[0], one[2]), (one[1], one[2]), (two[0], two[2]), (two[1], two[2])))
    tables = compress(*(x[:, None] for x in (mul, add, kink, mul2, add2)))
    mul, add, kink, mul2, add2 = (x[:, 0] for x in tables)
    return ops.Requant(mul, add, shift, grid.lo, grid.hi, kink, mul2, add2)


# ---------------------------------------------------------------- joins


def join(g: Lowering, value: Map, edges: list[Edge], grid: Grid) -> Edge:
    """Two or more sources before one quantizer: thresholds on the widest for each code of the others."""
    wide, *narrow = sorted(edges, key=lambda e: -e.type.levels)
    sizes = tuple(e.type.levels for e in narrow)
    count, channels, levels = int(np.prod(sizes)), value.shape[0], grid.levels - 1
    remedies = (
        "Share one quantizer between the branches (SharedHardTanh, or the same QuantIdentity on both), or give one branch a quantizer or a FixedPoint grid "
        "(bits, fraction) of its own in the model, where training sees it."
    )
    if count > 1024 or count * channels * levels > TABLE_LIMIT:
        names = " and ".join(f"{e.name} {e.type}" for e in edges)
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
            codes = run(n[:, None], np.full(len(n), k))
            difference = np.diff(codes, axis=0)
            rising, falling = (difference >= 0).all(0), (difference <= 0).all(0)
            if not (rising | falling).all():
                raise ConversionError(f"{value.label}: the join is not monotone in {wide.name} {t}; use a monotone activation. {remedies}")
            thresholds[:, k], sign = _thresholds(codes, n, rising, grid, t)
            signs[:, k] = sign[:, 0]
    else:
        for k in range(count):
            one = Map(
                lambda x, k=k: evaluate(value, {wide.name: x} | {e.name: real_of(e, combos[k : k + 1, i][:, None]) for i, e in enumerate(narrow)}),
                (wide,), value.label, shape=value.shape,
            )  # fmt: skip
            op = _bisected(one, wide, grid)
            assert isinstance(op, ops.Threshold)
            thresholds[:, k] = op.thresholds
            signs[:, k] = op.sign
    flat, signs = _one_direction(thresholds, signs)
    op = _affine_join(value, wide, combos, narrow, flat, signs, grid, sizes)
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
    value: Map, wide: Edge, combos: np.ndarray, narrow: list[Edge], thresholds: np.ndarray, signs: np.ndarray, grid: Grid, sizes: tuple[int, ...]
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
