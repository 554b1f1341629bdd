"""Conv2d: exact integer convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, Geometry, mac, memory, side_by_side, window, words
from quantlib.hls.call import Call, Folds, Kernel, Port, Table, carrier, port
from quantlib.hls.matvec import fold_weight, in_words, matvec, products, stored
from quantlib.hls.packed import packed_cost, packed_folds, packed_hls, packed_widest
from quantlib.hls.window import Window, taps_of
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect
from quantlib.ops._lattice import lattice, stride_of, tensor_scale
from quantlib.ops._window import check_window, conv2d, out_shape, pair, quad

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Conv2d(Op):
    """y[o, r, c] = sum over i, u, v of weight[o, i, u, v] * x[g*I/groups + i, r*sh - t + u*dh, c*sw - l + v*dw]; taps outside the image
    add 0.

    x (I, H, W) -> y (O, H', W'), H' = floor((H + t + b - dh*(kh-1) - 1) / sh) + 1. weight (O, I/groups, kh, kw); padding is (t, b, l,
    r), may differ per side. The interval is the widest one over the output channels, from the sums of positive and of negative weights
    (with 0 where taps may be outside). GraphError when the channels or the window do not fit.
    """

    weight: np.ndarray
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stride", pair(self.stride))
        object.__setattr__(self, "padding", quad(self.padding))
        object.__setattr__(self, "dilation", pair(self.dilation))
        expect(self.weight.ndim == 4 and self.weight.size > 0, self, f"weight must be (O, I/groups, kh, kw), got shape {self.weight.shape}")
        expect(
            self.weight.shape[0] % self.groups == 0, self, f"{self.weight.shape[0]} output channels do not split into {self.groups} groups"
        )
        check_window(self, self.weight.shape[2:], self.stride, self.padding, self.dilation)

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        shape = out_shape(self, x[0], self.weight.shape[0], self.weight.shape[2:], self.stride, self.padding, self.dilation)
        wanted = self.weight.shape[1] * self.groups
        expect(
            x[0].shape[0] == wanted,
            self,
            f"weight {self.weight.shape} in {self.groups} groups reads {wanted} channels, the input is {x[0]}",
        )
        return sum_type(self.weight, x[0], shape, any(self.padding))

    def evaluate(self, *x: Tensor) -> Tensor:
        return conv2d(x[0], constant(self.weight, x[0]), self.stride, self.padding, self.dilation, self.groups)

    def magnitude(self, *x: IntType) -> int:
        return max(
            int(np.abs(self.weight).reshape(self.weight.shape[0], -1).sum(1).max()) * x[0].magnitude,
            int(np.abs(self.weight).max()),
            x[0].magnitude,
        )

    @property
    def depthwise(self) -> bool:
        """Every channel is a group of its own with one output."""
        return self.weight.shape[1] == 1 and self.weight.shape[0] == self.groups

    @property
    def window(self) -> Geometry:
        """(kernel, stride, padding, dilation)"""
        return self.weight.shape[2:], self.stride, self.padding, self.dilation

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        o, per_group, *kernel = self.weight.shape
        packed, unpacked = packed_folds(self, x[0], y)
        return Folds(o if self.depthwise else o // self.groups, per_group, taps_of(kernel), packed, unpacked, not self.depthwise)

    def reads(self, x: Sequence[IntType], y: IntType, folding: Folding) -> tuple[Port, ...]:
        return (port(x[0], folding.pe if self.depthwise else folding.simd),)

    def widest(self, x: Sequence[IntType], y: IntType, folding: Folding) -> int:
        between = packed_widest(self, x[0], y, folding) if folding.packing else 0
        return max(super().widest(x, y, folding), between)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """Window, then taps positions of simd inputs for each of pe outputs per cycle: OH*OW * (O/pe) * (kh*kw*(I/groups)/(taps*simd))
        iterations per image; pe divides O/groups, simd I/groups.

        Depthwise (I/groups = 1, O = groups): pe channels per cycle, OH*OW * (C/pe) * kh*kw/taps. A 1x1 kernel with stride 1 and no padding
        has no window.
        """
        o, per_group, kh, kw = self.weight.shape
        pe, simd, taps = self.legal(x, y, folding).pe, folding.simd, folding.taps
        if folding.packing:
            return packed_hls(self, x[0], y, folding)
        lanes, groups = (pe, o // pe) if self.depthwise else (simd, self.groups)
        front = Window(x[0], lanes, groups, *self.window, y.shape[1:], taps=taps)
        window = front.stage()
        places, number, steps = y.shape[1] * y.shape[2], carrier(self.magnitude(*x)), kh * kw // taps
        how, weight = products(x[0], words(self, "weight"), folding, any(self.padding)), self.weight
        if self.depthwise:
            written = places * groups
            table = Table(
                "weight", lambda: in_words(stored(weight[:, 0], how).reshape(groups, pe, kh, kw), pe, taps).reshape(-1, taps * pe)
            )
            function, first = ("ql::depthwise_of", ("ql::Signs",)) if how else ("ql::depthwise", ())
            unit = Kernel("", "conv2d.hpp", function, (*first, number, places, groups, steps), (window.output,), port(y, pe),
                              written * steps, lambda: (steps * np.arange(1, written + 1),), (table,))  # fmt: skip
        else:
            table = Table("weight", lambda: fold_weight(stored(weight, how), self.groups, pe, simd, taps))
            unit = matvec(number, places, self.groups, o // self.groups // pe, steps * per_group // simd, window.output, port(y, pe),
                              (table,), silence=front.silence, how=how)  # fmt: skip
        return Call((unit,) if side_by_side(self.window) else (window, unit))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """The windows of the image, and a matrix-vector unit of pe x simd*taps products that keeps one window while it makes all outputs of
        it.

        cycles: H'*W' * O/pe * kh*kw*(I/groups)/(simd*taps) of the unit or those of the window stage. Depthwise: pe channels side by side.
        """
        if folding.packing:
            return packed_cost(self, x[0], y, folding)
        o, i, kh, kw = self.weight.shape
        pixels, weight, lanes = y.shape[1] * y.shape[2], words(self, "weight"), folding.simd * folding.taps
        vector = i * kh * kw // lanes
        unit = mac(pixels, o, i * kh * kw, x[0], weight, y.bits, folding.pe, lanes, folding.memory)
        if self.depthwise:
            return unit + window(x[0], y, self.window, folding.pe, folding.taps, vector)
        unit += memory(vector, lanes * x[0].bits)
        if side_by_side(self.window):  # between two pixels' inputs it makes the first one's outputs
            return unit + Cost(pause=(1 - folding.pe * self.groups / o) / (pixels * self.groups))
        return unit + window(x[0], y, self.window, folding.simd, folding.taps, vector, o // self.groups // folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(1)

        def w(*shape: int, lo: int = -4, hi: int = 4) -> np.ndarray:
            return rng.integers(lo, hi, shape)

        image = IntType((3, 7, 6), 0, 255)
        return [
            (cls(w(5, 3, 3, 3)), (image,)),
            (cls(w(4, 3, 3, 3), stride=(2, 1), padding=(1, 0, 2, 1)), (image,)),
            (cls(2 * w(6, 2, 3, 3, lo=0, hi=2) - 1, padding=(1, 1, 1, 1)), (IntType((2, 5, 5), -1, 1, 1.0, 2),)),
            (cls(2 * w(6, 2, 2, 3, lo=0, hi=2) - 1), (IntType((2, 5, 5), -3, 3, 1.0, 2),)),
            (cls(w(6, 1, 3, 3), stride=(2, 2), padding=(0, 1, 0, 1), groups=6), (IntType((6, 6, 5), -8, 7),)),
            (cls(w(8, 3, 2, 2), dilation=(2, 3), padding=(1, 2, 0, 3), groups=2), (IntType((6, 5, 5), -2, 1),)),
            (cls(w(8, 6, 1, 1, lo=-128, hi=128)), (IntType((6, 3, 3), -128, 127),)),
            (cls(w(2, 4, 3, 3, lo=-128, hi=128), stride=(3, 3)), (IntType((4, 3, 3), -(2**15), 2**15 - 1),)),
            (cls(np.zeros((2, 1, 1, 1))), (IntType((1, 2, 2), 0, 3),)),
        ]


def sum_type(weight: np.ndarray, x: IntType, shape: tuple[int, ...], padded: bool) -> IntType:
    """Interval and lattice of sum(weight[o] * x) over all output channels o; `padded`: any tap may read 0 instead."""
    rows = weight.reshape(len(weight), -1)
    total = rows.sum(1).astype(object if x.magnitude > 2**40 else np.int64)
    positive = rows.sum(1, where=rows > 0).astype(total.dtype)
    negative = total - positive
    least, most = (min(x.lo, 0), max(x.hi, 0)) if padded else (x.lo, x.hi)
    lo, hi = int((positive * least + negative * most).min()), int((positive * most + negative * least).max())
    common = _common_divisor(rows)
    others = [common * x.lo] if padded else [int(v) for v in x.lo * (total - total[0])]
    return IntType(shape, lo, hi, tensor_scale(x), lattice(lo, hi, common * stride_of(x), *others))


def _common_divisor(rows: np.ndarray) -> int:
    """The greatest common divisor of all entries; the first rows mostly settle it."""
    common = 0
    for row in rows:
        common = gcd(common, int(np.gcd.reduce(row)))
        if common == 1:
            break
    return common
