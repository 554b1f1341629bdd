"""The engine: its compile-time numbers, how a step is tiled on it, how many words and iterations that takes, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from math import ceil, gcd

import numpy as np

from quantlib.cost import Cost, adder, adder_tree, compare, loop, memory, multiply, xnor_popcount
from quantlib.ir import IntType
from quantlib.layerwise.formats import LANES, Format
from quantlib.layerwise.steps import Micro, Step, Steps

UNITS = ("program", "maps", "weights", "operands", "compute", "finish", "results")  # in the order of Unit in lw_step.hpp
PORTS = ("program", "maps", "weights", "operands", "results")
STEP_WORDS = 8  # of a step's fields
# Cycles of a step before its first word arrives and after its last one has left: two latencies of memory and the pipelines of the units.
# Our
# estimate; every step pays it.
SETUP = 300
# A 512-bit AXI master with its burst buffer. Our estimate.
PORT = Cost(lut=1_200, ff=2_500, bram18=15)
SHALLOW = 64  # memories of up to so many words are made of LUTs: one holds 64 bits
AFFINE_OPS = ("Requant", "AffineJoin")
MOVE_OPS = ("Select", "Concat", "Thermometer", "Pad")


@dataclass(frozen=True)
class Engine:
    """Compile-time numbers of the units. None of them depends on the number of steps.

    xnor_rows: output rows side by side in the XNOR unit, each with 32 inputs and 32 outputs per cycle; inputs, outputs: products per
    cycle of
    the unit for other widths; search: halvings of a threshold search per pass; block: vectors a register of the finishing unit holds;
    halves: 2 to fetch the weights of the next group while one is worked on. The rest follows from the network: depths of memories, widths
    of
    words, which units exist at all.
    """

    xnor_rows: int = 1
    inputs: int = 1
    outputs: int = 1
    search: int = 1
    block: int = 64
    halves: int = 1
    xnor_tile: int = 1
    lane_tile: int = 1
    window_tile: int = 1
    xnor_weights: int = 1
    xnor_masks: int = 1
    lane_weights: int = 1
    window_weights: int = 1
    saturate: int = 1
    table: int = 1
    registers: int = 1
    micros: int = 1
    addresses: int = 1
    value_bits: int = 8
    table_bits: int = 32
    lane_bits: int = 8
    weight_bits: int = 2
    window_bits: int = 16
    xnor_bits: int = 8
    affine_bits: int = 8
    factor_bits: int = 2
    permute_bits: int = 8
    product_bits: int = 8
    has_xnor: bool = False
    has_multiply: bool = False
    has_window: bool = False
    has_whole: bool = False
    has_saturate: bool = False
    has_gather: bool = False
    has_planes: bool = False
    has_merge: bool = False

    @property
    def xnor_banks(self) -> int:
        return 2 * self.xnor_rows

    @property
    def table_words(self) -> int:
        """Bus words of a row of constants."""
        return self.table_bits // 16


@dataclass(frozen=True)
class Tiling:
    """tile_rows output rows use one load of input rows; `together` of them are worked on side by side; the finishing unit takes blocks."""

    tile_rows: int
    together: int
    block_rows: int
    block_cols: int


def signed_bits(*values: int) -> int:
    return IntType((1,), min(-1, *values), max(0, *values)).bits


def container(bits: int, least: int) -> int:
    return next(b for b in (2, 4, 8, 16, 32, 64) if b >= max(bits, least))


def span(step: Step, rows: int) -> int:
    """Input rows under `rows` output rows."""
    return (rows - 1) * step.window.stride[0] + (step.window.kernel[0] - 1) * step.window.dilation[0] + 1


def tiling(step: Step, e: Engine) -> Tiling | None:
    """How the step is tiled on the engine; None where not even one row of it fits its buffers."""
    _, height, width = step.shape
    together, rows = 1, height
    if step.kind in ("XNOR", "MULTIPLY", "WINDOW") and step.mode != "SATURATE":
        assert step.reads is not None
        layout = step.reads.layout
        line = layout.width * (1 if step.kind == "WINDOW" else layout.groups)
        banks, depth = {"XNOR": (e.xnor_banks, e.xnor_tile), "MULTIPLY": (1, e.lane_tile), "WINDOW": (1, e.window_tile)}[step.kind]
        if step.kind == "XNOR":
            together = min(e.xnor_rows, height, banks // gcd(step.window.stride[0], banks))
            together = min(together, max(1, e.block // min(width, 16)))
        lines = depth // line * banks  # input rows that fit
        rows = max((r for r in range(1, height + 1) if span(step, r) <= lines), default=0)
        if not rows:
            return None
        together = min(together, rows)
        if rows < height:
            rows -= rows % together
    if together * width <= e.block:
        return Tiling(rows, together, min(rows, together * (e.block // (together * width))), width)
    return Tiling(rows, together, together, e.block // together // 16 * 16)


def _pieces(whole: int, part: int) -> Iterator[tuple[int, int]]:
    """(size, how often) of the parts of a whole."""
    if whole >= part:
        yield part, whole // part
    if whole % part:
        yield whole % part, 1


def blocks(step: Step, t: Tiling, rows: int) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, how often) of the blocks of a tile of `rows` rows."""
    for r, n in _pieces(rows, t.block_rows):
        for c, m in _pieces(step.shape[2], t.block_cols):
            yield r, c, n * m


