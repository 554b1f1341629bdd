"""The convolution under layers that differ by their weight quantizer alone."""

from __future__ import annotations

from typing import Any, ClassVar

from brevitas.nn import QuantConv2d

from quantlib.layers._base import DirectWeights, brevitas_options


class WeightBitsConv2d(DirectWeights, QuantConv2d):
    """torch.nn.Conv2d's arguments, without bias unless asked, and `bits` for the weight quantizer named by the class."""

    weights: ClassVar[Any]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        bits: int = 4,
        **quant: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            weight_quant=self.weights,
            weight_bit_width=bits,
            **brevitas_options(type(self).__name__, quant),
        )
        self.bits = bits
