"""Cycles of a network on an output-stationary systolic array, and on one whose rows broadcast (FuSeConv, DATE 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal, get_args

from torch import nn

from quantlib.analysis._steps import COMPUTE, AnalysisError, Step, Walk, Window
from quantlib.analysis._walk import walk
from quantlib.analysis.text import aligned, shape

Array = Literal["systolic", "fuse"]
Bucket = Literal["pointwise", "depthwise", "other"]
Grouped = Literal["refuse", "published", "blocks"]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)


def gemm(pixels: int, reduction: int, filters: int, rows: int = 64, cols: int = 64) -> int:
    """Cycles of a matrix product (pixels, reduction) x (reduction, filters) on rows x cols: the sum over all tiles of

        reduction + (rows of the tile) + (columns of the tile) - 1

    with tiles of rows x cols and smaller ones at the ends. Tiles follow each other without overlap. FuSeConv, section IV.

    >>> gemm(100, 9, 1, 64, 64)
    118
    """
    down, across = ceil(pixels / rows), ceil(filters / cols)
    return down * across * (reduction - 1) + across * pixels + down * filters


def broadcast_lines(lines: int, length: int, kernel: int, stride: int, rows: int = 64, cols: int = 64) -> int:
    """Cycles of 1-D convolutions where each array row takes one padded line and the weights are broadcast along it:

    ceil(ceil(lines / rows) * (cols + kernel) * ceil(length / cols) / stride)
    """
    work = ceil(lines / rows) * (cols + kernel) * ceil(length / cols)
    return -(-work // stride)


def convolution(
    window: Window, size: tuple[int, int], rows: int = 64, cols: int = 64, array: Array = "systolic", grouped: Grouped = "refuse"
) -> tuple[int, Bucket]:
    """Cycles of a 2-D convolution on an input of size (H, W), and the bucket it is reported in.

    groups = 1:        gemm(E F, kh kw C_in, C_out): "pointwise" where kh = kw = 1, else "other"
    depthwise:         C_out gemm(E F, kh kw, 1)
    on a "fuse" array: depthwise convolutions with kh = 1 (or kw = 1) broadcast along lines: H' C_in lines of W' numbers (W' C_in of H')
    1 < groups < C:    as `grouped` says: "published" costs them as depthwise, which is too little; "blocks" as `groups` products
                       gemm(E F, kh kw C_in / groups, C_out / groups); "refuse" raises

    H' = H + padding, E = (H' - kh) // stride + 1, likewise W' and F. AnalysisError for dilation and transposed convolutions, which the
    published model does not define.
    """
    if len(window.kernel) != 2 or window.transposed or window.dilation != (1, 1):
        what = "a transposed convolution" if window.transposed else f"dilation {window.dilation}" if len(window.kernel) == 2 else "not 2-D"
        raise AnalysisError(f"{what}: the latency model knows 2-D convolutions of dilation 1 and linear layers")
    (kh, kw), (sh, sw) = window.kernel, window.stride
    high, wide = (n + p for n, p in zip(size, window.padding, strict=True))
    pixels = ((high - kh) // sh + 1) * ((wide - kw) // sw + 1)
    if window.groups == 1:
        return gemm(pixels, kh * kw * window.c_in, window.c_out, rows, cols), "pointwise" if kh == kw == 1 else "other"
    if window.groups != window.c_in and grouped == "refuse":
        raise AnalysisError(
            f"{window.groups} groups of {window.c_in} channels: the published model costs them as depthwise, which is too little. "
            'Say grouped="published" for that figure, or grouped="blocks" for one matrix product per group'
        )
    if window.groups != window.c_in and grouped == "blocks":
        g = window.groups
        return g * gemm(pixels, kh * kw * window.c_in // g, window.c_out // g, rows, cols), "other"
    if array == "fuse" and kh == 1:
        return broadcast_lines(high * window.c_in, wide, kw, sw, rows, cols), "depthwise"
    if array == "fuse" and kw == 1:
        return broadcast_lines(wide * window.c_in, high, kh, sh, rows, cols), "depthwise"
    return window.c_out * gemm(pixels, kh * kw, 1, rows, cols), "depthwise"


@dataclass(frozen=True)
class LayerLatency:
    """One convolution or linear layer: cycles, the bucket they are reported in, and the shapes without batch axis."""

    name: str
    bucket: Bucket
    cycles: int
    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class Latency:
    """Cycles of one image, layer after layer. str() is the table."""

    rows: tuple[LayerLatency, ...]
    array_rows: int
    array_cols: int
    array: Array

    def of(self, bucket: Bucket) -> int:
        return sum(row.cycles for row in self.rows if row.bucket == bucket)

    @property
    def pointwise(self) -> int:
        return self.of("pointwise")

    @property
    def depthwise(self) -> int:
        return self.of("depthwise")

    @property
    def other(self) -> int:
        return self.of("other")

    @property
    def cycles(self) -> int:
        return sum(row.cycles for row in self.rows)

    def __str__(self) -> str:
        body = [(r.name, r.bucket, shape((1, *r.input)), shape((1, *r.output)), r.cycles) for r in self.rows]
        sums = [(f"total {b}", b, "", "", self.of(b)) for b in BUCKETS if self.of(b)]
        table = aligned(("layer", "kind", "input", "output", "cycles"), [*body, *sums, ("total", "", "", "", self.cycles)], left=2)
        return f"{self.array_rows}x{self.array_cols} {self.array} array, one image\n{table}"


def systolic_latency(
    model: nn.Module, input_shape: tuple[int, ...], rows: int = 64, cols: int = 64, array: Array = "systolic", grouped: Grouped = "refuse"
) -> Latency:
    """Cycles of one image on a rows x cols array: `rows` tile output pixels, `cols` output filters; integers throughout.

    Counts the 2-D convolutions and linear layers that run, by their shapes alone: quantized, binary and fractional ones like real ones
    (a FractionalConv2d, which multiplies two bit planes, counts once). Linear: gemm(1, in, out), bucket "other". Not counted: memory,
    weight loading, clock, bias, batch norm, activations, pools, joins, overlap of branches. Padding counts as work.
    `convolution` has the formulas and `grouped`.

    AnalysisError, with the dotted path, for Conv1d, Conv3d, transposed and dilated convolutions, matrix products between activations,
    linear layers on more than one row per image, grouped convolutions unless `grouped` says how, and layers without a rule.
    Source: FuSeConv, DATE 2021 (arXiv 2105.13434), latency model of the published code.
    """
    if array not in get_args(Array) or grouped not in get_args(Grouped):
        raise AnalysisError(f"array is one of {get_args(Array)} and grouped one of {get_args(Grouped)}, not {array!r} and {grouped!r}")
    if rows < 1 or cols < 1:
        raise AnalysisError(f"an array has at least one row and one column, not {rows}x{cols}")
    return _latency(walk(model, input_shape), rows, cols, array, grouped)


def _latency(run: Walk, rows: int, cols: int, array: Array, grouped: Grouped = "refuse") -> Latency:
    found = []
    for step in run.steps:
        if step.kind in COMPUTE:
            cycles, bucket = _layer(step, rows, cols, array, grouped)
            found.append(LayerLatency(step.name, bucket, cycles, step.inputs[0].shape[1:], step.output.shape[1:]))
    return Latency(tuple(found), rows, cols, array)


def _layer(step: Step, rows: int, cols: int, array: Array, grouped: Grouped) -> tuple[int, Bucket]:
    if step.window is not None:
        try:
            return convolution(step.window, step.inputs[0].shape[2:], rows, cols, array, grouped)  # type: ignore[arg-type]
        except AnalysisError as error:
            raise AnalysisError(f"{step.name} ({step.what}): {error}") from None
    if step.kind == "linear" and prod(step.inputs[0].shape[:-1]) == 1:
        return gemm(1, step.inputs[0].shape[-1], step.output.shape[-1], rows, cols), "other"
    raise AnalysisError(
        f"{step.name} ({step.what}) on {step.inputs[0].shape}: the latency model knows linear layers on one row (N, features) per image"
    )


def speedups(latencies: Mapping[str, Latency], baseline: Latency) -> dict[str, float]:
    """cycles(baseline) / cycles(variant) by name. The published table has the baseline on "systolic" and the variants on "fuse"."""
    return {name: baseline.cycles / latency.cycles for name, latency in latencies.items()}


def speedup_table(latencies: Mapping[str, Latency], baseline: str) -> str:
    """Cycles by kind and speed-up against latencies[baseline]. AnalysisError when that is not among them."""
    if baseline not in latencies:
        raise AnalysisError(f"no network {baseline!r} to compare with; there are {', '.join(latencies)}")
    ratios = speedups(latencies, latencies[baseline])
    body = [(n, v.array, v.pointwise, v.depthwise, v.other, v.cycles, f"{ratios[n]:.3f}") for n, v in latencies.items()]
    return aligned(("network", "array", *BUCKETS, "cycles", "speed-up"), body, left=2)


def plot(latencies: Mapping[str, Latency]) -> Any:
    """A bar per network, in cycles, of parts for each kind of layer: a matplotlib figure, `.savefig(path)` writes it.

    AnalysisError without matplotlib (extra 'recipes').
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AnalysisError("a plot needs matplotlib: install the extra 'recipes'") from error
    figure = Figure(figsize=(8, 0.4 * len(latencies) + 1.2), layout="constrained")
    axes = figure.subplots()
    left = [0] * len(latencies)
    for bucket in BUCKETS:
        widths = [latency.of(bucket) for latency in latencies.values()]
        axes.barh(list(latencies), widths, left=left, label=bucket)
        left = [before + more for before, more in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("cycles per image")
    axes.legend()
    return figure
