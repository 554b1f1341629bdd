"""How long a training step takes: ours over the float network's and over plain Brevitas', and FracBNN's over its published formulation.

A step is forward, loss and backward, in CPU seconds of one thread; the variants of a network take turns in one process, and medians are
compared. Same network, same layout: the float twin has nn.Conv2d, nn.Linear and ReLU6 in place, and nothing where a signed quantizer is.
`measure` is what recipes/benchmark.py calls; alone:

    OMP_NUM_THREADS=1 python recipes/_training_speed.py --networks mb_16x64,fracbnn_64 --rounds 7
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from brevitas import nn as qnn
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.inject.enum import RestrictValueType
from brevitas.quant import Int8ActPerTensorFloatMinMaxInit, Int8WeightPerChannelFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloatMaxInit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import Function

import zoo
from quantlib._modules import replace_module
from quantlib.layers import DividedClip, HalfWave, LearnedScaleHardTanh, LearnedScaleReLU, ScaledIntConv2d, ScaledIntLinear, SharedHardTanh

Layout = Literal["NCHW", "channels_last"]
LAYOUTS: tuple[Layout, ...] = ("NCHW", "channels_last")
TARGETS = {
    "dense": {"NCHW": 1.15, "channels_last": 1.15},
    "depthwise": {"NCHW": 1.25, "channels_last": 1.5},
    "fracbnn": {"NCHW": 0.6, "channels_last": 0.6},
}  # most that a step may cost, over the float twin's (fracbnn: over the published step in NCHW)
OF_BREVITAS = 0.7  # most that a step of a depthwise network may cost over plain Brevitas'


# --- networks ------------------------------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """Inverted bottleneck: 1x1 to `middle` channels, depthwise 3x3, 1x1; joined with its input by `join` where shapes allow."""

    def __init__(self, channels: int, middle: int, out: int, stride: int, join: nn.Module) -> None:
        super().__init__()
        widen = [ScaledIntConv2d(channels, middle, 1, bits=4), nn.BatchNorm2d(middle), LearnedScaleReLU(4, channels=middle)]
        self.body = nn.Sequential(
            *(widen if middle != channels else []),
            ScaledIntConv2d(middle, middle, 3, stride, 1, groups=middle, bits=4),
            nn.BatchNorm2d(middle),
            LearnedScaleReLU(4),
            ScaledIntConv2d(middle, out, 1, bits=4),
            nn.BatchNorm2d(out),
            join,
        )
        self.join, self.joined = join, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x + self.body(x)) if self.joined else self.body(x)


class Bottlenecks(nn.Module):
    """24 convolutions, 8 of them depthwise: (N, 3, H, W) -> (N, 10). 4-bit weights with one scale per channel, 4-bit learned scales."""

    ROWS = ((16, 1, 1), (24, 6, 2), (24, 6, 1), (32, 6, 2), (32, 6, 1), (64, 6, 2), (64, 6, 1), (64, 6, 1))  # out, expansion, stride

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(ScaledIntConv2d(3, 16, 3, 1, 1, bits=8), nn.BatchNorm2d(16), LearnedScaleReLU(4, channels=16))
        channels, units = 16, []
        join = SharedHardTanh(4)
        for out, expansion, stride in self.ROWS:
            join = join if stride == 1 and channels == out else SharedHardTanh(4)
            units.append(Inverted(channels, channels * expansion, out, stride, join))
            channels = out
        self.units, self.linear = nn.Sequential(*units), ScaledIntLinear(channels, 10, bits=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.units(self.first(x)).mean((2, 3)))


def dense() -> nn.Module:
    """Six dense 3x3 convolutions of VGG's shape: (N, 3, H, W) -> (N, 10), 4 bits."""
    layers: list[nn.Module] = []
    channels = 3
    for out, pool in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, True)):
        layers += [ScaledIntConv2d(channels, out, 3, 1, 1, bits=4), nn.BatchNorm2d(out), LearnedScaleReLU(4)]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), ScaledIntLinear(channels, 10, bits=8))


