"""What people write around Brevitas layers: every such network converts, and every integer code equals the model's.

Each network is trained for a few batches (activation scales), then gets odd batch norm statistics: negative and zero gammas included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import (
    Int8ActPerTensorFixedPoint,
    Int8Bias,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int16Bias,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryWeightPerTensorConst,
    TruncTo8bit,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)
from brevitas.quant_tensor import QuantTensor
from brevitas_examples.bnn_pynq.models.CNV import CNV
from brevitas_examples.bnn_pynq.models.common import CommonActQuant, CommonWeightQuant
from brevitas_examples.bnn_pynq.models.FC import FC
from brevitas_examples.bnn_pynq.models.resnet import QuantBasicBlock, QuantResNet
from brevitas_examples.bnn_pynq.models.tensor_norm import TensorNorm
from strategies import assert_exact, flat, float64_output, graph_fields_hold, settle
from torch import Tensor, nn
from torch.nn import functional as F

import quantlib as ql
from quantlib import ops
from quantlib.layers import (
    FixedPoint,
    LearnedScaleHardTanh,
    LearnedScaleReLU,
    ScaledIntConv2d,
    ScaledIntLinear,
    SharedHardTanh,
    TruncAvgPool,
)

UINT8 = ql.Grid(0, 255, 1 / 255)


@dataclass(frozen=True)
class Network:
    """make() builds it; `input` is the image grid where it has no input quantizer; `ties`: some codes are decided at exact ties."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    input: ql.Grid | None = None
    ties: bool = False

    def images(self, count: int, random: torch.Generator) -> Tensor:
        if self.input is None:
            return torch.randn(count, *self.shape, generator=random)
        n = torch.randint(0, self.input.levels, (count, *self.shape), generator=random) * self.input.step + self.input.lo
        return (n.double() * torch.from_numpy(self.input.scale.copy())).float()


NETWORKS: dict[str, Network] = {}


def network(*shape: int, input: ql.Grid | None = None, ties: bool = False) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[make.__name__] = Network(make, shape, input, ties)
        return make

    return register


class Net(nn.Module):
    """A module from named layers and a forward function of them."""

    def __init__(self, run: Callable[..., object], **layers: nn.Module | nn.Parameter):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def identity(bits: int = 8, **options: object) -> nn.Module:
    return qnn.QuantIdentity(bit_width=bits, return_quant_tensor=True, **options)


def relu(bits: int = 4, **options: object) -> nn.Module:
    return qnn.QuantReLU(bit_width=bits, return_quant_tensor=True, **options)


def conv(i: int, o: int, k: int = 3, bits: int = 4, **options: object) -> nn.Module:
    options = {"padding": k // 2, "bias": False, **options}
    return qnn.QuantConv2d(i, o, k, weight_bit_width=bits, **options)


def linear(i: int, o: int, bits: int = 4, bias: bool = True, **options: object) -> nn.Module:
    return qnn.QuantLinear(i, o, bias=bias, weight_bit_width=bits, **options)


def bn(c: int) -> nn.Module:
    return nn.BatchNorm2d(c)


# ---------------------------------------------------------------- layers and quantizers


@network(3, 8, 8)
def conv_bn_relu() -> nn.Module:
    return nn.Sequential(identity(), conv(3, 6), bn(6), relu(), conv(6, 5, bits=3), bn(5), relu(2), nn.Flatten(), linear(5 * 64, 4))


@network(3, 7, 9)
def bias_and_unquantized_chain() -> nn.Module:
    return nn.Sequential(
        identity(6), conv(3, 6, bias=True), nn.PReLU(6), bn(6), nn.Hardtanh(-1.0, 0.8), identity(4), conv(6, 3, 1, bias=True)
    )


@network(3, 6, 6)
def hardtanh() -> nn.Module:
    tanh = lambda bits: qnn.QuantHardTanh(bit_width=bits, min_val=-1.0, max_val=1.0, return_quant_tensor=True)  # noqa: E731
    return nn.Sequential(tanh(8), conv(3, 8), bn(8), tanh(3), conv(8, 4, 1, bias=True), tanh(2), nn.Flatten(), linear(144, 3, bias=False))


@network(2, 6, 6)
def sigmoid_and_tanh() -> nn.Module:
    return nn.Sequential(
        identity(),
        conv(2, 4),
        bn(4),
        qnn.QuantSigmoid(bit_width=4, return_quant_tensor=True),
        conv(4, 4),
        bn(4),
        qnn.QuantTanh(bit_width=5, return_quant_tensor=True),
        conv(4, 2),
    )


def mixed_bits(weights: int, acts: int) -> nn.Module:
    act = relu(acts) if acts > 1 else qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst, return_quant_tensor=True)
    quant = (
        {"weight_quant": SignedBinaryWeightPerTensorConst, "weight_scaling_const": 0.5} if weights == 1 else {"weight_bit_width": weights}
    )
    middle = qnn.QuantConv2d(5, 5, 3, padding=1, bias=False, **quant)
    return nn.Sequential(identity(8), conv(3, 5, bits=8), bn(5), act, middle, bn(5), relu(acts if acts > 1 else 2), conv(5, 3, 1, bits=5))


for _w in range(1, 9):
    for _a in (1, 2, 3, 4, 5, 6, 7, 8):
        NETWORKS[f"mixed_w{_w}a{_a}"] = Network(lambda w=_w, a=_a: mixed_bits(w, a), (3, 5, 5), None, ties=False)


@network(3, 5, 5)
def bipolar() -> nn.Module:
    q = lambda: qnn.QuantIdentity(act_quant=CommonActQuant, bit_width=1, return_quant_tensor=True)  # noqa: E731
    c = lambda i, o, k: qnn.QuantConv2d(i, o, k, bias=False, weight_quant=CommonWeightQuant, weight_bit_width=1)  # noqa: E731
    return nn.Sequential(
        identity(),
        c(3, 6, 3),
        bn(6),
        q(),
        c(6, 5, 3),
        bn(5),
        q(),
        nn.Flatten(),
        linear(5, 3, bias=False, weight_quant=CommonWeightQuant, bits=1),
        TensorNorm(),
    )


@network(3, 6, 6)
def bipolar_padded() -> nn.Module:
    q = lambda: qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst, return_quant_tensor=True)  # noqa: E731
    return nn.Sequential(
        identity(),
        conv(3, 6),
        bn(6),
        q(),
        conv(6, 5, 3, 2),
        bn(5),
        q(),
        conv(5, 4, 3, bits=1, weight_quant=SignedBinaryWeightPerTensorConst),
    )


@network(3, 6, 6)
def ternary() -> nn.Module:
    w = {"weight_quant": SignedTernaryWeightPerTensorConst, "weight_scaling_const": 0.3, "weight_threshold": 0.5}
    q = lambda: qnn.QuantIdentity(act_quant=CommonActQuant, bit_width=2, return_quant_tensor=True)  # noqa: E731
    return nn.Sequential(
        identity(),
        qnn.QuantConv2d(3, 6, 3, bias=False, **w),
        bn(6),
        q(),
        qnn.QuantConv2d(6, 6, 3, bias=True, **w),
        bn(6),
        q(),
        conv(6, 2, 1),
    )


