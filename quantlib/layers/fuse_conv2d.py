from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantlib.layers._base import Example, Layer
from quantlib.layers.fixed_point import FixedPoint
from quantlib.layers.scaled_int_conv2d import ScaledIntConv2d

Variant = Literal["half", "full"]


class FuSeConv2d(Layer, nn.Module):
    """Fully separable convolution: 1-D depthwise filters along rows and along columns in the place of a K x K depthwise convolution.

    Forward:   half: y = cat(row(x[:, :C/2]), column(x[:, C/2:])); full: y = cat(row(x), column(x)); row has kernels (1, K) and padding
               (0, K // 2), column (K, 1) and (K // 2, 0); the stride holds for both axes of both
    Gradient:  that of the convolutions
    Shapes:    x (N, C, H, W) -> y (N, C * copies, H', W') for half (C even), (N, 2 C * copies, H', W') for full; H' = ceil(H / stride) for
               odd K
    Arguments: channels; kernel_size K, odd; stride; variant; copies: independent filters per direction (the "x2" networks), row, row',
               column, column' in the output; conv: the class of the 1-D convolutions, called as torch.nn.Conv2d
               (functools.partial(ScaledIntConv2d, bits=4) for integers); bias of each of them
    State:     `rows.i.weight` (c, 1, 1, K), `columns.i.weight` (c, 1, K, 1), c = C / 2 or C, and the biases (c,)
    Source:    Selvam, Ganesan, Kumar, "FuSeConv", DATE 2021, arXiv 2105.13434, section III

    One batch norm over the concatenated channels is what the published code writes as one per direction.

    >>> FuSeConv2d(6, 3, stride=2, variant="full")(torch.zeros(1, 6, 5, 8)).shape
    torch.Size([1, 12, 3, 4])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        variant: Variant = "half",
        copies: int = 1,
        conv: Callable[..., nn.Module] = nn.Conv2d,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("half", "full"):
            raise ValueError(f"variant {variant!r}: a FuSeConv2d is half or full")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, so that rows and columns give maps of one size")
        if variant == "half" and channels % 2:
            raise ValueError(f"{channels} channels cannot be halved; use variant='full'")
        if copies < 1:
            raise ValueError(f"copies = {copies}: at least one filter per direction")
        self.channels, self.kernel_size, self.stride, self.variant, self.copies = channels, kernel_size, stride, variant, copies
        each, far = (channels // 2 if variant == "half" else channels), kernel_size // 2
        self.out_channels = 2 * copies * each

        def one(kernel: tuple[int, int], padding: tuple[int, int]) -> nn.Module:
            return conv(each, each, kernel, stride=stride, padding=padding, groups=each, bias=bias)

        self.rows = nn.ModuleList(one((1, kernel_size), (0, far)) for _ in range(copies))
        self.columns = nn.ModuleList(one((kernel_size, 1), (far, 0)) for _ in range(copies))

    def forward(self, x: Tensor) -> Tensor:
        across, down = (x[:, : self.channels // 2], x[:, self.channels // 2 :]) if self.variant == "half" else (x, x)
        return torch.cat([*(row(across) for row in self.rows), *(column(down) for column in self.columns)], 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, variant={self.variant!r}, copies={self.copies}"

    @staticmethod
    def examples() -> list[Example]:
        torch.manual_seed(12)
        x = torch.randn(3, 6, 7, 5)
        ints: Any = partial(ScaledIntConv2d, bits=4)
        modules = [
            FuSeConv2d(6, 3, conv=ints),
            FuSeConv2d(6, 5, 2, variant="full", conv=ints),
            FuSeConv2d(6, 3, 2, variant="half", copies=2, conv=ints),
        ]
        return [(nn.Sequential(FixedPoint(6, 3), m), x) for m in modules]
