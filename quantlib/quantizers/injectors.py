"""The pure quantizers as named Brevitas injectors, for brevitas.nn layers of anybody's network.

    QuantConv2d(8, 16, 3, weight_quant=NarrowIntWeightPerChannelMaxAbs, weight_bit_width=4)
    QuantReLU(act_quant=UintActLearnedLog2Scale, bit_width=4, max_val=6.0)

Each injector replaces `tensor_quant` by one fused module that answers (value, scale, zero_point, bit_width); proxies and layers stay those
of Brevitas. The integer code of a value is round(value / scale) + zero_point. State-dict keys are those of Brevitas: none for weights and
for constant scales, `...tensor_quant.scaling_impl.value` (log2 domain) for learned ones.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas import config
from brevitas.core.function_wrapper import Identity
from brevitas.core.restrict_val import FloatRestrictValue, LogFloatRestrictValue
from brevitas.core.scaling import ParameterScaling
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import FloatToIntImplType, RestrictValueType, ScalingPerOutputType
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import FusedActivationQuantProxy
from brevitas.quant import (
    Int8ActPerTensorFloatMinMaxInit,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloatMaxInit,
)
from torch import Tensor, nn

from quantlib.quantizers.functions import Gradient, binary_sign, learned_log2_scale, learned_scale, max_abs, quant_sign

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


class _View(nn.Module):
    """What Brevitas' proxies look up as `tensor_quant.int_quant.input_view_impl`."""

    def __init__(self) -> None:
        super().__init__()
        self.input_view_impl = Identity()


class _TensorQuant(nn.Module):
    """Common part: zero point and bit width as constants outside the state dict."""

    zero_point: Tensor
    bit_width: Tensor

    def __init__(self, bit_width: int, zero_point: float = 0.0) -> None:
        super().__init__()
        if config.JIT_ENABLED:
            raise RuntimeError("fused quantizers are no TorchScript: unset BREVITAS_JIT (it gains no speed)")
        self.bits = int(bit_width)
        self.int_quant = _View()
        self.register_buffer("zero_point", torch.tensor(zero_point), persistent=False)
        self.register_buffer("bit_width", torch.tensor(float(bit_width)), persistent=False)


class BinarySignQuant(_TensorQuant):
    scale: Tensor

    def __init__(self, sign_clip: float, sign_of_zero: float) -> None:
        super().__init__(1)
        self.clip, self.zero = sign_clip, sign_of_zero
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)

    def forward(self, w: Tensor) -> Quantized:
        return binary_sign(w, self.clip, self.zero), self.scale, self.zero_point, self.bit_width


class QuantSignQuant(_TensorQuant):
    def __init__(self, bit_width: int) -> None:
        if bit_width < 1:
            raise ValueError(f"a QuantSign needs at least one bit, got {bit_width}")
        super().__init__(bit_width, (2**bit_width - 1) / 2)

    def forward(self, x: Tensor) -> Quantized:
        value = quant_sign(x, self.bits)
        scale = torch.full((), 2.0 / (2**self.bits - 1), dtype=value.dtype, device=value.device)
        return value, scale, self.zero_point, self.bit_width


class MaxAbsQuant(_TensorQuant):
    def __init__(self, bit_width: int, scaling_min_val: float, scaling_per_output: ScalingPerOutputType, output_channel_dim: int) -> None:
        if bit_width < 2:
            raise ValueError(f"narrow-range integer weights need at least two bits, got {bit_width}; for one bit use BinaryWeight")
        super().__init__(bit_width)
        self.min_scale = scaling_min_val
        self.channel = output_channel_dim if scaling_per_output == ScalingPerOutputType.CHANNEL else None

    def forward(self, w: Tensor) -> Quantized:
        value, scale = max_abs(w, self.bits, self.channel, self.min_scale)
        return value, scale, self.zero_point, self.bit_width


def _least_of_log2(scaling: nn.Module) -> float | None:
    """The minimum of a scale that Brevitas learns as its log2, 0 for none; None where it is learned or found otherwise."""
    if type(scaling) is not ParameterScaling:
        return None
    clamped: Any = scaling.restrict_clamp_scaling
    steps: tuple[Any, ...] = (scaling.restrict_clamp_threshold, scaling.restrict_clamp_scale_threshold)
    if [type(m.restrict_value_impl) for m in (clamped, *steps)] != [LogFloatRestrictValue, FloatRestrictValue, Identity]:
        return None
    return float(getattr(clamped.clamp_ste, "min_val", 0.0))


class LearnedScaleQuant(_TensorQuant):
    """The scale outlives load_state_dict, at which Brevitas builds `tensor_quant` anew: an optimizer made before goes on training it."""

    threshold: Tensor
    scaling_impl: Any

    def __init__(
        self, bit_width: int, signed: bool, narrow_range: bool, scaling_impl: nn.Module, scale_gradient: Gradient, proxy_module: nn.Module
    ) -> None:
        if bit_width < 1 + int(signed):
            raise ValueError(f"a {'signed' if signed else 'unsigned'} activation needs at least {1 + int(signed)} bits, got {bit_width}")
        super().__init__(bit_width)
        half = int(2 ** (bit_width - 1))
        self.lo, self.hi = (-half + int(narrow_range), half - 1) if signed else (0, 2 * half - 1 - int(narrow_range))
        self.gradient = scale_gradient
        before = getattr(getattr(proxy_module, "fused_activation_quant_proxy", None), "tensor_quant", None)
        self.scaling_impl = before.scaling_impl if isinstance(before, LearnedScaleQuant) else scaling_impl
        self.register_buffer("threshold", torch.tensor(float(-self.lo if signed else self.hi)), persistent=False)
        self.smallest = _least_of_log2(self.scaling_impl)

    def forward(self, x: Tensor, relu: bool = False) -> Quantized:
        if self.smallest is None:
            scale = self.scaling_impl(x, self.threshold)
            return learned_scale(x, scale, self.lo, self.hi, self.gradient, relu), scale, self.zero_point, self.bit_width
        log2: Tensor = self.scaling_impl.value
        value, scale = learned_log2_scale(x, log2, self.threshold, self.lo, self.hi, self.gradient, relu, self.smallest)
        return value, scale, self.zero_point, self.bit_width


