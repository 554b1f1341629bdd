"""Small models of many kinds of quantized layers, for tests of the search."""

from __future__ import annotations

import torch
from brevitas import nn as qnn
from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloatMaxInit
from torch import Tensor, nn

from quantlib.layers import (
    ConstantStepConv2d,
    ConstantStepLinear,
    HalfWave,
    ImageFloor,
    LearnedScaleHardTanh,
    LearnedScaleReLU,
    ScaledIntConv2d,
    ScaledIntLinear,
)


def scaled() -> nn.Sequential:
    """Our learned-scale layers: per-channel scales, a depthwise convolution, a pool, a linear layer."""
    return nn.Sequential(
        LearnedScaleHardTanh(8, init=1.0), ScaledIntConv2d(3, 6, 3, padding=1, bits=4), nn.BatchNorm2d(6),
        LearnedScaleReLU(4, channels=6), ScaledIntConv2d(6, 6, 3, padding=1, groups=6, bits=4), nn.BatchNorm2d(6),
        LearnedScaleReLU(4), nn.MaxPool2d(2), nn.Flatten(), ScaledIntLinear(6 * 16, 5, bits=8),
    )  # fmt: skip


def constant() -> nn.Sequential:
    """Constant-step layers behind an image quantizer."""
    return nn.Sequential(
        ImageFloor(8), ConstantStepConv2d(3, 6, 3, padding=1, bits=4), nn.BatchNorm2d(6), nn.MaxPool2d(2),
        HalfWave(4), ConstantStepConv2d(6, 4, 1, bits=4, bias=True), nn.BatchNorm2d(4),
        HalfWave(5), nn.Flatten(), ConstantStepLinear(4 * 16, 5, bits=8),
    )  # fmt: skip


def brevitas() -> nn.Sequential:
    """Layers as Brevitas ships them, one with an input quantizer of its own."""
    return nn.Sequential(
        qnn.QuantIdentity(bit_width=8, act_quant=Uint8ActPerTensorFloatMaxInit, max_val=1.0),
        qnn.QuantConv2d(3, 6, 3, padding=1, bias=False, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=4), nn.BatchNorm2d(6),
        nn.ReLU(),
        qnn.QuantConv2d(
            6, 4, 3, stride=2, padding=1, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=4,
            input_quant=Uint8ActPerTensorFloatMaxInit, input_bit_width=4, input_max_val=3.0,
        ),
        nn.BatchNorm2d(4), qnn.QuantReLU(act_quant=Uint8ActPerTensorFloatMaxInit, bit_width=4, max_val=4.0), nn.Flatten(),
        qnn.QuantLinear(4 * 16, 5, bias=True, weight_bit_width=4, weight_quant=Int8WeightPerTensorFloat),
    )  # fmt: skip


class Branches(nn.Module):
    """A shared activation, a concat of two activations, a residual sum of them, and an image without a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ScaledIntConv2d(3, 4, 3, padding=1, bits=8)
        self.act = LearnedScaleReLU(4)
        self.left, self.right = ScaledIntConv2d(4, 4, 1, bits=4), ScaledIntConv2d(4, 4, 3, padding=1, bits=4)
        self.left_act, self.right_act = LearnedScaleReLU(4), LearnedScaleReLU(4)
        self.joined, self.added = ScaledIntConv2d(8, 3, 1, bits=4), ScaledIntConv2d(4, 3, 1, bits=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        left, right = self.left_act(self.left(x)), self.right_act(self.right(x))
        joined = torch.cat([left, nn.functional.max_pool2d(right, 3, 1, 1)], 1)
        return self.joined(joined) + self.added(left + right)


KINDS = {"scaled": scaled, "constant": constant, "brevitas": brevitas}
SHAPE = (3, 8, 8)
