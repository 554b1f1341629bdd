from __future__ import annotations

from typing import Any

import numpy as np
import torch
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from quantlib.layers._base import Example, Layer
from quantlib.layers.quant_sign import QuantSign
from quantlib.ops.fractional_conv2d import FractionalConv2d as FractionalConv2dOp
from quantlib.quantizers import binary_sign, in_float32, kernels
from quantlib.quantizers.functions import flat, pass_inside, sign
from quantlib.tails import ConversionError

STEEPNESS = 5.0
Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


def gate(msb: Tensor, threshold: Tensor) -> Tensor:
    """sigmoid(5 (msb - threshold)): the second bit is computed where this is above 1/2. No gradient."""
    return (msb - threshold).mul_(STEEPNESS).sigmoid_()


def _above(soft: Tensor, inclusive: bool = False) -> Tensor:
    """1 where soft > 1/2 (>= if inclusive), else 0, in the dtype of soft: masks as numbers are faster than as booleans."""
    return (torch.ge if inclusive else torch.gt)(soft, 0.5, out=torch.empty_like(soft))


def _grad_input(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    stride, padding, dilation, groups = window
    with torch.autocast(grad.device.type, enabled=False):
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )[0]  # fmt: skip


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    stride, padding, dilation, groups = window
    with torch.autocast(grad.device.type, enabled=False):
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (False, True, False)
        )[1]  # fmt: skip


def _sums(planes: Tensor, weight: Tensor, window: Window, signs: bool) -> Tensor:
    """The convolution of planes, integers of -3..3. With signs (or twice signs) as weights, float64, which conversion uses, is done in
    float32: these integers and their sums are exact there too, and a CPU is several times as fast."""
    if signs and planes.dtype is torch.float64 and 6 * weight[0].numel() < 1 << 24:
        return nn.functional.conv2d(planes.float(), weight.float(), None, *window).double()
    return nn.functional.conv2d(planes, weight, None, *window)


def third_planes(q: Tensor) -> tuple[Tensor, Tensor] | None:
    """(m, l) with 3q = 2m + l, m = sgn(q) and l an integer, where every q lies on thirds (to 1e-5) and |q| < 1.3; else None."""
    if not q.numel():
        return None
    if kernels.fit(q) and kernels.places(q, 1):
        high, low = torch.empty_like(q), torch.empty_like(q)
        return (high, low) if kernels.call("thirds", q, high, low, q.numel(), dtype=q.dtype) else None
    n = q * 3
    low = n.round()
    off, largest = (torch.stack(torch.aminmax(flat(v))).abs().max() for v in (n.sub_(low), low))
    if not bool((off < 1e-5) & (largest < 4)):  # one look, one wait on a GPU; NaN is not below
        return None
    high = torch.sign(q)
    return high, low.sub_(high, alpha=2)


class _Gated(Function):
    """y = (2M + L where open) / 3 from the planes of q; five convolutions, forward and backward together. Also the number of open gates."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, weight: Tensor, threshold: Tensor, high: Tensor, low: Tensor, window: Window, sparse: bool, signs: bool
    ) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            double = _sums(high, 2 * weight, window, signs)  # 2M exactly: a power of two passes through every rounding
            lsb = _sums(low, weight, window, signs)
        places = kernels.places(double, threshold.numel()) if kernels.fit(double, lsb, threshold) else None
        ctx.places = places if lsb.stride() == double.stride() else None
        if ctx.places is not None:
            soft = torch.empty_like(double)
            kernels.call("before_gate", double, threshold, soft, *ctx.places, dtype=soft.dtype)
            soft.sigmoid_()
            count = torch.tensor(kernels.call("merged", double, lsb, soft, soft.numel(), dtype=soft.dtype))
        else:
            soft = gate(double / 3, threshold)
            mask = _above(soft)
            double.addcmul_(mask, lsb).div_(3)
            count = mask.sum((2, 3)).long().sum()
        ctx.save_for_backward(high, low, weight, threshold, lsb, soft)
        ctx.window, ctx.sparse = window, sparse
        ctx.mark_non_differentiable(count)
        return double, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """3/2 d(2M / 3) = dy + G and 3 d(L / 3) = dy where open; the factors 2/3 and 1/3 are put on the small tensors."""
        high, low, weight, threshold, lsb, soft = ctx.saved_tensors
        if ctx.places is not None:
            to_high, to_low, both = (torch.empty_like(soft) for _ in range(3))
            total, grad = torch.empty_like(threshold), kernels.alike(grad, soft)
            kernels.call("gated_back", grad, lsb, soft, to_high, to_low, both, total, *ctx.places, int(ctx.sparse), dtype=soft.dtype)
        else:
            slope = torch.ops.aten.sigmoid_backward(grad * lsb, soft)
            if ctx.sparse:
                slope.mul_(_above(soft, inclusive=True))
            to_high, to_low = torch.add(grad, slope, alpha=STEEPNESS / 3), grad * _above(soft)
            both, total = torch.add(to_high, to_low, alpha=0.5), slope.sum_to_size(threshold.shape)
        grad_q = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_q = _grad_input(both, high, weight * (2 / 3), ctx.window)
        if ctx.needs_input_grad[1]:
            grad_w = _grad_weight(to_high, high, weight, ctx.window).mul_(2 / 3)
            grad_w.add_(_grad_weight(to_low, low, weight, ctx.window), alpha=1 / 3)
        return grad_q, grad_w, total.mul_(-STEEPNESS / 3), None, None, None, None, None


class _GatedReal(Function):
    """The published formula, operation by operation, for any real q; up to six convolutions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, weight: Tensor, threshold: Tensor, window: Window, clip: float, sparse: bool) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            high = sign(q)
            msb = nn.functional.conv2d(high, weight, None, *window).mul_(2).div_(3)
            full = nn.functional.conv2d(q, weight, None, *window)
        soft = gate(msb, threshold)
        mask = _above(soft)
        ctx.save_for_backward(q, high, weight, threshold, full - msb, soft, mask)
        ctx.window, ctx.clip, ctx.sparse = window, clip, sparse
        count = mask.sum((2, 3)).long().sum()
        ctx.mark_non_differentiable(count)
        return ((1 - mask) * msb).add_(mask * full), count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, high, weight, threshold, rest, soft, mask = ctx.saved_tensors
        slope = torch.ops.aten.sigmoid_backward(grad * rest, soft).mul_(STEEPNESS)
        if ctx.sparse:
            slope.mul_(_above(soft, inclusive=True))
        to_full = grad * mask
        to_high = (grad - to_full).add_(slope).mul_(2 / 3)
        grad_q = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_q = pass_inside(_grad_input(to_high, q, weight, ctx.window), q, -ctx.clip, ctx.clip)
            grad_q = grad_q + _grad_input(to_full, q, weight, ctx.window)
        if ctx.needs_input_grad[1]:
            grad_w = _grad_weight(to_high, high, weight, ctx.window) + _grad_weight(to_full, q, weight, ctx.window)
        return grad_q, grad_w, -slope.sum_to_size(threshold.shape), None, None, None


