"""Pure functions Graph -> Graph, run in the order of PIPELINE after lowering. Few are needed: types are derived and lowering is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quantlib import ops
from quantlib.ir import Graph


def drop_dead(graph: Graph) -> Graph:
    """Remove nodes that no output depends on."""
    alive = set(graph.outputs) | {graph.input.name}
    for node in reversed(graph.nodes):
        if node.name in alive:
            alive.update(node.inputs)
    return replace(graph, nodes=tuple(n for n in graph.nodes if n.name in alive))


def flatten_into_dense(graph: Graph) -> Graph:
    """Dense reads a feature map directly (in channel-major order): Reshapes in front of it have no work to do."""
    nodes = []
    for node in graph.nodes:
        if isinstance(node.op, ops.Dense):
            source = graph.by_name[node.inputs[0]]
            while isinstance(source.op, ops.Reshape):
                source = graph.by_name[source.inputs[0]]
            node = replace(node, inputs=(source.name,))
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


PIPELINE: tuple[Callable[[Graph], Graph], ...] = (flatten_into_dense, drop_dead)


def run(graph: Graph) -> Graph:
    for step in PIPELINE:
        graph = step(graph)
    return graph
