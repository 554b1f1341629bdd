"""FracBNN: binary weights, 1.4-bit activations.

Zhang, Pan, Liu, Chen, Chen, Zhang, "FracBNN: Accurate and FPGA-Efficient Binary Neural Networks with Fractional Activations", FPGA 2021,
arXiv 2012.12206. Code: cornell-zhang/FracBNN (BSD-3-Clause).
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.layers import BinaryConv2d, FixedPoint, FractionalConv2d, QuantSign, RPReLU, ScaledIntLinear, ThermometerEncoder
from zoo import _fracbnn_datapath as datapath
from zoo._registry import Card, Claim, register


class Shortcut(nn.Module):
    """2x2 average, then the channels twice: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    def __init__(self, point: nn.Module) -> None:
        super().__init__()
        self.point = point

    def forward(self, x: Tensor) -> Tensor:
        half = self.point(F.avg_pool2d(x, 2))
        return torch.cat([half, half], 1)


@dataclass(frozen=True)
class Arithmetic:
    """What the steps between the convolutions are made of: real numbers, a fixed-point grid, or the accelerator's datapath."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    first_norm: Callable[..., nn.Module]
    activation: Callable[[int], nn.Module]
    sign: Callable[[], nn.Module]
    add: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    shortcut: Callable[[], nn.Module]
    mean: Callable[[], nn.Module]
    linear: Callable[[int, int], nn.Module]
    point: Callable[[], nn.Module]


def arithmetic(fixed_point: None | Literal["authors"] | FixedPoint, real_weights: bool) -> Arithmetic:
    if isinstance(fixed_point, str):
        if fixed_point != "authors":
            raise ValueError(f"fixed_point={fixed_point!r}: give None, 'authors' or a FixedPoint(bits, fraction, ...)")
        return Arithmetic(
            conv=datapath.DatapathFractionalConv2d,
            norm=datapath.DatapathBatchNorm2d,
            first_norm=lambda channels: datapath.DatapathBatchNorm2d(channels, fraction_in=0),
            activation=datapath.DatapathRPReLU,
            sign=datapath.DatapathQuantSign,
            add=datapath.DatapathAdd,
            shortcut=datapath.DatapathShortcut,
            mean=datapath.DatapathMean,
            linear=datapath.DatapathLinear,
            point=nn.Identity,
        )

    def point() -> nn.Module:
        return nn.Identity() if fixed_point is None else copy.deepcopy(fixed_point)

    return Arithmetic(
        conv=lambda *a, **k: FractionalConv2d(*a, real_weights=real_weights, **k),
        norm=nn.BatchNorm2d,
        first_norm=nn.BatchNorm2d,
        activation=RPReLU,
        sign=lambda: QuantSign(2),
        add=lambda: operator.add,
        shortcut=lambda: Shortcut(point()),
        mean=lambda: nn.AdaptiveAvgPool2d(1),
        linear=nn.Linear if fixed_point is None else ScaledIntLinear,
        point=point,
    )


class Block(nn.Module):
    """(N, I, H, W) -> (N, C, H/stride, W/stride):

    t = bn3(rprelu1(bn1(conv1(sign(x)))) + shortcut(x)); y = bn4(rprelu2(bn2(conv2(sign(t)))) + t), each branch and each sum on the grid.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, use: Arithmetic) -> None:
        super().__init__()
        self.rprelu1, self.rprelu2 = use.activation(channels), use.activation(channels)
        self.conv1 = use.conv(channels_in, channels, 3, stride=stride, padding=1)
        self.conv2 = use.conv(channels, channels, 3, stride=1, padding=1)
        self.bn1, self.bn2, self.bn3, self.bn4 = (use.norm(channels) for _ in range(4))
        self.sign, self.add, self.point = use.sign(), use.add(), use.point()
        self.shortcut = use.shortcut() if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        t = self.point(self.rprelu1(self.bn1(self.conv1(self.sign(x)))))
        t = self.point(self.bn3(self.add(t, self.shortcut(x))))
        y = self.point(self.rprelu2(self.bn2(self.conv2(self.sign(t)))))
        return self.point(self.bn4(self.add(y, t)))


