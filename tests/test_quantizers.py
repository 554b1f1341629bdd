"""The pure quantizers and the injectors built from them: golden values, restated formulas, and the Brevitas quantizers they must equal."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brevitas import nn as qnn
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.inject.enum import RestrictValueType
from brevitas.quant import (
    Int8ActPerTensorFloatMinMaxInit,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloatMaxInit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from quantlib.quantizers import (
    BinaryWeight,
    IntActLearnedLog2Scale,
    NarrowIntWeightPerChannelMaxAbs,
    NarrowIntWeightPerTensorMaxAbs,
    QuantSignAct,
    UintActLearnedLog2Scale,
    binary_sign,
    fixed_point,
    functions,
    learned_scale,
    max_abs,
    quant_sign,
    round_to_integer,
)

DTYPES = (torch.float32, torch.float64)
ROUNDING = st.sampled_from(functions.ROUNDINGS)
ULP = 2e-7  # two float32 roundings: where the published code multiplied x / S * L and we divide by s = S / L


def reals(width: int = 64, limit: float = 4.0) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)
    return hnp.arrays(np.float64 if width == 64 else np.float32, shapes, elements=st.floats(-limit, limit, width=width))


def grad_of(fn: Callable[..., Tensor], *args: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
    leaves = [torch.from_numpy(np.array(a)).requires_grad_() for a in args]
    fn(*leaves).backward(torch.from_numpy(grad))
    return [leaf.grad.numpy() for leaf in leaves]  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def fracbnn(shared: Path) -> Any:
    return np.load(shared / "golden/fracbnn_layer_grads.npz", allow_pickle=False)


@pytest.fixture(scope="session")
def micronet(shared: Path) -> Any:
    return np.load(shared / "golden/micronet_quantizers_small.npz", allow_pickle=False)


def test_docstring_examples() -> None:
    result = doctest.testmod(functions)
    assert result.attempted and not result.failed


# --- binary sign ---------------------------------------------------------------------------------------------------------------------


def test_binary_sign_golden(fracbnn: Any) -> None:
    x, y, g, d = (fracbnn[f"fastsign/{k}"] for k in ("input", "output", "grad_out", "grad_in"))
    assert np.array_equal(binary_sign(torch.from_numpy(x)).numpy(), y)
    assert np.array_equal(grad_of(binary_sign, x, grad=g)[0], d)


@given(reals(), st.floats(0.1, 3), st.sampled_from([-1.0, 0.0, 1.0]))
def test_binary_sign_formula(x: np.ndarray, clip: float, zero: float) -> None:
    y = binary_sign(torch.from_numpy(x), clip, zero).numpy()
    assert np.array_equal(y, np.where(x > 0, 1.0, np.where(x < 0, -1.0, zero)))
    g = np.cos(np.arange(x.size)).reshape(x.shape)
    assert np.array_equal(grad_of(lambda t: binary_sign(t, clip, zero), x, grad=g)[0], np.where(np.abs(x) <= clip, g, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_sign_clip_counts_as_inside(dtype: torch.dtype) -> None:
    edge = torch.tensor(1.3, dtype=dtype)
    outside = torch.nextafter(edge, torch.tensor(2.0, dtype=dtype))
    x = torch.stack([edge, -edge, outside, -outside]).requires_grad_()
    binary_sign(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 0, 0]


def test_nan_is_not_hidden() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    one = torch.tensor(1.0)
    for y in (binary_sign(nan), quant_sign(nan), max_abs(nan, 4, None)[0], learned_scale(nan, one, -8, 7), fixed_point(nan, 8, 2)):
        assert bool(y[0].isnan())


# --- quant sign ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_quant_sign_golden(fracbnn: Any, bits: int) -> None:
    x, y, g, d = (fracbnn[f"quantsign{bits}/{k}"] for k in ("input", "output", "grad_out", "grad_in"))
    assert np.array_equal(quant_sign(torch.from_numpy(x), bits).numpy(), y)
    assert np.array_equal(grad_of(lambda t: quant_sign(t, bits), x, grad=g)[0], d)


@given(reals(), st.integers(1, 8))
def test_quant_sign_formula(x: np.ndarray, bits: int) -> None:
    top = 2**bits - 1
    code = np.rint((np.clip(x, -1, 1) + 1) / (2 / top))
    y = quant_sign(torch.from_numpy(x), bits).numpy()
    assert np.allclose(y, (2 * code - top) / top, rtol=0, atol=1e-15)  # j * d - 1 rounds once more than (2j - top) / top
    assert (y != 0).all()
    assert np.array_equal(quant_sign(torch.from_numpy(y), bits).numpy(), y)
    g = np.sin(1 + np.arange(x.size)).reshape(x.shape)
    assert np.array_equal(grad_of(lambda t: quant_sign(t, bits), x, grad=g)[0], np.where(np.abs(x) < 1, g, 0))


def test_quant_sign_ties() -> None:
    """0 is a tie and goes up; +-2/3 is no float: float32 rounds it outwards, float64 inwards, and either way the nearest level wins."""
    third = torch.tensor([-2 / 3, 0.0, 2 / 3], dtype=torch.float64)
    assert torch.equal(torch.round(3 * quant_sign(third.float())), torch.tensor([-3.0, 1.0, 1.0]))
    assert torch.equal(torch.round(3 * quant_sign(third)), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))


def test_quant_sign_gradient_is_strict_at_one() -> None:
    x = torch.tensor([-1.0, 1.0, np.nextafter(np.float32(1), np.float32(0))]).requires_grad_()
    quant_sign(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1]


def test_quant_sign_refuses_no_bits() -> None:
    with pytest.raises(ValueError, match="at least one bit"):
        quant_sign(torch.zeros(1), 0)


# --- max-abs weights -----------------------------------------------------------------------------------------------------------------


def max_abs_numpy(w: np.ndarray, bits: int, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Channel by channel: value, scale, gradient."""
    q = 2 ** (bits - 1) - 1
    value, scale, grad = np.zeros_like(w), np.zeros(len(w), w.dtype), np.array(g)
    for c in range(len(w)):
        row = w[c].reshape(-1)
        k = int(np.argmax(np.abs(row)))
        s = max(abs(row[k]), 2e-16) / q
        m = np.clip(np.rint(row / s), -q, q)
        value[c], scale[c] = (m * s).reshape(w[c].shape), s
        grad[c].reshape(-1)[k] += np.sign(row[k]) * np.sum(g[c].reshape(-1) * (m - row / s)) / q
    return value, scale, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["weight4", "weight5_dw", "weight8"])
