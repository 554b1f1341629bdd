"""The folded matrix-vector product of ql_matvec.hpp, as data."""

from __future__ import annotations

import numpy as np

from quantlib.hls.call import Kernel, Port, Table


def fold_weight(weight: np.ndarray, groups: int, pe: int, simd: int) -> np.ndarray:
    """(O, I/groups, kh, kw) -> (rows, pe, simd), one row per iteration: group, block of pe outputs, then taps (row, column, channels)."""
    o = weight.shape[0]
    columns = weight.transpose(0, 2, 3, 1).reshape(groups, o // groups // pe, pe, -1, simd)
    return columns.transpose(0, 1, 3, 2, 4).reshape(-1, pe, simd)


def matvec(number: str, vectors: int, groups: int, nf: int, sf: int, x: Port, y: Port, tables: tuple[Table, ...],
           header: str = "conv2d.hpp", function: str = "ql::matvec", first: tuple[str, ...] = ()) -> Kernel:  # fmt: skip
    """vectors * groups * nf * sf iterations per image; the nf results of a group need all its sf input words."""
    return Kernel("", header, function, (*first, number, vectors, groups, nf, sf), (x,), y, vectors * groups * nf * sf,
                  lambda: (np.repeat(sf * np.arange(1, vectors * groups + 1), nf),), tables)  # fmt: skip
