"""Pad: zeros around a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from quantlib.cost import Cost, loop
from quantlib.hls.call import Call, Folds, Kernel, divides, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import lattice, stride_of, tensor_scale

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """y = x with zeros around it: before = (c, h, w) in front of each axis, after = (c, h, w) behind.

    x (C, H, W) -> y (C + before[0] + after[0], ...), the interval widened to hold 0. Zero-padded shortcuts are padded along c.
    GraphError for other ranks or negative counts.
    """

    before: tuple[int, int, int]
    after: tuple[int, int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "before", tuple(int(v) for v in self.before))
        object.__setattr__(self, "after", tuple(int(v) for v in self.after))
        expect(len(self.before) == 3 and len(self.after) == 3 and min(*self.before, *self.after) >= 0, self,
               f"before {self.before} and after {self.after} are three counts (c, h, w)")  # fmt: skip

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        expect(len(x[0].shape) == 3, self, f"the input must be (C, H, W), got {x[0]}")
        shape = tuple(a + s + b for a, s, b in zip(self.before, x[0].shape, self.after, strict=True))
        if shape == x[0].shape:
            return IntType(shape, x[0].lo, x[0].hi, x[0].scale, x[0].step)
        lo, hi = min(x[0].lo, 0), max(x[0].hi, 0)
        scale = tensor_scale(x[0])
        return IntType(shape, lo, hi, scale, lattice(lo, hi, stride_of(x[0]), x[0].lo))

    def evaluate(self, *x: Tensor) -> Tensor:
        (c0, h0, w0), (c1, h1, w1) = self.before, self.after
        return F.pad(x[0], (w0, w1, h0, h1, c0, c1))

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        return Folds(math.gcd(x[0].shape[0], self.before[0], self.after[0]))

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe channels per cycle of the output, pe dividing the channels and the zero channels: OH*OW*C'/pe iterations per image."""
        pe = divides(self, "pe", folding.pe, self.folds(x, y).pe)
        (c, h, w), (_, oh, ow) = x[0].shape, y.shape
        before, parts, after = self.before[0] // pe, c // pe, self.after[0] // pe

        def demand() -> tuple[np.ndarray]:
            inside = np.zeros((oh, ow, before + parts + after), dtype=np.int64)
            inside[self.before[1] : self.before[1] + h, self.before[2] : self.before[2] + w, before : before + parts] = 1
            return (np.cumsum(inside),)

        args = (h, w, parts, before, after, self.before[1], self.before[2], oh, ow)
        words = oh * ow * (before + parts + after)
        return Call((Kernel("", "pad.hpp", "ql::pad", args, (port(x[0], pe),), port(y, pe), words, demand),))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """One word out per cycle, zeros or those of the input."""
        return loop(y.numel // folding.pe, folding.pe * y.bits)

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            (cls((0, 1, 2), (0, 3, 0)), (IntType((3, 4, 5), -8, 7),)),
            (cls((2, 0, 0), (3, 0, 0)), (IntType((4, 3, 3), -3, 3, 1.0, 2),)),
            (cls((1, 1, 1), (1, 1, 1)), (IntType((2, 2, 3), 3, 9, 1.0, 3),)),
            (cls((0, 0, 0), (0, 0, 0)), (IntType((2, 2, 3), 3, 9, 1.0, 3),)),
        ]
