"""Parameters, multiply-accumulates, bit operations and weight bits, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quantlib.analysis._steps import COMPUTE, FLOAT_BITS, Step
from quantlib.analysis._walk import walk
from quantlib.analysis.text import aligned, shape


@dataclass(frozen=True)
class LayerCount:
    """One call of a layer (or function) that multiplies and accumulates; shapes without batch axis.

    parameters and weight_bits are 0 at the second call of one module. activation_bits and weight_width None: real numbers.
    """

    name: str
    kind: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    macs: int
    activation_bits: int | None
    weight_width: int | None
    bit_operations: int
    weight_bits: int


@dataclass(frozen=True)
class Counts:
    """Figures of one image. str() is the table.

    parameters: all of the model, with those of normalisations, learned scales and layers that did not run (`elsewhere`)
    """

    rows: tuple[LayerCount, ...]
    parameters: int

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def bit_operations(self) -> int:
        return sum(row.bit_operations for row in self.rows)

    @property
    def weight_bits(self) -> int:
        return sum(row.weight_bits for row in self.rows)

    @property
    def elsewhere(self) -> int:
        """Parameters outside the layers of the table."""
        return self.parameters - sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        header = ("layer", "kind", "input", "output", "parameters", "MAC", "act", "weight", "bit operations", "weight bits")
        body = [
            (r.name, r.kind, shape((1, *r.input)), shape((1, *r.output)), r.parameters, r.macs, r.activation_bits or "real",
             r.weight_width or "real", r.bit_operations, r.weight_bits)
            for r in self.rows
        ]  # fmt: skip
        rest = ("elsewhere", "", "", "", self.elsewhere, "", "", "", "", "")
        total = ("total", "", "", "", self.parameters, self.macs, "", "", self.bit_operations, self.weight_bits)
        return aligned(header, [*body, rest, total], left=2)


def count(model: nn.Module, input_shape: tuple[int, ...]) -> Counts:
    """Parameters, multiply-accumulates (MAC), bit operations and weight bits of `model` for one image of input_shape (no batch axis).

    MAC             of a convolution or linear layer: outputs times inputs of one output, padding positions included. Bias, batch norm,
                    activations, pools and joins count nothing; a FractionalConv2d, which multiplies two bit planes, counts once
    bit operations  MAC * bits of a weight * bits of an activation, 32 for what is not quantized. The image counts as 8 bits in front of
                    quantized weights, as 32 in front of real ones. A FractionalConv2d reads 2 bits, whatever its gates do
    weight bits     weights of these layers times their bits, once per tensor; biases and normalisations are not among them

    The model is run once, as a copy in eval mode; it may be in any mode and stays as it is. Bits are what the quantizers of Brevitas layers
    say; other layers say `weight_bits` (of their weights) and `out_bits` (of the codes they give). Max pools, clips, reshapes and
    concatenations keep bits; sums of codes widen them; batch norms and the like make real numbers until the next quantizer.

    AnalysisError, with the dotted path, for layers with weights that have no rule, and where the model does not run.

    >>> counts = count(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10)), (3, 4, 4))
    >>> counts.parameters, counts.macs, counts.bit_operations == 1024 * counts.macs
    (1514, 4736, True)
    """
    run = walk(model, input_shape)
    seen: set[int] = set()
    rows = tuple(_row(step, seen) for step in run.steps if step.kind in COMPUTE)
    return Counts(rows, sum(p.numel() for p in run.model.parameters()))


def _row(step: Step, seen: set[int]) -> LayerCount:
    fresh = [p for p in step.module.parameters() if id(p) not in seen] if step.module is not None else []
    weight, x = step.weight, step.inputs[0]
    new = weight is not None and weight.key not in seen
    seen |= {id(p) for p in fresh} | ({weight.key} if weight is not None else set())
    width = weight.bits if weight is not None else step.inputs[1].bits
    bits = None if x.image and width is None else x.bits
    stored = weight.numbers * (width or FLOAT_BITS) if weight is not None and new else 0
    return LayerCount(
        name=step.name,
        kind=step.kind,
        input=x.shape[1:],
        output=step.output.shape[1:],
        parameters=sum(p.numel() for p in fresh),
        macs=step.macs,
        activation_bits=bits,
        weight_width=width,
        bit_operations=step.macs * (width or FLOAT_BITS) * (bits or FLOAT_BITS),
        weight_bits=stored,
    )
