"""Small shared facts about edges: lattices, scales that follow structural ops, and counting thresholds."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from torch import Tensor

from quantlib.ir import IntType
from quantlib.ops._base import Op, constant, expect

COMPARES = 15  # up to this many levels, one compare per level beats any search
TABLE = 1 << 20  # entries of a per-channel table of codes that may be built instead of a search


def stride_of(x: IntType) -> int:
    """The step of the lattice, 0 for an edge of one single value (which lies on every lattice)."""
    return x.step if x.levels > 1 else 0


def lattice(lo: int, hi: int, *strides: int) -> int:
    """The step that describes lo..hi when all differences of values are sums of multiples of `strides`."""
    step = gcd(*strides, hi - lo) if strides else hi - lo
    return step or 1


def tensor_scale(x: IntType) -> np.ndarray:
    """The scale of x where it is one for the whole edge, else 1 (the caller of infer knows the right one)."""
    scale = np.asarray(x.scale)
    return scale.reshape(()) if scale.size == 1 else np.array(1.0)


def channel_scale(x: IntType) -> np.ndarray:
    """The scale of a (C, H, W) edge where it does not vary over H and W, else 1."""
    scale = np.asarray(x.scale)
    return scale if scale.shape[-2:] == (1, 1) else tensor_scale(x)


def carry_scale(op: Op, x: tuple[IntType, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The scale behind a structural op: the op applied to the scales, squeezed to () or (C, 1, 1) where that says the same."""
    scales = [np.asarray(t.scale) for t in x]
    if all(s.size == 1 for s in scales) and len({float(s.reshape(())) for s in scales}) == 1:
        return scales[0].reshape(())
    full = [torch.from_numpy(np.broadcast_to(s, t.shape).copy())[None] for s, t in zip(scales, x, strict=True)]
    scale = op.evaluate(*full)[0].numpy().reshape(shape)
    if (scale == scale.flat[0]).all():
        return scale.reshape(-1)[:1].reshape(())
    first = scale[(slice(None), *[slice(0, 1)] * (scale.ndim - 1))]
    return first if (scale == first).all() else scale


def count_reached(v: Tensor, thresholds: np.ndarray) -> Tensor:
    """#{k : v >= thresholds[c][k]} for a batch (N, C, ...); thresholds (C or 1, L) with non-decreasing rows. Same carrier as v."""
    channels, levels = thresholds.shape
    t = constant(thresholds, v).reshape(1, channels, *[1] * (v.dim() - 2), levels)
    if levels <= COMPARES:
        if not levels:
            return torch.zeros_like(v)
        count = (v >= t[..., 0]).to(v.dtype)
        for k in range(1, levels):
            count.add_(v >= t[..., k])
        return count
    first, last = int(thresholds.min()), int(thresholds.max())
    span = last - first + 2
    if channels * span <= TABLE:
        ramp = np.arange(first - 1, last + 1)
        table = np.concatenate([np.searchsorted(row, ramp, side="right") for row in thresholds])
        index = (v.clamp(first - 1, last) - (first - 1)).long()
        if channels > 1:
            index += (torch.arange(channels, device=v.device) * span).reshape(1, -1, *[1] * (v.dim() - 2))
        return constant(table, v)[index]
    rows = v.transpose(0, 1).reshape(channels, -1) if channels > 1 else v.reshape(1, -1)
    found = torch.searchsorted(constant(thresholds, v), rows.contiguous(), right=True).to(v.dtype)
    return found.reshape(v.shape[1], v.shape[0], *v.shape[2:]).transpose(0, 1) if channels > 1 else found.reshape(v.shape)


def count_reached_at(v: Tensor, row: Tensor, thresholds: np.ndarray) -> Tensor:
    """#{j : v >= thresholds[row][j]}, the row chosen per element; thresholds (R, L) with non-decreasing rows, row int64 like v."""
    levels = thresholds.shape[1]
    if levels <= COMPARES:
        count = torch.zeros_like(v)
        for j in range(levels):
            count.add_(v >= constant(thresholds[:, j], v)[row])
        return count
    flat, base = constant(thresholds.reshape(-1), v), row * levels
    count = torch.zeros_like(row)
    for bit in reversed(range(levels.bit_length())):
        probe = count + (1 << bit)
        inside = probe <= levels
        reached = v >= flat[base + torch.where(inside, probe, 1) - 1]
        count = torch.where(inside & reached, probe, count)
    return count.to(v.dtype)


def check_rows(op: Op, thresholds: np.ndarray, name: str = "thresholds") -> None:
    expect(bool((np.diff(thresholds, axis=-1) >= 0).all()), op, f"the rows of {name} must be non-decreasing")


def check_sign(op: Op, sign: np.ndarray) -> None:
    expect(sign.ndim == 1 and bool((np.abs(sign) == 1).all()), op, "sign holds +1 or -1, one per channel or one for all")


def signed(v: Tensor, sign: np.ndarray) -> Tensor:
    """sign[c] * v without touching v where all signs are +1."""
    if (sign == 1).all():
        return v
    if (sign == -1).all():
        return -v
    return v * constant(sign, v).reshape(1, -1, *[1] * (v.dim() - 2))


def set_narrow(op: Op, sizes: tuple[int, ...], lows: tuple[int, ...], steps: tuple[int, ...]) -> None:
    """Normalise and check what a join knows of its narrow edges: number of levels, lowest code and step of each."""
    sizes, lows = tuple(int(v) for v in sizes), tuple(int(v) for v in lows)
    steps = tuple(int(v) for v in steps) or (1,) * len(sizes)
    expect(
        len(sizes) == len(lows) == len(steps) and len(sizes) >= 1,
        op,
        f"sizes {sizes}, lows {lows} and steps {steps} need one entry per narrow edge",
    )
    expect(min(*sizes, *steps) >= 1, op, f"sizes {sizes} and steps {steps} must be at least 1")
    for name, value in (("sizes", sizes), ("lows", lows), ("steps", steps)):
        object.__setattr__(op, name, value)


def check_narrow(op: Op, x: tuple[IntType, ...], sizes: tuple[int, ...], lows: tuple[int, ...], steps: tuple[int, ...]) -> None:
    expect(len(x) == 1 + len(sizes), op, f"takes one wide and {len(sizes)} narrow inputs, got {len(x)}")
    expect(all(t.shape == x[0].shape for t in x), op, f"the shapes of {', '.join(map(str, x))} differ")
    for t, size, low, step in zip(x[1:], sizes, lows, steps, strict=True):
        fits = low <= t.lo and t.hi <= low + step * (size - 1) and (t.lo - low) % step == 0 and stride_of(t) % step == 0
        expect(fits, op, f"a narrow input is declared as {size} codes from {low} with step {step}, but it is {t}")


def narrow_index(x: tuple[Tensor, ...], sizes: tuple[int, ...], lows: tuple[int, ...], steps: tuple[int, ...], channels: int) -> Tensor:
    """The row c*K + k of a (C, K) table for each element (c = 0 when the table has one channel), int64."""
    k: Tensor | None = None
    for t, size, low, step in zip(x, sizes, lows, steps, strict=True):
        digit = (t.long() - low) // step if step > 1 else t.long() - low
        k = digit if k is None else k * size + digit
    assert k is not None
    if channels > 1:
        k = k + (torch.arange(channels, device=k.device) * int(np.prod(sizes))).reshape(1, -1, *[1] * (k.dim() - 2))
    return k