class FractionalConv2d(Layer, nn.Module):
    """Precision-gated binary convolution: the second bit of an activation is used only where the first one promises a large sum.

    Forward:   W = sgn(weight); msb = conv(sgn(q), W) * 2 / 3; full = conv(q, W); open = sigmoid(5 (msb - threshold)) > 1/2;
               y = full where open, else msb. Zero padding adds 0 to both.
               Where every q lies on thirds, q = (2m + l) / 3 with m = sgn(q), this is y = (2M + L where open) / 3 with the exact integers
               M = conv(m), L = conv(l), and is computed so: faster, and free of the order in which a library adds. Other real q take the
               published formula as it stands.
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
    def weight_bits(self) -> int | None:
        return None if self.real_weights else 1

    @property
    def density(self) -> float:
        """Share of open gates in the last batch."""
        return float(self.num_high) / max(self.num_out, 1)

    def forward(self, q: Tensor | QuantTensor) -> Tensor:
        q = in_float32(q.value if isinstance(q, QuantTensor) else q)
        window = (self.stride, self.padding, self.dilation, self.groups)
        planes = third_planes(q.detach())
        if planes is None or self.clip < 1:
            y, count = _GatedReal.apply(q, self.quant_weight(), self.threshold, window, self.clip, self.sparse)
        else:
            y, count = _Gated.apply(q, self.quant_weight(), self.threshold, *planes, window, self.sparse, not self.real_weights)
        self.num_out, self.num_high = y.numel(), count
        return y

    def lower(self, g: Any, x: Any) -> Any:
        edge = g.integer(x)
        t = edge.type
        if (t.lo, t.hi, t.step) != (-3, 3, 2) or not np.allclose(t.scale, 1 / 3, rtol=1e-12, atol=0):
            raise ConversionError(
                f"{g.path}: a FractionalConv2d reads the levels -1, -1/3, 1/3, 1 of a QuantSign(2), not {t} of scale {t.scale}"
            )
        if self.real_weights:
            raise ConversionError(f"{g.path}: it has real weights (first training step); set real_weights = False before converting")
        weight = self.quant_weight().detach()
        if not bool((weight.abs() == 1).all()):
            raise ConversionError(
                f"{g.path}: a weight is 0 or NaN and has no sign; build the layer with sign_of_zero=1, or load a sound checkpoint"
            )
        if self.dilation != (1, 1):
            raise ConversionError(f"{g.path}: a FractionalConv2d of dilation {self.dilation} has no integer op; dilation 1 has")
        (rows, columns), threshold = self.padding, self.threshold.detach()
        if not bool(threshold.isfinite().all()):
            raise ConversionError(f"{g.path}: a threshold is NaN or infinite; load a sound checkpoint")
        op = FractionalConv2dOp(weight.numpy(), self.integer_gate(), self.stride, (rows, rows, columns, columns), self.groups)
        return g.add(op, edge, scale=1 / 3)

    def integer_gate(self) -> np.ndarray:
        """(Cout,) smallest integer M = conv(sgn(q)) whose gate is open, one above the largest where it never opens.

        Measured by running the gate in float64 on every M the sum can take.
        """
        bound = self.weight[0].numel()
        sums = torch.arange(-bound, bound + 1, dtype=torch.float64)
        is_open = gate(sums.reshape(-1, 1, 1, 1).mul(2).div_(3), self.threshold.detach().double().cpu()).reshape(len(sums), -1) > 0.5
        first = len(sums) - is_open.sum(0)
        assert torch.equal(is_open, torch.arange(len(sums))[:, None] >= first), "a gate that opens stays open for every larger sum"
        return (first - bound).numpy()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"groups={self.groups}, sparse={self.sparse}, real_weights={self.real_weights}"
        )

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(5)
        x = torch.randn(3, 4, 7, 5)
        modules = [
            FractionalConv2d(4, 6, 3, padding=1),
            FractionalConv2d(4, 5, 1),
            FractionalConv2d(4, 4, 3, stride=2, padding=1, groups=2),
        ]
        for module in modules:
            nn.init.uniform_(module.threshold, -3, 3)
        return [(nn.Sequential(QuantSign(2), m), x) for m in modules]
