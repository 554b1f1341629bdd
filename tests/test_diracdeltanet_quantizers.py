"""DiracDeltaNet's quantizers: the published code's values and gradients, and its formulas restated by another hand."""

from __future__ import annotations

import copy
import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brevitas import nn as qnn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantlib.layers import DividedClip, TanhConv2d, TanhLinear
from quantlib.quantizers import (
    TanhWeight,
    UintActDividedClip,
    diracdeltanet,
    divided_clip,
    inherited_clip,
    tanh_classifier,
    tanh_weight,
)

BITS = (1, 2, 4, 8, 16)
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden/diracdeltanet_quantizers.npz") as arrays:
        return dict(arrays)


def near(ours: np.ndarray, theirs: np.ndarray, of_largest: float) -> None:
    assert np.abs(ours - theirs).max() <= of_largest * np.abs(theirs).max()


def value_and_grad(quantize: Any, w: np.ndarray, grad: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    leaf = torch.from_numpy(w).to(dtype).requires_grad_()
    y = quantize(leaf)
    y.backward(torch.from_numpy(grad).to(dtype))
    assert leaf.grad is not None
    return y.detach().numpy(), leaf.grad.numpy()


def test_docstring_examples() -> None:
    result = doctest.testmod(diracdeltanet)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", ["normal", "heavy", "zeros_negmax"])
def test_conv_weights_golden(golden: Any, case: str, bits: int, dtype: torch.dtype) -> None:
    y, grad = value_and_grad(lambda w: tanh_weight(w, bits), golden[f"conv/{case}/w"], golden[f"conv/{case}/gout"], dtype)
    assert np.array_equal(y, golden[f"conv/{case}/b{bits}/q"])
    near(grad, golden[f"conv/{case}/b{bits}/grad"], 1e-6)  # float32 sums of a few hundred terms in another order
    conv = TanhConv2d(*golden[f"conv/{case}/w"].shape[1::-1], 1, bits=bits)
    conv.load_state_dict({"weight": torch.from_numpy(golden[f"conv/{case}/w"])})
    assert np.array_equal(conv.quant_weight().value.detach().numpy(), golden[f"conv/{case}/b{bits}/q"])


def test_32_bits_are_the_raw_weights(golden: Any) -> None:
    conv, linear = TanhConv2d(16, 24, 1, bits=32), TanhLinear(14, 20, bits=32)
    conv.load_state_dict({"weight": torch.from_numpy(golden["conv/normal/w"])})
    linear.load_state_dict({"weight": torch.from_numpy(golden["fc/w"]), "bias": torch.from_numpy(golden["fc/b"])})
    assert np.array_equal(conv.quant_weight().detach().numpy(), golden["conv/normal/b32/q"])
    x = torch.randn(3, 14)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    assert np.array_equal(golden["fc/b32/q_w"], golden["fc/w"]) and np.array_equal(golden["fc/b32/q_b"], golden["fc/b"])


@pytest.mark.parametrize("bits", BITS)
def test_classifier_golden(golden: Any, bits: int) -> None:
    for part in "wb":
        y, grad = value_and_grad(lambda w: tanh_classifier(w, bits), golden[f"fc/{part}"], golden[f"fc/gout_{part}"], torch.float32)
        assert np.array_equal(y, golden[f"fc/b{bits}/q_{part}"])
        near(grad, golden[f"fc/b{bits}/grad_{part}"], 1e-6)
    layer = TanhLinear(14, 20, bits=bits)
    layer.load_state_dict({"weight": torch.from_numpy(golden["fc/w"]), "bias": torch.from_numpy(golden["fc/b"])})
    x = torch.randn(3, 14)
    expected = torch.nn.functional.linear(x, *(torch.from_numpy(golden[f"fc/b{bits}/q_{p}"]) for p in "wb"))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coef", ["2", "1.3125", "-1.75", "6", "10"])
def test_activations_golden(golden: Any, coef: str, dtype: torch.dtype) -> None:
    key = f"act/alpha{coef}"
    reach = float(golden[f"{key}/rescale"])
    for bits in (*BITS, 32):
        alpha = torch.tensor([float(coef)], dtype=dtype, requires_grad=True)
        y, grad = value_and_grad(lambda x, a=alpha, b=bits: divided_clip(x, a, b, reach), golden[f"{key}/x"], golden[f"{key}/gout"], dtype)
        expected = golden[f"{key}/b{bits}/y"]
        if bits < 32:
            assert np.array_equal(np.rint(y * (2**bits - 1) / reach), np.rint(expected * (2**bits - 1) / reach))
        near(y, expected, 2e-7)  # one or two float32 roundings
        near(grad, golden[f"{key}/b{bits}/grad_x"], 2e-7)
        assert alpha.grad is not None
        near(alpha.grad.numpy(), golden[f"{key}/b{bits}/grad_alpha"], 2e-5)  # 1,006 float32 terms that nearly cancel


def test_inheritance_golden(golden: Any) -> None:
    for dtype in DTYPES:
        kept = inherited_clip(torch.from_numpy(golden["act/inherit_in"]).to(dtype))
        assert kept.dtype is dtype and np.array_equal(kept.float().numpy(), golden["act/inherit_out"])


weights = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-3, 3))


