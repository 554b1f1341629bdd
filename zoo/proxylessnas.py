"""Quantized ProxylessNAS mobile14, an entry of the MicroNet challenge 2019: 4-bit weights and activations, 5 bits around depthwise layers.

Cai, Zhu, Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019, arXiv 1812.00332. Quantized and
trained with Brevitas of October 2019 (Xilinx/brevitas, commit 180a9d73) for the challenge.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers import LearnedScaleReLU, ScaledIntConv2d, ScaledIntLinear, SharedHardTanh, TruncAvgPool
from quantlib.ops.requant import Requant
from quantlib.tails import RealInput
from zoo._registry import Card, Claim, register

Row = tuple[int, int, int, int]  # output channels, expansion, kernel, stride
Stages = tuple[tuple[Row, ...], ...]
STAGES: Stages = (
    ((24, 1, 3, 1),),
    ((40, 3, 5, 2), (40, 3, 3, 1)),
    ((56, 3, 7, 2), (56, 3, 3, 1), (56, 3, 5, 1), (56, 3, 5, 1)),
    ((112, 6, 7, 2), *[(112, 3, 5, 1)] * 3, (136, 6, 5, 1), *[(136, 3, 5, 1)] * 3),
    ((256, 6, 7, 2), (256, 6, 7, 1), *[(256, 3, 7, 1)] * 2, (448, 6, 7, 1)),
)
REDUCED: Stages = (
    ((24, 1, 3, 1),),
    ((40, 3, 5, 2), (40, 3, 3, 1)),
    ((56, 6, 7, 2), (56, 3, 3, 1)),
    ((112, 3, 5, 1),),
)  # every kind of unit
FIRST, LAST = 48, 1792
_SCALE = ".scaling_impl.value"


class Centred(nn.Module):
    """uint8 pixels p become floats (p - 128) / 128; floats are taken as such already. TypeError for other integers."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x
        if x.dtype != torch.uint8:
            raise TypeError(f"the image holds {x.dtype}: give uint8 pixels p, or floats (p - 128) / 128")
        return (x.float() - 128) / 128


class Pixels(Centred):
    """The 8-bit image: uint8 pixels p, or floats (p - 128) / 128 as a loader gives them, on the grid of 2^-7.

    Forward:   code = clip(rne(128 x), -128, 127), y = code / 128; uint8 pixels have code p - 128
    Gradient:  none: an image learns nothing
    Shapes:    (N, C, H, W) -> the same
    Ranges:    codes -128..127, so padding with zeros is pixel 128. In integers the input is the pixel, 0..255
    Errors:    TypeError for integers other than uint8
    Source:    MicroNet submission, input (p - 128) / 128 with 8 bits; it does not round, as all its images lie on the grid
    """

    grid = Grid(-128, 127, 2.0**-7)
    out_bits = 8

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) * 128).round().clamp(-128, 127) / 128

    def lower(self, g: Any, x: Any) -> Any:
        if not isinstance(x, RealInput):  # an image whose grid the user stated
            return g.quantize(self, x, self.grid, uniform=True)
        pixel = g.quantize(lambda t: self(t) + 1, x, Grid(0, 255, 2.0**-7), uniform=True)
        return g.add(Requant(mul=np.array([1]), add=np.array([-128]), shift=0, lo=-128, hi=127), pixel)


@dataclass(frozen=True)
class Parts:
    """What the network is made of; conv takes the place of a layer ("first", "dense", "depthwise") beside the arguments of nn.Conv2d."""

    pixels: Callable[[], nn.Module]
    conv: Callable[..., nn.Module]
    relu: Callable[[], nn.Module]
    relu_of_depthwise: Callable[[int], nn.Module]
    relu_of_pool: Callable[[], nn.Module]
    hard_tanh: Callable[[], nn.Module]
    pool: Callable[[int], nn.Module]
    linear: Callable[[int, int], nn.Module]


