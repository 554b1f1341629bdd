"""The score of the MicroNet challenge (NeurIPS 2019) as the quantized ProxylessNAS entry counted it, for any network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import NamedTuple, get_args

import numpy as np
from torch import nn

from quantlib.analysis._bits import width
from quantlib.analysis._steps import COMPUTE, FLOAT_BITS, AnalysisError, FanIn, Step, Value, Walk
from quantlib.analysis._walk import walk
from quantlib.analysis.text import aligned, shape

THRESHOLD_BITS = 5
TABLE_BITS = 8


class Reference(NamedTuple):
    """What a task divides by: parameters and operations of a network of so many bits."""

    parameters: int
    operations: int
    bits: int = 32


IMAGENET = Reference(6_900_000, 1_170_000_000)  # MobileNetV2 of width 1.4
CIFAR100 = Reference(36_500_000, 10_490_000_000)  # WideResNet-28-10


@dataclass
class LayerCost:
    """Bits of one step, in memory and in operations on one image, and what they are made of. accumulator: bits of its sums.

    Thresholds of a quantizer stand with the step whose sums it reads; `thresholds` and `comparisons` hold tables and multiply-shifts too.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    accumulator: int | None = None
    weights: int = 0
    bias: int = 0
    thresholds: int = 0
    constants: int = 0
    multiplications: int = 0
    additions: int = 0
    bias_additions: int = 0
    comparisons: int = 0
    functions: int = 0

    @property
    def memory_bits(self) -> int:
        return self.weights + self.bias + self.thresholds + self.constants

    @property
    def math_bits(self) -> int:
        return self.multiplications + self.additions + self.bias_additions + self.comparisons + self.functions


@dataclass(frozen=True)
class MicroNetCost:
    """rows: every step that costs something. score is exact; `printed` is it rounded to float32, as the published tool prints it."""

    rows: tuple[LayerCost, ...]
    reference: Reference

    @property
    def memory_bits(self) -> int:
        return sum(row.memory_bits for row in self.rows)

    @property
    def math_bits(self) -> int:
        return sum(row.math_bits for row in self.rows)

    @property
    def score(self) -> Fraction:
        return sum((self.of(row) for row in self.rows), Fraction(0))

    @property
    def printed(self) -> float:
        return float(np.float32(float(self.score)))

    def of(self, row: LayerCost) -> Fraction:
        """What one row adds to the score."""
        parameters, operations, bits = self.reference
        return Fraction(row.memory_bits, parameters * bits) + Fraction(row.math_bits, operations * bits)

    def total(self, what: str) -> int:
        """Sum of one column, a field of LayerCost."""
        return sum(getattr(row, what) for row in self.rows)

    def __str__(self) -> str:
        columns = [f.name for f in fields(LayerCost)[4:] if self.total(f.name)]
        header = ("layer", "kind", "output", "acc", *(c.replace("_", " ") for c in columns), "score")
        body = [
            (r.name, r.kind, shape((1, *r.output)), r.accumulator, *(getattr(r, c) for c in columns), float(self.of(r))) for r in self.rows
        ]
        total = ("total", "", "", "", *(self.total(c) for c in columns), repr(self.printed))
        sums = (
            f"memory {self.memory_bits:,} bits, operations {self.math_bits:,} bits, score {self.printed!r} (exactly {float(self.score)!r})"
        )
        return f"{aligned(header, [*body, total], left=2)}\n{sums}"


def micronet_cost(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    fan_in: FanIn = "published",
    reference: Reference = IMAGENET,
    threshold_bits: int = THRESHOLD_BITS,
) -> MicroNetCost:
    """score = memory / (reference.parameters * 32) + math / (reference.operations * 32), both in bits, for one image of input_shape.

    With b_x, b_w, b_y the bits of inputs, weights and outputs, C channels, E elements of the output and M multiply-accumulates:

    accumulator     A = ceil(log2((2^b_x - 1) * levels * kh * kw * inputs)); levels: 2^b_w - 2 for narrow-range weights, 1 for one bit, else
                    2^b_w - 1; inputs: out_channels // groups with fan_in="published" (a slip of the published tool, part of its score),
                    in_channels / groups with "true"; linear layers: in_features. Signed inputs count 2^b_x - 1 as well
    convolution,    memory weights * b_w, once per tensor; math M * max(b_w, b_x) + M * A. Binary weights are no exception: b_w = 1
    linear          Real weights or real inputs: the products and sums have 32 bits; weights keep their own. No 16 bits for free
    bias            memory A per number, math A per output; nothing where a quantizer follows (part of its thresholds)
    quantizer       up to threshold_bits: thresholds, memory C * W * (2^b_y - 1), comparisons E * W * (2^b_y - 1), W the bits of what it
                    reads: A of an accumulator, 32 of real values. More bits: a multiplier and an offset of 32 bits per channel; a product,
                    a sum and a shift of 32 bits per element. A quantizer of the image itself is free: the image arrives as integers
    elementwise     batch norm, ReLU, clips, constants: nothing where a quantizer follows. Else 32 bits per stored constant, and per element
                    32 for each operation: batch norm 2 (1 behind real weights, which take the factor in), PReLU 2, RPReLU 4, others 1.
                    ReLU and clips of codes leave codes and have their bits
    curves          sigmoid, h-swish and the like between quantizers: thresholds where they are monotone and b_y <= threshold_bits, else on
                    codes of up to 8 bits a table of 2^W * b_y bits (times C where constants per channel lie in front) and E * W for looking
                    it up; else evaluated on 32 bits
    add             codes: E * max(bits), the sum has ceil(log2(top + top)) bits; anything else E * 32. Codes count as of one scale
    multiply        of two tensors (squeeze and excite): E * max(bits) of codes, else E * 32
    average pool    window elements * A, A = ceil(log2(top * window)); truncation and divisor are free. Real values: 32
    max pool        window elements * bits
    gate            of a FractionalConv2d: one threshold per channel and one comparison per output, of A bits. It reads 2 bits always
    nothing         shifts, shuffles, concatenations, reshapes, padding, dropout, scale factors, normalisation of the image, zeros

    The image has 8 bits. Per-layer rows carry names as in the model; str() is a table. AnalysisError, with the dotted path, for layers and
    functions without a rule (softmax, layer norm, ...), and for a layer with its own `lower` that says neither `out_bits` nor `moves`.
    Source: rules of the MicroNet challenge 2019; cost tool of the quantized ProxylessNAS submission (ImageNet task, MobileNetV2-1.4:
    6.9 M parameters, 1170 M operations). CIFAR100, as the entries of that task quote it: WideResNet-28-10, 36.5 M and 10.49 G.
    """
    if fan_in not in get_args(FanIn):
        raise AnalysisError(f"fan_in is one of {get_args(FanIn)}, not {fan_in!r}")
    return MicroNetCost(_Ledger(walk(model, input_shape, fan_in), threshold_bits).rows(), reference)


