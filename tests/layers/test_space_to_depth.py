"""Space to depth: recorded values, a loop, and what it costs in a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib as ql
from quantlib import ops
from quantlib.layers import HalfWave, ImageFloor, ScaledIntConv2d, SpaceToDepth


def test_recorded_reorg(shared):
    with np.load(shared / "golden/mixq_detection.npz") as golden:
        assert np.array_equal(SpaceToDepth(2)(torch.from_numpy(golden["reorg.input"])).numpy(), golden["reorg.output"])


@pytest.mark.parametrize("block,shape", [(2, (2, 3, 4, 6)), (3, (1, 2, 6, 3)), (1, (2, 2, 3, 5))])
def test_against_a_loop(block, shape):
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    y = SpaceToDepth(block)(x)
    n, c, h, w = shape
    assert y.shape == (n, c * block * block, h // block, w // block)
    for channel in range(y.shape[1]):
        dy, dx, source = channel // c // block, channel // c % block, channel % c
        assert torch.equal(y[:, channel], x[:, source, dy::block, dx::block])


def test_a_map_that_does_not_divide():
    with pytest.raises(ValueError, match="5x4 does not divide"):
        SpaceToDepth(2)(torch.zeros(1, 1, 5, 4))


class Bypass(nn.Module):
    """A real branch as space to depth beside a pooled one, quantized once behind the join."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.first, self.norm = ImageFloor(8), ScaledIntConv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.reorg, self.act, self.last = SpaceToDepth(2), HalfWave(4), ScaledIntConv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.image(x)))
        return self.last(self.act(torch.cat([self.reorg(x), nn.functional.max_pool2d(x, 2)], 1)))


def test_a_join_streams():
    """Slices and concats only: a Rearrange or a Reshape in front of a Concat would hold whole maps in memory."""
    torch.manual_seed(2)
    model = Bypass().eval()
    graph = ql.convert(model, (3, 6, 8))
    kinds = [type(node.op) for node in graph]
    assert kinds.count(ops.Slice2d) == 4 and kinds.count(ops.Concat) == 2
    assert not {ops.Rearrange, ops.Reshape} & set(kinds)
    x = torch.randint(0, 256, (3, 3, 6, 8), dtype=torch.uint8)
    assert ql.verify(model, graph, x).ok
