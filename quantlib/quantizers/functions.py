"""Quantizers as pure functions that own their gradients: one fused autograd function each.

Conventions decided here once:
- rounding is half to even unless a function says otherwise; integers come from dividing by the scale, not from multiplying by its inverse;
- the sign of 0 is 0, as published, unless `zero` says otherwise; NaN stays NaN;
- under autocast 16-bit inputs are taken to float32 first (`in_float32`), so that values lie on the grid; else dtypes are kept;
- memory layout (channels last or first) of the input is kept; gradients are first-order only;
- where a function has a compiled kernel (`kernels`), that and the tensor operations beside it give the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.quantizers import kernels

Gradient = Literal["2019", "brevitas"]


def in_float32(x: Tensor) -> Tensor:
    """x itself, or x as float32 where autocast is on and x has 16 bits. Differentiable; works for every device type."""
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        return x.float()
    return x


@cache
def _beside(value: float, towards: float, wide: bool) -> float:
    """The neighbour of `value` in float64 (wide) or float32."""
    dtype = np.float64 if wide else np.float32
    return float(np.nextafter(dtype(value), dtype(towards)))


def pass_inside(grad: Tensor, x: Tensor, lo: float, hi: float) -> Tensor:
    """grad where lo <= x <= hi, else 0, in one pass; lo and hi count as inside although they may be rounded to the dtype of x."""
    wide = x.dtype is torch.float64
    return torch.ops.aten.hardtanh_backward(grad, x, _beside(lo, -math.inf, wide), _beside(hi, math.inf, wide))


# --- binary sign ---------------------------------------------------------------------------------------------------------------------


def sign(x: Tensor, zero: float = 0.0) -> Tensor:
    """-1 where x < 0, +1 where x > 0, `zero` where x = 0, NaN where x is NaN. No gradient."""
    y = torch.sign(x)
    if zero:
        y = torch.where(x == 0, torch.full((), zero, dtype=x.dtype, device=x.device), y)
    return torch.where(x.isnan(), x, y)


class _BinarySign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: float, zero: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clip = clip
        return sign(x, zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return pass_inside(grad, x, -ctx.clip, ctx.clip), None, None


def binary_sign(x: Tensor, clip: float = 1.3, zero: float = 0.0) -> Tensor:
    """Binary sign with a clipped straight-through gradient.

    Forward:   y = sgn(x), with y = zero at x = 0 (published: 0); NaN stays NaN
    Gradient:  dx = dy where |x| <= clip, else 0 (clip itself, rounded to the dtype of x, counts as inside)
    Shapes:    any; y in {-1, zero, +1}
    Source:    FracBNN (arXiv 2012.12206), `FastSign`, t_clip = 1.3

    >>> w = torch.tensor([-2.0, -0.5, 0.0, 1.2], requires_grad=True)
    >>> binary_sign(w).tolist()
    [-1.0, -1.0, 0.0, 1.0]
    >>> binary_sign(w).sum().backward(); w.grad.tolist()
    [0.0, 1.0, 1.0, 1.0]
    """
    return _BinarySign.apply(in_float32(x), float(clip), float(zero))


# --- symmetric levels without zero ---------------------------------------------------------------------------------------------------


class _QuantSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        d = 2.0 / (2**bits - 1)
        return x.clamp(-1, 1).add_(1).div_(d).round_().mul_(d).sub_(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, -1.0, 1.0), None


def quant_sign(x: Tensor, bits: int = 2) -> Tensor:
    """k-bit symmetric quantizer whose levels exclude zero.

    Forward:   y = rne((clamp(x, -1, 1) + 1) / d) * d - 1, d = 2 / (2^bits - 1): levels -1, -1 + d, ..., 1
    Gradient:  dx = dy where -1 < x < 1, else 0
    Ranges:    2 bits: -1, -1/3, 1/3, 1 with decision points -2/3, 0, 2/3. x = 0 gives +1/3. The points -2/3 and 2/3 are no floating-point
               numbers: float32 rounds them outwards and gives -1 and 1/3, float64 rounds them inwards and gives -1/3 and 1/3.
    Shapes:    any
    Source:    FracBNN (arXiv 2012.12206), `QuantSign`

    >>> [round(v, 4) for v in quant_sign(torch.tensor([-3.0, -0.5, 0.0, 0.7])).tolist()]
    [-1.0, -0.3333, 0.3333, 1.0]
    """
    if bits < 1:
        raise ValueError(f"quant_sign needs at least one bit, got {bits}")
    return _QuantSign.apply(in_float32(x), int(bits))


# --- max-abs weights -----------------------------------------------------------------------------------------------------------------


def _kernel_group(w: Tensor, channel: int | None) -> int | None:
    """How a kernel finds the logical order within a row of w: 1, or the places of a kernel window where channels come last; None: not."""
    if channel not in (None, 0) or not kernels.fit(w):
        return None
    if w.is_contiguous():
        return 1
    if channel == 0 and w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last):
        return w.shape[2] * w.shape[3]
    return None


class _MaxAbs(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, top: float, min_scale: float, channel: int | None) -> tuple[Tensor, Tensor]:
        ctx.top, ctx.channel = top, channel
        ctx.set_materialize_grads(False)
        group = _kernel_group(w, channel)
        ctx.kernel = group is not None
        if group is not None:
            rows = 1 if channel is None else w.shape[0]
            value = torch.empty_like(w)
            scale = w.new_empty([] if channel is None else [rows, *[1] * (w.dim() - 1)])
            where = torch.empty(rows, dtype=torch.int64)
            kernels.call("max_abs", w, value, scale, where, rows, w.numel() // rows, group, top, min_scale, dtype=w.dtype)
            ctx.save_for_backward(w, value, scale, where)
            return value, scale
        flat_rows = w.reshape(1, -1) if channel is None else w.movedim(channel, 0).reshape(w.shape[channel], -1)
        largest, where = flat_rows.abs().max(1)
        scale = largest.clamp_min(min_scale) / top
        shape = [1] * w.dim()
        if channel is not None:
            shape[channel] = w.shape[channel]
        scale = scale.reshape(shape)
        value = (w / scale).round_().clamp_(-top, top).mul_(scale)
        ctx.save_for_backward(w, value, scale, where)
        return value, scale if channel is not None else scale.reshape(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> tuple[Tensor, None, None, None]:
        w, value, scale, where = ctx.saved_tensors
        grad = torch.zeros_like(w) if grad is None else grad
        if ctx.kernel:
            dw, rows, grad = torch.empty_like(w), len(where), kernels.alike(grad, w)
            of_scale = None if grad_scale is None else grad_scale.contiguous()
            kernels.call("max_abs_back", w, value, scale, where, grad, of_scale, dw, rows, w.numel() // rows, ctx.top, dtype=w.dtype)
            return dw, None, None, None
        share = (grad * (value - w)).sum_to_size(scale.shape) / scale
        if grad_scale is not None:
            share = share + grad_scale.reshape(scale.shape)
        share = share / ctx.top
        channel = ctx.channel
        rows = w.reshape(1, -1) if channel is None else w.movedim(channel, 0).reshape(w.shape[channel], -1)
        where = where[:, None]
        through = torch.zeros_like(rows).scatter_(1, where, rows.gather(1, where).sign() * share.reshape(-1, 1))
        if channel is None:
            through = through.reshape(w.shape)
        else:
            through = through.reshape(w.movedim(channel, 0).shape).movedim(0, channel)
        return grad + through, None, None, None


def max_abs(w: Tensor, bits: int, channel: int | None = 0, min_scale: float = 2e-16) -> tuple[Tensor, Tensor]:
    """Signed narrow-range integers whose scale is the largest magnitude, per output channel or per tensor.

    Forward:   q = 2^(bits-1) - 1; s_c = max(max |w_c|, min_scale) / q; m = rne(w / s) clipped to [-q, q]; returns (m * s, s)
    Gradient:  straight through rounding and clip, dw = g; and through the scale: with ds_c = sum_i g_i (m_i - w_i / s_c) + (gradient of the
               returned scale), the first element k of channel c that attains the maximum gets sign(w_k) * ds_c / q besides.
               An all-zero channel has codes 0, scale min_scale / q and no second term.
    Shapes:    w any with its channels on axis `channel` (None: one scale for the tensor); s broadcasts against w, () per tensor
    Ranges:    m in -q..q
    Source:    MicroNet 2019 submission of quantised ProxylessNAS, weight quantizer STATS / MAX / narrow range, equal in value to
               Brevitas' Int8WeightPerChannelFloat with the same bits and minimum

    >>> value, scale = max_abs(torch.tensor([[0.5, -7.0], [0.0, 0.0]]), bits=4)
    >>> (value / scale).tolist()
    [[0.0, -7.0], [0.0, 0.0]]
    """
    if bits < 2:
        raise ValueError(f"max_abs needs at least two bits (narrow range), got {bits}; for one bit use binary_sign")
    return _MaxAbs.apply(in_float32(w), float(2 ** (bits - 1) - 1), float(min_scale), channel)


# --- activations with a given scale --------------------------------------------------------------------------------------------------


def flat(x: Tensor) -> Tensor:
    """x as a vector without a copy where its layout is channels last; always the same order for the same shape and layout."""
    return x.permute(0, 2, 3, 1).reshape(-1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.stride() == b.stride():
        return torch.dot(flat(a), flat(b))
    return (a * b).sum()


def _inside(lo: int, hi: int, gradient: Gradient, like: Tensor) -> tuple[float, float]:
    """Open interval of u = x / s in which dx = g. "brevitas" rounds first: half a step more on each side, half to even decides the ends."""
    wide = like.dtype is torch.float64
    if gradient == "2019":
        return _beside(lo, -math.inf, wide), _beside(hi, math.inf, wide)
    below, above = lo - 0.5, hi + 0.5
    return below if lo % 2 else _beside(below, -math.inf, wide), above if hi % 2 else _beside(above, math.inf, wide)


def _scale_places(x: Tensor, scale: Tensor) -> kernels.Places | None:
    """How the kernels see x beside one scale, or one per channel (1, C, 1, ...); None where they do not."""
    count = scale.numel()
    if not (count == 1 or scale.shape == (1, count, *[1] * (x.dim() - 2))) or not kernels.fit(x, scale):
        return None
    return kernels.places(x, count)


@dataclass(frozen=True)
class _Levels:
    """What a scaled quantizer knows besides its tensors."""

    lo: int
    hi: int
    gradient: Gradient
    relu: bool

    def value(self, x: Tensor, scale: Tensor, places: kernels.Places | None) -> tuple[Tensor, Tensor]:
        """The value, and what `gradients` reads: x itself with a kernel, else u = x / scale."""
        if places is None:
            u = (x.clamp_min(0) if self.relu else x) / scale
            return u.round().clamp_(self.lo, self.hi).mul_(scale), u
        value = torch.empty_like(x)
        kernels.call("learned_scale", x, scale, value, *places, self.lo, self.hi, dtype=x.dtype)
        return value, x

    def gradients(
        self, grad: Tensor, kept: Tensor, scale: Tensor, places: kernels.Places | None, weight: Tensor | None = None, factor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """dx, and ds * weight * factor."""
        inside = _inside(self.lo, self.hi, self.gradient, kept)
        if places is not None:
            dx, ds = torch.empty_like(kept), torch.empty_like(scale)
            floor, grad = 0.0 if self.relu else -math.inf, kernels.alike(grad, kept)
            numbers = (*places, factor, self.lo, self.hi, *inside, floor)
            kernels.call("learned_scale_back", kept, scale, grad, weight, dx, ds, *numbers, dtype=kept.dtype)
            return dx, ds
        u, (below, above) = kept, inside
        dx = torch.ops.aten.hardtanh_backward(grad, u, max(below, 0.0) if self.relu else below, above)
        code = u.round().clamp_(self.lo, self.hi)
        if scale.numel() == 1:
            ds = (_dot(grad, code) - _dot(dx, u)).reshape(scale.shape)
        else:
            ds = (grad * code).sum_to_size(scale.shape) - (dx * u).sum_to_size(scale.shape)
        return dx, ds if weight is None else ds * weight * factor


class _LearnedScale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: _Levels) -> Tensor:
        ctx.levels, ctx.places = levels, _scale_places(x, scale)
        value, kept = levels.value(x, scale, ctx.places)
        ctx.save_for_backward(kept, scale)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.levels.gradients(grad, *ctx.saved_tensors, ctx.places), None


class _LearnedLog2Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log2: Tensor, top: Tensor, slope: float, smallest: float, levels: _Levels) -> tuple[Tensor, Tensor]:
        reach = torch.pow(2.0, log2)
        scale = reach.clamp_min(smallest).div_(top)
        ctx.levels, ctx.slope, ctx.places = levels, slope, _scale_places(x, scale)
        value, kept = levels.value(x, scale, ctx.places)
        ctx.save_for_backward(kept, scale, reach)
        ctx.set_materialize_grads(False)
        return value, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, scale, reach = ctx.saved_tensors
        dx = slope = None
        if grad is not None:
            dx, slope = ctx.levels.gradients(grad, kept, scale, ctx.places, reach, ctx.slope)
        if grad_scale is not None:
            more = grad_scale * reach * ctx.slope
            slope = more if slope is None else slope + more
        return dx, slope, None, None, None, None


def learned_scale(x: Tensor, scale: Tensor, lo: int, hi: int, gradient: Gradient = "2019", relu: bool = False) -> Tensor:
    """Uniform quantizer with a given, usually learned, scale.

    Forward:   u = x / s; code = rne(u) clipped to [lo, hi]; value = code * s. relu: max(x, 0) in the place of x
    Gradient:  inside: dx = g, ds = g * (code - u); outside: dx = 0, ds = g * lo or g * hi; ds is summed over what s does not span.
               gradient="2019" (clip, then round): inside is lo <= u <= hi.
               gradient="brevitas" (round, then clip, as Brevitas 0.13): inside is lo <= rne(u) <= hi.
               relu: dx = 0 besides where x <= 0. Without a kernel the two sums of ds cancel in float32: relative error up to 4e-5.
    Shapes:    x any; s () or broadcastable, e.g. (1, C, 1, 1) for x (N, C, H, W)
    Ranges:    unsigned b bits: 0..2^b - 1, signed: -2^(b-1)..2^(b-1) - 1
    Source:    MicroNet 2019 submission of quantised ProxylessNAS, QuantReLU / QuantHardTanh with a learned log2 scale:
               s = max(2^v, 2e-16) / L, L = 2^b - 1 (ReLU) or 2^(b-1) (hardtanh); dv = ds * s * ln 2 is left to autograd

    >>> learned_scale(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), 0, 15).tolist()
    [0.0, 0.5, 7.5]
    """
    return _LearnedScale.apply(in_float32(x), scale, _levels(int(lo), int(hi), gradient, bool(relu)))


@cache
def _levels(lo: int, hi: int, gradient: Gradient, relu: bool) -> _Levels:
    if gradient not in ("2019", "brevitas"):
        raise ValueError(f'gradient must be "2019" or "brevitas", got {gradient!r}')
    return _Levels(lo, hi, gradient, relu)


def learned_log2_scale(
    x: Tensor, log2: Tensor, top: Tensor, lo: int, hi: int, gradient: Gradient = "2019", relu: bool = False, smallest: float = 2e-16
) -> tuple[Tensor, Tensor]:
    """`learned_scale` and its scale as one function of the parameter v = log2.

    Forward:   s = max(2^v, smallest) / top; returns (learned_scale(x, s, ...), s)
    Gradient:  as learned_scale; dv = (ds + gradient of the returned s) * 2^v ln 2 / top, also where the minimum holds, as in Brevitas
    Shapes:    x any; v and s () or (1, C, 1, 1); top ()
    Ranges:    top is hi (unsigned) or -lo (signed), as a tensor: a division by a number is none on every device
    Source:    as learned_scale; Brevitas' ParameterScaling in the log2 domain

    >>> value, scale = learned_log2_scale(torch.tensor([-1.0, 1.4, 9.0]), torch.tensor(3.0), torch.tensor(15.0), 0, 15)
    >>> (value / scale).round().tolist()
    [0.0, 3.0, 15.0]
    """
    levels = _levels(int(lo), int(hi), gradient, bool(relu))
    value, scale = _LearnedLog2Scale.apply(in_float32(x), log2, top, math.log(2) / (-lo or hi), float(smallest), levels)
    return value, scale


# --- fixed point ---------------------------------------------------------------------------------------------------------------------

Rounding = Literal["half_up", "half_even", "floor", "to_zero"]
ROUNDINGS = ("half_up", "half_even", "floor", "to_zero")


def round_to_integer(u: Tensor, rounding: Rounding) -> Tensor:
    """Integers nearest to u; exact for every float (no `u + 0.5`, which itself rounds). No gradient."""
    if rounding == "half_even":
        return torch.round(u)
    if rounding == "floor":
        return torch.floor(u)
    if rounding == "to_zero":
        return torch.trunc(u)
    if rounding == "half_up":
        below = torch.floor(u)
        return below + (u - below >= 0.5).to(u.dtype)
    raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")


class _FixedPoint(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, fraction: int, rounding: Rounding, saturation: bool) -> Tensor:
        lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        u = x * 2.0**fraction
        ctx.saturation, ctx.limits = saturation, (lo * 2.0**-fraction, hi * 2.0**-fraction)
        if saturation:
            ctx.save_for_backward(x)
            n = round_to_integer(u, rounding).clamp_(lo, hi)
        else:
            n = torch.remainder(round_to_integer(u, rounding) - lo, 2.0**bits) + lo
        return n * 2.0**-fraction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.saturation:
            (x,) = ctx.saved_tensors
            grad = pass_inside(grad, x, *ctx.limits)
        return grad, None, None, None, None


def fixed_point(x: Tensor, bits: int, fraction: int, rounding: Rounding = "half_up", saturation: bool = True) -> Tensor:
    """Real numbers on the grid of a signed fixed-point word.

    Forward:   n = R(x * 2^fraction) in -2^(bits-1)..2^(bits-1) - 1; y = n * 2^-fraction. R: half_up (ties towards +infinity), half_even,
               floor, to_zero. Outside the word: the nearest end (saturation) or modulo 2^bits.
    Gradient:  saturation: dx = dy where -2^(bits-1) <= x * 2^fraction <= 2^(bits-1) - 1, else 0; without saturation dx = dy.
    Shapes:    any. float32 holds every word of up to 25 bits exactly; wider words need float64 inputs (ValueError).
    Source:    ap_fixed<bits, bits - fraction, RND | RND_CONV | TRN | TRN_ZERO, SAT | WRAP> of the HLS tools; FracBNN's accelerator uses
               16 bits, fraction 7, half_up, saturation

    >>> fixed_point(torch.tensor([0.25, -0.25, 100.0]), bits=4, fraction=1).tolist()
    [0.5, 0.0, 3.5]
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    x = in_float32(x)
    if bits > 25 and x.dtype != torch.float64:
        raise ValueError(f"a word of {bits} bits needs float64 inputs, got {x.dtype}; up to 25 bits fit float32")
    return _FixedPoint.apply(x, int(bits), int(fraction), rounding, bool(saturation))
