"""A graph as steps of the engine: what makes the vectors of each, which elementwise ops follow at once, and which maps go to memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantlib import ops
from quantlib.hls.writer import map_shape
from quantlib.ir import Graph, GraphError, IntType, Node
from quantlib.layerwise.formats import FRACTIONS, LANES, SIGNS, Format, Layout, format_of, layout_of

KINDS = ("NONE", "XNOR", "MULTIPLY", "WINDOW", "WHOLE", "GATHER")  # in the order of Kind in lw_step.hpp
MODES = ("MAC", "SUM", "MAX", "SATURATE")
CODES = ("LOAD", "STORE", "LUT", "SEARCH", "AFFINE", "SCALE", "ADD", "PRODUCT", "PERMUTE")

ELEMENTWISE = (ops.Threshold, ops.Requant, ops.Lut, ops.Add, ops.Multiply, ops.Join, ops.AffineJoin)
CHANNEL_MOVES = (ops.Select, ops.Concat, ops.Thermometer)
LIMIT = 1 << 62
SHIFT_TAPS = 49  # a Shift within windows of so many taps is a depthwise convolution, else a gather


@dataclass(frozen=True)
class Source:
    """One group of 32 channels of a stored map: the name of the map's edge and the number of the group in it."""

    edge: str
    group: int


@dataclass(frozen=True)
class Place:
    """Where an edge is found in memory: its shape as a map, the format of its fields, the groups it consists of."""

    layout: Layout
    sources: tuple[Source, ...]


@dataclass
class Micro:
    """One operation of the finishing unit; `sources` are the groups that a LOAD reads or a STORE writes, one for each group of the step.

    joined: worked on in one pass with the operation before it (of the first one: with the vectors as they arrive).
    """

    code: str
    to: int = 0
    a: int = 0
    b: int = 0
    row: int = 0
    p: int = 0
    q: int = 0
    r: int = 0
    format: Format | None = None
    gate: bool = False
    joined: bool = False
    sources: tuple[Source, ...] = ()


