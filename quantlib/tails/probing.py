"""Run an expression on integers of an edge's interval and read the codes that come back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from quantlib.ir import Grid, IntType
from quantlib.tails.expressions import ConversionError, Edge, Map, channel_scale, evaluate, layout


def edge_scale(edge: Edge) -> np.ndarray:
    return np.broadcast_to(channel_scale(edge.type.scale, edge.shape, edge.name), edge.shape[:1])


def codes_of(value: Map, env: Mapping[object, Tensor], grid: Grid, before: bool = False, narrow: bool = False) -> np.ndarray:
    """Integer codes (P, C) that the expression gives on real inputs; with before, real values in units of the grid's scale; narrow: C
    is 1.
    """
    return units_of(value, evaluate(value, env, before), grid, narrow) if before else snap_codes(value, evaluate(value, env), grid, narrow)


def units_of(value: Map, real: Tensor, grid: Grid, narrow: bool = False) -> np.ndarray:
    """Real values (P, C, 1, ...) in units of the grid's scale, as (P, C)."""
    channels = 1 if narrow else value.shape[0]
    real = real.reshape(real.shape[0], -1)
    if real.shape[1] not in (1, channels):
        raise ConversionError(
            f"{value.label}: an elementwise step has constants that change inside a channel; only per-channel constants can be folded"
        )
    scale = torch.from_numpy(channel_scale(grid.scale, value.shape, value.label).copy())
    return (real / scale).expand(-1, channels).numpy()


def snap_codes(value: Map, real: Tensor, grid: Grid, narrow: bool = False) -> np.ndarray:
    """Quantized real values as integer codes, with proof that they lie on the grid."""
    units = units_of(value, real, grid, narrow)
    n = np.rint(units)
    off = np.abs(units - n).max(initial=0)
    if np.isnan(off):
        raise ConversionError(
            f"{value.label}: NaN comes out of the layers before this quantizer; a parameter or a running variance is broken"
        )
    if off > 1e-6:
        raise ConversionError(f"{value.label}: the quantizer gives values that are not on its grid (scale {grid.scale})")
    n = n.astype(np.int64)
    if n.min() < grid.lo or n.max() > grid.hi or (grid.step > 1 and ((n - grid.lo) % grid.step).any()):
        raise ConversionError(f"{value.label}: the quantizer gives codes outside {grid.lo}..{grid.hi} (step {grid.step})")
    return n


def real_of(edge: Edge, n: np.ndarray, narrow: bool = False) -> Tensor:
    """fl(scale * n) of integers (P, C) or (P, 1), in the reduced layout; narrow: one channel stands for all."""
    scale = edge_scale(edge)[:1] if narrow else edge_scale(edge)
    return layout(edge.shape, n * scale)


def real_along(edge: Edge, n: np.ndarray, narrow: bool = False) -> Tensor:
    """fl(scale * n) of integers (P,) for every channel, along the axis behind the channels: (1, C, P, 1, ...); (P, C) of a vector."""
    if len(edge.shape) == 1:
        return real_of(edge, n[:, None], narrow)
    scale = edge_scale(edge)[:1] if narrow else edge_scale(edge)
    return torch.from_numpy(scale[:, None] * n).reshape(1, len(scale), -1, *[1] * (len(edge.shape) - 2))


def by_probe(real: Tensor) -> Tensor:
    """What a function gives for `real_along`, as (P, C)."""
    return real if real.dim() == 2 else real.reshape(real.shape[1], -1).t()


def integers(t: IntType) -> np.ndarray:
    return np.arange(t.lo, t.hi + 1, t.step, dtype=np.int64)


def compress(*tables: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tables with one row per channel become one row when all channels agree in all of them."""
    if all((t == t[:1]).all() for t in tables):
        return tuple(np.ascontiguousarray(t[:1]) for t in tables)
    return tables
