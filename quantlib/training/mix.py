"""Mixed images: CutMix and mixup, each image of a batch with one partner, their labels weighted alike."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from quantlib.training.samples import DropoutSamples


class MixedImages(nn.Module):
    """`trained_as` of any model: mixes the images of a training batch with a permutation of them, and remembers how for `MixedLoss`.

    rate: both parameters of the Beta distribution that the share w of an image is drawn from; chance: that a batch is mixed at all.
    kind "mixup": w x + (1 - w) x[partner]. "cutmix": a rectangle of sides sqrt(1 - w) of the image's, about a pixel drawn at random and
    clipped at the borders, comes from the partner; then w is the share of pixels that stayed. Draws come from torch's generator of the CPU.

    Sources: mixup, Zhang et al., arXiv 1710.09412, equation 1; CutMix, Yun et al., arXiv 1905.04899, equations 1 and 2.
    """

    def __init__(self, model: nn.Module, rate: float, chance: float = 0.5, kind: Literal["cutmix", "mixup"] = "cutmix") -> None:
        super().__init__()
        if kind not in ("cutmix", "mixup") or rate <= 0 or not 0 <= chance <= 1:
            raise ValueError(f"kind is cutmix or mixup, rate positive, chance in [0, 1]; got {kind!r}, {rate}, {chance}")
        self.model, self.rate, self.chance, self.kind = model, rate, chance, kind
        self.weight, self.partner = 1.0, torch.zeros(0, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.mixed(x) if self.training else x)

    def mixed(self, x: Tensor) -> Tensor:
        self.weight, self.partner = 1.0, torch.arange(len(x), device=x.device)
        if float(torch.rand(())) >= self.chance:
            return x
        weight = float(torch.distributions.Beta(self.rate, self.rate).sample())
        self.partner = torch.randperm(len(x)).to(x.device)
        if self.kind == "mixup":
            self.weight = weight
            return weight * x + (1 - weight) * x[self.partner]
        rows, columns = rectangle(x.shape[2], x.shape[3], weight)
        x = x.clone()
        x[:, :, rows, columns] = x[self.partner, :, rows, columns]
        self.weight = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (x.shape[2] * x.shape[3])
        return x

    def __repr__(self) -> str:
        inner = f"{self.model!r}, " if isinstance(self.model, DropoutSamples) else ""
        return f"MixedImages({inner}rate={self.rate}, chance={self.chance}, kind={self.kind!r})"


def rectangle(height: int, width: int, weight: float) -> tuple[slice, slice]:
    """Rows and columns of a rectangle with share 1 - weight of the area, before the borders clip it."""
    side = (1 - weight) ** 0.5
    spans = []
    for length in (height, width):
        half, middle = int(length * side) // 2, int(torch.randint(length, ()))
        spans.append(slice(max(0, middle - half), min(length, middle + half)))
    return spans[0], spans[1]


class MixedLoss(nn.Module):
    """w loss(outputs, labels) + (1 - w) loss(outputs, labels of the partners), as the last batch of `images_of` was mixed.

    For a cross entropy, smoothed or not, that is the cross entropy with the weighted labels.
    """

    def __init__(self, loss: nn.Module, images_of: MixedImages) -> None:
        super().__init__()
        self.loss = loss
        self._of = (images_of,)  # not a submodule: the model is not the loss's

    def forward(self, outputs: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        (mix,) = self._of
        theirs = self.loss(outputs, labels[mix.partner], images) if mix.weight < 1 else 0.0
        return mix.weight * self.loss(outputs, labels, images) + (1 - mix.weight) * theirs

    def __repr__(self) -> str:
        return f"MixedLoss({self.loss!r})"
