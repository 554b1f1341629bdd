"""The networks of FuSeConv: MobileNetV1, V2, V3, MnasNet-B1 and ResNet-50 with depthwise or fully separable convolutions.

Selvam, Ganesan, Kumar, "FuSeConv: Fully Separable Convolutions for Fast Inference on Systolic Arrays", DATE 2021, arXiv 2105.13434.
The quantized forms are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from quantlib.layers import FuSeConv2d, SharedHardTanh
from zoo import _fuse_keys as keys
from zoo._fuse_blocks import Activation, Arithmetic, Bottleneck, Fuse, Row, Separable
from zoo._registry import Card, Claim, register
from zoo.proxylessnas import Pixels

Variant = Literal["models", "trainer"]


@dataclass(frozen=True)
class Family:
    """A mobile network as data: stem channels, block rows, channels of the 1x1 behind them and of the one behind the pool, dropout.

    hybrid: which blocks are FuSe in the published "50 %" networks. middle: whether FuSe blocks have an activation between the 1-D filters
    and the 1x1 convolution. out_act: the activation behind a block; residual: whether blocks have shortcuts. idle: whether a FuSe block
    that does not widen its input has an unused convolution for it, as published.
    """

    stem: int
    rows: tuple[Row, ...]
    head: int | None
    pooled: int | None
    hybrid: range | tuple[int, ...]
    stem_act: Activation
    head_act: Activation
    dropout: float = 0.2
    middle: bool = True
    out_act: Activation = "none"
    residual: bool = True
    idle: bool = False
    init: str = "normal"


def _v2(*table: tuple[int, int, int, int]) -> tuple[Row, ...]:
    """Rows (expansion, channels, repeats, stride) behind 32 channels, kernel 3."""
    rows, channels = [], 32
    for t, c, n, s in table:
        for i in range(n):
            rows.append(Row(channels * t, c, 3, s if i == 0 else 1, "relu6", widen=t > 1))
            channels = c
    return tuple(rows)


def _mnasnet(*table: tuple[int, int, int, int, int]) -> tuple[Row, ...]:
    """Rows (expansion, channels, repeats, stride, kernel) behind the separable layer 32 -> 16."""
    rows, channels = [Row(32, 16, 3, 1, "relu6", widen=False)], 16
    for t, c, n, s, k in table:
        for i in range(n):
            rows.append(Row(channels * t, c, k, s if i == 0 else 1, "relu6"))
            channels = c
    return tuple(rows)


def _v3(*table: tuple[int, int, int, str, int]) -> tuple[Row, ...]:
    """Rows (kernel, middle, channels, "S" for squeeze-excite and "R" or "H" for the activation, stride)."""
    return tuple(Row(e, c, k, s, "hswish" if "H" in kind else "relu", squeeze="S" in kind) for k, e, c, kind, s in table)


def _v1(*table: tuple[int, int]) -> tuple[Row, ...]:
    channels = (32, *(c for c, _ in table))
    return tuple(Row(channels[i], c, 3, s, "relu", widen=False) for i, (c, s) in enumerate(table))


FAMILIES = {
    "mobilenet_v1": Family(
        32,
        _v1((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)),
        head=None, pooled=None, hybrid=range(5), stem_act="relu", head_act="relu", middle=False, out_act="relu", residual=False,
        init="default",
    ),
    "mobilenet_v2": Family(
        32,
        _v2((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        head=1280, pooled=None, hybrid=range(1, 10), stem_act="relu6", head_act="relu6", idle=True,
    ),
    "mnasnet_b1": Family(
        32,
        _mnasnet((3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
        head=1280, pooled=None, hybrid=range(1, 10), stem_act="relu6", head_act="relu6", dropout=0.5,
    ),
    "mobilenet_v3_small": Family(
        16,
        _v3((3, 16, 16, "SR", 2), (3, 72, 24, "R", 2), (3, 88, 24, "R", 1), (5, 96, 40, "SH", 2), *[(5, 240, 40, "SH", 1)] * 2,
            (5, 120, 48, "SH", 1), (5, 144, 48, "SH", 1), (5, 288, 96, "SH", 2), *[(5, 576, 96, "SH", 1)] * 2),
        head=576, pooled=1280, hybrid=(2, 4, 5, 6, 7), stem_act="hswish", head_act="hswish",
    ),
    "mobilenet_v3_large": Family(
        16,
        _v3((3, 16, 16, "R", 1), (3, 64, 24, "R", 2), (3, 72, 24, "R", 1), (5, 72, 40, "SR", 2), *[(5, 120, 40, "SR", 1)] * 2,
            (3, 240, 80, "H", 2), (3, 200, 80, "H", 1), *[(3, 184, 80, "H", 1)] * 2, (3, 480, 112, "SH", 1), (3, 672, 112, "SH", 1),
            (5, 672, 160, "SH", 2), *[(5, 960, 160, "SH", 1)] * 2),
        head=960, pooled=1280, hybrid=range(1, 8), stem_act="hswish", head_act="hswish",
    ),
}  # fmt: skip

# what the authors' ImageNet trainer builds otherwise than their models folder, beside the norms (eps 1e-3, momentum 0.01)
TRAINER: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"stem_act": "relu", "head_act": "relu"},
    "mnasnet_b1": {"dropout": 0.2, "idle": True},
    "mobilenet_v3_small": {"head_act": "relu"},
    "mobilenet_v3_large": {"head_act": "relu"},
}


def _even(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not below nine tenths of what was asked for."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _up(channels: float) -> int:
    """The next multiple of 8."""
    return math.ceil(channels / 8) * 8


def scaled(family: Family, width: float, up: bool) -> Family:
    """Every channel count times `width`, rounded as the family does; the family itself for width 1."""
    if width == 1:
        return family
    if width <= 0:
        raise ValueError(f"width={width} must be positive")
    fit = _up if up else _even
    rows, channels = [], fit(family.stem * width)
    for row in family.rows:
        middle = fit(row.middle * width) if row.widen else channels
        rows.append(replace(row, middle=middle, out=fit(row.out * width)))
        channels = rows[-1].out
    return replace(family, stem=fit(family.stem * width), rows=tuple(rows), head=family.head and fit(family.head * width),
                   pooled=family.pooled and fit(family.pooled * width))  # fmt: skip


class MobileNet(nn.Module):
    """(N, 3, H, W) -> (N, classes): stem 3x3 with stride 2, separable blocks, 1x1, mean over the map, [1x1,] dropout, classifier.

    fuse names the kind of FuSe layer, hybrid restricts it to the published blocks. Quantized, images are uint8 pixels p or (p - 128) / 128,
    else normalised real numbers.
    """

    def __init__(self, name: str, family: Family, a: Arithmetic, fuse: Fuse, hybrid: bool, classes: int) -> None:
        super().__init__()
        self.name = "mobilenet_v3" if name.startswith("mobilenet_v3") else name
        self.pixels = Pixels() if a.quantized else nn.Identity()
        self.stem = nn.Sequential(a.conv(3, family.stem, 3, 2, end=True), a.norm(family.stem), a.act(family.stem_act))
        blocks, channels, join = [], family.stem, None
        for i, row in enumerate(family.rows):
            kind = fuse if not hybrid or i in family.hybrid else None
            keeps = family.residual and row.stride == 1 and channels == row.out
            if family.out_act == "none":
                join = join if keeps and join is not None else a.shared()
            middle: Activation = row.act if kind is None or family.middle else "none"
            idle = family.idle and kind is not None and not row.widen
            blocks.append(Separable(channels, row, a, kind, middle_act=middle, out_act=family.out_act, residual=family.residual, idle=idle,
                                    join=join))  # fmt: skip
            channels = row.out
        self.blocks = nn.ModuleList(blocks)
        self.head = None
        if family.head is not None:
            self.head = nn.Sequential(a.conv(channels, family.head, 1), a.norm(family.head), a.act(family.head_act))
            channels = family.head
        self.pooled = None
        if family.pooled is not None:
            self.pooled = nn.Sequential(a.conv(channels, family.pooled, 1, bias=True), a.act("hswish"))
            channels = family.pooled
        self.dropout = nn.Dropout(family.dropout)
        self.classifier = a.linear(channels, classes, end=True)
        INIT[family.init](self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.pixels(x))
        for block in self.blocks:
            x = block(x)
        if self.head is not None:
            x = self.head(x)
        x = x.mean((2, 3), keepdim=True)
        if self.pooled is not None:
            x = self.pooled(x)
        return self.classifier(self.dropout(x.flatten(1)))

    def published_names(self) -> list[keys.Pair]:
        """(our module, the published modules it stands for), for the authors' checkpoints."""
        v1, last = self.name == "mobilenet_v1", len(self.blocks)
        stem = ("conv1", "bn1") if v1 else ("features.0.0", "features.0.1")
        pairs: list[keys.Pair] = [("stem.0", stem[:1]), ("stem.1", stem[1:])]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Separable)
            pairs += keys.separable(self.name, block, f"blocks.{i}", f"layers.{i}" if v1 else f"features.{i + 1}")
        pairs += [("head.0", (f"features.{last + 1}.0",)), ("head.1", (f"features.{last + 1}.1",)), ("pooled.0", (f"features.{last + 3}",))]
        return [*pairs, ("classifier", ("linear",) if v1 else ("classifier.1",))]

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return keys.translate(self.published_names(), tensors)


