"""The published score to the last digit, its table row by row, and every rule of the cost on small models by other arithmetic."""

from __future__ import annotations

import csv
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from brevitas import nn as qnn
from brevitas.quant import Uint8ActPerTensorFloat
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from quantlib.analysis import CIFAR100, IMAGENET, AnalysisError, Reference, micronet_cost
from quantlib.analysis.micronet import LayerCost, MicroNetCost
from quantlib.layers import (
    BinaryConv2d,
    FixedPoint,
    FractionalConv2d,
    LearnedScaleReLU,
    QuantSign,
    RPReLU,
    ScaledIntConv2d,
    ScaledIntLinear,
    SharedHardTanh,
    TruncAvgPool,
)

COLUMNS = {
    "weights": "mem_weight_bits",
    "bias": "mem_bias_bits",
    "thresholds": "mem_thr_bits",
    "multiplications": "math_mul_bits",
    "additions": "math_add_bits",
    "bias_additions": "math_bias_bits",
    "comparisons": "math_thr_bits",
    "memory_bits": "mem_total_bits",
    "math_bits": "math_total_bits",
    "accumulator": "acc_bits",
}


@cache
def entry(name: str, fan_in: str) -> MicroNetCost:
    return micronet_cost(zoo.get(name), (3, 224, 224), fan_in=fan_in)  # type: ignore[arg-type]


@pytest.fixture
def published() -> MicroNetCost:
    return entry("proxylessnas_4b5b_imagenet", "published")


def test_published_score(published):
    assert published.printed == 0.5558137893676758
    assert float(published.score) == 0.5558137872445188
    assert (published.memory_bits, published.math_bits) == (36_413_208, 14_635_254_664)
    parts = [published.total(c) for c in ("weights", "bias", "thresholds", "multiplications", "additions", "bias_additions", "comparisons")]
    assert parts == [27_616_280, 19_000, 8_777_928, 2_445_872_912, 9_539_754_784, 19_000, 2_649_607_968]
    assert published.score == Fraction(36_413_208, 32 * 6_900_000) + Fraction(14_635_254_664, 32 * 1_170_000_000)


def test_published_table_row_by_row(published, shared):
    with open(shared / "golden" / "micronet_cost_breakdown.csv", newline="", encoding="utf-8") as file:
        *rows, total = list(csv.DictReader(file))
    assert len(rows) == len(published.rows) == 76 and total["layer"] == "TOTAL"
    for ours, theirs in zip(published.rows, rows, strict=True):
        assert ours.name.removesuffix(".conv") == theirs["layer"]
        assert {c: str(getattr(ours, c)) for c in COLUMNS} == {c: theirs[k] for c, k in COLUMNS.items()}
        assert float(published.of(ours)) == pytest.approx(float(theirs["cost_contribution"]), rel=1e-15)  # theirs is a rounded sum


def test_four_bits_everywhere():
    cost = entry("proxylessnas_4b_imagenet", "published")
    assert (cost.memory_bits, cost.math_bits) == (33_043_776, 13_561_578_424)
    assert float(cost.score) == 0.5118764285488666


def test_true_fan_in():
    assert float(entry("proxylessnas_4b5b_imagenet", "true").score) == 0.541738932989595


def test_the_table_of_the_page(root):
    page = (root / "docs" / "analysis.md").read_text(encoding="utf-8")
    lines = page[page.index("| network | memory bits") :].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 3
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        cost = entry(name.partition(",")[0], "true" if "," in name else "published")
        assert cells == [f"{cost.memory_bits:,}", f"{cost.math_bits:,}", repr(float(cost.score)), repr(cost.printed)]


# ---------------------------------------------------------------- the rules, one by one


def least_width(steps: int) -> int:
    """The smallest A with 2^A >= steps, at least 1."""
    width = 1
    while 2**width < steps:
        width += 1
    return width


def costs(*layers: nn.Module, shape: tuple[int, ...] = (4, 6, 6), **options: object) -> list[LayerCost]:
    return list(micronet_cost(nn.Sequential(*layers), shape, **options).rows)  # type: ignore[arg-type]


