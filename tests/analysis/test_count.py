"""Counts equal those of plain loops and of a hook; bit widths are what the layers say; the model stays as it was."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from brevitas import nn as qnn
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from quantlib.analysis import AnalysisError, count
from quantlib.analysis._walk import walk
from quantlib.layers import (
    BinaryConv2d,
    FixedPoint,
    FractionalConv2d,
    LearnedScaleReLU,
    QuantSign,
    ScaledIntConv2d,
    ScaledIntLinear,
    SharedHardTanh,
    ThermometerEncoder,
    TruncAvgPool,
)


def looped(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions of a window along one axis, found by walking."""
    found, at = 0, -padding
    while at + dilation * (kernel - 1) < size + padding:
        found, at = found + 1, at + stride
    return found


@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    functional=st.booleans(),
)
def test_convolutions_by_loops(size, kernel, stride, padding, dilation, groups, per_group, bias, functional):
    c_in, c_out = groups * per_group[0], groups * per_group[1]
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias)
    axes = [looped(*a) for a in zip(size, kernel, stride, padding, dilation, strict=True)]
    expected = 0
    for _ in range(axes[0]):
        for _ in range(axes[1]):
            for _ in range(c_out):
                expected += kernel[0] * kernel[1] * per_group[0]

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = conv.weight, conv.bias

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)

    counts = count(Functional() if functional else conv, (c_in, *size))
    assert counts.macs == expected and counts.bit_operations == expected * 32 * 32
    assert counts.parameters == c_out * per_group[0] * kernel[0] * kernel[1] + bias * c_out
    assert counts.weight_bits == 32 * (counts.parameters - bias * c_out)


@given(rows=st.integers(1, 4), features=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_matrix_products_by_loops(rows, features):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(*features)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y @ y.transpose(1, 2)

    counts = count(Both(), (rows, features[0]))
    assert [r.macs for r in counts.rows] == [rows * features[0] * features[1], rows * rows * features[1]]
    assert [r.kind for r in counts.rows] == ["linear", "matmul"]


def hooked(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Outputs times inputs of an output, watched from outside."""
    total = 0

    def watch(module: nn.Module, _: tuple, output: Tensor) -> None:
        nonlocal total
        total += getattr(output, "value", output).numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() in (2, 4):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model(torch.rand(1, *shape))
    return total


@pytest.mark.parametrize("name", ["fracbnn_cifar10", "fracbnn_digits"])
def test_networks_by_a_hook(name):
    card = zoo.card(name)
    for options in ({}, *card.converts):
        counts = count(zoo.get(name, **options), card.input_shape)
        assert counts.macs == hooked(zoo.get(name, **options).eval(), card.input_shape) == card.macs
        binary = [r for r in counts.rows if r.name != "linear"]
        assert {r.weight_width for r in binary} == {1} and [r.activation_bits for r in binary] == [1] + [2] * (len(binary) - 1)


def test_transposed_convolutions_multiply_every_input():
    counts = count(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (4, 5, 7))
    assert counts.macs == 5 * 7 * 4 * 3 * 3 * 3 and counts.rows[0].kind == "transposed"


def test_other_dimensions():
    assert count(nn.Conv1d(3, 4, 5), (3, 20)).macs == 16 * 4 * 15
    assert count(nn.Conv3d(1, 2, 3), (1, 4, 5, 6)).macs == 2 * 3 * 4 * 2 * 27


class Shared(nn.Module):
    """One convolution at two places, a skipped layer, a functional pool, brevitas and our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, bit_width=6)
        self.conv = ScaledIntConv2d(4, 4, 3, padding=1, bits=3)
        self.act = LearnedScaleReLU(5)
        self.unused = nn.Linear(7, 11)
        self.head = qnn.QuantLinear(
            4, 3, True, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=2, input_quant=Int8ActPerTensorFloat
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.image(x)))
        x = self.act(self.conv(F.max_pool2d(x, 2)))
        return self.head(x.mean((2, 3)))


def test_bits_come_from_the_quantizers():
    counts = count(Shared(), (4, 8, 8))
    assert [(r.name, r.activation_bits, r.weight_width) for r in counts.rows] == [("conv", 6, 3), ("conv#2", 5, 3), ("head", 8, 2)]
    first, second = 64 * 4 * 36, 16 * 4 * 36
    assert counts.bit_operations == first * 6 * 3 + second * 5 * 3 + 12 * 8 * 2
    assert counts.weight_bits == 144 * 3 + 12 * 2
    assert [r.parameters for r in counts.rows] == [144, 0, 16] and counts.elsewhere == 7 * 11 + 11 + 2  # three learned scales
    assert counts.parameters == sum(p.numel() for p in Shared().parameters())


def test_the_image_has_eight_bits_before_quantized_weights_only():
    quantized, real = ScaledIntConv2d(3, 2, 1, bits=4), nn.Conv2d(3, 2, 1, bias=False)
    assert [count(m, (3, 4, 4)).bit_operations for m in (quantized, real)] == [96 * 8 * 4, 96 * 32 * 32]
    normalised = nn.Sequential(nn.BatchNorm2d(3), quantized)
    assert count(normalised, (3, 4, 4)).rows[0].activation_bits == 8


