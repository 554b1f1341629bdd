"""The only file that reads Brevitas internals: quant tensors, grids of quantizers, and the lowering rules of brevitas.nn layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from brevitas import nn as qnn
from brevitas.quant_tensor import IntQuantTensor, QuantTensor
from torch import Tensor, nn

from quantlib.ir import Grid

if TYPE_CHECKING:
    from quantlib.lowering import Lowering
    from quantlib.tails import Value

Rule = Callable[..., Any]


def is_quant_tensor(x: Any) -> bool:
    return isinstance(x, QuantTensor)


def value_of(x: Any) -> Any:
    """The tensor inside a quant tensor; anything else as it is."""
    return x.value if isinstance(x, QuantTensor) else x


# ---------------------------------------------------------------- reading quantizers


def grid_of(quantize: Callable[[Tensor], Any], shape: tuple[int, ...], label: str) -> Grid:
    """The grid of an activation quantizer, read off its results at +-1e12 and on a sweep between: lo, hi, step and scale, never from
    bit_width.

    Half-integer zero points (levels -1, -1/3, 1/3, 1) become half the scale and step 2. Raises ConversionError when the results lie on
    no grid.
    """
    from quantlib.tails import ConversionError, channel_scale

    probe = (
        torch.tensor([-1e12, 0.0, 1e12], dtype=torch.float64)
        .reshape(-1, *[1] * len(shape))
        .expand(3, shape[0], *[1] * (len(shape) - 1))
        .contiguous()
    )
    with torch.no_grad():
        result, small = quantize(probe), quantize(probe * 1e-12)
    if not isinstance(result, IntQuantTensor):
        raise ConversionError(
            f"{label}: the quantizer returns {type(result).__name__}, not an integer quant tensor; minifloat and MX formats "
            f"have no integers here, nor have 32 bits that round nothing: give the layer fewer"
        )
    if not torch.isfinite(result.value).all() or not torch.isfinite(result.scale).all():
        raise ConversionError(f"{label}: the quantizer's scale or output is NaN or infinite; load a sound checkpoint")
    if not torch.equal(result.scale, small.scale) or not torch.equal(result.zero_point, small.zero_point):
        raise ConversionError(f"{label}: the quantizer takes its scale from the data it sees; use one with a learned or constant scale")
    scale = result.scale.detach().double().numpy()
    if scale.ndim and scale.size > 1:
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    else:
        scale = scale.reshape(())
    for division in (1, 2):
        fine = channel_scale(scale / division, shape, label)
        ends = result.value.detach().reshape(3, shape[0]).numpy() / fine
        if np.abs(ends - np.rint(ends)).max() < 1e-6:
            break
    else:
        raise ConversionError(
            f"{label}: the quantizer's zero point is no multiple of 1/2, so real 0 has no integer; use a zero point on the grid"
        )
    lo, hi = int(np.rint(ends).min()), int(np.rint(ends).max())
    step = 1
    if hi - lo <= 1 << 16:
        sweep = torch.linspace(lo - 1, hi + 1, 4 * (hi - lo + 2) + 1, dtype=torch.float64)
        x = sweep.reshape(-1, 1) * torch.from_numpy(fine.copy())
        with torch.no_grad():
            value = quantize(x.expand(-1, shape[0]).reshape(-1, shape[0], *[1] * (len(shape) - 1))).value
        codes = np.rint(value.reshape(len(sweep), -1).numpy() / fine).astype(np.int64)
        step = int(np.gcd.reduce(codes - codes.min(), axis=None))  # all codes lie on the smallest + step * k
    return Grid(lo, hi, scale / division, max(step, 1))


def weight_codes(module: Any, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Integer weights and their per-output-channel scale (O,) of a Brevitas layer: code = round(value / scale), zero point already out."""
    from quantlib.tails import ConversionError

    if not module.weight_quant.is_quant_enabled:
        raise ConversionError(
            f"{label}: its weights are not quantized (weight_quant=None, or real_weights=True of a two-step training); give "
            f"the layer a weight quantizer, or set real_weights to False"
        )
    with torch.no_grad():
        quant = module.quant_weight()
    if not isinstance(quant, IntQuantTensor):
        raise ConversionError(f"{label}: its weights are quantized to {type(quant).__name__}, not to integers")
    value, scale = quant.value.detach().double(), quant.scale.detach().double()
    return on_grid(value, scale, label)


def on_grid(value: Tensor, scale: Tensor, label: str) -> tuple[np.ndarray, np.ndarray]:
    from quantlib.tails import ConversionError

    outputs = value.shape[0]
    scale = scale if scale.numel() > 1 else scale.reshape(())
    per_output = scale.expand_as(value).reshape(outputs, -1)
    if not torch.isfinite(value).all() or not torch.isfinite(scale).all():
        raise ConversionError(f"{label}: its quantized weights hold NaN or infinite values")
    if not (per_output == per_output[:, :1]).all():
        raise ConversionError(f"{label}: its weight scale differs inside an output channel; use one scale per tensor or per output channel")
    for division in (1, 2):
        off = value / (scale / division)
        codes = off.round()
        if bool((off.sub_(codes).abs_() < 1e-6).all()):
            return codes.long().numpy(), (per_output[:, 0] / division).numpy().copy()
    raise ConversionError(f"{label}: its weights do not lie on their scale's grid")


