"""ShuffleNetV2, from which DiracDeltaNet was derived; in full precision.

Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, arXiv 1807.11164, as in
Yang et al., "Synetgy", FPGA 2019, arXiv 1811.08634. Code: Yang-YiFan/DiracDeltaNet (Apache-2.0).
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo._registry import Card, Claim, register

REAL = 32


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class ShuffleBlock(nn.Module):
    """(N, I, H, W) -> (N, C, H, W), or (N, C, H/2, W/2) where it downsamples; the branches' channels are interleaved.

    Stride 1 (I = C): half of the channels pass by. Downsampling: both branches read all channels.
    """

    def __init__(self, inputs: int, outputs: int, downsample: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.split, stride = not downsample, 2 if downsample else 1
        self.conv1, self.bn1 = pointwise(inputs // 2 if self.split else inputs, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = depthwise(half, stride), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = pointwise(half, half), nn.BatchNorm2d(half)
        self.shortcut = nn.Sequential()
        if downsample:
            self.shortcut.extend([depthwise(inputs, 2), nn.BatchNorm2d(inputs), pointwise(inputs, half), nn.BatchNorm2d(half)])
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, main = x.chunk(2, 1) if self.split else (x, x)
        main = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(main)))))
        main = F.relu(self.bn3(self.conv3(main)))
        return self.shuffle(torch.cat([F.relu(self.shortcut(shortcut)), main], 1))


class ShuffleNetV2(nn.Module):
    """(N, 3, H, W), normalised -> (N, classes). base: channels of layer1; layer2 and layer3 have two and four times as many."""

    def __init__(self, base: int, classes: int, blocks: tuple[int, ...] = (4, 8, 4), features: int = 1024) -> None:
        super().__init__()
        if base % 2 or base < 2:
            raise ValueError(f"base={base}: the branches of a block share its channels, so it is even")
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24)
        channels = 24
        for layer, count in enumerate(blocks):
            width = base << layer
            rows = [ShuffleBlock(channels, width, downsample=True), *(ShuffleBlock(width, width, False) for _ in range(count - 1))]
            self.add_module(f"layer{layer + 1}", nn.Sequential(*rows))
            channels = width
        self.layers = len(blocks)
        self.conv2, self.bn2 = pointwise(channels, features), nn.BatchNorm2d(features)
        self.linear = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for layer in range(1, self.layers + 1):
            x = getattr(self, f"layer{layer}")(x)
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys are ours; torchvision's `shufflenet_v2_x1_0` is the same network under other names."""
        return {_from_torchvision(key): value for key, value in tensors.items()} if "conv1.0.weight" in tensors else tensors


_PARTS = {"branch1.": "shortcut.", "branch2.0.": "conv1.", "branch2.1.": "bn1.", "branch2.3.": "conv2.", "branch2.4.": "bn2.",
          "branch2.5.": "conv3.", "branch2.6.": "bn3."}  # fmt: skip
_ENDS = {"conv1.0.": "conv1.", "conv1.1.": "bn1.", "conv5.0.": "conv2.", "conv5.1.": "bn2.", "fc.": "linear."}


def _from_torchvision(key: str) -> str:
    inside = re.fullmatch(r"stage(\d+)\.(\d+)\.(branch1\.|branch2\.\d+\.)(.*)", key)
    if inside:
        stage, block, part, rest = inside.groups()
        return f"layer{int(stage) - 1}.{block}.{_PARTS.get(part, part)}{rest}"
    return next((ours + key[len(theirs) :] for theirs, ours in _ENDS.items() if key.startswith(theirs)), key)


@register(
    Card(
        title="ShuffleNetV2 1x, the float network that DiracDeltaNet was derived from",
        paper="Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018",
        arxiv="1807.11164",
        code="Yang-YiFan/DiracDeltaNet",
        licence="Apache-2.0 (published code)",
        input_shape=(3, 224, 224),
        classes=1000,
        parameters=2_278_604,
        macs=144_907_992,
        options={
            "weight_bits": "32; other widths are refused",
            "act_bits": "32; other widths are refused",
            "base": "channels of the first layer of blocks, even (1x: 116)",
            "num_classes": "rows of the classifier",
        },
        converts=(),
        normalisation=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        claims=(
            Claim("top-1 accuracy, ImageNet", 69.4, "%", "its paper, as quoted by DiracDeltaNet's README"),
            Claim("top-1 accuracy, ImageNet, 90 epochs", 67.9, "%", "README of DiracDeltaNet's code"),
            Claim("top-5 accuracy, ImageNet, 90 epochs", 88.0, "%", "README of DiracDeltaNet's code"),
        ),
        notes=(
            "Equal to torchvision's shufflenet_v2_x1_0, whose weights zoo.load reads. The published code takes bit widths for it and never "
            "uses them (a misspelt method), so there is no quantized ShuffleNetV2 to reproduce; DiracDeltaNet is the quantized one."
        ),
    )
)
def shufflenetv2_imagenet(*, weight_bits: int = REAL, act_bits: int = REAL, base: int = 116, num_classes: int = 1000) -> ShuffleNetV2:
    if (weight_bits, act_bits) != (REAL, REAL):
        raise ValueError(
            f"ShuffleNetV2 is never quantized (weight_bits={weight_bits}, act_bits={act_bits}): the published code ignores its bit widths. "
            "For low bits take diracdeltanet_imagenet"
        )
    return ShuffleNetV2(base, num_classes)
