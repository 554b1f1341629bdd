"""Quantizers without a learned scale: constant steps, for weights times the tensor's standard deviation, and the image quantizer.

Source: DeepBurning-MixQ (ICCAD 2023, arXiv 2308.11334), after half-wave Gaussian quantization (HWGQ, arXiv 1702.00953). The steps are those
that suit a normal distribution best.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.quantizers.functions import in_float32
from quantlib.quantizers.injectors import Quantized, RoundsToNearest, _TensorQuant

WEIGHT_STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.336, 5: 0.190, 6: 0.106, 7: 0.059, 8: 0.032}  # bits -> step of a unit normal
HALF_WAVE_STEPS = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185, 5: 0.104, 6: 0.058, 7: 0.033, 8: 0.019}  # bits -> step of an activation
REAL = 32  # the bit width that stands for "not quantized"
MIN_STEP = 2e-16  # of weights that are all equal, whose standard deviation is 0


def _bits(bits: int, what: str) -> int:
    if bits not in WEIGHT_STEPS and bits != REAL:
        raise ValueError(f"{what}: 1 to 8 bits, or 32 for none, got {bits}")
    return int(bits)


def constant(value: float, like: Tensor) -> Tensor:
    """A number on the device and in the dtype of a tensor, so that a division by it is one on every device."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


# --- weights -------------------------------------------------------------------------------------------------------------------------


def weight_step(w: Tensor, bits: int) -> Tensor:
    """step[bits] * std(w): () float64, std being the unbiased one over all elements, in the dtype of w. No gradient.

    ValueError for a tensor of one element, which has no deviation.
    """
    if w.numel() < 2:
        raise ValueError("constant-step weights take their scale from the deviation of at least two weights, got one")
    return (w.detach().std().double() * WEIGHT_STEPS[bits]).clamp_min(MIN_STEP)


def step_codes(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """clip(rne(w / step), -2^(bits-1), 2^(bits-1) - 1) in the dtype of w."""
    half = 2 ** (bits - 1)
    return (w / step).round_().clamp_(-half, half - 1)


class _ConstantStep(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, mid_rise: bool) -> tuple[Tensor, Tensor]:
        step = weight_step(w, bits).to(w.dtype)
        if mid_rise:
            end = 2 ** (bits - 1) - 0.5
            value = (w / step).add_(0.5).round_().sub_(0.5).clamp_(-end, end).mul_(step)
        else:
            value = step_codes(w, step, bits).mul_(step)
        ctx.mark_non_differentiable(step)
        return value, step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_step: Tensor | None) -> tuple[Tensor, None, None]:
        return grad, None, None


def constant_step(w: Tensor, bits: int, mid_rise: bool = False) -> tuple[Tensor, Tensor]:
    """Signed weights on a grid whose step is a constant times the standard deviation of the tensor.

    Forward:   s = WEIGHT_STEPS[bits] * std(w), unbiased; q = clip(rne(w / s), -2^(bits-1), 2^(bits-1) - 1); returns (q * s, s).
               mid_rise: levels at odd half steps, clip(rne(w / s + 1/2) - 1/2, -(2^(bits-1) - 1/2), 2^(bits-1) - 1/2) * s
    Gradient:  dw = dy everywhere, also outside the clip; none through the deviation
    Shapes:    any, with at least two elements; s ()
    Ranges:    bits 1..8. An all-equal tensor has the step 2e-16
    Errors:    ValueError for another bit width or a single element
    Source:    DeepBurning-MixQ (arXiv 2308.11334), weights of the fixed-bit networks

    >>> value, step = constant_step(torch.tensor([-2.0, -0.5, 0.0, 2.5]), bits=2)
    >>> (value / step).int().tolist()
    [-1, 0, 0, 1]
    """
    if _bits(bits, "constant_step") == REAL:
        raise ValueError("constant_step: 32 bits are no quantization; use the weights themselves")
    value, step = _ConstantStep.apply(in_float32(w), int(bits), bool(mid_rise))
    return value, step


# --- activations ---------------------------------------------------------------------------------------------------------------------