def test_max_abs_golden(micronet: Any, case: str, dtype: torch.dtype) -> None:
    w = torch.from_numpy(micronet[f"{case}/w"]).to(dtype).requires_grad_()
    value, scale = max_abs(w, int(micronet[f"{case}/bits"]))
    value.backward(torch.from_numpy(micronet[f"{case}/grad_out"]).to(dtype))
    assert np.array_equal((value / scale).round().detach().numpy(), micronet[f"{case}/codes"])
    assert np.allclose(scale.detach().flatten().numpy(), micronet[f"{case}/scale"], rtol=ULP, atol=0)
    assert np.allclose(value.detach().numpy(), micronet[f"{case}/qw"], rtol=0, atol=ULP)
    # 9 to 54 float32 terms summed in another order by the 2019 code
    assert w.grad is not None and np.allclose(w.grad.numpy(), micronet[f"{case}/grad_w"], rtol=0, atol=2e-6)


@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=st.floats(-2, 2)), st.integers(2, 8))
def test_max_abs_formula(w: np.ndarray, bits: int) -> None:
    w[np.abs(w) < 1e-100] = 0  # ends of the exponent range, where w / s and its gradient are no longer defined by rounding alone
    g = np.cos(np.arange(w.size)).reshape(w.shape)
    value, scale, grad = max_abs_numpy(w, bits, g)
    got, s = max_abs(torch.from_numpy(w), bits)
    assert np.array_equal(got.numpy(), value) and np.array_equal(s.flatten().numpy(), scale)
    assert s.shape == (len(w), *[1] * (w.ndim - 1))
    (d,) = grad_of(lambda t: max_abs(t, bits)[0], w, grad=g)
    assert np.allclose(d, grad, rtol=1e-9, atol=1e-9)  # sums in another order; a tiny channel divides by a tiny scale
    again, _ = max_abs(got, bits)
    assert np.array_equal((again / s).round().numpy(), (got / s).round().numpy())


