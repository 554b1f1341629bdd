"""DeepBurning-MixQ: networks whose every layer has its own bit widths, for CIFAR-10 and for the DAC-SDC object detection contest.

Luo, Huang, Liu, Li, Yang, Wang, Li, Li, "DeepBurning-MixQ: An Open Source Mixed-Precision Neural Network Accelerator Design Framework for
FPGAs", ICCAD 2023, DOI 10.1109/ICCAD57390.2023.10323831, arXiv 2308.11334. Code: AnyPackingNet (MIT).

An activation quantizer stands in front of every convolution and includes the ReLU: act, conv, bn, and pools on real values in between.
Images are pixel / 256; the detectors read BGR.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.layers import ConstantStepLinear, SpaceToDepth
from quantlib.tails import ConversionError
from quantlib.training.detection.head import cells, decode
from zoo._mixq import FAMILIES, SETTINGS, Bits, Network, Quantizer, Row, chosen_bits, describe_bits, stack, widened
from zoo._registry import Card, Claim, register

HEAD = 36  # 6 anchors of x, y, w, h, object, class


class VGGtiny(Network):
    """(N, 3, 32, 32), pixel / 256 -> (N, classes). The classifier has 8 bits of weights and of inputs, whatever the layers have."""

    def __init__(self, rows: tuple[Row, ...], bits: tuple[tuple[int, ...], tuple[int, ...]], quantizer: Quantizer, classes: int) -> None:
        super().__init__(*bits)
        real = quantizer == "float"  # published: pooled before the norm, so weights do not carry over where a norm has a negative slope
        self.layers = stack(rows, 0, 3, FAMILIES[quantizer], bits, pool_before_norm=real)
        self.flatten, self.act6 = nn.Flatten(), FAMILIES[quantizer].activation(8, False)
        size = rows[-1].out * 4 * 4
        self.linear = nn.Linear(size, classes) if real else ConstantStepLinear(size, classes, bits=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act6(self.flatten(self.layers(x))))  # type: ignore[no-any-return]


class Boxes(nn.Module):
    """The published outputs of a head's map (N, 36, rows, columns): [p] in training, (decoded, (p,)) in eval mode."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> list[Tensor] | tuple[Tensor, tuple[Tensor]]:
        return [cells(x)] if self.training else (decode(x, size), (cells(x),))

    def lower(self, g: Any, x: Any, size: tuple[int, int]) -> Any:
        raise ConversionError(
            f"{g.path}: sigmoid and exp of the decoded boxes have no integers. Build the network with decode=False, and apply "
            "quantlib.training.detection.head.decode to the result of ql.run"
        )


