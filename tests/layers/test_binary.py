"""BinaryConv2d and BinaryLinear as layers of somebody's own network."""

from __future__ import annotations

import pytest
import torch
from brevitas import nn as qnn
from torch import nn

from quantlib.layers import BinaryConv2d, BinaryLinear, LearnedScaleHardTanh, LearnedScaleReLU, QuantSign, ScaledIntConv2d, ScaledIntLinear


@pytest.mark.parametrize("sign_of_zero", [-1.0, 0.0, 1.0])
def test_zero_weights_follow_the_option(sign_of_zero: float) -> None:
    for layer in (BinaryConv2d(2, 3, 1, sign_of_zero=sign_of_zero), BinaryLinear(2, 3, sign_of_zero=sign_of_zero)):
        nn.init.zeros_(layer.weight)
        assert layer.quant_weight().value.unique().tolist() == [sign_of_zero]


def test_real_weights_switch() -> None:
    x = torch.randn(2, 3, 5, 5)
    conv = BinaryConv2d(3, 4, 3, real_weights=True)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight))
    conv.real_weights = False
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight.sign()))
    linear = BinaryLinear(5, 2, bias=True, real_weights=True)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_they_stay_brevitas_layers() -> None:
    conv = BinaryConv2d(3, 4, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    assert isinstance(conv, qnn.QuantConv2d) and list(conv.state_dict()) == ["weight"]
    assert (conv.stride, conv.padding, conv.dilation, conv.groups) == ((2, 1), (1, 0), (1, 2), 1)
    assert float(conv.quant_weight().bit_width) == 1


def test_gradient_stops_at_the_clip() -> None:
    layer = BinaryLinear(3, 1, clip=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.4, 0.5, 0.6]]))
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[1, 1, 0]]


def test_a_misspelt_option_is_refused() -> None:
    """Brevitas itself ignores keywords that it does not know."""
    for build in (
        lambda **o: BinaryConv2d(2, 2, 1, **o),
        lambda **o: BinaryLinear(2, 2, **o),
        lambda **o: ScaledIntConv2d(2, 2, 1, **o),
        lambda **o: ScaledIntLinear(2, 2, **o),
    ):
        with pytest.raises(TypeError, match="no option 'pading'"):
            build(pading=1)
        build(return_quant_tensor=False)


def test_impossible_settings_are_refused_when_built() -> None:
    with pytest.raises(ValueError, match="two bits"):
        ScaledIntConv2d(2, 2, 1, bits=1)
    with pytest.raises(ValueError, match="signed activation needs at least 2 bits"):
        LearnedScaleHardTanh(1)
    with pytest.raises(ValueError, match="one bit"):
        QuantSign(0)
    for layer in (LearnedScaleReLU, LearnedScaleHardTanh):
        with pytest.raises(ValueError, match="positive and finite"):
            layer(4, init=0.0)
