"""Layers for quantization-aware training, one per file: `forward` in real numbers and, where Brevitas does not already say it, `lower` in integers."""

from quantlib.layers._base import Layer as Layer
from quantlib.layers.binary_conv2d import BinaryConv2d as BinaryConv2d
from quantlib.layers.binary_linear import BinaryLinear as BinaryLinear
from quantlib.layers.fixed_point import FixedPoint as FixedPoint
from quantlib.layers.fractional_conv2d import FractionalConv2d as FractionalConv2d
from quantlib.layers.quant_sign import QuantSign as QuantSign
from quantlib.layers.rprelu import RPReLU as RPReLU
from quantlib.layers.rsign import RSign as RSign
from quantlib.layers.thermometer_encoder import ThermometerEncoder as ThermometerEncoder
