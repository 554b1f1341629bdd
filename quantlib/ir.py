"""The integer network: frozen data, no behaviour beyond checking itself and printing itself.

An edge carries integers n of a known interval; its real meaning is `scale * n`. There are no zero points on edges, so real 0 is always
n = 0 and zero padding is always right (docs/integer_semantics.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from quantlib.ops._base import Op


class GraphError(ValueError):
    """An integer network that breaks an invariant; the message names the node."""


def _scale(value: object) -> np.ndarray:
    scale = np.array(value, dtype=np.float64)
    scale.setflags(write=False)
    return scale


@dataclass(frozen=True, eq=False)
class Grid:
    """The values an edge may take: `real = scale * n`, n in {lo, lo + step, ..., hi}.

    scale is a positive float64, per tensor or an array that broadcasts to (C, H, W). Raises ValueError on an empty or misaligned
    interval and on a scale that is not positive and finite.
    """

    lo: int
    hi: int
    scale: Any = 1.0  # any array-like on the way in, a read-only float64 array afterwards
    step: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", int(self.lo))
        object.__setattr__(self, "hi", int(self.hi))
        object.__setattr__(self, "scale", _scale(self.scale))
        if self.lo > self.hi or self.step < 1 or (self.hi - self.lo) % self.step:
            raise ValueError(f"grid {self.lo}..{self.hi} with step {self.step} is empty or misaligned")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(f"the scale of a grid must be positive and finite, got {self.scale}")

    @property
    def levels(self) -> int:
        return (self.hi - self.lo) // self.step + 1


@dataclass(frozen=True, eq=False)
class IntType:
    """Type of an edge: integers n of shape `shape` (no batch axis, channels first), lo <= n <= hi, n = lo mod step; real = scale * n.

    `bits` and `signed` are derived: the smallest two's-complement (or unsigned) word that holds the interval.
    """

    shape: tuple[int, ...]
    lo: int
    hi: int
    scale: Any = 1.0  # as in Grid
    step: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))
        object.__setattr__(self, "lo", int(self.lo))
        object.__setattr__(self, "hi", int(self.hi))
        object.__setattr__(self, "scale", _scale(self.scale))
        if self.lo > self.hi or self.step < 1 or (self.hi - self.lo) % self.step:
            raise GraphError(f"interval {self.lo}..{self.hi} with step {self.step} is empty or misaligned")
        if any(s < 1 for s in self.shape):
            raise GraphError(f"empty shape {self.shape}")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise GraphError(f"the scale of an edge must be positive and finite, got {self.scale}")
        if self.lo < -(2**62) or self.hi > 2**62:
            raise GraphError(f"interval {self.lo}..{self.hi} needs more than 63 bits")
        try:
            np.broadcast_to(self.scale, self.shape)
        except ValueError:
            raise GraphError(f"a scale of shape {self.scale.shape} does not fit an edge of shape {self.shape}") from None

    @property
    def signed(self) -> bool:
        return self.lo < 0

    @property
    def bits(self) -> int:
        if self.signed:
            return max((-self.lo - 1).bit_length(), self.hi.bit_length() if self.hi > 0 else 0) + 1
        return max(self.hi.bit_length(), 1)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def levels(self) -> int:
        return (self.hi - self.lo) // self.step + 1

    @property
    def magnitude(self) -> int:
        return max(abs(self.lo), abs(self.hi))

    def with_scale(self, scale: Any) -> IntType:
        return replace(self, scale=scale)

    def same_scale(self, other: IntType) -> bool:
        """Exactly equal real meaning of every integer, element by element (never merely close)."""
        if self.shape != other.shape:
            return False
        return bool((np.broadcast_to(self.scale, self.shape) == np.broadcast_to(other.scale, other.shape)).all())

    def __str__(self) -> str:
        word = f"{'int' if self.signed else 'uint'}{self.bits}"
        step = f" step {self.step}" if self.step > 1 else ""
        return f"{word}[{self.lo}..{self.hi}{step}] {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: `name` is also the name of the edge it produces; `source` is the dotted path in the user's model.

    A module that has several paths is shown by the one it was called under: "b.relu is a.relu".
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    type: IntType
    source: str = ""


@dataclass(frozen=True, eq=False)
class Decode:
    """The real tail after the last integers: y = sum_i gain_i * n_i + bias, in float64, reshaped to `shape` (no batch axis).

    `inputs` are edge names; gain_i and bias broadcast to the shape of the edges. Equal to the model up to float rounding; the integers
    before it are what is compared bit by bit.
    """

    inputs: tuple[str, ...]
    gains: tuple[np.ndarray, ...]
    bias: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Front:
    """How real float32 images become input codes where the model owns an input quantizer: code = lo + step * #{k : x >=
    thresholds[c][k]}.

    thresholds: (C or 1, L) float32, found by bisection over the ordered float32 numbers; a decreasing row is stored with sign -1 (then
    code = lo + step * #{k : -x >= thresholds[c][k]}).
    """

    thresholds: np.ndarray
    sign: np.ndarray


@dataclass(frozen=True, eq=False)
class Graph:
    """An integer network. Nodes are in topological order, the first is the input; `decodes` turn its output edges into the model's
    outputs.

    Raises GraphError when names repeat, an input is missing or not earlier, or a type differs from what the op infers.
    """

    nodes: tuple[Node, ...]
    decodes: tuple[Decode, ...]
    front: Front | None = None
    name: str = "network"
    single_output: bool = True

    def __post_init__(self) -> None:
        seen: dict[str, IntType] = {}
        for node in self.nodes:
            if node.name in seen:
                raise GraphError(f"two nodes are called {node.name}")
            missing = [i for i in node.inputs if i not in seen]
            if missing:
                raise GraphError(f"{node.name} reads {missing[0]}, which no earlier node produces")
            inferred = node.op.infer(*(seen[i] for i in node.inputs))
            same = (inferred.shape, inferred.lo, inferred.hi, inferred.step) == (
                node.type.shape,
                node.type.lo,
                node.type.hi,
                node.type.step,
            )
            if not same:
                raise GraphError(f"{node.name}: declared {node.type}, but {type(node.op).__name__} infers {inferred}")
            seen[node.name] = node.type
        for decode in self.decodes:
            for i in decode.inputs:
                if i not in seen:
                    raise GraphError(f"the output reads {i}, which no node produces")
        if not self.nodes or self.nodes[0].inputs or any(not n.inputs for n in self.nodes[1:]):
            raise GraphError("a graph starts with its one input node")

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {n.name: n for n in self.nodes}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """Edge name -> the nodes that read it, once per reading."""
        table: dict[str, list[Node]] = {n.name: [] for n in self.nodes}
        for node in self.nodes:
            for i in node.inputs:
                table[i].append(node)
        return {k: tuple(v) for k, v in table.items()}

    @property
    def input(self) -> Node:
        return self.nodes[0]

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The integer edges that leave the network, each once, in the order in which the decodes read them."""
        return tuple(dict.fromkeys(i for d in self.decodes for i in d.inputs))

    def types(self, node: Node) -> tuple[IntType, ...]:
        return tuple(self.by_name[i].type for i in node.inputs)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        rows = [(n.name, type(n.op).__name__, ", ".join(n.inputs), str(n.type), n.source) for n in self.nodes]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r[:4], widths, strict=True)) + "  " + r[4] for r in rows]
        return "\n".join(
            [f"graph {self.name}: {len(self.nodes)} nodes, outputs {', '.join(self.outputs)}", *(line.rstrip() for line in lines)]
        )
