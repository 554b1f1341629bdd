"""What a walk over a model lists: steps, and what is known about the values between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

from torch import nn

from quantlib.analysis._bits import width

IMAGE_BITS = 8
FLOAT_BITS = 32
FanIn = Literal["published", "true"]
COMPUTE = ("conv", "depthwise", "grouped", "transposed", "linear", "matmul")  # kinds of steps that multiply and accumulate


class AnalysisError(ValueError):
    """The model holds something that the analysis has no rule for; the message names it and what would work."""


@dataclass(frozen=True)
class Value:
    """What is known about a tensor of shape (1, ...).

    top:     its integers span so many steps, highest minus lowest; None: real numbers
    wide:    an accumulator of products, whose scale differs from channel to channel
    pending: rows of elementwise steps that lie upon the integers, and of the convolution's own bias
    clipped: all of them are ReLUs and clips, which leave codes codes
    image:   the network's input, or elementwise steps upon it
    row:     the step that made the integers (or the real numbers)
    """

    shape: tuple[int, ...]
    top: int | None = None
    wide: bool = False
    pending: tuple[int, ...] = ()
    clipped: bool = False
    image: bool = False
    row: int = -1

    @property
    def width(self) -> int:
        """Bits of the integers under the pending steps; 32 for real numbers."""
        return FLOAT_BITS if self.top is None else width(self.top)

    @property
    def bits(self) -> int | None:
        """Bits of the codes that a layer reads here, None where it reads real numbers."""
        return None if self.top is None or self.wide or (self.pending and not self.clipped) else width(self.top)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution. padding: both sides together, per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    c_in: int
    c_out: int
    transposed: bool = False


@dataclass(frozen=True)
class Weight:
    """Stored weights: which tensor, how many numbers, bits and steps of a code (None: real), numbers of the bias."""

    key: int
    numbers: int
    bits: int | None
    top: int | None
    bias: int = 0


@dataclass(frozen=True)
class Step:
    """One call. kind is one of COMPUTE or of

    quantizer   codes of `output.width` bits
    add         of two tensors; multiply: of two tensors; join: any other function of several tensors
    average, maximum   pools; `terms` window elements are summed or compared; truncated: bits dropped, codes again
    elementwise with per-channel constants: `constants` numbers stored, `operations` per element; curve: no line with a kink
    move        reshapes, concatenations, shifts, identity
    other       anything without arithmetic rule
    """

    row: int
    name: str
    kind: str
    what: str
    inputs: tuple[Value, ...]
    output: Value
    module: nn.Module | None = None
    weight: Weight | None = None
    window: Window | None = None
    macs: int = 0
    gate: bool = False
    terms: int = 0
    truncated: bool = False
    constants: int = 0
    operations: int = 1
    curve: bool = False
    monotone: bool = True

    @property
    def is_float(self) -> bool:
        """A compute step whose products are real: an operand is not quantized."""
        return self.output.top is None


@dataclass
class Walk:
    """All steps of one run, and what the model returned."""

    model: nn.Module
    steps: list[Step] = field(default_factory=list)
    outputs: tuple[Value, ...] = ()
