"""How a network is laid out in hardware: folding and FIFO depths by node name, and the solver that chooses them for a part.

The graph says what is computed, the schedule how fast; neither knows the other's content. Cost formulas are the ops' own (`Op.cost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlib.cost import Cost as Cost
from quantlib.cost import bus_cycles, bus_lanes, converter, fifo
from quantlib.ir import Graph, IntType, Node
from quantlib.packing import DSPS
from quantlib.parts import PARTS, RESOURCES, Part
from quantlib.parts import part as find_part

if TYPE_CHECKING:
    from quantlib.hls.call import Port

MEMORY_STYLES = ("auto", "lut", "bram", "uram", "stream")
# A stream word wider than this needs a vendor switch (AP_INT_MAX_W is 1,024 unless raised: UG1399, arbitrary precision types).
WORD_BITS = 1_024


@dataclass(frozen=True)
class Folding:
    """Lanes of one kernel: `pe` output channels and `simd` inputs of each are worked on per cycle.

    `Op.folds` says which are legal: pe divides the output channels, simd the inputs that one of them reads per pixel (all of them in a
    Dense). Ops without weights work on pe channels per cycle and have simd = 1.
    memory: where the op's weights live ("auto" chooses LUTs or block RAM by size; "stream": in external memory, a row of them is read per
    iteration, where `Op.folds` says so; `estimate` chooses it never by itself).
    taps: window positions worked on per cycle, on top of simd: 1, a column of the window, or all of it.
    packing: a slice of `quantlib.packing.DSPS` whose multiplier makes several products at once; "" makes each product by itself.
    """

    pe: int = 1
    simd: int = 1
    memory: str = "auto"
    taps: int = 1
    packing: str = ""

    def __post_init__(self) -> None:
        if self.pe < 1 or self.simd < 1 or self.taps < 1:
            raise ValueError(f"pe = {self.pe}, simd = {self.simd} and taps = {self.taps} must be at least 1")
        if self.packing and self.packing not in DSPS:
            raise ValueError(f"packing {self.packing!r}: choose one of {', '.join(DSPS)}, or none")
        if self.memory not in MEMORY_STYLES:
            raise ValueError(f"memory style {self.memory!r}: choose one of {', '.join(MEMORY_STYLES)}")


@dataclass(frozen=True)
class Stage:
    """Layout of one node: its folding, and the depth of the FIFO in front of each of its inputs, in words as the node reads them."""

    folding: Folding = field(default_factory=Folding)
    depths: tuple[int, ...] = ()


class Schedule(Mapping[str, Stage]):
    """Node name -> Stage, read-only. `Schedule.of(graph)` is the smallest layout: one lane everywhere, and FIFOs deep enough for it."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = MappingProxyType(dict(stages))

    @classmethod
    def of(cls, graph: Graph, foldings: Mapping[str, Folding] | None = None) -> Schedule:
        """The schedule with these foldings (one lane where a node is not named) and FIFOs deep enough for them."""
        chosen = {n.name: (foldings or {}).get(n.name, Folding()) for n in graph}
        for name in foldings or {}:
            if name not in chosen:
                raise KeyError(f"the graph {graph.name} has no node {name}")
        for node in graph:
            check_folding(node, graph.types(node), chosen[node.name])
        return cls({n.name: Stage(chosen[n.name], depths) for n, depths in zip(graph, _depths(graph, chosen), strict=True)})

    def check(self, graph: Graph) -> None:
        """ValueError unless this schedule has a legal folding and one FIFO depth per input for every node of `graph`, and nothing else."""
        if set(self) != {n.name for n in graph}:
            odd = sorted(set(self) ^ {n.name for n in graph})
            raise ValueError(f"the schedule was made for another graph than {graph.name}: {odd[0]} is not in both")
        for node in graph:
            check_folding(node, graph.types(node), self[node.name].folding)
            depths = self[node.name].depths
            if len(depths) != len(node.inputs) or any(d < 1 for d in depths):
                raise ValueError(f"{node.name} has {len(node.inputs)} inputs and FIFO depths {depths}; one depth of at least 1 word each")

    def __getitem__(self, name: str) -> Stage:
        try:
            return self._stages[name]
        except KeyError:
            raise KeyError(f"the schedule has no node {name}; it was made for another graph") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


