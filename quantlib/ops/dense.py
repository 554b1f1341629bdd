"""Dense: exact integer matrix-vector product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from quantlib.cost import Cost, mac, memory, words
from quantlib.hls.call import Call, Folds, Port, Table, carrier, port, stream_order
from quantlib.hls.matvec import matvec, products, stored
from quantlib.hls.packed import packed_cost, packed_folds, packed_hls, packed_widest
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, constant, expect
from quantlib.ops.conv2d import sum_type

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Dense(Op):
    """y[o] = sum over k of weight[o, k] * x.flat[k], the input read in C order (channel-major).

    x any shape with K elements -> y (O,). weight (O, K). The interval is the widest one over the outputs, from the sums of positive and of
    negative weights. GraphError when the input has another number of elements.
    """

    weight: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.weight.ndim == 2 and self.weight.size > 0, self, f"weight must be (O, K), got shape {self.weight.shape}")

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        expect(
            x[0].numel == self.weight.shape[1],
            self,
            f"weight {self.weight.shape} reads {self.weight.shape[1]} integers, the input is {x[0]}",
        )
        return sum_type(self.weight, x[0], (self.weight.shape[0],), False)

    def evaluate(self, *x: Tensor) -> Tensor:
        rows, weight = x[0].flatten(1), constant(self.weight, x[0])
        if rows.is_cuda and not rows.is_floating_point():
            return (rows.cpu() @ weight.cpu().T).to(rows.device)
        return rows @ weight.T

    def magnitude(self, *x: IntType) -> int:
        return max(int(np.abs(self.weight).sum(1).max()) * x[0].magnitude, int(np.abs(self.weight).max()), x[0].magnitude)

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        packed, unpacked = packed_folds(self, x[0], y)
        o, k = self.weight.shape
        return Folds(o, k, packed=packed, unpacked=unpacked, streams=True)

    def reads(self, x: Sequence[IntType], y: IntType, folding: Folding) -> tuple[Port, ...]:
        return (port(x[0], folding.simd),)

    def widest(self, x: Sequence[IntType], y: IntType, folding: Folding) -> int:
        between = packed_widest(self, x[0], y, folding) if folding.packing else 0
        return max(super().widest(x, y, folding), between)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """pe outputs x simd inputs per cycle, inputs in stream order (H, W, C): (O/pe) * (K/simd) iterations; pe divides O, simd K."""
        o, k = self.weight.shape
        pe, simd = self.legal(x, y, folding).pe, folding.simd
        if folding.packing:
            return packed_hls(self, x[0], y, folding)

        how = products(x[0], words(self, "weight"), folding, False)

        def weight() -> np.ndarray:
            columns = stored(self.weight, how)[:, stream_order(np.arange(k).reshape(x[0].shape))]
            return columns.reshape(o // pe, pe, k // simd, simd).transpose(0, 2, 1, 3).reshape(-1, pe, simd)

        kernel = matvec(carrier(self.magnitude(*x)), 1, 1, o // pe, k // simd, port(x[0], simd), port(y, pe), (Table("weight", weight),),
                        "dense.hpp", how=how)  # fmt: skip
        return Call((kernel,))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """A matrix-vector unit of pe x simd products behind a buffer of the input, which every group of outputs reads again."""
        if folding.packing:
            return packed_cost(self, x[0], y, folding)
        o, k = self.weight.shape
        unit = mac(1, o, k, x[0], words(self, "weight"), y.bits, folding.pe, folding.simd, folding.memory)
        return unit + memory(k // folding.simd, folding.simd * x[0].bits) + Cost(pause=1 - folding.pe / o)

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(2)
        return [
            (cls(rng.integers(-8, 8, (5, 12))), (IntType((12,), 0, 15),)),
            (cls(rng.integers(-1, 2, (4, 18))), (IntType((2, 3, 3), -128, 127),)),
            (cls(2 * rng.integers(0, 2, (6, 10)) - 1), (IntType((10, 1, 1), -1, 1, 1.0, 2),)),
            (cls(rng.integers(-128, 128, (1, 1))), (IntType((1,), -(2**20), 2**20),)),
        ]