@network(3, 6, 6)
def zero_points() -> nn.Module:
    act = lambda: qnn.QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, return_quant_tensor=True)  # noqa: E731
    return nn.Sequential(act(), conv(3, 5, weight_quant=ShiftedUint8WeightPerTensorFloat), bn(5), act(), conv(5, 3, 1))


@network(3, 6, 6, ties=True)
def powers_of_two() -> nn.Module:
    """Fixed-point scales everywhere: accumulators fall exactly on ties of round half to even."""
    return nn.Sequential(
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, bit_width=6, return_quant_tensor=True),
        qnn.QuantConv2d(3, 6, 3, padding=1, bias=False, weight_quant=Int8WeightPerTensorFixedPoint, weight_bit_width=4),
        qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=3, return_quant_tensor=True),
        qnn.QuantConv2d(6, 6, 3, padding=1, bias=False, weight_quant=Int8WeightPerTensorFixedPoint, weight_bit_width=3),
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, bit_width=4, return_quant_tensor=True),
        qnn.QuantConv2d(6, 3, 1, bias=False, weight_quant=Int8WeightPerTensorFixedPoint),
    )


@network(3, 6, 6)
def input_and_output_quantizers_of_layers() -> nn.Module:
    io = {
        "input_quant": Int8ActPerTensorFixedPoint,
        "output_quant": Int8ActPerTensorFixedPoint,
        "input_bit_width": 5,
        "output_bit_width": 6,
    }
    return nn.Sequential(
        qnn.QuantConv2d(3, 5, 3, bias=True, weight_bit_width=4, return_quant_tensor=True, **io),
        nn.ReLU(),
        qnn.QuantConv2d(5, 4, 1, bias=False, **io),
        nn.Flatten(),
        qnn.QuantLinear(64, 3, bias=True, weight_bit_width=5, **io),
    )


@network(3, 6, 6)
def bias_quantizers() -> nn.Module:
    return nn.Sequential(
        identity(),
        conv(3, 5, bias=True, bias_quant=Int32Bias),
        bn(5),
        relu(),
        conv(5, 5, bias=True, bias_quant=Int16Bias),
        relu(3),
        conv(5, 4, bias=True, bias_quant=Int8Bias),
        relu(3),
        conv(4, 4, 1, bias=True, bias_quant=Int8BiasPerTensorFloatInternalScaling),
        nn.Flatten(),
        relu(4),
        linear(144, 3, bias_quant=Int32Bias),
    )


@network(4, 9, 8)
def geometry() -> nn.Module:
    return nn.Sequential(
        identity(),
        qnn.QuantConv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False, weight_bit_width=4),
        bn(8),
        relu(),
        qnn.QuantConv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False, weight_bit_width=5),
        bn(8),
        relu(3),
        qnn.QuantConv2d(8, 6, (1, 3), stride=(1, 2), padding="valid", bias=True),
        relu(3),
        qnn.QuantConv2d(6, 4, 3, padding=(0, 2), dilation=(2, 1), bias=False),
    )


@network(6, 7, 7)
def padding_same() -> nn.Module:
    return nn.Sequential(
        identity(), qnn.QuantConv2d(6, 4, (3, 5), padding="same", bias=False), bn(4), relu(), nn.Conv2d(4, 4, 1) and conv(4, 3, 1)
    )


@network(4, 6, 6)
def per_channel_activation_before_depthwise() -> nn.Module:
    scale = {
        "scaling_per_output_channel": True,
        "per_channel_broadcastable_shape": (1, 8, 1, 1),
        "scaling_stats_permute_dims": (1, 0, 2, 3),
    }
    return nn.Sequential(identity(), conv(4, 8), bn(8), relu(4, **scale), conv(8, 8, groups=8), bn(8), relu(3), conv(8, 3, 1))


@network(4, 6, 6)
def learned_scales_per_channel() -> nn.Module:
    return nn.Sequential(
        FixedPoint(6, 3),
        ScaledIntConv2d(4, 6, 1, bits=4),
        bn(6),
        LearnedScaleReLU(5, channels=6),
        ScaledIntConv2d(6, 6, 3, padding=1, groups=6, bits=5),
        bn(6),
        LearnedScaleReLU(4, return_quant_tensor=True),
        TruncAvgPool(6),
        nn.Flatten(),
        ScaledIntLinear(6, 5, bits=4),
    )


@network(3, 6, 6, input=UINT8)
def uint8_images() -> nn.Module:
    return nn.Sequential(conv(3, 6, bits=8), bn(6), relu(), nn.AvgPool2d(2), relu(4), nn.Flatten(), linear(54, 4))


@network(3, 6, 6, input=ql.Grid(-128, 127, 2**-7))
def signed_images() -> nn.Module:
    return nn.Sequential(conv(3, 6, bits=8), nn.ReLU(), bn(6), identity(5), conv(6, 2, bias=True))


@network(3, 6, 6)
def front_end_with_arithmetic() -> nn.Module:
    inner = nn.Sequential(
        qnn.QuantIdentity(act_quant=CommonActQuant, bit_width=8, min_val=-1.0, max_val=1 - 2**-7, narrow_range=False),
        conv(3, 4),
        bn(4),
        relu(),
        conv(4, 2),
    )
    return Net(lambda m, x: m.inner(2.0 * x - torch.tensor([1.0], device=x.device)), inner=inner)


