"""DoReFa quantizers as the older detection networks of DeepBurning-MixQ use them: power-of-two scales, tanh-normalised weights.

Source: classes UltraNet and UltraNet_ismart of DeepBurning-MixQ (arXiv 2308.11334), after DoReFa-Net (arXiv 1606.06160).
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.quantizers.constant_steps import REAL, constant
from quantlib.quantizers.functions import in_float32
from quantlib.quantizers.injectors import Quantized, RoundsToNearest, _TensorQuant


def _width(bits: int, lowest: int, what: str) -> int:
    if not lowest <= bits <= 8 and bits != REAL:
        raise ValueError(f"{what}: {lowest} to 8 bits, or 32 for none, got {bits}")
    return int(bits)


class _DorefaWeight(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:
        t = w.tanh()
        size = t.abs()
        largest = size.max()
        u = t / largest
        ctx.save_for_backward(t, u, largest, size == largest)
        if bits == REAL:
            return u.clone()
        half = 2 ** (bits - 1)
        return (u * half).round_().clamp_(-half, half - 1).div_(half)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        t, u, largest, at = ctx.saved_tensors
        dt = grad / largest
        share = (dt * u).sum() / at.sum()
        return (dt - at * t.sign() * share) * (1 - t * t), None


class _DorefaBinary(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        mean = w.abs().mean()
        return (w / mean).round_().clamp_(-1, 0).add_(1).div_(2).mul_(mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """Signed weights after tanh, on multiples of a power of two.

    Forward:   u = tanh(w) / max |tanh(w)|; y = clip(rne(u * 2^(bits-1)), -2^(bits-1), 2^(bits-1) - 1) / 2^(bits-1); 32 bits: y = u;
               1 bit: E = mean |w|, y = (clip(rne(w / E), -1, 0) + 1) / 2 * E
    Gradient:  straight through rounding and clip, then the true one of tanh and of the maximum (shared by ties); 1 bit: dw = dy / 2
    Shapes:    any, not all zero
    Ranges:    codes -2^(bits-1)..2^(bits-1) - 1; 1 bit: 0 and 1 times E / 2
    Errors:    ValueError for another bit width than 1..8 or 32
    Source:    classes UltraNet and UltraNet_ismart of DeepBurning-MixQ; DoReFa-Net (arXiv 1606.06160), equation 9

    >>> dorefa_weight(torch.tensor([-3.0, 0.1, 3.0]), bits=3).tolist()
    [-1.0, 0.0, 0.75]
    """
    if _width(bits, 1, "dorefa_weight") == 1:
        return _DorefaBinary.apply(in_float32(w))
    return _DorefaWeight.apply(in_float32(w), int(bits))


class _DorefaActivation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        levels = 2**bits
        return x.clamp(0, 1).mul_(levels).round_().clamp_(0, levels - 1).div_(levels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, 0.0, 1.0), None


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """Unsigned activation on multiples of 2^-bits, the ReLU included.

    Forward:   y = min(rne(clip(x, 0, 1) * 2^bits), 2^bits - 1) / 2^bits; 32 bits: clip(x, 0, 6)
    Gradient:  dx = dy where 0 < x < 1 (32 bits: 0 < x < 6), else 0
    Shapes:    any
    Ranges:    codes 0..2^bits - 1
    Errors:    ValueError for another bit width than 1..8 or 32
    Source:    classes UltraNet and UltraNet_ismart of DeepBurning-MixQ

    >>> dorefa_activation(torch.tensor([-1.0, 0.3, 2.0]), bits=2).tolist()
    [0.0, 0.25, 0.75]
    """
    if _width(bits, 1, "dorefa_activation") == REAL:
        return torch.nn.functional.hardtanh(x, 0.0, 6.0)
    return _DorefaActivation.apply(in_float32(x), int(bits))


class DorefaWeightQuant(_TensorQuant):
    def __init__(self, bit_width: int) -> None:
        if not 2 <= bit_width <= 8:
            raise ValueError(f"DoReFa weights have 2 to 8 bits, got {bit_width}")
        super().__init__(bit_width)

    def forward(self, w: Tensor) -> Quantized:
        value = dorefa_weight(w, self.bits)
        return value, constant(2.0 ** (1 - self.bits), value), self.zero_point, self.bit_width


class DorefaActQuant(_TensorQuant):
    def __init__(self, bit_width: int) -> None:
        if not 1 <= bit_width <= 8:
            raise ValueError(f"DoReFa activations have 1 to 8 bits, got {bit_width}")
        super().__init__(bit_width)

    def forward(self, x: Tensor) -> Quantized:
        value = dorefa_activation(x, self.bits)
        return value, constant(2.0**-self.bits, value), self.zero_point, self.bit_width


class DorefaWeight(RoundsToNearest):
    """Signed weights per tensor with scale 2^(1-b): `dorefa_weight`, `bit_width` 4 unless given."""

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = DorefaWeightQuant
    bit_width = 4
    signed = True
    narrow_range = False


class DorefaAct(RoundsToNearest):
    """Unsigned activation with scale 2^-b: `dorefa_activation`, `bit_width` 4 unless given."""

    proxy_class = ActQuantProxyFromInjector
    tensor_quant = DorefaActQuant
    bit_width = 4
    signed = False
    narrow_range = False
