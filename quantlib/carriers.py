"""Steps of the torch carriers: for some ops a form that is faster than their own `evaluate` and gives the same integers.

Tables are put on the device once. Convolutions of bytes run as such where oneDNN has them and the sums are proven. Thresholds and
multiply-shifts become clamp(floor(a*n + b)) where that is proven: the expression is monotone in n whatever its rounding, so it is right
everywhere when it is right on both sides of every threshold and at the ends of the interval, and exactly this expression is run there, in
the carrier and on the device that will run it. Channels that fail are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quantlib import ops
from quantlib.ir import IntType
from quantlib.ops._base import Op, constant
from quantlib.ops._lattice import count_reached, signed
from quantlib.ops._window import conv2d

Step = Callable[..., Tensor]
Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]  # stride, padding, dilation, groups
TABLE = 1 << 18  # thresholds of an op up to which a line through them is looked for
SEARCH = 64  # rounds of the search for a slope: each takes a third off
FEW_BAD = 0.25  # channels without a line that are worth an exception


def step(op: Op, types: tuple[IntType, ...], dtype: torch.dtype, device: torch.device) -> Step:
    """What computes the op on inputs of these types in the carrier `dtype` on `device`. Inputs are never written."""
    make = FORMS.get(type(op)) if dtype.is_floating_point else None
    found = make(op, types, torch.empty(0, dtype=dtype, device=device)) if make else None
    return found or op.evaluate


def fits_float32(op: Op, types: tuple[IntType, ...]) -> bool:
    """Whether `step` may be asked for float32 whatever the op's intermediates are: it then proves what it gives, or gives nothing."""
    return isinstance(op, ops.Requant) and op.kink is None and all(t.magnitude < 1 << 24 for t in types) and _few(op.mul, op.hi - op.lo)


def _few(rows: np.ndarray, levels: int) -> bool:
    return 0 < levels and len(rows) * levels <= TABLE


# ---------------------------------------------------------------- lines in the place of thresholds


def line(x: Tensor, a: Tensor, b: Tensor, lo: int, hi: int) -> Tensor:
    """clamp(floor(a*x + b), lo, hi), each operation rounded by itself."""
    return torch.mul(x, a).add_(b).floor_().clamp_(lo, hi)


