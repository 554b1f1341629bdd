"""Folding and cost: cycles by hand, the solver against all foldings, budgets, FIFO depths and the printed plan."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlib.cost import Cost, adder, compare, fifo, memory, multiply, xnor_popcount
from quantlib.evaluator import run
from quantlib.hls import export
from quantlib.ir import Decode, Graph, IntType, Node
from quantlib.ops import (
    Add,
    Concat,
    Conv2d,
    Dense,
    FractionalConv2d,
    Input,
    Lut,
    MaxPool,
    Op,
    Pad,
    Requant,
    Select,
    Slice2d,
    SumPool,
    Threshold,
)  # fmt: skip
from quantlib.parts import RESOURCES, Part
from quantlib.schedule import BASE_DEPTH, Folding, Plan, Schedule, Stage, check_folding, estimate

RNG = np.random.default_rng(3)


class Build:
    """A graph node by node."""

    def __init__(self, shape: tuple[int, ...], lo: int, hi: int, step: int = 1) -> None:
        self.nodes: list[Node] = []
        self.types: dict[str, IntType] = {}
        self("x", Input(shape, lo, hi, step))

    def __call__(self, name: str, op: Op, *inputs: str) -> str:
        self.types[name] = op.infer(*(self.types[i] for i in inputs))
        self.nodes.append(Node(name, op, inputs, self.types[name]))
        return name

    def graph(self, name: str = "net") -> Graph:
        out = self.nodes[-1]
        return Graph(tuple(self.nodes), (Decode((out.name,), (np.ones(()),), np.zeros(()), out.type.shape),), name=name)


def act(channels: int, levels: int = 3) -> Threshold:
    return Threshold(np.sort(RNG.integers(-30, 30, (channels, levels)), 1), np.ones(channels), -levels, 2)


def small() -> Graph:
    b = Build((2, 6, 6), -3, 3, 2)
    b("conv", Conv2d(RNG.integers(-3, 4, (4, 2, 3, 3)), padding=(1, 1, 1, 1)), "x")
    b("act", act(4), "conv")
    b("pool", MaxPool((2, 2), (2, 2)), "act")
    b("fc", Dense(RNG.integers(-3, 4, (6, 36))), "pool")
    return b.graph("small")


def residual(channels: int = 4, size: int = 8, blocks: int = 1) -> Graph:
    b = Build((channels, size, size), -3, 3, 2)
    x = "x"
    for i in range(blocks):
        weight = RNG.choice([-1, 1], (channels, channels, 3, 3))
        b(f"conv{i}", FractionalConv2d(weight, RNG.integers(-5, 5, channels), padding=(1, 1, 1, 1)), x)
        b(f"act{i}", act(channels), f"conv{i}")
        b(f"add{i}", Add(), f"act{i}", x)
        x = b(f"quant{i}", act(channels), f"add{i}")
    return b.graph("residual")


def cycles(op: Op, x: IntType, pe: int = 1, simd: int = 1) -> int:
    return op.cost((x,), op.infer(x), Folding(pe, simd)).cycles


# Cycles, by hand.


def test_cycles_of_a_convolution() -> None:
    x = IntType((4, 8, 6), -3, 3, 1.0, 2)
    conv = Conv2d(np.ones((6, 4, 3, 3)), padding=(1, 1, 1, 1))
    assert cycles(conv, x, 1, 1) == 8 * 6 * 6 * 36  # every product on its own
    assert cycles(conv, x, 3, 2) == 8 * 6 * (6 // 3) * (36 // 2)
    # With all outputs at once the windows are slower: 2 rows to fill (padding gives the third), then 9 words of 4 lanes per pixel.
    assert cycles(conv, x, 6, 4) == 2 * 6 + 8 * 6 * 9
    # 1 x 1 without padding has no windows: one cycle per pixel when everything is unfolded.
    assert cycles(Conv2d(np.ones((6, 4, 1, 1))), x, 6, 4) == 8 * 6
    # Stride 2, no padding: 3 rows to fill; a row of 2 windows (18 words) reads the next 2 rows (12 words) meanwhile.
    assert cycles(Conv2d(np.ones((6, 4, 3, 3)), stride=(2, 2)), x, 6, 4) == 3 * 6 + 18 + 18 + 18


def test_cycles_of_the_other_ops() -> None:
    x = IntType((4, 8, 6), -3, 3, 1.0, 2)
    assert cycles(Dense(np.ones((10, 192))), x, 1, 1) == 1920
    assert cycles(Dense(np.ones((10, 192))), x, 5, 16) == 2 * 12
    assert cycles(act(4), x, 2) == 4 * 8 * 6 // 2
    assert cycles(MaxPool((2, 2), (2, 2)), x, 4) == 2 * 6 + 4 * 3 * 4  # 2 rows to fill, then 12 words for each row of 3 windows
    assert cycles(SumPool((8, 6), (8, 6)), x, 2) == 8 * 6 * 4 // 2  # the whole map: one running sum per channel
    assert cycles(SumPool((8, 6), (8, 6)), x, 4) == 8 * 6
    y = (x, x)
    assert Add().cost(y, Add().infer(*y), Folding(4)).cycles == 48


@pytest.mark.parametrize("name", sorted(set(Op.registry) - {"Input"}))
def test_cycles_are_the_loop_iterations_of_the_kernels(name: str) -> None:
    """Cost formulas and kernels count alike for every example and every legal folding. The window stages count by the same two functions
    (rows_needed, iterations): there the timed simulation is the other route (tests/test_every_op.py)."""
    for op, types in Op.registry[name].examples():
        y = op.infer(*types)
        for pe, simd, taps in op.folds(types, y):
            folding = Folding(pe, simd, taps=taps)
            assert op.cost(types, y, folding).cycles == op.hls(types, y, folding).iterations, folding


def test_more_lanes_never_cost_more_cycles_nor_fewer_lut() -> None:
    for name, kind in Op.registry.items():
        for op, types in kind.examples():
            y = op.infer(*types)
            costs = {lanes: op.cost(types, y, Folding(*lanes[:2], "lut", lanes[2])) for lanes in op.folds(types, y)}
            for (p, s, t), c in costs.items():
                assert all(isinstance(getattr(c, r), int) and getattr(c, r) >= 0 for r in RESOURCES), name
                assert c.cycles >= 1, name
                for (p2, s2, t2), c2 in costs.items():
                    if p2 % p == 0 and s2 % s == 0 and t2 % t == 0:
                        assert c2.cycles <= c.cycles, (name, p, s, t, p2, s2, t2)


# Leaf formulas.


def test_memories() -> None:
    assert memory(1, 999) == Cost()
    assert memory(512, 36, "bram").bram18 == 1  # 18 kbit exactly
    assert memory(513, 36, "bram").bram18 == 2
    assert memory(16_384, 1, "bram").bram18 == 1
    assert memory(1_024, 40, "bram").bram18 == 3  # 1024 x 18 three times, where 512 x 36 would take four
    assert memory(64, 10, "lut").lut == 10 and memory(65, 10, "lut").lut == 20
    assert memory(4_096, 72, "uram").uram == 1 and memory(4_097, 72, "uram").uram == 2
    assert memory(64, 8).bram18 == 0 and memory(1024, 8).bram18 == 1  # auto: 512 bits stay in LUTs
    with pytest.raises(ValueError, match="choose auto, lut, bram or uram"):
        memory(8, 8, "flash")


def test_arithmetic() -> None:
    assert (multiply(4, 4).lut, multiply(4, 4).dsp) == (16, 0)
    assert (multiply(8, 8).lut, multiply(8, 8).dsp) == (0, 1)
    assert multiply(16, 40).dsp == 2 and multiply(1, 8).lut == 4
    assert adder(9).lut == 9 and compare(9).lut == 5
    assert xnor_popcount(64).lut < 2 * 64
    assert fifo(32, 8).lut < fifo(64, 8).lut and fifo(2048, 18).bram18 == 2


def test_cost_adds_resources_and_keeps_the_larger_time() -> None:
    a, b = Cost(1, 2, 3, 4, 5, 100, 0.25), Cost(10, 20, 30, 40, 50, 7, 0.5)
    assert a + b == Cost(11, 22, 33, 44, 55, 100, 0.5)
    assert a.times(3) == Cost(3, 6, 9, 12, 15, 100, 0.25)


# Foldings and schedules.


def test_illegal_foldings() -> None:
    graph = small()
    conv = graph.by_name["conv"]
    with pytest.raises(ValueError, match="conv .Conv2d.: pe = 3 must divide 4: choose 1, 2 or 4$"):
        check_folding(conv, graph.types(conv), Folding(3, 1))
    with pytest.raises(ValueError, match="must divide"):
        Schedule.of(graph, {"conv": Folding(1, 3)})
    with pytest.raises(KeyError, match="no node nothing"):
        Schedule.of(graph, {"nothing": Folding()})
    with pytest.raises(ValueError, match="at least 1"):
        Folding(0)
    with pytest.raises(ValueError, match="memory style 'flash'"):
        Folding(memory="flash")
    with pytest.raises(KeyError, match="made for another graph"):
        Schedule({})["conv"]


def test_a_schedule_of_ones_own_is_only_costed() -> None:
    graph = small()
    mine = Schedule.of(graph, {"conv": Folding(2, 2)})
    plan = estimate(graph, schedule=mine)
    assert plan.schedule is mine
    assert {r.name: r.folding for r in plan.rows}["conv"] == Folding(2, 2)
    assert plan.cycles == max(r.cost.cycles for r in plan.rows) == 6 * 6 * 2 * 9
    with pytest.raises(ValueError, match="must divide"):
        estimate(graph, schedule=Schedule({n.name: Stage(Folding(3), (2,) * len(n.inputs)) for n in graph}))
    with pytest.raises(ValueError, match="act has 1 inputs and FIFO depths"):
        estimate(graph, schedule=Schedule({**mine, "act": Stage(Folding(), (2, 2))}))
    with pytest.raises(ValueError, match="made for another graph than small: act is not in both"):
        estimate(graph, schedule=Schedule.of(residual()))


def totals(plan: Plan) -> dict[str, int]:
    return {r: getattr(plan.total, r) for r in RESOURCES}


def every_layout(graph: Graph, slice: str) -> tuple[np.ndarray, np.ndarray]:
    """Cycles, and use of each resource, of all foldings of all nodes together.

    In a chain a node's row does not depend on the foldings of the others, so each is costed once; the tests below compare what they get
    with a plan of the whole.
    """
    cycles, used = np.zeros(1, int), np.zeros((1, len(RESOURCES)), int)
    for i, node in enumerate(graph):
        limits = node.op.folds(graph.types(node), node.type)
        styles = ("lut", "bram") if hasattr(node.op, "weight") else ("auto",)
        foldings = [Folding(p, s, m, t) for p, s, t in limits for m in styles]
        foldings += [Folding(p, s, m, t, slice) for p, s, t in limits.packed.get(slice, ()) for m in styles]
        costs = [estimate(graph, schedule=Schedule.of(graph, {node.name: f})).rows[i].cost for f in foldings]
        cycles = np.maximum.outer(cycles, [c.cycles for c in costs]).reshape(-1)
        mine = np.array([[getattr(c, r) for r in RESOURCES] for c in costs])
        used = (used[:, None] + mine).reshape(-1, len(RESOURCES))
    return cycles, used


def tiny(seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    channels, out = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    b = Build((channels, 5, 5), -7, 8)
    b("conv", Conv2d(rng.integers(-7, 8, (out, channels, 3, 3))), "x")
    b("act", act(out), "conv")
    b("fc", Dense(rng.integers(-1, 2, (int(rng.integers(1, 4)), out * 9))), "act") if seed % 2 else None
    return b.graph(f"tiny{seed}")


@pytest.mark.parametrize("seed", range(8))
def test_no_folding_beats_the_solver(seed: int) -> None:
    """Brute force: every folding of every node. Budgets are set where the choice is tight in LUTs, in block RAM, or in both."""
    graph = tiny(seed)
    cycles, used = every_layout(graph, "dsp48e2")
    rng = np.random.default_rng(seed)
    for dsp in (10**4, 0, 4):
        for _ in range(6):
            lut, bram = int(rng.choice(used[:, 0])), int(rng.choice(used[:, 3]))
            part = Part("tiny", "tiny-1", (), lut * 10 // 7 + 1, 10**6, dsp, bram * 10 // 9 + 1, 0, 100.0)
            inside = (used <= np.array(list(part.budget().values()))).all(1)
            got = estimate(graph, part)
            assert got.fits == inside.any(), (lut, bram, dsp)
            again = estimate(graph, part, schedule=got.schedule)
            assert (again.cycles, again.total) == (got.cycles, got.total)
            if inside.any():
                assert got.cycles == cycles[inside].min(), (lut, bram, dsp)
            else:
                assert got.missing == {r: v - part.budget()[r] for r, v in totals(got).items() if v > part.budget()[r]}


@pytest.mark.parametrize("seed", range(4))
def test_a_target_speed_is_reached_with_the_least_resources(seed: int) -> None:
    graph = tiny(seed)
    part = Part("big", "big-1", (), 10**6, 2 * 10**6, 10**4, 10**4, 0, 100.0)
    cycles, used = every_layout(graph, "dsp48e2")
    budget = part.budget()
    shares = used @ [1 / budget[r] if budget[r] else 0 for r in RESOURCES]
    for limit in np.unique(cycles)[:: max(len(np.unique(cycles)) // 12, 1)]:
        got = estimate(graph, part, part.clock_mhz * 1e6 / limit)
        assert got.cycles <= limit and got.fits
        share = sum(v / budget[r] for r, v in totals(got).items() if budget[r])
        assert share == pytest.approx(shares[cycles <= limit].min(), rel=1e-12)  # sums of floats in another order


def test_a_target_that_no_folding_reaches() -> None:
    plan = estimate(small(), "xczu3eg", fps=1e9)
    assert not plan.fits and plan.missing["fps"] > 0 and plan.smallest is None
    assert "missing" in str(plan) and "none" in str(plan)


def test_what_does_not_fit_says_what_is_missing_and_what_would_do() -> None:
    b = Build((3, 12, 12), 0, 255)
    for i in range(3):
        b(f"conv{i}", Conv2d(RNG.integers(-128, 128, (256, b.types[b.nodes[-1].name].shape[0], 3, 3))), b.nodes[-1].name)
        b(f"act{i}", act(256, 15), f"conv{i}")
    graph = b.graph("wide")
    plan = estimate(graph, "xc7z010")
    assert not plan.fits
    budget = plan.part.budget()
    for r, v in plan.missing.items():
        assert v == getattr(plan.total, r) - budget[r] > 0
    assert plan.smallest is not None and estimate(graph, plan.smallest).fits
    assert f"smallest listed part that would do: {plan.smallest}" in str(plan)
    same = estimate(graph, "xc7z010", schedule=plan.schedule)
    assert (same.missing, same.total) == (plan.missing, plan.total)
    assert same.smallest is not None and estimate(graph, same.smallest, schedule=plan.schedule).fits


def test_the_slowest_node_is_explained() -> None:
    b = Build((3, 12, 12), 0, 255)
    b("conv", Conv2d(RNG.integers(-8, 8, (8, 3, 3, 3)), padding=(1, 1, 1, 1)), "x")
    graph = b.graph("one")

    def part(lut: int) -> Part:
        return Part("tiny", "tiny-1", (), lut, 10**6, 0, 0, 0, 100.0)

    wide = estimate(graph, part(10**6))
    assert wide.cycles == 12 * 12 * 8 // 4  # 4 sums of 16 bits in a bus word
    assert wide.explanation == "conv: the 64-bit bus takes 288 cycles for its integers"
    tight = estimate(graph, part(3000))
    wanted = (
        r"conv: pe \d of 8, simd \d of 3, taps \d of 9: the next faster folding .pe \d, simd \d, taps \d; (\d+) cycles. takes (\d+) lut "
    )
    found = re.match(wanted + "more than are left", tight.explanation)
    assert found and int(found[1]) < tight.cycles
    enough = (tight.part.budget()["lut"] + int(found[2])) * 10 // 7 + 1
    assert estimate(graph, part(enough)).cycles <= int(found[1]) and estimate(graph, part(enough - 2)).cycles == tight.cycles
    asked = estimate(graph, part(10**6), fps=1000)
    assert asked.explanation.endswith("fast enough for 1,000 frames/s") and asked.explanation in str(asked)
    mine = estimate(graph, part(10**6), schedule=Schedule.of(graph))
    assert "pe 1 of 8, simd 1 of 3, taps 1 of 9: the next faster folding" in mine.explanation and mine.explanation.endswith("would fit")
    assert mine.to_dict()["explanation"] == mine.explanation


def test_what_a_part_has_not() -> None:
    graph = small()
    with pytest.raises(ValueError, match="conv: UltraRAM of xczu7ev holds no constants.*choose lut or bram"):
        estimate(graph, "ZCU104", schedule=Schedule.of(graph, {"conv": Folding(memory="uram")}))
    assert estimate(graph, "VCK190", schedule=Schedule.of(graph, {"conv": Folding(memory="uram")})).total.uram > 0
    with pytest.raises(ValueError, match="fc: packing dsp48e2 is too wide for the dsp48e1 slices of xc7z020; choose dsp48e1"):
        estimate(graph, "PYNQ-Z2", fixed={"fc": Folding(packing="dsp48e2")})
    assert estimate(graph, "ZCU104", fixed={"fc": Folding(packing="dsp48e1")}).schedule["fc"].folding.packing == "dsp48e1"
    with pytest.raises(ValueError, match="conv .Conv2d.: taps = 2: choose 1, 3 or 9"):
        Schedule.of(graph, {"conv": Folding(taps=2)})
    with pytest.raises(ValueError, match="act .Threshold.: packing dsp58 is not possible: no products of weights"):
        Schedule.of(graph, {"act": Folding(packing="dsp58")})


def test_larger_parts_are_never_slower() -> None:
    graph = residual(16, 16, 3)
    speeds = [estimate(graph, p, clock_mhz=100).cycles for p in ("xc7z010", "xc7z020", "xczu3eg", "xczu7ev", "xcu250")]
    assert speeds == sorted(speeds, reverse=True)


def test_a_hundred_nodes_take_well_under_a_second() -> None:
    graph = residual(64, 32, 25)
    assert len(graph) == 101
    start = time.process_time()
    plan = estimate(graph, "xczu9eg")
    assert time.process_time() - start < 1.5  # 0.2 s on the machine it was written on; the rest is room for a loaded one
    assert plan.fits


# FIFOs, latency, text.


def test_the_short_branch_stores_what_the_long_one_waits_for() -> None:
    graph = residual(4, 8, 2)
    for pe in (1, 2, 4):
        schedule = Schedule.of(graph, {n.name: Folding(pe) for n in graph if n.inputs})
        straight, skip = schedule["add1"].depths
        # While its last rows of windows are written, another part of an image waits in front of the long branch, and as much here.
        conv = graph.by_name["conv1"]
        waits = ceil(conv.op.cost(graph.types(conv), conv.type, Folding(pe)).pause * 8 * 8 * 4 // pe)
        # A 3 x 3 window with padding 1 needs two rows of 8 pixels, 4/pe words each, and may read the third while it writes.
        two, three, stored = 2 * 8 * 4 // pe, 3 * 8 * 4 // pe, skip - waits - BASE_DEPTH
        assert straight == BASE_DEPTH <= skip
        assert two < stored <= max(three, BASE_DEPTH) + 1 or (stored <= 1 and two < BASE_DEPTH)
        assert all(d >= BASE_DEPTH for n in graph for d in schedule[n.name].depths)


def test_latency_is_at_least_the_slowest_node_and_at_most_the_sum() -> None:
    for graph in (small(), residual(4, 8, 3)):
        plan = estimate(graph, schedule=Schedule.of(graph))
        assert plan.cycles <= plan.latency <= sum(r.cost.cycles for r in plan.rows)


def test_the_plan_reads_well_and_goes_through_json() -> None:
    plan = estimate(small(), "Ultra96-V2", clock_mhz=250)
    text = str(plan)
    assert text.startswith("small on xczu3eg (Ultra96, Ultra96-V2) at 250 MHz: fits")
    assert f"{plan.cycles:,} cycles per image (slowest: {plan.bottleneck})" in text
    assert all(r.name in text for r in plan.rows)
    assert max(map(len, text.splitlines())) <= 140
    again = json.loads(json.dumps(plan.to_dict()))
    assert again["cycles_per_image"] == plan.cycles and again["frames_per_second"] == 250e6 / plan.cycles
    assert [r["name"] for r in again["rows"]] == [n.name for n in small()]
    assert again["rows"][1]["folding"]["pe"] == plan.rows[1].folding.pe


def test_fixed_foldings_stay_and_the_rest_is_chosen() -> None:
    graph = small()
    free, fixed = estimate(graph), estimate(graph, fixed={"conv": Folding(2, 1)})
    assert fixed.schedule["conv"].folding == Folding(2, 1) and fixed.bottleneck == "conv"
    assert fixed.cycles == 6 * 6 * (4 // 2) * 9 * 2 > free.cycles
    assert fixed.total.lut < free.total.lut  # nothing else is made faster than the layer that is waited for
    with pytest.raises(KeyError, match="no node nothing"):
        estimate(graph, fixed={"nothing": Folding()})
    with pytest.raises(ValueError, match="conv .Conv2d.: pe = 3 must divide 4: choose 1, 2 or 4"):
        estimate(graph, fixed={"conv": Folding(3)})


def test_totals_are_the_sum_of_the_rows() -> None:
    plan = estimate(residual(4, 8, 2), "xczu3eg")
    for r in RESOURCES:
        assert getattr(plan.total, r) == sum(getattr(row.cost, r) for row in plan.rows)
    assert plan.bottleneck == max(plan.rows, key=lambda row: row.cost.cycles).name


@pytest.mark.parametrize(("options", "message"), [({"fps": 0}, "must be positive"), ({"clock_mhz": -1.0}, "must be positive")])
def test_bad_arguments(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(small(), **options)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="no part or board"):
        estimate(small(), "virtex")


# Against the clock of the simulated C++.


def mixed() -> Graph:
    """Every kind of stage: groups, depthwise, fork, concat, stride, crop, two pools, table, padding, dense."""
    rng = np.random.default_rng(5)
    b = Build((3, 12, 12), 0, 255)
    b("conv", Conv2d(rng.integers(-3, 4, (8, 3, 3, 3)), padding=(1, 1, 1, 1)), "x")
    b("act", Threshold(np.sort(rng.integers(-500, 500, (8, 3)), 1), np.ones(8), -3, 2), "conv")
    b("left", Select(np.array([0, 2, 4, 6])), "act")
    b("right", Select(np.array([1, 3, 5, 7])), "act")
    b("depthwise", Conv2d(rng.integers(-3, 4, (4, 1, 3, 3)), padding=(1, 1, 1, 1), groups=4), "left")
    b("act2", act(4), "depthwise")
    b("grouped", Conv2d(rng.integers(-3, 4, (4, 2, 1, 1)), groups=2), "act2")
    b("act3", act(4), "grouped")
    b("both", Concat(), "act3", "right")
    b("strided", FractionalConv2d(rng.choice([-1, 1], (8, 8, 3, 3)), rng.integers(-5, 5, 8), stride=(2, 2), padding=(1, 1, 1, 1)), "both")
    b("act4", act(8), "strided")
    b("crop", Slice2d((0, 12, 2), (0, 12, 2)), "both")
    b("add", Add(), "act4", "crop")
    b("requant", Requant(rng.integers(1, 9, 8), rng.integers(-9, 9, 8), 2, -8, 7), "add")
    b("max", MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), "requant")
    b("pad", Pad((0, 1, 1), (0, 1, 1)), "max")
    b("lut", Lut(rng.integers(-8, 8, (8, 16)), -8), "pad")
    b("mean", SumPool((5, 5), (5, 5)), "lut")
    b("fc", Dense(rng.integers(-8, 8, (10, 8))), "mean")
    return b.graph("mixed")


def some_folding(graph: Graph, seed: int) -> dict[str, Folding]:
    rng = np.random.default_rng(seed)
    found = {}
    for node in graph:
        legal = list(node.op.folds(graph.types(node), node.type))
        pe, simd, taps = legal[rng.integers(len(legal))]
        found[node.name] = Folding(pe, simd, taps=taps)
    return found


def inverted(blocks: int = 2) -> tuple[Graph, dict[str, Folding]]:
    """Residual blocks of 1x1, depthwise 5x5, 1x1 on 6x6 pixels, with foldings that make them about equally slow.

    A 1x1 convolution reads a pixel's 96 words at once and nothing for as long again; the windows of the last rows come when all is read.
    """
    rng = np.random.default_rng(6)
    b = Build((96, 6, 6), -8, 7)
    folding: dict[str, Folding] = {}
    x = "x"
    for i in range(blocks):
        for name, op, of, f in (
            (f"widen{i}", Conv2d(rng.integers(-3, 4, (96, 96, 1, 1))), x, Folding(48, 1)),
            (f"act{i}", act(96, 15), f"widen{i}", Folding(1)),
            (f"deep{i}", Conv2d(rng.integers(-3, 4, (96, 1, 5, 5)), padding=(2, 2, 2, 2), groups=96), f"act{i}", Folding(16)),
            (f"middle{i}", act(96, 15), f"deep{i}", Folding(1)),
            (f"project{i}", Conv2d(rng.integers(-3, 4, (96, 96, 1, 1))), f"middle{i}", Folding(48, 1)),
            (f"codes{i}", Threshold(np.sort(rng.integers(-99, 99, (96, 15)), 1), np.ones(96), -8), f"project{i}", Folding(1)),
        ):
            b(name, op, of)
            folding[name] = f
        b(f"add{i}", Add(), f"codes{i}", x)
        x = b(f"clamp{i}", Threshold(np.arange(-7, 8)[None], np.ones(1), -8), f"add{i}")
    b("fc", Dense(rng.integers(-8, 8, (4, 96 * 36))), x)
    return b.graph("inverted"), folding | {"fc": Folding(4, 1)}


TIMED = [
    pytest.param("mixed", 0, id="mixed-0"),
    pytest.param("residual", None, id="residual-solved"),
    pytest.param("inverted", 0, id="inverted"),
    *(pytest.param("mixed", s, id=f"mixed-{s}", marks=pytest.mark.slow) for s in (1, 2, 3, None)),
    *(pytest.param(n, s, id=f"{n}-{s}", marks=pytest.mark.slow) for n in ("small", "residual") for s in (1, 2)),
]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="timed simulation needs a C++ compiler")
@pytest.mark.parametrize(("name", "seed"), TIMED)
def test_the_simulated_clock_agrees(name: str, seed: int | None, tmp_path: Path) -> None:
    """Cycles per image in steady state, on FIFOs of the plan's depths, are the slowest stage's, or 1 % more where equally slow ones meet.

    Latency is within 3 %: the plan takes a stage to spread its words evenly over its iterations.
    """
    graph = {"mixed": mixed, "small": small, "residual": lambda: residual(4, 12, 3), "inverted": lambda: inverted()[0]}[name]()
    folding = inverted()[1] if name == "inverted" else some_folding(graph, seed or 0)
    plan = estimate(graph) if seed is None else estimate(graph, schedule=Schedule.of(graph, folding))
    project = export(graph, tmp_path / "project", plan=plan)
    t = graph.input.type
    images = torch.randint(t.levels, (12, *t.shape)) * t.step + t.lo

    def last_word(count: int) -> float:
        got = project.csim(images[:count], mode="timed", integers=True)
        want = run(graph, images[:count], integers=True)
        assert all(torch.equal(got[k], want[k]) for k in want)
        assert project.last is not None
        # the plan lets no FIFO hold its writer up, the clock does
        assert abs(project.last.latency - plan.latency) <= 0.03 * project.last.latency
        return project.last.latency + project.last.cycles * (count - 1)

    steady = (last_word(12) - last_word(6)) / 6  # after six images every FIFO has filled as far as it will
    assert plan.cycles <= steady <= 1.01 * plan.cycles
