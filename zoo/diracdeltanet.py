"""DiracDeltaNet: 1x1 convolutions, shifts and max pooling only; the network of the accelerator Synetgy.

Yang, Huang, Wu, Zhang, Ma, Gambardella, Blott, Lavagno, Vissers, Wawrzynek, Keutzer, "Synetgy: Algorithm-hardware Co-design for ConvNet
Accelerators on Embedded FPGAs", FPGA 2019, arXiv 1811.08634. Code: Yang-YiFan/DiracDeltaNet (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.io import t7
from quantlib.io.checkpoints import CheckpointError
from quantlib.layers import DividedClip, NormalizedImage, Shift2d, ShiftShuffle, TanhConv2d, TanhLinear
from quantlib.quantizers import inherited_clip
from zoo._registry import Card, Claim, register

REAL = 32  # bits that mean: not rounded
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = "act_quant.fused_activation_quant_proxy.tensor_quant.scale_coef"  # where a DividedClip keeps what the authors call scale_coef


@dataclass(frozen=True)
class Bits:
    """Bit widths inside the blocks, 32 for real numbers; signs: 1-bit weights -1 and +1 instead of -1 and 0."""

    weight: int
    act: int
    signs: bool = False

    def conv(self, inputs: int, outputs: int, bits: int | None = None) -> TanhConv2d:
        return TanhConv2d(inputs, outputs, 1, bits=self.weight if bits is None else bits, signs=self.signs)


class DiracDeltaBlock(nn.Module):
    """(N, I, H, W) -> (N, C, H, W), or (N, C, H/2, W/2) where it downsamples: 1x1 convolution, shift, 1x1 convolution beside a shortcut.

    Stride 1 (I = C): half of the channels pass by. Downsampling: both branches read all channels, pool and share one quantizer; `split`
    (the first block of all) gives each branch one half. The branches are joined and rotated by a quarter.
    """

    def __init__(self, inputs: int, outputs: int, expansion: float, bits: Bits, downsample: bool, split: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        middle = int(half * expansion)
        self.downsample, self.split = downsample, split or not downsample
        read = inputs // 2 if self.split else inputs
        self.conv1, self.bn1, self.quant_act1 = bits.conv(read, middle), nn.BatchNorm2d(middle), DividedClip(bits.act)
        self.shift2 = Shift2d(middle)
        self.conv3, self.bn3, self.quant_act2 = bits.conv(middle, half), nn.BatchNorm2d(half), DividedClip(bits.act)
        self.shortcut = nn.Sequential(bits.conv(read, half), nn.BatchNorm2d(half)) if downsample else nn.ReLU()
        self.shuffle = ShiftShuffle()

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        shortcut, main = (x[:, :half], x[:, half:]) if self.split else (x, x)
        main = self.quant_act1(self.bn1(self.conv1(main)))
        if self.downsample:
            main, shortcut = F.max_pool2d(main, 2), F.max_pool2d(shortcut, 2)
        main = self.quant_act2(self.bn3(self.conv3(self.shift2(main))))
        shortcut = self.shortcut(shortcut)
        return self.shuffle(self.quant_act2(shortcut) if self.downsample else shortcut, main)


class DiracDeltaNet(nn.Module):
    """(N, 3, H, W), normalised -> (N, num_classes): two 1x1 convolutions with shifts, layers of blocks, 1x1 convolution, mean, linear.

    base: channels of layer1; layer2 and layer3 have two and four times as many. blocks per layer, the first of which downsamples. pooled:
    the stem pools twice (ImageNet) or not at all (32x32). features: inputs of the classifier. The bit widths are the options of the
    registered networks.
    """

    def __init__(
        self,
        pooled: bool,
        weight_bits: int,
        act_bits: int,
        first_weight_bits: int,
        first_act_bits: int,
        last_weight_bits: int,
        last_act_bits: int,
        fc_weight_bits: int,
        from_scratch: bool,
        second_weight_bits: int | None,
        signs: bool,
        fc_offset: bool,
        image: None | Literal["int8"],
        base: int,
        expansion: float,
        blocks: tuple[int, ...],
        features: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if base % 4 or base < 4 or not blocks or min(blocks) < 1:
            raise ValueError(f"base={base} must be a multiple of 4, blocks={blocks} at least one per layer")
        if image not in (None, "int8"):
            raise ValueError(f"image={image!r}: give None (real-valued, as published) or 'int8'")
        bits = Bits(weight_bits, act_bits, signs)
        second = second_weight_bits if second_weight_bits is not None else first_weight_bits if from_scratch else weight_bits
        self.pooled, self.layers = pooled, len(blocks)
        self.image = nn.Identity() if image is None else NormalizedImage(MEAN, STD)
        self.conv1, self.bn1 = bits.conv(3, 32, first_weight_bits), nn.BatchNorm2d(32)
        self.quant_act1, self.shift1 = DividedClip(first_act_bits, 6.0), Shift2d(32)
        self.conv2, self.bn2 = bits.conv(32, 64, second), nn.BatchNorm2d(64)
        self.quant_act2, self.shift2 = DividedClip(act_bits), Shift2d(64)
        channels = 64
        for layer, count in enumerate(blocks):
            width = base << layer
            rows = [DiracDeltaBlock(channels, width, expansion, bits, downsample=True, split=layer == 0)]
            rows += [DiracDeltaBlock(width, width, expansion, bits, downsample=False) for _ in range(count - 1)]
            self.add_module(f"layer{layer + 1}", nn.Sequential(*rows))
            channels = width
        self.conv3, self.bn3 = bits.conv(channels, features, last_weight_bits), nn.BatchNorm2d(features)
        self.quant_act3 = DividedClip(last_act_bits, 10.0)
        self.linear = TanhLinear(features, num_classes, bits=fc_weight_bits, offset=fc_offset)
        for module in self.modules():
            if isinstance(module, TanhConv2d | TanhLinear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.shift1(self._pool(self.quant_act1(self.bn1(self.conv1(self.image(x))))))
        x = self.shift2(self._pool(self.quant_act2(self.bn2(self.conv2(x)))))
        for layer in range(1, self.layers + 1):
            x = getattr(self, f"layer{layer}")(x)
        x = self.quant_act3(self.bn3(self.conv3(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, padding=1) if self.pooled else x

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys: `scale_coef` of the activations, and shift kernels, which must be those of `Shift2d` and are dropped."""
        theirs, ours = widths(tensors), widths(self.state_dict())
        if theirs is not None and theirs != ours:
            differing = ", ".join(f"{k}={v}" for k, v in theirs.items() if v != (ours or {})[k])
            raise CheckpointError(f"the checkpoint holds a network of other widths, nothing was loaded; build it with {differing}")
        translated = {}
        for key, value in tensors.items():
            if key.endswith(".kernel"):
                moves = Shift2d(len(value)).kernel()
                if value.shape != moves.shape or not torch.equal(value.to(moves.dtype), moves):
                    raise CheckpointError(f"{key} is not the shift of DiracDeltaNet: down, right, none, left, up for channels 0 to 4")
            else:
                published = key.endswith(".scale_coef") and not key.endswith(CLIP)
                translated[key.removesuffix("scale_coef") + CLIP if published else key] = value
        return translated


