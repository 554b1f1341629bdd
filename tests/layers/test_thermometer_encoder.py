"""The thermometer: golden level tables, ties, and the order of its channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import quantlib as ql
from quantlib.layers import ThermometerEncoder

PIXELS = torch.arange(256).reshape(1, 1, 16, 16)


@pytest.mark.parametrize("resolution", [4, 8, 16, 32])
def test_golden_levels(shared: Any, resolution: int) -> None:
    golden = np.load(shared / "golden/fracbnn_layer_grads.npz", allow_pickle=False)
    levels = torch.from_numpy(golden[f"encoder_r{resolution}/levels"])
    encoder = ThermometerEncoder(resolution)
    assert 3 * encoder.planes == int(golden[f"encoder_r{resolution}/channels"])
    for x in (PIXELS / 255, PIXELS.double() / 255, PIXELS.to(torch.uint8)):
        planes = encoder(x)
        assert set(planes.unique().tolist()) == {-1, 1}
        assert torch.equal((planes > 0).sum(1).flatten(), levels)
        assert planes.dtype is (torch.float64 if x.dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("resolution", [4, 8, 16, 32, 51])
def test_ties_go_to_the_even_level(resolution: int) -> None:
    levels = (ThermometerEncoder(resolution)(PIXELS / 255) > 0).sum(1).flatten()
    top = round(255 / resolution)
    expected = [min(top, v // resolution + int(2 * (v % resolution) > resolution - (v // resolution) % 2)) for v in range(256)]
    assert levels.tolist() == expected


def test_channels_are_colour_major() -> None:
    x = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    planes = ThermometerEncoder(8)(x).flatten()
    assert [int((planes[c * 32 : (c + 1) * 32] > 0).sum()) for c in range(3)] == [0, 16, 32]
    assert bool((planes[32:64].diff() <= 0).all())  # lowest threshold first


def test_values_outside_the_image_range_saturate() -> None:
    x = torch.tensor([-0.2, 1.3]).reshape(2, 1, 1, 1)
    assert ThermometerEncoder(8)(x).sum((1, 2, 3)).tolist() == [-32, 32]


def test_no_state_and_no_gradient() -> None:
    encoder = ThermometerEncoder(8)
    assert not encoder.state_dict() and not list(encoder.buffers())
    assert not encoder(torch.rand(1, 1, 2, 2, requires_grad=True)).requires_grad


def test_lowered_table_of_all_codes() -> None:
    """An image of codes: the integer thresholds reproduce the float32 table, for uint8 and for real input alike."""
    encoder = torch.nn.Sequential(ThermometerEncoder(8))
    graph = ql.convert(encoder, (1, 16, 16))
    codes = ql.run(graph, PIXELS.to(torch.uint8), integers=True)
    expected = encoder(PIXELS / 255)
    assert torch.equal(codes[graph.outputs[0]].float(), expected)
    assert torch.equal(ql.run(graph, PIXELS / 255), expected)


def test_normalised_input_is_encoded_through_levels() -> None:
    """x * std + mean before the encoder, as the ImageNet network does: no grid of codes is needed."""

    class Denormalise(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1))
            self.encoder = ThermometerEncoder(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x * self.std + self.mean)  # type: ignore[no-any-return, operator]

    model = Denormalise()
    pixels = torch.randint(0, 256, (2, 3, 9, 7)) / 255
    x = (pixels - model.mean) / model.std  # type: ignore[operator]
    graph = ql.convert(model, (3, 9, 7))
    # the same arithmetic in float64 on the float32 image: what conversion defines
    reference = model.double()(x.double())
    assert torch.equal(ql.run(graph, x), reference.float())
