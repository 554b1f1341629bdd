"""DiracDeltaNet's quantizers: weights through tanh with one scale per tensor, activations whose learned clip is divided out.

Pure functions with their gradients first, then the injectors for brevitas.nn layers:

    QuantConv2d(8, 16, 1, weight_quant=TanhWeight, weight_bit_width=4)
    QuantLinear(8, 16, True, weight_quant=TanhClassifierWeight, weight_bit_width=8, bias_quant=TanhClassifierBias, bias_bit_width=8)
    QuantIdentity(act_quant=UintActDividedClip, bit_width=4, output_range=2.0, clip_init=2.0)
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.proxy import BiasQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from quantlib.quantizers import kernels
from quantlib.quantizers.functions import in_float32
from quantlib.quantizers.injectors import OwnScaleProxy, Quantized, RoundsToNearest, _TensorQuant

REAL = 32  # "32 bits" means: not rounded


# --- weights -------------------------------------------------------------------------------------------------------------------------


class _TanhCodes(Function):
    """(code - zero) / steps, code = rne((t / 2m + 1/2) * top)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, top: float, zero: float, steps: float) -> Tensor:
        t = torch.tanh(w)
        largest, where = t.abs().reshape(-1).max(0)
        ctx.save_for_backward(t, largest, where)
        ctx.slope = top / steps
        unit = t / (2 * largest.clamp_min(torch.finfo(t.dtype).tiny))
        return unit.add_(0.5).mul_(top).round_().sub_(zero).div_(steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        t, largest, where = ctx.saved_tensors
        inverse = torch.where(largest > 0, 1 / largest, 0.0)
        through = (grad * t).sum() * t.reshape(-1)[where].sign() * inverse
        dt = (grad.reshape(-1)).scatter_add(0, where.reshape(1), -through.reshape(1)).reshape(grad.shape)
        return dt.mul_(0.5 * ctx.slope * inverse).mul_(1 - t * t), None, None, None


def _at_least_one_bit(bits: int) -> int:
    if bits < 1 or bits > 24:
        raise ValueError(f"weights through tanh have 1 to 24 bits (32 bits, unrounded, need no quantizer), got {bits}")
    return 2**bits - 1


def tanh_weight(w: Tensor, bits: int, signs: bool = False) -> Tensor:
    """Weights through tanh, rounded to two's-complement fractions; the scale is the largest magnitude of the tensor.

    Forward:   t = tanh(w), m = max |t|, n = 2^bits - 1; code = rne((t / 2m + 1/2) n); y = (code - 2^(bits-1)) / 2^(bits-1).
               signs (1 bit only): y = 2 code - 1
    Gradient:  straight through the rounding, exact elsewhere: with s = n / 2^(bits-1) (signs: 2), dt_i = s g_i / (2m); the first element k
               that attains the maximum gets -sign(t_k) s sum_i g_i t_i / (2 m^2) besides; dw = dt (1 - t^2). An all-zero tensor: 0.
    Shapes:    any; one scale for the tensor
    Ranges:    y in -1..1 - 2^(1-bits) in steps of 2^(1-bits): 1 bit gives {-1, 0}, with signs {-1, +1}; 0 stays 0 from 2 bits on
    Source:    DiracDeltaNet (arXiv 1811.08634), published code, convolution weights

    >>> tanh_weight(torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0]), bits=2).tolist()
    [-1.0, -0.5, 0.0, 0.0, 0.5]
    >>> tanh_weight(torch.tensor([-3.0, -0.1, 0.1]), bits=1).tolist(), tanh_weight(torch.tensor([-3.0, -0.1, 0.1]), 1, signs=True).tolist()
    ([-1.0, -1.0, 0.0], [-1.0, -1.0, 1.0])
    """
    top = _at_least_one_bit(bits)
    if signs and bits != 1:
        raise ValueError(f"signs is a set of 1-bit weights, got {bits} bits")
    half = 0.5 if signs else 2.0 ** (bits - 1)
    return _TanhCodes.apply(in_float32(w), float(top), half, half)


def tanh_classifier(w: Tensor, bits: int, offset: bool = True) -> Tensor:
    """As `tanh_weight` on another grid: y = (code - 2^(bits-1) - 1) / n, without offset (code - 2^(bits-1)) / n.

    Gradient:  as `tanh_weight` with s = 1
    Ranges:    published, 8 bits: integers -129..126 over 255. The offset is common to all elements: as a classifier's weights it moves all
               logits of an image by the same amount, and without it the integers fit `bits` bits
    Source:    DiracDeltaNet (arXiv 1811.08634), published code, fully connected layer: weights and bias, each with its own maximum

    >>> (255 * tanh_classifier(torch.tensor([-1.0, 0.0, 1.0]), bits=8)).tolist()
    [-129.0, -1.0, 126.0]
    """
    top = _at_least_one_bit(bits)
    return _TanhCodes.apply(in_float32(w), float(top), 2.0 ** (bits - 1) + int(offset), float(top))


class TanhQuant(_TensorQuant):
    def __init__(self, bit_width: int, tanh_signs: bool) -> None:
        super().__init__(bit_width)
        self.signs = bool(tanh_signs)

    def forward(self, w: Tensor) -> Quantized:
        value = tanh_weight(w, self.bits, self.signs)
        scale = torch.full((), 1.0 if self.signs else 2.0 ** (1 - self.bits), dtype=value.dtype, device=value.device)
        return value, scale, self.zero_point, self.bit_width


class TanhClassifierQuant(_TensorQuant):
    def __init__(self, bit_width: int, code_offset: bool) -> None:
        super().__init__(bit_width, 1.0 if code_offset else 0.0)
        self.offset = bool(code_offset)

    def forward(self, w: Tensor) -> Quantized:
        value = tanh_classifier(w, self.bits, self.offset)
        scale = torch.full((), 1.0 / (2**self.bits - 1), dtype=value.dtype, device=value.device)
        return value, scale, self.zero_point, self.bit_width


class TanhWeight(RoundsToNearest):
    """`tanh_weight`: scale 2^(1-bits), zero point 0; `weight_bit_width` 8 and `weight_tanh_signs` False unless given."""

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = TanhQuant
    bit_width = 8
    signed = True
    narrow_range = False
    tanh_signs = False


class TanhClassifierWeight(RoundsToNearest):
    """`tanh_classifier`: scale 1 / (2^bits - 1), zero point 1 with `weight_code_offset` (True unless given), `weight_bit_width` 8."""

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = TanhClassifierQuant
    bit_width = 8
    signed = True
    narrow_range = False
    code_offset = True


class TanhClassifierBias(TanhClassifierWeight):
    """`tanh_classifier` for a bias: `bias_bit_width` 8, `bias_code_offset` True unless given; needs nothing of the layer's input."""

    proxy_class = BiasQuantProxyFromInjector
    requires_input_scale = False


# --- activations ---------------------------------------------------------------------------------------------------------------------


class _DividedClip(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coef: Tensor, bits: int, output_range: float) -> Tensor:
        ctx.save_for_backward(x, coef)
        ctx.range = output_range
        clip = coef.abs()
        ctx.kernel = coef.numel() == 1 and kernels.fit(x, coef) and kernels.places(x, 1) is not None
        if ctx.kernel and bits != REAL:
            y = torch.empty_like(x)
            kernels.call("divided_clip", x, y, x.numel(), clip, 2**bits - 1, output_range / (2**bits - 1), dtype=x.dtype)
            return y
        u = x.clamp_min(0).minimum(clip).div_(clip)
        if bits == REAL:
            return u.mul_(output_range)
        return u.mul_(2.0**bits - 1).round_().mul_(output_range / (2**bits - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, coef = ctx.saved_tensors
        clip = coef.abs()
        if ctx.kernel:
            dx, sums = torch.empty_like(x), torch.empty_like(coef)
            factors = (-2 / clip, -ctx.range / (2 * clip))
            kernels.call("divided_clip_back", x, kernels.alike(grad, x), dx, sums, x.numel(), clip, *factors, dtype=x.dtype)
            return dx, sums.mul_(ctx.range / 2).mul_(coef.sign()).div_(clip), None, None
        above = (x - clip).sign_()
        dcoef = None
        if ctx.needs_input_grad[1]:
            rest = x.clamp_min(0).minimum(clip).mul_(-2 / clip).add_(above).add_(1)  # (1 + sign(x - a)) - 2 u / a
            dcoef = ((grad * rest).sum() * (ctx.range / 2) * coef.sign() / clip).reshape(coef.shape)
        return above.sub_(x.sign()).mul_(grad).mul_(-ctx.range / (2 * clip)), dcoef, None, None


def divided_clip(x: Tensor, scale_coef: Tensor, bits: int, output_range: float = 2.0) -> Tensor:
    """Clipped activation whose learned clip is divided out: whatever the clip, results lie on {0..n} * R / n.

    Forward:   a = |scale_coef|, u = clip(x, 0, a), n = 2^bits - 1; y = R rne(n u / a) / n; 32 bits: y = R u / a
    Gradient:  straight through the rounding, exact elsewhere, sign(0) = 0: dx = g R / a inside, half of it at 0 and at a, 0 outside;
               d scale_coef = sign(scale_coef) sum g R ((1 + sign(x - a)) / (2a) - u / a^2): -R x / a^2 inside, 0 above
    Shapes:    x any, scale_coef (1,), not 0
    Ranges:    codes 0..n, scale R / n with R = output_range
    Source:    DiracDeltaNet (arXiv 1811.08634), published code, activation quantizer

    >>> divided_clip(torch.tensor([-1.0, 0.4, 1.0, 9.0]), torch.tensor([1.5]), bits=2, output_range=3.0).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if bits != REAL and not 1 <= bits <= 24:
        raise ValueError(f"a clipped activation has 1 to 24 bits, or {REAL} for no rounding, got {bits}")
    return _DividedClip.apply(in_float32(x), scale_coef, int(bits), float(output_range))


def inherited_clip(scale_coef: Tensor) -> Tensor:
    """The clip that a network built from another one starts with: the old scalar where 0.1 < scalar < 10 (in float32), else 1.

    Published behaviour on conversion for fine-tuning, never on plain loading; an untouched 10 or a negative scalar becomes 1.
    Source: DiracDeltaNet (arXiv 1811.08634), published code.

    >>> inherited_clip(torch.tensor([0.05, 0.5, 10.0, -2.0])).tolist()
    [1.0, 0.5, 1.0, 1.0]
    """
    value = scale_coef.float()
    return torch.where((value > 0.1) & (value < 10.0), scale_coef, 1.0)


class DividedClipQuant(_TensorQuant):
    """The learned clip outlives load_state_dict, at which Brevitas builds `tensor_quant` anew: an optimizer goes on training it.

    With 32 bits there is no scale, and Brevitas returns a plain tensor.
    """

    def __init__(self, bit_width: int, output_range: float, clip_init: float, proxy_module: nn.Module) -> None:
        super().__init__(bit_width)
        self.range = float(output_range)
        before = getattr(getattr(proxy_module, "fused_activation_quant_proxy", None), "tensor_quant", None)
        fresh = nn.Parameter(torch.full((1,), float(clip_init)))
        self.scale_coef: nn.Parameter = before.scale_coef if isinstance(before, DividedClipQuant) else fresh

    def forward(self, x: Tensor) -> Quantized:
        value = divided_clip(x, self.scale_coef, self.bits, self.range)
        if self.bits == REAL:
            return value, None, None, None  # type: ignore[return-value]
        scale = torch.full((), self.range / (2**self.bits - 1), dtype=value.dtype, device=value.device)
        return value, scale, self.zero_point, self.bit_width

    def before_rounding(self, x: Tensor) -> Tensor:
        """R x / a: what is clipped and rounded. Conversion to integers reads slopes from it."""
        return x * (self.range / self.scale_coef.abs())


class UintActDividedClip(RoundsToNearest):
    """`divided_clip`: scale R / (2^bits - 1), zero point 0.

    Options of the layer: bit_width (8 unless given; 32 rounds nothing), output_range R (2), clip_init (2), the first scale_coef.
    """

    proxy_class = OwnScaleProxy
    tensor_quant = DividedClipQuant
    bit_width = 8
    signed = False
    narrow_range = False
    output_range = 2.0
    clip_init = 2.0