@given(
    bits=st.tuples(st.integers(1, 8), st.integers(2, 8), st.integers(1, 5)),
    kernel=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    true=st.booleans(),
)
def test_a_quantized_block(bits, kernel, groups, per_group, bias, true):
    b_x, b_w, b_y = bits
    c_in, c_out = groups * per_group[0], groups * per_group[1]
    conv = ScaledIntConv2d(c_in, c_out, kernel, groups=groups, bias=bias, bits=b_w)
    model = (QuantSign(b_x), conv, nn.BatchNorm2d(c_out), nn.ReLU(), LearnedScaleReLU(b_y))
    (row,) = costs(*model, shape=(c_in, 5, 5), fan_in="true" if true else "published")
    counted = per_group[0] if true else per_group[1]
    a = least_width((2**b_x - 1) * (2**b_w - 2) * kernel * kernel * counted)
    elements = c_out * (6 - kernel) ** 2
    macs = elements * kernel * kernel * per_group[0]
    assert (row.accumulator, row.weights, row.bias) == (a, conv.weight.numel() * b_w, 0)
    assert (row.multiplications, row.additions) == (macs * max(b_x, b_w), macs * a)
    assert (row.thresholds, row.comparisons) == (c_out * a * (2**b_y - 1), elements * a * (2**b_y - 1))
    assert (row.constants, row.functions, row.bias_additions) == (0, 0, 0)


def test_a_bias_at_the_output_has_the_accumulators_width():
    codes = LearnedScaleReLU(4, return_quant_tensor=True)
    (row,) = costs(codes, ScaledIntLinear(7, 5, bits=4, per_channel=False, bias_bits=11), shape=(7,))
    a = least_width(15 * 14 * 7)
    assert (row.bias, row.bias_additions, row.thresholds) == (5 * a, 5 * a, 0)


def test_a_shared_residual_join():
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.conv = SharedHardTanh(4), ScaledIntConv2d(4, 4, 1, bits=4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(x)
            return self.shared.add(x, self.conv(x))

    conv, join = costs(Unit())
    assert (join.name, join.kind, join.accumulator) == ("0.add", "add", 5)
    assert (join.additions, join.thresholds, join.comparisons) == (144 * 4, 4 * 5 * 15, 144 * 5 * 15)
    assert conv.thresholds == 4 * least_width(15 * 14 * 4) * 15


def test_pools():
    truncated, summed = TruncAvgPool(3), nn.AvgPool2d(3)
    codes = LearnedScaleReLU(4, return_quant_tensor=True)
    a = least_width(15 * 9)
    for pool, bits in ((truncated, 4), (summed, a)):
        rows = costs(codes, pool, ScaledIntConv2d(4, 2, 1, bits=4))
        assert (rows[0].additions, rows[0].accumulator, rows[0].thresholds) == (16 * 9 * a, a, 0)
        assert rows[1].multiplications == 2 * 4 * 4 * max(bits, 4)
    assert costs(QuantSign(2), nn.MaxPool2d(3, 2, 1))[0].comparisons == 4 * 9 * 9 * 2
    real = costs(nn.Conv2d(4, 4, 1, bias=False), nn.AdaptiveAvgPool2d(4))[1]
    windows = [(0, 2), (1, 3), (3, 5), (4, 6)]  # 6 inputs for 4 outputs
    assert real.additions == 4 * sum((b - a) * (d - c) for a, b in windows for c, d in windows) * 32


def test_real_networks_have_32_bits_everywhere():
    conv, norm, relu, linear = costs(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), shape=(4, 6, 6)
    )
    macs = 36 * 8 * 36
    assert (conv.weights, conv.bias, conv.multiplications, conv.additions) == (8 * 36 * 32, 0, macs * 32, macs * 32)
    assert (norm.constants, norm.functions) == (8 * 32, 8 * 36 * 32)  # the factor goes into the weights, the bias into the offset
    assert (relu.constants, relu.functions) == (0, 8 * 36 * 32)
    assert (linear.weights, linear.bias, linear.bias_additions) == (2880 * 32, 10 * 32, 10 * 32)


def test_real_weights_on_codes_and_quantized_weights_on_real_values_are_real():
    (row,) = costs(QuantSign(2), nn.Conv2d(4, 2, 1, bias=False))
    assert (row.weights, row.multiplications, row.additions) == (8 * 32, 288 * 32, 288 * 32)
    row = costs(nn.Conv2d(4, 4, 1, bias=False), ScaledIntConv2d(4, 2, 1, bits=3))[1]
    assert (row.weights, row.multiplications, row.additions) == (8 * 3, 288 * 32, 288 * 32)


