"""The buffered permutation of rearrange.hpp, shared by Rearrange and Reshape."""

from __future__ import annotations

import numpy as np

from quantlib.hls.call import Kernel, Table, divides, lanes_up_to, port, stream_order
from quantlib.ir import IntType


def rearrange(op: object, x: IntType, y: IntType, index: np.ndarray, pe: int) -> Kernel:
    """y.flat[i] = x.flat[index[i]] in C order, on streams that carry pixel by pixel."""
    li = lanes_up_to(divides(op, "pe", pe, y.shape[0]), x.shape[0])
    words_in, words_out = x.numel // li, y.numel // pe

    def table() -> np.ndarray:
        place = np.empty(x.numel, dtype=np.int64)  # where the stream carries element i
        place[stream_order(np.arange(x.numel).reshape(x.shape))] = np.arange(x.numel)
        return np.stack(np.divmod(place[index[stream_order(np.arange(y.numel).reshape(y.shape))]], li), -1).reshape(words_out, pe, 2)

    return Kernel("", "rearrange.hpp", "ql::rearrange", (words_in, words_out), (port(x, li),), port(y, pe), words_in + words_out,
                  lambda: (np.full(words_out, words_in),), (Table("index", table),))  # fmt: skip
