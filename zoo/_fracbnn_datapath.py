"""The arithmetic of the FracBNN CIFAR-10 accelerator, one module per step, equal to the published HLS design in every integer.

Features are ap_fixed<16,9,RND,SAT>: integers n with real value n / 128. Parameters are ap_fixed<12,4,RND,SAT>:
P(v) = clamp(floor(256 v + 0.5), -2048, 2047). R(v, s) = clamp((v + 2^(s-1)) >> s, -32768, 32767). Modules take and return real numbers
(multiples of 1/128, shape (N, C, H, W)) and compute in float64, where every intermediate is exact; they replay a trained network and pass
no gradient. Source: xcel-cifar10 of cornell-zhang/FracBNN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.layers.rprelu import Shift
from quantlib.ops.add import Add
from quantlib.ops.fractional_conv2d import FixedMerge
from quantlib.ops.fractional_conv2d import FractionalConv2d as FractionalConv2dOp
from quantlib.ops.requant import Requant
from quantlib.ops.saturating_dense import SaturatingDense
from quantlib.ops.select import Select
from quantlib.ops.sum_pool import SumPool
from quantlib.ops.threshold import Threshold

FRACTION, PARAMETER = 7, 8
WORD = 16
LOW, HIGH = -(2 ** (WORD - 1)), 2 ** (WORD - 1) - 1
_MERGE = FixedMerge()


def saturate(v: Tensor) -> Tensor:
    return v.clamp(LOW, HIGH)


def rounded(v: Tensor, shift: int) -> Tensor:
    """R(v, s) on integers held in float64."""
    return saturate(torch.floor((v + 2 ** (shift - 1)) / 2**shift))


def parameter(v: Tensor) -> Tensor:
    """P(v): the integer of a 12-bit parameter with 8 fraction bits."""
    return torch.floor(v.double() * 2**PARAMETER + 0.5).clamp(-(2**11), 2**11 - 1)


def narrow(p: Tensor) -> Tensor:
    """A parameter re-rounded to the features' fraction: R(P, 1)."""
    return rounded(p, PARAMETER - FRACTION)


def codes(x: Tensor, fraction: int = FRACTION) -> Tensor:
    return torch.round(x.double() * 2**fraction)


def real(n: Tensor, like: Tensor) -> Tensor:
    return (n / 2**FRACTION).to(like.dtype)


def _ints(v: Tensor) -> np.ndarray:
    return v.detach().double().cpu().numpy().astype(np.int64).reshape(-1)


def _column(v: Tensor) -> Tensor:
    return v.reshape(1, -1, 1, 1)


def _requant(g: Any, edge: Any, mul: np.ndarray, add: np.ndarray, shift: int, **branch: Any) -> Any:
    lo, hi = branch.pop("lo", LOW), branch.pop("hi", HIGH)
    return g.add(Requant(mul=mul, add=add, shift=shift, lo=lo, hi=hi, **branch), edge, scale=2.0**-FRACTION)