def in_ranges(step: Step) -> list[tuple[int, int]]:
    """First and last input group that each group of outputs reads."""
    assert step.reads is not None and step.weight is not None
    layout, outs = step.reads.layout, step.shape[0]
    found = []
    for start in range(0, outs, LANES):
        first, last = (o // (outs // step.groups) for o in (start, min(start + LANES, outs) - 1))
        each = layout.channels // step.groups
        found.append((first * each // LANES, ((last + 1) * each - 1) // LANES))
    return found


def is_masked(step: Step) -> bool:
    """Whether XNOR words need masks: zero weights, or groups that share a word."""
    assert step.reads is not None and step.weight is not None
    aligned = step.groups == 1 or (step.reads.layout.channels // step.groups % LANES == 0 and step.shape[0] // step.groups % LANES == 0)
    return not aligned or bool((step.weight == 0).any())


@dataclass(frozen=True)
class Shape:
    """What the counts of a step need, looked at once: taps, groups, and per group of outputs the input groups and chunks."""

    step: Step
    taps: int
    ranges: tuple[tuple[int, int], ...]
    masked: bool

    def terms(self, e: Engine, group: int) -> int:
        """Iterations of one pixel (of `together` rows) for one group of outputs."""
        if self.step.kind == "WINDOW":
            return self.taps
        first, last = self.ranges[group]
        if self.step.kind == "XNOR":
            return self.taps * (last - first + 1)
        assert self.step.reads is not None
        layout, out = self.step.reads.layout, self.step.out
        full = -(-LANES // e.inputs)
        final = -(-layout.last // e.inputs) if last == layout.groups - 1 else full
        parts = -(-(out.last if group == out.groups - 1 else LANES) // e.outputs)
        return self.taps * parts * ((last - first) * full + final)

    def weight_words(self, e: Engine, group: int) -> int:
        """Bus words of the weights of one group of outputs."""
        s = self.step
        if s.mode == "SATURATE":
            assert s.dense is not None
            return (1 + s.dense.weight.shape[1]) * e.window_bits // 16
        if s.kind == "XNOR":
            return (2 if s.gate is not None else 0) + self.terms(e, group) * (4 if self.masked else 2)
        if s.kind == "MULTIPLY":
            return -(-self.terms(e, group) * e.inputs * e.outputs * e.weight_bits // 512)
        if s.kind == "WINDOW" and s.mode == "MAC":
            return self.taps * e.window_bits // 16
        return 0


def shape_of(step: Step) -> Shape:
    taps = step.window.kernel[0] * step.window.kernel[1]
    if step.kind in ("XNOR", "MULTIPLY") and step.mode != "SATURATE":
        return Shape(step, taps, tuple(in_ranges(step)), step.kind == "XNOR" and is_masked(step))
    return Shape(step, taps, (), False)


def passes_of_all(step: Step, search: int) -> int:
    return sum(passes(m.p, search) if m.code == "SEARCH" and search else 1 for m in step.micros)


def passes(levels: int, search: int) -> int:
    """Passes of a search over `levels` thresholds."""
    return max(1, -(-levels.bit_length() // search))


def address_count(step: Step) -> int:
    groups = step.out.groups
    reads = 0 if step.reads is None else len(step.reads.sources)
    return reads + 3 * groups + groups * sum(m.code in ("LOAD", "STORE") for m in step.micros)


def table_rows(step: Step) -> int:
    return sum(len(r) for r in step.rows)


@dataclass(frozen=True)
class Counts:
    """Words on every port and iterations of every unit for one image, by the names in UNITS."""

    values: tuple[int, ...]

    def __getitem__(self, unit: str) -> int:
        return self.values[UNITS.index(unit)]

    @property
    def words(self) -> int:
        return sum(self[p] for p in PORTS)


def counts(shape: Shape, e: Engine, t: Tiling) -> Counts:
    """What the simulation counts for this step, in closed form."""
    front, back = making(shape, e, t), finishing(shape.step, e.search, e.table_words, t)
    return Counts(tuple(front.get(u, 0) + back.get(u, 0) for u in UNITS))


def tiles(step: Step, t: Tiling) -> Iterator[tuple[int, int]]:
    """(first row, rows) of every tile."""
    for start in range(0, step.shape[1], t.tile_rows):
        yield start, min(t.tile_rows, step.shape[1] - start)


def finishing(step: Step, search: int, table_words: int, t: Tiling) -> dict[str, int]:
    """The part of the counts that does not depend on the unit that makes the vectors."""
    groups = step.out.groups
    n = {"program": STEP_WORDS + passes_of_all(step, search) + -(-address_count(step) // 16), "operands": 0, "finish": 0, "results": 0}
    for rows, often in _pieces(step.shape[1], t.tile_rows):
        n["operands"] += often * groups * table_rows(step) * table_words
        n["finish"] += often * groups * table_rows(step) * table_words
        for r, c, times in blocks(step, t, rows):
            arrives = step.kind != "NONE" and not (step.micros and step.micros[0].joined)
            n["finish"] += often * times * groups * (r * c if arrives else 0)
            for m, after in zip(step.micros, [*step.micros[1:], None]):
                joined = m.joined if m.code == "STORE" else m.code == "LOAD" and after is not None and after.joined
                _operation(n, m, joined, search, r, c, often * times * groups)
    return n


def making(shape: Shape, e: Engine, t: Tiling) -> dict[str, int]:
    """Words of maps and weights, and iterations of the unit that makes the vectors."""
    step, groups = shape.step, shape.step.out.groups
    n = {"maps": 0, "weights": 0, "compute": 0}
    if step.kind == "NONE":
        return n
    words = [shape.weight_words(e, g) for g in range(groups)]
    if step.kind == "GATHER":
        vectors = groups * step.shape[1] * step.shape[2]
        return {"maps": 32 * vectors, "weights": 4 * vectors, "compute": 4 * vectors}
    assert step.reads is not None
    layout = step.reads.layout
    if step.kind == "WHOLE" or step.mode == "SATURATE":
        n["maps"], n["weights"] = layout.words, sum(words)
        n["compute"] = layout.groups * layout.height * layout.width * layout.format.beats + sum(words)
        return n
    lengths = [max(shape.terms(e, g), t.together) for g in range(groups)]
    prefetch = e.halves == 2 and step.kind != "WINDOW"
    for start, rows in tiles(step, t):
        first = start * step.window.stride[0] - step.window.before[0]
        inside = max(0, min(first + span(step, rows), layout.height) - max(first, 0))
        columns = sum(-(-r // t.together) * c * times for r, c, times in blocks(step, t, rows))
        n["maps"] += layout.groups * inside * layout.pitch
        n["weights"] += sum(words)
        n["compute"] += layout.groups * inside * layout.width * layout.format.beats
        for g in range(groups):
            work, ahead = columns * lengths[g] + t.together, 0
            if prefetch:
                ahead = words[g + 1] if g + 1 < groups else words[0] if start + rows < step.shape[1] else 0
            n["compute"] += max(work, ahead) + (words[g] if not prefetch or (start == 0 and g == 0) else 0)
    return n


def _operation(n: dict[str, int], m: Micro, joined: bool, search: int, rows: int, cols: int, often: int) -> None:
    vectors = rows * cols
    if m.code == "LOAD":
        assert m.format is not None
        r, c = (1, 1) if m.gate else (rows, cols)
        n["operands"] += often * r * m.format.words(c)
        n["finish"] += 0 if joined else often * (r * c * m.format.beats + (vectors if m.gate else 0))
    elif m.code == "STORE":
        assert m.format is not None
        n["results"] += often * rows * m.format.words(cols)
        n["finish"] += 0 if joined else often * vectors * m.format.beats
    elif m.code == "SEARCH":
        n["finish"] += often * passes(m.p, search) * (vectors + (m.r >= 0))
    else:
        constants = (5 if m.b else 2) if m.code == "AFFINE" else 1 if m.code == "PERMUTE" else 0
        n["finish"] += often * (vectors + constants)


# ---------------------------------------------------------------- the engine of a network


@dataclass(frozen=True, eq=False)
class Facts:
    """What of a network decides the sizes of its engine whatever its parallelism."""

    steps: Steps
    shapes: tuple[Shape, ...]

    @cached_property
    def base(self) -> Engine:
        graph, steps = self.steps.graph, self.steps.steps
        kinds = {s.kind if s.mode != "SATURATE" else "SATURATE" for s in steps}
        ends = [0]
        for s in steps:
            for node in s.nodes:
                for t in (*graph.types(node), node.type):
                    ends += [t.lo, t.hi]
                name = type(node.op).__name__
                if name == "AffineJoin":
                    ends += [node.op.magnitude(*graph.types(node)), -node.op.magnitude(*graph.types(node))]
                if name in ("Join", "AffineJoin", "Threshold"):
                    ends += [graph.types(node)[0].magnitude + 1, -graph.types(node)[0].magnitude - 1]
            ends += [m.p for m in s.micros if m.code in ("SEARCH", "LUT")]
            ends += [int(r.max()) for r in s.rows if r.shape[1] == 1 and r.min() >= 0 and r.max() < 1 << 31]
        lane_ends, weights, windows = [0], [0], [0]
        for s in steps:
            if s.kind in ("MULTIPLY", "WINDOW", "WHOLE"):
                t = graph.types(s.nodes[0])[0]
                lane_ends += [t.lo, t.hi]
            if s.dense is not None:
                windows += [int(a.min()) for a in (s.dense.weight, s.dense.bias)] + [int(a.max()) for a in (s.dense.weight, s.dense.bias)]
            elif s.weight is not None and s.kind in ("MULTIPLY", "WINDOW"):
                (weights if s.kind == "MULTIPLY" else windows).extend((int(s.weight.min()), int(s.weight.max())))
        tables = [0, *(int(v) for s in steps for r in s.rows for v in (r.min(), r.max()))]
        xnor = [s for s in self.shapes if s.step.kind == "XNOR"]
        lanes = signed_bits(*lane_ends)
        return Engine(
            xnor_weights=max((s.terms(Engine(), g) for s in xnor for g in range(len(s.ranges))), default=1),
            xnor_masks=max((s.terms(Engine(), g) for s in xnor if s.masked for g in range(len(s.ranges))), default=1),
            window_weights=max((s.taps for s in self.shapes if s.step.kind == "WINDOW"), default=1),
            saturate=max((s.reads.layout.groups for s in steps if s.dense is not None and s.reads is not None), default=1),
            table=max(1, *(table_rows(s) for s in steps)),
            registers=max(s.registers for s in steps),
            addresses=max(address_count(s) for s in steps),
            value_bits=max(8, lanes, signed_bits(*ends)),
            table_bits=32 if signed_bits(*tables) <= 32 else 64,
            lane_bits=lanes,
            weight_bits=container(signed_bits(*weights), 2),
            window_bits=container(signed_bits(*windows), 16),
            xnor_bits=signed_bits(max((s.taps * LANES * (r[1] - r[0] + 1) for s in xnor for r in s.ranges), default=0)),
            affine_bits=max((self._operand_bits(s, *AFFINE_OPS) for s in steps), default=8),
            factor_bits=self._factor_bits(),
            permute_bits=max((self._operand_bits(s, *MOVE_OPS) for s in steps), default=8),
            product_bits=max((self._operand_bits(s, "Multiply", "Join") for s in steps), default=8),
            has_xnor="XNOR" in kinds, has_multiply="MULTIPLY" in kinds, has_window="WINDOW" in kinds, has_whole="WHOLE" in kinds,
            has_saturate="SATURATE" in kinds, has_gather="GATHER" in kinds,
            has_planes=any(s.gate is not None for s in steps), has_merge=any(s.merge is not None for s in steps),
        )  # fmt: skip

    @cached_property
    def codes(self) -> set[str]:
        """Operations of the finishing unit that occur."""
        return {m.code for s in self.steps.steps for m in s.micros}

    @cached_property
    def modes(self) -> set[tuple[str, str]]:
        """Kinds and modes of the steps."""
        return {(s.kind, s.mode) for s in self.steps.steps}

    @cached_property
    def formats(self) -> tuple[list[Format], list[Format], list[Format]]:
        """Of the maps that units read, that operands are loaded from, and that are stored."""
        micros = [m for s in self.steps.steps for m in s.micros if m.format is not None]
        reads = [s.reads.layout.format for s in self.steps.steps if s.reads is not None and s.kind in ("MULTIPLY", "WINDOW", "WHOLE")]
        loads, stores = ([m.format for m in micros if m.code == code and m.format is not None] for code in ("LOAD", "STORE"))
        return reads, loads, stores

    def _operand_bits(self, step: Step, *names: str) -> int:
        """Width of what these ops read."""
        ends = [0]
        for node in step.nodes:
            if type(node.op).__name__ in names:
                for t in self.steps.graph.types(node):
                    ends += [t.lo, t.hi, t.levels]
        return max(8, signed_bits(*ends))

    def _factor_bits(self) -> int:
        """Width of the factors of the multiply-shifts."""
        ends = [0]
        for step in self.steps.steps:
            constants = np.concatenate([np.stack([r.min(1), r.max(1)], 1) for r in step.rows]) if step.rows else np.zeros((0, 2))
            for m in step.micros:
                if m.code == "AFFINE":
                    ends += [int(v) for k in ((0, 3) if m.b else (0,)) for v in constants[m.row + k]]
        return signed_bits(*ends)

    @cache  # noqa: B019  # of a handful of facts, for the time of a search
    def least_lines(self, kind: str, rows: int) -> int:
        """Vectors per bank that hold what the rows of every step of this kind read that are worked on together."""
        least = 1
        for shape in self.shapes:
            s = shape.step
            if s.kind != kind or s.mode == "SATURATE":
                continue
            assert s.reads is not None
            line = s.reads.layout.width * (1 if kind == "WINDOW" else s.reads.layout.groups)
            banks = 2 * rows if kind == "XNOR" else 1
            together = min(rows, s.shape[1], banks // gcd(s.window.stride[0], banks)) if kind == "XNOR" else 1
            least = max(least, -(-span(s, together) // banks) * line)
        return least

    @cache  # noqa: B019
    def lane_weights(self, inputs: int, outputs: int) -> int:
        """Bus words of the weights of a group of outputs, the most of any step."""
        e = replace(self.base, inputs=inputs, outputs=outputs)
        lanes = [s for s in self.shapes if s.step.kind == "MULTIPLY" and s.step.mode != "SATURATE"]
        return max((s.weight_words(e, g) for s in lanes for g in range(len(s.ranges))), default=1)

    @cache  # noqa: B019
    def micros(self, search: int) -> int:
        return max(passes_of_all(s, search) for s in self.steps.steps) or 1

    def sized(self, rows: int, inputs: int, outputs: int, search: int, block: int, halves: int, room: int) -> Engine:
        """The engine with this parallelism; `room` times the least buffers, rounded up to what fills memories of 512 words."""

        def depth(kind: str) -> int:
            least = self.least_lines(kind, rows) * room
            return least if least <= 64 else -(-least // 512) * 512

        return replace(
            self.base, xnor_rows=rows, inputs=inputs, outputs=outputs, search=search, block=block, halves=halves,
            xnor_tile=depth("XNOR"), lane_tile=depth("MULTIPLY"), window_tile=depth("WINDOW"),
            lane_weights=self.lane_weights(inputs, outputs), micros=self.micros(search),
        )  # fmt: skip


WIDTHS = ("value_bits", "table_bits", "lane_bits", "weight_bits", "window_bits", "xnor_bits", "affine_bits", "factor_bits", "permute_bits",
          "product_bits")  # fmt: skip


def needs(f: Facts, e: Engine) -> Engine:
    """The smallest engine with the parallelism of e, and words at least as wide, that runs the network."""
    wide = Facts(f.steps, f.shapes)
    wide.__dict__["base"] = replace(f.base, **{k: max(getattr(f.base, k), getattr(e, k)) for k in WIDTHS})
    return wide.sized(e.xnor_rows, e.inputs, e.outputs, e.search, e.block, e.halves, 1)


def lacking(f: Facts, e: Engine) -> list[str]:
    """What of the engine is too small for the network, in words."""
    least = needs(f, e)
    return [
        f"{k.name} {getattr(e, k.name)}, {getattr(least, k.name)} is needed"
        for k in fields(e)
        if getattr(e, k.name) < getattr(least, k.name)
    ]


def facts(steps: Steps) -> Facts:
    return Facts(steps, tuple(shape_of(s) for s in steps.steps))


# ---------------------------------------------------------------- what it costs


def resources(f: Facts, e: Engine) -> dict[str, Cost]:
    """First-order costs by unit, from the leaf formulas of quantlib.cost; ports, crossbars and field extraction are our estimates."""
    wide = LANES * e.value_bits
    found = {"memory ports": PORT.times(6), "control": loop(1 << 20, 512) + memory(e.addresses, 5 * 32) + memory(e.micros, 3 * 256, "lut")}
    reads, loads, stores = f.formats
    if e.has_xnor:
        planes = 2 if e.has_planes else 1
        lane = (xnor_popcount(LANES) + adder(e.xnor_bits)).times(planes)
        merge = multiply(16, 9).times(2) + adder(24).times(4) if e.has_merge else adder(e.xnor_bits).times(planes - 1)
        # each row reads any of the banks: a choice of that many words
        banks = Cost(lut=32 * planes * e.xnor_rows * e.xnor_banks // 4, ff=2 * 32 * planes * e.xnor_rows)
        found["xnor"] = (
            lane.times(LANES * e.xnor_rows) + merge.times(LANES) + compare(e.xnor_bits).times(LANES * (planes - 1))
            + memory(e.xnor_tile, 32 * planes).times(e.xnor_banks) + memory(e.xnor_weights * e.halves, 1024)
            + (memory(e.xnor_masks * e.halves, 1024) if e.xnor_masks > 1 else Cost()) + banks + loop(1 << 20, wide)
        )  # fmt: skip
    if e.has_multiply:
        wide_row = max(e.inputs * e.outputs * e.weight_bits, 512)
        lane = multiply(e.lane_bits, e.weight_bits).times(e.inputs)
        lane += adder_tree(e.inputs, e.lane_bits + e.weight_bits) + adder(e.value_bits)
        chosen = Cost(lut=e.inputs * e.lane_bits * (LANES // e.inputs) // 4)
        kept = stored(e.lane_tile, LANES * e.lane_bits)
        found["multiply"] = (
            lane.times(e.outputs) + kept + memory(e.halves * ceil(e.lane_weights * 512 / wide_row), wide_row)
            + extraction(reads, e.lane_bits) + chosen + loop(1 << 20, wide)
        )  # fmt: skip
    if e.has_window or e.has_whole:
        products, largest = ("WINDOW", "MAC") in f.modes, bool({("WINDOW", "MAX"), ("WHOLE", "MAX")} & f.modes)
        lane = adder(e.value_bits) + (compare(e.value_bits) if largest else Cost())
        lane += multiply(e.lane_bits, e.window_bits) if products else Cost()
        kept = stored(e.window_tile, LANES * e.lane_bits) if e.has_window else Cost()
        weights = stored(e.window_weights, LANES * e.window_bits) if products else Cost()
        found["window"] = lane.times(LANES) + kept + weights + extraction(reads, e.lane_bits) + loop(1 << 20, wide)
    if e.has_saturate:
        lane = multiply(e.lane_bits, e.window_bits) + adder(e.value_bits).times(2) + compare(e.value_bits).times(2)
        found["saturating"] = lane.times(LANES) + extraction(reads, e.lane_bits) + loop(1 << 20, wide)
    codes = f.codes
    lane = adder(e.value_bits)
    if "AFFINE" in codes:  # product, sum, a shift by any distance (three choices of four), two compares
        product = e.affine_bits + e.factor_bits
        lane += multiply(e.affine_bits, e.factor_bits) + adder(product) + compare(e.value_bits).times(2) + Cost(lut=product * 3, ff=product)
    if "SEARCH" in codes:
        lane += (compare(max(e.value_bits, e.table_bits)) + Cost(ff=2 * e.value_bits)).times(e.search)
    if "PRODUCT" in codes:
        lane += multiply(e.product_bits, e.product_bits)
    if "PERMUTE" in codes:
        lane += Cost(lut=11 * e.permute_bits)  # a choice of 32 takes 11 LUTs
    copies = stored(e.table, e.table_bits).times(LANES * e.search)
    kept = stored(e.block, wide).times(e.registers)
    operands = Cost(lut=2 * wide * ceil((e.registers - 1) / 3))  # a choice of registers for both operands
    found["finish"] = (
        lane.times(LANES)
        + copies
        + kept
        + operands
        + extraction(loads, e.value_bits)
        + extraction(stores, e.value_bits)
        + loop(1 << 20, wide)
    )
    return found


def stored(words: int, bits: int) -> Cost:
    return memory(words, bits, "lut" if words <= SHALLOW else "bram")


def extraction(formats: Sequence[Format], bits: int) -> Cost:
    """Vectors out of the words of the bus, or into them: per lane a choice among the slots of every format, and the bias."""
    return (Cost(lut=ceil(sum(max(16, f) for f in {f.bits for f in formats}) / 3), ff=bits) + adder(bits)).times(LANES)


def total(costs: Sequence[Cost]) -> Cost:
    return sum(costs, Cost())


def powers(limit: int) -> list[int]:
    return [1 << k for k in range(limit.bit_length()) if 1 << k <= limit]
