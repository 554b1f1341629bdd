"""What a choice of widths costs, as differentiable scalars of a supernet: cost(net) is the expectation under the shares of all layers.

A cost is a price for one layer at given widths, price(geometry, weight_bits, act_bits) -> float. Any such function makes one:

    macs_at_8_bits = Cost("macs at 8 bits", lambda layer, w, a: layer.macs * (w > 4) * 1e-6)
    loss = task + 1e-3 * macs_at_8_bits(net)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import ceil, log2, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.ir import IntType
from quantlib.ops import Op
from quantlib.packing import factor_published
from quantlib.parts import RESOURCES, Part
from quantlib.parts import part as find_part
from quantlib.schedule import Folding
from quantlib.search.geometry import Geometry, SearchError
from quantlib.search.mixed import MixedWeights
from quantlib.search.supernet import Bits, layers, read_bits

Price = Callable[[Geometry, int, int], float]
Factor = Callable[[int, int, int], Any]


@dataclass(frozen=True)
class Cost:
    """c(net) = scale(first searched layer) * sum over layers l of sum_ij p_i q_j price(l, w_i, a_j), with p and q the shares of weight and
    activation widths: differentiable in the alphas, a number of its own for every layer.

    Gradient:  exact, through the softmaxes
    `at(net, bits)` is the same for given bits (by default those found), where every share is 0 or 1.
    """

    name: str
    price: Price
    scale: Callable[[Geometry], float] = field(default=lambda first: 1.0)

    def __call__(self, net: nn.Module) -> Tensor:
        found = layers(net)
        total = sum((expected(layer, self.price) for layer in found), found[0].alpha_weight.new_zeros(()))
        return total * self.scale(found[0].geometry())

    def at(self, net: nn.Module, bits: Bits | None = None) -> float:
        chosen, found = bits or read_bits(net), layers(net)
        prices = (self.price(m.geometry(), w, a) for m, w, a in zip(found, chosen.weight_bits, chosen.act_bits, strict=True))
        return sum(prices) * self.scale(found[0].geometry())


def expected(layer: MixedWeights, price: Price) -> Tensor:
    """sum_ij p_i q_j price(layer, w_i, a_j): the expected price of one layer."""
    p, (act_bits, q) = layer.shares(), layer.input_shares()
    return p @ _table(price, layer.geometry(), layer.bits, act_bits, p.dtype, p.device) @ q


@lru_cache(maxsize=4096)
def _table(
    price: Price, layer: Geometry, weight_bits: tuple[int, ...], act_bits: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    rows = [[float(price(layer, w, a)) for a in act_bits] for w in weight_bits]
    return torch.tensor(rows, dtype=dtype, device=device)


def total(net: nn.Module, weights: dict[Callable[[nn.Module], Tensor], float]) -> Tensor:
    """sum of coefficient * cost(net): the term beside the task's loss."""
    return sum((factor * cost(net) for cost, factor in weights.items()), torch.zeros((), device=next(net.parameters()).device))


# The published terms. Sizes are in millions of MACs and of weights, memories in thousands of activations.


def size(layer: Geometry) -> float:
    """in * out * k^2 / groups / stride^2 * H_in * W_in * 1e-6."""
    return layer.weights * 1e-6 / prod(layer.stride) * prod(layer.in_size)


def _memory(layer: Geometry) -> float:
    return layer.in_channels * prod(layer.in_size) * 1e-3


def _line_buffer(layer: Geometry) -> int:
    rows = 2 if layer.kernel[0] == 1 else layer.kernel[0] + 1
    return rows * layer.in_size[1] * layer.in_channels


def packing(factor: Factor) -> Cost:
    """(64 / size_0) * sum_l size_l * sum_ij p_i q_j / factor(k, w_i, a_j): DSP slices, with factor(k, w, a) products per slice and cycle.

    k is the width of the kernel. `quantlib.packing.factor_safe` has an answer for any kernel and bits.
    """
    return Cost(f"packing by {getattr(factor, '__name__', factor)}", _Packed(factor), lambda first: 64 / size(first))


@dataclass(frozen=True)
class _Packed:
    factor: Factor

    def __call__(self, layer: Geometry, w: int, a: int) -> float:
        try:
            return size(layer) / float(self.factor(layer.kernel[1], w, a))
        except ValueError as error:
            raise SearchError(f"{layer.name}: {error}") from None


