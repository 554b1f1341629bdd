"""Pools and rearrangements met before a quantizer: behind it, or in front of the elementwise steps, wherever that is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantlib import ops
from quantlib.ir import Grid
from quantlib.tails.expressions import (
    ConversionError,
    Edge,
    Map,
    Move,
    RealInput,
    Value,
    evaluate,
    every,
    frontier,
    layout,
    monotone,
    occurrences,
    substitute,
)
from quantlib.tails.probing import edge_scale
from quantlib.tails.rule import tail

if TYPE_CHECKING:
    from quantlib.lowering import Lowering


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
                raise ConversionError(
                    f"{value.label}: the real input of the network meets another value before it is quantized; quantize it first"
                )
            return g.front(value, leaves[0], grid)
        assert isinstance(value, Map)
        return tail(g, value, [leaf for leaf in leaves if isinstance(leaf, Edge)], grid)
    assert isinstance(value, Map)
    if len(leaves) == 1 and _commutes(value, moves[0], grid):
        move = moves[0]
        return move.apply(g, *(settle(g, substitute(value, move, a), grid) for a in move.args))
    return settle(g, pull_all(g, value), grid)


def _spatial(move: Move) -> bool:
    """Whether a Move keeps every channel in its place."""
    if move.kind in ("max", "mean", "padded mean", "pad"):
        return True
    channels = channel_map(move)
    return (
        channels is not None
        and len(move.args) == 1
        and move.shape[0] == move.args[0].shape[0]
        and (channels == np.arange(len(channels))).all()
    )


def _commutes(value: Map, move: Move, grid: Grid) -> bool:
    """Whether quantizing first and moving then gives the same integers."""
    if move.kind.endswith("mean"):
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
    owner = np.concatenate(
        [np.arange(a.shape[0]).repeat(int(np.prod(a.shape[1:]))) + base for a, base in zip(move.args, _bases(move), strict=True)]
    )
    channels = owner[move.index.reshape(move.shape[0], -1)]
    return channels[:, 0] if (channels == channels[:, :1]).all() else None


def _bases(move: Move) -> list[int]:
    return np.cumsum([0, *(a.shape[0] for a in move.args)])[:-1].tolist()


def pull_all(g: Lowering, value: Map) -> Map:
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
    args = [pull(g, a) if isinstance(a, Move) else pull_all(g, a) if isinstance(a, Map) else a for a in move.args]
    edges = []
    for a in args:
        leaves = frontier(a)
        if len(leaves) != 1 or not isinstance(leaves[0], Edge):
            raise ConversionError(
                f"{move.label}: it works on the real-valued result of a join or on the real input; put a quantizer in front of it"
            )
        edges.append(leaves[0])
    f, edge = args[0], edges[0]
    if move.kind == "move":
        return _pull_move(g, move, args, edges)
    if not isinstance(f, Map):
        return move.apply(g, edge)
    if move.kind.endswith("mean"):
        zero = evaluate(f, {edge.name: layout(edge.shape, np.zeros((1, edge.shape[0])))})
        if every(f, "affine") and (move.kind == "mean" or bool((zero == 0).all())):
            return substitute(f, edge, move.apply(g, edge))
        if every(f, "affine"):
            raise ConversionError(
                f"{move.label}: an average whose zero padding stands beside values that {f.label} has shifted; pool without padding, "
                "quantize before the pooling, or pad with F.pad behind the quantizer"
            )
        raise ConversionError(
            f"{move.label}: an average of real values that went through {f.label} has no integers; put a quantizer in front of the pooling "
            "(QuantIdentity, QuantReLU, a SharedHardTanh or FixedPoint), or pool before the nonlinearity"
        )
    if move.kind == "max" and np.all(monotone(f)) and occurrences(f, edge) == 1:
        ends = layout(edge.shape, np.stack([edge.type.lo * edge_scale(edge), edge.type.hi * edge_scale(edge)]))
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