@dataclass(frozen=True)
class Network:
    """build() -> our network; its kind chooses the target; shape of the images, batch included."""

    build: Callable[[], nn.Module]
    kind: Literal["dense", "depthwise", "fracbnn"]
    shape: tuple[int, int, int, int]


NETWORKS = {
    "mb_16x64": Network(Bottlenecks, "depthwise", (16, 3, 64, 64)),
    "mb_4x32": Network(Bottlenecks, "depthwise", (4, 3, 32, 32)),
    "vgg_32x32": Network(dense, "dense", (32, 3, 32, 32)),
    "vgg_4x32": Network(dense, "dense", (4, 3, 32, 32)),
    "proxylessnas_8x64": Network(
        lambda: zoo.get("proxylessnas_4b5b_imagenet", image_size=64, width=0.5, num_classes=100), "depthwise", (8, 3, 64, 64)
    ),
    "mobilenet_v2_8x64": Network(
        lambda: zoo.get("mobilenet_v2_imagenet", weight_bits=4, act_bits=4, num_classes=100), "depthwise", (8, 3, 64, 64)
    ),
    "vggtiny_32x32": Network(lambda: zoo.get("vggtiny_cifar10", weight_bits=4, act_bits=4), "dense", (32, 3, 32, 32)),
    "diracdeltanet_32x32": Network(
        lambda: zoo.get("diracdeltanet_cifar10", weight_bits=4, act_bits=4, first_weight_bits=8, first_act_bits=4, last_weight_bits=8, last_act_bits=8, fc_weight_bits=8),
        "dense", (32, 3, 32, 32)),
    "fracbnn_64": Network(lambda: zoo.get("fracbnn_cifar10"), "fracbnn", (64, 3, 32, 32)),
}  # fmt: skip


# --- twins ---------------------------------------------------------------------------------------------------------------------------


class StockUnsigned(Uint8ActPerTensorFloatMaxInit):
    """UintActLearnedLog2Scale in plain Brevitas."""

    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16


class StockSigned(Int8ActPerTensorFloatMinMaxInit):
    """IntActLearnedLog2Scale in plain Brevitas."""

    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16


