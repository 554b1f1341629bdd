"""What a piece of hardware takes: Cost, and the handful of formulas from which every op's cost is put together.

The formulas are thin on purpose: first-order counts for devices with 6-input LUTs. They choose foldings and tell whether a network fits;
a synthesis report replaces them. Nothing here was fitted to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import ceil, gcd, log2, prod
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from quantlib.ir import IntType

if TYPE_CHECKING:
    from quantlib.schedule import Folding

# A product of two words at least this wide goes to a DSP slice: below, LUTs are cheaper and DSPs are few.
DSP_FROM_BITS = 6
# The DSP48E1/E2 multiplier is 25 (27) x 18 bits: UG479 and UG579, "Multiplier"; the narrower figure holds on both.
DSP_WIDE, DSP_NARROW = 25, 18
# A memory below this many bits stays in LUTs under memory="auto": a quarter of an 18-kbit block.
BRAM_FROM_BITS = 4_608


@dataclass(frozen=True)
class Cost:
    """Resources of a node and its time.

    lut: 6-input LUTs; ff: flip-flops; dsp: DSP48 slices; bram18: block RAMs of 18 kbit; uram: UltraRAMs of 288 kbit;
    cycles: clock cycles per image in steady state (iterations of the slowest loop, II = 1);
    pause: the share (0..1) of its cycles in which it reads nothing, one after the other: that much of an image waits in front of it.

    `a + b` adds the resources and keeps the larger cycles and pause: stages of a dataflow run at the same time.
    """

    lut: int = 0
    ff: int = 0
    dsp: int = 0
    bram18: int = 0
    uram: int = 0
    cycles: int = 0
    pause: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.lut + other.lut,
            self.ff + other.ff,
            self.dsp + other.dsp,
            self.bram18 + other.bram18,
            self.uram + other.uram,
            max(self.cycles, other.cycles),
            max(self.pause, other.pause),
        )

    def times(self, copies: int) -> Cost:
        """`copies` of the same hardware side by side; the time stays."""
        n = copies
        return Cost(self.lut * n, self.ff * n, self.dsp * n, self.bram18 * n, self.uram * n, self.cycles, self.pause)

    def to_dict(self) -> dict[str, int | float]:
        return asdict(self)


def loop(cycles: int, bits: int, pause: float = 0.0) -> Cost:
    """The control of one pipelined loop: counters, handshakes and two pipeline registers of the word it moves (our estimate)."""
    return Cost(lut=40 + 2 * max(cycles, 1).bit_length(), ff=40 + 2 * bits, cycles=cycles, pause=pause)


def adder(bits: int) -> Cost:
    """One LUT per bit and its register: UG574, carry logic (CARRY8)."""
    return Cost(lut=bits, ff=bits)


def compare(bits: int) -> Cost:
    """n >= T on `bits` bits, a carry chain that takes two bits per LUT: UG574, carry logic."""
    return Cost(lut=ceil(bits / 2))


def multiply(a: int, b: int) -> Cost:
    """Product of an a-bit and a b-bit word: LUTs below DSP_FROM_BITS on either side, else DSP48s.

    In LUTs about a*b, one per bit of the product array and its share of the adders; that LUTs grow with the product of the widths is
    the model of FINN-R (Blott et al., arXiv 1809.04570), the factor 1 is ours. A factor of one bit costs an AND or a negation.
    """
    small, large = sorted((a, b))
    if small <= 1:
        return Cost(lut=ceil(large / 2), ff=large)
    if small < DSP_FROM_BITS:
        return Cost(lut=a * b, ff=a + b)
    return Cost(dsp=ceil(small / DSP_NARROW) * ceil(large / DSP_WIDE), ff=a + b)


def xnor_popcount(lanes: int) -> Cost:
    """+-1 times +-1 on `lanes` lanes and the count: about 1.1 LUT per lane, the XNOR merged into the first row of 6-input compressors.

    The XNOR-popcount datapath is that of FINN (Umuroglu et al., arXiv 1612.07119); the factor is our count of a 6:3 compressor tree.
    """
    return Cost(lut=ceil(1.1 * lanes) + lanes.bit_length(), ff=lanes.bit_length())


def adder_tree(lanes: int, bits: int) -> Cost:
    """Sum of `lanes` words of `bits` bits: lanes - 1 adders that grow by one bit per level."""
    total, width, level = Cost(), bits, lanes
    while level > 1:
        total += adder(width + 1).times(level // 2)
        level, width = ceil(level / 2), width + 1
    return total


def plus_minus_one(x: IntType) -> bool:
    """Whether every integer of the edge is +1 or -1: one bit in arithmetic."""
    return (x.lo, x.hi, x.step) == (-1, 1, 2)


def dot(lanes: int, x: IntType, weight: Words, sum_bits: int) -> Cost:
    """`lanes` products and their sum into an accumulator of `sum_bits` bits."""
    return _dot(lanes, 0 if plus_minus_one(x) and weight.bipolar else x.bits, weight.bits, sum_bits)


@cache
def _dot(lanes: int, bits: int, weight_bits: int, sum_bits: int) -> Cost:
    """bits: of an input, 0 where inputs and weights are +-1."""
    if not bits:
        return xnor_popcount(lanes) + adder(sum_bits)
    return multiply(bits, weight_bits).times(lanes) + adder_tree(lanes, min(sum_bits, bits + weight_bits)) + adder(sum_bits)


@dataclass(frozen=True)
class Words:
    """The words of a table: how many bits each takes, and whether they are +1 and -1 only (then one bit)."""

    bits: int
    bipolar: bool


_WORDS: WeakKeyDictionary[object, dict[str, Words]] = WeakKeyDictionary()


def words(op: object, *names: str) -> Words:
    """Width of the integers in these arrays of an op together; looked at once per op, however often its cost is asked for."""
    known = _WORDS.setdefault(op, {})
    key = " ".join(names)
    if key not in known:
        arrays = [np.asarray(v) for n in names if (v := getattr(op, n)) is not None]
        lo, hi = min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)
        bipolar = all(bool((np.abs(a) == 1).all()) for a in arrays)
        known[key] = Words(1 if bipolar else IntType((1,), lo, hi).bits, bipolar)
    return known[key]


def count(levels: int, bits: int) -> Cost:
    """#{k : v >= T[k]} of one lane: a compare per threshold up to 15, a binary search in a pipeline of log2 steps above."""
    if levels <= 15:
        return compare(bits).times(levels) + Cost(lut=levels, ff=levels.bit_length())
    return (compare(bits) + Cost(ff=2 * bits)).times(levels.bit_length())