# Published, with the packing table of the published code (kernels 1, 3, 5; 2 to 8 bits).
complexity = packing(factor_published)
# Published: (1 / size_0) * sum_l size_l * E[w] * E[a].
complexity_trivial = Cost("trivial complexity", lambda layer, w, a: size(layer) * w * a, lambda first: 1 / size(first))
# Published: (64 / mem_0) * sum_l (weights_l * 1e-3 * E[w] + 1e-3 * B_l * E[a]), B_l the activations of 2 (1x1 kernels) or k + 1 image rows.
bram = Cost("block RAM", lambda layer, w, a: layer.weights * 1e-3 * w + 1e-3 * _line_buffer(layer) * a, lambda first: 64 / _memory(first))
# Millions of one-bit products: MACs * w * a.
bit_operations = Cost("bit operations", lambda layer, w, a: layer.macs * 1e-6 * w * a)


def _micronet(layer: Geometry, w: int, a: int) -> float:
    taps = layer.in_channels if layer.linear else prod(layer.kernel) * (layer.out_channels // layer.groups)
    sum_bits = ceil(log2(max((2**a - 1) * (2**w - 2) * taps, 2)))
    return layer.weights * w / (6.9e6 * 32) + layer.macs * (max(w, a) + sum_bits) / (1170e6 * 32)


# Score of the MicroNet challenge 2019 (CIFAR-free track: relative to MobileNetV2-1.4): weight storage, and multiplications and additions at
# their widths, with the accumulator widths of the published count. Only searched layers.
micronet = Cost("MicroNet", _micronet)


# Our own hardware model.


@dataclass(frozen=True)
class Hardware:
    """Expected resources on a part at a speed, by the formulas of `ql.estimate`, as the largest share of what may be used: below 1 it fits.

    Every layer has the folding that takes the smallest sum of shares of the budget and at most clock / fps cycles (the fastest one where
    none is fast enough); layers that are not searched count with the bits they keep. Convolutions and matrix products only: a plan has
    thresholds, pools and FIFOs besides. resource: the share of that one alone ("dsp", "lut", ...).

    Gradient:  that of the expectation of the resource with the largest share
    Errors:    LookupError for an unknown part, ValueError for an unknown resource or one that the part has none of
    """

    part: str = "xczu3eg"
    fps: float = 30.0
    clock_mhz: float | None = None
    resource: str | None = None

    def __post_init__(self) -> None:
        budget = find_part(self.part).budget()
        if self.resource is not None and not budget.get(self.resource):
            raise ValueError(f"{self.part} has no {self.resource!r} to give; there are {', '.join(r for r in budget if budget[r])}")
        if not self.fps > 0:
            raise ValueError(f"fps = {self.fps} must be positive")

    @property
    def cycles(self) -> int:
        """Most cycles per image."""
        return int((self.clock_mhz or find_part(self.part).clock_mhz) * 1e6 / self.fps + 1e-6)

    def usage(self, net: nn.Module) -> dict[str, Tensor]:
        """Expected use of each resource."""
        found = layers(net)
        kept = [_usage(k.geometry, k.weight_bits, k.act_bits, self.part, self.cycles) for k in net.kept_layers]  # type: ignore[union-attr]
        sums = {}
        for index, resource in enumerate(RESOURCES):
            price = _Usage(self.part, self.cycles, index)
            constant = float(sum(k[index] for k in kept))
            sums[resource] = sum((expected(m, price) for m in found), found[0].alpha_weight.new_full((), constant))
        return sums

    def __call__(self, net: nn.Module) -> Tensor:
        budget = find_part(self.part).budget()
        usage = self.usage(net)
        wanted = [self.resource] if self.resource else [r for r in RESOURCES if budget[r]]
        return torch.stack([usage[r] / budget[r] for r in wanted]).amax()


@dataclass(frozen=True)
class _Usage:
    part: str
    cycles: int
    index: int

    def __call__(self, layer: Geometry, w: int, a: int) -> float:
        return _usage(layer, w, a, self.part, self.cycles)[self.index]


def _usage(layer: Geometry, w: int, a: int, part: str, cycles: int) -> tuple[int, ...]:
    return _cheapest(layer, w, a, find_part(part), cycles)[1]


@cache
def _cheapest(layer: Geometry, w: int, a: int, device: Part, cycles: int) -> tuple[Folding, tuple[int, ...], int]:
    """(folding, resources, cycles) of one layer; see `Hardware`."""
    op = _operation(layer, w)
    x = IntType((layer.in_channels, *layer.in_size) if not layer.linear else (layer.in_channels,), 0, 2**a - 1)
    taps = layer.weights // layer.out_channels
    ends = -(2 ** (w - 1)) * taps * x.hi, (2 ** (w - 1) - 1) * taps * x.hi
    y = IntType((layer.out_channels, *layer.out_size) if not layer.linear else (layer.out_channels,), ends[0], max(ends[1], 1))
    budget = np.array([max(float(v), 1e-9) for v in device.budget().values()])
    best: tuple[tuple[Any, ...], Folding, tuple[int, ...], int] | None = None
    for pe, simd, lanes in op.folds((x,), y):
        folding = Folding(pe, simd, taps=lanes)
        cost = op.cost((x,), y, folding)
        taken = tuple(int(getattr(cost, r)) for r in RESOURCES)
        late = max(cost.cycles - cycles, 0)
        key = (late, float((np.array(taken) / budget).sum()), pe, simd, lanes)
        if best is None or key < best[0]:
            best = key, folding, taken, cost.cycles
    assert best is not None, "one lane is a folding of every layer"
    return best[1:]


@cache
def _operation(layer: Geometry, bits: int) -> Op:
    """The integer op of the layer, its weights at both ends of their range: formulas look at widths and sizes only."""
    from quantlib.ops.conv2d import Conv2d
    from quantlib.ops.dense import Dense

    ends = np.resize([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1], layer.weights)
    if layer.linear:
        return Dense(ends.reshape(layer.out_channels, -1))
    rows, columns = layer.padding
    weight = ends.reshape(layer.out_channels, -1, *layer.kernel)
    return Conv2d(weight, layer.stride, (rows, rows, columns, columns), layer.dilation, layer.groups)


hardware = Hardware  # as a cost: hardware("xczu3eg", fps=200, resource="dsp")(net)


# Figures of the published search, of the bits found and in expectation.


def figures(net: nn.Module, bits: Bits | None = None, factor: Factor = factor_published) -> dict[str, float]:
    """What the published search reports, of the bits found or of `bits`.

    bitops: sum of size * w * a; bita: sum of memory * a; bitw: millions of weights * w; dsps: sum of size / factor. With "mix" before the
    name: in expectation. mixbram_weight, mixbram_cache: as published, where the cache of kernels above 1 has the outputs per group as a
    factor besides, which the cost term `bram` does not have.
    """
    found, bits = layers(net), bits or read_bits(net)
    packed = _Packed(factor)
    prices: dict[str, Price] = {
        "bitops": lambda layer, w, a: size(layer) * w * a,
        "bita": lambda layer, w, a: _memory(layer) * a,
        "bitw": lambda layer, w, a: layer.weights * 1e-6 * w,
        "dsps": packed,
    }
    only_mixed: dict[str, Price] = {
        "bram_weight": lambda layer, w, a: layer.weights * 1e-3 * w,
        "bram_cache": lambda layer, w, a: (
            1e-3 * _line_buffer(layer) * a * (layer.out_channels // layer.groups if layer.kernel[0] > 1 else 1)
        ),
    }
    chosen = list(zip(found, bits.weight_bits, bits.act_bits, strict=True))
    out = {name: float(sum(price(m.geometry(), w, a) for m, w, a in chosen)) for name, price in prices.items()}
    with torch.no_grad():
        for name, price in (prices | only_mixed).items():
            out[f"mix{name}"] = float(sum(_expected_once(m, price) for m in found))
    return out


def _expected_once(layer: MixedWeights, price: Price) -> float:
    """As `expected`, without keeping the table of a price that is made anew each time."""
    (acts, q), p = layer.input_shares(), layer.shares()
    table: Sequence[Sequence[float]] = [[price(layer.geometry(), w, a) for a in acts] for w in layer.bits]
    return float(p.double() @ torch.tensor(table, dtype=torch.float64, device=p.device) @ q.double())