class ResNet(nn.Module):
    """ResNet-50, (N, 3, H, W) -> (N, classes), the stride on the middle convolution, which FuSe layers replace.

    The hybrids have them in layer2 and layer3 only. Quantized as MobileNet is, the residual sums with one bit more.
    """

    def __init__(self, a: Arithmetic, fuse: Fuse, hybrid: bool, classes: int, width: float, copies: int) -> None:
        super().__init__()
        stem = _even(64 * width)
        self.pixels = Pixels() if a.quantized else nn.Identity()
        self.conv1, self.bn1, self.act1 = a.conv(3, stem, 7, 2, end=True), a.norm(stem), a.act("relu")
        self.pool, channels = nn.MaxPool2d(3, 2, 1), stem
        for layer, (blocks, planes) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
            kind: Fuse = fuse if not hybrid or layer in (2, 3) else None
            join = None if a.act_bits is None else SharedHardTanh(a.act_bits + 1, init=10.0)
            made = []
            for i in range(blocks):
                made.append(Bottleneck(channels, _even(planes * width), 2 if i == 0 and layer > 1 else 1, a, kind, copies, join))
                channels = _even(planes * width) * Bottleneck.expansion
            self.add_module(f"layer{layer}", nn.Sequential(*made))
        self.fc = a.linear(channels, classes, end=True)
        _resnet_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.bn1(self.conv1(self.pixels(x)))))
        for layer in range(1, 5):
            x = self.get_submodule(f"layer{layer}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        blocks = [(name, m) for name, m in self.named_modules() if isinstance(m, Bottleneck)]
        return keys.translate([pair for name, m in blocks for pair in keys.bottleneck(m, name)], tensors)


# ---------------------------------------------------------------- initial weights


def _fan_out(conv: nn.Conv2d, depthwise: bool) -> int:
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return taps if depthwise and conv.groups == conv.in_channels > 1 else taps * conv.out_channels


def _normal_init(model: nn.Module) -> None:
    """Convolutions N(0, 2 / (out channels * taps)), linear layers N(0, 0.01^2), biases 0."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / _fan_out(m, False)))
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


def _trainer_init(model: nn.Module) -> None:
    """Convolutions N(0, 2 / fan-out), the taps alone for depthwise ones; linear layers uniform within 1 / sqrt(outputs), biases 0."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / _fan_out(m, True)))
        elif isinstance(m, nn.Linear):
            nn.init.uniform_(m.weight, -1 / math.sqrt(m.out_features), 1 / math.sqrt(m.out_features))
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


def _resnet_init(model: nn.Module) -> None:
    """Kaiming normal by fan-out, the classifier N(0, 0.01^2); the last norm of a branch starts at 0, except behind FuSe layers."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
        elif isinstance(m, Bottleneck) and not isinstance(m.spatial, FuSeConv2d):
            nn.init.zeros_(m.bn3.weight)


INIT: dict[str, Callable[[nn.Module], None]] = {"default": lambda model: None, "normal": _normal_init, "trainer": _trainer_init}


# ---------------------------------------------------------------- registered names

PAPER: dict[str, Any] = {
    "paper": "Selvam, Ganesan, Kumar, FuSeConv: Fully Separable Convolutions for Fast Inference on Systolic Arrays, DATE 2021",
    "arxiv": "2105.13434",
    "code": "the authors' repository: models/, its ImageNet trainer, and localTrain/ for the ResNet hybrids",
    "licence": "Apache-2.0; the trainer CC BY-NC 4.0; localTrain states none. No code or weights of them are here",
    "input_shape": (3, 224, 224),
    "classes": 1000,
    "normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "convert_shape": (3, 32, 32),
}
OPTIONS = {
    "num_classes": "rows of the classifier",
    "width": "multiplies all channels but the image's, rounded to multiples of 8",
    "weight_bits": "bits of the integer weights, one scale per output channel; 8 in the first and last layer; None for real numbers",
    "act_bits": "bits of the activations, one learned scale each; residual sums share a hardtanh; None for real numbers",
}
VARIANT = {"variant": "models: the published networks; trainer: as the authors' ImageNet trainer builds them (norms, dropout, activations)"}
COPIES = {"copies": "independent FuSe filters per direction; 2 gives the networks published as x2"}
REDUCED: dict[str, Any] = {"width": 1 / 8, "weight_bits": 4, "act_bits": 4, "num_classes": 10}
KINDS: tuple[tuple[str, Fuse, bool], ...] = (
    ("", None, False), ("_fuse_half", "half", False), ("_fuse_full", "full", False), ("_fuse_half_hybrid", "half", True),
    ("_fuse_full_hybrid", "full", True),
)  # fmt: skip
TITLES = {
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "mnasnet_b1": "MnasNet-B1",
    "mobilenet_v3_small": "MobileNetV3-Small",
    "mobilenet_v3_large": "MobileNetV3-Large",
    "resnet50": "ResNet-50",
}
# parameters and MACs of what is built, and the published top-1, million operations, million parameters and speed-up on a 64 x 64 array
COUNTS: dict[str, tuple[tuple[int, int, tuple[float, float, float, float] | None], ...]] = {
    "mobilenet_v1": (
        (4_231_976, 568_740_352, (70.60, 589, 4.23, 1)), (4_202_216, 557_149_696, (72.00, 573, 4.20, 6.76)),
        (7_366_600, 1_102_437_376, (72.86, 1122, 7.36, 4.1)), (4_228_328, 560_912_896, (71.77, 578, 4.22, 2.36)),
        (4_356_296, 744_657_408, (72.42, 764, 4.35, 2.3)),
    ),
    "mobilenet_v2": (
        (3_504_872, 300_774_272, (72.00, 315, 3.50, 1)), (3_463_144, 286_963_328, (70.80, 300, 3.46, 7.23)),
        (4_462_024, 411_983_104, (72.49, 430, 4.46, 5.1)), (3_492_200, 292_194_176, (71.98, 305, 3.49, 2.1)),
        (3_611_432, 344_653_184, (72.11, 361, 3.61, 2.0)),
    ),
    "mnasnet_b1": (
        (4_383_312, 314_415_872, (73.50, 325, 4.38, 1)), (4_257_840, 293_266_688, (71.48, 305, 4.25, 7.15)),
        (5_666_568, 425_794_048, (73.16, 440, 5.66, 5.06)), (4_351_920, 301_207_040, (72.61, 312, 4.35, 1.97)),
        (4_476_552, 348_463_424, (73.52, 361, 4.47, 1.88)),
    ),
    "mobilenet_v3_small": (
        (2_938_368, 60_119_520, (67.40, 66, 2.93, 1)), (2_891_712, 54_361_824, (64.55, 61, 2.89, 4.16)),
        (4_446_056, 75_010_816, (67.17, 84, 4.44, 3.02)), (2_922_960, 56_789_088, (66.90, 63, 2.92, 1.68)),
        (3_188_096, 65_853_408, (67.91, 73, 3.18, 1.6)),
    ),
    "mobilenet_v3_large": (
        (5_476_416, 219_799_200, (75.20, 238, 5.47, 1)), (5_405_664, 206_298_720, (73.02, 225, 5.40, 5.45)),
        (10_577_064, 297_217_920, (74.40, 322, 10.57, 3.61)), (5_466_720, 211_830_624, (73.80, 230, 5.46, 1.83)),
        (5_573_704, 241_562_272, (74.50, 264, 5.57, 1.76)),
    ),
    "resnet50": (
        (25_557_032, 4_089_184_256, None), (14_251_112, 2_243_635_712, None), (19_299_880, 3_069_858_816, None),
        (21_434_408, 2_935_236_608, None), (23_279_656, 3_451_146_240, None),
    ),
}  # fmt: skip
# top-1 in percent on 8,000 test images of CIFAR-10, trained alike and briefly
_CIFAR10 = {"mobilenet_v2": 39.61, "mobilenet_v2_fuse_half": 41.56, "mobilenet_v2_fuse_full": 42.06}
_TRAINED = (
    "recipes/fuseconv_cifar.py -N MobileNetV2 -v baseline,half,full --size 64 --width 0.35 --epochs 6 --images 6000 --batch 64 "
    "--milestones 4,5 --curve-every 8: one seed, 36,000 images; docs/fuseconv.md"
)
_NOTES = (
    "Published parameters are truncated to two decimals. Published operations are no plain MACs. The published speed-ups come from a model "
    "of an array whose code gives other figures for some rows: docs/fuseconv.md. Quantized, images are uint8 pixels or (p - 128) / 128."
)


def _claims(published: tuple[float, float, float, float] | None) -> tuple[Claim, ...]:
    if published is None:
        return ()
    what = (("top-1 accuracy, ImageNet", "%"), ("operations", "million"), ("parameters", "million"), ("speed-up on 64 x 64", "times"))
    return tuple(Claim(w, v, unit, "results table of the published code") for (w, unit), v in zip(what, published, strict=True))


def mobile(name: str, fuse: Fuse, hybrid: bool, *, num_classes: int = 1000, width: float = 1.0, weight_bits: int | None = None,
           act_bits: int | None = None, variant: Variant = "models") -> MobileNet:  # fmt: skip
    """A network of FAMILIES; the registered names are this with `name`, `fuse` and `hybrid` filled in."""
    family = FAMILIES[name]
    if variant not in ("models", "trainer"):
        raise ValueError(f"variant={variant!r}: models or trainer")
    a = Arithmetic(weight_bits, act_bits)
    if variant == "trainer":
        family, a = replace(family, init="trainer", **TRAINER.get(name, {})), replace(a, eps=1e-3, momentum=0.01)
    return MobileNet(name, scaled(family, width, name.startswith("mobilenet_v3")), a, fuse, hybrid, num_classes)


def resnet(fuse: Fuse, hybrid: bool, *, num_classes: int = 1000, width: float = 1.0, weight_bits: int | None = None,
           act_bits: int | None = None, copies: int = 1) -> ResNet:  # fmt: skip
    if copies != 1 and fuse is None:
        raise ValueError(f"copies={copies}: only FuSe layers have copies; take resnet50_fuse_half_imagenet or another of them")
    return ResNet(Arithmetic(weight_bits, act_bits), fuse, hybrid, num_classes, width, copies)


# converted and compiled by the tests of every network; the others by tests/zoo/test_fuseconv.py
CONVERTED = ("mobilenet_v1_fuse_half_imagenet", "mobilenet_v3_small_fuse_full_imagenet")


def _register(build: Any, name: str, suffix: str, counts: tuple[int, int, Any], title: str, options: dict[str, str]) -> None:
    """One name for a builder with its first arguments filled in."""
    build.__name__ = f"{name}{suffix}_imagenet"
    parameters, macs, published = counts
    register(
        Card(
            title=title,
            parameters=parameters,
            macs=macs,
            options=OPTIONS | options,
            claims=_claims(published),
            measured=tuple(
                Claim("top-1 accuracy, CIFAR-10, width 0.35", v, "%", _TRAINED) for n, v in _CIFAR10.items() if n == name + suffix
            ),
            notes=_NOTES,
            converts=(REDUCED,) if build.__name__ in CONVERTED else (),
            **PAPER,
        )
    )(build)


for _name, _rows in COUNTS.items():
    for (_suffix, _fuse, _hybrid), _counts in zip(KINDS, _rows, strict=True):
        _title = TITLES[_name] + (f", FuSe {_fuse}" if _fuse else "") + (" in part of the blocks" if _hybrid else "")
        if _name == "resnet50":
            _register(partial(resnet, _fuse, _hybrid), _name, _suffix, _counts, _title, COPIES)
        else:
            _register(partial(mobile, _name, _fuse, _hybrid), _name, _suffix, _counts, _title, VARIANT)
