"""Networks around the examples of every op, and one engine that runs all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from quantlib.ir import Decode, Graph, IntType, Node
from quantlib.layerwise import engine, steps
from quantlib.ops import Input, Lut, Op, Rearrange, Requant

CASES = [(name, i) for name in sorted(set(Op.registry) - {"Input"}) for i in range(len(Op.registry[name].examples()))]


def network(name: str, i: int) -> Graph:
    """Example i of an op. Its inputs are cut out of one vector, clamped to their intervals and put onto their lattices."""
    op, types = Op.registry[name].examples()[i]
    x = Input((sum(t.numel for t in types),), min(t.lo for t in types), max(t.hi for t in types))
    nodes, inputs, at = [Node("x", x, (), x.infer())], [], 0

    def add(label: str, op: Op, *sources: str, scale: object = None) -> str:
        t = op.infer(*(next(n.type for n in nodes if n.name == s) for s in sources))
        nodes.append(Node(label, op, sources, t if scale is None else t.with_scale(scale)))
        return label

    for k, t in enumerate(types):
        edge = add(f"part{k}", Rearrange(np.arange(at, at + t.numel).reshape(t.shape)), "x")
        at += t.numel
        edge = add(f"clamped{k}", Requant(np.array([1]), np.array([0]), 0, t.lo, t.hi), edge, scale=t.scale)
        if t.step > 1:
            codes = t.lo + np.arange(t.hi - t.lo + 1) // t.step * t.step
            edge = add(f"code{k}", Lut(codes[None], t.lo, 1, t.step), edge, scale=t.scale)
        got: IntType = nodes[-1].type
        assert (got.shape, got.lo, got.hi, got.step) == (t.shape, t.lo, t.hi, t.step if t.levels > 1 else got.step)
        inputs.append(edge)
    add("y", op, *inputs)
    return Graph(tuple(nodes), (Decode(("y",), (np.array(1.0),), np.array(0.0), nodes[-1].type.shape),), name=f"{name}-{i}")


def common(graphs: Sequence[Graph], like: engine.Engine) -> engine.Engine:
    """The smallest engine of this parallelism that runs every one of the graphs."""
    found = like
    for _ in range(2):  # the widths of words first, then what follows from them
        for graph in graphs:
            least = engine.needs(engine.facts(steps.build(graph)), found)
            found = replace(found, **{k.name: max(getattr(found, k.name), getattr(least, k.name)) for k in fields(found)})
    return found
