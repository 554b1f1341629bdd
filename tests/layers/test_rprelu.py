"""RPReLU and RSign: golden values and the modules that they fuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantlib as ql
from quantlib.layers import FixedPoint, RPReLU, RSign


@pytest.mark.parametrize("case", ["rprelu", "rsign"])
def test_golden(shared: Any, case: str) -> None:
    golden = np.load(shared / "golden/fracbnn_layer_grads.npz", allow_pickle=False)
    layer: nn.Module = RPReLU(5) if case == "rprelu" else RSign(5)
    names = {"shift_x.bias": "shift_x", "shift_y.bias": "shift_y", "prelu.weight": "prelu"}
    keys = {k: v for k, v in names.items() if f"{case}/{v}" in golden}
    layer.load_state_dict({k: torch.from_numpy(golden[f"{case}/{v}"]) for k, v in keys.items()}, strict=True)
    x = torch.from_numpy(golden[f"{case}/input"]).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(golden[f"{case}/grad_out"]))
    assert np.array_equal(y.detach().numpy(), golden[f"{case}/output"])
    assert x.grad is not None and np.array_equal(x.grad.numpy(), golden[f"{case}/grad_in"])
    for k, v in keys.items():
        grad = layer.get_parameter(k).grad
        # 48 float32 terms per channel, summed in an order that depends on the library
        assert grad is not None and np.allclose(grad.numpy(), golden[f"{case}/grad_{v}"], rtol=0, atol=4e-6)


@given(st.integers(0, 2**31), st.sampled_from([(4, 3), (2, 3, 5), (2, 3, 2, 4)]))
def test_equals_the_modules_it_fuses(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    layer = RPReLU(3).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape, dtype=torch.float64)
    x.reshape(-1)[0] = -layer.shift_x.bias.detach().reshape(-1)[0]  # u = 0 exactly
    along = [1, 3, *[1] * (len(shape) - 2)]
    plain, leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    shift_x, slope, shift_y = (p.detach().clone().requires_grad_() for p in (layer.shift_x.bias, layer.prelu.weight, layer.shift_y.bias))
    expected = nn.functional.prelu(plain + shift_x.reshape(along), slope) + shift_y.reshape(along)
    y = layer(leaf)
    g = torch.randn_like(y)
    expected.backward(g)
    y.backward(g)
    assert torch.equal(y, expected) and torch.equal(leaf.grad, plain.grad)  # type: ignore[arg-type]
    for a, b in ((layer.shift_x.bias, shift_x), (layer.prelu.weight, slope), (layer.shift_y.bias, shift_y)):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]  # sums in another order


def test_wrong_channels_are_named() -> None:
    for layer in (RPReLU(4), RSign(4)):
        with pytest.raises(ValueError, match=r"4 channels.*\(2, 3, 5, 5\)"):
            layer(torch.zeros(2, 3, 5, 5))


def test_keys_are_the_published_ones() -> None:
    shapes = {k: tuple(v.shape) for k, v in RPReLU(6).state_dict().items()}
    assert shapes == {"shift_x.bias": (1, 6, 1, 1), "prelu.weight": (6,), "shift_y.bias": (1, 6, 1, 1)}


def test_negative_slopes_are_not_bisected() -> None:
    """A V-shaped channel in front of a quantizer: every code of a wide accumulator must be right."""
    torch.manual_seed(0)
    layer = RPReLU(3)
    with torch.no_grad():
        layer.prelu.weight.copy_(torch.tensor([-1.0, 0.5, -0.25]))
    model = nn.Sequential(FixedPoint(11, 4), layer, FixedPoint(6, 0))
    x = torch.linspace(-64, 63, 2048 * 3).reshape(-1, 3, 1, 1)
    assert ql.verify(model, ql.convert(model, (3, 1, 1)), x).ok


def test_rsign_output_grids() -> None:
    x = torch.tensor([[-1.0], [0.0], [2.0]])
    assert RSign(1)(x).flatten().tolist() == [-1, 0, 1]
    assert RSign(1, sign_of_zero=1.0)(x).flatten().tolist() == [-1, 1, 1]
    for zero, step in ((0.0, 1), (1.0, 2), (-1.0, 2)):
        graph = ql.convert(nn.Sequential(FixedPoint(4, 1), RSign(2, sign_of_zero=zero)), (2, 3, 3))
        t = graph.by_name[graph.outputs[0]].type
        assert (t.lo, t.hi, t.step) == (-1, 1, step)
