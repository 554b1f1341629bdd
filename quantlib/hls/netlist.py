"""A graph as stages and wires: kernels, forks for edges with several readers, width converters, and FIFO depths that cannot deadlock."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm
from typing import Any

import numpy as np

from quantlib.hls.call import Call, Port, Table, ctype, every_word
from quantlib.ir import Graph, GraphError, IntType
from quantlib.schedule import BASE_DEPTH, Folding

Array = np.ndarray
SHALLOW = 2  # the least depth at which a FIFO passes a word per cycle


@dataclass
class Wire:
    """One FIFO: a single writer and a single reader. BASE_DEPTH words fit one shift register per bit and even out neighbours' rhythms."""

    name: str
    label: str
    port: Port
    depth: int = BASE_DEPTH


@dataclass(frozen=True)
class Stage:
    """One call in the dataflow region: `function<args>(inputs[0], outputs[0], tables..., images, weights, other inputs, outputs)`."""

    name: str
    node: str
    header: str
    function: str
    args: tuple[Any, ...]
    inputs: tuple[Wire, ...]
    outputs: tuple[Wire, ...]
    iterations: int
    demand: Callable[[], tuple[Array, ...]]
    tables: tuple[tuple[str, Table], ...] = ()
    folding: Folding = Folding()
    weights: Wire | None = None