@network(3, 6, 6)
def front_end_with_normalisation() -> nn.Module:
    """Per-channel mean and deviation as buffers in front of the input quantizer, one of them flipping the sign."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.3]).reshape(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.2, -0.25, 0.22]).reshape(1, 3, 1, 1))
            self.q, self.c = identity(6), conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.q((x - self.mean) / self.std))

    return Normalised()


@network(20)
def mlp() -> nn.Module:
    return nn.Sequential(
        identity(4),
        linear(20, 16),
        nn.BatchNorm1d(16),
        relu(2),
        nn.Dropout(0.3),
        linear(16, 16, bias=False),
        nn.BatchNorm1d(16),
        relu(3),
        linear(16, 5),
    )


@network(1, 6, 6)
def flatten_first() -> nn.Module:
    return Net(
        lambda m, x: m.body(x.view(x.shape[0], -1)),
        body=nn.Sequential(identity(3), linear(36, 8), nn.BatchNorm1d(8), relu(2), linear(8, 3)),
    )


# ---------------------------------------------------------------- pools


@network(3, 8, 8)
def max_pool_before_quantizer() -> nn.Module:
    return nn.Sequential(
        identity(), conv(3, 6), bn(6), nn.MaxPool2d(2), relu(), conv(6, 4), bn(4), nn.MaxPool2d(3, 2, 1), identity(3), conv(4, 2, 1)
    )


@network(3, 8, 8)
def max_pool_after_quantizer() -> nn.Module:
    return nn.Sequential(
        identity(), conv(3, 6), bn(6), relu(), nn.MaxPool2d(3, 2, 1), conv(6, 4), bn(4), identity(3), nn.MaxPool2d((2, 1)), conv(4, 2, 1)
    )


@network(3, 8, 8)
def max_pool_before_batch_norm() -> nn.Module:
    """A negative gamma behind the pool: it does not commute."""
    return nn.Sequential(
        identity(),
        conv(3, 6),
        nn.MaxPool2d(2),
        bn(6),
        relu(),
        conv(6, 4, bias=True),
        nn.MaxPool2d(2),
        nn.PReLU(4),
        bn(4),
        identity(4),
        conv(4, 2, 1),
    )


@network(3, 8, 8)
def max_pool_between_batch_norms() -> nn.Module:
    return nn.Sequential(identity(), conv(3, 6), bn(6), nn.MaxPool2d(2), bn(6), relu(), conv(6, 2))


@network(3, 8, 8)
def max_pool_dilated_and_ceil() -> nn.Module:
    return nn.Sequential(
        identity(), conv(3, 6), bn(6), relu(), nn.MaxPool2d(2, 1, dilation=2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(6, 2)
    )


@network(3, 8, 8)
def average_pool_before_quantizer() -> nn.Module:
    return nn.Sequential(
        identity(), conv(3, 6), bn(6), nn.AvgPool2d(2), relu(), conv(6, 4, bias=True), nn.AvgPool2d(2, 1), bn(4), identity(4), conv(4, 2, 1)
    )


@network(3, 8, 8)
def average_pool_after_quantizer() -> nn.Module:
    return nn.Sequential(
        identity(), conv(3, 6), bn(6), relu(), nn.AvgPool2d(3, 2, 1), conv(6, 4), bn(4), relu(), nn.AvgPool2d(2), relu(3), conv(4, 2, 1)
    )


@network(3, 8, 8, ties=True)
def average_pool_between_uses_of_one_quantizer() -> nn.Module:
    q = relu(4)
    return nn.Sequential(identity(), conv(3, 6), bn(6), q, nn.AvgPool2d(2), q, conv(6, 4, 1))


@network(3, 6, 6)
def global_average_pool() -> nn.Module:
    return nn.Sequential(identity(), conv(3, 8), bn(8), relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(8, 4))


@network(3, 6, 6)
def global_average_pool_before_quantizer() -> nn.Module:
    return nn.Sequential(identity(), conv(3, 8), bn(8), nn.AdaptiveAvgPool2d((1, 1)), identity(5), nn.Flatten(), linear(8, 4))


@network(3, 6, 6)
def mean_over_axes() -> nn.Module:
    body = nn.Sequential(identity(), conv(3, 8), bn(8), relu())
    return Net(lambda m, x: m.head(m.body(x).value.mean((2, 3))), body=body, head=linear(8, 3))


@network(3, 6, 6)
def mean_twice_over_one_axis() -> nn.Module:
    body = nn.Sequential(identity(), conv(3, 8), bn(8), relu())
    return Net(lambda m, x: m.head(m.body(x).value.flatten(2).mean(-1)), body=body, head=linear(8, 3))


@network(3, 6, 6)
def sum_and_amax() -> nn.Module:
    body = nn.Sequential(identity(), conv(3, 8), bn(8), relu(2))
    run = lambda m, x: (lambda v: m.head(m.q(torch.cat([v.sum((2, 3)), v.amax(dim=(-2, -1))], 1))))(m.body(x).value)  # noqa: E731
    return Net(run, body=body, head=linear(16, 3), q=identity(8))


def truncated(pool: Callable[[], nn.Module], size: int, bits: int) -> nn.Module:
    return nn.Sequential(identity(), conv(3, 6), bn(6), relu(bits), pool(), nn.Flatten(), linear(6 * size * size, 3))


for _mode in ("FLOOR", "ROUND"):
    for _k in (2, 4, 8):
        for _bits in (2, 4, 8):
            NETWORKS[f"trunc_pool_{_mode.lower()}_{_k}_{_bits}"] = Network(
                lambda m=_mode, k=_k, b=_bits: truncated(
                    lambda: qnn.TruncAvgPool2d(k, trunc_quant=TruncTo8bit, bit_width=b, float_to_int_impl_type=m, return_quant_tensor=True),
                    8 // k,
                    4,
                ),
                (3, 8, 8),
                ties=True,
            )


@network(3, 8, 8, ties=True)
def trunc_adaptive_pool() -> nn.Module:
    return truncated(lambda: qnn.TruncAdaptiveAvgPool2d((2, 2), trunc_quant=TruncTo8bit, bit_width=4, return_quant_tensor=True), 2, 4)


@network(3, 8, 8, ties=True)
def trunc_pool_signed_then_quantizer() -> nn.Module:
    return nn.Sequential(
        identity(),
        conv(3, 6),
        bn(6),
        identity(4),
        qnn.TruncAvgPool2d(2, trunc_quant=TruncTo8bit, bit_width=4, return_quant_tensor=True),
        relu(3),
        conv(6, 2),
    )


@network(3, 9, 7)
def padding_and_cropping() -> nn.Module:
    body = nn.Sequential(identity(), conv(3, 5), bn(5), relu())
    tail = nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), conv(5, 4, padding=0), bn(4), relu())
    return Net(
        lambda m, x: m.head(F.pad(m.tail(m.body(x).value[:, :, 1:-1, ::2]).value, (0, 1, 1, 0))), body=body, tail=tail, head=conv(4, 2)
    )


@network(3, 4, 4)
def upsampling() -> nn.Module:
    return nn.Sequential(
        identity(),
        conv(3, 4),
        bn(4),
        relu(),
        nn.Upsample(scale_factor=2),
        conv(4, 4),
        bn(4),
        nn.Upsample(scale_factor=2),
        relu(3),
        conv(4, 2),
    )


# ---------------------------------------------------------------- rearranging


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    assert c % groups == 0
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@network(4, 6, 6)
def channel_shuffle() -> nn.Module:
    return Net(
        lambda m, x: m.d(shuffle(m.c(shuffle(m.b(m.a(x)).value, 2)), 3)),
        a=identity(),
        b=nn.Sequential(conv(4, 6), bn(6), relu()),
        c=nn.Sequential(conv(6, 6, groups=2), bn(6), relu(3), nn.Identity()),
        d=conv(6, 2, 1),
    )


@network(4, 6, 6)
def channel_shuffle_before_quantizer() -> nn.Module:
    """The shuffle sits between batch norm and a per-tensor, then between batch norm and a per-channel quantizer."""
    scale = {
        "scaling_per_output_channel": True,
        "per_channel_broadcastable_shape": (1, 6, 1, 1),
        "scaling_stats_permute_dims": (1, 0, 2, 3),
    }
    return Net(
        lambda m, x: m.e(m.r2(shuffle(m.c(m.r1(shuffle(m.b(m.a(x)), 2))), 3))),
        a=identity(),
        b=nn.Sequential(conv(4, 6), bn(6)),
        r1=relu(),
        c=nn.Sequential(conv(6, 6, groups=2), bn(6)),
        r2=relu(3, **scale),
        e=conv(6, 6, groups=6),
    )


@network(6, 6, 6)
def shufflenet_unit() -> nn.Module:
    """Chunk, one branch convolved, concat with a shared quantizer, shuffle; twice."""

    class Unit(nn.Module):
        def __init__(self, q: nn.Module) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(3, 6, 1), bn(6), relu(4), conv(6, 6, groups=6), bn(6), relu(3), conv(6, 3, 1), bn(3))
            self.q = q

        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=1)
            return shuffle(torch.cat((left, self.q(self.body(right)).value), dim=1), 2)

    q = identity(4)
    return Net(lambda m, x: m.head(m.units(m.q(x).value)), q=q, units=nn.Sequential(Unit(q), Unit(q)), head=conv(6, 2, 1))


@network(3, 6, 6)
def concat_of_equal_scales() -> nn.Module:
    q = relu(4)
    return Net(
        lambda m, x: (lambda z: m.e(torch.cat([m.q(m.a(z)).value, m.q(m.b(z)).value], 1)))(m.i(x)),
        i=identity(),
        q=q,
        a=nn.Sequential(conv(3, 4), bn(4)),
        b=nn.Sequential(conv(3, 3, 1), bn(3)),
        e=conv(7, 2),
    )


@network(3, 6, 6)
def concat_requantized() -> nn.Module:
    """Two accumulators of different scales and batch norms, concatenated and then quantized by one quantizer."""
    return Net(
        lambda m, x: (lambda z: m.e(m.q(torch.cat([m.a(z), m.b(z)], 1))))(m.i(x)),
        i=identity(),
        q=relu(4),
        a=nn.Sequential(conv(3, 4), bn(4)),
        b=nn.Sequential(conv(3, 3, 1, bits=6), bn(3)),
        e=conv(7, 2),
    )


@network(3, 6, 6)
def concat_of_different_scales_requantized() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.e(m.q(torch.cat([m.a(z).value, m.b(z).value], 1))))(m.i(x)),
        i=identity(),
        q=identity(5),
        a=nn.Sequential(conv(3, 4), bn(4), relu(4)),
        b=nn.Sequential(conv(3, 3, 1, bits=6), bn(3), relu(3)),
        e=conv(7, 2),
    )


@network(3, 6, 6)
def concat_of_different_scales_before_depthwise() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.e(torch.cat([m.a(z).value, m.b(z).value], 1)))(m.i(x)),
        i=identity(),
        a=nn.Sequential(conv(3, 4), bn(4), relu(4)),
        b=nn.Sequential(conv(3, 3, 1, bits=6), bn(3), relu(3)),
        e=conv(7, 7, groups=7),
    )


@network(3, 6, 6)
def concat_of_quant_tensors() -> nn.Module:
    q = relu(4)
    return Net(
        lambda m, x: (lambda z: m.e(torch.cat([m.q(m.a(z)), m.q(m.b(z))], dim=1)))(m.i(x)),
        i=identity(),
        q=q,
        a=nn.Sequential(conv(3, 4), bn(4)),
        b=nn.Sequential(conv(3, 4, 1), bn(4)),
        e=conv(8, 2),
    )


@network(6, 6, 6)
def slices_and_splits() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        v = m.a(x).value
        one, two, three = v.split([1, 2, 3], dim=1)
        odd, flipped = v[:, 1::2], v[:, [5, 0, 2, 2]]
        return m.b(torch.cat([one, two, three[:, -1:], odd, flipped, v.narrow(1, 1, 2)], 1))

    return Net(run, a=nn.Sequential(identity(), conv(6, 6), bn(6), relu()), b=conv(13, 3, 1))


@network(4, 6, 6)
def slices_before_quantizers() -> nn.Module:
    """Halves of one accumulator through different tails and quantizers of one scale."""

    def run(m: Net, x: Tensor) -> Tensor:
        v = m.a(x)
        return m.e(torch.cat([m.q(v[:, :3]).value, m.q(torch.relu(-v[:, 3:])).value], 1))

    return Net(run, a=nn.Sequential(identity(), conv(4, 6), bn(6)), q=identity(4), e=conv(6, 3))


@network(4, 6, 6)
def pixel_shuffles() -> nn.Module:
    return nn.Sequential(
        identity(),
        nn.PixelUnshuffle(2),
        conv(16, 8),
        bn(8),
        relu(),
        nn.PixelShuffle(2),
        conv(2, 4),
        bn(4),
        nn.ChannelShuffle(2),
        relu(3),
        conv(4, 2),
    )


@network(3, 4, 4)
def flatten_before_quantizer() -> nn.Module:
    last = qnn.QuantReLU(bit_width=2)
    return nn.Sequential(
        identity(),
        conv(3, 4),
        bn(4),
        nn.Flatten(),
        relu(3),
        linear(64, 8, bias=False),
        nn.BatchNorm1d(8),
        last,
        nn.Unflatten(1, (2, 2, 2)),
        conv(2, 2, 1),
    )


@network(4, 6, 6)
def shift_convolution() -> nn.Module:
    """A shift: a constant depthwise 3x3 convolution with a single one per channel."""
    weight = torch.zeros(6, 1, 3, 3)
    for c in range(6):
        weight[c, 0, (0, 1, 2, 1, 1, 0)[c], (1, 0, 1, 2, 1, 0)[c]] = 1.0
    fixed = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    fixed.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(identity(), conv(4, 6), bn(6), relu(), fixed, conv(6, 6, 1), bn(6), relu(), fixed, relu(3), conv(6, 2))


@network(4, 6, 6)
def shift_as_function() -> nn.Module:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = torch.zeros(6, 1, 3, 3)
            w[torch.arange(6), 0, torch.arange(6) // 2, torch.arange(6) % 3] = 1.0
            self.register_buffer("w", w)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, padding=1, groups=x.size(1))

    return nn.Sequential(identity(), conv(4, 6), bn(6), qnn.QuantReLU(bit_width=4), Shift(), conv(6, 3, 1))


# ---------------------------------------------------------------- elementwise


@network(3, 6, 6)
def multipliers_and_biases() -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(1, 5, 1, 1))
            self.shift = nn.Parameter(torch.randn(5))
            self.alpha = nn.Parameter(torch.tensor(0.7))
            self.i, self.c, self.r, self.d = identity(), conv(3, 5), relu(), conv(5, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(self.i(x)) * self.gain + self.shift.view(1, -1, 1, 1)
            x = self.alpha * x / 1.7 - 0.25
            return -self.d(self.r(x)) * 0.5 + 1

    return Scaled()


def prelu_chain(slope: float) -> nn.Module:
    first, second = nn.PReLU(5, init=slope), nn.PReLU(init=slope / 2)
    with torch.no_grad():
        first.weight[0], first.weight[1] = 0.0, 1.0
    return nn.Sequential(
        identity(), conv(3, 5), bn(5), first, bn(5), second, identity(4), conv(5, 4), nn.LeakyReLU(0.1), bn(4), relu(3), conv(4, 2)
    )


NETWORKS["prelu_positive"] = Network(lambda: prelu_chain(0.3), (3, 6, 6))
NETWORKS["prelu_negative"] = Network(lambda: prelu_chain(-0.3), (3, 6, 6))
NETWORKS["prelu_steep"] = Network(lambda: prelu_chain(-2.0), (3, 6, 6))


@network(3, 5, 5)
def smooth_activations() -> nn.Module:
    return nn.Sequential(
        identity(4),
        conv(3, 5, bits=3),
        bn(5),
        nn.GELU(),
        identity(4),
        conv(5, 4, bits=2),
        nn.SiLU(),
        identity(5),
        conv(4, 4, 1),
        nn.Hardswish(),
        relu(4),
        conv(4, 2, 1),
    )


@network(3, 5, 5)
def functional_calls() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.n(m.c(m.q(x))), inplace=True)
        x = F.max_pool2d(x, 2, stride=1)
        x = m.r(F.hardtanh(x, -0.5, 2.5))
        x = F.avg_pool2d(x.value if isinstance(x, QuantTensor) else x, 2)
        x = m.r2(F.leaky_relu(torch.clamp(x, min=0.1) - 0.5, 0.2).clamp(max=1.5))
        return m.d(F.dropout(torch.flatten(x.value, 1), 0.5, m.training))

    return Net(run, q=identity(), c=conv(3, 5), n=bn(5), r=relu(), r2=relu(3), d=linear(20, 3))


@network(3, 6, 6)
def in_place_steps() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.body(x)
        y += 0.5
        y *= 2
        y = m.r(y.relu_())
        return m.d(y)

    return Net(run, body=nn.Sequential(identity(), conv(3, 5), bn(5), nn.ReLU(inplace=True)), r=relu(), d=conv(5, 2))


@network(3, 6, 6)
def square_and_abs() -> nn.Module:
    return Net(lambda m, x: m.d(m.q2(torch.abs(m.c(m.q(x))) ** 2)), q=identity(3), c=conv(3, 4, 1, bits=3), q2=relu(4), d=conv(4, 2))


# ---------------------------------------------------------------- joins


@network(3, 6, 6)
def residual_shared_quantizer() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.shared(m.stem(x))
        for block in (m.a, m.b):
            x = m.out(x + m.shared(block(x)))
            x = m.shared(x)
        return m.d(x)

    block = lambda: nn.Sequential(conv(4, 4), bn(4), relu(3), conv(4, 4), bn(4))  # noqa: E731
    return Net(run, stem=nn.Sequential(identity(), conv(3, 4), bn(4)), shared=relu(4), out=relu(4), a=block(), b=block(), d=conv(4, 2, 1))


@network(3, 6, 6)
def residual_shared_hard_tanh() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.s(m.stem(x))
        x = m.s.add(x, m.a(x))
        return m.d(m.s.add(x, m.b(x)))

    block = lambda: nn.Sequential(  # noqa: E731
        ScaledIntConv2d(4, 4, 3, padding=1, bits=4), bn(4), LearnedScaleReLU(4), ScaledIntConv2d(4, 4, 1, bits=4), bn(4)
    )
    return Net(run, stem=nn.Sequential(identity(), conv(3, 4), bn(4)), s=SharedHardTanh(4, 4.0), a=block(), b=block(), d=conv(4, 2, 1))


@network(3, 6, 6)
def residual_different_scales() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.a(z).value + m.b(z).value)))(m.i(x)),
        i=identity(),
        q=relu(4),
        a=nn.Sequential(conv(3, 4), bn(4), relu(4)),
        b=nn.Sequential(conv(3, 4, 1), bn(4), identity(3)),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def residual_different_scales_as_quant_tensors() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.a(z).value.add(m.b(z).value, alpha=0.5))))(m.i(x)),
        i=identity(),
        q=identity(4),
        a=nn.Sequential(conv(3, 4), bn(4), relu(4)),
        b=nn.Sequential(conv(3, 4, 1), bn(4), identity(3)),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def residual_one_unquantized_branch() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.n(m.c(z)) + z.value)))(m.i(x)),
        i=nn.Sequential(identity(), conv(3, 4), bn(4), relu(4)),
        c=conv(4, 4),
        n=bn(4),
        q=relu(4),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def residual_difference_and_product() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        z = m.i(x).value
        a, b = m.a(z), m.b(z).value
        return m.d(m.q2(m.q(b - 0.5 * a).value * b))

    return Net(
        run,
        i=nn.Sequential(identity(), conv(3, 4), bn(4), relu(4)),
        a=nn.Sequential(conv(4, 4), bn(4)),
        b=nn.Sequential(conv(4, 4, 1), bn(4), relu(3)),
        q=identity(4),
        q2=relu(4),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def residual_of_three() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        z = m.i(x).value
        return m.d(m.q(m.a(z) + z + m.b(z).value))

    return Net(
        run,
        i=nn.Sequential(identity(), conv(3, 4), bn(4), relu(3)),
        a=nn.Sequential(conv(4, 4), bn(4)),
        b=nn.Sequential(conv(4, 4, 1), bn(4), relu(2)),
        q=relu(4),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def residual_wide_output() -> nn.Module:
    """An 8-bit quantizer behind a join of an accumulator and a 4-bit code."""
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.n(m.c(z)) + z.value)))(m.i(x)),
        i=nn.Sequential(identity(), conv(3, 4), bn(4), relu(4)),
        c=conv(4, 4),
        n=bn(4),
        q=identity(8),
        d=conv(4, 2),
    )


@network(3, 6, 6, ties=True)
def residual_powers_of_two() -> nn.Module:
    act = lambda bits: qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=bits, return_quant_tensor=True)  # noqa: E731
    c = lambda i, o, k: qnn.QuantConv2d(i, o, k, padding=k // 2, bias=False, weight_quant=Int8WeightPerTensorFixedPoint, weight_bit_width=4)  # noqa: E731
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.a(z).value + z.value)))(m.i(x)),
        q=act(4),
        d=c(4, 2, 1),
        a=nn.Sequential(c(4, 4, 3), act(3)),
        i=nn.Sequential(qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, return_quant_tensor=True), c(3, 4, 3), act(4)),
    )


@network(3, 6, 6)
def residual_fixed_point_grid() -> nn.Module:
    """Two wide branches with different scales: each gets a fixed-point grid of its own, stated in the model."""
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.f(m.n(m.a(z))) + m.f(m.b(z)))))(m.i(x)),
        i=identity(),
        f=FixedPoint(10, 4),
        n=bn(4),
        a=conv(3, 4, bits=5),
        b=conv(3, 4, 1, bits=3),
        q=relu(4),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def accumulators_of_one_scale() -> nn.Module:
    """The same convolution applied twice, summed before the quantizer."""
    return Net(
        lambda m, x: (lambda z: m.d(m.q(m.c(z) + m.c(z.value.flip(-1)))))(m.i(x)),
        i=identity(),
        c=conv(3, 4, bits=3),
        q=relu(4),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def doubled_and_reused() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.d(m.q(z + z).value + m.q(z).value))(m.c(m.i(x))),
        i=identity(4),
        c=conv(3, 4, bits=3),
        q=relu(4),
        d=conv(4, 2),
    )


@network(3, 6, 6)
def eltwise_add() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: m.d(m.add(m.a(z), m.b(z))))(m.i(x)),
        i=identity(),
        add=qnn.QuantEltwiseAdd(return_quant_tensor=True),
        a=nn.Sequential(conv(3, 4), bn(4)),
        b=nn.Sequential(conv(3, 4, 1), bn(4)),
        d=conv(4, 2),
    )


@network(4, 6, 6)
def option_a_shortcut() -> nn.Module:
    """Subsampled by a slice, channels padded with zeros: the shortcut without parameters."""

    def run(m: Net, x: Tensor) -> Tensor:
        z = m.i(x)
        short = F.pad(z.value[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return m.d(m.q(m.s(m.n(m.c(z))).value + short))

    return Net(
        run, i=nn.Sequential(identity(), conv(4, 4), bn(4), relu(4)), c=conv(4, 6, stride=2), n=bn(6), s=relu(4), q=relu(4), d=conv(6, 2)
    )


@network(4, 6, 6)
def option_a_before_quantizer() -> nn.Module:
    """Zero padding of channels between an accumulator and a quantizer."""
    return Net(
        lambda m, x: m.d(m.q(F.pad(torch.relu(m.c(m.i(x))), (0, 0, 0, 0, 1, 1)))),
        i=identity(),
        c=conv(4, 4, bits=3),
        q=relu(4),
        d=conv(6, 2),
    )


@network(3, 6, 6)
def squeeze_and_excite() -> nn.Module:
    """A per-channel gate times a feature map."""

    def run(m: Net, x: Tensor) -> Tensor:
        z = m.i(x).value
        gate = m.e(m.r(m.s(F.adaptive_avg_pool2d(z, 1))))
        return m.d(m.q(z * gate.value))

    return Net(
        run,
        i=nn.Sequential(identity(), conv(3, 6), bn(6), relu(4)),
        s=conv(6, 3, 1, bias=True),
        r=relu(4),
        e=nn.Sequential(conv(3, 6, 1, bias=True), qnn.QuantSigmoid(bit_width=3, return_quant_tensor=True)),
        q=relu(4),
        d=conv(6, 2),
    )


@network(3, 6, 6)
def squeeze_and_excite_flat() -> nn.Module:
    """The gate computed on vectors by linear layers, viewed as (N, C, 1, 1)."""

    def run(m: Net, x: Tensor) -> Tensor:
        z = m.i(x).value
        n, c, _, _ = z.size()
        gate = m.e(m.r(m.s(z.mean(dim=[2, 3])))).value.view(n, c, 1, 1)
        return m.d(m.q(z * gate.expand_as(z)))

    return Net(
        run,
        i=nn.Sequential(identity(), conv(3, 6), bn(6), relu(4)),
        s=linear(6, 3),
        r=relu(4),
        e=nn.Sequential(linear(3, 6), qnn.QuantSigmoid(bit_width=3, return_quant_tensor=True)),
        q=relu(4),
        d=conv(6, 2),
    )


@network(3, 6, 6)
def gate_on_accumulator() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        z = m.i(x)
        return m.d(m.q(m.n(m.c(z)) * m.g(m.h(z)).value))

    return Net(
        run,
        i=nn.Sequential(identity(), conv(3, 4), bn(4), relu(4)),
        c=conv(4, 4),
        n=bn(4),
        h=conv(4, 4, 1),
        q=identity(4),
        d=conv(4, 2),
        g=qnn.QuantSigmoid(bit_width=2, return_quant_tensor=True),
    )


# ---------------------------------------------------------------- modules and Python around them


@network(3, 6, 6)
def shared_module() -> nn.Module:
    """One convolution and one quantizer at three places, with other scales in front each time."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.i(x)
        for _ in range(3):
            x = m.q(m.n(m.c(x)))
        return m.d(x)

    return Net(run, i=identity(5), c=conv(3, 3), n=bn(3), q=relu(3), d=conv(3, 2))


