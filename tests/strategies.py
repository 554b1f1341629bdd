"""What the tests of conversion share: settling a small network, demanding that its integer network is exact, drawing random networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import brevitas.nn as qnn
import numpy as np
import torch
from brevitas.quant import (
    Int8ActPerTensorFixedPoint,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryWeightPerTensorConst,
    TruncTo8bit,
    Uint8ActPerTensorFixedPoint,
)
from brevitas.quant_tensor import QuantTensor
from brevitas_examples.bnn_pynq.models.common import CommonActQuant
from hypothesis import strategies as st
from torch import Tensor, nn

import quantlib as ql
from quantlib.evaluator import encode, execute
from quantlib.verification import Check


def settle(model: nn.Module, sample: Any, steps: int = 3, seed: int = 0) -> nn.Module:
    """Run a few training batches (activation scales take their statistics), then give every batch norm odd statistics: a third of the
    gammas negative, one zero.
    """
    random = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(sample(random))
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats:
                c = m.num_features
                m.running_mean.copy_(m.running_mean + 0.3 * torch.randn(c, generator=random))
                m.running_var.copy_(m.running_var * (0.5 + torch.rand(c, generator=random)))
                if m.affine:
                    sign = torch.where(torch.rand(c, generator=random) < 0.3, -1.0, 1.0)
                    m.weight.copy_(sign * (0.3 + torch.rand(c, generator=random)))
                    m.bias.copy_(0.5 * torch.randn(c, generator=random))
                    if c > 3:
                        m.weight[c // 2] = 0.0
    return model.eval()


def flat(tree: Any) -> list[Tensor]:
    """The tensors of a model's output in order; quant tensors by value."""
    if isinstance(tree, Tensor):
        return [tree]
    if hasattr(tree, "value") and hasattr(tree, "scale"):
        return [tree.value]
    if isinstance(tree, dict):
        tree = tree.values()
    return [t for item in tree for t in flat(item)]


def float64_output(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flat(copy.deepcopy(model).double().eval()(x.double()))


def assert_exact(model: nn.Module, graph: ql.Graph, x: Tensor, ties: bool | None = False) -> Check:
    """The integer network equals the model on real images x: every code, the output, at several batch sizes.

    ties=False: the plain float64 model agrees in every code as well. Networks with structural ties (True) are only compared with the
    snapped replay; with None the outputs are compared where plain float64 happened to agree.
    """
    check = ql.verify(model, graph, x)
    assert check.ok, str(check)
    assert check.codes > 0
    y = ql.run(graph, x)
    whole = flat(y)
    agrees = all(r.float64 == 0 for r in check.rows)
    assert agrees or ties is not False, str(check)
    if agrees:
        for got, want in zip(whole, float64_output(model, x), strict=True):
            assert got.shape == want.shape
            # the decode is float64 rounded once to float32 (2^-24), the model a float64 sum in another order
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6, atol=1e-6 * float(want.abs().max() + 1))
    codes = encode(graph, x)
    integers = ql.run(graph, x, integers=True)
    assert list(integers) == list(graph.outputs)
    for n in (1, 3):
        part = ql.run(graph, x[:n], integers=True)
        assert all(torch.equal(part[k], integers[k][:n]) for k in integers), f"batch {n} differs"
    again = ql.run(graph, codes, integers=True)
    assert all(torch.equal(again[k], integers[k]) for k in integers), "codes and real images differ"
    if graph.input.type.lo >= 0 and graph.input.type.hi <= 255:
        bytes_ = ql.run(graph, codes.to(torch.uint8), integers=True)
        assert all(torch.equal(bytes_[k], integers[k]) for k in integers), "uint8 images differ"
    return check


def graph_fields_hold(graph: ql.Graph, x: Tensor) -> None:
    """Every edge stays in its declared interval and on its lattice on these images."""
    names = [n.name for n in graph.nodes]
    for name, values in execute(graph, encode(graph, x), names).items():
        t = graph.by_name[name].type
        assert tuple(values.shape[1:]) == t.shape, name
        assert int(values.min()) >= t.lo and int(values.max()) <= t.hi, f"{name} leaves {t}"
        assert not bool(((values - t.lo) % t.step).any()), f"{name} leaves the lattice of {t}"


