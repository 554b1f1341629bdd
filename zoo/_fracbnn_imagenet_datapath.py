"""The arithmetic of the FracBNN ImageNet accelerator, one module per step.

Features are ap_fixed<13,9,RND,SAT>: integers n with real value n / 16, -4096..4095. Parameters are ap_fixed<14,6,RND,SAT>:
P(v) = clamp(floor(256 v + 0.5), -8192, 8191). R(v, s) = clamp((v + 2^(s-1)) >> s, -4096, 4095). Modules take and return real numbers and
compute in float64, where every intermediate is exact; they replay a trained network and pass no gradient.

Each step equals that of the published source compiled with ap_fixed headers as long as convolution sums stay inside its registers:
|M| <= 511 for the sign plane, where the accelerator's 10 bits would wrap, and |L| <= 255 for the low plane. Sums beyond that saturate here;
`num_beyond` counts those of the last batch. Source: xcel-imagenet of cornell-zhang/FracBNN; no trained weights or results were published.
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
from quantlib.ops.lut import Lut
from quantlib.ops.requant import Requant
from quantlib.ops.sum_pool import SumPool
from quantlib.ops.threshold import Threshold

FRACTION, PARAMETER = 4, 8
WORD = 13
LOW, HIGH = -(2 ** (WORD - 1)), 2 ** (WORD - 1) - 1
LARGEST_M, LARGEST_L = 511, 255
_MERGE = FixedMerge(msb=171, lsb=85, fraction_in=FRACTION, shift=PARAMETER, lo=LOW, hi=HIGH)


def saturate(v: Tensor) -> Tensor:
    return v.clamp(LOW, HIGH)


def rounded(v: Tensor, shift: int) -> Tensor:
    """R(v, s) on integers held in float64."""
    return saturate(torch.floor((v + 2 ** (shift - 1)) / 2**shift))


def parameter(v: Tensor) -> Tensor:
    """P(v): the integer of a 14-bit parameter with 8 fraction bits."""
    return torch.floor(v.double() * 2**PARAMETER + 0.5).clamp(-(2**13), 2**13 - 1)


def codes(x: Tensor) -> Tensor:
    return torch.round(x.double() * 2**FRACTION)


def real(n: Tensor, like: Tensor) -> Tensor:
    return (n / 2**FRACTION).to(like.dtype)


def _ints(v: Tensor) -> np.ndarray:
    return v.detach().double().cpu().numpy().astype(np.int64).reshape(-1)


def _column(v: Tensor) -> Tensor:
    return v.reshape(1, -1, 1, 1)


def _requant(g: Any, edge: Any, mul: Any, add: Any, shift: int, **branch: Any) -> Any:
    op = Requant(mul=np.atleast_1d(mul), add=np.atleast_1d(add), shift=shift, lo=LOW, hi=HIGH, **branch)
    return g.add(op, edge, scale=2.0**-FRACTION)


class WordBatchNorm2d(nn.BatchNorm2d):
    """y = R(P(w) n + 16 P(b), 8) with the folded w = gamma / sqrt(var + eps), b = beta - mean w, in float64, rounded to float32.

    first: the input is the first convolution's integer, which becomes a feature, n = clamp(16 x), before anything else.
    """

    out_bits = WORD

    def __init__(self, channels: int, first: bool = False) -> None:
        super().__init__(channels)
        self.first = first
        self.num_beyond = 0

    def folded(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None and self.running_var is not None
        w = self.weight.double() / torch.sqrt(self.running_var.double() + self.eps)
        b = self.bias.double() - self.running_mean.double() * w
        return parameter(w.float()), parameter(b.float())

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.folded()
        if self.first:
            self.num_beyond = int((x.abs() > LARGEST_M).sum())
        return real(rounded(_column(w) * saturate(codes(x)) + _column(b) * 2**FRACTION, PARAMETER), x)

    def lower(self, g: Any, x: Any) -> Any:
        w, b = self.folded()
        edge = _requant(g, g.integer(x), 2**FRACTION, 0, 0) if self.first else g.integer(x)
        return _requant(g, edge, _ints(w), _ints(b) * 2**FRACTION + 2 ** (PARAMETER - 1), PARAMETER)


class WordRPReLU(nn.Module):
    """t = R(16 n + P(shift_x), 4); where t < 0: t = R(t P(slope), 8); y = R(16 t + P(shift_y), 4)."""

    out_bits = WORD

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_x, self.prelu, self.shift_y = Shift(channels), nn.PReLU(channels), Shift(channels)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        return parameter(self.shift_x.bias).reshape(-1), parameter(self.prelu.weight), parameter(self.shift_y.bias).reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        shift_x, slope, shift_y = map(_column, self.constants())
        t = rounded(codes(x) * 16 + shift_x, FRACTION)
        t = torch.where(t < 0, rounded(t * slope, PARAMETER), t)
        return real(rounded(t * 16 + shift_y, FRACTION), x)

    def lower(self, g: Any, x: Any) -> Any:
        shift_x, slope, shift_y = map(_ints, self.constants())
        one, zero = np.ones_like(slope), np.zeros_like(slope)
        t = _requant(g, g.integer(x), 16 * one, shift_x + 8, FRACTION)
        t = _requant(g, t, one << PARAMETER, zero, PARAMETER, kink=zero, mul2=slope, add2=one << (PARAMETER - 1))
        return _requant(g, t, 16 * one, shift_y + 8, FRACTION)


class WordSign(nn.Module):
    """code = clamp(ceil((k (n + 16) - 16) / 32), 0, k), k = 2^bits - 1: ties go down, so 0 gives -1/3. Value -1 + 2 code / k."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.out_bits, self.top = bits, 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        code = torch.floor((self.top * (codes(x) + 16) + 15) / 32).clamp(0, self.top)
        return ((2 * code - self.top) / self.top).to(x.dtype)

    def lower(self, g: Any, x: Any) -> Any:
        first = [-((15 - 32 * c) // self.top) - 16 for c in range(1, self.top + 1)]  # least n of each code
        op = Threshold(thresholds=np.array([first]), sign=np.array([1]), lo=-self.top, step=2)
        return g.add(op, g.integer(x), scale=1 / self.top)


class WordConv2d(nn.Conv2d):
    """M, L = convolutions of the sign plane and the low plane; t = R(171 clamp(16 M), 8); y = t, or R(16 t + 85 L, 4) where 16 t >
    P(threshold).
    """

    weight_bits, out_bits = 1, WORD

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.threshold = nn.Parameter(torch.full((1, out_channels, 1, 1), -1.0))
        self.num_beyond = 0

    def signs(self) -> Tensor:
        return torch.where(self.weight > 0, 1.0, -1.0).double()

    def gate(self) -> Tensor:
        """The least M at which each output channel opens, one above the largest sum where it never does."""
        bound = self.weight[0].numel()
        m = torch.arange(-bound, bound + 1, dtype=torch.float64)
        is_open = 2**FRACTION * _MERGE(m, torch.zeros_like(m))[:, None] > parameter(self.threshold.detach()).reshape(1, -1).cpu()
        return (bound + 1 - is_open.sum(0)).double()

    def forward(self, x: Tensor) -> Tensor:
        msb = torch.sign(x).double()
        planes = torch.cat([msb, torch.round(3 * x.double()) - 2 * msb])
        m, low = F.conv2d(planes, self.signs(), None, self.stride, self.padding, self.dilation, self.groups).chunk(2)
        self.num_beyond = int(((m.abs() > LARGEST_M) | (low.abs() > LARGEST_L)).sum())
        return real(_MERGE(m, low * (m >= _column(self.gate()).to(m.device))), x)

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


class WordAdd(nn.Module):
    """y = clamp(a + b) on the features' 13 bits."""

    out_bits = WORD

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return real(saturate(codes(a) + codes(b)), a)

    def lower(self, g: Any, a: Any, b: Any) -> Any:
        return _requant(g, g.add(Add(), g.integer(a), g.integer(b)), 1, 0, 0)


class WordValue(nn.Module):
    """4-bit codes as features: n = R(34 code - 256, 4), 34/256 for two fifteenths."""

    out_bits = WORD

    def forward(self, x: Tensor) -> Tensor:
        return real(rounded(34 * torch.round((x.double() + 1) * 7.5) - 256, FRACTION), x)

    def lower(self, g: Any, x: Any) -> Any:
        table = (34 * np.arange(16) - 256 + 8) >> FRACTION
        return g.add(Lut(table=table[None], lo_in=-15, step_in=2), g.integer(x), scale=2.0**-FRACTION)


class WordPool(nn.Module):
    """Sum of each 2x2 group divided by 4 toward zero: (N, C, H, W) -> (N, C, H/2, W/2)."""

    out_bits = WORD

    def forward(self, x: Tensor) -> Tensor:
        return real(torch.trunc(F.avg_pool2d(codes(x), 2, divisor_override=1) / 4), x)

    def lower(self, g: Any, x: Any) -> Any:
        total = g.add(SumPool(kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0)), g.integer(x))
        return _requant(g, total, 1, 0, 2, kink=np.array([0]), mul2=np.array([1]), add2=np.array([3]))


def shortcut(stride: int) -> nn.Module:
    """The 4-bit code of a feature as a feature again; a pooled one is coded a second time."""
    pooled = [WordPool(), WordSign(4), WordValue()] if stride == 2 else []
    return nn.Sequential(WordSign(4), WordValue(), *pooled)
