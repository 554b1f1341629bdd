"""Convolutions and dense layers that make several products per DSP slice: what ql_packed.hpp does, as data, and what it costs.

Two schemes of `quantlib.packing`, both exact (docs/packing.md, "In the hardware"):
- "conv": N neighbouring columns of a row meet K' taps of a kernel row. A stride of sw columns is sw phases, each a convolution of every
  sw-th column with every sw-th tap; the N + K' - 1 sums of a segment overlap with the next segment's.
- "mult": N neighbouring output columns meet the weights of M output channels, tap by tap; any stride and dilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, gcd
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from quantlib.cost import Cost, adder, fifo, loop, memory, window
from quantlib.hls.call import Call, Folds, Kernel, Port, Table, carrier, ctype, stream_order
from quantlib.hls.window import Window
from quantlib.ir import IntType
from quantlib.packing import DSPS, Packing, Rule, candidates

if TYPE_CHECKING:
    from quantlib.schedule import Folding

# Every word fits its signed port for the codes that occur: `Packing.fits` decides about the lowest weight code, no bit is spared for it.
EXACT = Rule(sign_bit=True, spare_up_to=0, any_scheme=True)

# What a slice is worth in LUTs where one packing saves slices and another LUTs: the XCZU3EG has 196 LUTs per slice, the XC7Z020 242.
SLICE_LUTS = 200


@dataclass(frozen=True)
class Layer:
    """The integers that decide how a layer may be packed; a Dense is a 1x1 convolution of one pixel.

    x: (channels, rows, columns) of the input, y: of the output; padding: (top, left). weight_bits: signed, lowest: whether the code
    -2^(weight_bits - 1) occurs. An activation is index * step + lo with an unsigned index of act_bits bits; zero: the index of 0 where the
    layer pads, else 0. sum_bits: of an output.
    """

    x: tuple[int, int, int]
    y: tuple[int, int, int]
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    padded: bool
    weight_bits: int
    lowest: bool
    lo: int
    step: int
    act_bits: int
    zero: int
    sum_bits: int

    @property
    def depthwise(self) -> bool:
        """Every channel is a group of its own with one output."""
        return self.groups == self.x[0] == self.y[0]


_RANGES: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


def layer_of(op: Any, x: IntType, y: IntType) -> Layer:
    """The layer of a Conv2d or of a Dense."""
    if op not in _RANGES:
        _RANGES[op] = int(op.weight.min()), int(op.weight.max())
    low, high = _RANGES[op]
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
    zero = -lo // step if any(padding) else 0
    return Layer(image, out, 1 if dense else op.groups, kernel, stride, (padding[0], padding[2]), dilation, any(padding), bits,
                 low == -(2 ** (bits - 1)), lo, step, max(((hi - lo) // step).bit_length(), 1), zero, y.bits)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A layer on slices: pe output channels and simd input channels per cycle, of N columns and (in a "conv") all taps of a row.

    In a depthwise layer pe channels, simd = 1.
    chain: products summed in the slices' adders before they are unpacked; trick: by the overlap trick.
    """

    layer: Layer
    pe: int
    simd: int
    packing: Packing
    chain: int
    trick: bool

    @property
    def conv(self) -> bool:
        return self.packing.scheme == "conv"

    @property
    def columns(self) -> int:
        """N, the columns per segment."""
        return self.packing.acts

    @property
    def phases(self) -> int:
        """Words per kernel row: residues of columns modulo the stride, or taps."""
        return self.layer.stride[1] if self.conv else self.layer.kernel[1]

    @property
    def taps(self) -> int:
        """Taps that a segment meets at once."""
        return -(-self.layer.kernel[1] // self.phases)

    @property
    def first(self) -> int:
        """The first step of columns that is read: padding need not be where its index is 0 and its sums are another segment's."""
        return min(self.taps - 1, self.layer.padding[1] // self.layer.stride[1]) if self.layer.zero == 0 else 0

    @cached_property
    def segments(self) -> int:
        """Per output row: as many as cover the columns that are read, without the padding on the right where the padding's index is 0."""
        (_, _, width), stride, padding, out = self.layer.x, self.layer.stride[1], self.layer.padding[1], self.layer.y[2]
        last = out + self.taps - 2
        if self.layer.zero == 0:
            last = max(min(last, (padding + width - 1) // stride), out - 1)
        return -(-(last + 1 - self.first) // self.columns)

    @property
    def skipped(self) -> int:
        """Sums in front of the first output of a row."""
        return self.taps - 1 - self.first

    @property
    def kept(self) -> int:
        """E, the sums of a segment that are written: N, more where the last one of a row ends with padding."""
        return max(self.columns if self.segments > 1 else 1, self.skipped + self.layer.y[2] - (self.segments - 1) * self.columns)

    @property
    def alone(self) -> bool:
        """One column at a time, each a sum of its own: no segments are cut and none are put together."""
        return self.columns == self.taps == 1

    @property
    def lanes(self) -> int:
        """Channels per word of the input."""
        return self.pe if self.layer.depthwise else self.simd

    @property
    def groups(self) -> int:
        """Parts of a pixel that are read one after the other, each for output channels of its own."""
        return self.layer.x[0] // self.pe if self.layer.depthwise else self.layer.groups

    @property
    def blocks(self) -> int:
        return self.layer.y[0] // self.pe

    @property
    def steps(self) -> int:
        """Cycles per segment and block of output channels."""
        return self.layer.kernel[0] * self.phases * self.layer.x[0] // self.groups // self.lanes

    @property
    def passes(self) -> int:
        """Times that a word is worked on: blocks of output channels per group."""
        return self.blocks // self.groups

    @property
    def backlog(self) -> int:
        """Words that the unit works on while the stage in front only reads: with several blocks per word it is the slower one."""
        return -(-self.window(IntType(self.layer.x, 0, 1)).silence // self.passes) if self.windowed and self.passes > 1 else 0

    @property
    def words(self) -> int:
        """Words of weights per cycle and input channel."""
        return self.pe * -(-self.taps // self.packing.weights) if self.conv else -(-self.pe // self.packing.weights)

    @property
    def parts(self) -> int:
        return self.packing.weight_parts * self.packing.act_parts

    @property
    def slices(self) -> int:
        return self.words * self.simd * self.parts

    @property
    def iterations(self) -> int:
        """Of the unit: output rows * segments * blocks * steps."""
        return self.layer.y[1] * self.segments * self.blocks * self.steps

    def demand(self) -> tuple[np.ndarray]:
        """The blocks of a group need all its words."""
        groups = self.layer.y[1] * self.segments * self.groups
        return (np.repeat(self.steps * np.arange(1, groups + 1), self.passes),)

    def emitted(self) -> list[int]:
        """Pixels that the segments of a row complete, one after the other."""
        ends = [s * self.columns + (self.kept if s + 1 == self.segments else self.columns) for s in range(self.segments)]
        done = [min(max(e - self.skipped, 0), self.layer.y[2]) for e in ends]
        return [b - a for a, b in zip([0, *done], done)]

    def paces(self) -> list[tuple[int, int]]:
        """(words written, words read) of the pixel stage, for every segment of an image."""
        phases = [(self.blocks * n, self.blocks) for n in self.emitted()] * self.layer.y[1]
        return [*phases[:-1], (phases[-1][0], 0)]

    @cached_property
    def reordered(self) -> int:
        """Iterations of the pixel stage."""
        row = [max(self.blocks * n, self.blocks) for n in self.emitted()]
        return self.blocks + sum(row) * self.layer.y[1] - row[-1] + self.blocks * self.emitted()[-1]

    def pixel_demand(self) -> tuple[np.ndarray]:
        """As `Window.demand`: both directions are spread evenly over a segment's iterations, a write comes before a read."""
        found, before = [], self.blocks
        for words, reads in self.paces():
            length = max(words, reads)
            found.append(before + (-(-np.arange(1, words + 1, dtype=np.int64) * length // max(words, 1)) - 1) * reads // length)
            before += reads
        return (np.concatenate(found),)

    def window(self, x: IntType) -> Window:
        """The window stage, or the one that cuts segments: its rows and paces are those of windows of kh x phases taps."""
        apart = 1 if self.conv else self.layer.dilation[1]
        return _window(self.layer, x, self.lanes, self.groups, self.phases, apart, self.segments)

    @property
    def windowed(self) -> bool:
        la = self.layer
        return not self.alone or (la.kernel, la.stride, la.padded) != ((1, 1), (1, 1), False)

    @cached_property
    def cycles(self) -> int:
        """Of the slowest stage."""
        stages = [self.iterations]
        if self.windowed:
            stages.append(_paced(self.layer, self.lanes, self.groups, self.phases, self.segments))
        return max(stages if self.alone else [*stages, self.reordered])


@cache
def _paced(layer: Layer, lanes: int, groups: int, phases: int, segments: int) -> int:
    """Iterations of the stage in front."""
    return _window(layer, IntType(layer.x, 0, 1), lanes, groups, phases, layer.dilation[1], segments).iterations


def _window(layer: Layer, x: IntType, lanes: int, groups: int, phases: int, apart: int, segments: int) -> Window:
    padding, rows = (layer.padding[0], 0, layer.padding[1], 0), (layer.kernel[0], phases)
    return Window(x, lanes, groups, rows, layer.stride, padding, (layer.dilation[0], apart), (layer.y[1], segments))


def unit_cost(u: Unit) -> Cost:
    """Slices and what surrounds them, without memories: per chain of slices its fields are taken apart and added to the sums.

    lut: per slice the borrow of each packed weight above the first (weight bits + 1 each); per chain the borrow of each field above the
    first (S bits each), with the overlap trick the parity of the products in a field (three ANDs per LUT); per field an adder of the sum's
    width. Our count; the arithmetic is that of `quantlib.packing.unpack`.
    """
    p, la = u.packing, u.layer
    chains = u.words * u.parts * ceil(u.simd / u.chain)
    lut = u.slices * (p.weights - 1) * (p.part_bits[0] + 1) + chains * (p.fields - 1) * p.stride
    if u.trick:
        lut += ceil(u.slices * p.acts * p.weights / 3)
    cost = Cost(lut=lut, ff=u.slices * sum(p.part_bits) + chains * p.fields * p.stride, dsp=u.slices)
    cost += adder(la.sum_bits).times(chains * p.fields)
    if la.lo:
        cost += adder(la.sum_bits).times(u.pe * u.kept)
    return cost


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
    found = list(_usable(layer, dsp))
    return tuple(sorted({p.acts for p in found if 2 * p.macs >= max(q.macs for q in found)}))


@cache
def unit(layer: Layer, pe: int, simd: int, n: int, dsp: str) -> Unit:
    """The unit for segments of n columns with the smallest product of cycles and area, a slice counted as SLICE_LUTS.

    Counted are the cycles of the slowest stage, so that segments which the stages around cannot feed count as what they are.
    """
    found = []
    for p in (p for p in _usable(layer, dsp) if p.acts == n):
        options = [Unit(layer, pe, simd, p, min(depth, simd), trick) for trick in (False, True) if (depth := p.depth(trick))]
        found.append(min(options, key=lambda u: unit_cost(u).lut))
    return min(found, key=lambda u: u.cycles * (SLICE_LUTS * u.slices + unit_cost(u).lut))


def packed_folds(op: Any, x: IntType, y: IntType) -> tuple[dict[str, Folds], str]:
    """The slices that take several products of the layer at once, with the legal foldings, and why others do not.

    taps of a folding are then the neighbouring columns that the unit works on per cycle, N.
    """
    layer = layer_of(op, x, y)
    limits = (layer.y[0], 1) if layer.depthwise else (layer.y[0] // layer.groups, layer.x[0] // layer.groups)
    bits = f"{layer.weight_bits}-bit weights and {layer.act_bits}-bit activations"
    why = f"no slice makes more than one product of {bits} per cycle"
    return {dsp: Folds(*limits, taps) for dsp in DSPS if (taps := columns(layer, dsp))}, why


def weight_table(op: Any, u: Unit, x: IntType) -> np.ndarray:
    """(rows, words, simd, K): one row per iteration; a word holds the taps of a channel, last one first, or the channels of a tap."""
    weight, k = op.weight, u.packing.weights
    if weight.ndim == 2:
        weight = weight[:, stream_order(np.arange(weight.shape[1]).reshape(x.shape))][:, :, None, None]
    o, c, kh, kw = weight.shape
    taps = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, u.taps * u.phases - kw))).reshape(o, c, kh, u.taps, u.phases)[:, :, :, ::-1]
    lanes = taps.transpose(0, 2, 4, 1, 3).reshape(u.blocks, u.pe, u.steps, u.simd, u.taps)
    if u.conv:
        lanes = np.pad(lanes, ((0, 0),) * 4 + ((0, -u.taps % k),)).reshape(u.blocks, u.pe, u.steps, u.simd, -1, k)
        return lanes.transpose(0, 2, 1, 4, 3, 5).reshape(u.blocks * u.steps, u.words, u.simd, k)
    lanes = np.pad(lanes[..., 0], ((0, 0), (0, -u.pe % k), (0, 0), (0, 0))).reshape(u.blocks, u.words, k, u.steps, u.simd)
    return lanes.transpose(0, 3, 1, 4, 2).reshape(u.blocks * u.steps, u.words, u.simd, k)


def packed_hls(op: Any, x: IntType, y: IntType, folding: Folding) -> Call:
    """Segments of N columns, the unit, and the stage that puts pixels in order; with N = 1 and one tap the unit alone, behind windows where
    there are any. Iterations per image: those of `Unit`."""
    u = unit_of(op, x, y, folding)
    la, kernels = u.layer, list[Kernel]()
    ends = Port(ctype(x), u.lanes, x.numel // u.lanes)
    index: tuple[int, int] = la.lo, la.step.bit_length() - 1
    if u.windowed:
        w = u.window(x)
        if u.alone:
            kernels.append(w.stage())
        else:
            words = la.y[1] * u.segments * u.groups * u.steps
            cut = Port(f"ap_uint<{la.act_bits}>", u.columns * u.lanes, words)
            cuts = (*la.x[1:], u.groups, w.parts, la.kernel[0], u.phases, *la.stride, la.padding[0], la.dilation[0], w.dilation[1], la.y[1],
                    u.segments, u.first * la.stride[1] - la.padding[1], *index, la.zero)  # fmt: skip
            kernels.append(Kernel("segments", "ql_packed.hpp", "ql::segments", cuts, (ends,), cut, w.iterations, w.demand))
            index = 0, 0  # done
        ends = kernels[-1].output
    sums = Port(ctype(y), u.kept * u.pe, la.y[1] * u.segments * u.blocks)
    args = (*_arguments(u, 3 * op.magnitude(x)), *index, la.step)
    label = "" if u.alone else "packed"
    kernels.append(Kernel(label, "ql_packed.hpp", "ql::packed", args, (ends,), sums, u.iterations, u.demand, _tables(op, u, x), u.backlog))
    if not u.alone:
        ordered = la.y[1], u.segments, u.blocks, u.columns, u.kept, u.skipped, la.y[2], u.reordered
        kernels.append(Kernel("", "ql_packed.hpp", "ql::pixels", ordered, (sums,), Port(ctype(y), u.pe, y.numel // u.pe), u.reordered,
                              u.pixel_demand))  # fmt: skip
    return Call(tuple(kernels))


def unit_of(op: Any, x: IntType, y: IntType, folding: Folding) -> Unit:
    """The unit of a layer with this folding, which `packed_folds` must offer."""
    return unit(layer_of(op, x, y), folding.pe, folding.simd, folding.taps, folding.packing)


def _arguments(u: Unit, magnitude: int) -> tuple[str | int, ...]:
    """magnitude: bound on the constant of a channel and on a sum of indices times the step together."""
    p = u.packing
    fields = p.strides[0] // p.stride, p.strides[1] // p.stride
    layout = (not u.conv, p.acts, p.weights, *fields, p.stride, p.act_bits, p.weight_bits, p.act_parts, p.weight_parts, u.chain, u.trick,
              p.act_port, p.weight_port, p.dsp.accumulator)  # fmt: skip
    packing = f"ql::Packing<{', '.join(str(v).lower() for v in layout)}>"
    loops = u.layer.y[1], u.segments, u.groups, u.passes, u.steps
    return packing, carrier(magnitude), u.layer.depthwise, *loops, u.taps, u.kept


def _tables(op: Any, u: Unit, x: IntType) -> tuple[Table, ...]:
    weight = Table("weight", lambda: weight_table(op, u, x))
    if not u.layer.lo:
        return (weight,)
    return weight, Table("base", lambda: u.layer.lo * op.weight.reshape(len(op.weight), -1).sum(1).reshape(u.blocks, u.pe))


def packed_cost(op: Any, x: IntType, y: IntType, folding: Folding) -> Cost:
    """The unit with its weights, the words it holds and the sums it carries on, and the stages around it: banks of image rows in front,
    two segments of sums behind. cycles: those of the slowest stage."""
    u = unit_of(op, x, y, folding)
    la, bits = u.layer, u.kept * u.pe * u.layer.sum_bits
    cost = unit_cost(u) + memory(u.blocks * u.steps, u.simd * u.taps * la.weight_bits, folding.memory).times(u.pe)
    cost += memory(u.steps, u.columns * u.lanes * la.act_bits) + memory(u.blocks, u.pe * (u.taps - 1) * la.sum_bits, "lut")
    cost += loop(u.iterations, bits)
    if la.lo:
        cost += adder(la.act_bits).times(u.lanes)
    if not u.windowed:  # it reads nothing while it makes further outputs of a pixel
        places = la.y[1] * la.y[2]
        return cost + Cost(fill=1 / places, pause=(1 - u.groups / u.blocks) / (places * u.groups))
    if u.alone:
        return cost + window(x, y, (la.kernel, la.stride, op.padding, la.dilation), u.lanes, burst=u.steps, passes=u.passes)
    w, word = u.window(x), u.columns * u.lanes * la.act_bits
    banks = u.columns * la.stride[1]
    held = memory(w.rows * -(-la.x[2] // banks) * u.groups * w.parts, u.lanes * la.act_bits).times(banks)
    choice = Cost(lut=word * (1 + ceil(banks / 4) * (u.phases > 1)))  # of a bank, four per LUT, and of the padding
    last = sum(w.need(r) == la.x[1] for r in range(la.y[1]))  # rows of segments that are written when all is read
    pause = last * w.fetches / w.iterations if u.iterations <= w.iterations else last / la.y[1] * (1 - w.silence / u.iterations)
    cost += loop(w.iterations, word, w.need(0) / la.x[1], pause) + held + choice + fifo(max(32, u.steps + u.backlog), word)
    order = memory(2 * u.blocks, bits, "lut") + Cost(lut=u.pe * la.sum_bits * ceil(u.kept / 4))
    return cost + loop(u.reordered, u.pe * la.sum_bits) + order + fifo(max(32, u.blocks), bits)
