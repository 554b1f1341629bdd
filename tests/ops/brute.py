"""The ops once more, as plain loops over numpy arrays of Python-sized integers: one image at a time, no vectorising, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray
BRUTE: dict[str, Callable[..., Array]] = {}


def brute(f: Callable[..., Array]) -> Callable[..., Array]:
    BRUTE[f.__name__] = f
    return f


def at(table: Array, c: int) -> Any:
    """Entry of channel c where the table holds one entry for all or one per channel."""
    return table[c if len(table) > 1 else 0]


def places(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return iter(np.ndindex(*shape))


def windows(
    x: Array, kernel: Any, stride: Any, padding: Any, dilation: Any, shape: Any, outside: Any
) -> Iterator[tuple[int, int, list[tuple[int, int, Any]]]]:
    """For every output pixel the taps (u, v, column of all channels or `outside`)."""
    for r in range(shape[0]):
        for q in range(shape[1]):
            taps = []
            for u in range(kernel[0]):
                for v in range(kernel[1]):
                    i, j = r * stride[0] - padding[0] + u * dilation[0], q * stride[1] - padding[2] + v * dilation[1]
                    taps.append((u, v, x[:, i, j] if 0 <= i < x.shape[1] and 0 <= j < x.shape[2] else outside))
            yield r, q, taps


def grouped(weight: Array, x: Array, groups: int, op: Any, shape: Any, dilation: Any) -> Array:
    y = np.zeros(shape, dtype=object)
    per_in, per_out = weight.shape[1], weight.shape[0] // groups
    for r, q, taps in windows(x, weight.shape[2:], op.stride, op.padding, dilation, shape[1:], None):
        for o in range(weight.shape[0]):
            first = (o // per_out) * per_in
            y[o, r, q] = sum(int(weight[o, i, u, v]) * int(col[first + i]) for u, v, col in taps if col is not None for i in range(per_in))
    return y


@brute
def Conv2d(op: Any, y: Any, x: Array) -> Array:
    return grouped(op.weight, x, op.groups, op, y.shape, op.dilation)


@brute
def FractionalConv2d(op: Any, y: Any, x: Array) -> Array:
    m = np.vectorize(lambda n: 1 if n > 0 else -1)(x)
    high, low = (grouped(op.weight, v, op.groups, op, y.shape, (1, 1)) for v in (m, x - 2 * m))
    out = np.zeros(y.shape, dtype=object)
    for o, r, q in places(y.shape):
        M, L = int(high[o, r, q]), int(low[o, r, q]) if high[o, r, q] >= op.gate[o] else 0
        if op.merge is None:
            out[o, r, q] = 2 * M + L
            continue
        g = op.merge

        def sat(v: int, g: Any = g) -> int:
            return max(g.lo, min(g.hi, v))

        half = 1 << (g.shift - 1)
        t = sat((g.msb * sat(M << g.fraction_in) + half) >> g.shift)
        out[o, r, q] = sat(((t << g.shift) + g.lsb * sat(L << g.fraction_in) + half) >> g.shift)
    return out


@brute
def Dense(op: Any, y: Any, x: Array) -> Array:
    flat = [int(v) for v in x.reshape(-1)]
    return np.array([sum(int(w) * v for w, v in zip(row, flat, strict=True)) for row in op.weight], dtype=object)


@brute
def SaturatingDense(op: Any, y: Any, x: Array) -> Array:
    out, half = [], (1 << op.shift) >> 1
    for row, bias in zip(op.weight, op.bias, strict=True):
        acc = int(bias)
        for w, v in zip(row, x.reshape(-1), strict=True):
            acc = max(op.lo, min(op.hi, acc + ((int(w) * int(v) + half) >> op.shift)))
        out.append(acc)
    return np.array(out, dtype=object)


def elementwise(f: Callable[..., int]) -> Callable[..., Array]:
    def run(op: Any, y: Any, *x: Array) -> Array:
        out = np.zeros(x[0].shape, dtype=object)
        for place in places(x[0].shape):
            out[place] = f(op, place[0], *(int(v[place]) for v in x))
        return out

    run.__name__ = f.__name__
    return brute(run)


@elementwise
def Threshold(op: Any, c: int, n: int) -> int:
    return op.lo + op.step * sum(int(at(op.sign, c)) * n >= int(t) for t in at(op.thresholds, c))


@elementwise
def Lut(op: Any, c: int, n: int) -> int:
    return int(at(op.table, c)[(n - op.lo_in) // op.step_in])


@elementwise
def Requant(op: Any, c: int, n: int) -> int:
    mul, add = (op.mul, op.add) if op.kink is None or n >= at(op.kink, c) else (op.mul2, op.add2)
    return max(op.lo, min(op.hi, (n * int(at(mul, c)) + int(at(add, c))) >> op.shift))


@elementwise
def Add(op: Any, c: int, a: int, b: int) -> int:
    return a + b


@brute
def Multiply(op: Any, y: Any, a: Array, b: Array) -> Array:
    out = np.zeros(a.shape, dtype=object)
    for place in places(a.shape):
        out[place] = int(a[place]) * int(b[place] if b.shape == a.shape else b.reshape(-1)[place[0]])
    return out


def narrow(op: Any, codes: tuple[int, ...]) -> int:
    k = 0
    for n, size, low, step in zip(codes, op.sizes, op.lows, op.steps, strict=True):
        k = k * size + (n - low) // step
    return k


@elementwise
def Join(op: Any, c: int, wide: int, *codes: int) -> int:
    k = narrow(op, codes)
    sign = int(at(at(op.sign, c), k))
    return op.lo + op.step * sum(sign * wide >= int(t) for t in at(op.thresholds, c)[k])


@elementwise
def AffineJoin(op: Any, c: int, wide: int, *codes: int) -> int:
    v = ((int(at(op.sign, c)) * wide) << op.shift) + int(at(op.offset, c)[narrow(op, codes)])
    return op.lo + op.step * sum(v >= int(t) for t in at(op.thresholds, c))


def pooled(op: Any, y: Any, x: Array, dilation: Any, f: Callable[[list[int]], int]) -> Array:
    out = np.zeros(y.shape, dtype=object)
    for r, q, taps in windows(x, op.kernel, op.stride, op.padding, dilation, y.shape[1:], None):
        for c in range(y.shape[0]):
            out[c, r, q] = f([int(col[c]) for _, _, col in taps if col is not None])
    return out


@brute
def MaxPool(op: Any, y: Any, x: Array) -> Array:
    return pooled(op, y, x, op.dilation, max)


@brute
def SumPool(op: Any, y: Any, x: Array) -> Array:
    return pooled(op, y, x, (1, 1), sum)


@brute
def Reshape(op: Any, y: Any, x: Array) -> Array:
    return x.reshape(op.shape)


@brute
def Select(op: Any, y: Any, x: Array) -> Array:
    return np.stack([x[c] for c in op.channels])


@brute
def Slice2d(op: Any, y: Any, x: Array) -> Array:
    return np.array([[[x[c, i, j] for j in range(*op.cols)] for i in range(*op.rows)] for c in range(x.shape[0])], dtype=object)


@brute
def Rearrange(op: Any, y: Any, x: Array) -> Array:
    flat = list(x.reshape(-1))
    return np.array([flat[i] for i in op.index.reshape(-1)], dtype=object).reshape(op.index.shape)


@brute
def Concat(op: Any, y: Any, *x: Array) -> Array:
    return np.array([plane for v in x for plane in v], dtype=object)


@brute
def Shift(op: Any, y: Any, x: Array) -> Array:
    out = np.zeros(y.shape, dtype=object)
    for c, r, q in places(y.shape):
        i, j = r + int(at(op.dy, c)), q + int(at(op.dx, c))
        if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
            out[c, r, q] = x[c, i, j]
    return out


@brute
def Pad(op: Any, y: Any, x: Array) -> Array:
    out = np.zeros(y.shape, dtype=object)
    for c, i, j in places(x.shape):
        out[c + op.before[0], i + op.before[1], j + op.before[2]] = x[c, i, j]
    return out


@brute
def Thermometer(op: Any, y: Any, x: Array) -> Array:
    bits = op.thresholds.shape[1]
    out = np.zeros(y.shape, dtype=object)
    for place in places(y.shape):
        c, b = divmod(place[0], bits)
        out[place] = 1 if x[(c, *place[1:])] >= at(op.thresholds, c)[b] else -1
    return out