@dataclass
class Window:
    """Kernel, stride, (top, left), dilation."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass
class Step:
    """One instruction of the engine.

    kind, mode: the unit that makes the vectors. reads: the map it reads. weight: (O, I/groups, kh, kw) for XNOR and MULTIPLY, (C, kh, kw)
    for
    WINDOW MAC. rows: constants (rows, C or 1) of the finishing unit. gather: flat index into the reads for each output element, -1 for
    zero.
    """

    name: str
    shape: tuple[int, int, int]
    kind: str = "NONE"
    mode: str = "MAC"
    reads: Place | None = None
    window: Window = field(default_factory=Window)
    weight: np.ndarray | None = None
    groups: int = 1
    gate: np.ndarray | None = None
    merge: ops.FixedMerge | None = None
    dense: ops.SaturatingDense | None = None
    gather: np.ndarray | None = None
    gathered: tuple[Place, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    micros: list[Micro] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    registers: int = 1
    stores: list[str] = field(default_factory=list)
    value: IntType | None = None  # of the vectors the unit makes

    @property
    def out(self) -> Layout:
        return Layout(*self.shape, Format(32, 0, 0))


@dataclass
class Steps:
    """All steps of a network, and every map in memory: edge -> layout."""

    graph: Graph
    steps: list[Step]
    maps: dict[str, Layout]
    places: dict[str, Place]
    copies: dict[str, str]  # output edge -> the map that holds it


def _aligned(picked: np.ndarray) -> tuple[int, ...] | None:
    """A choice of channels as whole groups: for every group of the result the group of the source; None where it is not."""
    groups = []
    for start in range(0, len(picked), LANES):
        part = picked[start : start + LANES]
        if part[0] % LANES or not np.array_equal(part, part[0] + np.arange(len(part))):
            return None
        groups.append(int(part[0]) // LANES)
    return tuple(groups)


class _Builder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.home: dict[str, int] = {graph.input.name: -1}  # edge -> the step behind which it exists
        self.made_in: dict[str, int] = {}  # edge -> the step whose registers hold it
        self.places: dict[str, Place] = {}
        self.maps: dict[str, Layout] = {}
        self.copies: dict[str, str] = {}
        wanted = set(graph.outputs) | {graph.input.name}
        for node in reversed(graph.nodes):
            if node.name in wanted:
                wanted.update(node.inputs)
        self.nodes = [n for n in graph.nodes[1:] if n.name in wanted]
        self.keep(graph.input.name)

    def type(self, edge: str) -> IntType:
        return self.graph.by_name[edge].type

    def keep(self, edge: str) -> Place:
        """Where the edge lies in memory; a STORE is asked for where it did not yet."""
        if edge not in self.places:
            layout = layout_of(self.type(edge))
            self.maps[edge] = layout
            self.places[edge] = Place(layout, tuple(Source(edge, g) for g in range(layout.groups)))
            if edge in self.made_in:
                self.steps[self.made_in[edge]].stores.append(edge)
        return self.places[edge]

    def add(self, node: Node, step: Step) -> Step:
        self.steps.append(step)
        self.home[node.name] = self.made_in[node.name] = len(self.steps) - 1
        return step

    def alias(self, node: Node) -> bool:
        """An edge that is another arrangement of groups that lie in memory already: nothing is moved."""
        op, y = node.op, node.type
        if node.name in self.graph.outputs:
            return False
        if isinstance(op, ops.Select):
            groups = _aligned(np.broadcast_to(op.channels, y.shape[0]))
            if groups is None:
                return False
            source = self.keep(node.inputs[0])
            place = Place(Layout(*map_shape(y), source.layout.format), tuple(source.sources[g] for g in groups))
        elif isinstance(op, ops.Concat):
            formats = {format_of(self.type(i)) for i in node.inputs}
            if len(formats) > 1 or any(self.type(i).shape[0] % LANES for i in node.inputs[:-1]):
                return False
            parts = [self.keep(i) for i in node.inputs]
            if len({p.layout.format for p in parts}) > 1:
                return False
            place = Place(Layout(*map_shape(y), parts[0].layout.format), tuple(s for p in parts for s in p.sources))
        elif isinstance(op, ops.Reshape):
            flat = all(isinstance(c.op, ops.Dense | ops.Reshape) for c in self.graph.consumers[node.name]) and len(y.shape) == 1
            if not flat and map_shape(y) != map_shape(self.type(node.inputs[0])):
                return False
            if map_shape(y) != map_shape(self.type(node.inputs[0])) and any(
                not isinstance(c.op, ops.Dense) for c in self.graph.consumers[node.name]
            ):
                return False
            place = self.keep(node.inputs[0])
        else:
            return False
        self.places[node.name] = place
        self.home[node.name] = max(self.home[i] for i in node.inputs)
        return True

    def elementwise(self, node: Node) -> None:
        """Into the step whose registers hold the latest input, else into a step of its own that loads all of them."""
        last = max(self.home[i] for i in node.inputs)
        shape = map_shape(node.type)
        full = [i for i in node.inputs if map_shape(self.type(i)) == shape]
        fits = last >= 0 and self.steps[last].shape == shape and all(
            self.made_in.get(i) == last if self.home[i] == last else True for i in node.inputs
        )  # fmt: skip
        fits = fits and all(map_shape(self.type(i)) == shape for i in node.inputs if self.home[i] == last) and bool(full)
        if not fits:
            self.add(node, Step(node.name, shape))
            last = len(self.steps) - 1
        self.home[node.name] = self.made_in[node.name] = last
        self.steps[last].nodes.append(node)
        for i in node.inputs:
            if self.made_in.get(i) != last:
                self.keep(i)

    def node(self, node: Node) -> None:
        op, y = node.op, node.type
        if self.alias(node):
            return
        if isinstance(op, ELEMENTWISE):
            self.elementwise(node)
            return
        shape = map_shape(y)
        if isinstance(op, CHANNEL_MOVES) or (
            isinstance(op, ops.Pad) and (op.before[0] or op.after[0]) and not any(op.before[1:] + op.after[1:])
        ):
            for i in node.inputs:
                self.keep(i)
            self.add(node, Step(node.name, shape)).nodes.append(node)
            return
        maker = _MAKERS.get(type(op))
        if maker is None:
            raise GraphError(
                f"{node.name}: the layer-by-layer engine has no unit for {type(op).__name__}; export without its plan streams it"
            )
        step = maker(self, node)
        step.value = step.value or y
        step.nodes.insert(0, node)
        self.add(node, step)

    def build(self) -> Steps:
        for node in self.nodes:
            self.node(node)
        for edge in self.graph.outputs:
            if edge in self.made_in:
                self.keep(edge)
                self.copies[edge] = edge
            else:  # the input, or groups of other maps: a copy is the output
                place, name = self.places[edge], f"{edge}'"
                self.maps[name] = layout_of(self.type(edge))
                step = Step(name, map_shape(self.type(edge)))
                step.stores = [name]
                step.reads = place
                self.steps.append(step)
                self.copies[edge] = name
        for step in self.steps:
            _finish(self, step)
        return Steps(self.graph, self.steps, self.maps, self.places, self.copies)


def build(graph: Graph) -> Steps:
    """The steps that compute the graph's outputs. GraphError, naming the node, for what the engine cannot do."""
    for node in graph.nodes[1:]:
        if max(node.op.magnitude(*graph.types(node)), node.type.magnitude) >= LIMIT:
            raise GraphError(f"{node.name} needs integers beyond 62 bits")
    return _Builder(graph).build()