def mac(pixels: int, outputs: int, terms: int, x: IntType, weight: Words, sum_bits: int, pe: int, simd: int, style: str) -> Cost:
    """pe sums of simd products per cycle over pixels * outputs/pe * terms/simd cycles, with one weight memory per pe.

    The PE x SIMD arrangement of a matrix-vector unit is that of FINN (Umuroglu et al., arXiv 1612.07119, section 4.2).
    """
    steps = (outputs // pe) * (terms // simd)
    if style == "stream":  # every row of weights comes over a 64-bit bus, once per pixel
        bits = max(weight.bits, 2 if weight.bipolar else 1)  # -1 and 1 go as integers
        fetch = loop(pixels * steps * ceil(pe * simd / (64 // bits)), pe * simd * bits) + fifo(32, pe * simd * bits)
        return loop(pixels * steps, pe * sum_bits) + dot(simd, x, weight, sum_bits).times(pe) + fetch
    unit = dot(simd, x, weight, sum_bits) + memory(steps, simd * weight.bits, style)
    return loop(pixels * steps, pe * sum_bits) + unit.times(pe)


def table(entries: int, bits: int, pe: int) -> Cost:
    """Per-channel constants, `entries` channels of `bits` bits: one memory per lane, none where all channels share one."""
    return memory(entries // pe, bits).times(pe) if entries > 1 else Cost()


@cache
def rows_needed(height: int, out: int, kernel: int, stride: int, before: int, dilation: int) -> tuple[int, ...]:
    """need[r], the input rows that output rows 0..r read, with the image's height behind the last one."""
    return (*(min(max(r * stride - before + (kernel - 1) * dilation + 1, 0), height) for r in range(out)), height)


@cache
def iterations(need: tuple[int, ...], line: int, fetched: int) -> int:
    """Of a window stage: fill, then per output row the larger of the words fetched and the words of the rows read meanwhile."""
    return need[0] * line + sum(max(fetched, (b - a) * line) for a, b in zip(need[:-1], need[1:]))


Geometry = tuple[
    Sequence[int], Sequence[int], Sequence[int], Sequence[int]
]  # kernel, stride, padding (t, b, l, r), dilation, each (rows, columns)


def side_by_side(window: Geometry) -> bool:
    """Whether the windows are the pixels themselves: then no stage makes them."""
    kernel, stride, padding, _ = window
    return tuple(kernel) == tuple(stride) == (1, 1) and not any(padding)


def window(x: IntType, y: IntType, window: Geometry, lanes: int, taps: int = 1, burst: int = 0, passes: int = 1) -> Cost:
    """The stage that turns the image into windows, `lanes` channels of `taps` positions per word; it reads the next rows while it writes
    the present one. Nothing for windows side by side.

    burst: words that the stage behind it reads in one go, for which its FIFO has room. passes: cycles that stage spends on a word; with
    several, the FIFO also holds what it works on while this one only reads.

    cycles = fill + sum over output rows of max(words fetched, words read). One position at a time comes from a ring of image rows in one
    memory. A column or all of a window needs a memory per row and, for each row of the window, a choice among them: 4 rows per LUT and bit
    (UG574, multiplexers). All of a window also keeps the columns between its first and its last in distributed RAM.
    """
    if side_by_side(window):
        return Cost()
    kernel, stride, padding, dilation = (tuple(v) for v in window)
    return _window((x.shape, x.bits), y.shape[1:], (kernel, stride, padding, dilation), lanes, taps, burst, passes)


@cache
def _window(x: tuple[tuple[int, ...], int], y: tuple[int, ...], window: Geometry, lanes: int, taps: int, burst: int, passes: int) -> Cost:
    """`window`, kept by the numbers it depends on: a solver asks for every memory of the weights, and networks repeat their layers."""
    kernel, stride, padding, dilation = window
    (channels, height, width), word = x
    rows, cols = y
    need = rows_needed(height, rows, kernel[0], stride[0], padding[0], dilation[0])
    live = min((kernel[0] - 1) * dilation[0] + 1 + stride[0], height)
    pixel, line, bits = channels // lanes, width * channels // lanes, lanes * word
    fetched = cols * kernel[0] * kernel[1] * pixel // taps
    if taps == 1:
        store = memory(live * line, bits)
    else:
        store = memory(line, bits).times(live) + Cost(lut=ceil(live / 4) * kernel[0] * bits)
    if taps == kernel[0] * kernel[1] and kernel[1] > 1:
        span = (kernel[1] - 1) * dilation[1] + 1
        fetched = ((cols - 1) * min(stride[1], span) + span) * pixel
        column = kernel[0] * bits
        store += (memory(pixel, column, "lut") if pixel > 1 else Cost(ff=column)).times(span - 1)
    cycles = iterations(need, line, fetched)
    silent = need[0] * line
    if taps == kernel[0] * kernel[1]:
        silent += (kernel[1] - 1) * dilation[1] * pixel
    last = sum(n == height for n in need[:-1])  # rows of windows that are written when all is read
    written = cols * kernel[0] * kernel[1] * pixel // taps * rows * passes
    pause = last * fetched / cycles if written <= cycles else last / rows * (1 - silent / written)
    waiting = fifo(max(32, burst + (ceil(silent / passes) if passes > 1 else 0)), taps * bits)
    return loop(cycles, taps * bits, pause) + store + waiting


def windowed(x: IntType, y: IntType, geometry: Geometry, folding: Folding, unit: Cost) -> Cost:
    """`unit` for each of pe channels behind their windows: y.numel/pe * kh*kw/taps cycles, or those of the window stage."""
    steps = prod(geometry[0]) // folding.taps
    return loop(y.numel // folding.pe * steps, folding.pe * y.bits) + unit.times(folding.pe) + window(
        x, y, geometry, folding.pe, folding.taps, steps
    )  # fmt: skip


@cache
def same_order(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a stream (pixel by pixel, channels inside) carries the elements of both shapes in one order."""
    if a[0] == b[0]:
        return True
    index = np.arange(prod(a))
    first, second = (np.moveaxis(index.reshape(s), 0, -1).reshape(-1) for s in (a, b))
    return np.array_equal(first, second)


def reorder(x: IntType, y: IntType, lanes: int, pe: int) -> Cost:
    """A buffered permutation: the map is read whole, `lanes` channels per word, then written pe at a time through a table of addresses.

    Every lane written reads somewhere else, so each has a copy of the map.
    """
    stored = memory(x.numel // lanes, lanes * x.bits).times(pe) + memory(y.numel // pe, pe * (x.numel - 1).bit_length())
    cycles = x.numel // lanes + y.numel // pe
    return loop(cycles, pe * y.bits, y.numel // pe / cycles) + stored


def bus_lanes(t: IntType) -> int:
    """Elements of one word between the network and its 64-bit bus: those of a bus word, in containers of 8, 16, 32 or 64 bits, or fewer
    where an image is no whole number of them."""
    return gcd(t.numel, 64 // next(b for b in (8, 16, 32, 64) if t.bits <= b))


def bus_cycles(t: IntType) -> int:
    """Cycles per image on the bus: every bus word (the last one padded) is taken apart into words of bus_lanes elements."""
    in_word = 64 // next(b for b in (8, 16, 32, 64) if t.bits <= b)
    return -(-t.numel // in_word) * in_word // bus_lanes(t)


def converter(bits: int) -> Cost:
    """From words of any width to words of `bits` bits. Our estimate; charged even where no conversion is needed."""
    return Cost(lut=bits // 2 + 16, ff=2 * bits)


# 18-kbit block: port widths of UG573 and UG473
_BRAM_SHAPES = ((16_384, 1), (8_192, 2), (4_096, 4), (2_048, 9), (1_024, 18), (512, 36))


@cache
def memory(words: int, bits: int, style: str = "auto") -> Cost:
    """One memory of `words` words of `bits` bits with one read per cycle, in LUTs, block RAM or UltraRAM.

    lut: 64 bits per LUT (UG574, distributed RAM); bram: the cheapest of the port shapes of an 18-kbit block; uram: 4,096 x 72 bits (UG573).
    auto: LUTs below a quarter of a block, else block RAM.
    """
    if words <= 1:
        return Cost()
    if style == "auto":
        style = "lut" if words * bits < BRAM_FROM_BITS else "bram"
    if style == "lut":
        return Cost(lut=ceil(words / 64) * bits, ff=bits)
    if style == "bram":
        return Cost(bram18=min(ceil(words / depth) * ceil(bits / width) for depth, width in _BRAM_SHAPES))
    if style == "uram":
        return Cost(uram=ceil(words / 4_096) * ceil(bits / 72))
    raise ValueError(f"memory style {style!r}: choose auto, lut, bram or uram")


@cache
def fifo(depth: int, bits: int) -> Cost:
    """A FIFO: shift-register LUTs of 32 words up to depth 64 (UG574, SRL32), else a memory with two counters."""
    control = Cost(lut=2 * ceil(log2(depth + 1)) + 6, ff=2 * ceil(log2(depth + 1)) + bits)
    return control + (Cost(lut=ceil(depth / 32) * bits) if depth <= 64 else memory(depth, bits))