def test_a_batch_norm_without_a_quantizer_behind_it():
    sign, norm, _ = costs(QuantSign(2), ScaledIntConv2d(4, 4, 1, bits=4, bias=True), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    assert (sign.kind, sign.bias) == ("conv", 0)
    assert (norm.constants, norm.functions) == (8 * 32, 2 * 144 * 32)


def test_real_joins_and_their_quantizer():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign, self.conv, self.norm = QuantSign(2), BinaryConv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.sign(x)
            return self.sign(self.norm(self.conv(y)) + y)

    conv, norm, join = costs(Shortcut())
    assert conv.accumulator == least_width(3 * 1 * 4) and conv.thresholds == 0
    assert norm.functions == 2 * 144 * 32
    assert (join.additions, join.thresholds, join.comparisons) == (144 * 32, 4 * 32 * 3, 144 * 32 * 3)


@pytest.mark.parametrize("bits,limit", [(5, 5), (6, 5), (8, 8), (8, 7)])
def test_wide_quantizers_multiply_and_shift(bits, limit):
    (row,) = costs(QuantSign(2), ScaledIntConv2d(4, 4, 1, bits=4), FixedPoint(bits, 2), threshold_bits=limit)
    a = least_width(3 * 14 * 4)
    few = (4 * a * (2**bits - 1), 144 * a * (2**bits - 1))
    assert (row.thresholds, row.comparisons) == (few if bits <= limit else (4 * 64, 144 * 96))


def test_binary_layers_and_the_gate():
    (row,) = costs(QuantSign(1), BinaryConv2d(4, 4, 3), QuantSign(1))
    a = least_width(36)
    assert (row.weights, row.multiplications, row.additions) == (144, 64 * 36, 64 * 36 * a)
    assert (row.thresholds, row.comparisons) == (4 * a, 64 * a)
    (row,) = costs(QuantSign(2), FractionalConv2d(4, 4, 3), QuantSign(2))
    a = least_width(3 * 36)
    assert (row.multiplications, row.thresholds, row.comparisons) == (64 * 36 * 2, 4 * a * (1 + 3), 64 * a * (1 + 3))


class Excite(nn.Module):
    """Squeeze and excite with the gate `curve`, on codes where `bits` are given."""

    def __init__(self, curve: nn.Module, bits: int | None) -> None:
        super().__init__()

        def act() -> nn.Module:
            return nn.Identity() if bits is None else qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, bit_width=bits)

        self.first, self.squeezed, self.curved, self.out = act(), act(), act(), act()
        self.curve, self.linear = curve, ScaledIntLinear(4, 4, False, bits=4) if bits else nn.Linear(4, 4, False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = self.squeezed(self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return self.out(x * self.curved(self.curve(gate))[:, :, None, None])


@pytest.mark.parametrize("curve", [nn.Hardswish(), nn.Sigmoid(), nn.SiLU()])
def test_squeeze_and_excite_on_codes(curve):
    pool, linear, table, scaled = costs(Excite(curve, 8))
    assert pool.accumulator == least_width(255 * 36)
    assert (linear.thresholds, linear.comparisons) == (4 * 64, 4 * 96)
    assert (table.name, table.thresholds, table.comparisons) == ("0.curved", 256 * 8, 4 * 8)
    assert (scaled.kind, scaled.multiplications) == ("multiply", 144 * 8)
    assert (scaled.thresholds, scaled.comparisons) == (4 * 64, 144 * 96)


def test_squeeze_and_excite_on_real_numbers():
    image_pool, linear, gate, scaled = costs(Excite(nn.Sigmoid(), None))
    assert image_pool.accumulator == least_width(255 * 36)  # of the image itself
    assert (linear.multiplications, gate.functions) == (16 * 32, 4 * 32)
    assert scaled.multiplications == 144 * 32


def test_monotone_curves_are_thresholds_and_the_others_are_evaluated():
    layers: Callable[[nn.Module], tuple[nn.Module, ...]] = lambda curve: (  # noqa: E731
        QuantSign(2), ScaledIntConv2d(4, 4, 3, bits=4), curve, QuantSign(3),
    )  # fmt: skip
    a = least_width(3 * 14 * 36)
    (row,) = costs(*layers(nn.Sigmoid()))
    assert row.thresholds == 4 * a * 7
    conv, curve = costs(*layers(nn.Hardswish()))
    assert curve.functions == 64 * 32
    assert (conv.thresholds, conv.comparisons) == (4 * 32 * 7, 64 * 32 * 7)


def test_a_table_with_constants_per_channel_in_front():
    (row,) = costs(QuantSign(4), nn.BatchNorm2d(4), nn.Hardswish(), QuantSign(3))
    assert (row.thresholds, row.comparisons) == (4 * 2**4 * 3, 144 * 4)


def test_elementwise_functions_of_several_operations():
    rows = costs(nn.Conv2d(4, 4, 1, bias=False), RPReLU(4), nn.PReLU(4), nn.Hardswish())[1:]
    assert [(r.constants, r.functions) for r in rows] == [(12 * 32, 4 * 144 * 32), (4 * 32, 2 * 144 * 32), (0, 144 * 32)]


def test_a_clip_of_codes_has_their_bits_or_is_part_of_the_quantizer():
    relu, conv = costs(QuantSign(3), nn.ReLU(), ScaledIntConv2d(4, 2, 1, bits=2))
    assert (relu.functions, conv.multiplications) == (144 * 3, 2 * 144 * 3)
    (sign,) = costs(QuantSign(3), nn.ReLU(), QuantSign(2))
    assert (sign.functions, sign.comparisons) == (0, 144 * 3 * 3)


def test_moves_and_the_image_are_free():
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = (x - 0.5) / torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
            return torch.cat([F.pad(x, (1, 1)), F.pad(x, (2, 0))], 1).flip(1).roll(1, 2)

    (row,) = costs(Moves(), FixedPoint(8, 7), ScaledIntConv2d(8, 2, 1, bits=8))
    assert row.multiplications == 2 * 6 * 8 * 8 * 8
    (row,) = costs(Moves(), ScaledIntConv2d(8, 2, 1, bits=8))  # eight bits, whatever the normalisation
    assert row.multiplications == 2 * 6 * 8 * 8 * 8


def test_branches_of_one_concat_meet_one_quantizer():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign, self.act = QuantSign(2), LearnedScaleReLU(3)
            self.row = nn.Sequential(ScaledIntConv2d(4, 4, (1, 3), padding=(0, 1), groups=4, bits=4), nn.BatchNorm2d(4))
            self.column = nn.Sequential(ScaledIntConv2d(4, 4, (5, 1), padding=(2, 0), groups=4, bits=4), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.sign(x)
            return self.act(torch.cat([self.row(x), self.column(x)], 1))

    row, column, cat = costs(Fork())
    a = max(row.accumulator or 0, column.accumulator or 0)
    assert a == least_width(3 * 14 * 5) and (cat.thresholds, cat.comparisons) == (8 * a * 7, 288 * a * 7)


def test_weights_are_stored_once_and_thresholds_at_each_use():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.conv = LearnedScaleReLU(2), ScaledIntConv2d(4, 4, 1, bits=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(self.act(self.conv(self.act(x)))))

    first, second = costs(Twice())
    assert (first.weights, second.weights, second.name) == (64, 0, "0.conv#2")
    assert first.thresholds == second.thresholds > 0


def test_matrix_products_of_activations():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = QuantSign(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.sign(x).flatten(2)
            return x @ x.transpose(1, 2)

    (row,) = costs(Attention())
    a = least_width(7 * 7 * 36)
    assert (row.weights, row.multiplications, row.additions) == (0, 16 * 36 * 3, 16 * 36 * a)


def test_references():
    model = nn.Linear(10, 10, False)
    small, other = micronet_cost(model, (10,)), micronet_cost(model, (10,), reference=CIFAR100)
    assert small.score == Fraction(100, 6_900_000) + Fraction(200, 1_170_000_000) and IMAGENET == (6_900_000, 1_170_000_000, 32)
    assert other.score == Fraction(100, 36_500_000) + Fraction(200, 10_490_000_000)
    assert micronet_cost(model, (10,), reference=Reference(50, 100, 16)).score == 2 * (Fraction(100, 50) + Fraction(200, 100))


def test_what_has_no_rule_is_refused_by_name():
    with pytest.raises(AnalysisError, match=r"^1 \(Softmax\).*no rule"):
        costs(nn.Conv2d(4, 4, 1), nn.Softmax(1))

    class Own(nn.Module):
        def lower(self) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(AnalysisError, match=r"^1\.0 \(Own\).*out_bits.*moves"):
        costs(nn.Conv2d(4, 4, 1), nn.Sequential(Own()))
    own = Own()
    own.out_bits = 3  # type: ignore[assignment]
    assert costs(QuantSign(2), ScaledIntConv2d(4, 4, 1, bits=4), own)[0].thresholds == 4 * least_width(3 * 14 * 4) * 7
    with pytest.raises(AnalysisError, match="'published', 'true'"):
        micronet_cost(nn.Linear(3, 2), (3,), fan_in="real")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fracbnn_digits", "fracbnn_cifar10", "vggtiny_cifar10"])
def test_zoo_networks_have_a_score(name):
    card = zoo.card(name)
    for options in ({}, *card.converts):
        cost = micronet_cost(zoo.get(name, **options), card.input_shape)
        assert 0 < cost.score < 1 and str(cost).splitlines()[-1].startswith("memory ")
        assert sum(cost.of(r) for r in cost.rows) == cost.score