@given(weights, st.sampled_from(BITS), st.booleans())
def test_weight_formula(w: np.ndarray, bits: int, classifier: bool) -> None:
    t, n = np.tanh(w), 2**bits - 1
    m = np.abs(t).max()
    code = np.rint((t / (2 * m) + 0.5) * n) if m else np.rint(np.full(w.shape, n / 2))
    tensor = torch.from_numpy(w)
    if classifier:  # integers over n, times n again: products of rounded quotients
        assert np.allclose(tanh_classifier(tensor, bits).numpy() * n, code - 2 ** (bits - 1) - 1, rtol=0, atol=1e-9)
        assert np.allclose(tanh_classifier(tensor, bits, offset=False).numpy() * n, code - 2 ** (bits - 1), rtol=0, atol=1e-9)
    else:
        y = tanh_weight(tensor, bits).numpy()
        assert np.array_equal(y * 2 ** (bits - 1), code - 2 ** (bits - 1))
        assert set(np.unique(tanh_weight(tensor, 1, signs=True).numpy())) <= {-1.0, 1.0}


@given(weights, st.sampled_from(["twos", "signs", "classifier"]), st.integers(0, 2**31))
def test_weight_gradient_is_that_of_the_unrounded_function(w: np.ndarray, kind: str, seed: int) -> None:
    """Autograd of the formula without its rounding, with the first largest element as the maximum."""
    grad = np.random.default_rng(seed).normal(size=w.shape)
    leaf = torch.from_numpy(w).requires_grad_()
    t = leaf.tanh()
    m = t.reshape(-1)[t.detach().abs().reshape(-1).max(0).indices].abs()
    unit = (t / (2 * m) + 0.5) * {"twos": 15 / 8, "signs": 2.0, "classifier": 1.0}[kind]
    unit.backward(torch.from_numpy(grad))
    quantize = {
        "twos": lambda x: tanh_weight(x, 4),
        "signs": lambda x: tanh_weight(x, 1, signs=True),
        "classifier": lambda x: tanh_classifier(x, 8),
    }[kind]
    ours = value_and_grad(quantize, w, grad, torch.float64)[1]
    assert leaf.grad is not None
    if np.abs(w).max() > 1e-6:  # an all-zero tensor has no gradient here, and NaN there
        step = np.abs(grad).max() / np.abs(np.tanh(w)).max()  # the two terms of an element may cancel; the sums have another order
        assert np.allclose(ours, leaf.grad.numpy(), rtol=1e-9, atol=1e-12 * w.size * step)
    elif not w.any():
        assert not ours.any()


