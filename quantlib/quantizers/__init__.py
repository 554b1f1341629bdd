"""Quantizers: pure functions with their gradients (`functions`) and named Brevitas injectors built from them (`injectors`)."""

from quantlib.quantizers.constant_steps import ConstantStepWeight, HalfWaveAct, constant_step, half_wave, image_floor
from quantlib.quantizers.diracdeltanet import (
    TanhClassifierBias,
    TanhClassifierWeight,
    TanhWeight,
    UintActDividedClip,
    divided_clip,
    inherited_clip,
    tanh_classifier,
    tanh_weight,
)
from quantlib.quantizers.dorefa import DorefaAct, DorefaWeight, dorefa_activation, dorefa_weight
from quantlib.quantizers.functions import (
    binary_sign,
    fixed_point,
    in_float32,
    learned_log2_scale,
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
from quantlib.quantizers.mixtures import mixed_constant_step, mixed_half_wave, mixed_image_floor

__all__ = [
    "BinaryWeight",
    "ConstantStepWeight",
    "DorefaAct",
    "DorefaWeight",
    "HalfWaveAct",
    "IntActLearnedLog2Scale",
    "NarrowIntWeightPerChannelMaxAbs",
    "NarrowIntWeightPerTensorMaxAbs",
    "QuantSignAct",
    "TanhClassifierBias",
    "TanhClassifierWeight",
    "TanhWeight",
    "UintActDividedClip",
    "UintActLearnedLog2Scale",
    "binary_sign",
    "divided_clip",
    "constant_step",
    "dorefa_activation",
    "dorefa_weight",
    "fixed_point",
    "half_wave",
    "image_floor",
    "in_float32",
    "inherited_clip",
    "learned_log2_scale",
    "learned_scale",
    "max_abs",
    "mixed_constant_step",
    "mixed_half_wave",
    "mixed_image_floor",
    "quant_sign",
    "round_to_integer",
    "tanh_classifier",
    "tanh_weight",
]