@network(3, 6, 6)
def module_list_and_asserts() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        assert x.dim() == 4 and x.shape[1] == 3, "images expected"
        for layer in m.layers:
            x = layer(x)
            if isinstance(layer, qnn.QuantReLU):
                assert isinstance(x, QuantTensor) and x.scale is not None and x.bit_width is not None
        (b, *rest), half = x.shape, x.size(1) // 2
        assert len(rest) == 3
        return m.head(x.value.reshape(b, half, -1).transpose(1, 2).reshape(b, -1))

    return Net(run, layers=nn.ModuleList([identity(), conv(3, 4), bn(4), relu(), conv(4, 4), bn(4), relu(2)]), head=linear(144, 3))


@network(3, 6, 6)
def returns_quant_tensor() -> nn.Module:
    return nn.Sequential(identity(), conv(3, 4), bn(4), relu(4))


@network(3, 6, 6)
def returns_tuple() -> nn.Module:
    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = m.q(m.n(m.c(m.i(x))))
        return m.a(z), m.b(z.value.mean((2, 3))), z.value

    return Net(run, i=identity(), c=conv(3, 4), n=bn(4), q=relu(), a=conv(4, 2), b=linear(4, 3))


@network(3, 6, 6)
def returns_dictionary() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: {"map": m.a(z), "vector": m.b(z.value.flatten(1))})(m.q(m.c(m.i(x)))),
        i=identity(),
        c=conv(3, 4),
        q=relu(),
        a=conv(4, 2),
        b=linear(144, 3),
    )


