"""FuSeConv2d: the published operator with its gradients, plain loops, and a batch norm for both directions at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantlib.layers import FuSeConv2d

CASES = [(v, k, s, size) for v in ("half", "full") for k in (3, 5) for s in (1, 2) for size in ("13x10", "16x16")]


@pytest.mark.parametrize(("variant", "kernel", "stride", "size"), CASES)
def test_published_operator_and_gradients(variant: Any, kernel: int, stride: int, size: str, shared: Any) -> None:
    golden = np.load(shared / "golden" / "fuseconv_ops.npz")
    at = f"op/{variant}/k{kernel}/s{stride}/{size}/"
    x, w_row, w_col, y, gy, gx, gw_row, gw_col = (
        torch.from_numpy(golden[at + n]) for n in ("x", "w_row", "w_col", "y", "gy", "gx", "gw_row", "gw_col")
    )
    layer = FuSeConv2d(x.shape[1], kernel, stride, variant=variant)
    layer.load_state_dict({"rows.0.weight": w_row, "columns.0.weight": w_col})
    x.requires_grad_()
    out = layer(x)
    out.backward(gy)
    for ours, theirs in ((out, y), (x.grad, gx), (layer.rows[0].weight.grad, gw_row), (layer.columns[0].weight.grad, gw_col)):
        # float32 sums of up to 13 * 16 * 2 products in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 3, 5, 7]), st.integers(1, 3), st.sampled_from(["half", "full"]), st.integers(1, 2),
    st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31),
)  # fmt: skip
def test_is_what_its_table_says(pairs: int, kernel: int, stride: int, variant: Any, copies: int, h: int, w: int, seed: int) -> None:
    """Integers in float64, so that any order of summation gives the same."""
    rng = np.random.default_rng(seed)
    channels, far = 2 * pairs, kernel // 2
    layer = FuSeConv2d(channels, kernel, stride, variant=variant, copies=copies).double()
    x = rng.integers(-9, 10, (channels, h, w))
    maps = []
    for direction, convs in (("row", layer.rows), ("column", layer.columns)):
        for conv in convs:
            assert isinstance(conv.weight, torch.Tensor)
            taps = rng.integers(-9, 10, (conv.weight.shape[0], kernel))
            with torch.no_grad():
                conv.weight.copy_(torch.from_numpy(taps).reshape(conv.weight.shape))
            first = channels // 2 if variant == "half" and direction == "column" else 0
            for c, row in enumerate(taps):
                plane = np.pad(x[first + c], far)
                maps.append([
                    [sum(int(row[t]) * int(plane[i + far, j + t] if direction == "row" else plane[i + t, j + far]) for t in range(kernel))
                     for j in range(0, w, stride)] for i in range(0, h, stride)
                ])  # fmt: skip
    out = layer(torch.from_numpy(x).double()[None])
    assert layer.out_channels == len(maps)
    assert np.array_equal(out[0].detach().numpy(), np.array(maps))


def test_one_norm_is_two_norms() -> None:
    """Training statistics and results of a norm over both directions are those of one norm each."""
    torch.manual_seed(0)
    layer, both = FuSeConv2d(6, 3).double(), nn.BatchNorm2d(6).double()
    rows, columns = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    x = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    y = layer(x)
    apart = torch.cat([rows(layer.rows[0](x[:, :3])), columns(layer.columns[0](x[:, 3:]))], 1)
    torch.testing.assert_close(both(y), apart, rtol=1e-12, atol=1e-12)  # one tensor or two: another order of summation
    torch.testing.assert_close(both.running_var, torch.cat([rows.running_var, columns.running_var]), rtol=1e-12, atol=0)  # likewise


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((5, 3), "halved"), ((4, 2), "odd"), ((4, 0), "odd")],
)
def test_refusals(arguments: tuple[int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FuSeConv2d(*arguments)
    with pytest.raises(ValueError, match="half or full"):
        FuSeConv2d(4, 3, variant="quarter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="copies"):
        FuSeConv2d(4, 3, copies=0)
