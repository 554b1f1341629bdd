"""The layers that a search looks at: their sizes, and the error that names one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn


class SearchError(ValueError):
    """A model, layer or setting that cannot be searched; the message names it and says what would work."""


@dataclass(frozen=True)
class Geometry:
    """What a price may depend on: one layer and the size of its input. A linear layer is a 1 x 1 convolution of a 1 x 1 image."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    linear: bool = False

    @property
    def weights(self) -> int:
        """Weights without bias."""
        return self.out_channels * self.in_channels // self.groups * prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiplications per image."""
        return self.weights * prod(self.out_size)


def geometry(name: str, layer: Any, in_size: tuple[int, int], out_size: tuple[int, int]) -> Geometry:
    """Of a QuantConv2d or QuantLinear."""
    if isinstance(layer, nn.Linear):
        return Geometry(name, layer.in_features, layer.out_features, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1), (1, 1), linear=True)
    padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    return Geometry(name, *shape, in_size, out_size)


def size_of(x: Tensor) -> tuple[int, int]:
    """(H, W) of (N, C, H, W); (1, 1) of (N, C)."""
    return (int(x.shape[2]), int(x.shape[3])) if x.dim() == 4 else (1, 1)