@network(3, 6, 6)
def output_of_two_accumulators() -> nn.Module:
    """Two wide branches of different scales summed at the output: the decode adds them."""
    return Net(
        lambda m, x: (lambda z: m.a(z) + 0.5 * m.n(m.b(z)))(m.i(x)), i=identity(), a=conv(3, 4, bits=5), b=conv(3, 4, 1, bits=3), n=bn(4)
    )


@network(3, 6, 6)
def output_after_global_pool() -> nn.Module:
    return nn.Sequential(identity(), conv(3, 8), bn(8), relu(), conv(8, 5, 1, bias=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@network(3, 6, 6)
def output_concat_of_scales() -> nn.Module:
    return Net(
        lambda m, x: (lambda z: torch.cat([m.a(z).flatten(1), m.n(m.b(z)).mean((2, 3))], 1))(m.i(x)),
        i=identity(),
        a=conv(3, 2),
        b=conv(3, 4, 1),
        n=bn(4),
    )


@network(3, 6, 6)
def dropout_everywhere() -> nn.Module:
    return nn.Sequential(
        nn.Dropout2d(0.2), identity(), nn.Dropout(), conv(3, 4), nn.Dropout(), bn(4), relu(), nn.Dropout2d(), nn.Flatten(), linear(144, 3)
    )


@network(3, 6, 6)
def operators() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = operator.add(m.c(m.q(x)), 0.125)
        y = torch.sub(torch.mul(y, 1.5), 0.25)
        y = torch.add(y, torch.ones(()), alpha=2)
        y = 1 - y
        return m.d(m.r(torch.div(y, m.norm)))

    return Net(run, q=identity(), c=conv(3, 5), r=relu(), d=conv(5, 2), norm=nn.Parameter(torch.tensor([2.0])))


@network(3, 6, 6)
def per_channel_and_per_tensor_weights() -> nn.Module:
    return nn.Sequential(
        identity(),
        conv(3, 6, weight_quant=Int8WeightPerChannelFloat),
        relu(),
        conv(6, 6, weight_quant=Int8WeightPerTensorFloat),
        bn(6),
        relu(),
        conv(6, 2),
    )


@network(3, 6, 6)
def quantizer_on_quantizer() -> nn.Module:
    """Requantization of codes: 8 to 3 bits, then the same bits with another scale."""
    return nn.Sequential(identity(), identity(3), conv(3, 6), bn(6), relu(8), nn.Hardtanh(0.1, 1.0), relu(3), identity(4), conv(6, 2))


@network(3, 6, 6)
def eight_bit_activations() -> nn.Module:
    q = lambda: qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, return_quant_tensor=True)  # noqa: E731
    return nn.Sequential(
        identity(), conv(3, 8, bits=8), bn(8), q(), conv(8, 8, bits=8), nn.PReLU(8), bn(8), identity(8), conv(8, 2, bits=8)
    )


# ---------------------------------------------------------------- found by looking for trouble


def step(run: Callable[..., object], bits: int = 4, weight_bits: int = 3, **parts: object) -> nn.Module:
    """identity - conv - run - identity - conv."""
    chain = {"i": identity(bits), "c": conv(4, 4, bits=weight_bits), "q": identity(4), "d": conv(4, 2)}
    return Net(lambda m, x: m.d(m.q(run(m, m.c(m.i(x))))), **{**chain, **parts})


@network(4, 6, 6)
def padded_average_pool_of_shifted_values() -> nn.Module:
    """The zeros around the map stand for real 0, not for the accumulator's: only without an offset does the pool come first."""
    return step(lambda m, x: F.avg_pool2d(x * m.g, 3, 1, 1), g=nn.Parameter(torch.tensor([0.5, -1.5, 2.0, 1.0]).reshape(4, 1, 1)))


@network(4, 6, 6)
def comparisons() -> nn.Module:
    return step(lambda m, x: torch.where(x > 0, x, 0.1 * x) + 0.2 * (x >= m.t) * x, t=nn.Parameter(torch.tensor(0.3)))


@network(4, 6, 6)
def largest_of_two() -> nn.Module:
    one, two = nn.Sequential(conv(4, 4), relu(4)), nn.Sequential(conv(4, 4), identity(3))
    return Net(
        lambda m, x: (lambda z: m.d(m.q(torch.max(m.a(z).value, m.b(z).value))))(m.i(x)),
        i=identity(),
        a=one,
        b=two,
        q=identity(5),
        d=conv(4, 2),
    )


@network(4, 6, 6)
def smallest_of_accumulator_and_code() -> nn.Module:
    two = nn.Sequential(conv(4, 4), identity(3))
    return Net(
        lambda m, x: (lambda z: m.d(m.q(torch.minimum(m.a(z), m.b(z).value))))(m.i(x)),
        i=identity(),
        a=conv(4, 4),
        b=two,
        q=identity(5),
        d=conv(4, 2),
    )


@network(4, 6, 6)
def zeros_concatenated() -> nn.Module:
    run = lambda m, x: (lambda z: m.d(torch.cat([z, torch.zeros_like(z), z * 0], 1)))(m.r(m.c(m.i(x))).value)  # noqa: E731
    return Net(run, i=identity(), c=conv(4, 4), r=relu(), d=conv(12, 2))


@network(4, 6, 6)
def a_value_used_a_million_times() -> nn.Module:
    """Every line doubles the number of paths from the accumulator to the quantizer."""

    def run(m: Net, x: Tensor) -> Tensor:
        for _ in range(24):
            x = (x + torch.relu(x)) * 0.6
        return x

    return step(run)


@network(4, 6, 6)
def pools_and_pads_on_the_real_input() -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(2), nn.ZeroPad2d(1), identity(), conv(4, 2))