def _swapped(model: nn.Module, twin: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the model with twin(module) in the place of every module that has one."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        new = twin(module)
        if new is not None:
            replace_module(model, name, new)
    return model


class _Join(nn.Identity):
    """What stands for a SharedHardTanh without quantizers."""

    def add(self, identity: Tensor, body: Tensor) -> Tensor:
        return identity + body


def _real(m: nn.Module) -> nn.Module | None:
    if isinstance(m, qnn.QuantConv2d):
        shape = (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        return nn.Conv2d(*shape, bias=m.bias is not None)  # type: ignore[arg-type]
    if isinstance(m, qnn.QuantLinear):
        return nn.Linear(m.in_features, m.out_features, m.bias is not None)
    if isinstance(m, (LearnedScaleReLU, HalfWave, DividedClip)):
        return nn.ReLU6(inplace=True)
    if isinstance(m, SharedHardTanh):
        return _Join()
    if isinstance(m, LearnedScaleHardTanh):
        return nn.Identity()
    if type(m).__name__ == "TruncAvgPool":
        return nn.AvgPool2d(m.kernel_size, m.stride)
    return None


def float_twin(model: nn.Module) -> nn.Module:
    """The network without quantizers."""
    return _swapped(model, _real)


class _StockJoin(qnn.QuantHardTanh):
    """What stands for a SharedHardTanh in plain Brevitas."""

    def add(self, identity: Any, body: Tensor) -> Any:
        return self(identity + self(body))


def _brevitas(m: nn.Module) -> nn.Module | None:
    if isinstance(m, (ScaledIntConv2d, ScaledIntLinear)):
        quant = m.weight_quant
        stock: Any = Int8WeightPerChannelFloat if quant.tensor_quant.channel is not None else Int8WeightPerTensorFloat
        options = {"weight_quant": stock, "weight_bit_width": quant.tensor_quant.bits, "weight_scaling_min_val": 2e-16}
        if isinstance(m, ScaledIntLinear):
            return qnn.QuantLinear(m.in_features, m.out_features, m.bias is not None, **options)
        shape = (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        return qnn.QuantConv2d(*shape, bias=m.bias is not None, **options)
    if isinstance(m, (LearnedScaleReLU, LearnedScaleHardTanh)):
        channels = {} if m.channels is None else {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (1, m.channels, 1, 1)}
        channels["return_quant_tensor"] = m.return_quant_tensor
        if isinstance(m, LearnedScaleReLU):
            return qnn.QuantReLU(act_quant=StockUnsigned, bit_width=m.bits, max_val=6.0, **channels)
        shared = _StockJoin if isinstance(m, SharedHardTanh) else qnn.QuantHardTanh
        return shared(act_quant=StockSigned, bit_width=m.bits, min_val=-10.0, max_val=10.0, **channels)
    return None


def stock_twin(model: nn.Module) -> nn.Module | None:
    """The same layers with Brevitas' own quantizers; None where it has no counterpart."""
    if any(isinstance(m, (HalfWave, DividedClip)) for m in model.modules()):
        return None
    return _swapped(model, _brevitas)


# --- FracBNN as published ------------------------------------------------------------------------------------------------------------


class _Quantized(Function):
    """QuantSign: the rounded value, with the gradient of the clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        step = 2.0 / 3
        return torch.round((torch.clamp(x, -1, 1) + 1) / step) * step - 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > -1) & (x < 1), grad, torch.zeros_like(grad))


class _Open(Function):
    """1 where x > 1/2; the gradient passes where x >= 1/2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0.5, torch.ones_like(x), torch.zeros_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x >= 0.5, grad, torch.zeros_like(grad))


def _sign(x: Tensor) -> Tensor:
    """sgn(x) with the gradient of a clamp to 1.3."""
    clipped = torch.clamp(x, -1.3, 1.3)
    return torch.sign(x).detach() - clipped.detach() + clipped


class _Encoder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(32, dtype=x.dtype).reshape(1, 1, 32, 1, 1).expand(len(x), x.shape[1], 32, *x.shape[2:])
        level = torch.round(x * 255 / 8).unsqueeze(2)
        return torch.where(places < level, torch.ones_like(places), -torch.ones_like(places)).flatten(1, 2)


class _Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Quantized.apply(x)


class _Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _sign(self.weight), None, self.stride, self.padding)


class _GatedConv(nn.Conv2d):
    def __init__(self, *shape: Any, threshold: float = -1.0) -> None:
        super().__init__(*shape, bias=False)
        self.threshold = nn.Parameter(torch.full((1, self.out_channels, 1, 1), threshold))

    def forward(self, x: Tensor) -> Tensor:
        high = F.conv2d(_sign(x), _sign(self.weight), None, self.stride, self.padding) * 2 / 3
        gate = _Open.apply(torch.sigmoid(5 * (high - self.threshold)))
        full = F.conv2d(x, _sign(self.weight), None, self.stride, self.padding)
        self.num_out, self.num_high = gate.numel(), gate.detach().sum().item()
        return (1 - gate) * high + gate * full


class _RPReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_x, self.shift_y = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(x + self.shift_x) + self.shift_y


def _published(m: nn.Module) -> nn.Module | None:
    made: dict[str, Callable[[], nn.Module]] = {
        "ThermometerEncoder": _Encoder,
        "QuantSign": _Sign,
        "BinaryConv2d": lambda: _Conv(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, bias=False),  # type: ignore[arg-type]
        "FractionalConv2d": lambda: _GatedConv(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding),
        "RPReLU": lambda: _RPReLU(m.prelu.num_parameters),  # type: ignore[union-attr, arg-type]
    }
    return made[type(m).__name__]() if type(m).__name__ in made else None


def published(model: nn.Module) -> nn.Module:
    """fracbnn_cifar10 as the published code computes it: the same operations on autograd's own tensors, two convolutions per gated layer.

    Source: FracBNN (arXiv 2012.12206), published code, layers of the training script
    """
    return _swapped(model, _published)


# --- measuring -----------------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One forward and backward; gradients are left on the parameters."""
    for p in model.parameters():
        p.grad = None
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss
