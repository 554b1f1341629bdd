"""Every pass of the pipeline: pure, the same integers before and after, done when it has run once, and documented."""

from __future__ import annotations

from collections.abc import Callable

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from strategies import settle
from torch import Tensor, nn

import quantlib as ql
from quantlib import ops, passes
from quantlib.ir import Decode, Graph, IntType, Node
from quantlib.ops import Op

Pass = Callable[[Graph], Graph]
PASSES = [pytest.param(p, id=p.__name__) for p in passes.PIPELINE]


def node(name: str, op: Op, *inputs: Node) -> Node:
    return Node(name, op, tuple(i.name for i in inputs), op.infer(*(i.type for i in inputs)))


def graph_of(*nodes: Node, outputs: tuple[Node, ...]) -> Graph:
    decodes = tuple(Decode((o.name,), (np.asarray(0.5),), np.zeros(()), o.type.shape) for o in outputs)
    return Graph(nodes, decodes, single_output=len(outputs) == 1)


def source(*shape: int) -> Node:
    op = ops.Input(shape, -8, 7)
    return Node("input", op, (), IntType(shape, -8, 7, 0.25))


def dead_nodes() -> Graph:
    x = source(2, 3, 3)
    a = node("a", ops.SumPool((2, 2), (1, 1), (0, 0, 0, 0)), x)
    b = node("b", ops.Reshape((8,)), a)
    c = node("c", ops.Select(np.array([1, 0])), x)
    return graph_of(x, a, b, c, outputs=(c,))


def dead_branch_of_a_join() -> Graph:
    x = source(2, 3, 3)
    a, b = node("a", ops.Select(np.array([1, 1])), x), node("b", ops.Add(), x, x)
    return graph_of(x, a, node("c", ops.Add(), a, x), b, outputs=(b, a))


def only_an_input() -> Graph:
    x = source(4)
    return graph_of(x, outputs=(x,))


def flatten_then_dense() -> Graph:
    x = source(2, 3, 2)
    f = node("f", ops.Reshape((12,)), x)
    d = node("d", ops.Dense(np.arange(-18, 18).reshape(3, 12)), f)
    e = node("e", ops.Dense(np.arange(12, 36).reshape(2, 12)), f)
    return graph_of(x, f, d, e, outputs=(d, e))


def flatten_kept_by_another_reader() -> Graph:
    x = source(2, 3, 2)
    f = node("f", ops.Reshape((12,)), x)
    d = node("d", ops.Dense(np.arange(-18, 18).reshape(3, 12)), f)
    g = node("g", ops.Reshape((3, 2, 2)), f)
    return graph_of(x, f, d, g, outputs=(d, g, f))


def two_reshapes_then_dense() -> Graph:
    x = source(2, 3, 2)
    f = node("f", ops.Reshape((3, 2, 2)), x)
    g = node("g", ops.Reshape((12,)), f)
    d = node("d", ops.Dense(np.arange(12).reshape(1, 12)), g)
    return graph_of(x, f, g, d, outputs=(d,))


def moved_then_dense() -> Graph:
    x = source(2, 3, 2)
    index = np.random.default_rng(0).permutation(12)
    f = node("f", ops.Rearrange(index), x)
    d = node("d", ops.Dense(np.arange(24).reshape(2, 12)), f)
    return graph_of(x, f, d, outputs=(d,))


class Network(nn.Module):
    """Flatten before a linear layer, views of views, an unused branch and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(
            qnn.QuantIdentity(bit_width=6), qnn.QuantConv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), qnn.QuantReLU(bit_width=3)
        )
        self.unused, self.head, self.side = (
            qnn.QuantConv2d(4, 3, 1, bias=False),
            qnn.QuantLinear(64, 3, bias=True),
            qnn.QuantLinear(16, 2, bias=True),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        self.unused(x)
        half = x[:, ::2].flip(1).reshape(x.shape[0], -1, 2).transpose(1, 2).flatten(1)[:, ::2]
        return self.head(x.flatten(1)), self.side(half)


def converted_without_passes() -> Graph:
    torch.manual_seed(0)
    model = settle(Network(), lambda r: torch.randn(8, 2, 4, 4, generator=r))
    pipeline, passes.PIPELINE = passes.PIPELINE, ()
    try:
        return ql.convert(model, (2, 4, 4))
    finally:
        passes.PIPELINE = pipeline


GRAPHS = [
    dead_nodes,
    dead_branch_of_a_join,
    only_an_input,
    flatten_then_dense,
    flatten_kept_by_another_reader,
    two_reshapes_then_dense,
    moved_then_dense,
    converted_without_passes,
]


def images(graph: Graph) -> Tensor:
    t = graph.input.type
    return torch.randint(t.lo, t.hi + 1, (9, *t.shape))


def same_results(a: Graph, b: Graph) -> None:
    x = images(a)
    one, two = ql.run(a, x, integers=True), ql.run(b, x, integers=True)
    assert a.outputs == b.outputs and all(torch.equal(one[k], two[k]) for k in one)
    for k in a.outputs:
        s, t = a.by_name[k].type, b.by_name[k].type
        assert (s.shape, s.lo, s.hi, s.step) == (t.shape, t.lo, t.hi, t.step) and s.same_scale(t)
    real = [r if isinstance(r, tuple) else (r,) for r in (ql.run(a, x), ql.run(b, x))]
    assert all(torch.equal(i, j) for i, j in zip(*real, strict=True))


def described(graph: Graph) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(n.name, id(n.op), n.inputs) for n in graph.nodes]


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("step", PASSES)
def test_pass_keeps_every_integer(step: Pass, make: Callable[[], Graph]) -> None:
    graph = make()
    before = described(graph)
    after = step(graph)
    assert described(graph) == before, "a pass makes a new graph and leaves the old one"
    same_results(graph, after)
    assert len(after) <= len(graph) and {n.name for n in after} <= {n.name for n in graph}
    assert described(step(after)) == described(after), "a second run finds nothing to do"


@pytest.mark.parametrize("make", GRAPHS)
def test_pipeline(make: Callable[[], Graph]) -> None:
    graph = make()
    done = passes.run(graph)
    same_results(graph, done)
    assert described(passes.run(done)) == described(done)
    alive = {i for n in done for i in n.inputs} | set(done.outputs)
    assert all(n.name in alive for n in done.nodes[1:]), "nothing is left that nobody reads"
    for n in done:
        if isinstance(n.op, ops.Dense):
            assert not isinstance(done.by_name[n.inputs[0]].op, ops.Reshape), "Dense reads the map itself"


@pytest.mark.parametrize("step", PASSES)
def test_pass_is_documented(step: Pass) -> None:
    assert (step.__doc__ or "").strip()


def test_the_pipeline_is_one_visible_tuple() -> None:
    own = [
        f
        for f in vars(passes).values()
        if callable(f) and getattr(f, "__module__", "") == passes.__name__ and f is not passes.run and f.__name__[0] != "_"
    ]
    assert set(own) == set(passes.PIPELINE), "a pass outside the pipeline is dead code"