# ---------------------------------------------------------------- what makes the vectors


def _convolution(b: _Builder, node: Node, weight: np.ndarray, window: Window, groups: int) -> Step:
    place = b.keep(node.inputs[0])
    step = Step(node.name, map_shape(node.type), reads=place, window=window, weight=weight, groups=groups)
    channels = place.layout.channels
    if groups == channels == len(weight) and weight.shape[1] == 1 and channels > 1:
        step.kind, step.weight = "WINDOW", weight[:, 0]
    elif place.layout.format == SIGNS and int(np.abs(weight).max()) <= 1:
        step.kind = "XNOR"
    else:
        step.kind = "MULTIPLY"
    return step


def _conv2d(b: _Builder, node: Node) -> Step:
    op: ops.Conv2d = node.op  # type: ignore[assignment]
    kernel = (op.weight.shape[2], op.weight.shape[3])
    return _convolution(b, node, op.weight, Window(kernel, op.stride, (op.padding[0], op.padding[2]), op.dilation), op.groups)


def _fractional(b: _Builder, node: Node) -> Step:
    op: ops.FractionalConv2d = node.op  # type: ignore[assignment]
    place = b.keep(node.inputs[0])
    if place.layout.format != FRACTIONS:
        raise GraphError(f"{node.name}: its input {node.inputs[0]} is not stored as two planes of signs")
    kernel = (op.weight.shape[2], op.weight.shape[3])
    return Step(node.name, map_shape(node.type), "XNOR", reads=place, window=Window(kernel, op.stride, (op.padding[0], op.padding[2])),
                weight=op.weight, groups=op.groups, gate=np.clip(op.gate, -op.taps - 1, op.taps + 1), merge=op.merge)  # fmt: skip


def _dense(b: _Builder, node: Node) -> Step:
    """A convolution whose window is the whole map."""
    op: ops.Dense = node.op  # type: ignore[assignment]
    layout = b.keep(node.inputs[0]).layout
    kernel = (layout.height, layout.width)
    return _convolution(b, node, op.weight.reshape(len(op.weight), layout.channels, *kernel), Window(kernel), 1)


