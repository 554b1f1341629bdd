"""Plans of the layer-by-layer engine: what fits, what is said when it does not, and that the search looks at everything."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

import quantlib as ql
from quantlib.ir import Graph
from quantlib.layerwise import engine, planning, steps
from quantlib.parts import RESOURCES


def deep(nets: ModuleType, blocks: int) -> Graph:
    """A chain of equal blocks of two-bit convolutions with skips."""
    net = nets.Net(nets.Input((32, 8, 8), -3, 3, 2))
    x = "x"
    for i in range(blocks):
        weight = 2 * net.rng.integers(0, 2, (32, 32, 3, 3)) - 1
        c = net.add(f"c{i}", nets.FractionalConv2d(weight, net.rng.integers(-50, 50, 32), padding=(1, 1, 1, 1)), x)
        rows = nets.np.sort(net.rng.integers(-200, 200, (32, 4, 3)), 2)
        x = net.add(f"j{i}", nets.Join(rows, nets.np.ones((32, 1)), -3, 2, (4,), (-3,), (2,)), c, x)
    return net.graph(x)


def test_the_engine_does_not_grow_with_the_depth(nets: ModuleType) -> None:
    plans = [ql.layerwise.estimate(deep(nets, n), "xczu3eg") for n in (4, 9)]
    assert plans[0].engine == plans[1].engine and plans[0].costs == plans[1].costs
    assert plans[0].memory_bytes["maps"] == plans[1].memory_bytes["maps"]
    assert plans[1].rows[5].cycles == plans[0].rows[1].cycles


def test_nothing_that_fits_is_faster(nets: ModuleType) -> None:
    """Every candidate once more, costed by itself through `estimate(engine=...)`."""
    graph, part = nets.small()[0], "xczu3eg"
    plan = ql.layerwise.estimate(graph, part)
    assert plan.fits
    found = list(planning.candidates(engine.facts(steps.build(graph))))
    assert len(found) > 500
    for e in found[::23]:
        other = ql.layerwise.estimate(graph, part, engine=e)
        assert not other.fits or other.cycles >= plan.cycles
        assert other.engine != plan.engine or (other.cycles, other.costs) == (plan.cycles, plan.costs)


def test_a_frame_rate_is_reached_with_less(nets: ModuleType) -> None:
    graph = nets.small()[0]
    fast = ql.layerwise.estimate(graph, "xczu3eg")
    slow = ql.layerwise.estimate(graph, "xczu3eg", fps=fast.fps / 3)
    assert slow.fits and slow.fps >= fast.fps / 3
    assert sum(getattr(slow.total, r) for r in RESOURCES) < sum(getattr(fast.total, r) for r in RESOURCES)
    never = ql.layerwise.estimate(graph, "xczu3eg", fps=1000 * fast.fps)
    assert not never.fits and never.missing.keys() == {"fps"} and never.smallest is None
    assert "does not fit, missing" in str(never) and "smallest listed part that would do: none" in str(never)


def test_a_part_that_is_too_small_names_one_that_does(nets: ModuleType) -> None:
    plan = ql.layerwise.estimate(deep(nets, 2), "xc7z010")
    assert not plan.fits and set(plan.missing) <= set(RESOURCES)
    assert plan.smallest is not None and ql.layerwise.estimate(deep(nets, 2), plan.smallest).fits
    assert f"smallest listed part that would do: {plan.smallest}" in str(plan)


def test_cycles_are_the_largest_of_work_and_traffic(nets: ModuleType) -> None:
    graph = nets.everything()[0]
    plan = ql.layerwise.estimate(graph, "xczu3eg", bandwidth=0.05)
    assert plan.bytes_per_cycle == 0.05 * 1000 / 200
    for row in plan.rows:
        words = sum(row.counts[p] for p in engine.PORTS)
        memory = -(-64 * words * 200 // 50)
        work = max(memory, row.counts["compute"], row.counts["finish"], *(row.counts[p] for p in engine.PORTS))
        assert row.cycles == work + row.counts["program"] + engine.SETUP
    assert plan.bound()["memory"] > 0 and sum(plan.bound().values()) == plan.cycles
    assert plan.traffic == 64 * sum(sum(r.counts[p] for p in engine.PORTS) for r in plan.rows)
    assert json.loads(json.dumps(plan.to_dict()))["cycles_per_image"] == plan.cycles
    assert all(row.name in str(plan) for row in plan.rows)


def test_image_and_maps_are_as_large_as_said(nets: ModuleType, tmp_path: Path) -> None:
    graph = nets.everything()[0]
    plan = ql.layerwise.estimate(graph, "xczu3eg")
    made = ql.layerwise.export(graph, tmp_path / "p", plan=plan)
    assert (tmp_path / "p" / "memory.bin").stat().st_size == plan.memory_bytes["constants"]
    assert made.memory.arena * 64 == plan.memory_bytes["maps"] and made.memory.slot * 64 == plan.memory_bytes["input and outputs"]


def test_impossible_wishes(nets: ModuleType) -> None:
    graph = nets.small()[0]
    for wish in ({"clock_mhz": 0.0}, {"fps": -1.0}, {"bandwidth": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            ql.layerwise.estimate(graph, **wish)
    with pytest.raises(LookupError, match="nearest: xczu3eg"):
        ql.layerwise.estimate(graph, "xczu3")
