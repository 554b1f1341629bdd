"""Quantizers: pure functions with their gradients (`functions`) and named Brevitas injectors built from them (`injectors`)."""

from quantlib.quantizers.functions import (
    binary_sign,
    fixed_point,
    in_float32,
    learned_scale,
    max_abs,
    quant_sign,
    round_to_integer,
)
from quantlib.quantizers.injectors import (
    BinaryWeight,
    IntActLearnedLog2Scale,
    NarrowIntWeightPerChannelMaxAbs,
    NarrowIntWeightPerTensorMaxAbs,
    QuantSignAct,
    UintActLearnedLog2Scale,
)

__all__ = [
    "BinaryWeight",
    "IntActLearnedLog2Scale",
    "NarrowIntWeightPerChannelMaxAbs",
    "NarrowIntWeightPerTensorMaxAbs",
    "QuantSignAct",
    "UintActLearnedLog2Scale",
    "binary_sign",
    "fixed_point",
    "in_float32",
    "learned_scale",
    "max_abs",
    "quant_sign",
    "round_to_integer",
]