@network(6, 6, 3)
def channels_last_images() -> nn.Module:
    return Net(lambda m, x: m.c(m.i(x.permute(0, 3, 1, 2))), i=identity(), c=conv(3, 2))


@network(3, 6, 6, input=ql.Grid(0, 255, 1.0))
def division_by_255() -> nn.Module:
    mean = nn.Parameter(torch.rand(1, 3, 1, 1))
    return Net(lambda m, x: m.c(m.i((x / 255.0 - m.mean) / 0.25)), i=identity(), c=conv(3, 2), mean=mean)


@network(4, 6, 6)
def grouped_convolution_of_a_concat() -> nn.Module:
    """Two scales, each feeding its own group."""
    run = lambda m, x: (lambda z: m.d(torch.cat([m.p(m.a(z)).value, m.q(m.b(z)).value], 1)))(m.i(x))  # noqa: E731
    return Net(run, i=identity(), a=conv(4, 4), b=conv(4, 4), p=relu(3), q=relu(5), d=conv(8, 4, groups=2))


@network(4, 6, 6, ties=True)
def sign_as_a_function() -> nn.Module:
    return Net(lambda m, x: m.d(torch.sign(m.c(m.i(x)))), i=identity(4), c=conv(4, 4, bits=3), d=conv(4, 2))


