"""Geometry of sliding windows over (C, H, W), shared by convolutions and pools. Padding is (top, bottom, left, right)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quantlib.ir import IntType
from quantlib.ops._base import Op, expect


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    a, b = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
    return int(a), int(b)


def quad(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding as (t, b, l, r); an int pads all sides, a pair is (vertical, horizontal)."""
    v = (value,) * 4 if isinstance(value, (int, np.integer)) else tuple(value)
    if len(v) == 2:
        v = (v[0], v[0], v[1], v[1])
    t, b, left, r = (int(p) for p in v)
    return t, b, left, r


def check_window(op: Op, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    expect(min(*kernel, *stride, *dilation) >= 1, op, f"kernel {kernel}, stride {stride} and dilation {dilation} must be at least 1")
    expect(min(padding) >= 0, op, f"padding {padding} must not be negative")


def out_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1, ceil: bool = False) -> int:
    """Number of windows along one axis; with `ceil` as torch counts them: the last one starts inside the image or its left padding."""
    room = size + before + after - dilation * (kernel - 1) - 1
    if room < 0:
        return 0
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count


def out_shape(op: Op, x: IntType, channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int] = (1, 1), ceil: bool = False) -> tuple[int, int, int]:  # fmt: skip
    expect(len(x.shape) == 3, op, f"the input must be (C, H, W), got {x}")
    _, h, w = x.shape
    t, b, left, r = padding
    rows, cols = out_size(h, kernel[0], stride[0], t, b, dilation[0], ceil), out_size(w, kernel[1], stride[1], left, r, dilation[1], ceil)
    expect(
        rows >= 1 and cols >= 1,
        op,
        f"a {kernel[0]}x{kernel[1]} window with padding {tuple(padding)}, dilation {tuple(dilation)} does not fit the input {x}",
    )
    return channels, rows, cols


def taps_inside(size: int, count: int, kernel: int, stride: int, before: int, dilation: int = 1) -> np.ndarray:
    """For each of the `count` windows along one axis, how many of its taps lie in the image."""
    at = np.arange(count)[:, None] * stride - before + np.arange(kernel) * dilation
    return ((at >= 0) & (at < size)).sum(1)


def pad_value(x: Tensor, padding: Sequence[int], value: float) -> Tensor:
    t, b, left, r = padding
    return F.pad(x, (left, r, t, b), value=value) if any(padding) else x


def conv2d(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """Exact convolution in the carrier of x: a plain sum of products, whatever the device.

    On a GPU the sum is a matrix product over unfolded windows, because the library's convolutions may use transforms (Winograd, FFT)
    whose intermediates are no integers; integers themselves are summed on the CPU.
    """
    if not x.is_cuda:
        t, b, left, r = padding
        if (t, left) != (b, r):
            x, t, left = pad_value(x, padding, 0), 0, 0
        return F.conv2d(x, weight, stride=tuple(stride), padding=(t, left), dilation=tuple(dilation), groups=groups)
    if not x.is_floating_point():
        return conv2d(x.cpu(), weight.cpu(), stride, padding, dilation, groups).to(x.device)
    n, x = x.shape[0], pad_value(x, padding, 0)
    o, i, kh, kw = weight.shape
    rows, cols = out_size(x.shape[2], kh, stride[0], 0, 0, dilation[0]), out_size(x.shape[3], kw, stride[1], 0, 0, dilation[1])
    windows = F.unfold(x, (kh, kw), dilation=tuple(dilation), stride=tuple(stride)).reshape(n, groups, i * kh * kw, rows * cols)
    return torch.matmul(weight.reshape(1, groups, o // groups, i * kh * kw), windows).reshape(n, o, rows, cols)