# ---------------------------------------------------------------- random networks


@dataclass(frozen=True)
class Block:
    """One stage of a random network. Numbers are free; the builder reduces them to what is legal where the stage stands."""

    kind: str
    channels: int
    kernel: int
    stride: int
    groups: int
    bits: int
    weight: str
    weight_bits: int
    tail: tuple[str, ...]
    act: str
    bias: bool


@dataclass(frozen=True)
class Spec:
    """A random network: images of `channels` x `size` x `size` (+ `extra` columns), an input grid or quantizer, blocks, a head."""

    channels: int
    size: int
    extra: int
    front: str
    blocks: tuple[Block, ...]
    head: str
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size + self.extra

    @property
    def grid(self) -> ql.Grid | None:
        return {"uint8": ql.Grid(0, 255, 1 / 255), "int4": ql.Grid(-8, 7, 0.125), "odd": ql.Grid(-3, 3, 0.3, step=2)}.get(self.front)

    def images(self, count: int, random: torch.Generator) -> Tensor:
        if self.grid is None:
            return torch.randn(count, *self.shape, generator=random)
        n = torch.randint(0, self.grid.levels, (count, *self.shape), generator=random) * self.grid.step + self.grid.lo
        return (n.double() * float(self.grid.scale)).float()


KINDS = (
    "conv",
    "conv",
    "depthwise",
    "pool",
    "trunc",
    "shared",
    "scales",
    "accumulator",
    "product",
    "concat",
    "split",
    "shift",
    "gate",
    "move",
    "requant",
    "channels",
    "option",
)
TAILS = (
    "bn",
    "bn",
    "bn",
    "relu",
    "prelu",
    "negative",
    "leaky",
    "hardtanh",
    "gain",
    "offset",
    "flip",
    "max",
    "avg",
    "padded",
    "pad",
    "crop",
    "shuffle",
    "turn",
    "mask",
    "abs",
    "dropout",
)
ACTS = ("relu", "relu", "identity", "hardtanh", "bipolar", "fixed", "fixed relu", "common", "sigmoid")
WEIGHTS = ("tensor", "channel", "fixed", "binary", "ternary", "shifted")
HEADS = ("linear", "global", "conv", "accumulator", "mean", "codes", "two")
FRONTS = ("8", "6", "3", "fixed", "arithmetic", "uint8", "int4", "odd")


def specs() -> st.SearchStrategy[Spec]:
    block = st.builds(
        Block,
        kind=st.sampled_from(KINDS),
        channels=st.integers(1, 9),
        kernel=st.integers(1, 3),
        stride=st.integers(1, 2),
        groups=st.integers(0, 5),
        bits=st.integers(1, 8),
        weight=st.sampled_from(WEIGHTS),
        weight_bits=st.integers(2, 8),
        tail=st.lists(st.sampled_from(TAILS), max_size=4).map(tuple),
        act=st.sampled_from(ACTS),
        bias=st.booleans(),
    )
    return st.builds(
        Spec,
        channels=st.integers(1, 4),
        size=st.integers(4, 9),
        extra=st.integers(0, 2),
        front=st.sampled_from(FRONTS),
        blocks=st.lists(block, min_size=2, max_size=6).map(tuple),
        head=st.sampled_from(HEADS),
        seed=st.integers(0, 1 << 20),
    )


def value(x: Any) -> Tensor:
    return x.value if isinstance(x, QuantTensor) else x


class Call(nn.Module):
    """A function that is no layer: what a user writes in forward."""

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def divisor(n: int, k: int) -> int:
    options = [d for d in range(1, n + 1) if n % d == 0]
    return options[k % len(options)]


def activation(kind: str, bits: int) -> nn.Module:
    options: dict[str, Any] = {"return_quant_tensor": True}
    few = max(bits, 2)
    if kind == "relu":
        return qnn.QuantReLU(bit_width=bits, **options)
    if kind == "fixed relu":
        return qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=few, **options)
    if kind == "fixed":
        return qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, bit_width=few, **options)
    if kind == "hardtanh":
        return qnn.QuantHardTanh(bit_width=few, min_val=-1.5, max_val=1.5, **options)
    if kind == "bipolar":
        return qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst, **options)
    if kind == "common":
        return qnn.QuantIdentity(act_quant=CommonActQuant, bit_width=min(bits, 4), **options)
    if kind == "sigmoid":
        return qnn.QuantSigmoid(bit_width=few, **options)
    return qnn.QuantIdentity(bit_width=few, **options)