def widths(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """base, expansion, blocks, features and num_classes of a state dict, in our keys or the authors'; None where it is something else."""
    rows = [tuple(map(int, m.groups())) for m in (re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", k) for k in tensors) if m]
    needed = [tensors.get(k) for k in ("layer1.0.conv3.weight", "conv3.weight", "linear.weight")]
    if not rows or any(t is None or t.dim() < 2 for t in needed):
        return None
    block, last, linear = (tuple(t.shape) for t in needed if t is not None)
    blocks = tuple(sum(layer == n for layer, _ in rows) for n in range(1, max(rows)[0] + 1))
    return {"base": 2 * block[0], "expansion": block[1] / block[0], "blocks": blocks, "features": last[0], "num_classes": linear[0]}


_BIT_OF = {"conv1": "first_weight_bits", "quant_act1": "first_act_bits", "conv2": "second_weight_bits", "quant_act2": "act_bits",
           "conv3": "last_weight_bits", "quant_act3": "last_act_bits", "linear": "fc_weight_bits"}  # fmt: skip


def options_of(path: str | Path) -> dict[str, Any]:
    """The options of `zoo.get` that fit a published `.t7` file: widths from its tensors, bit widths from what each layer says of itself.

    `zoo.load(zoo.get("diracdeltanet_imagenet", **options_of(path)), path)`. CheckpointError when it holds another network, or bit widths
    that differ between blocks.
    """
    found = widths(t7.read(path))
    if found is None:
        raise CheckpointError(f"{Path(path).name} holds no DiracDeltaNet")
    said: dict[str, set[int]] = {}
    for key, value in t7.attributes(path).items():
        layer, _, name = key.rpartition(".")
        if name in ("bit", "act_bit"):
            inside = "weight_bits" if name == "bit" else "act_bits"
            said.setdefault(_BIT_OF.get(layer, inside), set()).add(int(value))
    mixed = {option: sorted(bits) for option, bits in said.items() if len(bits) > 1}
    if mixed:
        raise CheckpointError(f"{Path(path).name}: different bit widths in places that have one option: {mixed}")
    return found | {option: bits.pop() for option, bits in said.items()}


def inherit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a trained network's tensors for a network of other bit widths that goes on training from them.

    The published conversion keeps a clip scalar only where 0.1 < scalar < 10 and resets others to 1 (`quantlib.quantizers.inherited_clip`).
    Not for plain loading: `zoo.load(zoo.get(name, weight_bits=4, act_bits=4), inherit(full.state_dict()))`.
    """
    return {k: inherited_clip(v).clone() if k.endswith("scale_coef") else v.detach().clone() for k, v in state.items()}


_OPTIONS = {
    "weight_bits": "of the convolutions, 1 to 24; 32: real",
    "act_bits": "of the activations, 1 to 24; 32: clipped, not rounded",
    "first_weight_bits": "of the first convolution",
    "first_act_bits": "of the activation behind it",
    "last_weight_bits": "of the last convolution",
    "last_act_bits": "of the activation behind it",
    "fc_weight_bits": "of the classifier's weights and bias",
    "from_scratch": "True: the second convolution has first_weight_bits, as the published code builds it when it does not fine-tune",
    "second_weight_bits": "of the second convolution, whatever from_scratch says",
    "signs": "True: 1-bit weights are -1 and +1 instead of the published -1 and 0",
    "fc_offset": "False: classifier codes without the published offset of one, which all logits share, so that they fit their bits",
    "image": "None: real-valued, as published; 'int8': normalised pixels rounded to -128..127 over 48, which integers need",
    "base": "channels of the first layer of blocks, a multiple of 4 (published: 116 or 128)",
    "expansion": "channels inside a block over half of its outputs",
    "blocks": "blocks of each layer",
    "features": "inputs of the classifier",
    "num_classes": "rows of the classifier",
}


INTEGERS = {"first_weight_bits": 8, "first_act_bits": 8, "last_weight_bits": 8, "last_act_bits": 8, "fc_weight_bits": 8, "image": "int8"}
_REDUCED = {"base": 8, "blocks": (2, 1), "features": 16}
_README = "README of the published code"
_TEST = "224x224, untrained weights: pytest tests/zoo/test_diracdeltanet.py"
_PAPER: dict[str, Any] = {
    "paper": "Yang et al., Synetgy: Algorithm-hardware Co-design for ConvNet Accelerators on Embedded FPGAs, FPGA 2019",
    "arxiv": "1811.08634",
    "code": "Yang-YiFan/DiracDeltaNet",
    "licence": "Apache-2.0 (published code)",
}


@register(
    Card(
        title="DiracDeltaNet for ImageNet",
        input_shape=(3, 224, 224),
        classes=1000,
        parameters=2_929_615,
        macs=269_229_440,
        options=_OPTIONS,
        converts=({"weight_bits": 4, "act_bits": 4, **INTEGERS, **_REDUCED},),
        convert_shape=(3, 32, 32),
        normalisation=(MEAN, STD),
        claims=(
            Claim("top-1 accuracy, ImageNet, 32/32 bit", 69.7, "%", _README),
            Claim("top-5 accuracy, ImageNet, 32/32 bit", 89.0, "%", _README),
            Claim("top-1 accuracy, ImageNet, 16/16 bit", 70.1, "%", _README),
            Claim("top-5 accuracy, ImageNet, 16/16 bit", 89.2, "%", _README),
            Claim("top-1 accuracy, ImageNet, 8/8 bit", 70.3, "%", _README),
            Claim("top-5 accuracy, ImageNet, 8/8 bit", 89.3, "%", _README),
            Claim("top-1 accuracy, ImageNet, 4/4 bit", 68.3, "%", _README),
            Claim("top-5 accuracy, ImageNet, 4/4 bit", 88.1, "%", _README),
            Claim("top-1 accuracy, ImageNet, 2/4 bit", 68.5, "%", _README),
            Claim("top-5 accuracy, ImageNet, 2/4 bit", 88.1, "%", _README),
            Claim("top-1 accuracy, ImageNet, 1/4 bit", 68.5, "%", _README),
            Claim("top-5 accuracy, ImageNet, 1/4 bit", 88.2, "%", _README),
            Claim("accelerator Synetgy on Ultra96 at 250 MHz, 4/4 bit", 66.3, "frames/s", "a later survey's table of the paper's figures"),
            Claim(
                "accelerator Synetgy on Ultra96 at 250 MHz, 1/4 bit", 96.5, "frames/s", "later version of the paper, recalled, not checked"
            ),
        ),
        measured=(
            Claim("largest difference from the recorded logits of nine variants, float64", 2e-13, "of a logit", _TEST),
            Claim("codes of 11,990,728 that differ between integers and model, recorded 4/4 weights, 8-bit ends", 0, "codes", _TEST),
        ),
        notes=(
            "Bits are weights/activations inside the blocks; the published 1/4 network has 8-bit classifier weights, and the published "
            "fine-tuning leaves first and last layers real. Integers need all of them: INTEGERS of this file sets 8 bits there and the "
            "8-bit image. base=128 has 3,286,699 parameters and 316,651,520 MAC, as the paper; the code's default is 116. 16-bit "
            "activations do not convert: no multiply and shift gives their 65,536 levels exactly."
        ),
        **_PAPER,
    )
)
def diracdeltanet_imagenet(
    *,
    weight_bits: int = REAL,
    act_bits: int = REAL,
    first_weight_bits: int = REAL,
    first_act_bits: int = REAL,
    last_weight_bits: int = REAL,
    last_act_bits: int = REAL,
    fc_weight_bits: int = REAL,
    from_scratch: bool = False,
    second_weight_bits: int | None = None,
    signs: bool = False,
    fc_offset: bool = True,
    image: None | Literal["int8"] = None,
    base: int = 116,
    expansion: float = 2.0,
    blocks: tuple[int, ...] = (4, 8, 4),
    features: int = 1024,
    num_classes: int = 1000,
) -> DiracDeltaNet:
    return DiracDeltaNet(pooled=True, **locals())


# bits: top-1 and top-5 on the 8,000 JPEG images of the model and of its integers
_SCORES: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "32/32": ((55.50, 95.17), None),
    "4/4": ((51.21, 94.05), (51.14, 94.01)),
    "1/4 (-1 and +1)": ((43.90, 90.94), (43.89, 90.95)),
    "1/4 (-1 and 0)": ((18.21, 65.97), (18.21, 65.97)),
}
_TRAINED = "a short training on one core, the same for all; docs/diracdeltanet.md, Trained here"
_CIFAR10 = tuple(
    Claim(f"top-{k}, CIFAR-10, {bits} bit{what}", values[n], "%", _TRAINED)
    for bits, scores in _SCORES.items()
    for values, what in zip(scores, ("", ", integers"))
    if values is not None
    for n, k in enumerate((1, 5))
)


@register(
    Card(
        title="DiracDeltaNet for CIFAR-10: the stem does not pool",
        input_shape=(3, 32, 32),
        classes=10,
        parameters=578_061,
        macs=26_579_968,
        options=_OPTIONS,
        converts=({"weight_bits": 1, "act_bits": 4, "signs": True, "fc_offset": False, **INTEGERS, **_REDUCED},),
        measured=(
            *_CIFAR10,
            Claim("top-5 lost by 4/4 bit, image by image, standard error 0.24 (published on ImageNet: 0.9)", 1.12, "points", _TRAINED),
        ),
        notes=(
            "Ours: the published network with a stem that does not pool, and about half its channels and features. The recipe trains it on "
            "pixel / 255; image='int8' takes images normalised as ImageNet's."
        ),
        **_PAPER,
    )
)
def diracdeltanet_cifar10(
    *,
    weight_bits: int = REAL,
    act_bits: int = REAL,
    first_weight_bits: int = REAL,
    first_act_bits: int = REAL,
    last_weight_bits: int = REAL,
    last_act_bits: int = REAL,
    fc_weight_bits: int = REAL,
    from_scratch: bool = False,
    second_weight_bits: int | None = None,
    signs: bool = False,
    fc_offset: bool = True,
    image: None | Literal["int8"] = None,
    base: int = 64,
    expansion: float = 2.0,
    blocks: tuple[int, ...] = (4, 8, 4),
    features: int = 512,
    num_classes: int = 10,
) -> DiracDeltaNet:
    return DiracDeltaNet(pooled=False, **locals())
