"""Predictions and what is counted on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.training.data import Data, Images

Score = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients; its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batched(function: Callable[[Tensor], Tensor], x: Tensor, size: int = 64) -> Tensor:
    """function on chunks of the batch axis, concatenated; no gradients."""
    with torch.no_grad():
        return torch.cat([function(chunk) for chunk in x.split(size)])


def predictions(model: nn.Module, data: Images, size: int = 64) -> Tensor:
    """Outputs (N, classes) of the model in eval mode on real images, on the CPU; its mode is restored."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        batches = data.read(torch.arange(len(data)).split(size), None, (0, 0))
        return torch.cat([model(x.to(device)).cpu() for x, _ in batches])


def measure(model: nn.Module, data: Data, scores: Mapping[str, Score], batch: int = 64, workers: int = 0) -> dict[str, float]:
    """Mean over all readable images of each score of (outputs, labels), the model in eval mode, on a GPU where there is one."""
    home = next(model.parameters()).device
    device = torch.device("cuda") if torch.cuda.is_available() else home
    totals, images = dict.fromkeys(scores, 0.0), 0
    with evaluating(model.to(device)):
        for x, y in data.read(torch.arange(len(data)).split(batch), None, (0, 0), workers):
            outputs = model(x.to(device)).cpu()
            totals = {name: total + float(scores[name](outputs, y).double().sum()) for name, total in totals.items()}
            images += len(y)
    model.to(home)
    return {name: total / max(images, 1) for name, total in totals.items()}


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest entry is the label, in [0, 1]."""
    return float((outputs.argmax(1) == labels).double().mean())


def right_answers(outputs: Tensor, labels: Tensor) -> Tensor:
    """(N,): whether the largest entry of each row is the label."""
    return outputs.argmax(1) == labels


def right_among(outputs: Tensor, labels: Tensor, most: int = 5) -> Tensor:
    """(N,): whether the label is among the `most` largest entries of each row (all of them where there are fewer)."""
    return (outputs.topk(min(most, outputs.shape[1]), 1).indices == labels[:, None]).any(1)


def confusion(outputs: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """counts[true][predicted]."""
    cell = labels * classes + outputs.argmax(1)
    return torch.bincount(cell, minlength=classes * classes).reshape(classes, classes).numpy()