def real() -> Parts:
    """The float network that training starts from."""

    def relu6(*_: int) -> nn.Module:
        return nn.ReLU6()

    return Parts(
        pixels=Centred,
        conv=lambda place, *args, **kwargs: nn.Conv2d(*args, **kwargs),
        relu=relu6,
        relu_of_depthwise=relu6,
        relu_of_pool=relu6,
        hard_tanh=nn.Identity,
        pool=lambda size: nn.AvgPool2d(size, 1),
        linear=nn.Linear,
    )


def quantized(bits: int, depthwise: int, first: int, threshold: float) -> Parts:
    """The submission's quantizers. ValueError for bits that are not whole numbers of 2 or more (weights have a narrow range)."""
    for name, value in (("bit_width", bits), ("depthwise_bit_width", depthwise), ("first_layer_bit_width", first)):
        if not isinstance(value, int) or value < 2:
            raise ValueError(f"{name}={value!r}: give a whole number of bits, 2 or more")
    weight_bits = {"first": first, "dense": bits, "depthwise": depthwise}

    def linear(channels: int, classes: int) -> nn.Module:
        accumulator = ((2**bits - 1) * (2**bits - 2) * channels - 1).bit_length()  # ceil(log2(...)): 19 bits for 1792 inputs of 4 bits
        return ScaledIntLinear(channels, classes, bits=bits, per_channel=False, bias_bits=accumulator)

    return Parts(
        pixels=Pixels,
        conv=lambda place, *args, **kwargs: ScaledIntConv2d(*args, bits=weight_bits[place], **kwargs),
        relu=lambda: LearnedScaleReLU(bits),
        relu_of_depthwise=lambda channels: LearnedScaleReLU(depthwise, channels=channels),
        relu_of_pool=lambda: LearnedScaleReLU(bits, return_quant_tensor=True),
        hard_tanh=lambda: SharedHardTanh(bits, init=threshold),
        pool=lambda size: TruncAvgPool(size, 1),
        linear=linear,
    )


