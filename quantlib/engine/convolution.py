"""Convolutions and dense layers: which kernel, and its weights packed for it (window.hpp, dot.hpp, bits.hpp)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantlib import ops
from quantlib.engine.program import INT32, Builder, stored, wide
from quantlib.ir import IntType, Node

BLOCK = 16  # output channels side by side in a kernel
SHORTS = 32  # channels side by side in a depthwise kernel of 16-bit sums
INT16 = 1 << 15
FILLED = 0.2  # signs are packed where at least this part of the 64-bit words is used
GATES = {"plain": 0, "gated": 1, "merged": 2}


@dataclass
class _Conv:
    """A convolution of a (C, H, W) map; weight (O, C/groups, kh, kw). A dense layer is one of 1 x 1 over K channels."""

    x: IntType
    y: IntType
    channels: int
    size: tuple[int, int]
    weight: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    bound: int  # no sum or product exceeds it

    @property
    def out(self) -> tuple[int, int]:
        return (self.y.shape[1], self.y.shape[2]) if len(self.y.shape) == 3 else (1, 1)

    @property
    def padded(self) -> tuple[int, int]:
        (h, w), (t, b, left, r) = self.size, self.padding
        return h + t + b, w + left + r

    @property
    def rows_whole(self) -> bool:
        """Is a kernel row one contiguous run of the map?"""
        return self.groups == 1 and self.dilation[1] == 1

    def segments(self) -> np.ndarray:
        """Weights (O, segments, taps per segment, C/groups)."""
        o, i, kh, kw = self.weight.shape
        w = self.weight.transpose(0, 2, 3, 1)
        return w.reshape(o, kh, kw, i) if self.rows_whole else w.reshape(o, kh * kw, 1, i)

    def corners(self) -> np.ndarray:
        """Where each segment starts, in pixels of the padded map from the window's corner."""
        kh, kw = self.weight.shape[2:]
        rows, cols = np.arange(kh) * self.dilation[0] * self.padded[1], np.arange(1 if self.rows_whole else kw) * self.dilation[1]
        return (rows[:, None] + cols).reshape(-1)

    def classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Class of every output row and column by which taps lie in the image; sums of the weights inside (rows, columns, O) per class."""
        found = []
        for axis in (0, 1):
            first = np.arange(self.out[axis]) * self.stride[axis] - self.padding[2 * axis]
            at = first[:, None] + np.arange(self.weight.shape[2 + axis]) * self.dilation[axis]
            found.append(np.unique((at >= 0) & (at < self.size[axis]), axis=0, return_inverse=True))
        (rows, row_class), (cols, col_class) = found
        inside = np.einsum("ru,cv,ouv->rco", rows.astype(np.int64), cols.astype(np.int64), self.weight.sum(1))
        return row_class.reshape(-1), col_class.reshape(-1), inside

    def blocks(self, per_output: np.ndarray, axis: int = 0) -> np.ndarray:
        """An axis of O outputs as (groups, blocks, BLOCK), zeros behind the last output of a group."""
        a = np.moveaxis(per_output, axis, 0)
        a = a.reshape(self.groups, -1, *a.shape[1:])
        a = np.pad(a, [(0, 0), (0, -a.shape[1] % BLOCK), *[(0, 0)] * (a.ndim - 2)])
        return a.reshape(self.groups, -1, BLOCK, *a.shape[2:])


def emit(b: Builder, node: Node) -> bool:
    """Emits the node if it is a convolution or a dense layer."""
    op, x = node.op, b.graph.types(node)
    if isinstance(op, ops.Conv2d | ops.FractionalConv2d):
        dilation = op.dilation if isinstance(op, ops.Conv2d) else (1, 1)
        channels, height, width = x[0].shape
        size = (height, width)
        c = _Conv(x[0], node.type, channels, size, op.weight, op.stride, op.padding, dilation, op.groups, op.magnitude(*x))
    elif isinstance(op, ops.Dense):
        weight = np.moveaxis(op.weight.reshape(-1, *x[0].shape), 1, -1).reshape(-1, x[0].numel, 1, 1)
        c = _Conv(x[0], node.type, x[0].numel, (1, 1), weight, (1, 1), (0, 0, 0, 0), (1, 1), 1, op.magnitude(*x))
    else:
        return False
    if isinstance(op, ops.FractionalConv2d):
        _signs(b, node, c, 2, op)
    elif (planes := _planes(c)) and _filled(c):
        _signs(b, node, c, planes, None)
    elif c.groups > 1 and c.weight.shape[:2] == (c.groups, 1):
        if not _short(b, node, c):
            _wide(b, node, c, depthwise=True)
    elif not (b.library.bytes and _bytes(b, node, c)) and not _pairs(b, node, c):
        _wide(b, node, c, depthwise=False)
    return True


def _planes(c: _Conv) -> int:
    """1 where the inputs are signs, 2 where they are odd codes -3..3, else 0; 0 too where a weight is no sign."""
    odd = c.x.lo % 2 == 1 and (c.x.step % 2 == 0 or c.x.levels == 1)
    if not odd or not (np.abs(c.weight) == 1).all() or c.bound >= INT32 // 4:
        return 0
    return 1 if c.x.magnitude == 1 else 2 if c.x.magnitude == 3 else 0


def _filled(c: _Conv) -> bool:
    bits = c.segments().shape[2] * c.weight.shape[1]
    return bits / (-(-_sign_bytes(c) // 8) * 64) >= FILLED


def _sign_bytes(c: _Conv) -> int:
    """Bytes of one plane of a segment."""
    return c.segments().shape[2] * -(-c.weight.shape[1] // 8)


def _head(b: Builder, node: Node, c: _Conv, buffer: int, line: int, pixel: int, group: int, length: int,
          classes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[int]:  # fmt: skip
    """What Window reads. pixel, group: bytes; classes: row and column classes and (rows, columns, O) corrections."""
    rows, cols, correction = classes
    laid = np.moveaxis(c.blocks(correction, 2), (0, 1, 2), (2, 3, 4))
    (t, _, left, _), offsets = c.padding, c.corners() * pixel
    return [
        *b.place(node.inputs[0]), *b.place(node.name), buffer, line, *c.size, c.channels, t, left, *c.padded, *c.stride, *c.out,
        c.groups, c.weight.shape[0] // c.groups, pixel, group, len(offsets), length, b.table(offsets, np.int64),
        b.table(rows, np.int32), b.table(cols, np.int32), correction.shape[1], b.table(laid, np.int32),
    ]  # fmt: skip


def _one_class(c: _Conv, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same correction everywhere."""
    return np.zeros(c.out[0], dtype=np.int64), np.zeros(c.out[1], dtype=np.int64), value.reshape(1, 1, -1)


