"""How a layer lies in packed slices: how its rows are cut into segments, which packing its unit has, its cycles and its slices.

Two schemes of `quantlib.packing`, both exact (docs/packing.md, "In the hardware"):
- "conv": N neighbouring columns of a row meet K' taps of a kernel row. A stride of sw columns is sw phases, each a convolution of every
  sw-th column with every sw-th tap; the N + K' - 1 sums of a segment overlap with the next segment's.
- "mult": N neighbouring output columns meet the weights of M output channels, tap by tap; any stride and dilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import gcd
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from quantlib.hls.window import Window
from quantlib.ir import IntType
from quantlib.packing import Packing, Rule, candidates

# Every word fits its signed port for the codes that occur: `Packing.fits` decides about the lowest weight code, no bit is spared for it.
EXACT = Rule(sign_bit=True, spare_up_to=0, any_scheme=True)

# What a slice is worth in LUTs where one packing saves slices and another LUTs: the XCZU3EG has 196 LUTs per slice, the XC7Z020 242.
SLICE_LUTS = 200


@dataclass(frozen=True, eq=False)
class Layer:
    """The integers that decide how a layer may be packed; a Dense is a 1x1 convolution of one pixel. Equal layers are one object.

    x: (channels, rows, columns) of the input, y: of the output; padding: (top, bottom, left, right). weight_bits: signed, lowest: whether
    the code -2^(weight_bits - 1) occurs. An activation of in_bits bits is index * step + lo with an unsigned index of act_bits bits; zero:
    the index of 0 where the layer pads, else 0. sum_bits: of an output.
    """

    x: tuple[int, int, int]
    y: tuple[int, int, int]
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    weight_bits: int
    lowest: bool
    in_bits: int
    lo: int
    step: int
    act_bits: int
    zero: int
    sum_bits: int

    @property
    def depthwise(self) -> bool:
        """Every channel is a group of its own with one output."""
        return self.groups == self.x[0] == self.y[0]


_layer = cache(Layer)
_KNOWN: WeakKeyDictionary[Any, tuple[IntType, IntType, Layer]] = WeakKeyDictionary()


def layer_of(op: Any, x: IntType, y: IntType) -> Layer:
    """The layer of a Conv2d or of a Dense, looked at once however often a solver asks."""
    known = _KNOWN.get(op)
    if known is None or known[0] is not x or known[1] is not y:
        known = _KNOWN[op] = x, y, _look(op, x, y)
    return known[2]


def _look(op: Any, x: IntType, y: IntType) -> Layer:
    low, high = int(op.weight.min()), int(op.weight.max())
    bits = max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0) + 1
    dense = op.weight.ndim == 2
    image, out = ((t.numel, 1, 1) if dense else (t.shape[0], t.shape[1], t.shape[2]) for t in (x, y))
    one = (1, 1)
    kernel, stride, dilation = (one, one, one) if dense else (op.weight.shape[2:], op.stride, op.dilation)
    padding = (0, 0, 0, 0) if dense else op.padding
    lo, hi, step = x.lo, x.hi, x.step if x.levels > 1 else 1
    if any(padding):  # 0 is among the values
        lo, hi, step = min(lo, 0), max(hi, 0), gcd(step, lo)
    step &= -step  # an index is found by a shift
    zero, lowest, act_bits = -lo // step if any(padding) else 0, low == -(2 ** (bits - 1)), max(((hi - lo) // step).bit_length(), 1)
    groups = 1 if dense else op.groups
    return _layer(image, out, groups, kernel, stride, padding, dilation, bits, lowest, x.bits, lo, step, act_bits, zero, y.bits)


@dataclass(frozen=True, eq=False)
class Cut:
    """The rows of a layer in segments of n columns; get it from `cut`, which makes each but once."""

    layer: Layer
    n: int
    conv: bool

    @cached_property
    def phases(self) -> int:
        """Words per kernel row: residues of columns modulo the stride, or taps."""
        return self.layer.stride[1] if self.conv else self.layer.kernel[1]

    @cached_property
    def apart(self) -> int:
        """Columns between the phases."""
        return 1 if self.conv else self.layer.dilation[1]

    @cached_property
    def taps(self) -> int:
        """Taps that a segment meets at once."""
        return -(-self.layer.kernel[1] // self.phases)

    @cached_property
    def first(self) -> int:
        """The first step of columns that is read: padding need not be where its index is 0 and its sums are another segment's."""
        return min(self.taps - 1, self.layer.padding[2] // self.layer.stride[1]) if self.layer.zero == 0 else 0

    @cached_property
    def segments(self) -> int:
        """Per output row: as many as cover the columns that are read, without the padding on the right where the padding's index is 0."""
        last = self.layer.y[2] + self.taps - 2
        if self.layer.zero == 0:
            last = max(min(last, (self.layer.padding[2] + self.layer.x[2] - 1) // self.layer.stride[1]), self.layer.y[2] - 1)
        return -(-(last + 1 - self.first) // self.n)

    @cached_property
    def skipped(self) -> int:
        """Sums in front of the first output of a row."""
        return self.taps - 1 - self.first

    @cached_property
    def kept(self) -> int:
        """E, the sums of a segment that are written: N, more where the last one of a row ends with padding."""
        return max(self.n if self.segments > 1 else 1, self.skipped + self.layer.y[2] - (self.segments - 1) * self.n)

    @cached_property
    def alone(self) -> bool:
        """One column at a time, each a sum of its own: no segments are cut and none are put together."""
        return self.n == self.taps == 1

    @cached_property
    def windowed(self) -> bool:
        la = self.layer
        return not self.alone or (la.kernel, la.stride) != ((1, 1), (1, 1)) or any(la.padding)

    @cached_property
    def emitted(self) -> list[int]:
        """Pixels that the segments of a row complete, one after the other."""
        ends = [s * self.n + (self.kept if s + 1 == self.segments else self.n) for s in range(self.segments)]
        done = [min(max(e - self.skipped, 0), self.layer.y[2]) for e in ends]
        return [b - a for a, b in zip([0, *done], done)]

    @cached_property
    def ordered(self) -> int:
        """Iterations of the pixel stage for one block of channels: a segment is read, then each is written while the next is read."""
        return 1 + sum(max(n, 1) for n in self.emitted) * self.layer.y[1]

    @cached_property
    def input(self) -> IntType:
        """As far as stages of hardware look at it."""
        return IntType(self.layer.x, 0, 2**self.layer.in_bits - 1)

    @cached_property
    def late(self) -> int:
        """Output rows that are written when all of the image is read."""
        w = self.window(1, 1)
        return sum(w.need(r) == self.layer.x[1] for r in range(self.layer.y[1]))

    def window(self, lanes: int, groups: int) -> Window:
        """The window stage, or the one that cuts segments: its rows and paces are those of windows of kh x phases taps."""
        la = self.layer
        rows, dilation = (la.kernel[0], self.phases), (la.dilation[0], self.apart)
        return Window(self.input, lanes, groups, rows, la.stride, la.padding, dilation, (la.y[1], self.segments))


cut = cache(Cut)


@dataclass(frozen=True, eq=False)
class Way:
    """A packing of a layer, and what of it does not depend on the lanes.

    depth: products that may be summed before they are unpacked; trick: by the overlap trick. words: of weights per output channel (conv);
    weights: per word, channels in a "mult". parts: slices per word, of split operands both halves lie side by side. per_slice, per_chain:
    LUTs, see `Unit.luts`.
    """

    packing: Packing
    cut: Cut
    depth: int
    trick: bool
    words: int
    weights: int
    parts: int
    fields: int
    per_slice: int
    per_chain: int


def _way(p: Packing, c: Cut, depth: int, trick: bool) -> Way:
    parity = -(-p.acts * p.weights // 3) if trick else 0
    return Way(p, c, depth, trick, -(-c.taps // p.weights), p.weights, p.weight_parts * p.act_parts, p.fields,
               (p.weights - 1) * (p.part_bits[0] + 1) + parity, (p.fields - 1) * p.stride)  # fmt: skip


@cache
def _front(c: Cut, lanes: int, groups: int) -> int:
    """Iterations of the stage in front."""
    return c.window(lanes, groups).iterations


@dataclass(eq=False)
class Unit:
    """A layer on slices: pe output channels and simd input channels per cycle, of N columns and (in a "conv") all taps of a row.

    In a depthwise layer pe channels, simd = 1. Everything is counted here, once, for a solver that asks for very many.

    lanes: channels per word of the input. groups: parts of a pixel that are read one after the other, each for output channels of its own.
    blocks: of output channels; passes: of them per group, times that a word is worked on. steps: cycles per segment and block. words: of
    weights per cycle and input channel. slices; chains of them that are unpacked together, each of at most `chain`.
    iterations: of the unit, output rows * segments * blocks * steps; ordered: of the pixel stage; cycles: of the slowest stage.
    luts: per slice the borrow of each packed weight above the first (its bits + 1 each) and, with the overlap trick, the parity of the
    products (three ANDs per LUT); per chain the borrow of each field above the first (S bits each); per field an adder of the sum's width,
    and one per output where a constant is added. Our count of `quantlib.packing.unpack`.
    """

    layer: Layer
    way: Way
    pe: int
    simd: int
    lanes: int = field(init=False)
    groups: int = field(init=False)
    blocks: int = field(init=False)
    passes: int = field(init=False)
    steps: int = field(init=False)
    words: int = field(init=False)
    slices: int = field(init=False)
    chain: int = field(init=False)
    chains: int = field(init=False)
    iterations: int = field(init=False)
    ordered: int = field(init=False)
    luts: int = field(init=False)
    cycles: int = field(init=False)

    def __post_init__(self) -> None:
        la, way, c = self.layer, self.way, self.way.cut
        self.lanes, self.groups = (self.pe, la.x[0] // self.pe) if la.depthwise else (self.simd, la.groups)
        self.blocks = la.y[0] // self.pe
        self.passes = self.blocks // self.groups
        self.steps = la.kernel[0] * c.phases * la.x[0] // self.groups // self.lanes
        self.words = self.pe * way.words if c.conv else -(-self.pe // way.weights)
        self.slices, self.chain = self.words * way.parts * self.simd, min(way.depth, self.simd)
        self.chains = self.words * way.parts * -(-self.simd // way.depth)
        adders = self.chains * way.fields + (self.pe * c.kept if la.lo else 0)
        self.luts = self.slices * way.per_slice + self.chains * way.per_chain + adders * la.sum_bits
        self.iterations = la.y[1] * c.segments * self.blocks * self.steps
        self.ordered = 0 if c.alone else self.blocks * c.ordered
        self.cycles = max(self.iterations, self.ordered, _front(c, self.lanes, self.groups) if c.windowed else 0)

    @property
    def packing(self) -> Packing:
        return self.way.packing

    @property
    def cut(self) -> Cut:
        return self.way.cut

    @property
    def trick(self) -> bool:
        return self.way.trick

    @property
    def backlog(self) -> int:
        """Words that the unit works on while the stage in front only reads: with several blocks per word it is the slower one."""
        return -(-self.window.silence // self.passes) if self.cut.windowed and self.passes > 1 else 0

    @cached_property
    def window(self) -> Window:
        return self.cut.window(self.lanes, self.groups)

    def demand(self) -> tuple[np.ndarray]:
        """The blocks of a group need all its words."""
        groups = self.layer.y[1] * self.cut.segments * self.groups
        return (np.repeat(self.steps * np.arange(1, groups + 1), self.passes),)

    def pixel_demand(self) -> tuple[np.ndarray]:
        """As `Window.demand`: in the phase of a segment both directions are spread evenly, a write comes before a read."""
        found, before = [], self.blocks
        pixels = self.cut.emitted * self.layer.y[1]
        for k, n in enumerate(pixels):
            words, reads = self.blocks * n, self.blocks if k + 1 < len(pixels) else 0
            length = max(words, reads)
            found.append(before + (-(-np.arange(1, words + 1, dtype=np.int64) * length // max(words, 1)) - 1) * reads // length)
            before += reads
        return (np.concatenate(found),)


@cache
def packings(taps: int, weight_bits: int, lowest: bool, act_bits: int, dsp: str) -> tuple[Packing, ...]:
    """Packings of more than one product per slice and cycle whose words fit the slice for all codes that occur; of those alike, that with
    the longest sums."""
    found: dict[tuple[Any, ...], Packing] = {}
    for wide in candidates(taps, weight_bits, act_bits, dsp, EXACT):
        if wide.macs <= 1 or (wide.scheme == "conv") != (taps > 1):
            continue
        full = lowest or wide.weight_parts == 2  # the upper half of a weight may have its lowest code
        exact = next((p for s in range(wide.stride_max, wide.stride_min - 1, -1) if (p := wide.at(s)).fits(full) and p.depth(True)), None)
        if exact is not None:
            key = exact.scheme, exact.acts, exact.weights, exact.weight_parts, exact.act_parts
            if key not in found or exact.depth(True) > found[key].depth(True):
                found[key] = exact
    return tuple(found.values())


def _usable(layer: Layer, dsp: str) -> Iterator[Packing]:
    """Packings of both schemes that the layer can fill: no more columns than a row has, no more channels than there are."""
    taps, outputs = -(-layer.kernel[1] // layer.stride[1]), 1 if layer.depthwise else layer.y[0] // layer.groups
    schemes = (taps, 1) if taps > 1 and layer.dilation[1] == 1 else (1,)
    for p in (p for t in schemes for p in packings(t, layer.weight_bits, layer.lowest, layer.act_bits, dsp)):
        if p.acts <= layer.y[2] and (p.scheme == "conv" or p.weights <= outputs):
            yield p


@cache
def columns(layer: Layer, dsp: str) -> tuple[int, ...]:
    """Lengths of segments for which there is a packing that makes at least half as many products as the best."""
    found = [(p.acts, p.macs) for p in _usable(layer, dsp)]
    least = max((macs for _, macs in found), default=0) / 2
    return tuple(sorted({n for n, macs in found if macs >= least}))


@cache
def _ways(layer: Layer, n: int, dsp: str) -> list[Way]:
    """Packings of n columns, unpacked plainly, or by the overlap trick where that makes chains longer."""
    found: list[Way] = []
    for p in (p for p in _usable(layer, dsp) if p.acts == n):
        c, plain, trick = cut(layer, n, p.scheme == "conv"), p.depth(False), p.depth(True)
        found += [_way(p, c, plain, False)] if plain else []
        found += [_way(p, c, trick, True)] if plain < min(trick, layer.x[0] // layer.groups) else []
    return found


@cache
def unit(layer: Layer, pe: int, simd: int, n: int, dsp: str) -> Unit:
    """The unit for segments of n columns with the smallest product of cycles and area, a slice counted as SLICE_LUTS.

    Counted are the cycles of the slowest stage, so that segments which the stages around cannot feed count as what they are.
    """
    found = [Unit(layer, way, pe, simd) for way in _ways(layer, n, dsp)]
    return min(found, key=lambda u: u.cycles * (SLICE_LUTS * u.slices + u.luts))
