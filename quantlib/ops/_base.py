"""What an integer op must answer, and the registry that makes an incomplete op impossible to import.

An op is a frozen dataclass in `ops/NAME.py`; its C++ kernel is `ops/NAME.hpp`. It never learns of folding, paths or results.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from quantlib.hls.call import Folds
from quantlib.ir import GraphError, IntType

if TYPE_CHECKING:
    from quantlib.hls.call import Call, Port
    from quantlib.schedule import Cost, Folding

Example = tuple["Op", tuple[IntType, ...]]
REQUIRED = ("infer", "evaluate", "magnitude", "hls", "cost", "examples")


@dataclass(frozen=True, eq=False)
class Op:
    """One integer operation. A subclass states, in its docstring, formula, shapes and ranges, and answers six questions.

    infer(*x)          -> IntType      shape and interval of the output; GraphError with both shapes when the inputs do not fit
    evaluate(*x)       -> Tensor       the definition: (N, *shape) integers in any carrier dtype (int64, float32, float64) -> the same dtype
    magnitude(*x)      -> int          bound on the absolute value of every intermediate and result of evaluate: what a carrier must hold
    exactly
    hls(x, y, folding) -> Call         header, function, template arguments and tables of the kernel: data, not text
    cost(x, y, folding)-> Cost         LUT, FF, DSP, BRAM18, URAM and cycles per image; the formula cites its source
    examples()         -> [(op, types)] small, odd sizes, extreme ranges: what the generic tests run on
    """

    registry: ClassVar[dict[str, type[Op]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__ in Op.registry:
            raise TypeError(f"two ops are called {cls.__name__}")
        missing = [name for name in REQUIRED if getattr(cls, name) is getattr(Op, name)]
        if not (cls.__doc__ or "").strip() or (cls.__doc__ or "").startswith(cls.__name__ + "("):
            missing.append("a docstring")
        kernel = Path(inspect.getfile(cls)).with_suffix(".hpp")
        if not kernel.exists():
            missing.append(f"its kernel {kernel.name}")
        if missing:
            raise TypeError(f"op {cls.__name__} lacks {', '.join(missing)}")
        Op.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Arrays become read-only int64; their values are part of the op and may be shared freely."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (np.ndarray, Tensor)):
                array = np.asarray(value)
                if not np.issubdtype(array.dtype, np.integer):
                    rounded = np.rint(array)
                    if not np.array_equal(rounded, array):
                        raise GraphError(f"{type(self).__name__}.{f.name} holds values that are no integers")
                    array = rounded
                array = np.array(array, dtype=np.int64, order="C")
                array.setflags(write=False)
                object.__setattr__(self, f.name, array)

    def infer(self, *x: IntType) -> IntType:
        raise NotImplementedError

    def evaluate(self, *x: Tensor) -> Tensor:
        raise NotImplementedError

    def magnitude(self, *x: IntType) -> int:
        raise NotImplementedError

    def folds(self, x: Sequence[IntType], y: IntType) -> Folds:
        """The legal foldings. Ops without weights work on pe channels of the output per cycle."""
        return Folds(y.shape[0])

    def legal(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Folding:
        """The folding itself; GraphError with what would be legal, where it is not."""
        fault = self.folds(x, y).objection(folding)
        expect(not fault, self, fault)
        return folding

    def reads(self, x: Sequence[IntType], y: IntType, folding: Folding) -> tuple[Port, ...]:
        """The words in which the first kernel reads its inputs; an op of many foldings answers without building the call."""
        return self.hls(x, y, folding).kernels[0].inputs

    def widest(self, x: Sequence[IntType], y: IntType, folding: Folding) -> int:
        """Bits of the widest word that any of its streams carries."""
        return max(folding.pe * y.bits, folding.simd * folding.taps * max((t.bits for t in x), default=0))

    def hls(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Call:
        raise NotImplementedError

    def cost(self, x: Sequence[IntType], y: IntType, folding: Folding) -> Cost:
        raise NotImplementedError

    @classmethod
    def examples(cls) -> list[Example]:
        raise NotImplementedError


def constant(array: np.ndarray, like: Tensor) -> Tensor:
    """An op's table in the carrier of `like`: same dtype and device."""
    return torch.tensor(array, dtype=like.dtype, device=like.device)


def per_channel(array: np.ndarray, like: Tensor) -> Tensor:
    """(C,) or (1,) constants laid along axis 1 of a batch (N, C, ...)."""
    return constant(array, like).reshape(1, -1, *[1] * (like.dim() - 2))


def floor_shift(x: Tensor, shift: int) -> Tensor:
    """x >> shift with an arithmetic shift, in any carrier: floor(x / 2^shift)."""
    if not shift:
        return x
    return torch.floor(x * 2.0**-shift) if x.is_floating_point() else x >> shift


def expect(condition: bool, op: Op, message: str) -> None:
    if not condition:
        raise GraphError(f"{type(op).__name__}: {message}")


def same_channels(op: Op, name: str, size: int, x: IntType) -> None:
    """Per-channel constants are (1,) or one per entry of axis 0."""
    expect(size in (1, x.shape[0]), op, f"{name} has {size} channels, the input {x}")
