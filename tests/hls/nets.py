"""Integer networks built by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from quantlib.ir import Decode, Graph, IntType, Node
from quantlib.ops import (
    Add,
    AffineJoin,
    Concat,
    Conv2d,
    Dense,
    FractionalConv2d,
    Input,
    Join,
    Lut,
    MaxPool,
    Op,
    Pad,
    Rearrange,
    Requant,
    Reshape,
    Select,
    Slice2d,
    SumPool,
    Thermometer,
    Threshold,
)  # fmt: skip
from quantlib.schedule import Folding


class Net:
    """Adds ops one after the other and knows the type of every edge."""

    def __init__(self, x: Input, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes = [Node("x", x, (), x.infer())]

    @property
    def types(self) -> Mapping[str, IntType]:
        return {n.name: n.type for n in self.nodes}

    def add(self, name: str, op: Op, *inputs: str) -> str:
        self.nodes.append(Node(name, op, inputs, op.infer(*(self.types[i] for i in inputs))))
        return name

    def quantize(self, name: str, x: str, lo: int = 0, levels: int = 4, step: int = 1) -> str:
        """Random thresholds inside the interval of x."""
        t = self.types[x]
        rows = np.sort(self.rng.integers(t.lo // 4, t.hi // 4 + 1, (t.shape[0], levels - 1)), 1)
        return self.add(name, Threshold(rows, 2 * self.rng.integers(0, 2, t.shape[0]) - 1, lo, step), x)

    def conv(self, name: str, x: str, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
        weight = self.rng.integers(-2, 3, (channels, self.types[x].shape[0] // groups, kernel, kernel))
        pad = kernel // 2
        return self.add(name, Conv2d(weight, (stride, stride), (pad, pad, pad, pad), groups=groups), x)

    def graph(self, *outputs: str) -> Graph:
        decodes = tuple(Decode((o,), (np.array(1.0),), np.array(0.0), self.types[o].shape) for o in outputs)
        return Graph(tuple(self.nodes), decodes, name="hand_made", single_output=len(outputs) == 1)


def small() -> tuple[Graph, dict[str, Folding]]:
    """Convolution, threshold, pool, dense."""
    net = Net(Input((3, 10, 9), 0, 255))
    net.quantize("act", net.conv("conv", "x", 8))
    net.add("pool", MaxPool((2, 2), (2, 2)), "act")
    net.add("fc", Dense(net.rng.integers(-3, 4, (10, 8 * 5 * 4))), "pool")
    return net.graph("fc"), {"conv": Folding(4, 3), "act": Folding(2), "pool": Folding(8), "fc": Folding(5, 16)}


def residual(blocks: int = 2) -> tuple[Graph, dict[str, Folding]]:
    """Blocks of two convolutions with a skip, joined by thresholds; every stage equally fast."""
    net = Net(Input((4, 12, 12), 0, 3))
    x, folding = "x", {}
    for i in range(blocks):
        a = net.quantize(f"a{i}", net.conv(f"c{i}", x, 4))
        b = net.conv(f"d{i}", a, 4)
        rows = np.sort(net.rng.integers(-20, 21, (4, 4, 3)), 2)
        x = net.add(f"join{i}", Join(rows, np.ones((4, 1)), 0, 1, (4,), (0,), (1,)), b, x)
        folding |= {f"c{i}": Folding(2, 2), f"d{i}": Folding(2, 2)}
    net.add("mean", SumPool((12, 12), (12, 12)), x)
    return net.graph("mean", x), folding


def everything() -> tuple[Graph, dict[str, Folding]]:
    """Every op in one network with branches that run at different speeds; two outputs."""
    net = Net(Input((3, 8, 8), 0, 255))
    r = net.rng
    net.add("bits", Thermometer(np.sort(r.integers(0, 256, (1, 4)), 1)), "x")
    net.quantize("a", net.conv("c1", "bits", 8), -3, 4, 2)
    net.add("frac", FractionalConv2d(2 * r.integers(0, 2, (8, 8, 3, 3)) - 1, r.integers(-9, 9, 8), padding=(1, 1, 1, 1)), "a")
    net.add("rq", Requant(r.integers(1, 9, 8), r.integers(-50, 50, 8), 2, -32, 31), "frac")
    net.add("left", Select(np.arange(4)), "rq")
    net.add("right", Select(np.array([7, 4, 6, 5])), "rq")
    net.quantize("dwq", net.conv("dw", "right", 4, 5, groups=4))
    net.add(
        "join",
        AffineJoin(r.integers(-90, 90, (4, 4)), 1, np.sort(r.integers(-90, 90, (4, 3)), 1), np.ones(4), 0, 1, (4,), (0,), (1,)),
        "left",
        "dwq",
    )
    net.add("lut", Lut(r.integers(-8, 8, (4, 4)), 0), "join")
    net.add("cut", Slice2d((0, 8, 2), (0, 8, 2)), "lut")
    net.add("pooled", MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), "lut")
    net.add("sum", Add(), "cut", "pooled")
    net.add("cat", Concat(), "sum", "pooled", "cut")
    net.add("wide", Pad((2, 0, 1), (2, 0, 1)), "cat")
    net.add("turn", Rearrange(np.arange(16 * 4 * 6).reshape(16, 4, 6).transpose(0, 2, 1)), "wide")
    net.add("flat", Reshape((16 * 4 * 6,)), "turn")
    net.add("fc", Dense(r.integers(-3, 4, (6, 16 * 4 * 6))), "flat")
    return net.graph("fc", "cat"), {"c1": Folding(4, 6), "frac": Folding(2, 4), "fc": Folding(2, 8), "turn": Folding(4)}


def tangle(seed: int) -> tuple[Graph, dict[str, Folding]]:
    """A random network of convolutions, pools and quantizers with skips over random distances, joined by concatenation."""
    net = Net(Input((2, 9, 7), -4, 3), seed)
    r, edges, folding = net.rng, ["x"], {}
    for i in range(9):
        x = edges[int(r.integers(max(0, len(edges) - 3), len(edges)))]
        if i % 3 == 2:
            others = [e for e in edges if net.types[e].shape[1:] == net.types[x].shape[1:] and e != x]
            if others:
                picked = [str(o) for o in r.choice(others, min(2, len(others)), replace=False)]
                x = net.add(f"cat{i}", Concat(), x, *picked)
        kernel, channels = int(r.choice([1, 3, 5])), int(r.choice([2, 4, 6]))
        conv = net.conv(f"conv{i}", x, channels, kernel)
        folding[conv] = Folding(int(r.choice([1, 2])), int(r.choice([1, net.types[x].shape[0]])))
        edges.append(net.quantize(f"q{i}", conv, -2, 4))
    used = {i for n in net.nodes for i in n.inputs}
    return net.graph(*(n.name for n in net.nodes if n.name not in used)), folding


def codes(graph: Graph, images: int, seed: int = 1) -> torch.Tensor:
    t = graph.input.type
    return torch.from_numpy(np.random.default_rng(seed).integers(0, t.levels, (images, *t.shape)) * t.step + t.lo)


def definition(graph: Graph, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The integers of every output edge from the ops' definitions on int64, without any engine."""
    edges = {graph.input.name: x}
    for node in graph.nodes[1:]:
        edges[node.name] = node.op.evaluate(*(edges[i] for i in node.inputs))
    return {name: edges[name] for name in graph.outputs}
