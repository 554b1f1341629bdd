"""Rearrange: any permutation or gather of a whole map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quantlib.cost import Cost, reorder
from quantlib.hls.call import Call, lanes_up_to
from quantlib.hls.reorder import rearrange
from quantlib.ir import IntType
from quantlib.ops._base import Example, Op, expect
from quantlib.ops._lattice import carry_scale

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Rearrange(Op):
    """y.flat[i] = x.flat[index.flat[i]], both in C order.

    x any shape -> y index.shape, same interval; index holds numbers in 0..numel-1. The hardware buffers the whole map, so Select,
    Slice2d and Reshape are preferred where they say the same. The scale is carried along. GraphError when an index does not exist.
    """

    index: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.index.size > 0 and self.index.ndim > 0, self, f"index is empty or has no axes: shape {self.index.shape}")

    def infer(self, *x: IntType) -> IntType:
        expect(len(x) == 1, self, f"takes one input, got {len(x)}")
        low, high = int(self.index.min()), int(self.index.max())
        expect(low >= 0 and high < x[0].numel, self, f"indices {low}..{high} do not exist in {x[0]}")
        return IntType(self.index.shape, x[0].lo, x[0].hi, carry_scale(self, x, self.index.shape), x[0].step)

    def evaluate(self, *x: Tensor) -> Tensor:
        index = torch.tensor(self.index.reshape(-1), device=x[0].device)
        return x[0].flatten(1).index_select(1, index).reshape(x[0].shape[0], *self.index.shape)

    def magnitude(self, *x: IntType) -> int:
        return x[0].magnitude

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """Reads the map, then writes it: numel(x)/li + numel(y)/pe iterations, li the largest divisor of the input's channels up to pe."""
        return Call((rearrange(self, x[0], y, self.index.reshape(-1), folding.pe),))

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """The whole map is read, then written."""
        return reorder(x[0], y, lanes_up_to(folding.pe, x[0].shape[0]), folding.pe)

    @classmethod
    def examples(cls) -> list[Example]:
        rng = np.random.default_rng(10)
        return [
            (cls(np.arange(30).reshape(2, 3, 5).transpose(2, 0, 1)), (IntType((2, 3, 5), -8, 7),)),
            (cls(rng.permutation(24).reshape(6, 2, 2)), (IntType((4, 3, 2), 0, 255),)),
            (cls(rng.integers(0, 12, (7,))), (IntType((3, 2, 2), -3, 3, 1.0, 2),)),
            (cls(rng.integers(0, 5, (4, 2, 2))), (IntType((5,), -(2**20), 2**20),)),
        ]
