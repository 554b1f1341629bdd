"""The reference of every comparison: the recorded model in float64, every integer edge snapped to its grid.

v = scale * round((v - b) / scale) + b, b being the layer's bias. Each snap must move the value by less than 1e-6 of a step, which proves
the edge's scale on the way. It shares no table with the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantlib import evaluator
from quantlib.tails import ConversionError

if TYPE_CHECKING:
    from quantlib.lowering import Conversion, Snap

SNAP = 1e-6  # of a step: float64 noise of a sum of 10^5 terms is below 1e-10, a wrong scale is of order 1


class VerifyError(ValueError):
    """The graph cannot be compared with this model."""


def codes_and_noise(v: Tensor, known: Snap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """round((v - b) / scale), how far v was from it in steps, scale and b."""
    scale, bias = (torch.tensor(np.asarray(a), dtype=torch.float64) for a in (known.scale, known.bias))
    units = (v.double() - bias) / scale
    n = units.round()
    return n, (units - n).abs(), scale, bias


def replay_snapped(conversion: Conversion, real: Tensor, see: Callable[[int, Tensor, Tensor], None]) -> Any:
    """The model's output on float64 images; `see` is called for every snapped value of the record with its number, its integers and its
    value before snapping.

    Raises VerifyError when a value is off the grid of its edge.
    """

    def snap(index: int, v: Tensor) -> Tensor:
        known = conversion.snaps.get(index)
        if known is None:
            return v
        n, moved, scale, bias = codes_and_noise(v, known)
        noise = 2.0**-50 * (v.abs() + bias.abs()) / scale  # a bias of many steps: float64 cannot hold v more finely
        if not bool((moved < (SNAP + noise).clamp(max=0.25)).all()):
            raise VerifyError(
                f"{known.source}: a value is {float(moved.max()):.3g} steps off the grid of edge {known.edge}; the edge's scale is "
                f"wrong, or the model has NaN"
            )
        see(index, n, v)
        return scale * n + bias

    with torch.no_grad():
        return conversion.record.replay(real, snap)


def prove(conversion: Conversion, real: Tensor) -> None:
    """What `convert` does last: graph and snapped model on a few images must give the same integers on every edge.

    Raises ConversionError. It cannot happen unless a rule is wrong or the model does something that its record does not show.
    """
    graph = conversion.graph
    snaps = {k: s for k, s in conversion.snaps.items() if s.edge in graph.by_name}
    wanted = Counter(s.edge for s in snaps.values())
    edges = evaluator.edges_of(graph, evaluator.encode(graph, real), wanted, evaluator.definition(graph))
    ahead: dict[str, Tensor] = {}  # edges that the graph has given and the model has yet to show

    def value(name: str) -> Tensor:
        while name not in ahead:
            made, v = next(edges)
            ahead[made] = v
        wanted[name] -= 1
        return ahead[name] if wanted[name] else ahead.pop(name)

    def compare(index: int, n: Tensor, _: Tensor) -> None:
        known = snaps.get(index)
        if known is None:
            return
        differ = int((value(known.edge).reshape(n.shape) != n).sum())
        if differ:
            raise ConversionError(
                f"{known.source}: {differ} of {n.numel()} integers of edge {known.edge} are not those of the model on a test image. "
                "This is a defect of a lowering rule: please report the layer and what stands before it."
            )

    try:
        with evaluator.exact():
            replay_snapped(conversion, real, compare)
    except VerifyError as error:
        raise ConversionError(str(error)) from error