@network(3, 6, 6, input=ql.Grid(10, 20, 0.1))
def images_above_zero() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(3, 4), bn(4), relu(), conv(4, 2))


@network(3, 6, 6, input=ql.Grid(-20, -10, 0.1))
def images_below_zero() -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d(1), conv(3, 4), nn.MaxPool2d(3, 2, 1), bn(4), relu(), conv(4, 2))


@network(3, 6, 6, input=ql.Grid(0, 15, [[[0.1]], [[0.2]], [[0.3]]]))
def images_with_a_scale_per_channel() -> nn.Module:
    return nn.Sequential(conv(3, 3, groups=3), bn(3), relu(), conv(3, 2))


@network(4, 6, 6)
def names_that_are_no_identifiers() -> nn.Module:
    layers = {
        "3x3 conv": conv(4, 4),
        "a-b": relu(),
        "a_b": conv(4, 4),
        "int": relu(3),
        "for": conv(4, 4),
        "a+b": relu(3),
        "\u00e4": conv(4, 2),
    }

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.input(x)
        for layer in m.network.values():
            x = layer(x)
        return x

    return Net(run, input=identity(), network=nn.ModuleDict(layers))


@network(4, 6, 6)
def a_single_layer() -> nn.Module:
    return qnn.QuantIdentity(bit_width=4)


