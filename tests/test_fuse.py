"""FuSe layers put into other people's models: which layers, what the full variant widens, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import quantlib as ql
import zoo
from quantlib import fuse
from quantlib.layers import FuSeConv2d, LearnedScaleReLU, ScaledIntConv2d

SIZE = (3, 32, 32)


def block(channels: int = 8, **options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options),
        nn.BatchNorm2d(channels), nn.PReLU(channels), nn.Conv2d(channels, 5, 1),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n in ("mobilenet_v2", "mobilenet_v3_small") for v in ("half", "full")])
def test_other_peoples_networks(name: str, variant: Any) -> None:
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse.replace_depthwise(model, SIZE, variant)
    layers = [m for m in fused.modules() if isinstance(m, FuSeConv2d)]
    assert len(layers) == len(fuse.depthwise(model)) and not fuse.depthwise(fused)
    assert fused(torch.randn(2, *SIZE)).shape == (2, 10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_of_the_published_network_is_the_published_half() -> None:
    """V2 at 224: the counts of the paper's table, but for the 1,088 idle parameters of the published half network."""
    fused = fuse.replace_depthwise(zoo.get("mobilenet_v2_imagenet"), (3, 224, 224))
    assert sum(p.numel() for p in fused.parameters()) == zoo.card("mobilenet_v2_fuse_half_imagenet").parameters - 1088
    latency = ql.analysis.systolic_latency(fused, (3, 224, 224), array="fuse").cycles
    assert latency == 411_682  # fuseconv_table.csv, MobileNetV2 half, 64 x 64, FuSe


def test_full_keeps_a_network_that_ignores_columns() -> None:
    """Row filters that are a centre tap pass x on, likewise columns: with both, the widened layers give the sum of two equal halves."""
    torch.manual_seed(0)
    model = block(bias=True).eval()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].weight[:, :, 1, 1] = torch.randn(8, 1)
        model[4].weight.copy_(torch.rand(8))
    fused = fuse.replace_depthwise(model, (3, 6, 5), "full")
    for conv, centre in ((fused[2].rows[0], (0, 1)), (fused[2].columns[0], (1, 0))):
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[:, :, centre[0], centre[1]] = model[2].weight[:, :, 1, 1]
            conv.bias.copy_(model[2].bias)
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)  # sums of 16 instead of 8 floats


def test_share_takes_the_greatest_gains() -> None:
    model = zoo.get("mobilenet_v1_imagenet")
    ranked = fuse.gains(model, (3, 64, 64))
    assert [g.cycles for g in ranked] == sorted((g.cycles for g in ranked), reverse=True)
    fused = fuse.replace_depthwise(model, (3, 64, 64), share=0.25)
    chosen = {name for name, m in fused.named_modules() if isinstance(m, FuSeConv2d)}
    assert chosen == {g.name for g in ranked[:4]}
    assert not any(isinstance(m, FuSeConv2d) for m in fuse.replace_depthwise(model, (3, 64, 64), share=0).modules())


def test_the_first_five_of_mobilenet_v1_gain_most() -> None:
    """The published hybrid of V1 is the choice by gain (spec of the paper: the only family of which that holds)."""
    ranked = fuse.gains(zoo.get("mobilenet_v1_imagenet"), (3, 224, 224))
    assert {g.name for g in ranked[:5]} == {f"blocks.{i}.spatial" for i in range(5)}


def test_quantized_layers_keep_their_bits() -> None:
    model = nn.Sequential(
        LearnedScaleReLU(4), ScaledIntConv2d(4, 4, 3, padding=1, groups=4, bits=3), LearnedScaleReLU(4), ScaledIntConv2d(4, 2, 1)
    )
    for variant in ("half", "full"):
        fused = fuse.replace_depthwise(model, (4, 6, 5), variant)  # type: ignore[arg-type]
        assert int(fused[1].rows[0].weight_quant.bit_width()) == 3
        graph = ql.convert(fused.eval(), (4, 6, 5))
        assert ql.verify(fused, graph, 6 * torch.rand(2, 4, 6, 5)).ok


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.dense = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x + self.depth(x))


class Open(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.depth(x), x], 1)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (Residual(), {}, "depth: its channels meet others in .*half variant"),
        (Open(), {}, "depth: its channels go through .*cat"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)), {}, "reach the output"),
        (Residual(), {"names": ["dense"]}, "dense: it is not depthwise"),
        (Residual(), {"names": ["nowhere"]}, "'nowhere' is no convolution of the model; its depthwise ones are depth"),
        (Residual(), {"share": 1.5}, "share=1.5"),
    ],
)
def test_refusals_name_the_layer(model: nn.Module, options: dict[str, Any], says: str) -> None:
    with pytest.raises(fuse.FuseError, match=says):
        fuse.replace_depthwise(model, (4, 6, 5), "full", **options)


def test_a_layer_of_two_names_is_replaced_under_both() -> None:
    """One depthwise layer that runs twice: the half variant stays one layer, the full one is refused."""
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(4, 2, 1))
    fused = fuse.replace_depthwise(model, (4, 6, 5))
    assert isinstance(fused[0], FuSeConv2d) and fused[2] is fused[0] and model[2] is shared
    with pytest.raises(fuse.FuseError, match="runs 2 times"):
        fuse.replace_depthwise(model, (4, 6, 5), "full")


def test_a_bare_layer_has_no_place_to_put_another() -> None:
    with pytest.raises(fuse.FuseError, match="the model itself"):
        fuse.replace_depthwise(nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 5))


def test_odd_channels_cannot_be_halved() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 2, 1))
    with pytest.raises(fuse.FuseError, match="0: 3 channels cannot be halved; use variant='full'"):
        fuse.replace_depthwise(model, (3, 6, 5))
    assert fuse.replace_depthwise(model, (3, 6, 5), "full")(torch.zeros(1, 3, 6, 5)).shape == (1, 2, 6, 5)