class Detector(Network):
    """(N, 3, H, W), BGR pixel / 256 -> the head's map (N, 36, H / 2^pools, W / 2^pools).

    With branch = (a, b) the output of layer a - 1, before its pool, also enters layer b, as space to depth in front of its channels.
    decode: the published outputs of `Boxes` instead: p (N, 6, rows, columns, 6) are the head's numbers by anchor, decoded
    (N, 6 rows columns, 6) boxes in pixels (`quantlib.training.detection.head.decode`).
    """

    def __init__(
        self,
        rows: tuple[Row, ...],
        bits: tuple[tuple[int, ...], tuple[int, ...]],
        quantizer: Quantizer,
        decode: bool,
        six: bool = False,
        branch: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(*bits)
        family = FAMILIES[quantizer]
        self.boxes = Boxes() if decode else None
        self.branch = branch
        if branch is None:
            self.layers = stack(rows, 0, 3, family, bits, six)
            return
        a, b = branch
        self.stem = stack(rows[:a], 0, 3, family, bits, six)
        self.reorg = SpaceToDepth(2)
        self.deep = stack(rows[a:b], a, rows[a - 1].out, family, bits, six, halved=True)
        self.layers = stack(rows[b:], b, 4 * rows[a - 1].out + rows[b - 1].out, family, bits, six)

    def forward(self, x: Tensor) -> Any:
        size = (x.shape[-2], x.shape[-1])
        if self.branch is not None:
            x = self.stem(x)
            x = torch.cat([self.reorg(x), self.deep(x)], 1)
        x = self.layers(x)
        return x if self.boxes is None else self.boxes(x, size)


VGGTINY = (Row(64), Row(64, pool=True), Row(128), Row(128, pool=True), Row(256), Row(256, pool=True))
ULTRANET = (
    *(Row(16, pool=True), Row(32, pool=True), Row(64, pool=True), Row(64, pool=True)),
    *(Row(64), Row(64), Row(64), Row(64), Row(HEAD, 1, norm=False, bias=True)),
)
ULTRANET_BYPASS = (*ULTRANET[:3], Row(64), *ULTRANET[4:])  # layer 3 is pooled on its way to layer 4 only


def skynet(kernel: int, bypass: bool = False) -> tuple[Row, ...]:
    """Six blocks of a depthwise and a pointwise convolution, and the head."""
    blocks = [(48, True), (96, True), (192, not bypass), (384, False), (512, False), (96, False)]
    return *(row for out, pool in blocks for row in (Row(0, kernel), Row(out, 1, pool))), Row(HEAD, 1, norm=False)


_PAPER: dict[str, Any] = {
    "paper": "Luo et al., DeepBurning-MixQ: An Open Source Mixed-Precision Neural Network Accelerator Design Framework for FPGAs, "
    "ICCAD 2023, DOI 10.1109/ICCAD57390.2023.10323831",
    "arxiv": "2308.11334",
    "code": "AnyPackingNet",
    "licence": "MIT (published code)",
    "normalisation": ((0.0,) * 3, (256 / 255,) * 3),  # pixel / 255 / (256 / 255) = pixel / 256
}
_DETECTION: dict[str, Any] = _PAPER | {"classes": 1, "input_shape": (3, 160, 320), "convert_shape": (3, 32, 64)}
_DECODE = {"decode": "True: the published outputs, [p] in training and (decoded boxes, (p,)) in eval mode; such a model does not convert"}
_NOTES = "One object in an image. quantlib.training.detection.head turns the map into boxes. Images are BGR."


def _flips(
    images: str, weight_bits: str, act_bits: str, published: float, ours: float, corrected: float | None = None
) -> tuple[Claim, ...]:
    """Codes of activation quantizers that differ from the model in float32, in the published integers and in those of quantlib.convert."""
    source = f"quantlib.io.mixq_simulation.differences on {images}, random weights, bits {weight_bits}/{act_bits}"
    rows = {"published integers": published, "published integers, corrected bypass": corrected, "integers of quantlib.convert": ours}
    return tuple(Claim(f"codes that differ from float32, {what}", value, "%", source) for what, value in rows.items() if value is not None)


_SHORT = "a short training on one core, command in docs/mixq.md"


def _options(network: str) -> dict[str, str]:
    return describe_bits(SETTINGS[network])


@register(
    Card(
        title="VGGtiny with bits of its own in each layer",
        input_shape=(3, 32, 32),
        classes=10,
        parameters=1_187_274,
        macs=152_805_376,
        options=_options("vggtiny_cifar10") | {"num_classes": "rows of the classifier"},
        measured=(
            *_flips("4 images", "822222", "833363", 1.2167, 0.0),
            *(
                Claim(f"top-1 accuracy, CIFAR-10, width 0.5, 51,200 training images, bits {bits}, seed {seed}", value, "%", _SHORT)
                for bits, seed, value in (
                    ("422232/234466 (searched)", 0, 41.86),
                    ("422232/234466 (searched)", 1, 47.09),
                    ("444444/844444", 0, 40.94),
                    ("444444/844444", 1, 44.46),
                    ("333333/833333", 0, 36.50),
                )
            ),
        ),
        notes="quantizer is 'mixq' or 'float'; the float form pools before the norm, as published.",
        **_PAPER,
    )
)
def vggtiny_cifar10(
    *,
    weight_bits: Bits | None = None,
    act_bits: Bits | None = None,
    setting: str | None = None,
    quantizer: Quantizer = "mixq",
    width: float = 1.0,
    num_classes: int = 10,
) -> VGGtiny:
    if quantizer == "dorefa":
        raise ValueError("quantizer='dorefa': this form exists of the detectors only; give 'mixq' or 'float'")
    bits = chosen_bits("vggtiny_cifar10", len(VGGTINY), weight_bits, act_bits, setting, quantizer)
    return VGGtiny(widened(VGGTINY, width), bits, quantizer, num_classes)


@register(
    Card(
        title="UltraNet, detector of the DAC-SDC contest, with bits of its own in each layer",
        parameters=210_996,
        macs=199_526_400,
        options=_options("ultranet_dacsdc") | _DECODE,
        output_shape=(HEAD, 10, 20),
        converts=({}, {"quantizer": "dorefa", "setting": "ismart"}),
        claims=(
            Claim("IoU, DAC-SDC, SJTU_microe's UltraNet before its bypass", 65.6, "%", "public text of the contest's entry; not checked"),
        ),
        measured=(
            *_flips("one 160x320 image", "444444444", "844444444", 0.1139, 0.0),
            Claim("IoU on 300 made pictures, bits 444444444/844444444, 3,840 training pictures", 61.67, "%", _SHORT),
        ),
        notes=_NOTES,
        **_DETECTION,
    )
)
def ultranet_dacsdc(
    *,
    weight_bits: Bits | None = None,
    act_bits: Bits | None = None,
    setting: str | None = None,
    quantizer: Quantizer = "mixq",
    width: float = 1.0,
    decode: bool = False,
) -> Detector:
    bits = chosen_bits("ultranet_dacsdc", len(ULTRANET), weight_bits, act_bits, setting, quantizer)
    return Detector(widened(ULTRANET, width), bits, quantizer, decode)


@register(
    Card(
        title="UltraNet with a bypass, detector of the DAC-SDC contest",
        parameters=358_452,
        macs=229_017_600,
        options=_options("ultranet_bypass_dacsdc") | _DECODE,
        output_shape=(HEAD, 10, 20),
        claims=(
            Claim("IoU, DAC-SDC, SJTU_microe on Ultra96-V2", 70.3, "%", "public text of the contest's entry; not checked"),
            Claim("accelerator of SJTU_microe on Ultra96-V2", 249.38, "frames/s", "public text of the contest's entry; not checked"),
        ),
        measured=_flips("one 160x320 image", "543456748", "854345655", 5.3995, 0.5186, 1.8718),
        notes=_NOTES,
        **_DETECTION,
    )
)
def ultranet_bypass_dacsdc(
    *,
    weight_bits: Bits | None = None,
    act_bits: Bits | None = None,
    setting: str | None = None,
    quantizer: Quantizer = "mixq",
    width: float = 1.0,
    decode: bool = False,
) -> Detector:
    bits = chosen_bits("ultranet_bypass_dacsdc", len(ULTRANET_BYPASS), weight_bits, act_bits, setting, quantizer)
    return Detector(widened(ULTRANET_BYPASS, width), bits, quantizer, decode, branch=(4, 7))


@register(
    Card(
        title="SkyNet, detector of the DAC-SDC contest, with bits of its own in each layer",
        parameters=362_369,
        macs=401_203_200,
        options=_options("skynet_dacsdc")
        | _DECODE
        | {"bypass": "True: the third block also goes as space to depth into the last one (published in the float form)"},
        output_shape=(HEAD, 20, 40),
        claims=(
            Claim("IoU, DAC-SDC 2019, SkyNet on Ultra96", 0.716, "IoU", "public text of the contest's entry; not checked"),
            Claim("accelerator of SkyNet on Ultra96", 25.05, "frames/s", "public text of the contest's entry; not checked"),
        ),
        measured=_flips("one 160x320 image", "5464735625348", "8564738465745", 19.7512, 0.00003),
        notes=_NOTES,
        **_DETECTION,
    )
)
def skynet_dacsdc(
    *,
    weight_bits: Bits | None = None,
    act_bits: Bits | None = None,
    setting: str | None = None,
    quantizer: Quantizer = "mixq",
    width: float = 1.0,
    decode: bool = False,
    bypass: bool = False,
) -> Detector:
    bits = chosen_bits("skynet_dacsdc", 13, weight_bits, act_bits, setting, quantizer)
    return Detector(widened(skynet(3, bypass), width), bits, quantizer, decode, six=True, branch=(6, 10) if bypass else None)


@register(
    Card(
        title="SkyNet with 5x5 depthwise convolutions",
        parameters=382_129,
        macs=432_332_800,
        options=_options("skynetk5_dacsdc") | _DECODE,
        output_shape=(HEAD, 20, 40),
        measured=_flips("one 160x320 image", "6354742586347", "8475638465754", 24.819, 0.0271),
        notes=_NOTES,
        **_DETECTION,
    )
)
def skynetk5_dacsdc(
    *,
    weight_bits: Bits | None = None,
    act_bits: Bits | None = None,
    setting: str | None = None,
    quantizer: Quantizer = "mixq",
    width: float = 1.0,
    decode: bool = False,
) -> Detector:
    bits = chosen_bits("skynetk5_dacsdc", 13, weight_bits, act_bits, setting, quantizer)
    return Detector(widened(skynet(5), width), bits, quantizer, decode, six=True)
