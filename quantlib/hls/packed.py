"""Convolutions and dense layers that make several products per DSP slice: what ql_packed.hpp does, as data, and what it costs.

How a layer lies in the slices is in `packed_unit`; docs/packing.md, "In the hardware", tells all of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlib.cost import Cost, adder, fifo, loop, memory, window
from quantlib.hls.call import Call, Folds, Kernel, Port, Table, carrier, ctype, stream_order
from quantlib.hls.packed_unit import Unit, columns, layer_of, unit
from quantlib.ir import IntType
from quantlib.packing import DSPS

if TYPE_CHECKING:
    from quantlib.schedule import Folding


def packed_folds(op: Any, x: IntType, y: IntType) -> tuple[dict[str, Folds], str]:
    """The slices that take several products of the layer at once, with the legal foldings, and why others do not.

    taps of a folding are then the neighbouring columns that the unit works on per cycle, N.
    """
    layer = layer_of(op, x, y)
    limits = (layer.y[0], 1) if layer.depthwise else (layer.y[0] // layer.groups, layer.x[0] // layer.groups)
    bits = f"{layer.weight_bits}-bit weights and {layer.act_bits}-bit activations"
    why = f"no slice makes more than one product of {bits} per cycle"
    return {dsp: Folds(*limits, taps) for dsp in DSPS if (taps := columns(layer, dsp))}, why


def unit_of(op: Any, x: IntType, y: IntType, folding: Folding) -> Unit:
    """The unit of a layer with this folding, which `packed_folds` must offer."""
    return unit(layer_of(op, x, y), folding.pe, folding.simd, folding.taps, folding.packing)


def packed_widest(op: Any, x: IntType, y: IntType, folding: Folding) -> int:
    """Bits of the widest word between the stages."""
    u = unit_of(op, x, y, folding)
    return max(u.cut.n * u.lanes * u.layer.act_bits, u.cut.kept * u.pe * y.bits)


def packed_hls(op: Any, x: IntType, y: IntType, folding: Folding) -> Call:
    """Segments of N columns, the unit, and the stage that puts pixels in order; with N = 1 and one tap the unit alone, behind windows where
    there are any. Iterations per image: those of `Unit`."""
    u = unit_of(op, x, y, folding)
    la, c, kernels = u.layer, u.cut, list[Kernel]()
    ends = Port(ctype(x), u.lanes, x.numel // u.lanes)
    index: tuple[int, int] = la.lo, la.step.bit_length() - 1
    if c.windowed:
        w = u.window
        if c.alone:
            front = w.stage()
            windows = Port(ctype(x), u.lanes, front.output.words)
            kernels.append(replace(front, inputs=(ends,), output=windows))
            ends = windows
        else:
            word = Port(f"ap_uint<{la.act_bits}>", c.n * u.lanes, la.y[1] * c.segments * u.groups * u.steps)
            cuts = (*la.x[1:], u.groups, w.parts, la.kernel[0], c.phases, *la.stride, la.padding[0], la.dilation[0], c.apart, la.y[1],
                    c.segments, c.first * la.stride[1] - la.padding[2], *index, la.zero)  # fmt: skip
            kernels.append(Kernel("segments", "ql_packed.hpp", "ql::segments", cuts, (ends,), word, w.iterations, w.demand))
            ends, index = word, (0, 0)  # done
    sums = Port(ctype(y), c.kept * u.pe, la.y[1] * c.segments * u.blocks)
    number = carrier(3 * op.magnitude(x))  # of the constant of a channel and a sum of indices times the step together
    args = (_layout(u), number, la.depthwise, la.y[1], c.segments, u.groups, u.passes, u.steps, c.taps, c.kept, *index, la.step)
    label = "" if c.alone else "packed"
    kernels.append(Kernel(label, "ql_packed.hpp", "ql::packed", args, (ends,), sums, u.iterations, u.demand, _tables(op, u, x), u.backlog))
    if not c.alone:
        order = la.y[1], c.segments, u.blocks, c.n, c.kept, c.skipped, la.y[2], u.ordered
        pixels = Port(ctype(y), u.pe, y.numel // u.pe)
        kernels.append(Kernel("", "ql_packed.hpp", "ql::pixels", order, (sums,), pixels, u.ordered, u.pixel_demand))
    return Call(tuple(kernels))


def _layout(u: Unit) -> str:
    """The template that describes the packing."""
    p = u.packing
    fields = p.strides[0] // p.stride, p.strides[1] // p.stride
    operands = p.act_bits, p.weight_bits, p.act_parts, p.weight_parts
    ports = p.act_port, p.weight_port, p.dsp.accumulator
    values = not u.cut.conv, p.acts, p.weights, *fields, p.stride, *operands, u.chain, u.trick, *ports
    return f"ql::Packing<{', '.join(str(v).lower() for v in values)}>"


def _tables(op: Any, u: Unit, x: IntType) -> tuple[Table, ...]:
    weight = Table("weight", lambda: weight_table(op, u, x))
    if not u.layer.lo:
        return (weight,)
    return weight, Table("base", lambda: u.layer.lo * op.weight.reshape(len(op.weight), -1).sum(1).reshape(u.blocks, u.pe))


def weight_table(op: Any, u: Unit, x: IntType) -> np.ndarray:
    """(rows, words, K, simd): one row per iteration; a word holds the taps of a channel, last one first, or the channels of a tap."""
    weight, c, k = op.weight, u.cut, u.packing.weights
    if weight.ndim == 2:
        weight = weight[:, stream_order(np.arange(weight.shape[1]).reshape(x.shape))][:, :, None, None]
    o, i, kh, kw = weight.shape
    taps = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, c.taps * c.phases - kw))).reshape(o, i, kh, c.taps, c.phases)[:, :, :, ::-1]
    lanes = taps.transpose(0, 2, 4, 1, 3).reshape(u.blocks, u.pe, u.steps, u.simd, c.taps)
    if c.conv:
        lanes = np.pad(lanes, ((0, 0),) * 4 + ((0, -c.taps % k),)).reshape(u.blocks, u.pe, u.steps, u.simd, -1, k)
        return lanes.transpose(0, 2, 1, 4, 5, 3).reshape(u.blocks * u.steps, u.words, k, u.simd)
    lanes = np.pad(lanes[..., 0], ((0, 0), (0, -u.pe % k), (0, 0), (0, 0))).reshape(u.blocks, u.words, k, u.steps, u.simd)
    return lanes.transpose(0, 3, 1, 2, 4).reshape(u.blocks * u.steps, u.words, k, u.simd)


def packed_cost(op: Any, x: IntType, y: IntType, folding: Folding) -> Cost:
    """The unit, its weights and what surrounds it. cycles: those of the slowest stage."""
    u = unit_of(op, x, y, folding)
    weights = memory(u.blocks * u.steps, u.simd * u.cut.taps * u.layer.weight_bits, folding.memory).times(u.pe)
    return _cost(u) + weights


@cache
def _cost(u: Unit) -> Cost:
    """The unit with the words it holds and the sums it carries on, and the stages around it: banks of image rows in front, two segments of
    sums behind."""
    la, c, p = u.layer, u.cut, u.packing
    bits, word = c.kept * u.pe * la.sum_bits, c.n * u.lanes * la.act_bits
    registers = u.slices * sum(p.part_bits) + u.chains * p.fields * (p.stride + la.sum_bits)
    cost = Cost(lut=u.luts, ff=registers, dsp=u.slices) + loop(u.iterations, bits)
    cost += memory(u.steps, word) + memory(u.blocks, u.pe * (c.taps - 1) * la.sum_bits, "lut")
    if la.lo:
        cost += adder(la.act_bits).times(u.lanes)
    if not c.windowed:  # it reads nothing while it makes further outputs of a pixel
        places = la.y[1] * la.y[2]
        return cost + Cost(pause=(1 - 1 / u.passes) / (places * u.groups))
    w = u.window
    if c.alone:
        geometry = la.kernel, la.stride, la.padding, la.dilation
        return cost + window(w.x, IntType(la.y, 0, 1), geometry, u.lanes, burst=u.steps, passes=u.passes)
    banks = c.n * la.stride[1]
    held = memory(w.rows * -(-la.x[2] // banks) * u.groups * w.parts, u.lanes * la.act_bits).times(banks)
    choice = Cost(lut=word * (1 + ceil(banks / 4) * (c.phases > 1)))  # of a bank, four per LUT, and of the padding
    pause = c.late * w.fetches / w.iterations if u.iterations <= w.iterations else c.late / la.y[1] * (1 - w.silence / u.iterations)
    cost += loop(w.iterations, word, pause) + held + choice + fifo(max(32, u.steps + u.backlog), word)
    order = memory(2 * u.blocks, bits, "lut") + Cost(lut=u.pe * la.sum_bits * ceil(c.kept / 4))
    return cost + loop(u.ordered, u.pe * la.sum_bits) + order + fifo(max(32, u.blocks), bits)