def test_max_abs_zero_channels_and_ties() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    value, scale = max_abs(w, 4)
    assert value.tolist() == [[0, 0], [1, -1]] and scale.flatten().tolist() == [2e-16 / 7, 1 / 7]
    (value * torch.tensor([[1.0, 2.0], [3.0, 5.0]])).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [[1, 2], [3, 5]]  # code = w / s exactly, so nothing flows through the scale
    w.grad = None
    max_abs(w, 4)[1].sum().backward()
    assert w.grad.tolist() == [[0, 0], [1 / 7, 0]]  # the first of two maxima; a dead channel has none


def test_max_abs_per_tensor_and_transposed() -> None:
    w = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    value, scale = max_abs(w, 5, None)
    expected, s, _ = max_abs_numpy(w.reshape(1, -1).numpy(), 5, np.zeros((1, w.numel())))
    assert scale.shape == () and float(scale) == s[0] and np.array_equal(value.numpy().reshape(1, -1), expected)
    moved = [t.movedim(0, 1) for t in max_abs(w.movedim(1, 0).contiguous(), 5)]
    assert all(torch.equal(a, b) for a, b in zip(max_abs(w, 5, 1), moved, strict=True))
    g = torch.randn_like(w)
    a, b = w.clone().requires_grad_(), w.movedim(1, 0).contiguous().requires_grad_()
    max_abs(a, 5, 1)[0].backward(g)
    max_abs(b, 5)[0].backward(g.movedim(1, 0))
    assert a.grad is not None and b.grad is not None
    assert torch.allclose(a.grad, b.grad.movedim(0, 1), rtol=1e-13, atol=1e-13)  # the sums run over another memory order


def test_max_abs_needs_two_bits() -> None:
    with pytest.raises(ValueError, match="binary_sign"):
        max_abs(torch.zeros(2, 2), 1)


# --- learned scale -------------------------------------------------------------------------------------------------------------------


