"""Every registered layer, in its own examples, is understood by the three analyses."""

from __future__ import annotations

import pytest

from quantlib.analysis import count, micronet_cost, systolic_latency
from quantlib.analysis._steps import COMPUTE
from quantlib.analysis._walk import walk
from quantlib.layers import Layer

CASES = [
    (name, i)
    for name, layer in sorted(Layer.registry.items())
    if layer.__module__.startswith("quantlib.")
    for i in range(len(layer.examples()))
]


@pytest.mark.parametrize("name,index", CASES)
def test_layer(name, index):
    model, x = Layer.registry[name].examples()[index]
    shape = tuple(x.shape[1:])
    counts, cost = count(model, shape), micronet_cost(model, shape)
    assert counts.macs == sum(s.macs for s in walk(model, shape).steps if s.kind in COMPUTE)
    assert all(r.weight_width is not None for r in counts.rows)  # the layers of this library are quantized, and say so
    assert cost.score >= 0 and systolic_latency(model, shape, grouped="blocks").cycles >= len(counts.rows)
