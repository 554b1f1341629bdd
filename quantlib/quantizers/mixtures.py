"""Weighted sums of one quantizer at several bit widths: what a mixed-precision supernet computes, one fused function each.

Each runs all candidate widths over one buffer and keeps only its input for the backward pass, where the codes are made again. On the CPU
activations go through piece by piece, so that all widths of a piece are made while it lies in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.quantizers.constant_steps import HALF_WAVE_STEPS, half_wave_codes, image_floor, step_codes, weight_step
from quantlib.quantizers.functions import flat, in_float32

CANDIDATES = (2, 3, 4, 5, 6, 7, 8)
PIECE = 1 << 17  # activations worked on at a time on the CPU: 512 KiB of float32


def _checked(shares: Tensor, bits: Sequence[int]) -> tuple[int, ...]:
    if shares.shape != (len(bits),) or not set(bits) <= set(HALF_WAVE_STEPS):
        raise ValueError(f"one share for each of the bit widths {tuple(bits)} (from 1 to 8), got shares of shape {tuple(shares.shape)}")
    return tuple(int(b) for b in bits)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1)) if a.is_contiguous() and b.is_contiguous() else (a * b).sum()


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps in memory, in the layout (contiguous or channels last) of `like`."""
    like = x if like is None else like
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of dense tensors of one layout, piece by piece on the CPU."""
    size = PIECE if tensors[0].device.type == "cpu" else max(tensors[0].numel(), 1)
    return zip(*(flat(t).split(size) for t in tensors), strict=True)


class _MixedHalfWave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, bits: tuple[int, ...]) -> Tensor:
        x = _dense(x)
        ctx.save_for_backward(x, shares)
        ctx.bits = bits
        total = torch.zeros_like(x)
        for part, out in _pieces(x, total):
            for share, b in zip(shares, bits, strict=True):
                out.addcmul_(half_wave_codes(part, b), share, value=HALF_WAVE_STEPS[b])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, shares = ctx.saved_tensors
        grad = _dense(grad, x)
        through = torch.zeros_like(x)
        sums = [torch.zeros((), dtype=x.dtype, device=x.device) for _ in ctx.bits]
        for part, g, out in _pieces(x, grad, through):
            for i, b in enumerate(ctx.bits):
                sums[i] += torch.dot(g, half_wave_codes(part, b))
                if ctx.needs_input_grad[0]:
                    out.addcmul_(torch.ops.aten.hardtanh_backward(g, part, 0.0, HALF_WAVE_STEPS[b] * (2**b - 1)), shares[i])
        dshares = torch.stack([total * HALF_WAVE_STEPS[b] for total, b in zip(sums, ctx.bits, strict=True)])
        return through, dshares.to(shares.dtype), None


def mixed_half_wave(x: Tensor, shares: Tensor, bits: Sequence[int] = CANDIDATES) -> Tensor:
    """Sum of half-wave activations at several widths.

    Forward:   y = sum_i shares[i] * half_wave(x, bits[i])
    Gradient:  dx = dy * sum_i shares[i] * [0 < x < t_i]; dshares[i] = <dy, half_wave(x, bits[i])>
    Shapes:    x any; shares (len(bits),), for example a softmax
    Errors:    ValueError where shares and bits do not match
    Source:    DeepBurning-MixQ (arXiv 2308.11334), section on the supernet

    >>> mixed_half_wave(torch.tensor([0.5, 99.0]), torch.tensor([0.5, 0.5]), bits=(2, 3)).tolist()
    [0.5907..., 1.9329...]
    """
    return _MixedHalfWave.apply(in_float32(x), shares, _checked(shares, bits))


class _MixedImageFloor(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, bits: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bits = bits
        total = torch.zeros_like(x)
        for share, b in zip(shares, bits, strict=True):
            total.addcmul_(image_floor(x, b), share)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.zeros_like(x), torch.stack([_inner(grad, image_floor(x, b)) for b in ctx.bits]), None


def mixed_image_floor(x: Tensor, shares: Tensor, bits: Sequence[int] = CANDIDATES) -> Tensor:
    """Sum of image quantizers at several widths: y = sum_i shares[i] * image_floor(x, bits[i]).

    Gradient:  dx = 0; dshares[i] = <dy, image_floor(x, bits[i])>
    Shapes:    x any; shares (len(bits),)
    Errors:    ValueError where shares and bits do not match
    Source:    as mixed_half_wave

    >>> mixed_image_floor(torch.tensor([0.8]), torch.tensor([1.0, 1.0]), bits=(1, 2)).tolist()
    [1.25]
    """
    return _MixedImageFloor.apply(in_float32(x), shares, _checked(shares, bits))


class _MixedConstantStep(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, shares: Tensor, bits: tuple[int, ...], separate: bool) -> Tensor:
        ctx.save_for_backward(w, shares)
        ctx.bits, ctx.separate = bits, separate
        total = torch.zeros_like(w[0] if separate else w)
        for i, value in enumerate(_step_values(w, bits, separate)):
            total.addcmul_(value, shares[i])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w, shares = ctx.saved_tensors
        parts = [_inner(grad, value) for value in _step_values(w, ctx.bits, ctx.separate)]
        through = shares.reshape(-1, *[1] * grad.dim()) * grad if ctx.separate else grad * shares.sum()
        return through, torch.stack(parts), None, None


def _step_values(w: Tensor, bits: tuple[int, ...], separate: bool) -> list[Tensor]:
    values = []
    for i, b in enumerate(bits):
        one = w[i] if separate else w
        step = weight_step(one, b).to(w.dtype)
        values.append(step_codes(one, step, b).mul_(step))
    return values


def mixed_constant_step(w: Tensor, shares: Tensor, bits: Sequence[int] = CANDIDATES, separate: bool = False) -> Tensor:
    """Sum of constant-step weights at several widths: the weights of the composite convolution.

    Forward:   W = sum_i shares[i] * constant_step(w, bits[i]); separate: w[i] in the place of w, one tensor for each width
    Gradient:  dw = dW * sum_i shares[i] (separate: dw[i] = dW * shares[i]); dshares[i] = <dW, constant_step(w, bits[i])>
    Shapes:    w any, separate: (len(bits), ...); shares (len(bits),); W as w, separate without its first axis
    Errors:    ValueError where shares, bits and w do not match
    Source:    as mixed_half_wave

    >>> w = torch.tensor([-1.0, 1.0, 0.25])
    >>> torch.equal(mixed_constant_step(w, torch.tensor([1.0, 0.0]), bits=(3, 8)), constant_step(w, 3)[0])
    True
    """
    wanted = _checked(shares, bits)
    if separate and (w.dim() < 2 or w.shape[0] != len(wanted)):
        raise ValueError(f"separate weights need one tensor for each of {len(wanted)} bit widths, got shape {tuple(w.shape)}")
    return _MixedConstantStep.apply(in_float32(w), shares, wanted, bool(separate))
