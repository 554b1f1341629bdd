"""Which engine a network gets on a part: cycles of every step, frames/s, resources, and the search over the engine's parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from quantlib.cost import Cost
from quantlib.ir import Graph
from quantlib.layerwise.engine import (
    PORTS,
    SETUP,
    UNITS,
    Counts,
    Engine,
    Facts,
    Tiling,
    counts,
    facts,
    finishing,
    lacking,
    making,
    powers,
    resources,
    tiling,
    total,
)
from quantlib.layerwise.formats import WORD
from quantlib.layerwise.image import allocate
from quantlib.layerwise.steps import Steps, build
from quantlib.parts import PARTS, RESOURCES, Part
from quantlib.parts import part as find_part

# Peak bandwidth of the memory beside a part on its common board, GB/s: 32-bit DDR3-1050/1066 of Zynq-7000 boards (PYNQ-Z2: 16 bit), 32-bit
# LPDDR4-2133 (Ultra96-V2), 64-bit DDR4 (Zynq UltraScale+ and Kria boards), four channels of DDR4-2400 or HBM2 (Alveo), from the boards'
# user guides.
BANDWIDTH = {
    "xc7z010": 4.2, "xc7z020": 2.1, "xc7z045": 4.2, "xc7z100": 4.2, "xczu1cg": 4.2, "xczu2eg": 8.5, "xczu3eg": 8.5, "xczu4ev": 19.2,
    "xck26": 19.2, "xczu5ev": 19.2, "xczu7ev": 19.2, "xczu9eg": 17.0, "xczu15eg": 17.0, "xczu28dr": 19.2, "xcu50": 201.0, "xcu200": 76.8,
    "xcu280": 460.0, "xcu250": 76.8,
}  # fmt: skip
USABLE = 0.7  # share of the peak that bursts of a few hundred bytes reach: a rule of thumb


class LayerwiseError(ValueError):
    """A plan that was made for another graph, or an engine that cannot run one."""


@dataclass(frozen=True)
class Row:
    """One step: the unit that makes its vectors, the nodes it computes, what it counts and how many cycles it takes.

    cycles = the largest of compute, finish, every port's words, and all bytes over the memory's bandwidth, plus SETUP and the words of its
    program. bound: which of them it was ("memory" for the ports and the bandwidth).
    """

    name: str
    unit: str
    nodes: tuple[str, ...]
    tiling: Tiling
    counts: Counts
    cycles: int
    bound: str


@dataclass(frozen=True)
class Plan:
    """What `estimate` returns: an engine, the steps on it, and what they take on a part.

    bytes_per_cycle: what the memory delivers, at most 64 * 5. costs: unit -> Cost; memory_bytes: image of constants, arena of maps, input
    and
    outputs of an image. missing and smallest are those of `quantlib.schedule.Plan`.
    """

    graph: Graph
    part: Part
    clock_mhz: float
    engine: Engine
    rows: tuple[Row, ...]
    costs: Mapping[str, Cost]
    bytes_per_cycle: float
    memory_bytes: Mapping[str, int]
    target_fps: float | None
    missing: Mapping[str, float]
    smallest: str | None

    @property
    def network(self) -> str:
        return self.graph.name

    @property
    def total(self) -> Cost:
        return total(list(self.costs.values()))

    @property
    def cycles(self) -> int:
        """Per image; images do not overlap, so this is the latency as well."""
        return sum(r.cycles for r in self.rows)

    @property
    def fps(self) -> float:
        return self.clock_mhz * 1e6 / self.cycles

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def traffic(self) -> int:
        """Bytes over the memory ports per image."""
        return WORD * sum(r.counts.words for r in self.rows)

    def bound(self) -> dict[str, int]:
        """Cycles by what bounds the steps: compute, finish, memory."""
        return {k: sum(r.cycles for r in self.rows if r.bound == k) for k in ("compute", "finish", "memory")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        from dataclasses import asdict

        return {
            "architecture": "layerwise",
            "network": self.network,
            "part": self.part.full_name,
            "clock_mhz": self.clock_mhz,
            "fits": self.fits,
            "missing": dict(self.missing),
            "smallest_part": self.smallest,
            "target_fps": self.target_fps,
            "cycles_per_image": self.cycles,
            "frames_per_second": self.fps,
            "bytes_per_image": self.traffic,
            "bytes_per_cycle": self.bytes_per_cycle,
            "memory_bytes": dict(self.memory_bytes),
            "engine": asdict(self.engine),
            "total": {r: getattr(self.total, r) for r in RESOURCES},
            "budget": self.part.budget(),
            "steps": [
                {
                    "name": r.name,
                    "unit": r.unit,
                    "nodes": r.nodes,
                    "cycles": r.cycles,
                    "bound": r.bound,
                    **dict(zip(UNITS, r.counts.values)),
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        head = ("step", "unit", "ops", "rows", "cycles", "bound", *(u for u in UNITS if u != "program"))
        table: list[tuple[str, ...]] = [head]
        for r in self.rows:
            t = r.tiling
            units = (f"{r.counts[u]}" for u in UNITS if u != "program")
            table.append((r.name, r.unit, str(len(r.nodes)), f"{t.tile_rows}/{t.together}", str(r.cycles), r.bound, *units))
        sums = (str(sum(r.counts[u] for r in self.rows)) for u in UNITS if u != "program")
        table.append(("total", "", "", "", str(self.cycles), "", *sums))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in table]
        rule = "-" * max(map(len, lines))
        verdict = "fits"
        if not self.fits:
            lacking = ", ".join(f"{v:,.0f} {k}" for k, v in self.missing.items())
            verdict = f"does not fit, missing {lacking}; smallest listed part that would do: {self.smallest or 'none'}"
        e, budget, own = self.engine, self.part.budget(), self.total
        parallel = [f"XNOR {e.xnor_rows} rows x 32 x 32"] * e.has_xnor + [f"products {e.inputs} x {e.outputs}"] * e.has_multiply
        bounds = ", ".join(f"{k} {100 * v / self.cycles:.0f} %" for k, v in self.bound().items() if v)
        mega = ", ".join(f"{v / 1e6:.2f} MB {k}" for k, v in self.memory_bytes.items())
        sizes = ", ".join(parallel) or "no products"
        return "\n".join(
            [
                f"{self.network} layer by layer on {self.part} at {self.clock_mhz:g} MHz: {verdict}",
                f"{self.cycles:,} cycles per image, {self.fps:,.1f} frames/s; bound by {bounds}",
                f"engine: {sizes}, {e.search} search steps, {e.registers} registers of {e.block} vectors of {e.value_bits} bits",
                f"memory: {mega}; {self.traffic / 1e6:.2f} MB moved per image, {self.bytes_per_cycle:.1f} bytes per cycle to be had",
                "resources: " + ", ".join(f"{getattr(own, r):,} of {budget[r]:,} {r}" for r in RESOURCES),
                "",
                lines[0],
                rule,
                *lines[1:-1],
                rule,
                lines[-1],
            ]
        )


def cycles_of(c: Counts, bytes_per_cycle: float) -> tuple[int, str]:
    """Cycles of a step, and what bounds it."""
    ports = max(c[p] for p in PORTS)
    memory = max(ports, ceil(WORD * c.words / bytes_per_cycle))
    work, bound = max((c["compute"], "compute"), (c["finish"], "finish"), (memory, "memory"), key=lambda pair: pair[0])
    return work + c["program"] + SETUP, bound


class _Search:
    """Counts of the steps, each looked at once for every tiling and parallelism that changes it."""

    def __init__(self, f: Facts) -> None:
        self.f = f
        self.tiling = cache(
            lambda k, rows, block, depth: tiling(f.steps.steps[k], replace(f.base, xnor_rows=rows, block=block, **dict(depth)))
        )
        self.front = cache(self._front)
        self.back = cache(lambda k, t, search: finishing(f.steps.steps[k], search, f.base.table_words, t))

    def _front(self, k: int, t: Tiling, inputs: int, outputs: int, halves: int) -> dict[str, int]:
        return making(self.f.shapes[k], replace(self.f.base, inputs=inputs, outputs=outputs, halves=halves), t)

    def tilings(self, e: Engine) -> list[Tiling] | None:
        depth = (("xnor_tile", e.xnor_tile), ("lane_tile", e.lane_tile), ("window_tile", e.window_tile))
        found = [self.tiling(k, e.xnor_rows, e.block, depth) for k in range(len(self.f.shapes))]
        return None if any(t is None for t in found) else found  # type: ignore[return-value]

    def counts(self, e: Engine, tilings: list[Tiling]) -> list[Counts]:
        made = []
        for k, t in enumerate(tilings):
            lanes = (e.inputs, e.outputs) if self.f.steps.steps[k].kind == "MULTIPLY" else (1, 1)
            front, back = self.front(k, t, *lanes, e.halves), self.back(k, t, e.search)
            made.append(Counts(tuple(front.get(u, 0) + back.get(u, 0) for u in UNITS)))
        return made


def candidates(f: Facts) -> Iterator[Engine]:
    """Every engine that is considered, the slow ones first."""
    rows = powers(32) if f.base.has_xnor else [1]
    lanes = [(i, o) for i in powers(32) for o in powers(32) if i * o in (1, 4, 16, 64, 128, 256, 512, 1024) and max(i, o) <= 8 * min(i, o)]
    for r in rows:
        for inputs, outputs in lanes if f.base.has_multiply else [(1, 1)]:
            for search in (1, 2, 4) if any(m.code == "SEARCH" for s in f.steps.steps for m in s.micros) else (1,):
                for block in (64, 256, 512):
                    if block < 16 * min(r, 4):
                        continue
                    for halves in (1, 2):
                        for room in (1, 2):
                            yield f.sized(r, inputs, outputs, search, block, halves, room)


def _share(cost: Cost, device: Part) -> tuple[float, float]:
    """How full the fullest resource is, and the sum of the shares, both of the budget."""
    budget = device.budget()
    shares = [getattr(cost, r) / budget[r] if budget[r] else (float("inf") if getattr(cost, r) else 0.0) for r in RESOURCES]
    return max(shares), sum(shares)


def estimate(
    graph: Graph,
    part: str | Part = "xczu3eg",
    *,
    clock_mhz: float | None = None,
    fps: float | None = None,
    bandwidth: float | None = None,
    engine: Engine | None = None,
) -> Plan:
    """The engine that runs `graph` layer by layer fastest on `part`, and what it costs.

    Without fps: the fewest cycles per image within the part's budget; with fps: the least resources that reach it. Every engine of
    `candidates` is looked at. bandwidth: GB/s of the external memory (the board's peak times USABLE where none is given). Where nothing
    fits the plan is the nearest one, `fits` is False and `missing` and `smallest` say what is lacking and which listed part would do.

    engine: one of another plan, when one bitstream is to run several networks; it is only costed.

    Raises LayerwiseError for an engine that is too small, saying in what; GraphError, naming the node, for what the engine cannot run;
    LookupError for an unknown part; ValueError for a clock, fps or bandwidth that is not positive.
    """
    device = find_part(part)
    clock = device.clock_mhz if clock_mhz is None else clock_mhz
    if not clock > 0 or (fps is not None and not fps > 0) or (bandwidth is not None and not bandwidth > 0):
        raise ValueError(f"clock_mhz = {clock}, fps = {fps} and bandwidth = {bandwidth} must be positive")
    steps = build(graph)
    f = facts(steps)
    if engine is not None:
        return _on(f, engine, device, clock, fps, bandwidth)
    search = _Search(f)
    priced = [(e, total(list(resources(f, e).values()))) for e in candidates(f)]
    plan = _choose(f, search, priced, device, clock, fps, bandwidth)
    if plan.fits:
        return plan
    for other in PARTS:
        if all(other.budget()[r] <= device.budget()[r] for r in RESOURCES):
            continue
        if _choose(f, search, priced, other, clock, fps, bandwidth).fits:
            return replace(plan, smallest=other.name)
    return plan


def _on(f: Facts, e: Engine, device: Part, clock: float, fps: float | None, bandwidth: float | None) -> Plan:
    short = lacking(f, e)
    if short:
        raise LayerwiseError(f"the engine does not run {f.steps.graph.name}: {'; '.join(short)}")
    tilings = [t for s in f.steps.steps if (t := tiling(s, e)) is not None]
    made = [counts(s, e, t) for s, t in zip(f.shapes, tilings, strict=True)]
    return _plan(f, device, clock, e, tilings, made, _bytes_per_cycle(device, clock, bandwidth), fps)


def _bytes_per_cycle(device: Part, clock: float, bandwidth: float | None) -> float:
    rate = bandwidth if bandwidth is not None else USABLE * BANDWIDTH.get(device.name, 4.2)
    return min(float(WORD * len(PORTS)), rate * 1e3 / clock)


def _choose(f: Facts, search: _Search, priced: list[tuple[Engine, Cost]], device: Part, clock: float, fps: float | None,
            bandwidth: float | None) -> Plan:  # fmt: skip
    rate = _bytes_per_cycle(device, clock, bandwidth)
    best: tuple[tuple[float, ...], Engine, list[Tiling], list[Counts]] | None = None
    for e, cost in priced:
        fullest, sum_of_shares = _share(cost, device)
        over = max(fullest, 1.0)
        if best is not None and (over, 0.0) > best[0][:2]:
            continue  # nothing that does not fit is better than what does
        tilings = search.tilings(e)
        if tilings is None:
            continue
        made = search.counts(e, tilings)
        cycles = sum(cycles_of(c, rate)[0] for c in made)
        late = 0.0 if fps is None else max(0.0, cycles * fps / (clock * 1e6) - 1)
        order = (over, late, float(cycles), sum_of_shares) if fps is None else (over, late, sum_of_shares, float(cycles))
        if best is None or order < best[0]:
            best = (order, e, tilings, made)
    assert best is not None  # engines with the least buffers hold every step
    _, e, tilings, made = best
    return _plan(f, device, clock, e, tilings, made, rate, fps)


def _plan(
    f: Facts, device: Part, clock: float, e: Engine, tilings: list[Tiling], made: list[Counts], rate: float, fps: float | None
) -> Plan:
    steps: Steps = f.steps
    rows = []
    for step, t, c in zip(steps.steps, tilings, made, strict=True):
        cycles, bound = cycles_of(c, rate)
        rows.append(
            Row(
                step.name,
                step.kind.lower() if step.mode != "SATURATE" else "saturate",
                tuple(n.name for n in step.nodes),
                t,
                c,
                cycles,
                bound,
            )
        )
    memory = allocate(steps)
    constants = WORD * (1 + sum(c["program"] for c in made)) + _constant_bytes(f, e)
    sizes = {"constants": constants, "maps": WORD * memory.arena, "input and outputs": WORD * memory.slot}
    plan = Plan(steps.graph, device, clock, e, tuple(rows), resources(f, e), rate, sizes, fps, {}, None)
    budget = device.budget()
    missing: dict[str, float] = {r: getattr(plan.total, r) - budget[r] for r in RESOURCES if getattr(plan.total, r) > budget[r]}
    if fps is not None and plan.fps < fps * (1 - 1e-9):
        missing["fps"] = fps - plan.fps
    return replace(plan, missing=missing)


def _constant_bytes(f: Facts, e: Engine) -> int:
    """Weights, tables and lists of gathers in the image."""
    words = 0
    for shape in f.shapes:
        step = shape.step
        groups = step.out.groups
        words += groups * sum(len(r) for r in step.rows) * e.table_words
        words += sum(shape.weight_words(e, g) for g in range(groups))
        words += 4 * groups * step.shape[1] * step.shape[2] if step.kind == "GATHER" else 0
    return WORD * words
