"""What the networks of the FuSeConv paper are made of: the arithmetic of a network, its separable block, its bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.layers import FuSeConv2d, LearnedScaleHardTanh, LearnedScaleReLU, ScaledIntConv2d, ScaledIntLinear, SharedHardTanh

Activation = Literal["relu", "relu6", "hswish", "none"]
Fuse = Literal["half", "full"] | None
ENDS = 8  # bits of the first and last weights, of the image, and of what stands in front of a step that is no quantizer

_REAL: dict[Activation, Callable[[], nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hswish": nn.Hardswish, "none": nn.Identity}


@dataclass(frozen=True)
class Arithmetic:
    """Real numbers (bits None), or integer weights with one scale per output channel and learned scales of the activations."""

    weight_bits: int | None = None
    act_bits: int | None = None
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if (self.weight_bits is None) != (self.act_bits is None):
            raise ValueError("weight_bits and act_bits are given together, or both left out for real numbers")

    @property
    def quantized(self) -> bool:
        return self.act_bits is not None

    def conv(
        self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False, end: bool = False
    ) -> nn.Module:
        return self.convolution(end)(channels, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)

    def convolution(self, end: bool = False) -> Callable[..., nn.Module]:
        """The class of the convolutions; end: the first or last one of a network."""
        return nn.Conv2d if self.weight_bits is None else partial(ScaledIntConv2d, bits=ENDS if end else self.weight_bits)

    def linear(self, channels: int, out: int, bias: bool = True, end: bool = False) -> nn.Module:
        if self.weight_bits is None:
            return nn.Linear(channels, out, bias=bias)
        return ScaledIntLinear(channels, out, bias=bias, bits=ENDS if end else self.weight_bits)

    def norm(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, eps=self.eps, momentum=self.momentum)

    def act(self, kind: Activation) -> nn.Module:
        """An activation; in integers its quantizer, signed where the activation has negative values."""
        if self.act_bits is None:
            return _REAL[kind]()
        if kind in ("relu", "relu6"):
            return LearnedScaleReLU(self.act_bits)
        if kind == "none":
            return LearnedScaleHardTanh(self.act_bits, init=6.0)
        return nn.Sequential(self.grid(), nn.Hardswish(), LearnedScaleHardTanh(self.act_bits, init=6.0))

    def grid(self, init: float = 6.0) -> nn.Module:
        """8-bit codes in front of a step that is run code by code; nothing in real numbers."""
        return LearnedScaleHardTanh(ENDS, init=init) if self.quantized else nn.Identity()

    def shared(self) -> SharedHardTanh | None:
        return None if self.act_bits is None else SharedHardTanh(self.act_bits, init=10.0)


class SqueezeExcite(nn.Module):
    """x times a gate per channel, h-sigmoid(W2 relu(W1 mean(x))); hidden size C // 4, no biases.

    In integers x and its mean are 8-bit codes, the gate is an 8-bit code of 0..1, and the product is exact.
    """

    def __init__(self, channels: int, a: Arithmetic) -> None:
        super().__init__()
        self.codes, self.mean_codes = a.grid(), a.grid()
        self.reduce, self.expand = a.linear(channels, channels // 4, bias=False), a.linear(channels // 4, channels, bias=False)
        self.hidden = LearnedScaleReLU(ENDS) if a.quantized else nn.ReLU()
        self.gate = LearnedScaleReLU(ENDS, init=1.0) if a.quantized else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.codes(x)
        hidden = self.hidden(self.reduce(self.mean_codes(x.mean((2, 3)))))
        return x * self.gate(F.hardsigmoid(self.expand(hidden)))[:, :, None, None]


@dataclass(frozen=True)
class Row:
    """One separable block: channels in the middle and behind it, kernel, stride, squeeze-excite, activation, whether a 1x1 convolution
    widens its input first."""

    middle: int
    out: int
    kernel: int
    stride: int
    act: Activation
    squeeze: bool = False
    widen: bool = True


class Separable(nn.Module):
    """[1x1 - BN - act] - depthwise or FuSe - BN - [squeeze-excite] - act - 1x1 - BN [- act] [+ x], x (N, C, H, W) -> (N, out, H', W').

    fuse: None for the depthwise convolution; middle_act: the activation between the 1-D filters and the 1x1 (V1 has none there); out_act;
    idle: an unused 1x1 convolution with its norm, which the published parameter counts include; join: the quantizer of the residual group,
    None in real numbers.
    """

    def __init__(self, channels: int, row: Row, a: Arithmetic, fuse: Fuse, *, middle_act: Activation, out_act: Activation = "none",
                 residual: bool = False, idle: bool = False, join: SharedHardTanh | None = None) -> None:  # fmt: skip
        super().__init__()
        self.widen = nn.Sequential(a.conv(channels, row.middle, 1), a.norm(row.middle)) if row.widen or idle else None
        self.idle = idle
        self.widen_act = a.act(row.act) if row.widen else None
        self.spatial: nn.Module
        if fuse is None:
            self.spatial, width = a.conv(row.middle, row.middle, row.kernel, row.stride, row.middle), row.middle
        else:
            self.spatial = FuSeConv2d(row.middle, row.kernel, row.stride, variant=fuse, conv=a.convolution())
            width = self.spatial.out_channels
        self.spatial_norm = a.norm(width)
        self.squeeze = SqueezeExcite(width, a) if row.squeeze else None
        self.middle_act = a.act(middle_act)
        self.project, self.project_norm = a.conv(width, row.out, 1), a.norm(row.out)
        self.out_act = a.act(out_act) if join is None else None
        self.residual = residual and row.stride == 1 and channels == row.out
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.widen is not None and self.widen_act is not None:
            y = self.widen_act(self.widen(y))
        y = self.spatial_norm(self.spatial(y))
        y = self.middle_act(y if self.squeeze is None else self.squeeze(y))
        y = self.project_norm(self.project(y))
        if self.join is not None:
            return self.join.add(x, y) if self.residual else self.join(y)
        assert self.out_act is not None
        return self.out_act(x + y if self.residual else y)


class Bottleneck(nn.Module):
    """ResNet's 1x1 - BN - ReLU - 3x3 or FuSe - BN - ReLU - 1x1 - BN, + x (or its 1x1 projection), ReLU; the stride on the middle.

    In integers both addends and their sum go through one signed quantizer, `join`, with a bit more than the activations: the positive half
    of it is the activation.
    """

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, a: Arithmetic, fuse: Fuse, copies: int = 1,
                 join: SharedHardTanh | None = None) -> None:  # fmt: skip
        super().__init__()
        self.join = join
        out = planes * self.expansion
        self.conv1, self.bn1, self.act1 = a.conv(channels, planes, 1), a.norm(planes), a.act("relu")
        self.spatial: nn.Module
        if fuse is None:
            self.spatial, width = a.conv(planes, planes, 3, stride), planes
        else:
            self.spatial = FuSeConv2d(planes, 3, stride, variant=fuse, copies=copies, conv=a.convolution())
            width = self.spatial.out_channels
        self.spatial_norm, self.act2 = a.norm(width), a.act("relu")
        self.conv3, self.bn3 = a.conv(width, out, 1), a.norm(out)
        moves = stride != 1 or channels != out
        self.downsample = nn.Sequential(a.conv(channels, out, 1, stride), a.norm(out)) if moves else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.spatial_norm(self.spatial(self.act1(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        skip = x if self.downsample is None else self.downsample(x)
        if self.join is None:
            return F.relu(skip + y)
        return F.relu(self.join.add(skip if self.downsample is None else self.join(skip), y))