class _Ledger:
    """Goes through the steps and books each on its row; elementwise steps are booked when something real reads them."""

    def __init__(self, run: Walk, threshold_bits: int) -> None:
        self.run, self.threshold_bits = run, threshold_bits
        self.costs = [LayerCost(s.name, s.kind, s.output.shape[1:]) for s in run.steps]
        self.booked: set[int] = set()
        self.stored: set[int] = set()

    def rows(self) -> tuple[LayerCost, ...]:
        for step in self.run.steps:
            self.step(step)
        for value in self.run.outputs:
            self.settle(value)
        return tuple(cost for cost in self.costs if cost.memory_bits or cost.math_bits)

    def step(self, step: Step) -> None:
        cost, size = self.costs[step.row], step.output.elements
        whole = all(x.bits is not None for x in step.inputs)
        widest = max(x.width for x in step.inputs) if whole else FLOAT_BITS
        if step.kind not in ("quantizer", "elementwise", "move", "maximum"):
            for x in step.inputs:
                self.settle(x)
        if step.kind in COMPUTE:
            self.compute(step, cost)
        elif step.kind == "quantizer":
            self.quantizer(step)
        elif step.kind == "add":
            cost.additions += size * widest
        elif step.kind == "multiply":
            cost.multiplications += size * widest
        elif step.kind == "join":
            cost.functions += size * FLOAT_BITS
        elif step.kind == "average":
            each = -(-step.terms // size)
            cost.accumulator = width((step.inputs[0].top or 0) * each) if whole else FLOAT_BITS
            cost.additions += step.terms * cost.accumulator
        elif step.kind == "maximum":
            cost.comparisons += step.terms * step.inputs[0].width
        elif step.kind == "other":
            raise AnalysisError(
                f"{step.name} ({step.what}): the cost has no rule for it. Layers with their own `lower` say `out_bits` if they quantize "
                "and `moves = True` if they only move elements; softmax, layer norm and the like have no rule"
            )
        if step.kind == "add" and whole:
            cost.accumulator = step.output.width

    def compute(self, step: Step, cost: LayerCost) -> None:
        weight, x = step.weight, step.inputs[0]
        cost.accumulator = step.output.width
        if weight is not None and weight.key not in self.stored:
            self.stored.add(weight.key)
            cost.weights += weight.numbers * (weight.bits or FLOAT_BITS)
        other = step.inputs[1].width if weight is None else weight.bits or FLOAT_BITS
        cost.multiplications += step.macs * (FLOAT_BITS if step.is_float else max(x.width, other))
        cost.additions += step.macs * cost.accumulator
        if step.gate:
            cost.thresholds += step.output.channels * cost.accumulator
            cost.comparisons += step.output.elements * cost.accumulator

    def quantizer(self, step: Step) -> None:
        x, bits, levels = step.inputs[0], step.output.width, step.output.top or 0
        if x.image:
            return
        own = self.run.steps[x.row]
        cost = self.costs[step.row if own.kind == "quantizer" else own.row]
        waiting = [self.run.steps[p] for p in x.pending]
        few, reads = bits <= self.threshold_bits, x.width
        if any(s.curve for s in waiting) and not (few and all(s.monotone for s in waiting)):
            if x.top is not None and x.width <= TABLE_BITS:
                tables = x.channels if any(s.constants for s in waiting) else 1
                cost.thresholds += tables * 2**x.width * bits
                cost.comparisons += x.elements * x.width
                return
            self.settle(x)
            reads = FLOAT_BITS
        if few:
            cost.thresholds += x.channels * reads * levels
            cost.comparisons += x.elements * reads * levels
        else:
            cost.thresholds += x.channels * 2 * FLOAT_BITS
            cost.comparisons += x.elements * 3 * FLOAT_BITS

    def settle(self, x: Value) -> None:
        """Book the elementwise steps and biases that wait upon x: something other than a quantizer reads it."""
        for row in x.pending:
            if row in self.booked:
                continue
            self.booked.add(row)
            step, cost = self.run.steps[row], self.costs[row]
            if step.weight is not None:
                cost.bias += step.weight.bias * step.output.width
                cost.bias_additions += step.output.elements * step.output.width
            else:
                cost.constants += step.constants * FLOAT_BITS
                cost.functions += step.output.elements * step.operations * (step.inputs[0].width if step.output.clipped else FLOAT_BITS)
