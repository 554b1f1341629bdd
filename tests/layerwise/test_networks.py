"""Whole networks on the layer-by-layer engine: every integer equals the definition, every step takes what the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import Spec, build, specs
from test_every_network import CONVERTIBLE, images, randomised, shape_of

import quantlib as ql
import zoo
from quantlib.ir import Graph
from quantlib.layerwise import Plan
from quantlib.layerwise.engine import Engine


def check(graph: Graph, x: torch.Tensor, folder: Path, plan: Plan | None = None) -> Plan:
    plan = plan or ql.layerwise.estimate(graph, "xcu250")
    made = ql.layerwise.export(graph, folder, plan=plan)
    got, want = made.csim(x, integers=True), ql.run(graph, x, integers=True)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert made.counts == [row.counts for row in plan.rows]
    return plan


@pytest.mark.parametrize("name", ["small", "residual", "everything"])
def test_networks_built_by_hand(nets: ModuleType, tmp_path: Path, name: str) -> None:
    graph, _ = getattr(nets, name)()
    check(graph, nets.codes(graph, 3), tmp_path / "p")


def test_random_networks_with_skips_on_one_engine(nets: ModuleType, examples: ModuleType, tmp_path: Path) -> None:
    """Concatenations of maps of odd numbers of channels, windows of 1, 3 and 5, several outputs; blocks of 16 vectors cut every row."""
    graphs = [nets.tangle(seed)[0] for seed in range(6)]
    shared = examples.common(graphs, Engine(inputs=4, outputs=2, block=16))
    first = None
    for seed, graph in enumerate(graphs):
        plan = ql.layerwise.estimate(graph, "xcu250", engine=shared)
        made = ql.layerwise.export(graph, tmp_path / str(seed), plan=plan)
        first = first or made
        made._library = first.library()
        x = nets.codes(graph, 2)
        got, want = made.csim(x, integers=True), nets.definition(graph, x)
        assert all(torch.equal(got[k], want[k]) for k in want), seed
        assert made.counts == [row.counts for row in plan.rows], seed


def test_results_mean_what_run_means(tmp_path: Path) -> None:
    """A FracBNN for digits from its model: real results, and both ways to ask for the project."""
    torch.manual_seed(0)
    graph = ql.convert(zoo.get("fracbnn_digits").eval(), (1, 8, 8))
    plan = ql.layerwise.estimate(graph, "xczu3eg")
    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    made = ql.export(graph, tmp_path / "p", plan=plan)
    assert isinstance(made, ql.layerwise.Project)
    assert torch.equal(made.csim(x), ql.run(graph, x))
    assert made.counts == [row.counts for row in plan.rows]


def test_outputs_that_are_inputs_or_other_maps(nets: ModuleType, tmp_path: Path) -> None:
    """The input itself, whole groups of a map, and a map that later steps read as well, all leave the network."""
    net = nets.Net(nets.Input((40, 5, 4), -3, 3))
    net.quantize("a", net.conv("c", "x", 64), -2)
    net.add("half", nets.Select(nets.np.arange(32, 64)), "a")
    net.add("twice", nets.Select(nets.np.tile(nets.np.arange(32), 2)), "a")
    net.add("sum", nets.Add(), "twice", "a")
    graph = net.graph("x", "half", "a", "sum")
    check(graph, nets.codes(graph, 2), tmp_path / "p")


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (19, 1), (33, 17)])
def test_tiles_of_awkward_sizes(nets: ModuleType, tmp_path: Path, size: tuple[int, int]) -> None:
    """Maps of one row or column, rows that end inside a block, tiles of fewer rows than are worked on together."""
    net = nets.Net(nets.Input((33, *size), -3, 3, 2))
    weight = 2 * net.rng.integers(0, 2, (35, 33, 3, 3)) - 1
    net.add("frac", nets.FractionalConv2d(weight, net.rng.integers(-9, 9, 35), padding=(1, 1, 1, 1)), "x")
    net.quantize("q", "frac", -3, 4, 2)
    net.quantize("d", net.conv("dw", "q", 35, groups=35), 0)
    net.add("wide", nets.Pad((0, 1, 2), (0, 0, 3)), "d")
    graph = net.graph("wide", net.conv("strided", "d", 7, 3, 2))
    plan = ql.layerwise.estimate(graph, "xcu250")
    tight = replace(plan.engine, xnor_rows=4, block=64, inputs=2, outputs=2, halves=2)
    from quantlib.layerwise import engine, steps

    least = engine.needs(engine.facts(steps.build(graph)), tight)
    check(graph, nets.codes(graph, 2), tmp_path / "p", ql.layerwise.estimate(graph, "xcu250", engine=least))


@pytest.mark.slow
@pytest.mark.parametrize("name,index", CONVERTIBLE)
def test_every_network_of_the_zoo(name: str, index: int, tmp_path: Path) -> None:
    graph = ql.convert(randomised(name, dict(zoo.card(name).converts[index])), shape_of(name))
    check(graph, images(name, 2), tmp_path / "p", ql.layerwise.estimate(graph, "xczu3eg"))


@pytest.mark.slow
def test_random_brevitas_networks(tmp_path: Path) -> None:
    number = 0

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(specs())
    def one(spec: Spec) -> None:
        nonlocal number
        try:
            graph = ql.convert(build(spec), spec.shape, spec.grid)
        except ql.ConversionError:
            return
        number += 1
        check(graph, spec.images(2, torch.Generator().manual_seed(spec.seed)), tmp_path / f"p{number}")

    one()
    assert number >= 15


@pytest.mark.slow
def test_fracbnn_for_imagenet_at_full_size(tmp_path: Path) -> None:
    """28 million binary weights, one image of 224 x 224, on an Ultra96-V2 and on a PYNQ-Z2."""
    from quantlib.layers import FixedPoint

    torch.manual_seed(0)
    model = zoo.get("fracbnn_imagenet", fixed_point=FixedPoint(14, 6)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p[p == 0] = 0.01  # a fresh batch norm; a weight needs a sign
    graph = ql.convert(model, (3, 224, 224))
    x = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    plan = check(graph, x, tmp_path / "p", ql.layerwise.estimate(graph, "Ultra96-V2", clock_mhz=250))
    assert plan.fits and plan.cycles < 250e6 / 48.1  # the published accelerator: 48.1 frames/s on this board at this clock
