"""Values in flight during lowering: integer edges, and expressions over them that are still real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlib.ir import IntType


class ConversionError(ValueError):
    """The model cannot be turned into integers exactly; the message names the place in the user's model and what would work."""


@dataclass(frozen=True, eq=False)
class Edge:
    """An integer edge of the graph under construction: real value = type.scale * n."""

    name: str
    type: IntType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape


@dataclass(frozen=True, eq=False)
class RealInput:
    """The network's input before its own input quantizer: real numbers."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Map:
    """An elementwise function with per-channel constants, still real.

    fn takes and returns tensors of any batch size in full or reduced layout (P, C, 1, 1) / (P, C). monotone: for fixed other arguments
    fn is monotone in each argument (True, False, or one bool per channel). affine: fn is a*x + b per channel in each argument.
    uniform: its constants are the same for all channels. pre: where fn ends in a quantizer, the same function without that quantizer
    (for slopes). shift: (edge, bias) where this is scale*n + bias of a layer.
    """

    fn: Callable[..., Tensor]
    args: tuple[Value, ...]
    label: str
    monotone: bool | np.ndarray = True
    affine: bool = False
    uniform: bool = False
    pre: Callable[..., Tensor] | None = None
    shift: tuple[Edge, np.ndarray] | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", tuple(np.broadcast_shapes(*(a.shape for a in self.args))))


@dataclass(frozen=True, eq=False)
class Move:
    """A pool or rearrangement met before the quantizer: it moves behind the quantizer, or in front of the elementwise steps, where
    that is exact.

    apply makes the integer op(s). kind: "move" only rearranges elements, "max" is max pooling, "mean" average pooling, "padded mean" the
    same with zeros around, "pad" adds zeros. index: for "move", the flat position in the concatenated arguments of every output element.
    """

    kind: str
    apply: Callable[..., Edge]
    args: tuple[Value, ...]
    shape: tuple[int, ...]
    label: str
    index: np.ndarray | None = None


Value = Edge | RealInput | Map | Move


def maps(value: Value) -> list[Map]:
    """Every distinct Map of an elementwise expression, each once however often it is used; Moves are not entered."""
    found: dict[int, Map] = {}

    def visit(v: Value) -> None:
        if isinstance(v, Map) and id(v) not in found:
            found[id(v)] = v
            for a in v.args:
                visit(a)

    visit(value)
    return list(found.values())


def frontier(value: Value) -> list[Edge | RealInput | Move]:
    """The leaves of an elementwise expression: edges, the real input, and Moves, each once."""
    found: dict[object, Any] = {}
    seen: set[int] = set()

    def visit(v: Value) -> None:
        if not isinstance(v, Map):
            found.setdefault(leaf_key(v), v)
        elif id(v) not in seen:
            seen.add(id(v))
            for a in v.args:
                visit(a)

    visit(value)
    return list(found.values())


def leaf_key(leaf: Value) -> object:
    return leaf.name if isinstance(leaf, Edge) else id(leaf)


def evaluate(value: Value, env: Mapping[object, Tensor], before: bool = False) -> Tensor:
    """Run an elementwise expression on tensors for its leaves (keyed by edge name, else id). before: leave out the quantizer at its end."""
    memo: dict[int, Tensor] = {}

    def run(v: Value, pre: bool) -> Tensor:
        if not isinstance(v, Map):
            return env[leaf_key(v)]
        if pre and v.pre is not None:
            return v.pre(*(run(a, False) for a in v.args))
        if id(v) not in memo:
            memo[id(v)] = v.fn(*(run(a, False) for a in v.args))
        return memo[id(v)]

    with torch.no_grad():
        return run(value, before)


def occurrences(value: Value, leaf: Value) -> int:
    """On how many paths the leaf enters the expression."""
    memo: dict[int, int] = {}

    def count(v: Value) -> int:
        if not isinstance(v, Map):
            return int(leaf_key(v) == leaf_key(leaf))
        if id(v) not in memo:
            memo[id(v)] = sum(count(a) for a in v.args)
        return memo[id(v)]

    return count(value)


def monotone(value: Value) -> bool | np.ndarray:
    result: bool | np.ndarray = True
    for m in maps(value):
        result = np.logical_and(result, m.monotone)
    return result


def every(value: Value, attribute: str) -> bool:
    """Whether all Maps of an elementwise expression have the attribute (affine, uniform)."""
    return all(getattr(m, attribute) for m in maps(value))


def layout(shape: tuple[int, ...], channels: np.ndarray) -> Tensor:
    """(P, C) numbers in the reduced layout of an edge: (P, C, 1, ...)."""
    return torch.from_numpy(np.ascontiguousarray(channels, dtype=np.float64)).reshape(len(channels), -1, *[1] * (len(shape) - 1))


def channel_scale(scale: np.ndarray | float, shape: tuple[int, ...], label: str) -> np.ndarray:
    """A scale as (C,) or (1,); a scale that changes inside a channel has no place in a tail."""
    scale = np.asarray(scale, dtype=np.float64)
    if scale.size == 1:
        return scale.reshape(1)
    full = np.broadcast_to(scale, shape).reshape(shape[0], -1)
    if not (full == full[:, :1]).all():
        raise ConversionError(f"{label}: the scale changes within a channel; quantize before the reshape, or with one scale")
    return np.ascontiguousarray(full[:, 0])


def substitute(value: Map, old: Value, new: Value) -> Map:
    """The same elementwise expression as one Map over `new`, which takes the place of its only leaf `old`."""
    direct = lambda t: evaluate(value, {leaf_key(old): t})  # noqa: E731
    before = lambda t: evaluate(value, {leaf_key(old): t}, before=True)  # noqa: E731
    single = occurrences(value, old) == 1
    return Map(
        direct,
        (new,),
        value.label,
        monotone=monotone(value) if single else False,
        affine=every(value, "affine"),
        uniform=every(value, "uniform"),
        pre=before if value.pre else None,
        shape=new.shape,
    )