@network(4, 6, 6)
def disabled_quantizers() -> nn.Module:
    off = lambda kind: kind(act_quant=None)  # noqa: E731
    return nn.Sequential(identity(), conv(4, 4), off(qnn.QuantReLU), identity(4), off(qnn.QuantIdentity), conv(4, 2))


@network(4, 6, 6)
def stacked_and_interleaved() -> nn.Module:
    run = lambda m, x: (lambda z: m.d(torch.stack([m.q(m.a(z)).value, m.q(m.b(z)).value], 2).flatten(1, 2)))(m.i(x))  # noqa: E731
    return Net(run, i=identity(), a=conv(4, 3), b=conv(4, 3), q=relu(3), d=conv(6, 2))


@network(4, 6, 6)
def all_zero_weights() -> nn.Module:
    model = nn.Sequential(identity(4), conv(4, 4), bn(4), relu(), conv(4, 2))
    with torch.no_grad():
        model[1].weight[1:3] = 0
        model[4].weight.zero_()
    return model


@network(4, 6, 6)
def parametrized_weights() -> nn.Module:
    return nn.Sequential(identity(), nn.utils.parametrizations.weight_norm(conv(4, 4)), relu(), conv(4, 2))


@network(4, 6, 6)
def hooks_that_only_look() -> nn.Module:
    model = nn.Sequential(identity(), conv(4, 4), relu(), conv(4, 2))
    model[1].register_forward_hook(lambda m, args, y: None)
    return model


@network(4, 6, 6)
def one_by_one() -> nn.Module:
    return nn.Sequential(identity(), conv(4, 1), relu(1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), linear(1, 1), relu(3), linear(1, 2))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DataParallel", "compile"])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = NETWORKS["conv_bn_relu"]
    model = settle(net.make(), lambda r: net.images(8, r))
    plain, wrapped = ql.convert(model, net.shape), ql.convert(wrap(model), net.shape)
    assert str(plain) == str(wrapped)
    assert ql.verify(wrap(model), wrapped, net.images(4, torch.Generator().manual_seed(0))).ok


MANY = {n for n in NETWORKS if n.startswith("mixed_w") and n[7] != n[9]}  # all pairs of bit widths; the equal ones run by default


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in MANY else ()) for n in sorted(NETWORKS)])
def test_network_is_exact(name: str) -> None:
    net = NETWORKS[name]
    torch.manual_seed(len(name))
    model = settle(net.make(), lambda r: net.images(16, r))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = ql.convert(model, net.shape, net.input)
    x = net.images(12, torch.Generator().manual_seed(5))
    assert_exact(model, graph, x, net.ties)
    graph_fields_hold(graph, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model was changed"
    with torch.no_grad():
        assert len(flat(model(x))) == len(graph.decodes)


# ---------------------------------------------------------------- the networks that Brevitas itself ships


def tfc(weights: int, acts: int) -> nn.Module:
    return FC(10, weights, acts, 2 if acts == 2 else 1, 1, (64, 64, 64))


def resnet18() -> nn.Module:
    return QuantResNet(QuantBasicBlock, [2, 2, 2, 2], act_bit_width=4, weight_bit_width=4)


STOCK = {
    "tfc_1w1a": Network(lambda: tfc(1, 1), (1, 28, 28)),
    "tfc_1w2a": Network(lambda: tfc(1, 2), (1, 28, 28)),
    "tfc_2w2a": Network(lambda: tfc(2, 2), (1, 28, 28)),
    "cnv_1w1a": Network(lambda: CNV(10, 1, 1, 8, 3), (3, 32, 32)),
    "cnv_1w2a": Network(lambda: CNV(10, 1, 2, 8, 3), (3, 32, 32)),
    "cnv_2w2a": Network(lambda: CNV(10, 2, 2, 8, 3), (3, 32, 32)),
    "resnet18_4w4a": Network(resnet18, (3, 32, 32), UINT8),
}
SLOW = {"cnv_1w2a", "resnet18_4w4a"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in STOCK])
def test_stock_network_is_exact(name: str) -> None:
    net = STOCK[name]
    torch.manual_seed(1)
    batch = 4 if name.startswith("resnet") else 8
    model = settle(net.make(), lambda r: net.images(batch, r) if net.input else torch.rand(batch, *net.shape, generator=r), steps=2)
    graph = ql.convert(model, net.shape, net.input)
    random = torch.Generator().manual_seed(3)
    x = net.images(batch, random) if net.input else torch.randint(0, 256, (batch, *net.shape), generator=random) / 255
    # the plain float64 model may differ at structural ties, which these have: accumulators that are exactly 0
    check = ql.verify(model, graph, x)
    assert check.ok, str(check)
    graph_fields_hold(graph, x)
    (want,) = float64_output(model, x)
    if all(r.float64 == 0 for r in check.rows):
        # float64 sums in another order, and one rounding to float32
        torch.testing.assert_close(ql.run(graph, x).double(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max() + 1))
    part = ql.run(graph, x[:3], integers=True)
    assert all(torch.equal(v[:3], part[k]) for k, v in ql.run(graph, x, integers=True).items())


class SqueezeExcite(nn.Module):
    """Codes, a gate per channel computed from their mean, and the product behind a step that is not monotone."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.mean = LearnedScaleHardTanh(6, init=3.0), LearnedScaleHardTanh(8, init=3.0)
        self.fc, self.gate = ScaledIntLinear(6, 6, bits=5), LearnedScaleReLU(7, init=1.0)
        self.product, self.out = LearnedScaleHardTanh(8, init=2.0), LearnedScaleHardTanh(4, init=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.x(x)
        gate = self.gate(F.hardsigmoid(self.fc(self.mean(x.mean((2, 3))))))
        return self.out(F.hardswish(self.product(gate.view(-1, 6, 1, 1) * x)))


def test_squeeze_excite_multiplies_integers() -> None:
    torch.manual_seed(4)
    model = SqueezeExcite().eval()
    graph = ql.convert(model, (6, 5, 4))
    product = next(n for n in graph.nodes if isinstance(n.op, ops.Multiply))
    assert [graph.by_name[i].type.shape for i in product.inputs] == [(6, 5, 4), (6, 1, 1)]
    x = 3 * torch.randn(4, 6, 5, 4)
    assert ql.verify(model, graph, x).ok
    assert torch.equal(ql.run(graph, x), model.double()(x.double()).float())