def _line_through(
    thresholds: np.ndarray, sign: np.ndarray, lo: int, t: IntType, like: Tensor
) -> tuple[Callable[[Tensor], Tensor], np.ndarray]:
    """The step lo + #{k: sign*n >= thresholds[c][k]} as a line, and the channels (C,) for which it is proven on n in t.lo..t.hi."""
    sign = np.broadcast_to(sign, max(len(sign), len(thresholds)))[:, None]
    channels, levels = len(sign), thresholds.shape[1]
    thresholds = np.broadcast_to(thresholds, (channels, levels))
    low, high = np.where(sign > 0, t.lo, -t.hi), np.where(sign > 0, t.hi, -t.lo)
    reached, before = np.clip(thresholds, low, high), np.clip(thresholds - 1, low, high)
    k = np.arange(1, levels + 1)
    must, must_not = thresholds <= high, thresholds > low  # a*reached + b >= k, a*before + b < k

    def room(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Between which offsets the line of slope a (C, 1) goes through all thresholds."""
        least = np.where(must, k - a * reached, -np.inf).max(1, keepdims=True)
        most = np.where(must_not, k - a * before, np.inf).min(1, keepdims=True)
        free_least, free_most = np.minimum(most, levels + 2.0) - 1, np.maximum(least, 0.0) + 1
        return np.where(np.isinf(least), free_least, least), np.where(np.isinf(most), free_most, most)

    below, above = np.zeros((channels, 1)), np.full((channels, 1), levels + 1.0)
    for _ in range(SEARCH):  # the room is concave in a
        first, second = below + (above - below) / 3, above - (above - below) / 3
        left, right = room(first), room(second)
        better = (right[1] - right[0]) > (left[1] - left[0])
        below, above = np.where(better, first, below), np.where(better, above, second)
    slope = (below + above) / 2
    least, most = room(slope)
    a, b = constant((slope * sign)[:, 0], like), constant(((least + most) / 2)[:, 0] + lo, like)

    points = np.concatenate([low, reached, before, high], 1)  # (C, P), times sign
    want = lo + (points[:, :, None] >= thresholds[:, None]).sum(2) if levels <= 31 else lo + _counts(points, thresholds)
    got = line(constant((points * sign).T, like), a, b, lo, lo + levels).T.to(torch.int64).cpu().numpy()
    shape = lambda v, x: v.reshape(1, -1, *[1] * (x.dim() - 2))  # noqa: E731
    return lambda x: line(x, shape(a, x), shape(b, x), lo, lo + levels), (got == want).all(1)


def _counts(points: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return np.stack([np.searchsorted(row, p, side="right") for row, p in zip(thresholds, points, strict=True)])


def _threshold(op: ops.Threshold, types: tuple[IntType, ...], like: Tensor) -> Step | None:
    if not _few(op.thresholds, op.thresholds.shape[1]) or op.thresholds.shape[1] < 2 or np.abs(op.thresholds).max() >= 1 << 60:
        return None
    lo = op.lo if op.step == 1 else 0
    run, proven = _line_through(op.thresholds, op.sign, lo, types[0], like)
    if proven.mean() < 1 - FEW_BAD:
        return None
    bad = np.flatnonzero(~proven)
    rows, signs = (v if len(v) == 1 else v[bad] for v in (op.thresholds, op.sign))
    place = torch.from_numpy(bad).to(like.device)

    def apply(x: Tensor) -> Tensor:
        y = run(x)
        if len(bad) == len(proven):
            return op.evaluate(x)
        if len(bad):
            y[:, place] = count_reached(signed(x[:, place], signs), rows) + lo
        return y if op.step == 1 else y.mul_(op.step).add_(op.lo)

    return apply


def _requant(op: ops.Requant, types: tuple[IntType, ...], like: Tensor) -> Step | None:
    """A proven line, or the op's own formula with every step but the first in place."""
    levels = op.hi - op.lo
    if op.kink is None and like.dtype is torch.float32 and _few(op.mul, levels) and op.shift + max(-op.lo, op.hi).bit_length() < 60:
        factor, term = np.broadcast_arrays(op.mul, op.add)
        codes, size = op.lo + np.arange(1, levels + 1), np.abs(factor)[:, None]
        first = -((term[:, None] - (codes << op.shift)) // np.maximum(size, 1))  # ceil: the smallest sign*n that reaches the code
        always = (term >> op.shift)[:, None] >= codes
        first = np.where(size > 0, first, np.where(always, -(2**59), 2**59))
        run, proven = _line_through(np.clip(first, -(2**59), 2**59), np.where(factor < 0, -1, 1), op.lo, types[0], like)
        if proven.all():
            return run
    if max(op.magnitude(*types), types[0].magnitude) >= (1 << 24 if like.dtype is torch.float32 else 1 << 53):
        return None  # asked for only as a proven line
    (mul, add), second = (constant(v, like) for v in (op.mul, op.add)), None
    if op.kink is not None and op.mul2 is not None and op.add2 is not None:
        second = tuple(constant(v, like) for v in (op.kink, op.mul2, op.add2))

    def apply(x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        v = torch.mul(x, mul.reshape(shape)).add_(add.reshape(shape))
        if second is not None:
            kink, mul2, add2 = (c.reshape(shape) for c in second)
            v = torch.where(x >= kink, v, torch.mul(x, mul2).add_(add2))
        return (v.mul_(2.0**-op.shift).floor_() if op.shift else v).clamp_(op.lo, op.hi)

    return apply


# ---------------------------------------------------------------- tables on the device


def _laid(weight: np.ndarray, like: Tensor) -> Tensor:
    w = constant(weight, like)
    return w if like.is_cuda else w.contiguous(memory_format=torch.channels_last)


def _byte_convolution(weight: np.ndarray, x: IntType, geometry: Geometry, like: Tensor) -> Step | None:
    """The convolution as products of unsigned and signed bytes (oneDNN), its sums as float32; None where that is not proven exact.

    x is shifted up to 0..255 and its zero point undone inside. No sum reaches 2^24, so float32 holds it, nor any partial sum 2^31; that
    pairs of products are not cut off at 16 bits, as processors without VNNI do, is seen once by running the greatest.
    """
    stride, (t, b, left, r), dilation, groups = geometry
    lo, hi = min(x.lo, 0), max(x.hi, 0)
    sums = int(np.abs(weight).reshape(len(weight), -1).sum(1).max())
    small = hi - lo <= 255 and weight.min() >= -128 and weight.max() <= 127 and sums * max(-lo, hi) < 1 << 24 and 512 * sums < 1 << 31
    if like.is_cuda or like.dtype is not torch.float32 or not small or (t, left) != (b, r) or not bytes_work():
        return None
    return _prepacked(torch.from_numpy(weight.astype(np.int8)), -lo, list(stride), [t, left], list(dilation), groups)


def _prepacked(weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Step:
    one, none = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    packed = torch.ops.onednn.qconv_prepack(weight, one, 1.0, zero, stride, padding, dilation, groups, None)

    def apply(x: Tensor) -> Tensor:
        q = (x + zero if zero else x).to(torch.uint8)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            q, 1.0, zero, packed, one, none, None, stride, padding, dilation, groups, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    return apply


@cache
def bytes_work() -> bool:
    """Whether this torch has oneDNN's convolutions of bytes and this processor gives their exact sums, the greatest and smallest among
    them. They are no public interface: seen once per process, by running them."""
    random = torch.Generator().manual_seed(0)
    try:
        for channels, outputs, size, groups in ((64, 32, 3, 1), (48, 64, 1, 1), (3, 16, 3, 1), (16, 16, 3, 16), (32, 16, 3, 2)):
            x = torch.randint(0, 256, (2, channels, 9, 7), generator=random)
            weight = torch.randint(-128, 128, (outputs, channels // groups, size, size), generator=random)
            x[0], weight[0], weight[1] = 255, 127, -128
            got = _prepacked(weight.to(torch.int8), 5, [1, 1], [size // 2] * 2, [1, 1], groups)((x - 5).float())
            if not torch.equal(got.long(), F.conv2d(x - 5, weight, None, 1, size // 2, 1, groups)):
                return False
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):  # a torch without the private operation, or another form of it
        return False
    return True


def _convolution(weight: np.ndarray, x: IntType, geometry: Geometry, like: Tensor) -> Step:
    found = _byte_convolution(weight, x, geometry, like)
    if found is not None:
        return found
    laid = _laid(weight, like)
    return lambda v: conv2d(v, laid, *geometry)


def _conv2d(op: ops.Conv2d, types: tuple[IntType, ...], like: Tensor) -> Step:
    return _convolution(op.weight, types[0], (op.stride, op.padding, op.dilation, op.groups), like)


def _fractional(op: ops.FractionalConv2d, types: tuple[IntType, ...], like: Tensor) -> Step:
    gate, merge = constant(op.gate, like).reshape(1, -1, 1, 1), op.merge
    conv = _convolution(op.weight, IntType(types[0].shape, -1, 1), (op.stride, op.padding, (1, 1), op.groups), like)

    def apply(x: Tensor) -> Tensor:
        high = x.sign()
        m, low = conv(torch.cat([high, torch.sub(x, high, alpha=2)])).chunk(2)  # both planes in one call
        low = low * (m >= gate)
        return low.add_(m, alpha=2) if merge is None else merge(m, low)

    return apply


def _dense(op: ops.Dense, types: tuple[IntType, ...], like: Tensor) -> Step:
    weight = constant(op.weight, like).T
    return lambda x: x.flatten(1) @ weight


def _max_pool(op: ops.MaxPool, types: tuple[IntType, ...], like: Tensor) -> Step | None:
    t, b, left, r = op.padding
    if op.ceil or (t, left) != (b, r) or 2 * t > op.kernel[0] or 2 * left > op.kernel[1]:
        return None
    return lambda x: F.max_pool2d(x, op.kernel, op.stride, (t, left), op.dilation)


def _shift(op: ops.Shift, types: tuple[IntType, ...], like: Tensor) -> Step:
    """One copy for all channels that move alike, as a slice where they lie side by side."""
    channels, height, width = types[0].shape
    moves = np.stack([np.broadcast_to(op.dy, channels), np.broadcast_to(op.dx, channels)], 1)
    copies = []
    for dy, dx in np.unique(moves, axis=0).tolist():
        which = np.flatnonzero((moves == (dy, dx)).all(1))
        beside = len(which) == which[-1] - which[0] + 1
        place = slice(int(which[0]), int(which[-1]) + 1) if beside else torch.from_numpy(which).to(like.device)
        spans = [(max(0, -d), max(0, min(size, size - d)), d) for d, size in ((dy, height), (dx, width))]
        (top, bottom, _), (left, right, _) = spans
        if top < bottom and left < right:
            to = (slice(None), place, slice(top, bottom), slice(left, right))
            copies.append((to, (slice(None), place, slice(top + dy, bottom + dy), slice(left + dx, right + dx))))

    def apply(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for to, source in copies:
            y[to] = x[source]
        return y

    return apply


def _thermometer(op: ops.Thermometer, types: tuple[IntType, ...], like: Tensor) -> Step | None:
    t = types[0]
    span = np.arange(t.lo, t.hi + 1)
    if like.is_cuda or len(span) * op.thresholds.size > TABLE or len(t.shape) != 3:
        return None
    table = constant(2 * (span[:, None] >= op.thresholds[:, None]) - 1, like).flatten(0, 1)
    start = torch.arange(len(op.thresholds)) * len(span) - t.lo

    def apply(x: Tensor) -> Tensor:
        rows = F.embedding(x.permute(0, 2, 3, 1).long() + start, table)  # (N, H, W, C, bits)
        return rows.flatten(3).permute(0, 3, 1, 2)

    return apply


FORMS: dict[type, Callable[..., Step | None]] = {
    ops.Threshold: _threshold,
    ops.Requant: _requant,
    ops.Conv2d: _conv2d,
    ops.FractionalConv2d: _fractional,
    ops.Dense: _dense,
    ops.MaxPool: _max_pool,
    ops.Shift: _shift,
    ops.Thermometer: _thermometer,
}
