from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers._base import Example, Layer
from quantlib.layers.divided_clip import DividedClip
from quantlib.layers.tanh_conv2d import TanhConv2d
from quantlib.tails import RealInput


class NormalizedImage(Layer, nn.Module):
    """Image normalised per channel, then rounded to signed 8-bit integers of one step, as a first convolution on integers needs it.

    Forward:   v = the pixel, clip(rne(255 (x std + mean)), 0, 255); n = clip(rne((v / 255 - mean) / std / step), -128, 127); y = step n
    Gradient:  none: an image learns nothing
    Shapes:    x (N, C, H, W) normalised floats, or uint8 pixels, which are normalised inside; y (N, C, H, W) floats
    Ranges:    n in -128..127. In integers the input is the pixel, 0..255, and n comes from a table of 256 entries per channel
    Arguments: mean and std of pixel / 255, per channel; step (1/48 holds the usual ImageNet normalisation, -2.12..2.64, where a pixel is
               0.82 to 0.84 steps)
    State:     none; the table is computed in float64, so that float32 and float64 agree
    Errors:    ValueError for another number of channels, or when a pixel leaves -128..127

    Source:    the grid is ours: the published networks read real-valued images

    >>> image = NormalizedImage((0.5,), (0.25,))
    >>> (48 * image(torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(1, 1, 1, 4))).flatten().int().tolist()
    [-96, 0, 0, 96]
    """

    out_bits = 8
    mean: Tensor
    std: Tensor
    table: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], step: float = 1 / 48) -> None:
        super().__init__()
        self.step = float(step)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)
        exact_mean, exact_std = (torch.tensor(values, dtype=torch.float64).reshape(-1, 1) for values in (mean, std))
        codes = ((torch.arange(256, dtype=torch.float64) / 255 - exact_mean) / exact_std / step).round()
        if codes.min() < -128 or codes.max() > 127:
            raise ValueError(f"pixels reach {codes.min():.0f}..{codes.max():.0f} steps of {step:g}; a larger step keeps them in -128..127")
        self.register_buffer("table", codes, persistent=False)

    def pixel(self, x: Tensor) -> Tensor:
        """The pixel nearest to each normalised float, as a float."""
        return (x * self.std + self.mean).mul_(255).round_().clamp_(0, 255)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(self.table):
            raise ValueError(f"the image has {len(self.table)} channels on axis 1, got {tuple(x.shape)}")
        return self.rounded(self.pixel(x) if x.is_floating_point() else x, x.dtype if x.is_floating_point() else self.mean.dtype)

    def rounded(self, pixel: Tensor, dtype: torch.dtype) -> Tensor:
        first = 256 * torch.arange(len(self.table), device=pixel.device).reshape(1, -1, *[1] * (pixel.dim() - 2))
        return self.table.reshape(-1)[pixel.long() + first].to(dtype).mul_(self.step)

    def lower(self, g: Any, x: Any) -> Any:
        grid = Grid(-128, 127, self.step)
        if not isinstance(x, RealInput):  # an image whose grid the user stated
            return g.quantize(self.forward, x, grid)
        pixels = g.quantize(lambda t: self.pixel(t) / 255, x, Grid(0, 255, 1 / 255))
        return g.quantize(lambda t: self.rounded((t * 255).round(), t.dtype), pixels, grid)

    def extra_repr(self) -> str:
        return f"step=1/{1 / self.step:g}"

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(17)
        image = NormalizedImage((0.485, 0.456), (0.229, 0.224))
        return [(nn.Sequential(image, TanhConv2d(2, 4, 1), DividedClip(3)), 1.5 * torch.randn(3, 2, 5, 4))]