class _ReLUInside(FusedActivationQuantProxy):
    """ReLU and quantizer in one function; `activation_impl` stays for what runs or exports it alone."""

    def forward(self, x: Tensor) -> Quantized:
        return self.tensor_quant(x, relu=True)  # type: ignore[no-any-return]


class OwnScaleProxy(ActQuantProxyFromInjector):
    """Keeps the scale of its own layer when it is built anew. A deep copy of a layer shares its injector, which names the first layer's
    proxy: without this, loading weights into a copy would bind both layers to one scale."""

    quant_injector: Any

    def init_tensor_quant(self) -> None:
        self.quant_injector = self.quant_injector.let(proxy_module=self)
        super().init_tensor_quant()
        fused: Any = self.fused_activation_quant_proxy  # type: ignore[has-type]
        if isinstance(fused.tensor_quant, LearnedScaleQuant) and type(fused.activation_impl) is nn.ReLU:
            self.fused_activation_quant_proxy = _ReLUInside(fused.activation_impl, fused.tensor_quant)

    @property
    def export_handler(self) -> nn.Module | None:
        """The handler of the running export. Brevitas finds handlers by exact type; its exporters learn of this one when they ask."""
        if config._ONGOING_EXPORT is not None:
            _known_to_exporters(type(self))
        return self._modules.get("export_handler")

    @export_handler.setter
    def export_handler(self, none: None) -> None:
        """A handler is a module and goes by nn.Module; what comes here is the None of the constructor."""


def _known_to_exporters(proxy: type[ActQuantProxyFromInjector]) -> None:
    """Every handler of ActQuantProxyFromInjector in Brevitas' exporters handles `proxy` too."""
    from brevitas.export.common.handler.base import BaseHandler

    waiting: list[type] = [BaseHandler]
    while waiting:
        handler = waiting.pop()
        waiting += handler.__subclasses__()
        handled = getattr(handler, "handled_layer", None)
        kinds = handled if isinstance(handled, tuple) else (handled,)
        if ActQuantProxyFromInjector in kinds and proxy not in kinds:
            handler.handled_layer = (*kinds, proxy)  # type: ignore[attr-defined]


class RoundsToNearest(ExtendedInjector):
    """An injector from nothing; what Brevitas' exporters ask of it besides `signed` and `narrow_range`."""

    float_to_int_impl_type = FloatToIntImplType.ROUND


class BinaryWeight(RoundsToNearest):
    """Weights in {-1, +1}: `binary_sign` with sign_clip = 1.3 and sign_of_zero = 0; scale 1, zero point 0, 1 bit."""

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = BinarySignQuant
    bit_width = 1
    signed = True
    narrow_range = True
    sign_clip = 1.3
    sign_of_zero = 0.0


class NarrowIntWeightPerChannelMaxAbs(Int8WeightPerChannelFloat):
    """Signed narrow-range weights, one scale per output channel: `max_abs`; `weight_bit_width` 8 unless given, minimum 2e-16.

    Equal in every bit to Int8WeightPerChannelFloat with the same bit_width and scaling_min_val; the gradient through ties of the maximum
    goes to the first of them.
    """

    tensor_quant = MaxAbsQuant
    scaling_min_val = 2e-16


class NarrowIntWeightPerTensorMaxAbs(Int8WeightPerTensorFloat):
    """As NarrowIntWeightPerChannelMaxAbs with one scale for the whole tensor."""

    tensor_quant = MaxAbsQuant
    scaling_min_val = 2e-16


class QuantSignAct(RoundsToNearest):
    """k-bit symmetric activation without zero: `quant_sign`, `bit_width` 2 unless given.

    scale = 2 / (2^k - 1), zero_point = (2^k - 1) / 2: value = scale * (code - zero_point) with codes 0..2^k - 1.
    """

    proxy_class = ActQuantProxyFromInjector
    tensor_quant = QuantSignQuant
    bit_width = 2
    signed = False
    narrow_range = False


class UintActLearnedLog2Scale(Uint8ActPerTensorFloatMaxInit):
    """Unsigned activation, S = max(2^v, 2e-16) with v learned, scale S / (2^b - 1): `learned_scale`.

    Options of the layer: bit_width (8), max_val (initial S, required), scale_gradient ("2019" | "brevitas"), and for one scale per channel
    scaling_per_output_channel=True, per_channel_broadcastable_shape=(1, C, 1, 1).
    """

    proxy_class = OwnScaleProxy
    tensor_quant = LearnedScaleQuant
    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16
    scale_gradient = "2019"


class IntActLearnedLog2Scale(Int8ActPerTensorFloatMinMaxInit):
    """Signed activation, S = max(2^v, 2e-16) with v learned, scale S / 2^(b-1), codes -2^(b-1)..2^(b-1) - 1: `learned_scale`.

    Options of the layer: bit_width (8), min_val and max_val (their larger magnitude is the initial S, required), and the others of
    UintActLearnedLog2Scale.
    """

    proxy_class = OwnScaleProxy
    tensor_quant = LearnedScaleQuant
    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16
    scale_gradient = "2019"
