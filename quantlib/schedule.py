"""How a network is laid out in hardware: folding and FIFO depths by node name, and the solver that chooses them for a part.

The graph says what is computed, the schedule how fast; neither knows the other's content. Cost formulas are the ops' own (`Op.cost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from quantlib.cost import Cost as Cost
from quantlib.ir import Graph

MEMORY_STYLES = ("auto", "lut", "bram", "uram")


@dataclass(frozen=True)
class Folding:
    """Lanes of one kernel: `pe` output channels and `simd` inputs of each are worked on per cycle.

    pe divides the output channels, simd the inputs of one output; elementwise and pooling ops use pe channels per cycle and simd = 1.
    memory: where the op's tables live ("auto" chooses LUTs or block RAM by size).
    """

    pe: int = 1
    simd: int = 1
    memory: str = "auto"

    def __post_init__(self) -> None:
        if self.pe < 1 or self.simd < 1:
            raise ValueError(f"pe = {self.pe} and simd = {self.simd} must be at least 1")
        if self.memory not in MEMORY_STYLES:
            raise ValueError(f"memory style {self.memory!r}: choose one of {', '.join(MEMORY_STYLES)}")


@dataclass(frozen=True)
class Stage:
    """Layout of one node: its folding, and for each of its inputs the depth in words of the FIFO that feeds it (2 is a register pair)."""

    folding: Folding = field(default_factory=Folding)
    depths: tuple[int, ...] = ()


class Schedule(Mapping[str, Stage]):
    """Node name -> Stage, read-only. `Schedule.of(graph)` is the smallest layout: one lane everywhere, FIFOs of depth 2."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = MappingProxyType(dict(stages))

    @classmethod
    def of(cls, graph: Graph) -> Schedule:
        return cls({n.name: Stage(Folding(), (2,) * len(n.inputs)) for n in graph})

    def __getitem__(self, name: str) -> Stage:
        try:
            return self._stages[name]
        except KeyError:
            raise KeyError(f"the schedule has no node {name}; it was made for another graph") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)