class ConvBlock(nn.Module):
    """activ(bn(conv(x))), padding (k - 1) / 2: (N, I, H, W) -> (N, O, H/stride, W/stride)."""

    def __init__(self, use: Parts, place: str, channels_in: int, channels: int, kernel: int, activ: nn.Module, stride: int = 1) -> None:
        super().__init__()
        groups = channels if place == "depthwise" else 1
        self.conv = use.conv(place, channels_in, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.activ = activ

    def forward(self, x: Tensor) -> Tensor:
        return self.activ(self.bn(self.conv(x)))


class Unit(nn.Module):
    """Inverted bottleneck, (N, I, H, W) -> (N, O, H/stride, W/stride): 1x1 to I * expand channels (none for expand 1), depthwise, 1x1.

    With a shortcut y = shared_act(x + body(x)), and body ends in the shared_act that x has come through: an addition of integers of one
    scale, which the outer call only clamps.
    """

    def __init__(self, use: Parts, channels_in: int, row: Row, shared_act: nn.Module, shortcut: bool) -> None:
        super().__init__()
        channels, expand, kernel, stride = row
        middle = channels_in * expand
        self.body = nn.Sequential()
        if expand > 1:
            self.body.add_module("bc_conv", ConvBlock(use, "dense", channels_in, middle, 1, use.relu_of_depthwise(middle)))
        self.body.add_module("dw_conv", ConvBlock(use, "depthwise", middle, middle, kernel, use.relu(), stride))
        self.body.add_module("pw_conv", ConvBlock(use, "dense", middle, channels, 1, shared_act))
        self.shared_act, self.shortcut = shared_act, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.shared_act(x + y) if self.shortcut else y


class ProxylessNAS(nn.Module):
    """(N, 3, image_size, image_size), uint8 pixels p or floats (p - 128) / 128 -> (N, classes).

    stages: rows of each stage; a unit has a shortcut where it keeps stride and channels, and then shares the hardtanh of the unit before.
    width multiplies all channels but the image's. The last map is averaged whole.
    """

    def __init__(self, use: Parts, classes: int, width: float, stages: Stages, image_size: int) -> None:
        super().__init__()
        for row in (row for rows in stages for row in rows):
            if len(row) != 4 or row[2] % 2 == 0:
                raise ValueError(f"stages: the row {row} is not (output channels, expansion, odd kernel, stride)")
        total_stride = 2 * prod(row[3] for rows in stages for row in rows)
        if image_size < 1 or image_size % total_stride:
            raise ValueError(f"image_size={image_size}: the strides of these stages want a multiple of {total_stride}")
        scaled = {c: c * width for c in (FIRST, LAST, *(row[0] for rows in stages for row in rows))}
        if any(c < 1 or c != int(c) for c in scaled.values()):
            raise ValueError(f"width={width}: {', '.join(map(str, scaled))} channels times width must be whole numbers")
        self.pixels = use.pixels()
        channels = int(scaled[FIRST])
        self.features = nn.Sequential()
        self.features.add_module("init_block", ConvBlock(use, "first", 3, channels, 3, use.relu(), 2))
        shared: nn.Module | None = None
        for i, rows in enumerate(stages, 1):
            stage = nn.Sequential()
            for j, (out, expand, kernel, stride) in enumerate(rows, 1):
                row = (int(scaled[out]), expand, kernel, stride)
                shortcut = shared is not None and stride == 1 and row[0] == channels
                shared = shared if shared is not None and shortcut else use.hard_tanh()
                stage.add_module(f"unit{j}", Unit(use, channels, row, shared, shortcut))
                channels = row[0]
            self.features.add_module(f"stage{i}", stage)
        self.features.add_module("final_block", ConvBlock(use, "dense", channels, int(scaled[LAST]), 1, use.relu_of_pool()))
        self.final_pool = use.pool(image_size // total_stride)
        self.output = use.linear(int(scaled[LAST]), classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)

    def pooled(self, x: Tensor) -> Any:
        """The input of `output`, (N, 1792): a quantized tensor in the quantized networks. Several dropout masks can share it."""
        return self.final_pool(self.features(self.pixels(x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.pooled(x))

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layouts: names of Brevitas in 2019, of 449 entries, or of 717 with its placeholders and copies of the weights.

        A checkpoint without any learned scale is one of the float network: the scales keep their values, and a UserWarning lists them.
        """
        renamed = {key.replace(".act_quant_proxy.", ".act_quant."): value for key, value in tensors.items()}
        renamed = {
            key.replace(".scaling_impl.learned_value", _SCALE): value
            for key, value in renamed.items()
            if not key.endswith((".zero_hw_sentinel", ".first_tracked_param.parameter"))
        }
        scales = {key: value for key, value in self.state_dict().items() if key.endswith(_SCALE)}
        if not scales or any(key.endswith(_SCALE) for key in renamed):
            return renamed
        lines = [f"the checkpoint has no learned scales, so {len(scales)} entries keep their values, the log2 of a range:"]
        lines += [f"  {key} {tuple(value.shape)}: {value.min():.6g}..{value.max():.6g}" for key, value in scales.items()]
        warnings.warn("\n".join(lines), stacklevel=3)
        return renamed | scales


_HALF = (128 / 255,) * 3
_SMALL: dict[str, Any] = {"width": 1 / 8, "stages": REDUCED, "image_size": 32}
_CARD: dict[str, Any] = {
    "paper": "Cai, Zhu, Han, ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware, ICLR 2019",
    "arxiv": "1812.00332",
    "input_shape": (3, 224, 224),
    "classes": 1000,
    "macs": 580_883_408,
    "normalisation": (_HALF, _HALF),
}
_SHAPE = {
    "num_classes": "rows of the classifier",
    "width": "multiplies all channels; every product must be a whole number",
    "stages": "rows of (output channels, expansion, kernel, stride) for each stage; zoo.proxylessnas.REDUCED has every kind of unit",
    "image_size": "height and width of the image, a multiple of the product of all strides",
}
_QUANTIZED: dict[str, Any] = {
    **_CARD,
    "code": "the MicroNet 2019 submission on Xilinx/brevitas, commit 180a9d73",
    "licence": "that of the published code was not checked; no code or weights of it are here",
    "parameters": 6_867_077,
    "options": {
        "bit_width": "of weights and activations that have no option of their own",
        "depthwise_bit_width": "of depthwise weights, and of the activations that a 1x1 convolution gives them",
        "first_layer_bit_width": "of the first convolution's weights; the image has 8 bits",
        "hard_tanh_threshold": "first range of the quantizers around the residual additions; it is learned",
        **_SHAPE,
    },
    "converts": (_SMALL,),
    "convert_shape": (3, 32, 32),
    "notes": (
        "6,809,288 weights are quantized, 9,509 scales are learned. Images are uint8 pixels or (p - 128) / 128, so padding is pixel 128. "
        "The final pool sums 49 codes and shifts by 6: 49/64 of the mean, and the network is trained that way. The published code floors "
        "that in floats, one too low for many sums that are multiples of 64; here it is exact. The classifier's bias has the 19 bits of "
        "its accumulator. Logits are integers times one scale: ties occur, and an accuracy needs a rule for them. "
        "As published: scales are at least 2e-16 (2^-16 may have been meant), gradients clip before they round, and the cost counts "
        "accumulators with output channels where fan-in was meant."
    ),
}


@register(
    Card(
        title="ProxylessNAS mobile14, float32",
        code="osmr/imgclsmob, release v0.0.331: proxylessnas_mobile14-0662-0c0ad983.pth",
        licence="that of the published code was not checked; no code or weights of it are here",
        parameters=6_857_568,
        options=_SHAPE,
        converts=(),
        notes=(
            "The start of training. Normalised as the quantized networks are; its published weights may have been trained on another "
            "normalisation, which was not checked."
        ),
        **_CARD,
    )
)
def proxylessnas_float_imagenet(
    *, num_classes: int = 1000, width: float = 1.0, stages: Stages = STAGES, image_size: int = 224
) -> ProxylessNAS:
    return ProxylessNAS(real(), num_classes, width, stages, image_size)


_RUN = "random weights, one 224x224 image, tests/zoo/test_proxylessnas.py"


@register(Card(title="ProxylessNAS mobile14, all 4 bits (first step of training)", **_QUANTIZED))
def proxylessnas_4b_imagenet(
    *,
    bit_width: int = 4,
    depthwise_bit_width: int = 4,
    first_layer_bit_width: int = 8,
    hard_tanh_threshold: float = 10.0,
    num_classes: int = 1000,
    width: float = 1.0,
    stages: Stages = STAGES,
    image_size: int = 224,
) -> ProxylessNAS:
    use = quantized(bit_width, depthwise_bit_width, first_layer_bit_width, hard_tanh_threshold)
    return ProxylessNAS(use, num_classes, width, stages, image_size)


@register(
    Card(
        title="ProxylessNAS mobile14, 4 bits, 5 around depthwise layers (MicroNet 2019)",
        claims=(
            Claim("top-1 accuracy, ImageNet, 37506 of 50000", 75.012, "%", "published with the code; the weights were not at hand"),
            Claim(
                "MicroNet cost, printed as 0.5558137893676758", 0.5558137893676758, "(sum of two ratios)", "printed by the published code"
            ),
        ),
        measured=(
            Claim("MicroNet cost, float32 of the exact sum", 0.5558137893676758, "(sum of two ratios)", "ql.analysis.micronet_cost"),
            Claim("codes that differ from the model", 0, "of 16,129,672", f"{_RUN}: ql.verify"),
            Claim("ql.convert", 2.8, "s", f"{_RUN}: one core of an AMD EPYC, torch 2.14.1, 1.5 GB at most"),
            Claim(
                "compiled C++ on one image", 0.6, "s", f"{_RUN}: after 10 s of compilation, the same core, every integer equal to ql.run"
            ),
        ),
        **_QUANTIZED,
    )
)
def proxylessnas_4b5b_imagenet(
    *,
    bit_width: int = 4,
    depthwise_bit_width: int = 5,
    first_layer_bit_width: int = 8,
    hard_tanh_threshold: float = 10.0,
    num_classes: int = 1000,
    width: float = 1.0,
    stages: Stages = STAGES,
    image_size: int = 224,
) -> ProxylessNAS:
    use = quantized(bit_width, depthwise_bit_width, first_layer_bit_width, hard_tanh_threshold)
    return ProxylessNAS(use, num_classes, width, stages, image_size)