class DatapathBatchNorm2d(nn.BatchNorm2d):
    """y = R(P(w) n + 2^f P(b), f + 1) with the folded w = gamma / sqrt(var + eps), b = beta - mean w, in float64, rounded to float32.

    f is the fraction of the input: 7 for features, 0 for the integers of the first convolution.
    """

    out_bits = WORD

    def __init__(self, channels: int, fraction_in: int = FRACTION) -> None:
        super().__init__(channels)
        self.fraction_in = fraction_in

    def folded(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None and self.running_var is not None
        w = self.weight.double() / torch.sqrt(self.running_var.double() + self.eps)
        b = self.bias.double() - self.running_mean.double() * w
        return parameter(w.float()), parameter(b.float())

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.folded()
        return real(rounded(_column(w) * codes(x, self.fraction_in) + _column(b) * 2**self.fraction_in, self.fraction_in + 1), x)

    def lower(self, g: Any, x: Any) -> Any:
        w, b = self.folded()
        half = 2**self.fraction_in
        return _requant(g, g.integer(x), _ints(w), _ints(b) * half + half, self.fraction_in + 1)


class DatapathRPReLU(nn.Module):
    """t = R(2 n + P(shift_x), 1); where t < 0: t = R(t P(slope), 8); y = R(2 t + P(shift_y), 1)."""

    out_bits = WORD

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_x, self.prelu, self.shift_y = Shift(channels), nn.PReLU(channels), Shift(channels)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        return parameter(self.shift_x.bias).reshape(-1), parameter(self.prelu.weight), parameter(self.shift_y.bias).reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        shift_x, slope, shift_y = map(_column, self.constants())
        t = rounded(2 * codes(x) + shift_x, 1)
        t = torch.where(t < 0, rounded(t * slope, PARAMETER), t)
        return real(rounded(2 * t + shift_y, 1), x)

    def lower(self, g: Any, x: Any) -> Any:
        shift_x, slope, shift_y = map(_ints, self.constants())
        one, zero = np.ones_like(slope), np.zeros_like(slope)
        t = _requant(g, g.integer(x), 2 * one, shift_x + 1, 1)
        t = _requant(g, t, one << PARAMETER, zero, PARAMETER, kink=zero, mul2=slope, add2=one << (PARAMETER - 1))
        return _requant(g, t, 2 * one, shift_y + 1, 1)


class DatapathQuantSign(nn.Module):
    """code = clamp((3 (n + 128) + 128) >> 8, 0, 3), value -1 + 2/3 code: decision points round half up, so -2/3 itself gives -1/3."""

    out_bits = 2

    def forward(self, x: Tensor) -> Tensor:
        code = torch.floor((3 * (codes(x) + 128) + 128) / 256).clamp(0, 3)
        return ((2 * code - 3) / 3).to(x.dtype)

    def lower(self, g: Any, x: Any) -> Any:
        first = [-((128 - 256 * k) // 3) - 128 for k in (1, 2, 3)]  # least n of each code: ceil((256 k - 128) / 3) - 128
        op = Threshold(thresholds=np.array([first]), sign=np.array([1]), lo=-3, step=2)
        return g.add(op, g.integer(x), scale=1 / 3)


class DatapathFractionalConv2d(nn.Conv2d):
    """M, L = convolutions of the sign plane and the low plane; L counts where 171 M > P(threshold), else 0.

    t = R(171 clamp(128 M), 8); y = R(256 t + 85 clamp(128 L), 8).
    """

    weight_bits, out_bits = 1, WORD

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.threshold = nn.Parameter(torch.full((1, out_channels, 1, 1), -1.0))

    def signs(self) -> Tensor:
        return torch.where(self.weight > 0, 1.0, -1.0).double()

    def gate(self) -> Tensor:
        """171 M > P(threshold) as M >= gate, an integer per output channel."""
        return torch.floor(parameter(self.threshold).reshape(-1) / _MERGE.msb) + 1

    def forward(self, x: Tensor) -> Tensor:
        msb = torch.sign(x).double()
        lsb = torch.round(3 * x.double()) - 2 * msb
        planes = torch.cat([msb, lsb])
        m, low = F.conv2d(planes, self.signs(), None, self.stride, self.padding, self.dilation, self.groups).chunk(2)
        return real(_MERGE(m, low * (m >= _column(self.gate()))), x)

    def lower(self, g: Any, x: Any) -> Any:
        vertical, horizontal = (int(p) for p in self.padding)
        op = FractionalConv2dOp(
            weight=self.signs().cpu().numpy(),
            gate=_ints(self.gate()),
            stride=(int(self.stride[0]), int(self.stride[1])),
            padding=(vertical, vertical, horizontal, horizontal),
            groups=self.groups,
            merge=_MERGE,
        )
        return g.add(op, g.integer(x), scale=2.0**-FRACTION)


class DatapathAdd(nn.Module):
    """y = clamp(a + b) on the features' 16 bits."""

    out_bits = WORD

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return real(saturate(codes(a) + codes(b)), a)

    def lower(self, g: Any, a: Any, b: Any) -> Any:
        return _requant(g, g.add(Add(), g.integer(a), g.integer(b)), np.array([1]), np.array([0]), 0)


class DatapathShortcut(nn.Module):
    """Sum of each 2x2 group, clamped to 16 bits, divided by 4 toward zero; then the channels twice: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    out_bits = WORD

    def forward(self, x: Tensor) -> Tensor:
        total = F.avg_pool2d(codes(x), 2, divisor_override=1)
        half = real(torch.trunc(saturate(total) / 4), x)
        return torch.cat([half, half], 1)

    def lower(self, g: Any, x: Any) -> Any:
        edge = g.integer(x)
        total = g.add(SumPool(kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0)), edge)
        one, zero = np.array([1]), np.array([0])
        half = _requant(g, total, one, zero, 2, kink=zero, mul2=one, add2=3 * one, lo=LOW // 4, hi=HIGH // 4)
        return g.add(Select(channels=np.tile(np.arange(edge.type.shape[0]), 2)), half)


class DatapathMean(nn.Module):
    """y = R(sum over the map, log2(H W)); H W must be a power of two. (N, C, H, W) -> (N, C, 1, 1)."""

    out_bits = WORD

    def forward(self, x: Tensor) -> Tensor:
        return real(rounded(codes(x).sum((2, 3), keepdim=True), self._shift(x.shape[2] * x.shape[3])), x)

    def lower(self, g: Any, x: Any) -> Any:
        edge = g.integer(x)
        _, height, width = edge.type.shape
        shift = self._shift(height * width)
        total = g.add(SumPool(kernel=(height, width), stride=(height, width), padding=(0, 0, 0, 0)), edge)
        return _requant(g, total, np.array([1]), np.array([2 ** (shift - 1)]), shift)

    @staticmethod
    def _shift(pixels: int) -> int:
        if pixels < 2 or pixels & (pixels - 1):
            raise ValueError(f"the accelerator's mean divides by a power of two, not by {pixels} pixels")
        return int(pixels).bit_length() - 1


class DatapathLinear(nn.Linear):
    """acc = b; for each input in order: acc = R(128 acc + w x, 7), with w and b re-rounded to 7 fraction bits. (N, K) -> (N, O)."""

    weight_bits, out_bits = 12, WORD

    def constants(self) -> tuple[Tensor, Tensor]:
        return narrow(parameter(self.weight)), narrow(parameter(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.constants()
        n, total = codes(x), bias.expand(len(x), -1)
        for k in range(n.shape[1]):
            total = rounded(total * 2**FRACTION + n[:, k : k + 1] * weight[:, k], FRACTION)
        return real(total, x)

    def lower(self, g: Any, x: Any) -> Any:
        weight, bias = self.constants()
        op = SaturatingDense(weight=weight.detach().cpu().numpy(), bias=_ints(bias), shift=FRACTION, lo=LOW, hi=HIGH)
        return g.add(op, g.integer(x), scale=2.0**-FRACTION)
