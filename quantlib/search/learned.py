"""Weighted sum of learned-scale quantizers at several widths, one fused function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.quantizers.functions import Gradient, _dot, _inside, in_float32


class _MixedLearnedScale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, ranges: Sequence[tuple[int, int]], gradient: Gradient, *scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, shares, *scales)
        ctx.ranges, ctx.gradient = ranges, gradient
        total = torch.zeros_like(x)
        for share, scale, (lo, hi) in zip(shares, scales, ranges, strict=True):
            total.addcmul_((x / scale).round_().clamp_(lo, hi), share * scale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares, *scales = ctx.saved_tensors
        through = torch.zeros_like(x)
        to_shares, to_scales = [], []
        for share, scale, (lo, hi) in zip(shares, scales, ctx.ranges, strict=True):
            u = x / scale
            inside = torch.ops.aten.hardtanh_backward(grad, u, *_inside(lo, hi, ctx.gradient, u))
            through.addcmul_(inside, share)
            if scale.numel() == 1:
                slope = _dot(inside, u)
                level = _dot(grad, u.round_().clamp_(lo, hi))
                to_shares.append(level * scale.reshape(()))
                to_scales.append(((level - slope) * share).reshape(scale.shape))
            else:
                slope = inside.mul_(u).sum_to_size(scale.shape)
                level = u.round_().clamp_(lo, hi).mul_(grad).sum_to_size(scale.shape)
                to_shares.append((level * scale).sum())
                to_scales.append((level - slope) * share)
        return through, torch.stack(to_shares).to(shares.dtype), None, None, *to_scales


def mixed_learned_scale(
    x: Tensor, shares: Tensor, scales: Sequence[Tensor], ranges: Sequence[tuple[int, int]], gradient: Gradient = "2019"
) -> Tensor:
    """Sum of `quantlib.quantizers.learned_scale` at several widths, which keeps nothing but its input for the backward pass.

    Forward:   y = sum_i shares[i] * learned_scale(x, scales[i], *ranges[i])
    Gradient:  that of each quantizer times its share; dshares[i] = <dy, learned_scale(x, scales[i], *ranges[i])>
    Shapes:    x any; shares (n,); each scale () or broadcastable to x

    >>> half = torch.tensor(0.5)
    >>> mixed_learned_scale(torch.tensor([0.3, 9.0]), torch.tensor([0.5, 0.5]), [half, half / 2], [(0, 3), (0, 7)]).tolist()
    [0.375, 1.625]
    """
    return _MixedLearnedScale.apply(in_float32(x), shares, tuple(ranges), gradient, *scales)
