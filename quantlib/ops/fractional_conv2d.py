"""FractionalConv2d: a two-bit convolution whose low plane is gated by the sum of the high one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantlib.cost import Cost, Geometry, adder, compare, loop, memory, side_by_side, table, window, words, xnor_popcount
from quantlib.hls.call import Call, Folds, Port, Table, carrier, port
from quantlib.hls.matvec import fold_weight, matvec
from quantlib.hls.window import Window, taps_of
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, floor_shift, per_channel
from quantlib.ops._lattice import tensor_scale
from quantlib.ops._window import check_window, conv2d, out_shape, pair, quad

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True)
class FixedMerge:
    """The fixed-point merge of an accelerator: t = R(msb * sat(M << fraction_in)); out = sat(((t << shift) + lsb * sat(L << fraction_in)
    + half) >> shift)

    with half = 1 << (shift - 1), R(v) = sat((v + half) >> shift) and sat clamping to lo..hi. The defaults are those of
    FracBNN's CIFAR-10 accelerator: 16-bit words with 7 fraction bits, 171/256 and 85/256 for two thirds and one third.
    """

    msb: int = 171
    lsb: int = 85
    fraction_in: int = 7
    shift: int = 8
    lo: int = -32768
    hi: int = 32767

    def __call__(self, m: Tensor, low: Tensor) -> Tensor:
        half = (1 << self.shift) >> 1
        t = floor_shift(self.msb * (m * (1 << self.fraction_in)).clamp(self.lo, self.hi) + half, self.shift).clamp(self.lo, self.hi)
        return floor_shift(
            t * (1 << self.shift) + self.lsb * (low * (1 << self.fraction_in)).clamp(self.lo, self.hi) + half, self.shift
        ).clamp(self.lo, self.hi)

    def magnitude(self, taps: int) -> int:
        """Bound on every intermediate for sums of `taps` signs."""
        word = max(abs(self.lo), abs(self.hi))
        return max(taps << self.fraction_in, (word << self.shift) + max(abs(self.lsb), abs(self.msb)) * word + (1 << self.shift))


@dataclass(frozen=True, eq=False)
class FractionalConv2d(Op):
    """Two-bit codes n in {-3, -1, 1, 3} are two signs, n = 2m + l with m = sign(n); the low plane counts only where the high sum reaches
    a gate.

    M[o] = conv(weight, m), L[o] = conv(weight, l) (taps outside the image add 0 to both); y = 2M + (L where M >= gate[o] else 0), or
    merge(M, L where open else 0) with a FixedMerge. x (I, H, W) with lo -3, hi 3, step 2 -> y (O, H', W'). weight (O, I/groups, kh, kw)
    of +-1; gate (O,). Source: FracBNN (specification section 7, step 3, for the merge). GraphError for other codes, weights or shapes.
    """

    weight: np.ndarray
    gate: np.ndarray
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    merge: FixedMerge | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stride", pair(self.stride))
        object.__setattr__(self, "padding", quad(self.padding))
        expect(self.weight.ndim == 4 and self.weight.size > 0, self, f"weight must be (O, I/groups, kh, kw), got shape {self.weight.shape}")
        expect(bool((np.abs(self.weight) == 1).all()), self, "weights are +1 or -1")
        expect(
            self.gate.shape == self.weight.shape[:1],
            self,
            f"gate has shape {self.gate.shape}, one per output channel of weight {self.weight.shape} is needed",
        )
        expect(
            self.weight.shape[0] % self.groups == 0, self, f"{self.weight.shape[0]} output channels do not split into {self.groups} groups"
        )
        check_window(self, self.weight.shape[2:], self.stride, self.padding, (1, 1))

    @property
    def taps(self) -> int:
        """Products in one sum."""
        return int(np.prod(self.weight.shape[1:]))

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        shape = out_shape(self, x[0], self.weight.shape[0], self.weight.shape[2:], self.stride, self.padding)
        wanted = self.weight.shape[1] * self.groups
        expect(
            x[0].shape[0] == wanted,
            self,
            f"weight {self.weight.shape} in {self.groups} groups reads {wanted} channels, the input is {x[0]}",
        )
        expect((x[0].lo, x[0].hi, x[0].step) == (-3, 3, 2), self, f"reads the codes -3, -1, 1, 3, the input is {x[0]}")
        k = self.taps
        if self.merge is None:
            gate = np.clip(self.gate, -k, k + 1)
            opens, closes = gate <= k, gate > -k
            lo = min(int(np.where(closes, -2 * k, -3 * k).min()), int(np.where(opens, 2 * gate - k, -2 * k).min()))
            hi = 3 * k if opens.any() else 2 * k
        else:
            m, low = torch.tensor([-k, -k, -k, k, k, k]), torch.tensor([-k, 0, k, -k, 0, k])
            corners = self.merge(m, low)  # monotone in M and in L, so the extremes lie at the corners
            lo, hi = int(corners.min()), int(corners.max())
        return IntType(shape, lo, hi, tensor_scale(x[0]))

    def evaluate(self, *x: Tensor) -> Tensor:
        weight = constant(self.weight, x[0])
        high = x[0].sign()
        m = conv2d(high, weight, self.stride, self.padding, (1, 1), self.groups)
        if self.merge is None:
            both = conv2d(x[0], weight, self.stride, self.padding, (1, 1), self.groups)  # 2M + L
            return both.where(m >= per_channel(self.gate, m), m + m)
        low = conv2d(x[0] - 2 * high, weight, self.stride, self.padding, (1, 1), self.groups)
        return self.merge(m, low * (m >= per_channel(self.gate, m)))

    def magnitude(self, *x: IntType) -> int:
        return max(3 * self.taps, int(np.abs(self.gate).max()), 0 if self.merge is None else self.merge.magnitude(self.taps))

    @property
    def window(self) -> Geometry:
        """(kernel, stride, padding, dilation)"""
        return self.weight.shape[2:], self.stride, self.padding, (1, 1)

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        o, per_group, *kernel = self.weight.shape
        return Folds(o // self.groups, per_group, taps_of(kernel))

    def reads(self, x: Sequence[IntType], y: IntType, folding: Folding) -> tuple[Port, ...]:
        return (port(x[0], folding.simd),)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """As Conv2d: OH*OW * (O/pe) * (kh*kw*(I/groups)/(taps*simd)) iterations per image; pe divides O/groups, simd I/groups."""
        o, per_group, kh, kw = self.weight.shape
        pe, simd, taps = self.legal(x, y, folding).pe, folding.simd, folding.taps
        front = Window(x[0], simd, self.groups, *self.window, y.shape[1:], taps=taps)
        window = front.stage()
        tables = (
            Table("weight", lambda: fold_weight(self.weight > 0, self.groups, pe, simd, taps).astype(np.int64)),
            Table("gate", lambda: np.clip(self.gate, -self.taps, self.taps + 1).reshape(o // pe, pe)),
        )
        m = self.merge
        merge = "ql::PlainMerge" if m is None else f"ql::FixedMerge<{m.msb}, {m.lsb}, {m.fraction_in}, {m.shift}, {m.lo}, {m.hi}>"
        places, number = y.shape[1] * y.shape[2], carrier(self.magnitude(*x))
        products = matvec(number, places, self.groups, o // self.groups // pe, kh * kw * per_group // (simd * taps),
                          window.output, port(y, pe), tables, "fractional_conv2d.hpp", "ql::gated_matvec", (merge, any(self.padding)),
                          front.silence)  # fmt: skip
        return Call((products,) if side_by_side(self.window) else (window, products))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """Two XNOR-popcounts (the planes m and l) per pe and cycle over one weight memory, a compare with the gate, a sum.

        cycles: H'*W' * O/pe * kh*kw*(I/groups)/(simd*taps), or those of the window stage.
        """
        o, i, kh, kw = self.weight.shape
        lanes = folding.simd * folding.taps
        vector = i * kh * kw // lanes
        steps = (o // folding.pe) * vector
        planes = (xnor_popcount(lanes) + adder(self.taps.bit_length() + 1)).times(2)
        # A merge multiplies by two constants of 8 bits: about four additions of the word each, with rounding and two clamps.
        join = adder(y.bits) if self.merge is None else adder(y.bits + self.merge.shift).times(11)
        unit = planes + compare(self.taps.bit_length() + 1) + join + memory(steps, lanes, folding.memory)
        control = loop(y.shape[1] * y.shape[2] * steps, folding.pe * y.bits)
        kept = memory(vector, lanes * x[0].bits)
        if side_by_side(self.window):  # as in Conv2d
            front = Cost(pause=(1 - folding.pe * self.groups / o) / (y.shape[1] * y.shape[2] * self.groups))
        else:
            front = window(x[0], y, self.window, folding.simd, folding.taps, vector, o // self.groups // folding.pe)
        return control + unit.times(folding.pe) + table(o, words(self, "gate").bits, folding.pe) + kept + front

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(3)

        def w(*shape: int) -> np.ndarray:
            return 2 * rng.integers(0, 2, shape) - 1

        x = IntType((4, 5, 6), -3, 3, 1.0, 2)
        return [
            (cls(w(6, 4, 3, 3), rng.integers(-6, 7, 6), padding=(1, 1, 1, 1)), (x,)),
            (cls(w(6, 4, 3, 3), rng.integers(-6, 7, 6), stride=(2, 2), padding=(0, 1, 2, 0)), (x,)),
            (cls(w(4, 2, 2, 3), np.array([-100, 100, 0, 3]), groups=2), (x,)),
            (cls(w(6, 4, 3, 3), rng.integers(-6, 7, 6), padding=(1, 1, 1, 1), merge=FixedMerge()), (x,)),
            (cls(w(5, 4, 3, 3), rng.integers(-6, 7, 5), merge=FixedMerge(fraction_in=12)), (x,)),
            (cls(w(3, 4, 1, 1), np.array([-1, 0, 1]), merge=FixedMerge(3, -2, 2, 3, -20, 19)), (x,)),
        ]
