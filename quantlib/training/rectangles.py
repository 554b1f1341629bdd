"""Test images that keep about the ratio of their sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from quantlib.training.data import UNREADABLE, Augment, ImageFiles


@dataclass(frozen=True, eq=False)
class RectangularFiles(ImageFiles):
    """ImageFiles whose test batches hold images of like ratios r = width / height (five decimals), in rising order.

    With r the mean of a batch, its images are (size / r, size) where r < 1, else (size, size r), rounded down to multiples of 8. Training
    images are those of `ImageFiles`. Source: fast.ai's training of ResNet-50, as FuSeConv's published script has it.
    """

    @cached_property
    def ratios(self) -> list[float]:
        """One per file; 1 for those that cannot be read."""
        from PIL import Image

        found = []
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    found.append(round(image.width / image.height, 5))
            except UNREADABLE:
                found.append(1.0)
        return found

    def rectangles(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """The images of all batches, sorted, in batches of the same sizes; (height, width) of each."""
        order = sorted((int(i) for rows in batches for i in rows), key=lambda i: self.ratios[i])
        for rows in torch.tensor(order, dtype=torch.long).split([len(rows) for rows in batches]):
            r = sum(self.ratios[int(i)] for i in rows) / len(rows)
            yield rows, (int(self.size / r) // 8 * 8, self.size) if r < 1 else (self.size, int(self.size * r) // 8 * 8)

    def read(
        self, batches: Sequence[Tensor], augment: Augment | None, key: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if augment is not None:
            yield from super().read(batches, augment, key, workers)
            return
        own = {f.name: getattr(self, f.name) for f in fields(ImageFiles)}
        for rows, window in self.rectangles([rows for rows in batches if len(rows)]):
            yield from ImageFiles(**own | {"window": window}).read([rows], None, key, workers)