@dataclass(frozen=True)
class Row:
    """One node of a plan: its folding, the depths of the FIFOs in front of it, and its cost with them."""

    name: str
    op: str
    folding: Folding
    depths: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """What `estimate` returns: a schedule and what it takes on a part.

    total: sum over the rows; what may be used is part.budget(). cycles: per image in steady state, those of the slowest node, `bottleneck`;
    fps = clock / cycles. latency: cycles from the first input word to the last output word of one image.
    missing: resource -> how much of it is lacking ("fps": frames per second, when no legal folding reaches the target); empty when it fits.
    smallest: the smallest listed part that holds the network at the target (at any speed where none was set; with the given schedule, where
    there was one), None when none does. explanation: why the slowest node is not faster.
    """

    network: str
    part: Part
    clock_mhz: float
    schedule: Schedule
    rows: tuple[Row, ...]
    total: Cost
    cycles: int
    latency: int
    bottleneck: str
    target_fps: float | None
    missing: Mapping[str, float]
    smallest: str | None
    explanation: str = ""

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def fps(self) -> float:
        return self.clock_mhz * 1e6 / self.cycles

    @property
    def latency_us(self) -> float:
        return self.latency / self.clock_mhz

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "network": self.network,
            "part": self.part.full_name,
            "clock_mhz": self.clock_mhz,
            "fits": self.fits,
            "missing": dict(self.missing),
            "smallest_part": self.smallest,
            "target_fps": self.target_fps,
            "cycles_per_image": self.cycles,
            "frames_per_second": self.fps,
            "latency_cycles": self.latency,
            "bottleneck": self.bottleneck,
            "explanation": self.explanation,
            "total": {r: getattr(self.total, r) for r in RESOURCES},
            "budget": self.part.budget(),
            "rows": [{**asdict(r), "cost": r.cost.to_dict()} for r in self.rows],
        }

    def __str__(self) -> str:
        packs = any(r.folding.packing for r in self.rows)
        head = ("node", "op", "pe", "simd", "taps", *(("packing",) if packs else ()), "memory", "fifo", "cycles", *RESOURCES)
        table: list[tuple[str, ...]] = [head]
        for r in self.rows:
            f, depths = r.folding, "+".join(map(str, r.depths))
            lanes = (str(f.pe), str(f.simd), str(f.taps), *((f.packing or "-",) if packs else ()), f.memory)
            table.append((r.name, r.op, *lanes, depths, str(r.cost.cycles), *(str(getattr(r.cost, k)) for k in RESOURCES)))
        empty = ("",) * (len(head) - len(RESOURCES) - 2)
        table.append(("total", *empty, str(self.cycles), *(str(getattr(self.total, k)) for k in RESOURCES)))
        budget = self.part.budget()
        table.append(("may be used", *empty, "", *(str(budget[k]) for k in RESOURCES)))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in table]
        rule = "-" * max(map(len, lines))
        speed = f"{self.cycles:,} cycles per image (slowest: {self.bottleneck}), {self.fps:,.1f} frames/s, latency {self.latency:,} cycles"
        verdict = "fits"
        if not self.fits:
            verdict = f"does not fit, missing {_amounts(self.missing)}; smallest listed part that would do: {self.smallest or 'none'}"
        body = [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
        return "\n".join([f"{self.network} on {self.part} at {self.clock_mhz:g} MHz: {verdict}", speed, self.explanation, "", *body])


def _amounts(missing: Mapping[str, float]) -> str:
    return ", ".join(f"{v:,.0f} {k}" for k, v in missing.items())


def estimate(
    graph: Graph,
    part: str | Part = "xczu3eg",
    fps: float | None = None,
    *,
    clock_mhz: float | None = None,
    schedule: Schedule | None = None,
    fixed: Mapping[str, Folding] | None = None,
) -> Plan:
    """The folding of every node that makes `graph` fast on `part`, and what it costs.

    Without fps: the fewest cycles per image whose layout keeps within the part's budget. With fps: the least resources that reach
    clock / fps cycles. The nodes that `fixed` names get those foldings, the rest is chosen; a schedule of your own is only costed. Where
    nothing fits, the plan is the nearest one found, `fits` is False and `missing` says what is lacking. Cheap means a small sum of shares
    of the budget; where one resource runs short its share weighs more.

    Raises LookupError for an unknown part, KeyError for a node that `fixed` names and the graph has not, ValueError for fps or clock_mhz
    that are not positive and for an illegal folding.
    """
    device = find_part(part)
    clock = device.clock_mhz if clock_mhz is None else clock_mhz
    if not clock > 0 or (fps is not None and not fps > 0):
        raise ValueError(f"clock_mhz = {clock} and fps = {fps} must be positive")
    if schedule is not None:
        schedule.check(graph)
        _suits(device, {name: stage.folding for name, stage in schedule.items()})
        plan = _plan(graph, device, clock, fps, schedule, None)
        holds = [p.name for p in PARTS if all(getattr(plan.total, r) <= p.budget()[r] for r in RESOURCES)]
        return plan if plan.fits or "fps" in plan.missing or not holds else replace(plan, smallest=holds[0])
    for name in fixed or {}:
        if name not in graph.by_name:
            raise KeyError(f"the graph {graph.name} has no node {name}")
    _suits(device, fixed or {})
    options = _all_options(graph, device, fixed)
    target = None if fps is None else _cycles_at(clock, fps)
    _, chosen = _solve(graph, options, device, target)
    plan = _plan(graph, device, clock, fps, chosen, options)
    if plan.fits:
        return plan
    of_family = {_family(device): options}
    for other in PARTS:
        if all(other.budget()[r] <= device.budget()[r] for r in RESOURCES) or not all(
            _fault(other, f) == "" for f in (fixed or {}).values()
        ):
            continue
        if _family(other) not in of_family:
            of_family[_family(other)] = _all_options(graph, other, fixed)
        fits, trial = _solve(graph, of_family[_family(other)], other, target, trial=True)
        if fits and not _missing(sum(_costs(graph, trial), Cost()), other, clock, fps):
            return replace(plan, smallest=other.name)
    return plan


def _cycles_at(clock_mhz: float, fps: float) -> int:
    """Most cycles per image at this speed; the millionth of a cycle absorbs the rounding of the division."""
    return int(clock_mhz * 1e6 / fps + 1e-6)


# Legal foldings.


def check_folding(node: Node, x: Sequence[IntType], folding: Folding) -> None:
    """ValueError that names the node and what is legal, unless the folding is."""
    fault = node.op.folds(x, node.type).objection(folding)
    if fault:
        raise ValueError(f"{node.name} ({type(node.op).__name__}): {fault}")


def _fault(device: Part, folding: Folding) -> str:
    """Why the device has no such hardware; empty where it has."""
    if folding.memory == "uram" and not device.uram_rom:
        return f"UltraRAM of {device.name} holds no constants: only that of Versal can be initialised; choose lut or bram"
    wanted, has = DSPS[folding.packing or device.slice], DSPS[device.slice]
    if wanted.wide > has.wide or wanted.narrow > has.narrow or wanted.accumulator > has.accumulator:
        return f"packing {wanted.name} is too wide for the {has.name} slices of {device.name}; choose {has.name}"
    return ""


def _suits(device: Part, foldings: Mapping[str, Folding]) -> None:
    for name, folding in foldings.items():
        fault = _fault(device, folding)
        if fault:
            raise ValueError(f"{name}: {fault}")


def _family(device: Part) -> tuple[str, bool]:
    """What of a device decides which foldings there are."""
    return device.slice, device.uram_rom


@dataclass(frozen=True, eq=False)
class _Options:
    """The foldings of one node that no other of it beats in every resource and in cycles."""

    foldings: list[Folding]
    cycles: np.ndarray
    usage: np.ndarray  # (options, resources)


def _all_options(graph: Graph, device: Part, fixed: Mapping[str, Folding] | None = None) -> list[_Options]:
    return [_options(graph, n, device, (fixed or {}).get(n.name)) for n in graph]


def _options(graph: Graph, node: Node, device: Part, fixed: Folding | None = None) -> _Options:
    x = graph.types(node)
    if fixed is not None:
        check_folding(node, x, fixed)
    found: list[tuple[Folding, Cost]] = []
    for f in _foldings(node, x, device) if fixed is None else (fixed,):
        ports, own = _reads(node, x, f), node.op.cost(x, node.type, f)
        found.append((f, own + _streams(graph, node, ports, [BASE_DEPTH + _waiting(p, own.pause) for p in ports])))
    cycles = np.array([c.cycles for _, c in found])
    usage = np.stack([_usage(c) for _, c in found])
    keep = _undominated(np.column_stack([cycles, usage]))
    return _Options([found[i][0] for i in keep], cycles[keep], usage[keep])


def _foldings(node: Node, x: Sequence[IntType], device: Part) -> Iterator[Folding]:
    """Every folding whose words are not too wide, in all memories that hold the weights, with the packing of the device and without."""
    styles = (("lut", "bram", "uram") if device.uram_rom else ("lut", "bram")) if hasattr(node.op, "weight") else ("auto",)
    limits = node.op.folds(x, node.type)
    for packing, legal in (("", limits), (device.slice, limits.packed.get(device.slice, ()))):
        for pe, simd, taps in legal:
            folding = Folding(pe, simd, styles[0], taps, packing)
            if node.op.widest(x, node.type, folding) <= WORD_BITS or (pe, simd, taps, packing) == (1, 1, 1, ""):
                yield from (Folding(pe, simd, style, taps, packing) for style in styles)


def _undominated(points: np.ndarray) -> list[int]:
    """Indices of the points that no other beats or equals in every coordinate (of equal points the first)."""
    keep: list[int] = []
    for i in np.lexsort(points.T[::-1]):
        if not keep or not (points[keep] <= points[i]).all(1).any():
            keep.append(int(i))
    return keep


# The solver: bisection over the bottleneck; for each, one option per node under several budgets.


def _solve(graph: Graph, options: list[_Options], device: Part, target: int | None, trial: bool = False) -> tuple[bool, Schedule]:
    """Whether the nodes alone keep within the budget, and the best schedule found. trial: any speed will do, and none is made where they
    do not."""
    budget = np.array([float(v) for v in device.budget().values()])
    deep = np.zeros(len(RESOURCES))
    schedule = Schedule({})
    for _ in range(4):  # what the FIFOs between branches take depends on the folding: leave room for it and choose again
        fits, picked = _choose(options, np.maximum(budget - deep, 0), target, trial)
        if trial and not fits:
            break
        schedule = Schedule.of(graph, {n.name: o.foldings[i] for n, o, i in zip(graph, options, picked, strict=True)})
        total = _usage(sum(_costs(graph, schedule), Cost()))
        extra = total - sum((o.usage[i] for o, i in zip(options, picked, strict=True)), np.zeros(len(RESOURCES)))
        if not fits or (total <= budget).all() or (extra <= deep).all():
            break
        deep = np.maximum(deep, extra)
    return fits, schedule


def _usage(cost: Cost) -> np.ndarray:
    return np.array([getattr(cost, r) for r in RESOURCES], dtype=np.float64)


def _choose(options: list[_Options], budget: np.ndarray, target: int | None, any_speed: bool) -> tuple[bool, list[int]]:
    """One option per node: fewest cycles within budget, or the cheapest with at most `target` cycles; the nearest miss where none fits."""
    slowest = max(int(o.cycles.min()) for o in options)  # no layout is faster than the fastest of the slowest node
    if target is not None:
        return _fit(options, budget, max(target, slowest))
    candidates = sorted({int(c) for o in options for c in o.cycles if c >= slowest})
    fits, best = _fit(options, budget, candidates[-1])
    if not fits or any_speed:
        return fits, best
    low, high = 0, len(candidates) - 1  # candidates[high] fits
    while low < high:
        middle = (low + high) // 2
        fits, picked = _fit(options, budget, candidates[middle])
        if fits:
            high, best = middle, picked
        else:
            low = middle + 1
    return True, best


def _fit(options: list[_Options], budget: np.ndarray, limit: int) -> tuple[bool, list[int]]:
    """Is there one option per node with at most `limit` cycles whose sums keep within budget? With it, or with the nearest miss.

    Weights on the resources turn the question into a choice per node; they are raised where the sum is over. The weighted sum of the minima
    proves a 'no' when it exceeds the weighted budget; what remains open is searched.
    """
    share = np.where(budget > 0, 1 / np.maximum(budget, 1e-9), 1e9)
    allowed = [np.flatnonzero(o.cycles <= limit) for o in options]
    usage = [o.usage[a] * share for o, a in zip(options, allowed, strict=True)]
    flat = np.concatenate(usage)
    starts = np.cumsum([0, *(len(u) for u in usage[:-1])])
    owner = np.repeat(np.arange(len(usage)), [len(u) for u in usage])
    weights = np.ones(len(RESOURCES))
    nearest: tuple[float, np.ndarray] | None = None
    for _ in range(60):
        score = flat @ weights
        least = np.minimum.reduceat(score, starts)
        first = np.full(len(usage), len(flat))
        hits = np.flatnonzero(score == least[owner])
        np.minimum.at(first, owner[hits], hits)
        sums = flat[first].sum(0)
        over = float(sums.max())
        if nearest is None or over < nearest[0]:
            nearest = (over, first)
        if over <= 1:
            return True, [int(a[f - s]) for a, f, s in zip(allowed, first, starts, strict=True)]
        if least.sum() > weights.sum() * (1 + 1e-9):
            break
        weights = weights * np.exp(0.5 * np.clip(sums - 1, -1, 1))
        weights /= weights.mean()
    else:
        found = _search(usage)
        if found is not None:
            return True, [int(a[f]) for a, f in zip(allowed, found, strict=True)]
    assert nearest is not None
    return False, [int(a[f - s]) for a, f, s in zip(allowed, nearest[1], starts, strict=True)]


def _search(usage: list[np.ndarray], limit: int = 20_000) -> list[int] | None:
    """Depth-first search for one row per node whose sum is at most 1 everywhere; exact unless it takes more than `limit` steps."""
    rows = [_undominated(u) for u in usage]
    order = sorted(range(len(usage)), key=lambda i: -float(usage[i][rows[i]].max()))
    rest = np.zeros((len(usage) + 1, len(RESOURCES)))
    for depth in range(len(order) - 1, -1, -1):
        rest[depth] = rest[depth + 1] + usage[order[depth]][rows[order[depth]]].min(0)
    picked: dict[int, int] = {}
    steps = 0

    def descend(depth: int, used: np.ndarray) -> bool:
        nonlocal steps
        if depth == len(order):
            return True
        node = order[depth]
        for row in sorted(rows[node], key=lambda r: float((used + usage[node][r]).max())):
            steps += 1
            now = used + usage[node][row]
            if steps > limit:
                return False
            if (now + rest[depth + 1] <= 1).all():
                picked[node] = row
                if descend(depth + 1, now):
                    return True
        return False

    return [picked[i] for i in range(len(usage))] if descend(0, np.zeros(len(RESOURCES))) else None


# FIFOs, totals, latency.

# A shift-register LUT holds 32 bits, so 32 words cost what 2 do. With 2, stages that are equally slow wait for each other's bursts: timed
# simulation of random foldings was up to 80 % above the slowest stage; with 32 (beyond what a join needs) it is within 1 %.
BASE_DEPTH = 32


def _reads(node: Node, x: Sequence[IntType], folding: Folding) -> tuple[Port, ...]:
    """The words in which a node reads its inputs."""
    return node.op.reads(x, node.type, folding) if node.inputs else ()


def _waiting(read: Port, share: float) -> int:
    """Words of a share of an image: those that arrive while a node pauses."""
    return ceil(share * read.words)


def _depths(graph: Graph, foldings: Mapping[str, Folding]) -> list[tuple[int, ...]]:
    """FIFO depths per node and input: BASE_DEPTH, what arrives while the node pauses, and what the shorter of two branches stores.

    That is what keeps the network from a deadlock, and what the longer branch holds in the FIFOs in front of its pausing nodes besides.
    """
    from quantlib.hls.netlist import build

    stored: dict[str, list[int]] = {}
    for stage in build(graph, foldings).stages:
        if stage.header != "ql_glue.hpp" and len(stage.inputs) > 1:
            stored[stage.node] = [w.depth if w.depth > BASE_DEPTH else 0 for w in stage.inputs]
    depths = []
    held: dict[str, float] = {}  # the share of an image that waits in the FIFOs on the way to a node's output
    for node in graph:
        x = graph.types(node)
        cost, reads = node.op.cost(x, node.type, foldings[node.name]), _reads(node, x, foldings[node.name])
        joined = stored.get(node.name, [0] * len(x))
        most = max((held[i] for i in node.inputs), default=0.0)
        held[node.name] = most + cost.pause
        waiting = [_waiting(p, cost.pause + most - held[i]) for i, p in zip(node.inputs, reads, strict=True)]
        depths.append(tuple(BASE_DEPTH + wait + words for wait, words in zip(waiting, joined, strict=True)))
    return depths


def _streams(graph: Graph, node: Node, reads: Sequence[Port], depths: Sequence[int]) -> Cost:
    """The converters and FIFOs in front of a node; where it is an output of the network, also those in front of the bus."""
    total = Cost()
    if node.name in graph.outputs:
        width = bus_lanes(node.type) * node.type.bits
        total += Cost(cycles=bus_cycles(node.type)) + converter(width) + fifo(BASE_DEPTH, width)
    for t, read, depth in zip(graph.types(node), reads, depths, strict=True):
        total += converter(read.lanes * t.bits) + fifo(depth, read.lanes * t.bits)
    return total


def _costs(graph: Graph, schedule: Schedule) -> Iterator[Cost]:
    """For each node its cost with the streams in front of it."""
    for node in graph:
        stage, x = schedule[node.name], graph.types(node)
        around = _streams(graph, node, _reads(node, x, stage.folding), stage.depths)
        yield node.op.cost(x, node.type, stage.folding) + around


def _plan(graph: Graph, device: Part, clock: float, fps: float | None, schedule: Schedule, options: list[_Options] | None) -> Plan:
    from quantlib.hls.latency import first_image
    from quantlib.hls.netlist import build

    costs = list(_costs(graph, schedule))
    rows = tuple(Row(n.name, type(n.op).__name__, schedule[n.name].folding, schedule[n.name].depths, c) for n, c in zip(graph, costs))
    total = sum(costs, Cost())
    slowest = max(rows, key=lambda r: r.cost.cycles)
    missing = _missing(total, device, clock, fps)
    stages = schedule.items()
    latency = first_image(build(graph, {name: s.folding for name, s in stages}, {name: s.depths for name, s in stages}))
    why = _explain(graph, device, rows, fps, clock, options)
    return Plan(graph.name, device, clock, schedule, rows, total, total.cycles, latency, slowest.name, fps, missing,
                None if missing else device.name, why)  # fmt: skip


def _missing(total: Cost, device: Part, clock: float, fps: float | None) -> dict[str, float]:
    """What is lacking of a device and of a frame rate."""
    budget = device.budget()
    missing: dict[str, float] = {r: getattr(total, r) - budget[r] for r in RESOURCES if getattr(total, r) > budget[r]}
    if fps is not None and total.cycles > _cycles_at(clock, fps):
        missing["fps"] = fps - clock * 1e6 / total.cycles
    return missing


# Why it is not faster.


def _explain(graph: Graph, device: Part, rows: Sequence[Row], fps: float | None, clock: float, options: list[_Options] | None) -> str:
    """A sentence on the slowest nodes. options: those the solver chose from; None for a schedule that was given."""
    total = sum((r.cost for r in rows), Cost())
    cycles, budget = total.cycles, _usage(Cost(**device.budget()))
    slowest = [(i, n) for i, (n, r) in enumerate(zip(graph, rows)) if r.cost.cycles == cycles]
    for _, node in slowest:
        if not node.inputs or (node.name in graph.outputs and bus_cycles(node.type) == cycles):
            return f"{node.name}: the 64-bit bus takes {cycles:,} cycles for its integers"
    if options is not None and fps is not None and cycles <= _cycles_at(clock, fps):
        return f"{_laid_out(graph, slowest[0][1], rows[slowest[0][0]].folding)}: fast enough for {fps:,g} frames/s"
    steps = []
    for i, node in slowest:
        mine = _options(graph, node, device) if options is None else options[i]
        faster = np.flatnonzero(mine.cycles < cycles)
        if not len(faster):
            chosen = options is not None and len(mine.foldings) == 1 and node.inputs
            return f"{_laid_out(graph, node, rows[i].folding)}: {'no other folding was allowed' if chosen else 'no faster folding exists'}"
        lack = np.maximum(_usage(total) - _usage(rows[i].cost) + mine.usage[faster] - budget, 0)
        best = int(np.lexsort((mine.usage[faster].sum(1), (lack / np.maximum(budget, 1)).sum(1)))[0])
        steps.append((node, rows[i].folding, mine.foldings[faster[best]], int(mine.cycles[faster[best]]), lack[best]))
    node, now, better, fewer, lack = max(steps, key=lambda s: float((s[4] / np.maximum(budget, 1)).sum()))
    text = f"{_laid_out(graph, node, now)}: the next faster folding ({_lanes(better)}; {fewer:,} cycles)"
    if lack.any():
        return f"{text} takes {_lacking(lack)} more than are left"
    if options is None:
        return f"{text} would fit"
    _, picked = _fit(options, budget, cycles - 1)
    lack = np.maximum(sum((o.usage[i] for o, i in zip(options, picked)), np.zeros(len(RESOURCES))) - budget, 0)
    others = f"with {len(slowest) - 1} others as slow, " if len(slowest) > 1 else ""
    what = f"takes {_lacking(lack)} more than there are" if lack.any() else "leaves no room for the FIFOs between branches"
    return f"{text} would fit, but {others}fewer than {cycles:,} cycles for the network {what}"


def _lanes(folding: Folding) -> str:
    packed = f", packed in {folding.packing}" if folding.packing else ""
    return f"pe {folding.pe}, simd {folding.simd}, taps {folding.taps}{packed}"


def _laid_out(graph: Graph, node: Node, folding: Folding) -> str:
    """A folding against its limits; where words would be too wide, that too."""
    x = graph.types(node)
    limits = node.op.folds(x, node.type)
    limits = limits.packed[folding.packing] if folding.packing else limits
    f, most = folding, limits.taps[-1]
    packed = f", packed in {f.packing}" if f.packing else ""
    text = f"{node.name}: pe {f.pe} of {limits.pe}, simd {f.simd} of {limits.simd}, taps {f.taps} of {most}{packed}"
    return text + (
        f" (words of at most {WORD_BITS:,} bits)"
        if node.op.widest(x, node.type, replace(f, pe=limits.pe, simd=limits.simd, taps=most)) > WORD_BITS
        else ""
    )


def _lacking(lack: np.ndarray) -> str:
    return _amounts({r: float(v) for r, v in zip(RESOURCES, lack) if v > 0})
