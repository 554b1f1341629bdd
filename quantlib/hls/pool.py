"""Pools: a window stage and a reduction, or a reduction over the whole map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantlib.hls.call import Call, Kernel, carrier, divides, pixels, port
from quantlib.hls.window import Window
from quantlib.ir import IntType


def pool_call(
    op: object, header: str, reduction: str, x: IntType, y: IntType, pe: int, window: Sequence[Sequence[int]], outside: int, magnitude: int
) -> Call:
    """`window` is (kernel, stride, padding, dilation); `outside` is what taps outside the image read."""
    kernel, stride, padding, dilation = window
    divides(op, "pe", pe, y.shape[0])
    parts, taps, words = y.shape[0] // pe, kernel[0] * kernel[1], y.numel // pe
    if tuple(kernel) == x.shape[1:] and not any(padding) and tuple(dilation) == (1, 1) and y.shape[1:] == (1, 1):
        last = (pixels(x) - 1) * parts
        return Call((Kernel("", header, "ql::reduce_map", (reduction, carrier(magnitude), pixels(x), parts), (port(x, pe),), port(y, pe),
                            pixels(x) * parts, lambda: (last + np.arange(1, parts + 1),)),))  # fmt: skip
    stage = Window(x, pe, parts, kernel, stride, padding, dilation, y.shape[1:], outside).stage()
    return Call((stage, Kernel("", header, "ql::reduce", (reduction, carrier(magnitude), words, taps), (stage.output,), port(y, pe),
                               words * taps, lambda: (taps * np.arange(1, words + 1),))))  # fmt: skip
