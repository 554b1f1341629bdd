"""A moving average of the weights, which is what is tested and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """shadow <- d shadow + (1 - d) value for every parameter and every floating-point buffer (running means and variances) of a model.

    d = min(decay, (1 + n) / (10 + n)) after step n, from 1; the shadow starts as a copy. Counters and the like are those of the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow = {name: value.detach().clone() for name, value in self.values().items()}

    def values(self) -> dict[str, Tensor]:
        """What is averaged, by name; what several modules share has its first one."""
        found = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: value for name, value in found.items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self, n: int) -> None:
        d = min(self.decay, (1 + n) / (10 + n))
        for name, value in self.values().items():
            self.shadow[name].lerp_(value, 1 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages in the place of its weights; afterwards with its own again, bit by bit."""
        values = self.values()
        own = {name: value.detach().clone() for name, value in values.items()}
        try:
            self._fill(values, self.shadow)
            yield
        finally:
            self._fill(values, own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value.copy_(wanted[name])
