"""Several dropout masks on one pass of the backbone: the classifier is run once per mask, losses and logits are averaged.

Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", arXiv 1905.09788, as the MicroNet submission of quantised
ProxylessNAS trained with it: the masks fall on values that a quantizer has put on its grid, and scale and bit width go along unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.training.metrics import right_answers


class DropoutSamples(nn.Module):
    """`trained_as` of a model with a method `pooled` and a layer `output`, model(x) = output(pooled(x)).

    Forward:  training: stack of output(dropout_k(pooled(x))), k = 1..samples: (N, C, H, W) -> (samples, N, classes). Dropped values are 0,
              the others v / (1 - rate), no longer on their grid; a quantized tensor keeps its scale and bit width. Otherwise model(x)
    Gradient: the backbone's is that of the sum of all samples, in one backward pass
    """

    def __init__(self, model: nn.Module, samples: int, rate: float) -> None:
        super().__init__()
        if samples < 1 or not 0 <= rate < 1:
            raise ValueError(f"samples are 1 or more and the rate is in [0, 1), got samples={samples}, rate={rate}")
        if not (callable(getattr(model, "pooled", None)) and isinstance(getattr(model, "output", None), nn.Module)):
            raise TypeError(f"{type(model).__name__} has no method pooled(x) and layer output; dropout samples lie between the two")
        self.model, self.samples, self.rate = model, samples, rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.model(x)
        model: Any = self.model
        pooled = model.pooled(x)
        return torch.stack([model.output(dropped(pooled, self.rate)) for _ in range(self.samples)])

    def __repr__(self) -> str:
        return f"DropoutSamples(samples={self.samples}, rate={self.rate})"


def dropped(x: Any, rate: float) -> Any:
    """Dropout on a tensor, or on the value of a quantized tensor."""
    return F.dropout(x, rate) if isinstance(x, Tensor) else x.set(value=F.dropout(x.value, rate))


class MeanOverSamples(nn.Module):
    """The mean of a loss over outputs (samples, N, classes); outputs (N, classes) are one sample."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        samples = outputs if outputs.dim() == 3 else outputs[None]
        return torch.stack([self.loss(sample, labels, images) for sample in samples]).mean()

    def __repr__(self) -> str:
        return f"MeanOverSamples({self.loss!r})"


def prediction(outputs: Tensor) -> Tensor:
    """(samples, N, classes) -> the mean of the logits, (N, classes); (N, classes) as they are."""
    return outputs.mean(0) if outputs.dim() == 3 else outputs


def right_on_average(outputs: Tensor, labels: Tensor) -> Tensor:
    """(N,): whether the largest entry of each row of `prediction` is the label."""
    return right_answers(prediction(outputs), labels)