def learned_scale_numpy(x: np.ndarray, s: float, lo: int, hi: int, gradient: str, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    u = x / s
    code = np.clip(np.rint(u), lo, hi)
    tested = u if gradient == "2019" else np.rint(u)
    inside = (tested >= lo) & (tested <= hi)
    return code * s, np.where(inside, g, 0), float(np.sum(g * np.where(inside, code - u, code)))


@given(reals(limit=40.0), st.floats(0.1, 3), st.integers(1, 8), st.booleans(), st.sampled_from(["2019", "brevitas"]))
def test_learned_scale_formula(x: np.ndarray, s: float, bits: int, signed: bool, gradient: Any) -> None:
    half = 2 ** (bits - 1)
    lo, hi = (-half, half - 1) if signed else (0, 2 * half - 1)
    g = np.cos(np.arange(x.size)).reshape(x.shape)
    value, dx, ds = learned_scale_numpy(x, s, lo, hi, gradient, g)
    scale = np.array(s)
    assert np.array_equal(learned_scale(torch.from_numpy(x), torch.from_numpy(scale), lo, hi, gradient).numpy(), value)
    got_x, got_s = grad_of(lambda a, b: learned_scale(a, b, lo, hi, gradient), x, scale, grad=g)
    assert np.array_equal(got_x, dx)
    assert np.isclose(got_s, ds, rtol=1e-10, atol=1e-9 * max(1, np.abs(x).max() / s))  # two large sums that cancel
    codes = learned_scale(torch.from_numpy(value), torch.from_numpy(scale), lo, hi, gradient).numpy()
    assert np.array_equal(codes, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lo, hi", [(0, 15), (0, 31), (-8, 7), (-7, 7), (-128, 127), (0, 14)])
def test_learned_scale_boundaries(dtype: torch.dtype, lo: int, hi: int) -> None:
    """Half a step around either end, and its neighbours in the dtype, with the scale 1 that makes them exact."""
    points = torch.tensor([lo - 0.5, float(lo), float(hi), hi + 0.5], dtype=dtype)
    far = torch.tensor(1e9, dtype=dtype)
    x = torch.cat([points, torch.nextafter(points, far), torch.nextafter(points, -far)])
    for gradient in ("2019", "brevitas"):
        leaf = x.clone().requires_grad_()
        learned_scale(leaf, torch.ones((), dtype=dtype), lo, hi, gradient).sum().backward()  # type: ignore[arg-type]
        tested = x if gradient == "2019" else x.round()
        assert leaf.grad is not None and torch.equal(leaf.grad, ((tested >= lo) & (tested <= hi)).to(dtype))


def test_learned_scale_refuses_an_unknown_gradient() -> None:
    with pytest.raises(ValueError, match='"2019" or "brevitas"'):
        learned_scale(torch.zeros(1), torch.ones(()), 0, 3, "2020")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_learned_scale_gradient_sums_in_any_layout(layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    x, g = 4 * torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for shape in ((), (1, 3, 1, 1)):
        results = []
        for memory in (torch.contiguous_format, layout):
            a = x.clone(memory_format=memory).requires_grad_()
            s = torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
            y = learned_scale(a, s, 0, 15)
            y.backward(g)  # its layout differs from that of x in one of the cases
            assert y.is_contiguous(memory_format=memory)
            results.append((y, a.grad, s.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert torch.allclose(results[0][2], results[1][2], rtol=1e-12, atol=1e-12)  # the same terms in another order


# --- fixed point ---------------------------------------------------------------------------------------------------------------------


@given(st.fractions(-1000, 1000, max_denominator=64), ROUNDING)
def test_round_to_integer_matches_exact_rationals(value: Any, rounding: Any) -> None:
    value = type(value)(float(value))  # the very number that a float64 holds
    floor = value.numerator // value.denominator
    rest = value - floor
    up = {"floor": False, "to_zero": value < 0 and rest > 0, "half_up": rest >= type(value)(1, 2)}.get(
        rounding, rest > type(value)(1, 2) or (rest == type(value)(1, 2) and floor % 2 == 1)
    )
    assert int(round_to_integer(torch.tensor([float(value)], dtype=torch.float64), rounding)) == floor + int(up)


def test_half_up_does_not_round_twice() -> None:
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    assert float(round_to_integer(below, "half_up")) == 0  # floor(x + 0.5) would say 1
    assert round_to_integer(torch.tensor([2.0**23 + 1, -(2.0**23) - 1]), "half_up").tolist() == [2**23 + 1, -(2**23) - 1]


@given(reals(limit=300.0), st.integers(2, 16), st.integers(-2, 10), ROUNDING, st.booleans())
def test_fixed_point_formula(x: np.ndarray, bits: int, fraction: int, rounding: Any, saturation: bool) -> None:
    half = 2 ** (bits - 1)
    u = x * 2.0**fraction
    nearest = {
        "half_even": np.rint,
        "floor": np.floor,
        "to_zero": np.trunc,
        "half_up": lambda v: np.where(v - np.floor(v) >= 0.5, np.ceil(v), np.floor(v)),
    }
    n = nearest[rounding](u)
    n = np.clip(n, -half, half - 1) if saturation else np.mod(n + half, 2 * half) - half
    y = fixed_point(torch.from_numpy(x), bits, fraction, rounding, saturation).numpy()
    assert np.array_equal(y, n * 2.0**-fraction)
    assert np.array_equal(fixed_point(torch.from_numpy(y), bits, fraction, rounding, saturation).numpy(), y)
    g = np.cos(np.arange(x.size)).reshape(x.shape)
    inside = (u >= -half) & (u <= half - 1) if saturation else np.ones(x.shape, bool)
    assert np.array_equal(grad_of(lambda t: fixed_point(t, bits, fraction, rounding, saturation), x, grad=g)[0], np.where(inside, g, 0))


def test_fixed_point_refuses_words_that_float32_cannot_hold() -> None:
    with pytest.raises(ValueError, match="float64"):
        fixed_point(torch.zeros(1), 28, 4)
    assert float(fixed_point(torch.tensor([1e9], dtype=torch.float64), 28, 0)) == 2**27 - 1


def test_fixed_point_refuses_an_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="half_up, half_even, floor, to_zero"):
        fixed_point(torch.zeros(1), 8, 2, "nearest")  # type: ignore[arg-type]


# --- injectors ----------------------------------------------------------------------------------------------------------------------


class StockLog2Unsigned(Uint8ActPerTensorFloatMaxInit):
    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16


class StockLog2Signed(Int8ActPerTensorFloatMinMaxInit):
    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16


class StockPerChannel(Int8WeightPerChannelFloat):
    scaling_min_val = 2e-16


class StockPerTensor(Int8WeightPerTensorFloat):
    scaling_min_val = 2e-16


PER_CHANNEL = {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (1, 4, 1, 1)}
ACTIVATIONS = [
    (qnn.QuantReLU, UintActLearnedLog2Scale, StockLog2Unsigned, {"max_val": 6.0}),
    (qnn.QuantReLU, UintActLearnedLog2Scale, StockLog2Unsigned, {"max_val": 3.7, **PER_CHANNEL}),
    (qnn.QuantHardTanh, IntActLearnedLog2Scale, StockLog2Signed, {"min_val": -10.0, "max_val": 10.0}),
    (qnn.QuantIdentity, IntActLearnedLog2Scale, StockLog2Signed, {"min_val": -2.0, "max_val": 2.0, **PER_CHANNEL}),
]


@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("layer, ours, stock, options", ACTIVATIONS)
def test_activation_equals_stock_brevitas(layer: Any, ours: Any, stock: Any, options: dict[str, Any], bits: int) -> None:
    if bits == 1 and stock is StockLog2Signed:
        pytest.skip("a signed bit has no positive level")
    a = layer(act_quant=ours, bit_width=bits, scale_gradient="brevitas", return_quant_tensor=True, **options)
    b = layer(act_quant=stock, bit_width=bits, return_quant_tensor=True, **options)
    a.load_state_dict(b.state_dict(), strict=True)
    b.load_state_dict(a.state_dict(), strict=True)
    x = torch.cat(
        [
            8 * torch.randn(2, 4, 5, 5),
            (torch.arange(400).reshape(4, 4, 5, 5) - 200) * float(a(torch.zeros(1, 4, 1, 1)).scale.max().detach()) / 4,
        ]
    )
    p, q = a(x), b(x)
    assert torch.equal(p.value, q.value) and torch.equal(p.scale, q.scale) and torch.equal(p.zero_point, q.zero_point)
    assert p.bit_width == q.bit_width and p.signed == q.signed
    a, b, x = a.double(), b.double(), x.double()
    g = torch.randn_like(x)
    grads = []
    for module in (a, b):
        leaf = x.clone().requires_grad_()
        module(leaf).value.backward(g)
        grads.append((leaf.grad, next(module.parameters()).grad))
    assert torch.equal(grads[0][0] == 0, grads[1][0] == 0)
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-15, atol=0)  # Brevitas takes g * s / s
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-10, atol=1e-10)  # sums of 600 float64 terms in another order


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "ours, stock", [(NarrowIntWeightPerChannelMaxAbs, StockPerChannel), (NarrowIntWeightPerTensorMaxAbs, StockPerTensor)]
)
def test_weights_equal_stock_brevitas(ours: Any, stock: Any, bits: int) -> None:
    builders = (
        lambda q: qnn.QuantConv2d(3, 6, 3, groups=3, weight_quant=q, weight_bit_width=bits),
        lambda q: qnn.QuantLinear(7, 5, False, weight_quant=q, weight_bit_width=bits),
        lambda q: qnn.QuantConvTranspose2d(3, 4, 3, weight_quant=q, weight_bit_width=bits),
    )
    for build in builders:
        a, b = build(ours), build(stock)
        b.load_state_dict(a.state_dict(), strict=True)
        with torch.no_grad():
            for m in (a, b):
                m.weight.copy_(a.weight)
                m.weight[0] = 0
        p, q = a.quant_weight(), b.quant_weight()
        assert torch.equal(p.value, q.value) and torch.equal(p.scale, q.scale) and p.bit_width == q.bit_width and p.signed == q.signed
        a, b = a.double(), b.double()
        g = torch.randn_like(a.weight)
        for m in (a, b):
            m.quant_weight().value.backward(g)
        assert torch.allclose(a.weight.grad, b.weight.grad, rtol=1e-12, atol=1e-12)  # the same terms in another order


def test_binary_and_sign_contracts() -> None:
    """value = scale * (code - zero_point), half-integer zero point included: what conversion reads."""
    conv = qnn.QuantConv2d(2, 3, 3, weight_quant=BinaryWeight)
    w = conv.quant_weight()
    assert set(w.value.unique().tolist()) == {-1.0, 1.0} and float(w.scale) == 1 and float(w.zero_point) == 0 and float(w.bit_width) == 1
    for bits in (1, 2, 3, 4):
        act = qnn.QuantIdentity(act_quant=QuantSignAct, bit_width=bits).double()
        y = act.act_quant(torch.linspace(-2, 2, 1001, dtype=torch.float64))
        codes = (y.value / y.scale + y.zero_point).round()
        assert codes.unique().tolist() == list(range(2**bits))
        assert torch.allclose(y.scale * (codes - y.zero_point), y.value, rtol=0, atol=1e-15)  # j * d - 1 rounds once more


def test_strict_loading_keeps_learned_scales_alive() -> None:
    """Brevitas rebuilds quantizers at load; the Parameter that an optimizer holds stays the one that is used, with its dtype."""
    act = qnn.QuantReLU(act_quant=UintActLearnedLog2Scale, bit_width=4, max_val=6.0).double()
    (v,) = act.parameters()
    optimizer = torch.optim.SGD(act.parameters(), lr=0.1)
    state = copy.deepcopy(act.state_dict())
    assert list(state) == ["act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"]
    act.load_state_dict(state, strict=True)
    act(torch.linspace(0, 9, 50, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert next(act.parameters()) is v and v.dtype is torch.float64 and float(v.detach()) != float(next(iter(state.values())))
    old = {next(iter(state)).replace("act_quant.", "act_quant_proxy.").replace(".value", ".learned_value"): next(iter(state.values()))}
    act.load_state_dict(old, strict=True)  # the naming of 2019
    assert float(v.detach()) == float(next(iter(state.values())))
    shared = copy.deepcopy(act)
    assert next(shared.parameters()) is not v


def test_autocast_keeps_the_grid() -> None:
    x = torch.randn(2, 4, 5, 5)
    conv = qnn.QuantConv2d(4, 4, 3, weight_quant=NarrowIntWeightPerChannelMaxAbs, weight_bit_width=4)
    act = qnn.QuantReLU(act_quant=UintActLearnedLog2Scale, bit_width=4, max_val=1.0, return_quant_tensor=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        z = act(y)
        assert y.dtype is torch.bfloat16 and z.value.dtype is torch.float32
        steps = z.value / z.scale
        assert float((steps - steps.round()).abs().max().detach()) < 1e-5
        for q in (binary_sign(y), quant_sign(y), fixed_point(y, 8, 4), max_abs(y, 4)[0]):
            assert q.dtype is torch.float32
        z.value.sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.dtype is torch.float32


@settings(max_examples=20)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
def test_values_lie_on_their_grid(bits: int, per_channel: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 3, 3, generator=generator)
    value, scale = max_abs(w, bits, 0 if per_channel else None)
    steps = value / scale
    assert float((steps - steps.round()).abs().max()) < 2.0**-16 and float(steps.abs().max().round()) == 2 ** (bits - 1) - 1
    assert bool(((value == 0) | (value.sign() == w.sign())).all())


def test_torchscript_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brevitas.config.JIT_ENABLED", True)
    with pytest.raises(RuntimeError, match="BREVITAS_JIT"):
        qnn.QuantIdentity(act_quant=QuantSignAct)


def test_a_copy_that_loads_weights_keeps_a_scale_of_its_own() -> None:
    import copy

    from quantlib.layers import LearnedScaleHardTanh, LearnedScaleReLU

    for layer in (LearnedScaleReLU(4), LearnedScaleHardTanh(4)):
        twin = copy.deepcopy(layer)
        twin.load_state_dict({key: value + 1 for key, value in twin.state_dict().items()})
        (own,), (other,) = layer.parameters(), twin.parameters()
        assert own is not other and torch.equal(own + 1, other)
        x = torch.linspace(-20, 20, 101)
        assert not torch.equal(layer(x), twin(x))
