"""Shifts and shuffles: the published code's results, one-hot depthwise convolutions, and what they lower to."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantlib as ql
from quantlib.layers import DividedClip, FixedPoint, NormalizedImage, Shift2d, ShiftConv2d, ShiftShuffle


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden/diracdeltanet_ops.npz") as arrays:
        return dict(arrays)


def kinds(graph: ql.Graph) -> list[str]:
    return [type(node.op).__name__ for node in graph]


def test_shift_golden(golden: dict[str, np.ndarray]) -> None:
    layer = Shift2d(12)
    assert np.array_equal(layer(torch.from_numpy(golden["shift/x"])).numpy(), golden["shift/y"])
    assert np.array_equal(layer.kernel().numpy(), golden["shift/kernel"])


@settings(max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=6),
)
def test_shift_is_a_one_hot_depthwise_convolution(channels: int, height: int, width: int, moves: list[tuple[int, int]]) -> None:
    layer = Shift2d(channels, moves).double()
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    kernel = layer.kernel().double()
    expected = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=channels)
    assert torch.equal(layer(x), expected)
    g = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(layer(x), x, g)
    (theirs,) = torch.autograd.grad(expected, x, g)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("channels", [16, 116, 128, 232, 464])
def test_shuffle_golden(golden: dict[str, np.ndarray], channels: int) -> None:
    numbers = torch.arange(float(channels)).reshape(1, -1, 1, 1)
    first, second = numbers.chunk(2, 1)
    assert ShiftShuffle()(first, second).flatten().tolist() == golden[f"shuffle/perm{channels}"].tolist()
    if f"interleave/perm{channels}" in golden:
        assert nn.ChannelShuffle(2)(numbers).flatten().tolist() == golden[f"interleave/perm{channels}"].tolist()
    x = torch.from_numpy(golden["shuffle/x"])
    assert np.array_equal(ShiftShuffle()(*x.chunk(2, 1)).numpy(), golden["shuffle/y"])


@given(st.integers(1, 9), st.integers(1, 9))
def test_shuffle_of_unequal_branches(first: int, second: int) -> None:
    joined = torch.arange(float(first + second)).reshape(1, -1, 1, 1)
    cut = 3 * (first + second) // 4
    expected = [*range(cut, first + second), *range(cut)]
    assert ShiftShuffle()(joined[:, :first], joined[:, first:]).flatten().tolist() == expected


def test_in_integers_they_are_wires_and_addresses() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.shift, self.shuffle = DividedClip(4), Shift2d(8), ShiftShuffle()

        def forward(self, x: Tensor) -> Tensor:
            x = self.shift(self.act(x))
            y = self.shuffle(F.relu(x[:, :4]), x[:, 4:])
            return self.shuffle(*y.chunk(2, 1))

    x = torch.randn(2, 8, 5, 4)
    graph = ql.convert(Net().eval(), (8, 5, 4))
    assert set(kinds(graph)) <= {"Input", "Shift", "Select", "Concat", "Reshape"}
    assert ql.verify(Net().eval(), graph, x).ok and ql.estimate(graph, part="xczu3eg").total.dsp == 0
    whole = ql.convert(nn.Sequential(FixedPoint(4, 1), ShiftConv2d(6, 3, bits=2)).eval(), (6, 4, 4))
    assert kinds(whole) == ["Input", "Shift", "Conv2d"]


def test_wrong_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"Shift2d\(3\) takes \(N, 3, H, W\)"):
        Shift2d(3)(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="needs channels and moves"):
        Shift2d(3, [])


# ---------------------------------------------------------------- the image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(c).reshape(3, 1, 1) for c in (MEAN, STD))
    return pixels.float().div(255).sub(mean).div(std)


def test_image_codes_of_all_pixels() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    layer = NormalizedImage(MEAN, STD)
    exact = np.rint((np.arange(256) / 255 - np.array(MEAN)[:, None]) / np.array(STD)[:, None] * 48)
    assert np.array_equal(torch.round(48 * layer(pixels)).reshape(3, 256).numpy(), exact)
    assert -128 <= exact.min() and exact.max() <= 127
    assert torch.equal(layer(normalised(pixels)), layer(pixels))  # a loader's floats are their pixels
    for out_of_range in (-9.0, 9.0):
        assert torch.equal(
            layer(torch.full((1, 3, 1, 1), out_of_range)), layer(normalised(torch.full((1, 3, 1, 1), 0 if out_of_range < 0 else 255)))
        )


def test_image_in_integers_reads_pixels_floats_and_a_stated_grid() -> None:
    net = nn.Sequential(NormalizedImage(MEAN, STD), DividedClip(4)).eval()
    graph = ql.convert(net, (3, 16, 16))
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert (graph.input.type.lo, graph.input.type.hi) == (0, 255) and ql.verify(net, graph, pixels).ok
    exact = copy.deepcopy(net).double()
    codes = torch.round(7.5 * exact(pixels)).float()  # 15 codes over 48ths tie: float64 decides, as in the integers
    for images in (pixels, normalised(pixels)):
        assert torch.equal(torch.round(7.5 * ql.run(graph, images)), codes)
    stated = ql.convert(net, (3, 16, 16), input=ql.Grid(-128, 127, 1 / 32))
    n = torch.randint(-128, 128, (2, 3, 16, 16), dtype=torch.int8)
    assert torch.equal(torch.round(7.5 * ql.run(stated, n)), torch.round(7.5 * exact(n.double() / 32)).float())


def test_image_refusals() -> None:
    with pytest.raises(ValueError, match="a larger step"):
        NormalizedImage(MEAN, STD, step=1 / 64)
    with pytest.raises(ValueError, match="has 3 channels"):
        NormalizedImage(MEAN, STD)(torch.zeros(1, 1, 2, 2))
