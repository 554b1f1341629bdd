"""Bit widths as layers state them: Brevitas quantizers by their public answers, other layers by `out_bits` and `weight_bits`."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import nn


def steps(bits: float) -> int:
    """Integer steps between the lowest and the highest code of so many bits: 2^b - 1."""
    return 2 ** ceil(bits) - 1


def width(top: int) -> int:
    """Bits of top steps, ceil(log2(top)) as the published cost has it, at least 1."""
    return max(1, (top - 1).bit_length())


def enabled(proxy: Any) -> bool:
    return proxy is not None and bool(getattr(proxy, "is_quant_enabled", False))


def _bit_width(quant: Any) -> float | None:
    """Of an integer quant tensor its bit width, of a minifloat one sign, exponent and mantissa; None for a plain tensor."""
    if getattr(quant, "bit_width", None) is not None:
        return float(quant.bit_width.detach().reshape(-1)[0])
    if getattr(quant, "mantissa_bit_width", None) is not None:
        return 1 + float(quant.exponent_bit_width.detach().reshape(-1)[0]) + float(quant.mantissa_bit_width.detach().reshape(-1)[0])
    return None


def activation_bits(proxy: Any, shape: tuple[int, ...]) -> float | None:
    """Bits that an activation quantizer gives to a tensor of this shape, or None where it hands real numbers on."""
    if not enabled(proxy):
        return None
    with torch.no_grad():
        return _bit_width(proxy(torch.zeros(shape)))


def weight_steps(module: nn.Module) -> tuple[int | None, int | None]:
    """(bits, steps between the lowest and the highest code) of a layer's weights; (None, None) for real ones.

    Narrow range has 2^b - 2 steps, one bit 1, anything else 2^b - 1.
    """
    proxy: Any = getattr(module, "weight_quant", None)
    if proxy is None:
        bits = getattr(module, "weight_bits", None)
        return (None, None) if bits is None else (ceil(bits), steps(bits))
    if not enabled(proxy):
        return None, None
    with torch.no_grad():
        found = _bit_width(module.quant_weight())  # type: ignore[operator]
    if found is None:
        return None, None
    bits = ceil(found)
    return bits, steps(bits) - int(bool(proxy.is_narrow_range) and bits > 1)