def _signs(b: Builder, node: Node, c: _Conv, planes: int, op: ops.FractionalConv2d | None) -> None:
    per_channel = -(-c.weight.shape[1] // 8)
    taps = int(np.prod(c.weight.shape[1:]))
    w = c.segments() < 0
    packed = np.packbits(np.pad(w, [(0, 0)] * 3 + [(0, -w.shape[3] % 8)]), axis=3, bitorder="little").reshape(*w.shape[:2], -1)
    used = packed.shape[2]
    words = np.ascontiguousarray(np.pad(packed, [(0, 0), (0, 0), (0, -used % 8)])).view("<u8")
    length = words.shape[2]
    weight = np.moveaxis(c.blocks(words), 2, -1)  # (groups, blocks, segments, words, outputs)
    last = -1 if used % 8 == 0 else (1 << (8 * (used % 8))) - 1
    rows, cols, inside = c.classes()
    total = c.weight.reshape(c.weight.shape[0], -1).sum(1)
    row = c.out[1] * c.weight.shape[0] * 4
    pixel = per_channel * c.groups
    plane = -(-(c.padded[0] * c.padded[1] * pixel + 16) // 64) * 64
    scratch = [b.take(n) for n in (plane * planes, row, row, 8 * 4 * planes * len(c.corners()) * length)]
    buffer, line, second, patch = scratch
    gate = np.clip(op.gate, -taps, taps + 1) if op is not None else np.zeros(c.weight.shape[0], dtype=np.int64)
    mode, merge, is_wide = "plain", [], 0
    if op is not None:
        mode = "gated" if op.merge is None else "merged"
        if op.merge is not None:
            m = op.merge
            merge, is_wide = [m.msb, m.lsb, m.fraction_in, m.shift, m.lo, m.hi], int(m.magnitude(taps) >= INT32)
    head = _head(b, node, c, buffer, line, pixel, per_channel, length, (rows, cols, taps - total + inside))
    tables = b.table(weight, np.uint64), b.table(c.blocks(gate), np.int32)
    b.emit(f"SIGNS{planes}", *head, patch, plane, last, tables[0], GATES[mode], tables[1], second, is_wide, *merge)
    for s in scratch:
        b.give(s)


def _bytes(b: Builder, node: Node, c: _Conv) -> bool:
    """Unsigned bytes x signed bytes: the input is shifted up by `zero`, the correction takes zero * sum(weights) back."""
    lo, hi = min(c.x.lo, 0), max(c.x.hi, 0)
    sums = np.abs(c.weight).reshape(c.weight.shape[0], -1).sum(1)
    if hi - lo > 255 or c.weight.min() < -128 or c.weight.max() > 127 or 512 * sums.max() >= INT32:
        return False
    zero = -lo
    direct = zero == 0 and not any(c.padding) and stored(c.x) == 0
    _dot(b, node, c, "BYTE_DOT", np.int8, zero, direct, -zero * c.weight.reshape(len(sums), -1).sum(1))
    return True


def _pairs(b: Builder, node: Node, c: _Conv) -> bool:
    if stored(c.x) > 1 or np.abs(c.weight).max() > 32767 or c.bound >= INT32:
        return False
    direct = not any(c.padding) and stored(c.x) == 1
    _dot(b, node, c, "PAIR_DOT", np.int16, 0, direct, np.zeros(c.weight.shape[0], dtype=np.int64))
    return True


def _dot(b: Builder, node: Node, c: _Conv, kind: str, dtype: type, zero: int, direct: bool, correction: np.ndarray) -> None:
    size = np.dtype(dtype).itemsize
    per_word = 4 // size
    w = c.segments()
    w = w.reshape(*w.shape[:2], -1)
    w = np.pad(w, [(0, 0), (0, 0), (0, -w.shape[2] % per_word)])
    w = w.reshape(*w.shape[:2], -1, per_word)
    weight = np.moveaxis(c.blocks(w), 2, -2)  # (groups, blocks, segments, words, outputs, numbers of a word)
    b.place(node.inputs[0])
    buffer = b.at[node.inputs[0]] if direct else b.take(c.padded[0] * c.padded[1] * c.channels * size)
    line = b.take(c.out[1] * c.weight.shape[0] * 4)
    head = _head(b, node, c, buffer, line, c.channels * size, c.weight.shape[1] * size, w.shape[2], _one_class(c, correction))
    b.emit(kind, *head, zero, int(direct), b.table(weight, dtype))
    b.give(line)
    if not direct:
        b.give(buffer)


def _short(b: Builder, node: Node, c: _Conv) -> bool:
    """Depthwise with all numbers and sums in int16, 32 channels side by side."""
    if stored(c.x) > 1 or np.abs(c.weight).max() >= INT16 or c.bound >= INT16:
        return False
    channels = c.weight.shape[0]
    taps = np.pad(c.weight.reshape(channels, -1), [(0, -channels % SHORTS), (0, 0)])
    weight = taps.reshape(-1, SHORTS, taps.shape[1]).transpose(0, 2, 1)
    buffer, line = b.take(c.padded[0] * c.padded[1] * channels * 2), b.take(c.out[1] * channels * 2)
    head = _head(b, node, c, buffer, line, channels * 2, 2, 1, _one_class(c, np.zeros(channels, dtype=np.int64)))
    b.emit("DEPTH16", *head, b.table(weight, np.int16))
    b.give(line)
    b.give(buffer)
    return True


def _wide(b: Builder, node: Node, c: _Conv, depthwise: bool) -> None:
    is_wide = c.bound >= INT32 or wide(c.x)
    dtype = np.int64 if is_wide else np.int32
    w = c.segments()
    w = w.reshape(*w.shape[:2], -1)
    o = c.weight.shape[0]
    # depthwise: (taps, channels); else (groups, segments, length, outputs of the group)
    weight = c.weight.reshape(o, -1).T if depthwise else w.reshape(c.groups, o // c.groups, *w.shape[1:]).transpose(0, 2, 3, 1)
    item = np.dtype(dtype).itemsize
    buffer, line = b.take(c.padded[0] * c.padded[1] * c.channels * item), b.take(c.out[1] * o * item)
    kind = ("DEPTH" if depthwise else "WIDE") + ("64" if is_wide else "32")
    classes = _one_class(c, np.zeros(o, dtype=np.int64))
    head = _head(b, node, c, buffer, line, c.channels * item, c.weight.shape[1] * item, w.shape[2], classes)
    b.emit(kind, *head, b.table(weight, dtype))
    b.give(line)
    b.give(buffer)
