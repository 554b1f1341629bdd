"""The folded matrix-vector product of ql_matvec.hpp, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantlib.cost import Words, plus_minus_one
from quantlib.hls.call import Kernel, Port, Table
from quantlib.ir import IntType

if TYPE_CHECKING:
    from quantlib.schedule import Folding


def in_words(weight: np.ndarray, simd: int, taps: int) -> np.ndarray:
    """(O, I, kh, kw) -> (O, words of a window, taps * simd), in the order in which `Window` writes them."""
    o, i, kh, kw = weight.shape
    split = weight.reshape(o, i // simd, simd, kh, kw)  # output, part, channel, row, column
    order = (0, 3, 4, 1, 2) if taps == 1 else (0, 4, 1, 3, 2) if taps == kh and kw > 1 else (0, 1, 4, 3, 2)
    return split.transpose(order).reshape(o, -1, taps * simd)


def fold_weight(weight: np.ndarray, groups: int, pe: int, simd: int, taps: int = 1) -> np.ndarray:
    """(O, I/groups, kh, kw) -> (rows, pe, taps * simd), one row per iteration: group, block of pe outputs, word of the window."""
    o = weight.shape[0]
    blocks = in_words(weight, simd, taps).reshape(groups, o // groups // pe, pe, -1, taps * simd)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(-1, pe, taps * simd)


def products(x: IntType, weight: Words, folding: Folding, padded: bool) -> str:
    """How the kernel multiplies, as its first template argument; empty for integers, which weights from memory always are.

    Weights of +-1 are bits with which it adds or subtracts; where the inputs are +-1 too (and 0 outside the image: padded), it counts the
    bits that agree.
    """
    if folding.memory == "stream" or not weight.bipolar:
        return ""
    return f"ql::Xnor<{str(padded).lower()}>" if plus_minus_one(x) else "ql::Signs"


def stored(weight: np.ndarray, how: str) -> np.ndarray:
    """Weights as the kernel reads them: bits, 1 for +1, where `products` says how."""
    return (weight > 0).astype(np.int64) if how else weight


def matvec(number: str, vectors: int, groups: int, nf: int, sf: int, x: Port, y: Port, tables: tuple[Table, ...],
           header: str = "conv2d.hpp", function: str = "ql::matvec", first: tuple[str | bool, ...] = (), silence: int = 0,
           how: str = "") -> Kernel:  # fmt: skip
    """vectors * groups * nf * sf iterations per image; the nf results of a group need all its sf input words.

    how: of `products`.
    silence: iterations in which the kernel before it may write nothing; with nf = 1 that one is the slower and nothing waits.
    """
    if how:
        function, first = "ql::matvec_of", (how,)
    backlog = -(-silence // nf) if nf > 1 else 0
    return Kernel("", header, function, (*first, number, vectors, groups, nf, sf), (x,), y, vectors * groups * nf * sf,
                  lambda: (np.repeat(sf * np.arange(1, vectors * groups + 1), nf),), tables, backlog)  # fmt: skip
