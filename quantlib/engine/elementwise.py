"""Elementwise ops as steps over blocks: see map.hpp. Slots hold int32, or int64 where an edge or an offset needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from quantlib import ops
from quantlib.engine import lines
from quantlib.engine.program import INT32, TABLE, Builder, Refused, wide
from quantlib.ir import Graph, IntType, Node

# in the order of Step in map.hpp
STEPS = "LOAD STORE ADD REQUANT LINE MEND COMPARE SEARCH LOOKUP DIGIT JOIN MULTIPLY GATE OFFSET".split()
ELEMENTWISE = (ops.Add, ops.Multiply, ops.Requant, ops.Threshold, ops.Lut, ops.Join, ops.AffineJoin)
BLOCK = 256  # elements per block at least
LONGEST = 8  # ops per group: slots and constants stay in the first cache
COMPARES = 15  # levels of a join that are compared; more are searched
VECTORS = 63  # levels of a threshold that are compared, sixteen elements at a time; more are looked up or searched
LOOKUPS = 1 << 18


def group(graph: Graph, nodes: Sequence[Node], k: int) -> list[Node]:
    """The elementwise nodes from nodes[k] on that may share blocks: one shape, one width of slots. Empty where nodes[k] is none."""
    found: list[Node] = []
    for node in nodes[k : k + LONGEST]:
        if not isinstance(node.op, ELEMENTWISE):
            break
        if found and (node.type.shape != found[0].type.shape or _wide(graph, node) != _wide(graph, found[0])):
            break
        found.append(node)
    return found


def _wide(graph: Graph, node: Node) -> bool:
    x = graph.types(node)
    return any(map(wide, (*x, node.type))) or (isinstance(node.op, ops.AffineJoin) and node.op.magnitude(*x) >= INT32 - 1)


def _gate(graph: Graph, node: Node, name: str) -> bool:
    """Whether an input is one factor per channel, which is read where it lies."""
    return isinstance(node.op, ops.Multiply) and name == node.inputs[1] and graph.by_name[name].type.shape != node.type.shape


def emit(b: Builder, nodes: Sequence[Node], kept: Sequence[str]) -> None:
    """One record for the group; `kept` names the edges that others read."""
    is_wide = _wide(b.graph, nodes[0])
    steps = _Steps(b, nodes[0].type, np.int64 if is_wide else np.int32)
    last = {i: k for k, n in enumerate(nodes) for i in n.inputs}
    for k, node in enumerate(nodes):
        inputs = [steps.get(i) for i in node.inputs if not _gate(b.graph, node, i)]
        temporary: list[int] = []
        steps.slot[node.name] = steps.op(node, inputs, temporary)
        if node.name in kept:
            steps.add("STORE", steps.slot[node.name], 0, *b.place(node.name))
        for name in [n for n in steps.slot if last.get(n, -1) <= k]:
            steps.free.append(steps.slot.pop(name))
        steps.free += temporary
    scratch = b.take(steps.slots * steps.tile * 8)
    b.emit("MAP64" if is_wide else "MAP32", nodes[0].type.numel, steps.tile, scratch, steps.count, *steps.words)
    b.give(scratch)


class _Steps:
    """Steps of one group and the slots that hold its values."""

    def __init__(self, b: Builder, t: IntType, dtype: type) -> None:
        self.b, self.dtype, self.channels = b, dtype, t.shape[0]
        self.tile = min(self.channels * -(-BLOCK // self.channels), t.numel)
        self.words: list[int] = []
        self.count = self.slots = 0
        self.slot: dict[str, int] = {}
        self.free: list[int] = []

    def add(self, kind: str, x: int, y: int, *words: int) -> None:
        self.words += [STEPS.index(kind), x, y, *words]
        self.count += 1

    def new(self) -> int:
        if self.free:
            return self.free.pop()
        self.slots += 1
        return self.slots - 1

    def get(self, name: str) -> int:
        if name not in self.slot:
            self.slot[name] = self.new()
            self.add("LOAD", 0, self.slot[name], *self.b.place(name))
        return self.slot[name]

    def laid(self, values: object, dtype: object = None) -> int:
        """Constants per channel (or one for all; several rows of them), laid over a block."""
        v = np.asarray(values)
        rows = np.broadcast_to(v, (*v.shape[:-1], self.channels))
        repeats = self.tile // self.channels
        return self.b.table(np.tile(rows, (*[1] * (v.ndim - 1), repeats)), dtype or self.dtype)

    def rows(self, count: int, size: int, dtype: object = None) -> int:
        """Where the rows of a channel start in a table of `count` channels x `size`."""
        return self.laid(np.arange(count) * size, dtype)

    def op(self, node: Node, inputs: list[int], temporary: list[int]) -> int:
        """Emits the steps of one op; returns the slot of its result."""
        op, x = node.op, self.b.graph.types(node)
        if isinstance(op, ops.Add):
            y = self.new()
            self.add("ADD", inputs[0], y, inputs[1])
        elif isinstance(op, ops.Multiply) and len(inputs) == 2:
            y = self.new()
            self.add("MULTIPLY", inputs[0], y, inputs[1])
        elif isinstance(op, ops.Multiply):
            y, gate = self.new(), self.new()
            temporary.append(gate)
            self.add("GATE", inputs[0], y, gate, self.channels, *self.b.place(node.inputs[1]))
        elif isinstance(op, ops.Requant):
            y = self.new()
            self.requant(op, x[0], inputs[0], y)
        elif isinstance(op, ops.Threshold):
            y = self.new()
            self.threshold(op.thresholds, op.sign, op.lo, op.step, (x[0].lo, x[0].hi), inputs[0], y)
        elif isinstance(op, ops.Lut):
            if op.table.size * op.step_in > TABLE:
                raise Refused(f"a table of {op.table.shape} with step {op.step_in}")
            y = self.new()
            self.lookup(np.repeat(op.table, op.step_in, 1), op.lo_in, inputs[0], y)
        elif isinstance(op, ops.Join):
            y = self.join(op, x[0], inputs, temporary)
        elif isinstance(op, ops.AffineJoin):
            row = self.number(op, op.offset.shape[0], inputs[1:], temporary)
            total, y = self.new(), self.new()
            temporary.append(total)
            self.add("OFFSET", inputs[0], total, row, self.laid(op.sign << op.shift), self.b.table(op.offset, self.dtype))
            most = op.magnitude(*x)
            self.threshold(op.thresholds, np.ones(1, dtype=np.int64), op.lo, op.step, (-most, most), total, y)
        else:
            raise Refused(f"no step for {type(op).__name__}")
        return y

    def requant(self, op: ops.Requant, x: IntType, source: int, y: int) -> None:
        factors = [v for v in (op.mul, op.mul2) if v is not None]
        small = all(-INT32 <= v.min() and v.max() < INT32 for v in factors)
        narrow = op.magnitude(x) < INT32
        width = 2 if self.dtype is np.int64 or not small else 0 if narrow else 1
        sums = np.int32 if width == 0 else np.int64
        mul, add = (lambda v: self.laid(v, np.int64 if width == 2 else np.int32)), (lambda v: self.laid(v, sums))
        words = [mul(op.mul), add(op.add)]
        if op.kink is not None:
            words += [self.laid(np.clip(op.kink, x.lo, x.hi + 1)), mul(op.mul2), add(op.add2)]
        else:
            words += [0, 0, 0]
        shift = min(op.shift, 31) if width == 0 else op.shift  # the same for numbers of 32 bits
        self.add("REQUANT", source, y, width, int(op.kink is not None), shift, op.lo, op.hi, *words)

    def threshold(self, thresholds: np.ndarray, sign: np.ndarray, lo: int, step: int, span: tuple[int, int], source: int, y: int) -> None:
        """-x >= t says x < 1 - t: channels with sign -1 count the reached 1 - t downwards."""
        channels, levels = max(len(thresholds), len(sign)), thresholds.shape[1]
        t, base, steps = upward(np.broadcast_to(thresholds, (channels, levels)), np.broadcast_to(sign, (channels,)), lo, step, span)
        if self.line(thresholds, sign, lo, step, span, source, y, t, base, steps):
            return
        if levels <= VECTORS:
            self.add("COMPARE", source, y, levels, self.laid(base), self.laid(steps), self.laid(t.T))
        elif channels * (span[1] - span[0] + 1) <= LOOKUPS:
            codes = np.arange(span[0], span[1] + 1)
            counts = np.stack([np.searchsorted(row, codes, side="right") for row in t])
            self.lookup(base[:, None] + steps[:, None] * counts, span[0], source, y)
        else:
            rows = self.rows(channels, 1, np.int32)
            self.add("SEARCH", source, y, levels, self.laid(base), self.laid(steps), self.b.table(t, self.dtype), rows)

    def line(self, thresholds: np.ndarray, sign: np.ndarray, lo: int, step: int, span: tuple[int, int], source: int, y: int,
             t: np.ndarray, base: np.ndarray, steps: np.ndarray) -> bool:  # fmt: skip
        """Emits a multiplication in the place of comparisons where most channels allow it; t, base, steps: see `upward`."""
        channels, levels = t.shape
        if self.dtype is np.int64 or step != 1 or levels < lines.FEWEST or channels * levels**2 > lines.WORK:
            return False
        found = lines.through(np.broadcast_to(thresholds, t.shape), np.broadcast_to(sign, channels), lo, span)
        bad = np.flatnonzero(~found.proven)
        if len(bad) > lines.MENDED * channels:
            return False
        constants = (self.laid(v) for v in (found.low, found.high, found.mul, found.add))
        self.add("LINE", source, y, found.shift, lo, lo + levels, *constants)
        if len(bad):
            tables = self.b.table(bad, np.int32), *(self.b.table(v[bad], self.dtype) for v in (base, steps, t))
            self.add("MEND", source, y, levels, self.channels, len(bad), *tables)
        return True

    def lookup(self, table: np.ndarray, lo: int, source: int, y: int) -> None:
        self.add("LOOKUP", source, y, lo, self.rows(table.shape[0], table.shape[1], np.int32), self.b.table(table, self.dtype))

    def number(self, op: ops.Join | ops.AffineJoin, channels: int, narrow: list[int], temporary: list[int]) -> int:
        """The slot with each element's row in a table of (channels, K) rows."""
        row, place = 0, int(np.prod(op.sizes))
        start = self.rows(channels, place)
        for k, (source, size, low, step) in enumerate(zip(narrow, op.sizes, op.lows, op.steps, strict=True)):
            place //= size
            if step * size > TABLE:
                raise Refused(f"{size} codes with step {step}")
            before, row = row, self.new()
            temporary.append(row)
            digits = np.arange(step * (size - 1) + 1) // step * place
            self.add("DIGIT", source, row, before, int(k == 0), low, start, self.b.table(digits, self.dtype))
        return row

    def join(self, op: ops.Join, x: IntType, inputs: list[int], temporary: list[int]) -> int:
        channels, (_, codes, levels) = max(len(op.thresholds), len(op.sign)), op.thresholds.shape
        if channels * codes * levels > TABLE:
            raise Refused(f"a table of {channels} x {codes} x {levels} thresholds")
        row = self.number(op, channels, inputs[1:], temporary)
        sign = np.broadcast_to(op.sign, (channels, codes)).reshape(-1)
        rows = np.broadcast_to(op.thresholds, (channels, codes, levels)).reshape(-1, levels)
        t, base, steps = upward(rows, sign, op.lo, op.step, (x.lo, x.hi))
        table: Callable[[object], int] = lambda v: self.b.table(v, self.dtype)  # noqa: E731
        y = self.new()
        self.add("JOIN", inputs[0], y, row, levels, len(rows), table(base), table(steps), table(t.T if levels <= COMPARES else t))
        return y


def upward(
    thresholds: np.ndarray, sign: np.ndarray, lo: int, step: int, span: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, base, step) per row so that lo + step * #{sign * x >= thresholds} = base + step * #{x >= t} for x in span; rows of t ascend."""
    levels, down = thresholds.shape[1], sign < 0
    t = np.where(down[:, None], 1 - thresholds[:, ::-1], thresholds)
    return np.clip(t, span[0], span[1] + 1), np.where(down, lo + step * levels, lo), np.where(down, -step, step)
