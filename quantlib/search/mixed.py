"""The two composites of a supernet: an activation and a layer that are a weighted sum over their candidate bit widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn

from quantlib._brevitas import value_of
from quantlib.layers import ImageFloor
from quantlib.quantizers.constant_steps import ConstantStepQuant, HalfWaveQuant
from quantlib.quantizers.injectors import LearnedScaleQuant
from quantlib.quantizers.mixtures import mixed_constant_step, mixed_half_wave, mixed_image_floor
from quantlib.search.learned import mixed_learned_scale

ALPHA = 0.01  # every alpha at the start, as published: equal shares


class SearchError(ValueError):
    """A model, layer or setting that cannot be searched; the message names it and says what would work."""


@dataclass(frozen=True)
class Geometry:
    """What a price may depend on: one layer and the size of its input. A linear layer is a 1 x 1 convolution of a 1 x 1 image."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    linear: bool = False

    @property
    def weights(self) -> int:
        """Weights without bias."""
        return self.out_channels * self.in_channels // self.groups * prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiplications per image."""
        return self.weights * prod(self.out_size)


def geometry(name: str, layer: Any, in_size: tuple[int, int], out_size: tuple[int, int]) -> Geometry:
    """Of a QuantConv2d or QuantLinear."""
    if isinstance(layer, nn.Linear):
        return Geometry(name, layer.in_features, layer.out_features, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1), (1, 1), linear=True)
    padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    return Geometry(name, *shape, in_size, out_size)


def size_of(x: Tensor) -> tuple[int, int]:
    """(H, W) of (N, C, H, W); (1, 1) of (N, C)."""
    return (int(x.shape[2]), int(x.shape[3])) if x.dim() == 4 else (1, 1)


# Candidates: the same quantizer at other widths.


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


def _tensor_quants(candidates: Sequence[Any]) -> list[Any]:
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


def _half_wave(x: Tensor, shares: Tensor, quants: Sequence[Any]) -> Tensor:
    return mixed_half_wave(x, shares, [q.bits for q in quants])


def _learned(x: Tensor, shares: Tensor, quants: Sequence[Any]) -> Tensor:
    scales = [q.scaling_impl(x, q.threshold) for q in quants]
    return mixed_learned_scale(x, shares, scales, [(q.lo, q.hi) for q in quants], quants[0].gradient)


# Classes of tensor_quant with a function for all widths at once; every other quantizer runs once per width.
_FUSED: tuple[tuple[type, Callable[[Tensor, Tensor, Sequence[Any]], Tensor]], ...] = (
    (HalfWaveQuant, _half_wave),
    (LearnedScaleQuant, _learned),
)


class MixedActivation(nn.Module):
    """y = sum_i p_i Q_i(x), p = softmax(alpha_activ), Q_i the activation quantizer at the i-th width.

    Gradient:  through the softmax, and that of each quantizer times its share
    State:     alpha_activ (len(bits),); what candidates learn, under candidates.i
    """

    def __init__(self, candidates: Sequence[nn.Module], bits: Sequence[int]) -> None:
        super().__init__()
        self.bits = tuple(bits)
        self.alpha_activ = nn.Parameter(torch.full((len(self.bits),), ALPHA))
        self.candidates = nn.ModuleList(candidates)

    def shares(self) -> Tensor:
        """(len(bits),) softmax of the alphas."""
        return self.alpha_activ.softmax(0)

    def forward(self, x: Any) -> Tensor:
        x, shares = value_of(x), self.shares()
        if all(isinstance(c, ImageFloor) for c in self.candidates):
            return mixed_image_floor(x, shares, self.bits)
        quants = _tensor_quants(list(self.candidates))
        for kind, mixture in _FUSED:
            if quants and all(type(q) is kind for q in quants):
                first: Any = self.candidates[0]
                proxy = first.act_quant if isinstance(first, QuantNonLinearActLayer) else first
                return mixture(proxy.fused_activation_quant_proxy.activation_impl(x), shares, quants)
        return weighted_sum(shares, (value_of(c(x)) for c in self.candidates))

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def weighted_sum(shares: Tensor, values: Any) -> Tensor:
    return sum(share * value for share, value in zip(shares, values, strict=True))