class FracBNN(nn.Module):
    """(N, image_channels, H, W) in [0, 1] -> (N, classes): thermometer code, binary convolution, stages of blocks, mean, linear.

    widths: channels of each stage; every stage but the first begins with stride 2. blocks: blocks per stage.
    """

    def __init__(
        self,
        image_channels: int,
        widths: tuple[int, ...],
        blocks: int,
        classes: int,
        fixed_point: None | Literal["authors"] | FixedPoint,
        real_weights: bool,
        resolution: int = 8,
    ) -> None:
        super().__init__()
        use = arithmetic(fixed_point, real_weights)
        self.encoder = ThermometerEncoder(resolution)
        self.conv1 = BinaryConv2d(image_channels * round(255 / resolution), widths[0], 3, padding=1, real_weights=real_weights)
        self.bn1, self.point = use.first_norm(widths[0]), use.point()
        channels = widths[0]
        for stage, width in enumerate(widths, 1):
            rows = [Block(channels if b == 0 else width, width, 2 if b == 0 and stage > 1 else 1, use) for b in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*rows))
            channels = width
        self.stages = len(widths)
        self.mean = use.mean()
        self.linear = use.linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.bn1(self.conv1(self.encoder(x))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(self.point(self.mean(x)).flatten(1))

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layouts: state dicts with their placeholder buffer, and the C header's names with batch normalisation folded.

        Keys of a recorded run beside the weights (input, output, image_u8, mask_density, probe/...) are left out.
        """
        recorded = {"input", "output", "image_u8", "mask_density"}
        tensors = {k: v for k, v in tensors.items() if not (k in recorded or k.startswith("probe/") or "placeholder" in k)}
        return self._from_header(tensors) if "bn1_weight" in tensors else tensors

    def _from_header(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Header names have underscores for dots and no singleton axes; names that fit no key stay, for the strict check to report.

        y = w x + b becomes mean 0 and the variance 1 - eps: its sum with eps is 1 in float32, so w and b act as they are written.
        """
        own = self.state_dict()
        by_name = {re.sub(r"\.", "_", key): key for key in own}
        translated = {}
        for name, value in tensors.items():
            key = by_name.get(name, name)
            fits = key in own and value.numel() == own[key].numel()
            translated[key] = value.reshape(own[key].shape) if fits else value
        for path, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and f"{path}.weight" in translated:
                size = module.num_features
                translated[f"{path}.running_mean"] = torch.zeros(size)
                translated[f"{path}.running_var"] = torch.full((size,), 1.0 - module.eps)
                translated[f"{path}.num_batches_tracked"] = torch.tensor(0)
        return translated


_PAPER: dict[str, Any] = {
    "paper": "Zhang et al., FracBNN: Accurate and FPGA-Efficient Binary Neural Networks with Fractional Activations, FPGA 2021",
    "arxiv": "2012.12206",
    "code": "cornell-zhang/FracBNN",
    "licence": "BSD-3-Clause (published code and weights)",
    "classes": 10,
}
GRID = FixedPoint(bits=12, fraction=6)
_LOSSLESS = "first 846 CIFAR-10 test images, uncompressed; standard error 1.05; recipes/evaluate.py"
_ONLY = "--steps 2 --epochs 20"
_SHORT = (
    "8,000 test images stored as JPEG, standard error 0.53; 230,400 images seen, 29 minutes on one core of an AMD EPYC, torch 2.14.1: "
    "recipes/fracbnn_cifar10.py --steps 1,2 --epochs 10 --images 11520 --batch 64 --curve-every 16 --threads 1"
)
_OPTIONS = {
    "fixed_point": "None: float32 as published; 'authors': the accelerator's datapath; FixedPoint: grid of every join, 8-bit classifier",
    "num_classes": "rows of the classifier",
    "real_weights": "True leaves convolution weights real: the first step of training",
}


@register(
    Card(
        title="FracBNN for CIFAR-10 (ResNet-20 shape)",
        input_shape=(3, 32, 32),
        parameters=287_146,
        macs=54_264_448,
        options=_OPTIONS,
        converts=({"fixed_point": "authors"}, {"fixed_point": GRID}),
        claims=(
            Claim("top-1 accuracy, CIFAR-10, 1/1.4 bit", 89.1, "%", "README of the published code"),
            Claim(
                "accelerator on Ultra96-V2 at 250 MHz",
                2806.9,
                "frames/s",
                "paper, results on the embedded FPGA; table and page not checked",
            ),
        ),
        measured=(
            Claim("top-1, float32, published weights", 89.48, "%", _LOSSLESS),
            Claim("top-1, fixed_point='authors'", 88.06, "%", _LOSSLESS),
            Claim("top-1, fixed_point=GRID", 90.54, "%", _LOSSLESS),
            Claim("top-1, float32, published weights, JPEG images", 79.95, "%", "2,000 test images stored as JPEG"),
            Claim("top-1, fixed_point=GRID, JPEG images", 79.80, "%", "2,000 test images stored as JPEG"),
            Claim("top-1, our short training, step 1 then 2, float32", 67.25, "%", _SHORT),
            Claim("top-1, our short training, step 1 then 2, fixed_point=GRID", 66.92, "%", _SHORT),
            Claim(
                "top-1, our short training, binary from the start, float32", 65.40, "%", _SHORT.replace("--steps 1,2 --epochs 10", _ONLY)
            ),
        ),
        notes=(
            "GRID is FixedPoint(12, 6): words of 12 bits, 6 of them fraction, half up, saturating, at every branch, sum and average. "
            "The accelerator's words have 16 bits, 7 of them fraction; float32 has 32. The classifier's weights take 8 bits. "
            "10 and 11 bits with 4 or 5 of fraction lose 0.6 to 0.8 points."
        ),
        **_PAPER,
    )
)
def fracbnn_cifar10(
    *, fixed_point: None | Literal["authors"] | FixedPoint = None, num_classes: int = 10, real_weights: bool = False
) -> FracBNN:
    return FracBNN(3, (16, 32, 64), 3, num_classes, fixed_point, real_weights)


@register(
    Card(
        title="FracBNN scaled down to 8x8 grey digits",
        input_shape=(1, 8, 8),
        parameters=24_170,
        macs=811_328,
        options=_OPTIONS,
        **_PAPER,
    )
)
def fracbnn_digits(
    *, fixed_point: None | Literal["authors"] | FixedPoint = GRID, num_classes: int = 10, real_weights: bool = False
) -> FracBNN:
    return FracBNN(1, (16, 32), 1, num_classes, fixed_point, real_weights)