def quantizer(g: Lowering, proxy: nn.Module, x: Value, label: str) -> Value:
    """An activation quantizer proxy (input_quant, act_quant, output_quant) as an edge."""
    from quantlib.tails import Map, settle

    grid = grid_of(proxy, g.shape(x), label)
    tensor_quant = getattr(getattr(proxy, "fused_activation_quant_proxy", None), "tensor_quant", None)
    before = getattr(tensor_quant, "before_rounding", lambda t: t)  # where results are rescaled: the same without rounding and clip
    run = Map(lambda t: value_of(proxy(t)), (x,), g.path, uniform=np.asarray(grid.scale).size == 1, pre=before)
    return settle(g, run, grid)


def _enabled(proxy: Any) -> bool:
    return proxy is not None and bool(getattr(proxy, "is_quant_enabled", False))


# ---------------------------------------------------------------- lowering rules


def _weighted(g: Lowering, module: Any, x: Value, multiply: Callable[..., Value]) -> Value:
    if _enabled(module.input_quant):
        x = quantizer(g, module.input_quant, x, f"{g.path}.input_quant")
    edge = g.integer(x)
    codes, scale = weight_codes(module, g.path)
    y = multiply(edge, codes, scale)
    if module.bias is not None:
        y = g.bias(y, _bias(g, module))
    if _enabled(module.output_quant):
        y = quantizer(g, module.output_quant, y, f"{g.path}.output_quant")
    return y


def _bias(g: Lowering, module: Any) -> np.ndarray:
    """The bias as the layer adds it, in real units; bias quantizers see the quant tensor of this very call."""
    with torch.no_grad():
        if not _enabled(module.bias_quant):
            return module.bias.detach().double().numpy()
        quant = g.quant_argument()
        if quant is None and _enabled(module.input_quant):
            quant = module.input_quant(torch.zeros(1, *[1] * (module.weight.dim() - 1), dtype=torch.float64))
        if quant is not None:
            quant = quant._replace(value=torch.zeros(1, *[1] * (module.weight.dim() - 1), dtype=torch.float64))
        return value_of(module.bias_quant(module.bias, quant, module.quant_weight())).detach().double().reshape(-1).numpy()


def _conv2d(g: Lowering, module: Any, x: Value) -> Value:
    return _weighted(
        g, module, x, lambda e, w, s: g.conv2d(e, w, s, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    )


def _linear(g: Lowering, module: Any, x: Value) -> Value:
    return _weighted(g, module, x, lambda e, w, s: g.dense(e, w, s))


def _activation(g: Lowering, module: Any, x: Value) -> Value:
    if _enabled(module.input_quant):
        x = quantizer(g, module.input_quant, x, f"{g.path}.input_quant")
    if _enabled(module.act_quant):
        return quantizer(g, module.act_quant, x, g.path)
    return g.elementwise(lambda t: value_of(module.act_quant(t)), x)


def _eltwise_add(g: Lowering, module: Any, x: Value, y: Value) -> Value:
    if _enabled(module.input_quant):
        x, y = (quantizer(g, module.input_quant, v, f"{g.path}.input_quant") for v in (x, y))
    z = g.sum(x, y)
    return quantizer(g, module.output_quant, z, f"{g.path}.output_quant") if _enabled(module.output_quant) else z


def _trunc_pool(g: Lowering, module: Any, x: Value) -> Value:
    """Integer window sum, then the module's own truncation run on every sum."""
    quant = g.quant_argument()
    if quant is None or not _enabled(module.trunc_quant):
        return g.mean_pool_module(module, x)  # Brevitas averages silently when its input carries no metadata
    edge = g.integer(x)
    pool = nn.AdaptiveAvgPool2d if isinstance(module, nn.AdaptiveAvgPool2d) else nn.AvgPool2d
    with torch.no_grad():
        average: Any = pool.forward(module, quant._replace(value=torch.zeros(1, *edge.shape, dtype=torch.float64)))
    summed = g.sum_pool_module(module, edge, scale=float(average.scale.reshape(-1)[0]))

    def run(t: Tensor) -> Tensor:
        return module.trunc_quant(average._replace(value=t)).value

    with torch.no_grad():
        ends = torch.tensor([summed.type.lo, summed.type.hi], dtype=torch.float64).reshape(2, 1, 1, 1) * average.scale.reshape(-1)[0]
        out = module.trunc_quant(average._replace(value=ends))
    scale = out.scale.detach().double().reshape(-1)[0]
    lo, hi = (int(v) for v in (out.value / scale).round().reshape(-1).tolist())
    return g.quantize(run, summed, Grid(lo, hi, float(scale)), uniform=True)


def rule_for(module: nn.Module) -> Rule | None:
    """The lowering rule of a brevitas.nn layer (or of a subclass that keeps its forward), or None."""
    kind: Any
    for kind, rule in RULES:
        if isinstance(module, kind):
            return rule if type(module).forward is kind.forward else None
    return None


_ACTIVATIONS = (qnn.QuantReLU, qnn.QuantIdentity, qnn.QuantHardTanh, qnn.QuantSigmoid, qnn.QuantTanh)
RULES: tuple[tuple[type, Rule], ...] = (
    (qnn.QuantConv2d, _conv2d),
    (qnn.QuantLinear, _linear),
    *((kind, _activation) for kind in _ACTIVATIONS),
    (qnn.QuantEltwiseAdd, _eltwise_add),
    (qnn.TruncAvgPool2d, _trunc_pool),
    (qnn.TruncAdaptiveAvgPool2d, _trunc_pool),
)
