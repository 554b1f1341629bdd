"""Switches between the steps of training binary networks: one model, no edited source."""

from __future__ import annotations

import torch
from torch import nn

from quantlib.layers import FractionalConv2d

OPEN = -(2.0**20)  # a gating threshold below every sum: the gate is open, its sigmoid exactly 1, its gradient exactly 0


def use_real_weights(model: nn.Module, real: bool) -> nn.Module:
    """Binary layers use their real weights (first step) or the signs of them (second step)."""
    for module in model.modules():
        if hasattr(module, "real_weights"):
            module.real_weights = real  # type: ignore[assignment]
    return model


def use_gating(model: nn.Module, gated: bool, init: float = -1.0) -> nn.Module:
    """Gated convolutions with trained thresholds that start from `init`, or with every gate open and frozen: plain 2-bit activations.

    Switching on leaves thresholds that are in use as they are.
    """
    for module in model.modules():
        if isinstance(module, FractionalConv2d):
            with torch.no_grad():
                if not gated:
                    module.threshold.fill_(OPEN)
                else:
                    module.threshold.copy_(torch.where(module.threshold == OPEN, init, module.threshold))
            module.threshold.requires_grad_(gated)
    return model


def density(model: nn.Module) -> float:
    """Share of open gates over all gated convolutions in the model's last batch; average activation bits are 1 + this."""
    gated = [m for m in model.modules() if isinstance(m, FractionalConv2d)]
    return float(sum(int(m.num_high) for m in gated)) / max(1, sum(m.num_out for m in gated))