def convolution(b: Block, i: int, o: int, k: int, stride: int, groups: int) -> nn.Module:
    quant: dict[str, Any] = {
        "tensor": {"weight_quant": Int8WeightPerTensorFloat, "weight_bit_width": b.weight_bits},
        "channel": {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": b.weight_bits},
        "fixed": {"weight_quant": Int8WeightPerTensorFixedPoint, "weight_bit_width": b.weight_bits},
        "binary": {"weight_quant": SignedBinaryWeightPerTensorConst, "weight_scaling_const": 0.25},
        "ternary": {"weight_quant": SignedTernaryWeightPerTensorConst, "weight_scaling_const": 0.25, "weight_threshold": 0.5},
        "shifted": {"weight_quant": ShiftedUint8WeightPerTensorFloat, "weight_bit_width": b.weight_bits},
    }[b.weight]
    return qnn.QuantConv2d(i, o, k, stride=stride, padding=k // 2, groups=groups, bias=b.bias, **quant)


class Builder:
    """Lays blocks one after the other and follows channels, height and width."""

    def __init__(self, spec: Spec):
        self.c, self.h, self.w = spec.shape

    def halve(self, stride: int) -> None:
        self.h, self.w = -(-self.h // stride), -(-self.w // stride)

    def tail(self, b: Block, pools: bool) -> list[nn.Module]:
        """Elementwise steps, pools and moves on the c x h x w accumulator."""
        steps: list[nn.Module] = []
        for name in b.tail:
            c = self.c
            if name == "bn":
                steps.append(nn.BatchNorm2d(c))
            elif name == "relu":
                steps.append(nn.ReLU(inplace=b.bias))
            elif name in ("prelu", "negative"):
                steps.append(nn.PReLU(c if b.bias else 1, init=0.3 if name == "prelu" else -0.4))
            elif name == "leaky":
                steps.append(nn.LeakyReLU(0.2))
            elif name == "hardtanh":
                steps.append(nn.Hardtanh(-0.7, 1.3))
            elif name == "gain":
                steps.append(Call(lambda m, x: value(x) * m.g, g=nn.Parameter(torch.randn(1, c, 1, 1))))
            elif name == "offset":
                steps.append(Call(lambda m, x: value(x) - m.o.reshape(-1, 1, 1) / 2, o=nn.Parameter(torch.randn(c))))
            elif name == "flip":
                steps.append(Call(lambda m, x: 0.25 - value(x)))
            elif name == "turn":
                steps.append(Call(lambda m, x: value(x).flip(-1)))
            elif name == "dropout":
                steps.append(nn.Dropout(0.1))
            elif name == "mask":
                steps.append(Call(lambda m, x: value(x) * (value(x) > -0.3)))
            elif name == "abs":
                steps.append(Call(lambda m, x: value(x).abs()))
            elif name == "padded":
                steps.append(nn.AvgPool2d(3, 1, 1))
            elif name == "pad" and pools:
                steps.append(nn.ZeroPad2d((1, 0, 0, 1)))
                self.h, self.w = self.h + 1, self.w + 1
            elif name == "crop" and pools and min(self.h, self.w) >= 3:
                steps.append(Call(lambda m, x: value(x)[:, :, 1:, :-1]))
                self.h, self.w = self.h - 1, self.w - 1
            elif name == "shuffle":
                steps.append(Call(lambda m, x: shuffled(value(x), m.groups), groups=divisor(c, b.groups)))
            elif name in ("max", "avg") and pools and min(self.h, self.w) >= 2:
                pool = nn.MaxPool2d(3, 2, 1) if name == "max" else nn.AvgPool2d(2)
                steps.append(pool)
                self.h, self.w = ((self.h + 1) // 2, (self.w + 1) // 2) if name == "max" else (self.h // 2, self.w // 2)
        return steps

    def body(self, b: Block, out: int, stride: int = 1, pools: bool = False) -> nn.Module:
        """Convolution and tail, not yet quantized."""
        groups = divisor(math.gcd(self.c, out), b.groups)
        k = b.kernel if b.kernel != 2 or stride == 1 and min(self.h, self.w) > 2 else 1
        conv = convolution(b, self.c, out, k if k != 2 else 3, stride, groups)
        self.c = out
        self.halve(stride)
        return nn.Sequential(conv, *self.tail(b, pools))

    def block(self, b: Block) -> nn.Module:
        stride = b.stride if min(self.h, self.w) >= 4 else 1
        act = lambda: activation(b.act, b.bits)  # noqa: E731
        c, narrow = self.c, activation(b.act, min(b.bits, 4))
        if b.kind == "conv":
            return nn.Sequential(self.body(b, b.channels, stride, pools=True), act())
        if b.kind == "depthwise":
            conv = convolution(b, c, c, 3, stride, c)
            self.halve(stride)
            return nn.Sequential(conv, *self.tail(b, True), act())
        if b.kind == "pool":
            if min(self.h, self.w) < 3:
                return nn.Identity()
            pool = (
                nn.MaxPool2d(2),
                nn.AvgPool2d(2),
                nn.MaxPool2d(3, 1, 1),
                nn.AvgPool2d(3, 1, 1),
                nn.AdaptiveAvgPool2d(1),
                nn.MaxPool2d(3, 2, ceil_mode=True),
            )[b.groups]
            run = lambda m, x: m.p(value(x))  # noqa: E731
            if b.groups in (0, 1):
                self.h, self.w = self.h // 2, self.w // 2
            elif b.groups == 4:
                self.h = self.w = 1
            elif b.groups == 5:
                self.h, self.w = self.h // 2, self.w // 2
            return Call(run, p=pool) if b.bias else nn.Sequential(Call(run, p=pool), act())
        if b.kind == "trunc":
            if min(self.h, self.w) < 2:
                return act()
            self.h, self.w = self.h // 2, self.w // 2
            mode = "ROUND" if b.bias else "FLOOR"
            return nn.Sequential(
                activation(b.act if b.act not in ("bipolar", "common") else "relu", max(b.bits, 2)),
                qnn.TruncAvgPool2d(
                    2, trunc_quant=TruncTo8bit, bit_width=max(b.bits, 2), float_to_int_impl_type=mode, return_quant_tensor=True
                ),
            )
        if b.kind == "shared":
            q = act()
            return Call(lambda m, x: m.out(m.q(x) + m.q(m.b(m.q(x)))), q=q, b=self.body(b, c), out=activation("relu", max(b.bits, 2)))
        if b.kind == "scales":
            return Call(
                lambda m, x: m.out(value(m.p(x)) + value(m.q(m.b(x)))), p=activation("identity", 4), q=narrow, b=self.body(b, c), out=act()
            )
        if b.kind == "accumulator":
            return Call(lambda m, x: m.out(m.b(x) + value(m.p(x))), p=narrow, b=self.body(b, c), out=activation(b.act, min(b.bits, 5)))
        if b.kind == "product":
            return Call(
                lambda m, x: m.out(value(m.q(m.b(x))) * value(m.p(x))), p=activation("relu", 3), q=narrow, b=self.body(b, c), out=act()
            )
        if b.kind == "concat":
            one = self.body(b, b.channels)
            self.c = c
            two = self.body(replace(b, tail=("bn",), kernel=1), b.groups + 1)
            self.c = b.channels + b.groups + 1
            if b.bias:
                return Call(lambda m, x: m.q(torch.cat([value(m.one(x)), value(m.two(x))], 1)), one=one, two=two, q=act())
            return Call(lambda m, x: torch.cat([value(m.q(m.one(x))), value(m.q(m.two(x)))], dim=1), one=one, two=two, q=act())
        if b.kind == "split":
            if c < 2:
                return act()
            half, self.c = c // 2, c - c // 2
            body = self.body(b, b.channels)
            self.c = half + b.channels
            run = lambda m, x: shuffled(torch.cat([value(m.q(value(x)[:, : m.half])), value(m.q(m.b(value(x)[:, m.half :])))], 1), m.groups)  # noqa: E731
            return Call(run, half=half, b=body, q=act(), groups=divisor(self.c, b.groups))
        if b.kind == "channels":
            options = {
                "scaling_per_output_channel": True,
                "per_channel_broadcastable_shape": (1, c, 1, 1),
                "scaling_stats_permute_dims": (1, 0, 2, 3),
            }
            scales = qnn.QuantReLU(bit_width=min(b.bits + 1, 8), return_quant_tensor=True, **options)
            return nn.Sequential(*self.tail(b, True), scales, convolution(b, c, c, 3, 1, c), nn.BatchNorm2d(c), act())
        if b.kind == "option":
            run = lambda m, x: m.out(m.q(m.b(x)) + nn.functional.pad(value(m.q(x))[:, :, :: m.s, :: m.s], (0, 0, 0, 0, 0, m.more)))  # noqa: E731
            return Call(run, s=stride, more=b.groups, q=act(), b=self.body(b, c + b.groups, stride), out=activation("relu", max(b.bits, 2)))
        if b.kind == "shift":
            fixed = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
            weight = torch.zeros(c, 1, 3, 3)
            weight[torch.arange(c), 0, torch.arange(c) % 3, (torch.arange(c) + b.groups) % 3] = 1.0
            fixed.weight = nn.Parameter(weight, requires_grad=False)
            return Call(lambda m, x: m.f(value(x)), f=fixed)
        if b.kind == "gate":
            gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                activation("identity", 6),
                convolution(replace(b, bias=True), c, c, 1, 1, 1),
                activation("sigmoid", 3),
            )
            return Call(lambda m, x: (lambda y: m.out(value(y) * value(m.gate(value(y)))))(m.p(x)), p=narrow, gate=gate, out=act())
        if b.kind == "move":
            crop = min(self.h, self.w) >= 4
            if crop:
                self.h, self.w = (self.h - 1) // 2, self.w - 1
            else:
                self.h, self.w = self.h + 1, self.w + 2
            run = (
                (lambda m, x: value(x)[:, m.order, 1::2, :-1][:, :, : m.h])
                if crop
                else (lambda m, x: nn.functional.pad(value(x), (1, 1, 0, 1)))
            )
            return Call(run, order=torch.arange(c - 1, -1, -1), h=self.h)
        return nn.Sequential(*self.tail(b, False), act())

    def head(self, spec: Spec, last: Block) -> nn.Module:
        features = self.c * self.h * self.w
        linear = lambda i: qnn.QuantLinear(i, 3, bias=True, weight_bit_width=max(last.weight_bits, 2))  # noqa: E731
        q = activation("identity", 5)
        if spec.head == "linear":
            return Call(lambda m, x: m.l(value(m.q(x)).flatten(1)), q=q, l=linear(features))
        if spec.head == "global":
            return Call(lambda m, x: m.l(value(m.q(x)).mean((2, 3))), q=q, l=linear(self.c))
        if spec.head == "conv":
            return nn.Sequential(q, convolution(replace(last, bias=True), self.c, 2, 1, 1, 1), nn.BatchNorm2d(2))
        if spec.head == "accumulator":
            return nn.Sequential(q, convolution(last, self.c, 4, 3, 1, 1))
        if spec.head == "mean":
            return nn.Sequential(q, convolution(last, self.c, 3, 1, 1, 1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if spec.head == "two":
            return Call(
                lambda m, x: (lambda y: (m.a(y), m.b(y).mean((2, 3)) * 2))(m.q(x)),
                q=q,
                a=convolution(last, self.c, 2, 1, 1, 1),
                b=convolution(last, self.c, 3, 1, 1, 1),
            )
        return q


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def build(spec: Spec) -> nn.Module:
    """The network of a spec, with settled quantizers and odd batch norm statistics."""
    torch.manual_seed(spec.seed)
    front: list[nn.Module] = []
    if spec.front in ("8", "6", "3"):
        front = [activation("identity", int(spec.front))]
    elif spec.front == "fixed":
        front = [activation("fixed", 6)]
    elif spec.front == "arithmetic":
        front = [Call(lambda m, x: (x - 0.1) / 0.7), activation("identity", 7)]
    builder = Builder(spec)
    blocks = [builder.block(b) for b in spec.blocks]
    model = nn.Sequential(*front, *blocks, builder.head(spec, spec.blocks[-1]))
    return settle(model, lambda random: spec.images(8, random), seed=spec.seed)
