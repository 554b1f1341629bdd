"""What an op says about its C++: kernels as data (header, function, template arguments, tables, ports). The writer makes text of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from quantlib.ir import GraphError, IntType

if TYPE_CHECKING:
    from quantlib.schedule import Folding

Array = np.ndarray


@dataclass(frozen=True)
class Port:
    """One end of a stream: `words` words per image, each of `lanes` neighbouring channels of C++ type `ctype`."""

    ctype: str
    lanes: int
    words: int


@dataclass(frozen=True)
class Table:
    """A constant array of a kernel. `build` makes it when it is written: a solver that asks for many foldings never pays for it."""

    name: str
    build: Callable[[], Array]


@dataclass(frozen=True)
class Kernel:
    """A call `function<args>(in, out, tables..., images, further inputs...)` and how it reads and writes.

    iterations: loop iterations per image, which are its cycles at an initiation interval of 1.
    demand: for each input, an array with one entry per output word of an image: how many words of that input were read when it is written.
    backlog: words it works on while the kernel before it in the same call writes none, beyond those it reads in one go.
    """

    label: str
    header: str
    function: str
    args: tuple[str | int | bool, ...]
    inputs: tuple[Port, ...]
    output: Port
    iterations: int
    demand: Callable[[], tuple[Array, ...]]
    tables: tuple[Table, ...] = ()
    backlog: int = 0


@dataclass(frozen=True)
class Call:
    """The kernels of one op, a chain: the first has all inputs, each next one reads what the one before it writes."""

    kernels: tuple[Kernel, ...] = field(default_factory=tuple)

    @property
    def iterations(self) -> int:
        """Cycles per image of the slowest kernel."""
        return max((k.iterations for k in self.kernels), default=0)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class Folds:
    """Which foldings of an op are legal on edges of given types: pe divides `pe`, simd divides `simd`, taps is one of `taps`.

    packed: the limits with the packing of a slice of `quantlib.packing.DSPS`, by its name; unpacked: why there is none.
    streams: whether weights may come from external memory, a row of them per iteration (memory style "stream"), without packing.
    """

    pe: int
    simd: int = 1
    taps: tuple[int, ...] = (1,)
    packed: Mapping[str, Folds] = field(default_factory=lambda: MappingProxyType({}))
    unpacked: str = "no products of weights that could share a multiplier"
    streams: bool = False

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Every legal (pe, simd, taps) without packing."""
        return ((p, s, t) for p in divisors(self.pe) for s in divisors(self.simd) for t in self.taps)

    def objection(self, folding: Folding) -> str:
        """Why the folding is illegal, and what would be legal; empty for a legal one."""
        if folding.memory == "stream" and not self.streams:
            return "memory style stream is for the weights of a Dense or a Conv2d that is not depthwise: choose auto, lut or bram"
        if folding.memory == "stream" and folding.packing:
            return f"memory style stream goes with no packing, {folding.packing} was asked for"
        if folding.packing:
            limits = self.packed.get(folding.packing)
            if limits is None:
                offer = f"choose {_either(self.packed)}, or none" if self.packed else self.unpacked
                return f"packing {folding.packing} is not possible: {offer}"
            return limits.objection(replace(folding, packing=""))
        faults = [
            f"{name} = {value} must divide {whole}: choose {_either(divisors(whole))}"
            for name, value, whole in (("pe", folding.pe, self.pe), ("simd", folding.simd, self.simd))
            if whole % value
        ]
        if folding.taps not in self.taps:
            faults.append(f"taps = {folding.taps}: choose {_either(self.taps)}")
        return "; ".join(faults)


def _either(values: Iterable[object]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def ctype(t: IntType) -> str:
    return f"ap_{'int' if t.signed else 'uint'}<{t.bits}>"


def carrier(magnitude: int) -> str:
    """The native type a kernel computes in."""
    if magnitude >= 2**62:
        raise GraphError(f"values up to {magnitude} need more than 63 bits")
    return "int" if magnitude < 2**30 else "int64_t"


def pixels(t: IntType) -> int:
    return prod(t.shape[1:])


def hw(t: IntType) -> tuple[int, int]:
    """Height and width, 1 x 1 for a vector."""
    h, w = (*t.shape[1:], 1, 1)[:2]
    return h, w


def port(t: IntType, lanes: int) -> Port:
    return Port(ctype(t), lanes, t.numel // lanes)


def divides(op: object, name: str, value: int, whole: int) -> int:
    if value < 1 or whole % value:
        raise GraphError(f"{type(op).__name__}: {name} = {value} must divide {whole}")
    return value


def lanes_up_to(limit: int, channels: int) -> int:
    """The largest divisor of `channels` that is at most `limit`."""
    return next(n for n in range(min(limit, channels), 0, -1) if channels % n == 0)


def by_part(array: Array, channels: int, pe: int) -> Array:
    """Constants (C or 1, ...) as the kernels index them: (parts or 1, pe, ...). Lanes that share them have a copy each."""
    if len(array) == 1 and channels > 1:
        return np.broadcast_to(array[None], (1, pe, *array.shape[1:]))
    return array.reshape(channels // pe, pe, *array.shape[1:])


def stream_order(index: Array) -> Array:
    """An array over (C, ...) flattened as a stream carries it: pixel by pixel, channels inside."""
    return np.moveaxis(index, 0, -1).reshape(-1)


def every_word(words: int, inputs: int = 1) -> Callable[[], tuple[Array, ...]]:
    """Each output word needs the input words up to its own number."""
    return lambda: (np.arange(1, words + 1),) * inputs


def each(op: object, header: str, args: Sequence[str | int | bool], x: Sequence[IntType], y: IntType, pe: int, magnitude: int,
         tables: Sequence[Table]) -> Call:  # fmt: skip
    """An elementwise kernel: pe channels per iteration on every input; iterations per image = numel / pe."""
    divides(op, "pe", pe, y.shape[0])
    words = y.numel // pe
    head = (carrier(magnitude), pixels(y), y.shape[0] // pe)
    kernel = Kernel("", header, f"ql::{header.removesuffix('.hpp')}", (*head, *args), tuple(port(t, pe) for t in x), port(y, pe), words,
                    every_word(words, len(x)), tuple(tables))  # fmt: skip
    return Call((kernel,))
