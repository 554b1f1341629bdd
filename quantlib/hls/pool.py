"""Pools: a window stage and a reduction, or a reduction over the whole map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantlib.cost import Geometry, side_by_side
from quantlib.hls.call import Call, Kernel, carrier, pixels, port
from quantlib.hls.window import Window
from quantlib.ir import IntType

if TYPE_CHECKING:
    from quantlib.schedule import Folding


def whole_map(x: IntType, y: IntType, window: Geometry) -> bool:
    """Whether the one window is the map itself: then there is no window stage."""
    kernel, _, padding, _ = window
    return tuple(kernel) == x.shape[1:] and not any(padding) and y.shape[1:] == (1, 1)


def pool_call(
    header: str, reduction: str, x: IntType, y: IntType, folding: Folding, window: Geometry, outside: int, magnitude: int
) -> Call:
    """`window` is (kernel, stride, padding, dilation); `outside` is what taps outside the image read."""
    kernel, stride, padding, dilation = window
    pe, taps = folding.pe, folding.taps
    parts, steps, words = y.shape[0] // pe, kernel[0] * kernel[1] // taps, y.numel // pe
    if whole_map(x, y, window):
        last = (pixels(x) - 1) * parts
        return Call((Kernel("", header, "ql::reduce_map", (reduction, carrier(magnitude), pixels(x), parts), (port(x, pe),), port(y, pe),
                            pixels(x) * parts, lambda: (last + np.arange(1, parts + 1),)),))  # fmt: skip
    front = Window(x, pe, parts, kernel, stride, padding, dilation, y.shape[1:], outside, taps).stage()
    reduce = Kernel("", header, "ql::reduce", (reduction, carrier(magnitude), words, steps), (front.output,), port(y, pe),
                    words * steps, lambda: (steps * np.arange(1, words + 1),))  # fmt: skip
    return Call((reduce,) if side_by_side(window) else (front, reduce))
