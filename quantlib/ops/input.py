"""Input: where the integers enter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantlib.cost import Cost, bus_cycles
from quantlib.hls.call import Call, Folds
from quantlib.ir import GraphError, IntType
from quantlib.ops._base import Example, Op, expect

if TYPE_CHECKING:
    from quantlib.schedule import Folding


@dataclass(frozen=True, eq=False)
class Input(Op):
    """The codes of the network's input: integers lo..hi with the given step, of shape `shape` (channels first).

    It takes no edge, so it is never evaluated; `run` puts the codes in its place. Its scale is set on the node's type.
    """

    shape: tuple[int, ...]
    lo: int
    hi: int
    step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))

    def infer(self, *x: IntType) -> IntType:
        expect(not x, self, f"takes no inputs, got {len(x)}")
        return IntType(self.shape, self.lo, self.hi, 1.0, self.step)

    def evaluate(self, *x: Tensor) -> Tensor:
        raise GraphError("Input: the codes of the input are given, not computed")

    def magnitude(self, *x: IntType) -> int:
        return max(abs(self.lo), abs(self.hi))

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        return Folds(1)

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        """No kernel: the writer feeds the stream from the bus."""
        return Call()

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        """The bus brings 64 bits per cycle."""
        return Cost(cycles=bus_cycles(y))

    @classmethod
    def examples(cls) -> list[Example]:
        return [(cls((3, 5, 4), 0, 255), ()), (cls((7,), -3, 3, 2), ())]