def half_wave_codes(x: Tensor, bits: int) -> Tensor:
    """rne(clip(x, 0, t) / h), t = h * (2^bits - 1), as numbers of the dtype of x. No gradient."""
    h = HALF_WAVE_STEPS[bits]
    return x.clamp(0, h * (2**bits - 1)).div_(constant(h, x)).round_()


class _HalfWave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bits = bits
        return half_wave_codes(x, bits).mul_(HALF_WAVE_STEPS[bits])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, 0.0, HALF_WAVE_STEPS[ctx.bits] * (2**ctx.bits - 1)), None


def half_wave(x: Tensor, bits: int) -> Tensor:
    """Unsigned activation with a constant step, the ReLU included.

    Forward:   h = HALF_WAVE_STEPS[bits], t = h * (2^bits - 1); y = rne(clip(x, 0, t) / h) * h; 32 bits: max(x, 0)
    Gradient:  dx = dy where 0 < x < t, else 0
    Shapes:    any
    Ranges:    codes 0..2^bits - 1, bits 1..8
    Errors:    ValueError for another bit width
    Source:    DeepBurning-MixQ (arXiv 2308.11334); HWGQ (arXiv 1702.00953)

    >>> half_wave(torch.tensor([-1.0, 0.4, 1.0, 9.0]), bits=2).div(0.538).round().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if _bits(bits, "half_wave") == REAL:
        return torch.relu(x)
    return _HalfWave.apply(in_float32(x), int(bits))


def image_floor(x: Tensor, bits: int) -> Tensor:
    """Image quantizer: the leading bits of a pixel.

    Forward:   y = floor(x * 2^bits) / 2^bits, without a clip; 32 bits: x itself
    Gradient:  0 (32 bits: dx = dy)
    Shapes:    any
    Ranges:    x in [0, 1), pixel / 256, gives codes 0..2^bits - 1, the leading bits of the pixel
    Errors:    ValueError for another bit width than 1..8 or 32
    Source:    DeepBurning-MixQ (arXiv 2308.11334), quantizer in front of the first convolution

    >>> image_floor(torch.tensor([0.0, 100 / 256, 255 / 256]), bits=2).tolist()
    [0.0, 0.25, 0.75]
    """
    if _bits(bits, "image_floor") == REAL:
        return x
    return (in_float32(x.detach()) * 2.0**bits).floor_().mul_(2.0**-bits)


# --- named Brevitas quantizers -------------------------------------------------------------------------------------------------------


class ConstantStepQuant(_TensorQuant):
    def __init__(self, bit_width: int) -> None:
        if bit_width not in WEIGHT_STEPS:
            raise ValueError(f"constant-step weights have 1 to 8 bits, got {bit_width}")
        super().__init__(bit_width)

    def forward(self, w: Tensor) -> Quantized:
        value, step = constant_step(w, self.bits)
        return value, step, self.zero_point, self.bit_width


class HalfWaveQuant(_TensorQuant):
    def __init__(self, bit_width: int) -> None:
        if bit_width not in HALF_WAVE_STEPS:
            raise ValueError(f"half-wave activations have 1 to 8 bits, got {bit_width}")
        super().__init__(bit_width)

    def forward(self, x: Tensor) -> Quantized:
        value = half_wave(x, self.bits)
        return value, constant(HALF_WAVE_STEPS[self.bits], value), self.zero_point, self.bit_width


class ConstantStepWeight(RoundsToNearest):
    """Signed weights per tensor: `constant_step`, `bit_width` 4 unless given; codes -2^(b-1)..2^(b-1) - 1, zero point 0."""

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = ConstantStepQuant
    bit_width = 4
    signed = True
    narrow_range = False


class HalfWaveAct(RoundsToNearest):
    """Unsigned activation with a constant step: `half_wave`, `bit_width` 4 unless given; codes 0..2^b - 1, zero point 0."""

    proxy_class = ActQuantProxyFromInjector
    tensor_quant = HalfWaveQuant
    bit_width = 4
    signed = False
    narrow_range = False
