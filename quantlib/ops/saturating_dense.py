"""SaturatingDense: a matrix-vector product whose accumulator saturates after every product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, adder, compare, loop, memory, multiply, words
from quantlib.hls.call import Call, Kernel, Table, carrier, divides, port
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect, floor_shift
from quantlib.ops._lattice import tensor_scale

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class SaturatingDense(Op):
    """acc = bias[o]; for k in order: acc = clamp(acc + ((weight[o, k] * x[k] + half) >> shift), lo, hi), half = 1 << (shift - 1); y[o] =
    acc.

    x (K,) or (K, 1, 1) -> y (O,). weight (O, K), bias (O,) within lo..hi. The order of k is part of the meaning. Source: the fixed-point
    classifier of FracBNN's CIFAR-10 accelerator (specification section 7, step 7). GraphError when shapes differ.
    """

    weight: np.ndarray
    bias: np.ndarray
    shift: int
    lo: int
    hi: int

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.weight.ndim == 2 and self.weight.size > 0, self, f"weight must be (O, K), got shape {self.weight.shape}")
        expect(self.bias.shape == self.weight.shape[:1], self, f"bias has shape {self.bias.shape}, weight {self.weight.shape}")
        expect(self.shift >= 0 and self.lo <= self.hi, self, f"shift {self.shift} and interval {self.lo}..{self.hi} make no sense")
        expect(bool((self.bias >= self.lo).all() and (self.bias <= self.hi).all()), self, f"the bias leaves {self.lo}..{self.hi}")

    @property
    def half(self) -> int:
        return (1 << self.shift) >> 1

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        k = self.weight.shape[1]
        expect(x[0].shape in ((k,), (k, 1, 1)), self, f"weight {self.weight.shape} reads {k} integers, the input is {x[0]}")
        low, high = self._terms(x[0])
        acc_lo, acc_hi = self.bias, self.bias
        for i in range(k):
            acc_lo, acc_hi = (np.clip(a + t[:, i], self.lo, self.hi) for a, t in ((acc_lo, low), (acc_hi, high)))
        return IntType((len(self.bias),), int(acc_lo.min()), int(acc_hi.max()), tensor_scale(x[0]))

    def _terms(self, x: IntType) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest value of each addend."""
        ends = np.stack([self.weight * x.lo, self.weight * x.hi])
        return (ends.min(0) + self.half) >> self.shift, (ends.max(0) + self.half) >> self.shift

    def evaluate(self, *x: Tensor) -> Tensor:
        rows, weight = x[0].flatten(1), constant(self.weight, x[0])
        acc = constant(self.bias, x[0]).expand(rows.shape[0], -1)
        for k in range(weight.shape[1]):
            acc = (acc + floor_shift(weight[:, k] * rows[:, k, None] + self.half, self.shift)).clamp(self.lo, self.hi)
        return acc.contiguous()

    def magnitude(self, *x: IntType) -> int:
        product = int(np.abs(self.weight).max()) * x[0].magnitude + self.half
        return max(product, product + max(abs(self.lo), abs(self.hi)), x[0].magnitude)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe outputs x 1 input per cycle, because the order counts: (O/pe) * K iterations per image."""
        o, k = self.weight.shape
        pe = divides(self, "pe", folding.pe, o)
        tables = (
            Table("weight", lambda: self.weight.reshape(o // pe, pe, k).transpose(0, 2, 1).reshape(-1, pe)),
            Table("bias", lambda: self.bias.reshape(o // pe, pe)),
        )
        args = (carrier(self.magnitude(*x)), o // pe, k, self.shift, self.lo, self.hi)
        return Call((Kernel("", "saturating_dense.hpp", "ql::saturating_dense", args, (port(x[0], 1),), port(y, pe), o // pe * k,
                            lambda: (np.full(o // pe, k),), tables),))  # fmt: skip

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """One product, rounding, sum and clamp per pe and cycle, in the order of k."""
        o, k = self.weight.shape
        weight = words(self, "weight")
        product = x[0].bits + weight.bits
        unit = multiply(x[0].bits, weight.bits) + adder(product) + adder(y.bits + 1) + compare(y.bits + 1).times(2)
        unit += memory(o // folding.pe * k, weight.bits, folding.memory)
        return loop(o // folding.pe * k, folding.pe * y.bits, 1 - folding.pe / o) + unit.times(folding.pe) + memory(k, x[0].bits)

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(4)
        return [
            (cls(rng.integers(-128, 128, (5, 16)), rng.integers(-100, 101, 5), 3, -128, 127), (IntType((16,), -128, 127),)),
            (cls(rng.integers(-9, 10, (3, 7)), rng.integers(-5, 6, 3), 1, -20, 30), (IntType((7, 1, 1), -3, 3, 1.0, 2),)),
            (cls(rng.integers(-9, 10, (2, 5)), np.zeros(2), 0, -1000, 1000), (IntType((5,), 0, 15),)),
            (cls(rng.integers(-2048, 2048, (10, 64)), rng.integers(-999, 999, 10), 7, -32768, 32767), (IntType((64,), -32768, 32767),)),
        ]