@given(
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-9, 9)), st.floats(0.1, 8), st.booleans(), st.sampled_from([1, 3, 4, 32])
)
def test_activation_formula(x: np.ndarray, clip: float, negative: bool, bits: int) -> None:
    x[:: max(len(x) // 3, 1)] = clip  # ends of the interval count half
    x[1 :: max(len(x) // 3, 1)] = 0.0
    grad, reach = np.cos(np.arange(len(x))), 6.0
    coef = torch.tensor([-clip if negative else clip], dtype=torch.float64, requires_grad=True)
    y, dx = value_and_grad(lambda v: divided_clip(v, coef, bits, reach), x, grad, torch.float64)
    u = np.clip(x, 0, clip)
    n = 2**bits - 1
    expected = u / clip * reach if bits == 32 else np.rint(u / clip * n) * (reach / n)
    assert np.array_equal(y, expected) or np.allclose(y, expected, rtol=1e-15, atol=0)  # 32 bits: u / a * R in one order or the other
    inside = (np.sign(x) - np.sign(x - clip)) / 2
    assert np.allclose(dx, grad * reach / clip * inside, rtol=1e-12, atol=1e-12)  # the same factors in another order
    dcoef = (grad * reach * ((1 + np.sign(x - clip)) / (2 * clip) - u / clip**2)).sum() * (-1 if negative else 1)
    assert coef.grad is not None and np.isclose(float(coef.grad[0]), dcoef, rtol=1e-9, atol=1e-9)  # a sum that cancels


def test_all_outputs_lie_on_one_grid_whatever_the_clip() -> None:
    """Branches, shortcuts and blocks share a scale exactly: the same float for every clip, in either precision."""
    x = torch.linspace(-1, 9, 997)
    for dtype in DTYPES:
        scales, values = set(), set()
        for clip in (0.3, 1.0, 2.0, 5.5):
            layer = DividedClip(4, init=clip, return_quant_tensor=True).to(dtype)
            out = layer(x.to(dtype))
            scales.add(float(out.scale))
            values |= set(out.value.tolist())
        assert len(scales) == 1 and len(values) == 16


def test_refusals() -> None:
    for bits in (0, 25, 33):
        with pytest.raises(ValueError, match="1 to 24 bits"):
            tanh_weight(torch.zeros(3), bits)
        with pytest.raises(ValueError, match="1 to 24 bits"):
            divided_clip(torch.zeros(3), torch.ones(1), bits)
    with pytest.raises(ValueError, match="set of 1-bit weights"):
        tanh_weight(torch.zeros(3), 2, signs=True)
    with pytest.raises(ValueError, match="output_range"):
        DividedClip(4, init=0)
    with pytest.raises(TypeError, match="TanhConv2d has no option 'bit'"):
        TanhConv2d(2, 2, 1, bit=4)


def test_injectors_in_plain_brevitas_layers_and_loading() -> None:
    conv = qnn.QuantConv2d(3, 4, 1, weight_quant=TanhWeight, weight_bit_width=2)
    weight = conv.quant_weight()
    assert float(weight.scale) == 0.5 and float(weight.zero_point) == 0 and weight.signed
    assert torch.equal((weight.value / weight.scale).round() * weight.scale, weight.value)
    act = qnn.QuantIdentity(act_quant=UintActDividedClip, bit_width=2, output_range=3.0, clip_init=1.5, return_quant_tensor=True)
    assert act(torch.tensor([1.0])).value.tolist() == [2.0] and float(act(torch.tensor([1.0])).scale) == 1.0
    (coef,) = act.parameters()
    act.load_state_dict({next(iter(act.state_dict())): torch.tensor([3.0])}, strict=True)
    assert next(act.parameters()) is coef and float(coef.detach()) == 3.0
    other = copy.deepcopy(act)
    other.load_state_dict({next(iter(act.state_dict())): torch.tensor([5.0])}, strict=True)
    assert float(next(act.parameters()).detach()) == 3.0 and float(next(other.parameters()).detach()) == 5.0
    with torch.autocast("cpu", torch.bfloat16):
        assert act(torch.ones(2, dtype=torch.bfloat16)).value.dtype is torch.float32
