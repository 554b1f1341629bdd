"""Optimizers and schedules as data: what a run used is printed with it, and nothing but the epoch decides the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam; weight decay is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr, self.betas, self.eps, weight_decay)


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW; weight decay shrinks the weights directly."""

    def build(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr, self.betas, self.eps, weight_decay)


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD."""

    momentum: float = 0.9
    nesterov: bool = False

    def build(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, self.momentum, 0, weight_decay, self.nesterov)


Optimizer = Adam | AdamW | SGD


@dataclass(frozen=True)
class Constant:
    """Factor 1."""

    def factor(self, epoch: int, epochs: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Factor 1 - e / over; over=0: the number of epochs of the run."""

    over: int = 0

    def factor(self, epoch: int, epochs: int) -> float:
        return max(0.0, 1 - epoch / (self.over or epochs))


@dataclass(frozen=True)
class Steps:
    """Times `by` from each epoch of `at` on. Epochs count from 0; `at` counts epochs of the run, or is a share of it where below 1."""

    at: tuple[float, ...]
    by: float = 0.1

    def factor(self, epoch: int, epochs: int) -> float:
        return self.by ** sum(epoch >= (point * epochs if point < 1 else point) for point in self.at)


@dataclass(frozen=True)
class Cosine:
    """From 1 to `floor` along half a cosine over the run."""

    floor: float = 0.0

    def factor(self, epoch: int, epochs: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@dataclass(frozen=True)
class Warmup:
    """(e + 1) / over times the following schedule's factor while e < over."""

    over: int
    then: Constant | Linear | Steps | Cosine = Linear()

    def factor(self, epoch: int, epochs: int) -> float:
        return min(1.0, (epoch + 1) / self.over) * self.then.factor(epoch, epochs)


Schedule = Constant | Linear | Steps | Cosine | Warmup


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors named `<parameter index>/<name>`, and everything else as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, plain


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict[str, dict[str, Any]]) -> None:
    """The inverse of `optimizer_state`; state of a parameter's shape takes its memory layout too, so that sums run in the same order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in plain.items()}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
