"""Optimizers, schedules and parameter groups as data: a run prints what it used, and nothing but the epoch decides a learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam; weight decay is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr, self.betas, self.eps, weight_decay)


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW; weight decay shrinks the weights directly."""

    def build(self, parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr, self.betas, self.eps, weight_decay)


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD."""

    momentum: float = 0.9
    nesterov: bool = False

    def build(self, parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, self.momentum, 0, weight_decay, self.nesterov)


@dataclass(frozen=True)
class RMSprop:
    """TensorFlow's RMSprop: v <- alpha v + (1 - alpha) g^2, m <- momentum m + g / sqrt(v + eps), w <- w - lr m; v and m start at 0.

    torch.optim.RMSprop adds eps behind the root. g contains weight_decay * w.
    """

    momentum: float = 0.9
    alpha: float = 0.9
    eps: float = 1e-3

    def build(self, parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return _RMSprop(parameters, lr, self.momentum, self.alpha, self.eps, weight_decay)


class _RMSprop(torch.optim.Optimizer):
    def __init__(self, parameters: Parameters, lr: float, momentum: float, alpha: float, eps: float, weight_decay: float) -> None:
        settings = {"lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for w in (p for p in group["params"] if p.grad is not None):
                state = self.state[w]
                if not state:
                    state["square"], state["momentum"] = torch.zeros_like(w), torch.zeros_like(w)
                g = w.grad.add(w, alpha=group["weight_decay"]) if group["weight_decay"] else w.grad
                v = state["square"].mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
                m = state["momentum"].mul_(group["momentum"]).addcdiv_(g, (v + group["eps"]).sqrt_())
                w.add_(m, alpha=-group["lr"])


Optimizer = Adam | AdamW | SGD | RMSprop


@dataclass(frozen=True)
class Constant:
    """Factor 1."""

    def factor(self, epoch: int, epochs: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Factor 1 - e / over; over=0: the number of epochs of the run, over=-1: one less, so that the last one has factor 0."""

    over: int = 0

    def factor(self, epoch: int, epochs: int) -> float:
        return max(0.0, 1 - epoch / (self.over if self.over > 0 else max(1, epochs + self.over)))


@dataclass(frozen=True)
class Steps:
    """Times `by` from each epoch of `at` on; a tuple instead holds the factor from each of them on.

    Epochs count from 0; `at` counts epochs of the run, or is a share of it where below 1.
    """

    at: tuple[float, ...]
    by: float | tuple[float, ...] = 0.1

    def factor(self, epoch: int, epochs: int) -> float:
        passed = sum(epoch >= (point * epochs if point < 1 else point) for point in self.at)
        if isinstance(self.by, tuple):
            return (1.0, *self.by)[passed]
        return self.by**passed


@dataclass(frozen=True)
class Cosine:
    """From 1 to `floor` along half a cosine over the run."""

    floor: float = 0.0

    def factor(self, epoch: int, epochs: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@dataclass(frozen=True)
class Staircase:
    """by^floor(e / every)."""

    by: float
    every: float

    def factor(self, epoch: int, epochs: int) -> float:
        return self.by ** math.floor(epoch / self.every)


@dataclass(frozen=True)
class Course:
    """Factors by hand: pieces (first epoch, factor at its start, factor at its end), in a straight line from step to step between.

    After step b (from 1) of the B of epoch e, the piece that e lies in is (e + b / B - start) / length of its way; that factor is the
    step's. The last piece ends with the run.
    """

    pieces: tuple[tuple[int, float, float], ...]

    def factor(self, epoch: int, epochs: int) -> float:
        return self.within(epoch, 1.0, epochs)

    def within(self, epoch: int, share: float, epochs: int) -> float:
        """The factor of the step that completes `share` of an epoch."""
        index = max(i for i, piece in enumerate(self.pieces) if piece[0] <= epoch)
        start, first, last = self.pieces[index]
        end = self.pieces[index + 1][0] if index + 1 < len(self.pieces) else epochs
        return first + (last - first) * (epoch + share - start) / (end - start) if last != first else first


@dataclass(frozen=True)
class Warmup:
    """(e + 1) / over times the following schedule's factor while e < over.

    first: (e + 1) / over alone while e < over; the following schedule has the epochs after that for its whole run.
    """

    over: int
    then: Constant | Linear | Steps | Cosine = Linear()
    first: bool = False

    def factor(self, epoch: int, epochs: int) -> float:
        if self.first and epoch >= self.over:
            return self.then.factor(epoch - self.over, epochs - self.over)
        return min(1.0, (epoch + 1) / self.over) * (1.0 if self.first else self.then.factor(epoch, epochs))


@dataclass(frozen=True)
class Ramp:
    """In a straight line from `start` at epoch 0 to 1 at epoch `over`, that epoch included; then the following schedule's factor."""

    over: int
    start: float
    then: Constant | Linear | Steps | Cosine | Staircase = Constant()

    def factor(self, epoch: int, epochs: int) -> float:
        return self.start + (1 - self.start) * epoch / self.over if epoch <= self.over else self.then.factor(epoch, epochs)


@dataclass(frozen=True)
class EachStep:
    """The schedule `of` with steps for epochs: step t of all T of the run has the factor of epoch t of T.

    EachStep(Linear(over=-1)) is DiracDeltaNet's published "linear" policy, lr (1 - t / (T - 1)) before iteration t.
    """

    of: Constant | Linear | Steps | Cosine | Staircase | Warmup | Ramp

    def factor(self, epoch: int, epochs: int) -> float:
        return self.of.factor(epoch, epochs)


Schedule = Constant | Linear | Steps | Cosine | Staircase | Course | Warmup | Ramp | EachStep


@dataclass(frozen=True)
class Group:
    """Parameters in whose names the regular expression `names` is found, with settings of their own; None: those of the run.

    A parameter belongs to the first group that finds it. The momentum of an epoch is momentum times momentum_schedule's factor. momentum
    and nesterov are SGD's.
    """

    names: str
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    schedule: Schedule | None = None
    momentum_schedule: Schedule = Constant()


def split_parameters(named: Iterable[tuple[str, nn.Parameter]], groups: Sequence[Group]) -> list[tuple[Group, list[nn.Parameter]]]:
    """Each group with its parameters, and last, as Group(""), those that no group takes. ValueError for a group that finds none."""
    parts: list[tuple[Group, list[nn.Parameter]]] = [(group, []) for group in (*groups, Group(""))]
    seen = []
    for name, parameter in named:
        seen.append(name)
        next(members for group, members in parts if re.search(group.names, name)).append(parameter)
    for group, members in parts[:-1]:
        if not members:
            raise ValueError(f"no parameter is left for the group {group.names!r}; there are {', '.join(seen)}")
    return parts if parts[-1][1] else parts[:-1]


def torch_groups(parts: Sequence[tuple[Group, list[nn.Parameter]]]) -> list[dict[str, Any]]:
    """As torch's optimizers take them; what a group leaves open is the optimizer's."""
    own = ("lr", "weight_decay", "momentum", "nesterov")
    return [
        {"params": members} | {name: getattr(group, name) for name in own if getattr(group, name) is not None} for group, members in parts
    ]


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
