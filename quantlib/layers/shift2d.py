from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.ops.shift import Shift

CROSS = ((-1, 0), (0, -1), (0, 0), (0, 1), (1, 0))  # (dy, dx) of channels 0..4, 5..9, ...: down, right, stay, left, up
Groups = tuple[tuple[slice | list[int], int, int], ...]  # channels that move alike, dy, dx


def grouped(dy: Sequence[int], dx: Sequence[int]) -> Groups:
    """Channels that move alike, as a slice where they are evenly spaced."""
    moves = list(zip(dy, dx))
    groups: list[tuple[slice | list[int], int, int]] = []
    for move in dict.fromkeys(moves):
        channels = [c for c, m in enumerate(moves) if m == move]
        step = channels[1] - channels[0] if len(channels) > 1 else 1
        even = channels == list(range(channels[0], channels[-1] + 1, step))
        groups.append((slice(channels[0], channels[-1] + 1, step) if even else channels, *move))
    return tuple(groups)


def _overlap(distance: int, size: int) -> tuple[slice, slice]:
    """Where to read, and where to write, so that each place gets what lies `distance` further on."""
    return slice(max(distance, 0), size + min(distance, 0)), slice(max(-distance, 0), size + min(-distance, 0))


def shift(x: Tensor, groups: Groups) -> Tensor:
    """y[:, c, i, j] = x[:, c, i + dy, j + dx] for the channels of each group, 0 outside. No gradient."""
    y = torch.zeros_like(x)
    height, width = x.shape[2:]
    for channels, dy, dx in groups:
        if abs(dy) < height and abs(dx) < width:
            (rows, to_rows), (columns, to_columns) = _overlap(dy, height), _overlap(dx, width)
            y[:, channels, to_rows, to_columns] = x[:, channels, rows, columns]
    return y


class _Shift(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return shift(x, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return shift(grad, tuple((channels, -dy, -dx) for channels, dy, dx in ctx.groups)), None


class Shift2d(Layer, nn.Module):
    """Every channel moved by its own whole number of pixels: a depthwise convolution with one-hot kernels, without a product.

    Forward:   y[c, i, j] = x[c, i + dy[c], j + dx[c]], 0 outside the map
    Gradient:  dx[c, i, j] = dy[c, i - dy[c], j - dx[c]], 0 outside
    Shapes:    x and y (N, C, H, W)
    Arguments: channels C; moves, the (dy, dx) of channels 0, 1, ..., repeated as often as needed: unless given the five of the published
               code, so that channel c reads above, left, in place, right, below for c mod 5 = 0, 1, 2, 3, 4
    State:     none
    Errors:    ValueError for another number of channels
    Source:    DiracDeltaNet (arXiv 1811.08634), published code; shift: Wu et al., arXiv 1711.08141

    >>> x = torch.arange(1.0, 5).reshape(1, 1, 2, 2)
    >>> Shift2d(1)(x).tolist(), Shift2d(1, moves=[(0, 1)])(x).tolist()
    ([[[[0.0, 0.0], [1.0, 2.0]]]], [[[[2.0, 0.0], [4.0, 0.0]]]])
    """

    moves = True

    def __init__(self, channels: int, moves: Sequence[tuple[int, int]] = CROSS) -> None:
        super().__init__()
        if channels < 1 or not moves:
            raise ValueError(f"a shift needs channels and moves, got channels={channels}, moves={moves}")
        self.channels = channels
        rows = [moves[c % len(moves)] for c in range(channels)]
        self.dy, self.dx = tuple(int(m[0]) for m in rows), tuple(int(m[1]) for m in rows)
        self.groups = grouped(self.dy, self.dx)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"Shift2d({self.channels}) takes (N, {self.channels}, H, W), got {tuple(x.shape)}")
        return _Shift.apply(x, self.groups)

    def lower(self, g: Any, x: Any) -> Any:
        return g.add(Shift(np.array(self.dy), np.array(self.dx)), g.integer(x))

    def kernel(self) -> Tensor:
        """The same as one-hot kernels (C, 1, k, k) of a depthwise convolution (cross-correlation) with padding k // 2."""
        reach = max(map(abs, (*self.dy, *self.dx)))
        kernel = torch.zeros(self.channels, 1, 2 * reach + 1, 2 * reach + 1)
        kernel[range(self.channels), 0, [reach + d for d in self.dy], [reach + d for d in self.dx]] = 1
        return kernel

    def extra_repr(self) -> str:
        return f"{self.channels}"

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(14)
        x = torch.randn(3, 7, 4, 6)
        far = Shift2d(7, [(2, -1), (0, 0), (-3, 3), (2, -1)])
        return [(nn.Sequential(FixedPoint(6, 3), m), x) for m in (Shift2d(7), far)]