def _saturating(b: _Builder, node: Node) -> Step:
    op: ops.SaturatingDense = node.op  # type: ignore[assignment]
    return Step(node.name, map_shape(node.type), "MULTIPLY", "SATURATE", reads=b.keep(node.inputs[0]), dense=op)


def _pool(b: _Builder, node: Node) -> Step:
    op: ops.MaxPool | ops.SumPool = node.op  # type: ignore[assignment]
    place = b.keep(node.inputs[0])
    dilation = op.dilation if isinstance(op, ops.MaxPool) else (1, 1)
    window = Window(op.kernel, op.stride, (op.padding[0], op.padding[2]), dilation)
    shape = map_shape(node.type)
    whole = op.kernel == (place.layout.height, place.layout.width) and shape[1:] == (1, 1) and not any(op.padding) and dilation == (1, 1)
    return Step(
        node.name, shape, "WHOLE" if whole else "WINDOW", "MAX" if isinstance(op, ops.MaxPool) else "SUM", reads=place, window=window
    )


def _slice(b: _Builder, node: Node) -> Step:
    """A window of one tap: its stride is the step of the slice, its padding minus the start."""
    op: ops.Slice2d = node.op  # type: ignore[assignment]
    window = Window(stride=(op.rows[2], op.cols[2]), before=(-op.rows[0], -op.cols[0]))
    return Step(node.name, map_shape(node.type), "WINDOW", "SUM", reads=b.keep(node.inputs[0]), window=window)


def _pad(b: _Builder, node: Node) -> Step:
    """Around rows and columns a window of one tap, whose taps outside the map add 0; in channels as well, a gather."""
    op: ops.Pad = node.op  # type: ignore[assignment]
    if op.before[0] or op.after[0]:
        return _gather(b, node)
    return Step(node.name, map_shape(node.type), "WINDOW", "SUM", reads=b.keep(node.inputs[0]), window=Window(before=op.before[1:]))


def _shift(b: _Builder, node: Node) -> Step:
    """A depthwise convolution with one-hot kernels; far shifts are gathered."""
    op: ops.Shift = node.op  # type: ignore[assignment]
    channels = node.type.shape[0]
    dy, dx = (np.broadcast_to(v, channels) for v in (op.dy, op.dx))
    kernel = int(dy.max() - dy.min()) + 1, int(dx.max() - dx.min()) + 1
    if kernel[0] * kernel[1] > SHIFT_TAPS:
        return _gather(b, node)
    weight = np.zeros((channels, *kernel), dtype=np.int64)
    weight[np.arange(channels), dy - dy.min(), dx - dx.min()] = 1
    window = Window(kernel, before=(-int(dy.min()), -int(dx.min())))
    return Step(node.name, map_shape(node.type), "WINDOW", "MAC", reads=b.keep(node.inputs[0]), window=window, weight=weight)


def _gather(b: _Builder, node: Node) -> Step:
    """Element by element: the op applied to the numbers of its input's elements says where each comes from."""
    import torch

    place, x = b.keep(node.inputs[0]), b.type(node.inputs[0])
    numbers = torch.arange(1, x.numel + 1, dtype=torch.int64).reshape(1, *x.shape)
    index = node.op.evaluate(numbers)[0].numpy().reshape(map_shape(node.type)) - 1
    return Step(node.name, map_shape(node.type), "GATHER", reads=place, gather=index)


_MAKERS: dict[type, Callable[[_Builder, Node], Step]] = {
    ops.Conv2d: _conv2d,
    ops.FractionalConv2d: _fractional,
    ops.Dense: _dense,
    ops.SaturatingDense: _saturating,
    ops.MaxPool: _pool,
    ops.SumPool: _pool,
    ops.Slice2d: _slice,
    ops.Pad: _pad,
    ops.Shift: _shift,
    ops.Rearrange: _gather,
    ops.Reshape: _gather,
}


