from __future__ import annotations

from typing import Any

import numpy as np
import torch
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.modules.utils import _pair

from quantlib.layers._base import Example, Layer
from quantlib.ops.fractional_conv2d import FractionalConv2d as FractionalConv2dOp
from quantlib.quantizers import binary_sign, in_float32, quant_sign
from quantlib.quantizers.functions import pass_inside, sign

STEEPNESS = 5.0


def gate(msb: Tensor, threshold: Tensor) -> Tensor:
    """1 where the second bit is computed, else 0: sigmoid(5 (msb - threshold)) > 1/2, in the dtype of msb. No gradient."""
    return torch.gt(torch.sigmoid((msb - threshold).mul_(STEEPNESS)), 0.5).to(msb.dtype)


class _FractionalConv2d(Function):
    """Published forward, operation by operation; backward by hand with five convolutions, four where every |q| <= clip."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, weight: Tensor, threshold: Tensor, window: tuple[Any, ...], clip: float, sparse: bool) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            leading = sign(q)
            msb = nn.functional.conv2d(leading, weight, None, *window).mul_(2).div_(3)
            full = nn.functional.conv2d(q, weight, None, *window)
        soft = torch.sigmoid((msb - threshold).mul_(STEEPNESS))
        mask = torch.gt(soft, 0.5).to(q.dtype)
        out = ((1 - mask) * msb).add_(mask * full)
        ctx.save_for_backward(q, leading, weight, threshold, msb, full, soft)
        ctx.window, ctx.clip, ctx.sparse = window, clip, sparse
        ctx.mark_non_differentiable(mask)
        return out, mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, leading, weight, threshold, msb, full, soft = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.window
        slope = (full - msb).mul_(grad).mul_(soft).mul_(1 - soft).mul_(STEEPNESS)
        if ctx.sparse:
            slope = slope.mul_(soft >= 0.5)
        to_full = grad * (soft > 0.5)
        to_msb = (grad - to_full).add_(slope).mul_(2 / 3)
        grad_q = grad_w = None
        with torch.autocast(q.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if bool((q.abs() <= ctx.clip).all()):
                    grad_q = conv2d_input(q.shape, weight, to_msb + to_full, stride, padding, dilation, groups)
                else:
                    grad_q = pass_inside(conv2d_input(q.shape, weight, to_msb, stride, padding, dilation, groups), q, -ctx.clip, ctx.clip)
                    grad_q = grad_q + conv2d_input(q.shape, weight, to_full, stride, padding, dilation, groups)
            if ctx.needs_input_grad[1]:
                grad_w = conv2d_weight(leading, weight.shape, to_msb, stride, padding, dilation, groups)
                grad_w = grad_w + conv2d_weight(q, weight.shape, to_full, stride, padding, dilation, groups)
        return grad_q, grad_w, -slope.sum_to_size(threshold.shape), None, None, None


class FractionalConv2d(Layer, nn.Module):
    """Precision-gated binary convolution: the second bit of an activation is used only where the first one promises a large sum.

    Forward:   W = sgn(weight); msb = conv(sgn(q), W) * 2 / 3; full = conv(q, W); open = sigmoid(5 (msb - threshold)) > 1/2;
               y = full where open, else msb. Zero padding adds 0 to both.
               In integers, with q = n / 3, m = sgn(n), l = n - 2m: M = conv(m), L = conv(l), y = (2M + L where open) / 3.
    Gradient:  with s the sigmoid and G = dy (full - msb) 5 s (1 - s), times [s >= 1/2] unless sparse=False: dthreshold = -sum of G over
               N, H, W; d(msb) = dy where closed + G; d(full) = dy where open; both run on to q (the first through |q| <= clip) and to
               weight (through |weight| <= clip)
    Shapes:    q (N, Cin, H, W), weight (Cout, Cin / groups, kh, kw), threshold (1, Cout, 1, 1), y (N, Cout, H', W')
    Ranges:    q in {-1, -1/3, 1/3, 1} (QuantSign(2)) for conversion; training takes any real q
    Arguments: as torch.nn.Conv2d without bias; threshold_init; clip; sign_of_zero, the sign of a weight that is exactly 0;
               sparse: gradient of the gate only where it is open; real_weights=True bypasses the sign of the weights (first training step)
    State:     `weight`, `threshold`. After each forward `num_out` (elements) and `num_high` (open ones) count the last batch, outside the
               state dict; density = num_high / num_out, average activation bits = 1 + density
    Errors:    conversion refuses real_weights, a weight that is exactly 0, NaN, and an input that is no QuantSign(2)
    Source:    FracBNN (arXiv 2012.12206), `PGBinaryConv2d`; precision gating: arXiv 2002.07136

    >>> conv = FractionalConv2d(2, 4, 3, padding=1)
    >>> conv(QuantSign(2)(torch.randn(1, 2, 5, 5))).shape
    torch.Size([1, 4, 5, 5])
    >>> conv.num_out, 0.0 <= conv.density <= 1.0
    (100, True)
    """

    num_out: int
    num_high: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        threshold_init: float = -1.0,
        clip: float = 1.3,
        sign_of_zero: float = 0.0,
        sparse: bool = True,
        real_weights: bool = False,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} input and {out_channels} output channels do not split into {groups} groups")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation)
        self.clip, self.sign_of_zero, self.sparse, self.real_weights = clip, sign_of_zero, sparse, real_weights
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.threshold = nn.Parameter(torch.full((1, out_channels, 1, 1), float(threshold_init)))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.num_out, self.num_high = 0, torch.zeros((), dtype=torch.int64)

    def quant_weight(self) -> Tensor:
        """The weights of the convolution: their signs, or themselves with real_weights."""
        return in_float32(self.weight) if self.real_weights else binary_sign(self.weight, self.clip, self.sign_of_zero)

    @property
    def density(self) -> float:
        """Share of open gates in the last batch."""
        return float(self.num_high) / max(self.num_out, 1)

    def forward(self, q: Tensor | QuantTensor) -> Tensor:
        q = in_float32(q.value if isinstance(q, QuantTensor) else q)
        window = (self.stride, self.padding, self.dilation, self.groups)
        y, mask = _FractionalConv2d.apply(q, self.quant_weight(), self.threshold, window, self.clip, self.sparse)
        self.num_out, self.num_high = mask.numel(), torch.count_nonzero(mask)
        return y

    def lower(self, g: Any, x: Any) -> Any:
        edge = g.integer(x)
        t = edge.type
        if (t.lo, t.hi, t.step) != (-3, 3, 2) or not np.allclose(t.scale, 1 / 3, rtol=1e-12, atol=0):
            raise ValueError(f"a FractionalConv2d reads the levels -1, -1/3, 1/3, 1 of a QuantSign(2), not {t} of scale {t.scale}")
        if self.real_weights:
            raise ValueError("this FractionalConv2d has real weights (first training step): set real_weights = False before converting")
        weight = self.quant_weight().detach()
        if not bool((weight.abs() == 1).all()):
            raise ValueError("a weight of this FractionalConv2d is 0 or NaN and has no sign: pass sign_of_zero=1, or move zeros off 0")
        weights, (top, bottom), (left, right) = weight.numpy(), [self.padding[0]] * 2, [self.padding[1]] * 2
        if self.dilation != (1, 1):
            raise ValueError(f"a FractionalConv2d of dilation {self.dilation} cannot be converted; dilation 1 can")
        op = FractionalConv2dOp(weights, self.integer_gate(), self.stride, (top, bottom, left, right), self.groups)
        return g.add(op, edge, scale=1 / 3)

    def integer_gate(self) -> np.ndarray:
        """(Cout,) smallest integer M = conv(sgn(q)) whose gate is open, one above the largest where it never opens.

        Measured by running the gate in float64 on every M the sum can take.
        """
        bound = self.weight[0].numel()
        sums = torch.arange(-bound, bound + 1, dtype=torch.float64)
        is_open = gate(sums.reshape(-1, 1, 1, 1).mul(2).div_(3), self.threshold.detach().double().cpu()).reshape(len(sums), -1) > 0
        first = len(sums) - is_open.sum(0)
        if not torch.equal(is_open, torch.arange(len(sums))[:, None] >= first):
            raise ValueError("a gate of this FractionalConv2d does not open once and for all: is a threshold NaN?")
        return (first - bound).numpy()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"groups={self.groups}, sparse={self.sparse}, real_weights={self.real_weights}"
        )

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(5)
        x = quant_sign(torch.randn(3, 4, 7, 5))
        modules = [
            FractionalConv2d(4, 6, 3, padding=1),
            FractionalConv2d(4, 5, 1),
            FractionalConv2d(4, 4, 3, stride=2, padding=1, groups=2),
        ]
        for module in modules:
            nn.init.uniform_(module.threshold, -3, 3)
        return [(m, x) for m in modules]