class MixedWeights(nn.Module):
    """Composite convolution or matrix product: one multiplication with W = sum_j p_j Q_j(w), p = softmax(alpha_weight).

    Shared: one w for every width. Separate: a w_j for each, and the bias of the first. The layer's own input quantizer, if it has one, is
    the MixedActivation `activation`.
    State:     alpha_weight (len(bits),), branches.0.weight (separate: branches.j.weight), branches.0.bias
    """

    def __init__(self, name: str, layer: Any, bits: Sequence[int], share: bool) -> None:
        super().__init__()
        self.name, self.order, self.bits, self.share = name, 0, tuple(bits), share
        self.alpha_weight = nn.Parameter(torch.full((len(self.bits),), ALPHA))
        self.branches = nn.ModuleList([layer] if share else [rebind(copy.deepcopy(layer)) for _ in self.bits])
        owners = [self.branches[0] if share else b for b in self.branches] * (len(self.bits) if share else 1)
        self.quantizers = nn.ModuleList(at_bits(layer.weight_quant, owner, b, name) for owner, b in zip(owners, self.bits, strict=True))
        for index, branch in enumerate(self.branches):
            branch.weight_quant = None  # type: ignore[assignment]
            if index:
                branch.bias = None  # type: ignore[assignment]
        self.activation: MixedActivation | None = None
        self.inputs: tuple[MixedActivation | int, ...] = ()
        self.in_size: tuple[int, int] = (1, 1)
        self.out_size: tuple[int, int] = (1, 1)

    @property
    def layer(self) -> Any:
        """The searched layer itself (of separate weights the first)."""
        return self.branches[0]

    def shares(self) -> Tensor:
        """(len(bits),) softmax of the alphas."""
        return self.alpha_weight.softmax(0)

    def input_shares(self) -> tuple[tuple[int, ...], Tensor]:
        """Widths of the input and the share of each; where several quantizers meet, every one of them counts equally."""
        bits: list[int] = []
        shares: list[Tensor] = []
        for source in self.inputs:
            if isinstance(source, MixedActivation):
                bits += source.bits
                shares.append(source.shares() / len(self.inputs))
            else:
                bits.append(source)
                shares.append(self.alpha_weight.new_ones(1) / len(self.inputs))
        return tuple(bits), torch.cat(shares)

    def geometry(self) -> Geometry:
        """The layer with the size of its last input."""
        return geometry(self.name, self.layer, self.in_size, self.out_size)

    def weight(self) -> Tensor:
        """W, the weights of the composite."""
        shares = self.shares()
        quants: list[Any] = [q.tensor_quant for q in self.quantizers]  # type: ignore[union-attr]
        branches: list[Any] = list(self.branches)
        if all(type(q) is ConstantStepQuant for q in quants):
            w = branches[0].weight if self.share else torch.stack([b.weight for b in branches])
            return mixed_constant_step(w, shares, self.bits, separate=not self.share)
        owners = branches * len(quants) if self.share else branches
        return weighted_sum(shares, (value_of(q(b.weight)) for q, b in zip(self.quantizers, owners, strict=True)))

    def forward(self, x: Any) -> Tensor:
        x = value_of(x)
        self.in_size = size_of(x)
        if self.activation is not None:
            x = self.activation(x)
        bias = self.layer.bias
        if bias is not None and self.layer.bias_quant.is_quant_enabled:
            bias = value_of(self.layer.bias_quant(bias, None, None))
        y = self.layer.inner_forward_impl(x, self.weight(), bias)
        self.out_size = size_of(y)
        return value_of(self.layer.output_quant(y))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, share={self.share}"
