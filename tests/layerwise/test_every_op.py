"""Every registered op on the layer-by-layer engine: the compiled engine equals the definition, and takes what the model says."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import quantlib as ql
from quantlib.ir import Graph, GraphError
from quantlib.layerwise import Project, engine, image, steps
from quantlib.layerwise.engine import Engine
from quantlib.ops import Op

ENGINES = {
    "narrow": Engine(xnor_rows=1, inputs=2, outputs=1, search=1, block=16, halves=1),
    "wide": Engine(xnor_rows=4, inputs=8, outputs=8, search=2, block=64, halves=2),
}


def images(graph: Graph, count: int) -> torch.Tensor:
    t = graph.input.type
    x = np.random.default_rng(1).integers(0, t.levels, (count, *t.shape)) * t.step + t.lo
    x[0], x[1] = t.lo, t.hi
    return torch.from_numpy(x)


def test_every_op_is_among_the_examples(examples: ModuleType) -> None:
    assert {name for name, _ in examples.CASES} == set(Op.registry) - {"Input"}


@pytest.mark.parametrize("name", ENGINES)
def test_every_example_equals_its_definition(nets: ModuleType, examples: ModuleType, tmp_path: Path, name: str) -> None:
    """One compiled engine, one program per example; the networks and the engine's size share nothing but the program."""
    graphs = [examples.network(*case) for case in examples.CASES]
    shared = examples.common(graphs, ENGINES[name])
    first: Project | None = None
    for graph in graphs:
        plan = ql.layerwise.estimate(graph, "xcu250", engine=shared)
        made = ql.layerwise.export(graph, tmp_path / graph.name, plan=plan)
        first = first or made
        made._library = first.library()
        x = images(graph, 3)
        got, want = made.csim(x, integers=True), nets.definition(graph, x)
        assert all(torch.equal(got[k], want[k]) for k in want), graph.name
        assert made.counts == [row.counts for row in plan.rows], graph.name


def test_numbers_of_kinds_and_fields_are_those_of_the_header() -> None:
    header = (Path(steps.__file__).parent / "include" / "lw_step.hpp").read_text()

    def names(kind: str) -> list[str]:
        found = re.search(rf"enum {kind} {{(.*?)}};", header, re.S)
        assert found
        return [n.strip() for n in found[1].replace("\n", " ").split(",")]

    assert names("Kind") == list(steps.KINDS)
    assert names("Mode") == list(steps.MODES)
    assert names("Code") == list(steps.CODES)
    assert names("Field") == [*image.FIELDS, "FIELDS"]
    assert [n.lower() for n in names("Unit")] == [*engine.UNITS, "units"]


def test_an_op_without_a_unit_is_refused_by_name(nets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets.Net(nets.Input((3, 4, 4), 0, 3))
    graph = net.graph(net.add("sum", nets.SumPool((2, 2), (2, 2)), "x"))
    monkeypatch.delitem(steps._MAKERS, nets.SumPool)
    with pytest.raises(GraphError, match="sum: the layer-by-layer engine has no unit for SumPool; export without its plan streams it"):
        ql.layerwise.estimate(graph)


def test_an_engine_that_is_too_small_says_in_what(nets: ModuleType) -> None:
    graph, _ = nets.small()
    small = ql.layerwise.estimate(graph).engine
    other, _ = nets.everything()
    with pytest.raises(ql.layerwise.LayerwiseError, match=r"the engine does not run hand_made: .*addresses \d+, \d+ is needed"):
        ql.layerwise.estimate(other, engine=small)