@pytest.mark.parametrize(
    "front,bits",
    [
        (FixedPoint(7, 3), 7),
        (QuantSign(2), 2),
        (ThermometerEncoder(64), 1),
        (nn.Sequential(QuantSign(3), nn.MaxPool2d(2), nn.PixelShuffle(1), nn.ZeroPad2d(1)), 3),
        (nn.Sequential(FixedPoint(4, 2), nn.AvgPool2d(2)), 6),
        (nn.Sequential(LearnedScaleReLU(4, return_quant_tensor=True), TruncAvgPool(2)), 4),
        (nn.Sequential(FixedPoint(4, 2), nn.BatchNorm2d(4)), None),
        (nn.Sequential(FixedPoint(4, 2), nn.ReLU(), nn.ReLU6()), 4),
        (nn.Sequential(FixedPoint(4, 2), nn.BatchNorm2d(4), nn.ReLU()), None),
        (nn.Sequential(FixedPoint(4, 2), nn.Sigmoid()), None),
        (nn.Sequential(FixedPoint(4, 2), ScaledIntConv2d(4, 4, 1)), None),
        (qnn.QuantReLU(act_quant=None), 8),
        (nn.Sequential(FixedPoint(4, 2), qnn.QuantReLU(act_quant=None)), 4),
    ],
    ids=range(13),
)
def test_bits_that_reach_a_layer(front, bits):
    channels = 16 if isinstance(front, ThermometerEncoder) else 4
    model = nn.Sequential(front, ScaledIntConv2d(channels, 2, 1, bits=4))
    assert count(model, (4, 8, 8)).rows[-1].activation_bits == bits


def test_sums_of_codes_widen():
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.conv = FixedPoint(4, 2), SharedHardTanh(4), ScaledIntConv2d(2, 2, 1, bits=2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.conv(self.a(x) + self.b(x)), self.a(x)], 1)
            return self.conv(y.narrow(1, 2, 2))

    assert [r.activation_bits for r in count(Join(), (2, 3, 3)).rows] == [5, None]


def test_binary_weights_switch():
    conv = FractionalConv2d(2, 2, 3)
    model = nn.Sequential(QuantSign(2), conv, BinaryConv2d(2, 2, 1))
    assert [r.weight_width for r in count(model, (2, 6, 6)).rows] == [1, 1]
    conv.real_weights = model[2].real_weights = True
    assert [r.weight_width for r in count(model, (2, 6, 6)).rows] == [None, None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_model_stays_as_it_was(training, dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), QuantSign(2), FractionalConv2d(4, 2, 1)).to(dtype)
    model.train(training)
    before, calls = copy.deepcopy(model.state_dict()), nn.Module.__call__
    generator = torch.get_rng_state()
    rows = count(model, (3, 6, 6)).rows
    assert [r.macs for r in rows] == [16 * 4 * 27, 16 * 2 * 4]
    assert all(m.training == training for m in model.modules()) and next(model.parameters()).dtype == dtype
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert nn.Module.__call__ is calls and torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and model[4].num_out == 0


def test_wrapped_models_and_models_that_are_one_layer():
    assert count(nn.DataParallel(nn.Linear(3, 4)), (3,)).macs == 12
    assert count(nn.Linear(3, 4), (3,)).rows[0].name == "Linear"


class Deep(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Identity(), layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(x)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("layer", [nn.LSTM(5, 4), nn.Bilinear(5, 5, 2), nn.TransformerEncoderLayer(5, 1, 7, batch_first=True)])
def test_layers_without_a_rule_are_refused_by_name(layer):
    class Twice(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return self.stage[1](x, x) if isinstance(layer, nn.Bilinear) else super().forward(x)

    with pytest.raises(AnalysisError, match=r"stage\.1.*no rule.*torch\.nn"):
        count(Twice(layer), (6, 5))


def test_functions_without_a_rule_are_refused_with_their_line():
    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nij,nkj->nik", x, x)

    with pytest.raises(AnalysisError, match=r"einsum.*test_count\.py:\d+: return torch\.einsum.*torch\.matmul"):
        count(nn.Sequential(Einsum()), (3, 4))


def test_a_model_that_does_not_run():
    with pytest.raises(AnalysisError, match="1x4x8x8.*channels"):
        count(nn.Conv2d(3, 4, 3), (4, 8, 8))


def test_norms_and_unknown_functions_count_nothing():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm((3, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.softmax(self.norm(x), -1).cumsum(1))

    counts = count(Odd(), (3, 4))
    assert counts.macs == 24 and counts.elsewhere == 24


def test_the_table_is_aligned_and_adds_up():
    text = str(count(Shared(), (4, 8, 8))).splitlines()
    assert text[0].startswith("layer") and set(text[1]) == {"-", " "} and text[-1].startswith("total")
    assert len({len(line) for line in text[2:5]}) == 1
    assert text[-1].split()[1] == f"{count(Shared(), (4, 8, 8)).parameters:,}"


def test_import_leaves_brevitas_alone():
    code = "import sys, quantlib as ql; ql.analysis.count; assert not [m for m in sys.modules if m.startswith('brevitas')]"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=20)
@given(bits=st.integers(2, 8), channels=st.integers(1, 4))
def test_steps_of_a_walk(bits, channels):
    model = nn.Sequential(FixedPoint(bits, 1), ScaledIntConv2d(channels, 2, 3, bits=bits), nn.ReLU(), FixedPoint(bits, 1))
    steps = walk(model, (channels, 5, 5)).steps
    assert [s.kind for s in steps] == ["quantizer", "conv", "elementwise", "quantizer"]
    assert steps[1].output.top == (2**bits - 1) * (2**bits - 2) * 9 * channels
    assert steps[2].output.pending == (2,) and steps[3].output.bits == bits


def test_linear_bits():
    model = nn.Sequential(LearnedScaleReLU(4, return_quant_tensor=True), ScaledIntLinear(6, 3, bits=4, per_channel=False, bias_bits=12))
    assert count(model, (6,)).bit_operations == 18 * 16
