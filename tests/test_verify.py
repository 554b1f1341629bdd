"""What verify reports: the place of a difference, ties, float32-sensitive thresholds, and graphs that do not belong to the model."""

from __future__ import annotations

import json
from dataclasses import replace

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from brevitas.quant import Int8ActPerTensorFixedPoint, Int8WeightPerTensorFixedPoint, Uint8ActPerTensorFixedPoint
from strategies import settle
from torch import Tensor, nn

import quantlib as ql
from quantlib import ops
from quantlib.evaluator import encode, execute
from quantlib.ir import Graph, Node
from quantlib.lowering import lower
from quantlib.ops import Op
from quantlib.verification import VerifyError

SHAPE = (3, 6, 6)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = qnn.QuantIdentity(bit_width=6, return_quant_tensor=True)
        self.block = nn.Sequential(
            qnn.QuantConv2d(3, 5, 3, padding=1, bias=False, weight_bit_width=4), nn.BatchNorm2d(5), qnn.QuantReLU(bit_width=3)
        )
        self.pool, self.flat = nn.MaxPool2d(2), nn.Flatten()
        self.fc = nn.Sequential(qnn.QuantLinear(45, 6, bias=True, weight_bit_width=4), nn.BatchNorm1d(6), qnn.QuantReLU(bit_width=2))
        self.head = qnn.QuantLinear(6, 3, bias=True, weight_bit_width=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.flat(self.pool(self.block(self.q(x))))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    net = settle(Network(), lambda r: torch.randn(16, *SHAPE, generator=r))
    with torch.no_grad():  # both directions, in the range of the quantizers
        for bn in (net.block[1], net.fc[1]):
            bn.weight.copy_(torch.linspace(-1, 1, bn.num_features))
            bn.bias.fill_(0.6)
            bn.momentum = 1.0
        net.train()(torch.randn(32, *SHAPE))
    return net.eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> Graph:
    return ql.convert(model, SHAPE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(11, *SHAPE, generator=torch.Generator().manual_seed(1))


def edited(graph: Graph, name: str, op: Op) -> Graph:
    """The graph with another op at one node."""

    def node(n: Node) -> Node:
        return replace(n, op=op) if n.name == name else n

    return replace(graph, nodes=tuple(node(n) for n in graph.nodes))


def test_a_clean_report(model: nn.Module, graph: Graph, images: Tensor) -> None:
    check = ql.verify(model, graph, images)
    assert check and check.ok and check.first is None and check.images == 11
    by_source = {r.source: r for r in check.rows}
    for path in ("q", "block.0", "block.2", "fc.0", "fc.2", "head"):
        assert any(r.source == path or r.name == path for r in check.rows), f"{path} was not compared: {list(by_source)}"
    sizes = {r.name: r.codes for r in check.rows}
    assert sizes["block.2"] == 11 * 5 * 36 and sizes["fc.2"] == 11 * 6 and sizes["head"] == 11 * 3
    assert check.codes == sum(sizes.values()) and check.mismatches == 0
    assert all(r.float64 == 0 for r in check.rows)
    report = json.loads(json.dumps(check.to_dict()))
    assert report["ok"] is True and report["images"] == 11 and len(report["rows"]) == len(check.rows)
    assert "exact" in str(check) and "block.2" in str(check) and "Threshold" in str(check) and "ties" in str(check)
    # one rounding to float32 of outputs of this size
    assert check.output_error < 1e-5


@pytest.mark.parametrize(("name", "level"), [("block.2", 0), ("block.2", 3), ("fc.2", 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_wrong_threshold_is_named(model: nn.Module, graph: Graph, images: Tensor, name: str, level: int, sign: int) -> None:
    node = graph.by_name[name]
    assert isinstance(node.op, ops.Threshold)
    before = node.inputs[0]
    accumulators = execute(graph, encode(graph, images), [before])[before].numpy()
    thresholds = node.op.thresholds.copy()

    def used(channel: int) -> np.ndarray:
        """sign * accumulator of the images that reach this level and not the next."""
        seen = np.unique(sign * accumulators[:, channel])
        upper = thresholds[channel, level + 1] if level + 1 < thresholds.shape[1] else seen[-1] + 1
        return seen[(seen >= thresholds[channel, level]) & (seen < upper)]

    channels = [c for c in range(len(thresholds)) if node.op.sign[c] == sign and used(c).size]
    assert channels, "these images use this level in no channel of this direction"
    channel = channels[-1]
    inside = used(channel)
    wrong = int(inside[0]) + 1  # the smallest accumulator that reached the level does so no more
    thresholds[channel, level] = wrong
    check = ql.verify(model, edited(graph, name, replace(node.op, thresholds=thresholds)), images)
    assert not check and not check.ok
    first = check.first
    assert first is not None and (first.name, first.source, first.channel) == (name, name, channel)
    where = (first.image, channel, *first.pixel)
    assert accumulators[where] == first.accumulator == sign * inside[0]
    assert first.threshold == sign * wrong
    assert first.code == first.expected - 1
    row = next(r for r in check.rows if r.name == name)
    changed = (sign * accumulators[:, channel] == inside[0]).sum()
    assert row.mismatches == changed, "exactly the places whose accumulator lies between the right and the wrong threshold"
    units = first.value / float(np.asarray(node.type.scale).reshape(-1)[0])
    assert round(units) == first.expected
    text = str(check)
    assert text.startswith("NOT exact") and f"{name} ({name}): image {first.image}, channel {channel}, pixel {first.pixel}" in text
    assert f"accumulator {first.accumulator}, nearest threshold {first.threshold}" in text
    assert json.loads(json.dumps(check.to_dict()))["first"]["accumulator"] == first.accumulator


def test_the_first_difference_is_the_first_in_the_network(model: nn.Module, graph: Graph, images: Tensor) -> None:
    """A difference spreads: the report begins where it began, in a later chunk of images too."""
    node = graph.by_name["block.2"]
    assert isinstance(node.op, ops.Threshold)
    thresholds = node.op.thresholds.copy()
    thresholds[0] = node.op.thresholds[0] + 40
    broken = edited(graph, "block.2", replace(node.op, thresholds=thresholds))
    x = torch.cat([torch.zeros(8, *SHAPE), images[:3]])
    zero = ql.verify(model, broken, x[:8])
    check = ql.verify(model, broken, x)
    assert check.first is not None and check.first.name == "block.2" and check.first.channel == 0
    assert check.mismatches > next(r for r in check.rows if r.name == "block.2").mismatches > 0
    if zero.ok:
        assert check.first.image >= 8


def test_a_wrong_weight_shows_in_the_accumulator(model: nn.Module, graph: Graph, images: Tensor) -> None:
    node = graph.by_name["block.0"]
    assert isinstance(node.op, ops.Conv2d)
    weight = node.op.weight.copy()
    row = weight[2].reshape(-1)
    up, down = int(row.argmax()), int(row.argmin())
    row[up], row[down] = row[up] - 1, row[down] + 1  # the interval of this channel stays inside that of the node, or nearly
    op = replace(node.op, weight=weight)
    inferred = op.infer(*graph.types(node))
    nodes = tuple(
        replace(n, op=op, type=replace(n.type, lo=inferred.lo, hi=inferred.hi, step=inferred.step)) if n is node else n for n in graph.nodes
    )
    try:
        broken = replace(graph, nodes=nodes)
    except ValueError:
        pytest.skip("the changed interval does not fit the next op")
    check = ql.verify(model, broken, images)
    assert not check.ok and check.first is not None and check.first.name == "block.0" and check.first.channel == 2


def test_a_wrong_scale_of_an_edge(model: nn.Module, graph: Graph, images: Tensor) -> None:
    for name in ("block.2", "block.0", "head"):
        node = graph.by_name[name]
        wrong = replace(node, type=node.type.with_scale(np.asarray(node.type.scale) * 1.25))
        broken = replace(graph, nodes=tuple(wrong if n is node else n for n in graph.nodes))
        with pytest.raises(VerifyError, match=f"{name}.*scale"):
            ql.verify(model, broken, images)


def test_a_wrong_decode(model: nn.Module, graph: Graph, images: Tensor) -> None:
    (decode,) = graph.decodes
    for broken in (replace(decode, gains=(decode.gains[0] * 1.5,)), replace(decode, bias=decode.bias + 0.25)):
        with pytest.raises(VerifyError, match="output"):
            ql.verify(model, replace(graph, decodes=(broken,)), images)


def test_a_model_trained_on_after_conversion(model: nn.Module, graph: Graph, images: Tensor) -> None:
    """Other batch norm statistics are other thresholds; other weights other scales: neither passes."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with torch.no_grad():
            model.block[1].running_mean.add_(0.5)
        assert not ql.verify(model, graph, images).ok
        with torch.no_grad():
            model.block[0].weight.mul_(1.5)
        with pytest.raises(VerifyError, match="block.0.*scale"):
            ql.verify(model, graph, images)
    finally:
        model.load_state_dict(state)
    assert ql.verify(model, graph, images).ok


class Liar(nn.Module):
    """A layer whose integers do not mean what its forward does."""

    def __init__(self, scale: float, shift: int):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def lower(self, g, x):  # noqa: ANN001, ANN201
        edge = g.integer(x)
        bound = edge.type.magnitude + abs(self.shift)
        op = ops.Requant(mul=np.array([1]), add=np.array([self.shift]), shift=0, lo=-bound, hi=bound)
        return g.add(op, edge, scale=np.asarray(edge.type.scale) * self.scale)


@pytest.mark.parametrize(("scale", "shift", "words"), [(1.3, 0, "steps off the grid"), (2.0, 1, "not those of the model"), (2.0, 0, "")])
def test_a_layer_whose_integers_do_not_mean_its_forward(scale: float, shift: int, words: str) -> None:
    """The reference replays the trained module itself: convert refuses what its own proof refutes, and verify says so of the graph."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (4, 2, 5, 5), dtype=torch.uint8)
    net = nn.Sequential(Liar(scale, shift), qnn.QuantConv2d(2, 2, 1, bias=False, weight_bit_width=4)).eval()
    grid = ql.Grid(0, 255, 1 / 255)
    graph = lower(net, (2, 5, 5), grid).graph
    if words:
        with pytest.raises(ql.ConversionError, match=words):
            ql.convert(net, (2, 5, 5), grid)
    if scale == 1.3:
        with pytest.raises(VerifyError, match="steps off the grid"):
            ql.verify(net, graph, x)
        return
    check = ql.verify(net, graph, x)
    assert check.ok == (shift == 0), str(check)
    assert shift == 0 or (check.first is not None and check.first.name == "0" and check.first.code == check.first.expected + 1)


class Dyadic(nn.Module):
    """All scales powers of two: 1/2 x 1/2 products against a step of 1 fall on ties."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = qnn.QuantConv2d(2, 3, 1, bias=False, weight_quant=Int8WeightPerTensorFixedPoint, weight_bit_width=3)
        self.relu = qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=3, max_val=6.0)
        self.out = qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, bit_width=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


def test_ties_are_counted() -> None:
    torch.manual_seed(0)
    grid = ql.Grid(0, 7, 0.5)
    net = settle(Dyadic(), lambda r: torch.randint(0, 8, (16, 2, 5, 5), generator=r) * 0.5)
    graph = ql.convert(net, (2, 5, 5), grid)
    x = torch.randint(0, 8, (6, 2, 5, 5))
    check = ql.verify(net, graph, x)
    assert check.ok, str(check)
    row = next(r for r in check.rows if r.name == "relu")
    node = graph.by_name["relu"]
    assert isinstance(node.op, ops.Threshold)
    step = float(np.asarray(node.type.scale)) / float(np.asarray(graph.by_name["conv"].type.scale))
    halves = [(k + 0.5) * step for k in range(7)]
    t = graph.by_name["conv"].type
    expected = sum(h == int(h) and t.lo <= h <= t.hi for h in halves)
    channels = len(node.op.thresholds)
    assert expected, "this network has ties"
    # one (channel, level) is counted once, whichever side of the threshold the tie falls to
    assert row.ties in (expected * channels, expected * node.type.shape[0])
    assert row.sensitive >= row.ties, "a tie is as float32-sensitive as can be"


def test_structural_ties_differ_in_plain_float64_but_not_in_the_reference() -> None:
    """An average pool between two uses of one quantizer: plain floats decide exact ties by noise, which is reported."""
    torch.manual_seed(0)
    q = qnn.QuantReLU(bit_width=4)
    net = nn.Sequential(
        qnn.QuantIdentity(bit_width=6), qnn.QuantConv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), q, nn.AvgPool2d(2), q
    )
    net = settle(net, lambda r: torch.randn(16, 3, 12, 12, generator=r))
    graph = ql.convert(net, (3, 12, 12))
    check = ql.verify(net, graph, torch.randn(40, 3, 12, 12))
    assert check.ok and check.mismatches == 0, str(check)
    assert sum(r.float64 for r in check.rows) + sum(r.float32 for r in check.rows) > 0, str(check)
    assert sum(r.ties for r in check.rows) > 0


def test_images_as_codes_and_as_real_numbers(model: nn.Module, graph: Graph) -> None:
    stated = nn.Sequential(qnn.QuantConv2d(3, 4, 3, bias=False, weight_bit_width=4), qnn.QuantReLU(bit_width=4)).eval()
    g = ql.convert(stated, SHAPE, ql.Grid(0, 255, 1 / 255))
    codes = torch.randint(0, 256, (3, *SHAPE))
    checks = [
        ql.verify(stated, g, x) for x in (codes, codes.to(torch.uint8), codes.numpy().astype(np.uint8), codes / 255, codes.double() / 255)
    ]
    assert all(c.ok for c in checks) and len({c.codes for c in checks}) == 1
    own = encode(graph, torch.randn(3, *SHAPE))
    assert ql.verify(model, graph, own).ok, "codes of the model's own input quantizer"


def test_verify_leaves_the_model_alone(model: nn.Module, graph: Graph, images: Tensor) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    try:
        assert ql.verify(model, graph, images[:2]).ok, "a model in training mode is compared in eval mode"
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
