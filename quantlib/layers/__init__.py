"""Layers for quantization-aware training, one per file: `forward` in real numbers and, where needed, `lower` in integers."""

from quantlib.layers._base import Layer as Layer
from quantlib.layers.binary_conv2d import BinaryConv2d as BinaryConv2d
from quantlib.layers.binary_linear import BinaryLinear as BinaryLinear
from quantlib.layers.fixed_point import FixedPoint as FixedPoint
from quantlib.layers.fractional_conv2d import FractionalConv2d as FractionalConv2d
from quantlib.layers.learned_scale_hard_tanh import LearnedScaleHardTanh as LearnedScaleHardTanh
from quantlib.layers.learned_scale_relu import LearnedScaleReLU as LearnedScaleReLU
from quantlib.layers.quant_sign import QuantSign as QuantSign
from quantlib.layers.rprelu import RPReLU as RPReLU
from quantlib.layers.rsign import RSign as RSign
from quantlib.layers.scaled_int_conv2d import ScaledIntConv2d as ScaledIntConv2d
from quantlib.layers.scaled_int_linear import ScaledIntLinear as ScaledIntLinear
from quantlib.layers.shared_hard_tanh import SharedHardTanh as SharedHardTanh
from quantlib.layers.thermometer_encoder import ThermometerEncoder as ThermometerEncoder
from quantlib.layers.trunc_avg_pool import TruncAvgPool as TruncAvgPool
