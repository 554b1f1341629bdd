"""The same quantizer at other widths. What the search reads of Brevitas' insides is read here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn

from quantlib._brevitas import value_of
from quantlib.layers import ImageFloor
from quantlib.search.geometry import SearchError


def rebind(net: nn.Module) -> nn.Module:
    """After a deep copy: Brevitas' injectors are classes, are not copied, and go on naming the modules of the original."""
    for module in net.modules():
        if isinstance(module, QuantProxyFromInjector):
            module.quant_injector = module.quant_injector.let(proxy_module=module)
            module.update_tracked_modules()
    return net


def at_bits(proxy: Any, layer: nn.Module, bits: int, name: str) -> Any:
    """The quantizer of a Brevitas layer, built anew at another width; what it has learned comes along. SearchError where it cannot."""
    try:
        new = type(proxy)(layer, proxy.quant_injector.let(bit_width=bits))
        new.load_state_dict(proxy.state_dict())
        new.eval()
        width = new.bit_width()
    except Exception as error:  # injectors raise whatever their parts raise
        raise SearchError(
            f"{name}: its quantizer cannot be built with {bits} bits ({error}); leave these bits out, or name it in fixed="
        ) from None
    if width is None or float(width) != bits:
        raise SearchError(f"{name}: its quantizer stays at {width} bits when it is asked for {bits}; name the layer in fixed=")
    like = next((t for t in (*proxy.parameters(), *proxy.buffers(), *layer.parameters()) if t.is_floating_point()), torch.zeros(()))
    return new.to(like.device, like.dtype).train(proxy.training)


def activation_at(module: nn.Module, bits: int, name: str) -> nn.Module:
    """A copy of an activation layer with another width."""
    new = rebind(copy.deepcopy(module))
    if isinstance(new, QuantNonLinearActLayer):
        new.act_quant = at_bits(new.act_quant, new, bits, name)
    elif not isinstance(new, ImageFloor):
        raise SearchError(f"{name} ({type(module).__name__}) has one width only; keep it with fixed= or put a quantizer in its place")
    if hasattr(new, "bits"):
        new.bits = bits  # type: ignore[assignment]
    return new


def tensor_quants(candidates: Sequence[Any]) -> list[Any]:
    """The fused quantizers inside activation candidates, or none of them where a layer does more than activation and quantizer."""
    found = []
    for c in candidates:
        proxy = c.act_quant if isinstance(c, QuantNonLinearActLayer) else c
        if isinstance(c, QuantNonLinearActLayer) and (
            type(c).forward is not QuantNonLinearActLayer.forward or c.input_quant.is_quant_enabled
        ):
            return []
        fused = getattr(proxy, "fused_activation_quant_proxy", None)
        if fused is None or proxy.disable_quant:
            return []
        found.append(fused.tensor_quant)
    return found


def activation_impl(candidate: Any) -> nn.Module:
    """What an activation candidate does before it quantizes: a ReLU, or nothing."""
    proxy = candidate.act_quant if isinstance(candidate, QuantNonLinearActLayer) else candidate
    return proxy.fused_activation_quant_proxy.activation_impl


def multiply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's forward pass behind its input quantizer, with other weights."""
    bias = layer.bias
    if bias is not None and layer.bias_quant.is_quant_enabled:
        bias = value_of(layer.bias_quant(bias, None, None))
    return value_of(layer.output_quant(layer.inner_forward_impl(x, weight, bias)))
