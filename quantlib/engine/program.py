"""Translates an integer network into the engine's program: flat records with offsets into an arena and pointers to packed tables.

Maps lie channel-last in the narrowest of int8, int16, int32, int64 that holds their interval. Neighbouring elementwise ops of one shape
become one record that works block by block (elementwise.py); convolutions choose a kernel by what their operands are
(convolution.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quantlib import ops
from quantlib.engine.build import Library
from quantlib.ir import Graph, IntType, Node

KINDS = (  # in the order of Kind in packed.cpp
    "IN OUT MAP32 MAP64 GATHER THERMOMETER MAX SUM32 SUM64 SATURATING32 SATURATING64 "
    "SIGNS1 SIGNS2 BYTE_DOT PAIR_DOT WIDE32 WIDE64 DEPTH16 DEPTH32 DEPTH64"
).split()
ALIGN = 64
SLACK = 64  # kernels may read (never use) a few bytes behind a buffer
STORED: tuple[Any, ...] = (np.int8, np.int16, np.int32, np.int64)
INT32 = 1 << 31
TABLE = 1 << 24  # entries of a table that is made here (not weights); more is refused


class Refused(ValueError):
    """The engine has no kernel for a node; the torch carriers run the graph."""


def stored(t: IntType) -> int:
    """Index into STORED of the type a map is kept in."""
    return next(i for i, d in enumerate(STORED) if np.iinfo(d).min <= t.lo and t.hi <= np.iinfo(d).max)


def nbytes(t: IntType) -> int:
    return t.numel * np.dtype(STORED[stored(t)]).itemsize


def places(t: IntType) -> int:
    """Elements per channel."""
    return t.numel // t.shape[0]


def wide(t: IntType) -> bool:
    """Does the map, or the number above its greatest, leave int32?"""
    return t.lo < -INT32 or t.hi >= INT32 - 1


@dataclass
class Program:
    """Words for the engine; `tables` keeps alive what they point to. outputs: edge name and shape, in the order of the OUT records."""

    words: np.ndarray
    tables: list[np.ndarray]
    outputs: list[tuple[str, tuple[int, ...]]]
    arena: int


@dataclass
class Builder:
    """Records, tables and the arena while a program is written."""

    graph: Graph
    library: Library
    records: list[list[int]] = field(default_factory=list)
    tables: list[np.ndarray] = field(default_factory=list)
    at: dict[str, int] = field(default_factory=dict)  # edge -> arena offset
    _taken: dict[int, int] = field(default_factory=dict)  # offset -> size
    _peak: int = 0

    def table(self, values: object, dtype: object) -> int:
        """Address of a table. Refused where a value does not fit its type: never a wrapped number."""
        array = np.asarray(values)
        exact = np.ascontiguousarray(array.astype(dtype))  # type: ignore[call-overload]
        if not (exact == array).all():
            raise Refused(f"a table of {np.dtype(dtype)} with entries up to {np.abs(array).max()}")  # type: ignore[call-overload]
        self.tables.append(exact)
        return exact.ctypes.data

    def take(self, size: int) -> int:
        """Room in the arena: the first gap that is large enough."""
        size = -(-(size + SLACK) // ALIGN) * ALIGN
        start = 0
        for offset in sorted(self._taken):
            if offset - start >= size:
                break
            start = offset + self._taken[offset]
        self._taken[start] = size
        self._peak = max(self._peak, start + size)
        return start

    def give(self, offset: int) -> None:
        del self._taken[offset]

    def place(self, name: str) -> tuple[int, int]:
        """(stored type, offset) of an edge; takes room for it at first mention."""
        t = self.graph.by_name[name].type
        if name not in self.at:
            self.at[name] = self.take(nbytes(t))
        return stored(t), self.at[name]

    def emit(self, kind: str, *words: int) -> None:
        self.records.append([KINDS.index(kind), len(words) + 2, *words])


def translate(graph: Graph, keep: Iterable[str], library: Library) -> Program:
    """The program that computes the edges in `keep`. Raises Refused."""
    from quantlib.engine import convolution, elementwise  # they import this module

    wanted = set(keep)
    needed: set[str] = set(wanted) | {graph.input.name}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    nodes = [n for n in graph.nodes[1:] if n.name in needed]
    for node in nodes:
        if max(node.op.magnitude(*graph.types(node)), node.type.magnitude) >= 1 << 62:
            raise Refused(f"{node.name} needs integers beyond 62 bits")
    last = {i: k for k, n in enumerate(nodes) for i in n.inputs}
    b = Builder(graph, library)
    outputs: list[tuple[str, tuple[int, ...]]] = []

    def out(name: str) -> None:
        if name in wanted:
            t = graph.by_name[name].type
            b.emit("OUT", t.shape[0], places(t), *b.place(name), len(outputs))
            outputs.append((name, t.shape))

    t = graph.input.type
    b.emit("IN", t.shape[0], places(t), *b.place(graph.input.name))
    out(graph.input.name)
    k = 0
    while k < len(nodes):
        group = elementwise.group(graph, nodes, k)
        done = k + max(len(group), 1)
        if group:
            kept = [n.name for i, n in enumerate(group, k) if n.name in wanted or last.get(n.name, -1) >= done]
            elementwise.emit(b, group, kept)
        else:
            kept = [nodes[k].name]
            if not convolution.emit(b, nodes[k]):
                _other(b, nodes[k])
        for name in kept:
            out(name)
        for name in [n for n in b.at if last.get(n, -1) < done]:
            b.give(b.at.pop(name))
        k = done
    words = np.array([w for r in b.records for w in r], dtype=np.int64)
    return Program(words, b.tables, outputs, b._peak)


# ---------------------------------------------------------------- everything that is neither elementwise nor a convolution


def _other(b: Builder, node: Node) -> None:
    op, x, y = node.op, b.graph.types(node), node.type
    if isinstance(op, ops.MaxPool | ops.SumPool):
        kind = "MAX" if isinstance(op, ops.MaxPool) else "SUM32" if op.magnitude(*x) < INT32 else "SUM64"
        scratch = b.take(8 * y.shape[0])
        dilation = op.dilation if isinstance(op, ops.MaxPool) else (1, 1)
        (c, h, w), (_, oh, ow), (top, _, left, _) = x[0].shape, y.shape, op.padding
        b.emit(kind, *b.place(node.inputs[0]), *b.place(node.name), scratch, h, w, c, oh, ow, *op.kernel, *op.stride, top, left, *dilation)
        b.give(scratch)
    elif isinstance(op, ops.SaturatingDense):
        taps, outputs = op.weight.shape[1], op.weight.shape[0]
        narrow = op.magnitude(*x) < INT32
        dtype, scratch = np.int32 if narrow else np.int64, b.take(8 * (taps + outputs))
        tables = b.table(op.weight.T, dtype), b.table(op.bias, dtype)
        b.emit("SATURATING32" if narrow else "SATURATING64", *b.place(node.inputs[0]), *b.place(node.name), scratch, taps, outputs,
               op.shift, op.half, op.lo, op.hi, *tables)  # fmt: skip
        b.give(scratch)
    elif isinstance(op, ops.Thermometer):
        _thermometer(b, node, op, x[0])
    elif isinstance(op, ops.Reshape | ops.Select | ops.Slice2d | ops.Rearrange | ops.Concat | ops.Pad | ops.Shift):
        _gather(b, node)
    else:
        raise Refused(f"no kernel for {type(op).__name__}")


def _thermometer(b: Builder, node: Node, op: ops.Thermometer, x: IntType) -> None:
    span = np.arange(x.lo, x.hi + 1) if x.hi - x.lo < TABLE else np.zeros(TABLE)
    rows, bits = op.thresholds.shape
    if rows * len(span) * bits >= TABLE:
        raise Refused(f"a thermometer code of {x}")
    table = 2 * (span[None, :, None] >= op.thresholds[:, None, :]) - 1
    base = (np.arange(x.shape[0]) if rows > 1 else np.zeros(x.shape[0], dtype=np.int64)) * len(span)
    tables = b.table(base, np.int32), b.table(table, np.int8)
    b.emit("THERMOMETER", x.shape[0], places(x), *b.place(node.inputs[0]), b.place(node.name)[1], bits, x.lo, *tables)


def channel_last(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 0, -1).reshape(-1)


def _gather(b: Builder, node: Node) -> None:
    """The op applied to the numbers of its inputs' stored elements says where every output comes from; 0 stands for a zero."""
    x, y = b.graph.types(node), node.type
    starts = np.cumsum([1, *(t.numel for t in x)])
    if starts[-1] > TABLE or y.numel > TABLE:
        raise Refused(f"a move of {y}")
    numbers = [np.moveaxis(np.arange(s, s + t.numel).reshape(*t.shape[1:], t.shape[0]), -1, 0) for s, t in zip(starts, x, strict=False)]
    source = channel_last(node.op.evaluate(*(torch.from_numpy(n.copy())[None] for n in numbers))[0].numpy())
    words: list[int] = []
    for name, t, first in zip(node.inputs, x, starts, strict=False):
        to = np.flatnonzero((source >= first) & (source < first + t.numel))
        src = source[to] - first
        length, heads = 1, np.arange(len(to))
        if len(to):
            breaks = np.flatnonzero((np.diff(src) != 1) | (np.diff(to) != 1)) + 1
            length = int(np.gcd.reduce(np.diff(np.concatenate([[0], breaks, [len(to)]]))))
            heads = np.arange(0, len(to), length)
        words += [*b.place(name), length, len(heads), b.table(src[heads], np.int32), b.table(to[heads], np.int32)]
    b.emit("GATHER", *b.place(node.name), nbytes(y), int((source == 0).any()), len(x), *words)
