"""FracBNN for ImageNet: the MobileNetV1 shape of ReActNet with gated 2-bit activations and 4-bit shortcuts.

Zhang, Pan, Liu, Chen, Chen, Zhang, "FracBNN: Accurate and FPGA-Efficient Binary Neural Networks with Fractional Activations", FPGA 2021,
arXiv 2012.12206. Code: cornell-zhang/FracBNN (BSD-3-Clause).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.ir import Grid
from quantlib.layers import BinaryConv2d, FixedPoint, QuantSign, ThermometerEncoder
from quantlib.ops.thermometer import Thermometer
from quantlib.tails import RealInput
from zoo import _fracbnn_imagenet_datapath as datapath
from zoo._registry import Card, Claim, register
from zoo.fracbnn import Arithmetic, arithmetic

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCKS = (  # input channels, output channels, stride
    (32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2),
    *[(512, 512, 1)] * 5, (512, 1024, 2), (1024, 1024, 1),
)  # fmt: skip
GRID = FixedPoint(bits=14, fraction=6)


class NormalisedThermometerEncoder(nn.Module):
    """Thermometer code of images that were normalised for ImageNet: x std + mean in float32, as published, then `ThermometerEncoder`.

    x (N, C, H, W) -> (N, 32 C, H, W) for resolution 8. uint8 pixels are normalised first, (v / 255 - mean) / std in float32, so that they
    get the same bits as a loader's floats: 4 or 5 of the 32 ties per colour fall on the other side than without normalisation.

    In integers the input is the pixel, 0..255, and the bits come from a table of all 256 of them. Floats reach the pixel nearest to them
    that has their level, so every float32 image gets the model's own bits.
    """

    out_bits = 1

    def __init__(self, resolution: int = 8) -> None:
        super().__init__()
        self.thermometer = ThermometerEncoder(resolution)

    def forward(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.float32
        x = x if x.is_floating_point() else self.normalised(x, mean, std)
        return self.thermometer(self._restored(x, mean, std)).to(dtype)

    @staticmethod
    def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Pixels 0..255 as a loader gives them to the network."""
        return (pixels.float() / 255 - mean.float()) / std.float()

    @staticmethod
    def _restored(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return x.float() * std.float() + mean.float()

    def _level(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.thermometer.level(self._restored(x, mean, std)).clamp_(0, self.thermometer.planes)

    def lower(self, g: Any, x: Any, mean: Tensor, std: Tensor) -> Any:
        planes = self.thermometer.planes
        if not isinstance(x, RealInput):  # an image whose grid the user stated
            edge = g.quantize(lambda t: self._level(t, mean, std).to(t.dtype), x, Grid(0, planes, 1.0))
            return g.add(Thermometer(np.arange(1, planes + 1)[None, :]), edge, scale=1.0)
        pixels = torch.arange(256).reshape(1, 1, 1, -1).expand(1, x.shape[0], 1, -1)
        table = self._level(self.normalised(pixels, mean, std), mean, std).reshape(x.shape[0], -1)  # (C, 256)
        levels = torch.arange(planes + 1).reshape(-1, 1, 1)
        first, last = (table < levels).sum(2).T, (table <= levels).sum(2).T - 1  # (C, levels): the pixels of each level
        channel = torch.arange(x.shape[0]).reshape(1, -1, *[1] * (len(x.shape) - 1))

        def pixel(t: Tensor) -> Tensor:
            level = self._level(t, mean, std).long()
            nearest = (self._restored(t, mean, std) * 255).round().clamp(0, 255).long()
            return nearest.clamp(first[channel, level], last[channel, level]).to(t.dtype) / 255

        edge = g.quantize(pixel, x, Grid(0, 255, 1 / 255))
        return g.add(Thermometer(first[:, 1:].numpy()), edge, scale=1.0)


class Shortcut(nn.Module):
    """4-bit sign, 2x2 average where stride is 2, then the grid: (N, C, H, W) -> (N, C, H/stride, W/stride)."""

    def __init__(self, stride: int, point: nn.Module) -> None:
        super().__init__()
        self.stride, self.sign, self.point = stride, QuantSign(4), point

    def forward(self, x: Tensor) -> Tensor:
        x = self.sign(x)
        return self.point(F.avg_pool2d(x, 2) if self.stride == 2 else x)


@dataclass(frozen=True)
class Parts:
    """What the blocks are made of; shortcut takes the stride, last stands behind the last block."""

    use: Arithmetic
    shortcut: Callable[[int], nn.Module]
    last: Callable[[], nn.Module]


def parts(fixed_point: None | Literal["authors"] | FixedPoint, real_weights: bool) -> Parts:
    if fixed_point != "authors":
        use = arithmetic(fixed_point, real_weights)
        return Parts(use, shortcut=lambda stride: Shortcut(stride, use.point()), last=use.point)
    use = Arithmetic(
        conv=datapath.WordConv2d,
        norm=datapath.WordBatchNorm2d,
        first_norm=lambda channels: datapath.WordBatchNorm2d(channels, first=True),
        activation=datapath.WordRPReLU,
        sign=lambda: datapath.WordSign(2),
        add=datapath.WordAdd,
        shortcut=nn.Identity,
        mean=lambda: nn.AdaptiveAvgPool2d(1),
        linear=nn.Linear,
        point=nn.Identity,
    )
    return Parts(use, shortcut=datapath.shortcut, last=lambda: datapath.WordSign(4))


class Block(nn.Module):
    """(N, I, H, W) -> (N, O, H/stride, W/stride), O = I or 2 I:

    t = shiftbn1(rprelu1(bn(conv3x3(sign2(x)))) + pool(sign4(x))); y = shiftbn2(rprelu2(bn(conv1x1(sign2(t)))) + twice(sign4(t))).
    The pool is a 2x2 average where stride is 2, twice repeats the channels where O = 2 I. With a grid each branch and each shortcut lies on
    it, so that both sums are sums of integers; what follows is read by the next signs only and needs no grid.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, made_of: Parts) -> None:
        super().__init__()
        use = made_of.use
        self.conv3x3 = nn.Sequential(use.conv(channels_in, channels_in, 3, stride=stride, padding=1), use.norm(channels_in))
        self.pointwise = nn.Sequential(use.conv(channels_in, channels, 1), use.norm(channels))
        self.rprelu1, self.rprelu2 = use.activation(channels_in), use.activation(channels)
        self.shiftbn1, self.shiftbn2 = use.norm(channels_in), use.norm(channels)
        self.shortcut1, self.shortcut2 = made_of.shortcut(stride), made_of.shortcut(1)
        self.sign, self.add, self.point = use.sign(), use.add(), use.point()
        self.repeat = channels // channels_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.shiftbn1(self.add(self.point(self.rprelu1(self.conv3x3(self.sign(x)))), self.shortcut1(x)))
        s = self.shortcut2(x)
        s = torch.cat([s] * self.repeat, 1) if self.repeat > 1 else s
        return self.shiftbn2(self.add(self.point(self.rprelu2(self.pointwise(self.sign(x)))), s))


class FracBNNImageNet(nn.Module):
    """(N, 3, H, W), normalised floats or uint8 pixels -> (N, classes). H and W are multiples of 32; published at 224.

    width multiplies all channels (a multiple of 1/32). Without classes the averages come out, (N, 1024 width).
    """

    def __init__(self, classes: int, fixed_point: None | Literal["authors"] | FixedPoint, real_weights: bool, width: float = 1.0) -> None:
        super().__init__()
        if width * 32 != int(width * 32) or width <= 0:
            raise ValueError(f"width={width}: the 32 channels of the first layer times width must be a whole number")
        made_of = parts(fixed_point, real_weights)
        use = made_of.use
        first, *_ = channels = [int(32 * width), *(int(o * width) for _, o, _ in BLOCKS)]
        self.register_buffer("img_mean", torch.tensor(MEAN).reshape(1, -1, 1, 1))
        self.register_buffer("img_std", torch.tensor(STD).reshape(1, -1, 1, 1))
        self.encoder = NormalisedThermometerEncoder(8)
        conv = BinaryConv2d(96, first, 3, stride=2, padding=1, real_weights=real_weights)
        rows = [Block(i, o, stride, made_of) for i, o, (_, _, stride) in zip(channels, channels[1:], BLOCKS)]
        self.model = nn.Sequential(
            nn.Sequential(conv, use.first_norm(first)), *rows, nn.Sequential(made_of.last(), use.mean(), use.point())
        )
        self.fc = use.linear(channels[-1], classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(self.encoder(x, self.img_mean, self.img_std)).flatten(1))

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dicts without their placeholder buffer and teacher, and without what a recorded run holds beside weights."""
        recorded = {"input", "output", "image_u8", "mask_density"}
        foreign = ("probe/", "f32_vs_f64_", "teacher.", *(("fc.",) if isinstance(self.fc, nn.Identity) else ()))
        return {k: v for k, v in tensors.items() if not (k in recorded or k.startswith(foreign) or "placeholder" in k)}


@register(
    Card(
        title="FracBNN for ImageNet (ReActNet shape)",
        paper="Zhang et al., FracBNN: Accurate and FPGA-Efficient Binary Neural Networks with Fractional Activations, FPGA 2021",
        arxiv="2012.12206",
        code="cornell-zhang/FracBNN",
        licence="BSD-3-Clause (published code; no trained weights were published)",
        input_shape=(3, 224, 224),
        classes=1000,
        parameters=29_393_192,
        macs=5_164_736_512,
        options={
            "fixed_point": "None: float32 as published; FixedPoint: grid of every branch, shortcut and average, 8-bit classifier; "
            "'authors': the accelerator's datapath, whose average and float classifier run on the host",
            "num_classes": "rows of the classifier; 0: none, the averages come out (all of 'authors' that has integers)",
            "real_weights": "True leaves convolution weights real: the first step of training",
            "width": "multiplies all channels, a multiple of 1/32",
        },
        converts=({"fixed_point": GRID, "width": 1 / 16},),
        convert_shape=(3, 64, 64),
        normalisation=(MEAN, STD),
        claims=(
            Claim("top-1 accuracy, ImageNet, 1/1.4 bit", 71.7, "%", "code's README; the paper's text gives 71.8 (recalled, not checked)"),
            Claim("accelerator on Ultra96-V2 at 250 MHz", 48.1, "frames/s", "paper, table and page not checked"),
        ),
        notes=(
            "Images are normalised floats, or uint8 pixels, which it normalises itself; the integer network reads pixels. 28,280,832 "
            "weights are binary; 346,816,512 MAC are the input layer's, 4,816,896,000 gated. GRID is FixedPoint(14, 6): words of 14 bits, "
            "6 of them fraction, half up, saturating; the accelerator's words have 13 bits, 4 of them fraction. 'authors' equals its "
            "source, step by step, while convolution sums stay inside its 10 bits."
        ),
    )
)
def fracbnn_imagenet(
    *, fixed_point: None | Literal["authors"] | FixedPoint = None, num_classes: int = 1000, real_weights: bool = False, width: float = 1.0
) -> FracBNNImageNet:
    return FracBNNImageNet(num_classes, fixed_point, real_weights, width)