# ---------------------------------------------------------------- what the finishing unit does


@dataclass
class _Value:
    """An edge in a register: n = register * mul + add."""

    register: int
    mul: int = 1
    add: int = 0


class _Finish:
    """Writes the operations of one step."""

    def __init__(self, b: _Builder, step: Step) -> None:
        self.b, self.step = b, step
        self.values: dict[str, _Value] = {}
        self.free: list[int] = []
        self.count = 0
        self.left: dict[str, int] = {}
        for node in step.nodes:
            for i in node.inputs:
                self.left[i] = self.left.get(i, 0) + 1
        self.groups = step.out.groups

    # registers

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1

    def emit(self, code: str, **fields: object) -> Micro:
        m = Micro(code, **fields)  # type: ignore[arg-type]
        self.step.micros.append(m)
        return m

    def table(self, rows: np.ndarray) -> int:
        """Constants (rows, C or 1): the number of the first row."""
        at = sum(len(r) for r in self.step.rows)
        self.step.rows.append(np.asarray(rows, dtype=np.int64))
        return at

    # edges

    def load(self, place: Place, gate: bool = False) -> int:
        to = self.take()
        self.emit("LOAD", to=to, format=place.layout.format, b=0 if gate else place.layout.pitch, sources=place.sources, gate=gate)
        return to

    def value(self, edge: str) -> _Value:
        if edge not in self.values:
            shape = map_shape(self.b.type(edge))
            self.values[edge] = _Value(self.load(self.b.keep(edge), gate=shape != self.step.shape))
        return self.values[edge]

    def plain(self, edge: str) -> int:
        """The register with the integers of the edge themselves."""
        v = self.value(edge)
        if (v.mul, v.add) != (1, 0):
            self.emit("SCALE", to=v.register, a=v.register, p=v.mul, q=v.add)
            v.mul, v.add = 1, 0
        return v.register

    def release(self, *edges: str) -> None:
        for e in edges:
            self.left[e] -= 1
            if not self.left[e]:
                self.free.append(self.values.pop(e).register)

    def store(self, edge: str) -> None:
        """Where the fields are what the register counts, it is stored as it is."""
        layout = self.b.maps[edge]
        f, v = layout.format, self.values[edge]
        if (v.mul, v.add) != (1, 0) and (v.mul, v.add) == (1 << f.shift, f.bias):
            written, register = Format(f.bits, 0, 0), v.register
        else:
            written, register = f, self.plain(edge)
        self.emit("STORE", a=register, format=written, b=layout.pitch, sources=tuple(Source(edge, g) for g in range(layout.groups)))

    def done(self, edge: str, register: int, mul: int = 1, add: int = 0) -> None:
        self.values[edge] = _Value(register, mul, add)
        if edge in self.step.stores:
            self.store(edge)
        if not self.left.get(edge):
            self.free.append(self.values.pop(edge).register)

    # ops

    def search(self, source: int, row: int, levels: int, sign: int = -1, index: int = -1) -> int:
        """Passes are split when the engine's width is known: here the first holds all."""
        to = self.take()
        self.emit("SEARCH", to=to, a=source, b=index, row=row, p=levels, r=sign)
        return to

    def sign(self, sign: np.ndarray) -> int:
        return -1 if (sign == 1).all() else self.table(sign.reshape(1, -1))

    def number(self, op: ops.Join | ops.AffineJoin, narrow: Sequence[str], last: int) -> int:
        """A register with the number of the narrow codes, times `last`."""
        total, place = -1, int(np.prod(op.sizes)) * last
        for edge, size, low, step in zip(narrow, op.sizes, op.lows, op.steps, strict=True):
            place //= size
            digits = np.arange(step * (size - 1) + 1) // step * place
            source, to = self.plain(edge), self.take()
            self.emit("LUT", to=to, a=source, row=self.table(digits[:, None]), p=len(digits), q=low)
            if total >= 0:
                self.emit("ADD", to=total, a=total, b=to)
                self.free.append(to)
            else:
                total = to
        return total

    def node(self, node: Node) -> None:
        op, x = node.op, node.inputs
        if isinstance(op, ops.Threshold):
            to = self.search(self.plain(x[0]), self.table(op.thresholds.T), op.thresholds.shape[1], self.sign(op.sign))
            self.end(node, to, op.step, op.lo)
        elif isinstance(op, ops.Requant):
            self.requant(node, op)
        elif isinstance(op, ops.Lut):
            spread = np.repeat(op.table, op.step_in, 1)
            source, to = self.plain(x[0]), self.take()
            self.emit("LUT", to=to, a=source, row=self.table(spread.T), p=spread.shape[1], q=op.lo_in)
            self.end(node, to)
        elif isinstance(op, ops.Add | ops.Multiply):
            a, b, to = self.plain(x[0]), self.plain(x[1]), self.take()
            self.emit("ADD" if isinstance(op, ops.Add) else "PRODUCT", to=to, a=a, b=b)
            self.end(node, to)
        elif isinstance(op, ops.Join):
            self.join(node, op)
        elif isinstance(op, ops.AffineJoin):
            self.affine_join(node, op)
        else:
            self.move(node)

    def end(self, node: Node, register: int, mul: int = 1, add: int = 0) -> None:
        self.release(*node.inputs)
        self.done(node.name, register, mul, add)

    def requant(self, node: Node, op: ops.Requant) -> None:
        """A scale that is pending goes into the constants: (mul * (m x + a) + add) >> shift."""
        v = self.value(node.inputs[0])
        most = max(int(np.abs(c).max()) for c in op.constants.values())
        if op.kink is not None or most * (abs(v.mul) + abs(v.add) + 1) >= 1 << 40:
            self.plain(node.inputs[0])
        constants = [op.mul * v.mul, op.add + op.mul * v.add]
        if op.kink is not None:
            constants += [op.kink, op.mul2, op.add2]
        channels = max(len(np.atleast_1d(c)) for c in constants)
        row = self.table(np.stack([np.broadcast_to(c, channels) for c in constants]))
        to = self.take()
        self.emit("AFFINE", to=to, a=v.register, b=int(op.kink is not None), row=row, p=op.shift, q=op.lo, r=op.hi)
        self.end(node, to)

    def join(self, node: Node, op: ops.Join) -> None:
        wide, *narrow = node.inputs
        channels, codes, levels = op.thresholds.shape
        varying = op.sign.shape[1] > 1
        number = self.number(op, narrow, 1 if varying else levels)
        source, own, sign = self.plain(wide), -1, -1
        if varying:
            own = self.take()
            self.emit("LUT", to=own, a=number, row=self.table(op.sign.T), p=codes, q=0)
            self.emit("PRODUCT", to=own, a=own, b=source)
            self.emit("SCALE", to=number, a=number, p=levels, q=0)
            source = own
        else:
            sign = self.sign(op.sign[:, 0])
        to = self.search(source, self.table(op.thresholds.reshape(channels, -1).T), levels, sign, number)
        self.free += [number] + ([own] if own >= 0 else [])
        self.end(node, to, op.step, op.lo)

    def affine_join(self, node: Node, op: ops.AffineJoin) -> None:
        wide, *narrow = node.inputs
        number = self.number(op, narrow, 1)
        self.emit("LUT", to=number, a=number, row=self.table(op.offset.T), p=op.offset.shape[1], q=0)
        scaled = self.take()
        row = self.table(np.stack([op.sign << op.shift, np.zeros_like(op.sign)]))
        self.emit("AFFINE", to=scaled, a=self.plain(wide), row=row, p=0, q=-LIMIT, r=LIMIT)
        self.emit("ADD", to=scaled, a=scaled, b=number)
        to = self.search(scaled, self.table(op.thresholds.T), op.thresholds.shape[1])
        self.free += [number, scaled]
        self.end(node, to, op.step, op.lo)

    def move(self, node: Node) -> None:
        """Channels from groups of the inputs: for every input as many LOADs as a group of the output has sources there."""
        op, channels = node.op, node.type.shape[0]
        counts = [self.b.type(i).shape[0] for i in node.inputs]
        if isinstance(op, ops.Select):
            origin = np.broadcast_to(op.channels, channels)
        elif isinstance(op, ops.Thermometer):
            origin = np.arange(channels) // op.thresholds.shape[1]
        elif isinstance(op, ops.Pad):
            origin = np.full(channels, -1)
            origin[op.before[0] : op.before[0] + counts[0]] = np.arange(counts[0])
        else:
            origin = np.arange(channels)
        starts, to, first = np.cumsum([0, *counts]), self.take(), True
        for k, edge in enumerate(node.inputs):
            place = self.b.keep(edge)
            mine = np.where((origin >= starts[k]) & (origin < starts[k + 1]), origin - starts[k], -1)
            groups = [sorted({int(c) // LANES for c in mine[g : g + LANES] if c >= 0}) for g in range(0, channels, LANES)]
            for j in range(max(len(g) for g in groups)):
                picked = [g[j] if j < len(g) else 0 for g in groups]
                lanes = np.full(channels, -1)
                for g, group in enumerate(picked):
                    part = mine[g * LANES : (g + 1) * LANES]
                    if j < len(groups[g]):
                        lanes[g * LANES : g * LANES + len(part)] = np.where(part // LANES == group, part % LANES, -1)
                        lanes[g * LANES : g * LANES + len(part)][part < 0] = -1
                loaded = self.load(Place(place.layout, tuple(place.sources[g] for g in picked)))
                self.emit("PERMUTE", to=to, a=loaded, row=self.table(lanes[None]), p=int(first))
                self.free.append(loaded)
                first = False
        for edge in node.inputs:
            self.left[edge] -= 1
        if isinstance(op, ops.Thermometer):
            levels = np.broadcast_to(op.thresholds, (counts[0], op.thresholds.shape[1])).reshape(1, -1)
            code = self.search(to, self.table(levels), 1)
            self.free.append(to)
            self.done(node.name, code, 2, -1)
        else:
            self.done(node.name, to)

    def write(self) -> None:
        step = self.step
        if step.name.endswith("'") and step.reads is not None and step.kind == "NONE":
            self.values[step.name] = _Value(self.load(step.reads))
            self.store(step.name)
            step.reads = None
        rest = step.nodes
        if step.kind != "NONE":
            self.count = 1  # register 0 receives
            for i in rest[0].inputs:
                self.left[i] -= 1
            self.done(rest[0].name, 0)
            rest = rest[1:]
        for node in rest:
            self.node(node)
        step.registers = max(self.count, 1)
        join_passes(step)


def join_passes(step: Step) -> None:
    """A pass over a block takes its vectors from the unit or from memory, works on them and stores them: what can go together does."""
    moves, kept = ("LOAD", "STORE"), False  # kept: this pass has a source already that sets the order of its vectors
    for k, m in enumerate(step.micros):
        before = step.micros[k - 1] if k else None
        one_beat = m.format is None or m.format.beats == 1
        if m.code not in moves:
            if before is None:
                m.joined = step.kind != "NONE"
                kept = m.joined
            else:
                m.joined = before.code == "LOAD" and not before.gate and before.format is not None and before.format.beats == 1
                kept = False
        elif m.code == "STORE" and before is not None and before.code not in moves and one_beat and not kept:
            m.joined = before.to == m.a


def _finish(b: _Builder, step: Step) -> None:
    _Finish(b, step).write()
