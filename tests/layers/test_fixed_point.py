"""FixedPoint as a layer, and R on integers as in an accelerator's datapath."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantlib as ql
from quantlib.layers import FixedPoint
from quantlib.quantizers import fixed_point, round_to_integer
from quantlib.quantizers.functions import ROUNDINGS


def test_public_name() -> None:
    assert ql.FixedPoint is FixedPoint


@given(st.integers(-(2**40), 2**40), st.integers(0, 12), st.integers(2, 20), st.sampled_from(ROUNDINGS), st.booleans())
def test_r_matches_exact_rationals(v: int, shift: int, bits: int, rounding: Any, saturation: bool) -> None:
    word = FixedPoint(bits, 0, rounding, saturation)
    u = Fraction(v, 2**shift)
    exact = {
        "half_even": round(u),
        "floor": u.__floor__(),
        "to_zero": int(u),
        "half_up": (u + Fraction(1, 2)).__floor__(),
    }[rounding]
    half = 2 ** (bits - 1)
    expected = min(max(exact, -half), half - 1) if saturation else (exact + half) % (2 * half) - half
    assert int(word.R(torch.tensor([v]), shift)) == expected


@given(st.integers(-(2**20), 2**20), st.integers(0, 8), st.sampled_from(ROUNDINGS))
def test_r_and_the_layer_agree(v: int, shift: int, rounding: Any) -> None:
    word = FixedPoint(12, 3, rounding)
    real = torch.tensor([v], dtype=torch.float64) / 2 ** (shift + 3)
    assert float(word(real)) * 8 == int(word.R(torch.tensor([v]), shift))
    assert int(round_to_integer(torch.tensor([v], dtype=torch.float64) / 2**shift, rounding)) == int(
        FixedPoint(32, 0, rounding).R(torch.tensor([v]), shift)
    )


def test_r_takes_integers_only() -> None:
    with pytest.raises(TypeError, match="integer tensors"):
        FixedPoint(8, 2).R(torch.zeros(1), 1)


@pytest.mark.parametrize("bits", [0, 1, 33])
def test_words_have_2_to_32_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 32 bits"):
        FixedPoint(bits, 0)


def test_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="half_up, half_even, floor, to_zero"):
        FixedPoint(8, 0, "nearest")  # type: ignore[arg-type]


def test_one_object_at_many_places() -> None:
    word = FixedPoint(10, 4)
    model = nn.Sequential(word, nn.ReLU(), word)
    assert not model.state_dict() and repr(copy.deepcopy(word)) == "FixedPoint(bits=10, fraction=4, rounding=half_up, saturation=True)"
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), fixed_point(x, 10, 4).relu())
    assert ql.verify(model, ql.convert(model, (3, 4, 4)), x).ok


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_residual_join_on_a_stated_grid(rounding: Any) -> None:
    """Two branches of different scales join where the model says how: every code, exact ties included."""

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse, self.word = FixedPoint(8, 5), FixedPoint(6, 2), FixedPoint(6, 3, rounding)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fine(x)
            return self.word(x + self.coarse(1.5 * x))  # type: ignore[no-any-return]

    x = torch.arange(-128, 128).reshape(1, 4, 8, 8) / 32
    assert ql.verify(Join(), ql.convert(Join(), (4, 8, 8)), x).ok
