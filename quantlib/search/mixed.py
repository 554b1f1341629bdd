"""The two composites of a supernet: an activation and a layer that are a weighted sum over their candidate bit widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlib._brevitas import value_of
from quantlib.layers import ImageFloor
from quantlib.quantizers.constant_steps import ConstantStepQuant, HalfWaveQuant
from quantlib.quantizers.injectors import LearnedScaleQuant
from quantlib.quantizers.mixtures import mixed_constant_step, mixed_half_wave, mixed_image_floor
from quantlib.search.candidates import activation_impl, at_bits, multiply, rebind, tensor_quants
from quantlib.search.geometry import Geometry, geometry, size_of
from quantlib.search.learned import mixed_learned_scale

ALPHA = 0.01  # every alpha at the start, as published: equal shares


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
        quants = tensor_quants(list(self.candidates))
        for kind, mixture in _FUSED:
            if quants and all(type(q) is kind for q in quants):
                return mixture(activation_impl(self.candidates[0])(x), shares, quants)
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
        y = multiply(self.layer, x, self.weight())
        self.out_size = size_of(y)
        return y

    def extra_repr(self) -> str:
        return f"bits={self.bits}, share={self.share}"