@dataclass(frozen=True)
class Pin:
    """One end of the network: the integers of an edge on a 64-bit bus, in containers of `bits` bits, wire.port.lanes of them a cycle."""

    edge: str
    type: IntType
    bits: int
    wire: Wire

    @property
    def bus_words(self) -> int:
        """64-bit words per image."""
        return -(-self.type.numel * self.bits // 64)

    @property
    def iterations(self) -> int:
        return self.bus_words * (64 // self.bits) // self.wire.port.lanes


@dataclass(frozen=True)
class Feed:
    """Weights that lie in memory: `rows` rows of wire.port.lanes weights of `bits` bits, all of them read `replay` times per image.

    A 64-bit word holds whole weights, the first one lowest: several whole rows where they fit, else a row takes whole words.
    """

    name: str
    node: str
    rows: int
    replay: int
    bits: int
    wire: Wire
    build: Callable[[], Array]

    @property
    def words(self) -> int:
        """Bus words of a row, which are the cycles it takes at least; where rows share a word, a row a cycle."""
        return -(-self.wire.port.lanes // (64 // self.bits))

    @property
    def bus_words(self) -> int:
        """64-bit words of all rows."""
        each = 64 // self.bits // self.wire.port.lanes
        return -(-self.rows // each) if each else self.rows * self.words

    @property
    def iterations(self) -> int:
        return self.replay * self.rows * self.words

    def packed(self) -> Array:
        """The region of memory: (bus_words,) uint64."""
        rows, per = self.build().reshape(self.rows, -1), 64 // self.bits
        each = max(1, per // rows.shape[1])
        wide = np.zeros((-(-self.rows // each) * each, self.words * per if each == 1 and self.words > 1 else rows.shape[1]), np.uint64)
        wide[: self.rows, : rows.shape[1]] = rows.astype(np.int64).view(np.uint64) & np.uint64(2**self.bits - 1)
        lanes = wide.reshape(self.bus_words, -1)
        shifts = np.arange(lanes.shape[1], dtype=np.uint64) * np.uint64(self.bits)
        return np.bitwise_or.reduce(lanes << shifts, axis=1)


@dataclass
class Netlist:
    """Stages in topological order, the wires between them, the pins, and weights that come from memory."""

    stages: list[Stage] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    input: Pin = None  # type: ignore[assignment]  # set by build
    outputs: list[Pin] = field(default_factory=list)

    @property
    def headers(self) -> list[str]:
        return sorted({s.header for s in self.stages})


def container(t: IntType) -> int:
    return next(b for b in (8, 16, 32, 64) if t.bits <= b)


def _bus_port(t: IntType) -> Port:
    lanes = gcd(t.numel, 64 // container(t))
    return Port(ctype(t), lanes, t.numel // lanes)


class _Builder:
    def __init__(self, graph: Graph, foldings: Mapping[str, Folding], depths: Mapping[str, tuple[int, ...]]) -> None:
        self.graph, self.foldings, self.depths = graph, foldings, depths
        self.net = Netlist()
        self.taken: set[str] = set()

    def identifier(self, name: str) -> str:
        base = re.sub(r"\W", "_", name)
        base = base if re.match(r"[A-Za-z]", base) else f"n{base}"
        found, k = base, 2
        while found in self.taken:
            found, k = f"{base}_{k}", k + 1
        self.taken.add(found)
        return found

    def wire(self, label: str, port: Port) -> Wire:
        w = Wire(self.identifier(f"s_{label}"), label, port)
        self.net.wires.append(w)
        return w

    def glue(
        self, label: str, node: str, function: str, words: int, x: Wire, y: tuple[Wire, ...], demand: Callable[[], tuple[Array, ...]]
    ) -> None:
        self.net.stages.append(Stage(self.identifier(label), node, "ql_glue.hpp", function, (words,), (x,), y, words, demand))

    def convert(self, w: Wire, lanes: int, label: str, node: str) -> Wire:
        """w with another number of lanes, through the least common multiple where neither divides the other."""
        have = w.port.lanes
        if have == lanes:
            return w
        if have % lanes and lanes % have:
            return self.convert(self.convert(w, lcm(have, lanes), f"{label}_wide", node), lanes, label, node)
        total = w.port.words * have
        y = self.wire(label, Port(w.port.ctype, lanes, total // lanes))
        if lanes > have:
            ratio, words = lanes // have, total // have
            self.glue(f"{label}_gather", node, "ql::gather", words, w, (y,), lambda: (ratio * np.arange(1, words // ratio + 1),))
        else:
            ratio, words = have // lanes, total // lanes
            self.glue(f"{label}_scatter", node, "ql::scatter", words, w, (y,), lambda: (np.arange(words) // ratio + 1,))
        return y

    def split(self, w: Wire, readers: list[tuple[str, int]], node: str) -> list[Wire]:
        """One wire per reader, by a chain of forks."""
        out: list[Wire] = []
        for reader, _ in readers[:-1]:
            mine = self.wire(f"{node}_to_{reader}", w.port)
            rest = self.wire(f"{node}_rest", w.port)
            words = w.port.words
            self.glue(f"{node}_fork", node, "ql::fork", words, w, (mine, rest), every_word(words))
            out.append(mine)
            w = rest
        return [*out, w]

    def build(self) -> Netlist:
        graph = self.graph
        readers: dict[str, list[tuple[str, int]]] = {n.name: [] for n in graph}
        for n in graph:
            for k, edge in enumerate(n.inputs):
                readers[edge].append((n.name, k))
        for k, edge in enumerate(graph.outputs):
            readers[edge].append(("", k))
        ends: dict[tuple[str, int], Wire] = {}
        for n in graph:
            if not readers[n.name]:
                raise GraphError(f"{n.name} is read by nobody: a stream needs a reader (drop the node)")
            call: Call = n.op.hls(graph.types(n), n.type, self.foldings.get(n.name, Folding()))
            if not n.inputs:
                w = self.wire(n.name, _bus_port(n.type))
                self.net.input = Pin(n.name, n.type, container(n.type), w)
            else:
                w = self.chain(n.name, call, [ends[n.name, k] for k in range(len(n.inputs))])
            for reader, wire in zip(readers[n.name], self.split(w, readers[n.name], n.name), strict=True):
                ends[reader] = wire
        for k, edge in enumerate(graph.outputs):
            t = graph.by_name[edge].type
            w = self.convert(ends["", k], _bus_port(t).lanes, f"{edge}_out", edge)
            self.net.outputs.append(Pin(edge, t, container(t), w))
        return self.net

    def chain(self, node: str, call: Call, inputs: list[Wire]) -> Wire:
        name = self.identifier(node)
        folding, ends = self.foldings.get(node, Folding()), inputs
        for i, kernel in enumerate(call.kernels):
            ins = [
                self.convert(v, p.lanes, f"{node}_in{k}" if i == 0 else f"{node}_mid{i}", node)
                for k, (v, p) in enumerate(zip(ends, kernel.inputs, strict=True))
            ]
            if i == 0:  # the schedule speaks of the FIFOs as the node reads them
                for v, depth in zip(ins, self.depths.get(node, ()), strict=False):
                    v.depth = max(v.depth, depth)
            else:  # room for what the kernel reads in one go, and works on while the one before it writes nothing
                ins[0].depth = max(ins[0].depth, int(np.diff(kernel.demand()[0], prepend=0).max()) + kernel.backlog)
            last = i == len(call.kernels) - 1
            w = self.wire(node if last else f"{node}_{kernel.label}", kernel.output)
            stage = self.identifier(f"{node}_{kernel.label}" if kernel.label else f"{node}_stage")
            tables = tuple((f"{name}_{t.name}", t) for t in kernel.tables)
            shape = (kernel.header, kernel.function, kernel.args, tuple(ins), (w,), kernel.iterations, kernel.demand)
            made = Stage(stage, node, *shape, tables, folding)
            self.net.stages.append(self.feed(made, f"{name}_weights") if folding.memory == "stream" and tables else made)
            ends = [w]
        return ends[0]

    def feed(self, s: Stage, name: str) -> Stage:
        """The stage with its weights on a wire from memory in the place of its table."""
        if s.function != "ql::matvec":
            raise GraphError(f"{s.node}: memory style stream is for plain matrix-vector products, not for {s.function}")
        (_, table), values = s.tables[0], s.tables[0][1].build()
        exact, rows = IntType((1,), int(values.min()), int(values.max())), len(values)
        wire = self.wire(name, Port(ctype(exact), values[0].size, s.iterations))
        self.net.feeds.append(Feed(name, s.node, rows, s.iterations // rows, exact.bits, wire, table.build))
        return replace(s, header="ql_streamed.hpp", function="ql::streamed_matvec", tables=(), weights=wire)


def build(graph: Graph, foldings: Mapping[str, Folding], depths: Mapping[str, tuple[int, ...]] | None = None) -> Netlist:
    """Stages and wires for the given foldings (absent: one lane); FIFOs are as deep as `required` and `stored_ahead` find they must be."""
    net = _Builder(graph, foldings, depths or {}).build()
    for wire, words in (*required(net).items(), *stored_ahead(net).items()):
        w = next(v for v in net.wires if v.name == wire)
        w.depth = max(w.depth, words)
    return net


def required(net: Netlist) -> dict[str, int]:
    """Depths, by wire, that FIFOs into stages with several inputs need so that the network cannot deadlock.

    For each such join, time is counted in words of the nearest wire through which all its inputs come (its dominator: the input of the
    fork, for a residual block), every stage between running as far as it can after each word: word k of a stage exists at the latest of
    the times at which the input words it demands exist. A FIFO into the join then holds at most what has arrived up to a time and was
    not consumed before it. Whether a dataflow network with blocking reads and writes stops does not depend on the order in which its
    stages run, so depths that suffice for this order (an inner region runs to its end between two words of an outer one) suffice for
    all. Images do not overlap inside a kernel, so one image tells everything.
    """
    above: dict[str, str | None] = {net.input.wire.name: None}  # the dominator tree
    level: dict[str | None, int] = {None: -1, net.input.wire.name: 0}
    depths: dict[str, int] = {}
    for number, s in enumerate(net.stages):
        top: str | None = s.inputs[0].name
        for w in s.inputs[1:]:
            other: str | None = w.name
            while top != other:
                if level[top] >= level[other]:
                    top = above[top] if top else None
                else:
                    other = above[other] if other else None
        for w in s.outputs:
            above[w.name], level[w.name] = top, level[top] + 1
        if len(s.inputs) > 1:
            assert top is not None
            _join_depths(net, number, top, depths)
    return depths


def stored_ahead(net: Netlist) -> dict[str, int]:
    """Depths, by wire, that keep a stage at work while the one before it writes nothing, which begins each image by reading alone.

    A stage is silent until its first word has all it needs. Behind it another one of I iterations starves as long, unless its FIFO holds
    what it reads meanwhile; it needs that only as far as silence and I together exceed the period P, the iterations of the slowest stage:
    words (silence + I - P) / I, on top of BASE_DEPTH. What it does not store, within P - I, is silence of its own for those behind it.
    """
    pins, feeds = (net.input, *net.outputs), net.feeds
    period = max((*(s.iterations for s in net.stages), *(p.iterations for p in pins), *(f.iterations for f in feeds)))
    silence = {net.input.wire.name: 0}
    depths: dict[str, int] = {}
    for s in net.stages:
        before = max(silence[w.name] for w in s.inputs)
        short = before + s.iterations - period
        for w in s.inputs:
            words = -(-w.port.words * min(short, s.iterations) // s.iterations)
            if words > BASE_DEPTH:
                depths[w.name] = BASE_DEPTH + words
        own = max(int(need[0]) for need in s.demand()) - 1
        silence.update((w.name, own + min(before, period - s.iterations)) for w in s.outputs)
    return depths


def _join_depths(net: Netlist, number: int, start: str, depths: dict[str, int]) -> None:
    words = next(w.port.words for w in net.wires if w.name == start)
    time: dict[str, Array] = {start: np.arange(1, words + 1, dtype=np.int32)}
    for s in net.stages[: number + 1]:
        if not all(w.name in time for w in s.inputs):
            continue
        demand, arrivals = s.demand(), [time[w.name] for w in s.inputs]
        ready = np.zeros(len(demand[0]), dtype=np.int32)
        for need, arrival in zip(demand, arrivals, strict=True):
            ready = np.maximum(ready, np.where(need > 0, arrival[np.maximum(need, 1) - 1], 0))
        ready = np.maximum.accumulate(ready)
        for w in s.outputs:
            time[w.name] = ready
    exact, loose = [], []
    for need, arrival in zip(demand, arrivals, strict=True):
        # word j is consumed when the first output that demands more than j words is written
        taken = ready[np.minimum(np.searchsorted(need, np.arange(1, len(arrival) + 1)), len(ready) - 1)]
        arrived = np.searchsorted(arrival, arrival, side="right")
        exact.append(int((arrived - np.searchsorted(taken, arrival, side="right")).max()))
        loose.append(int((arrived - np.searchsorted(taken, arrival, side="left")).max()))
    # Counted are all arrivals of a step as if nothing were taken meanwhile. Where the branches have nothing in common below `start` and
    # nothing of them leads elsewhere, the one that lags may run last within each step, and its words are then taken one by one.
    last = int(np.argmax(np.array(loose) - np.array(exact))) if _apart(net, number, start) else -1
    for i, w in enumerate(s.inputs):
        depths[w.name] = max(SHALLOW, 1 + (exact if i == last else loose)[i])


def _apart(net: Netlist, number: int, start: str) -> bool:
    """Whether the branches from wire `start` into stage `number` are disjoint and feed no other join."""
    source = {w.name: i for i, s in enumerate(net.stages) for w in s.outputs}
    reader = {w.name: i for i, s in enumerate(net.stages) for w in s.inputs}
    joined: dict[str, bool] = {}  # wire -> some join lies downstream
    for i in reversed(range(len(net.stages))):
        s = net.stages[i]
        below = len(s.inputs) > 1 or any(joined[w.name] if w.name in reader else False for w in s.outputs)
        joined.update(dict.fromkeys((w.name for w in s.inputs), below))
    branches = []
    for w in net.stages[number].inputs:
        branch: set[int] = set()
        todo = [w.name]
        while todo:
            name = todo.pop()
            if name != start and source[name] not in branch:
                branch.add(source[name])
                todo += [v.name for v in net.stages[source[name]].inputs]
        branches.append(branch)
    region = set().union(*branches)
    fork = reader[start]
    shared = sum(map(len, branches)) - len(region) - (sum(fork in b for b in branches) - 1 if fork in region else 0)
    leaves = any(
        w.name in reader and joined[w.name] and reader[w.name] not in region | {number} for i in region for w in net.stages[i].outputs
    )
    return shared == 0 and not leaves
