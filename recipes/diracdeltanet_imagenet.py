"""DiracDeltaNet on ImageNet: label refinery, full precision or fine-tuned to fewer bits, integers, HLS project, C++ and report.

Arguments and defaults are those of the published scripts (Synetgy, FPGA 2019). A network is trained in full precision first; fine-tuning
starts from its weights (--inputdir), keeps a clip scalar only between 0.1 and 10, and takes bits for the blocks (--weight_bit, --act_bit)
and, unless they stay real, for both ends. Only with bits for every layer does the network convert to integers; it then reads its normalised
image in 8 bits, too.

    accelerate launch recipes/diracdeltanet_imagenet.py --datadir imagenet --teacher_weights resnet50.pth --outputdir full
    python recipes/diracdeltanet_imagenet.py --datadir imagenet --teacher_weights resnet50.pth --outputdir w4a4 \\
        --inputdir full/best.safetensors --lr_policy step --lr 0.05 --totalepoch 50 --weight_bit 4 --act_bit 4 \\
        --first_weight_bit 8 --first_act_bit 8 --last_weight_bit 8 --last_act_bit 8 --fc_bit 8
    python recipes/diracdeltanet_imagenet.py --datadir imagenet --inputdir DiracDeltaNet_full.t7 --evaluate
    python recipes/diracdeltanet_imagenet.py --smoke
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import zoo
from quantlib.training import refinery
from zoo.diracdeltanet import inherit, options_of

PUBLISHED = {"LUT": 51_776, "FF": 42_257, "BRAM18": 318, "DSP": 360, "frames/s": 66.3, "MHz": 250}  # 4-bit accelerator on Ultra96
REAL = 32
BITS = {
    "weight_bit": "weight_bits",
    "act_bit": "act_bits",
    "first_weight_bit": "first_weight_bits",
    "first_act_bit": "first_act_bits",
    "last_weight_bit": "last_weight_bits",
    "last_act_bit": "last_act_bits",
    "fc_bit": "fc_weight_bits",
}  # published argument -> the network's option


@dataclass(frozen=True)
class Config(refinery.Arguments):
    outputdir: str = "build/diracdeltanet_imagenet"
    expansion: float = 2.0
    weight_bit: int = REAL
    act_bit: int = REAL
    first_weight_bit: int = REAL
    first_act_bit: int = REAL
    last_weight_bit: int = REAL
    last_act_bit: int = REAL
    fc_bit: int = REAL
    signs: bool = False
    real_image: bool = False


HELP = {
    "expansion": "channels inside a block over half of its outputs",
    "weight_bit": "of the blocks' convolutions (32: real)",
    "act_bit": "of the blocks' activations (32: clipped, not rounded)",
    "first_weight_bit": "of the first convolution",
    "first_act_bit": "of the activation behind it",
    "last_weight_bit": "of the last convolution",
    "last_act_bit": "of the activation behind it",
    "fc_bit": "of the classifier's weights and bias",
    "signs": "1-bit weights are -1 and +1 instead of the published -1 and 0",
    "real_image": "a network with bits everywhere reads a real-valued image nevertheless, as published; it then does not convert",
}


def options(config: Config, classes: int) -> dict[str, Any]:
    """The network's: from the arguments; a published .t7 file says its widths itself, and its bits where it is only measured."""
    bits = {option: getattr(config, name) for name, option in BITS.items()} | {"from_scratch": not config.inputdir}
    shape: dict[str, Any] = {"base": config.base_channel_size, "expansion": config.expansion, "num_classes": classes}
    if config.smoke:
        shape |= {"blocks": (2, 2, 1), "features": 32}
    if config.inputdir.lower().endswith(".t7"):
        said = options_of(config.inputdir)
        shape |= {name: value for name, value in said.items() if not name.endswith("_bits")}
        bits = {name: value for name, value in said.items() if name.endswith("_bits")} if config.evaluate else bits
    image = None if config.real_image or REAL in bits.values() else "int8"
    return {**shape, **bits, "signs": config.signs, "image": image}


def network(config: Config, classes: int) -> nn.Module:
    """With the weights it starts from: another network's by the published rule for clip scalars, or those to measure as they are."""
    wanted = options(config, classes)
    model = zoo.get("diracdeltanet_imagenet", **wanted)
    if config.evaluate:
        zoo.load(model, config.inputdir)
    elif config.inputdir:
        shape = {name: wanted[name] for name in ("base", "expansion", "blocks", "features", "num_classes") if name in wanted}
        source = zoo.load(zoo.get("diracdeltanet_imagenet", **shape), config.inputdir)
        zoo.load(model, inherit(source.state_dict()))
    return model


def run(title: str, config: Config) -> dict[str, Any]:
    real = [name for name, bits in options(config, 1).items() if name.endswith("_bits") and bits == REAL] + [
        "real_image"
    ] * config.real_image
    unquantized = f"real-valued by {', '.join(real)}" if real else ""
    return refinery.run(title, config, lambda classes: network(config, classes), PUBLISHED, unquantized)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = refinery.options(Config(), __doc__ or "", argv, HELP, {"expansion": "-e"})
    Console().print(f"{config}\n", highlight=False)
    title = "diracdeltanet_imagenet"
    if not config.smoke:
        return run(title, config)
    out = Path(config.outputdir)
    full = replace(config, outputdir=str(out / "full"), logdir=str(out / "full" / "log.txt"))
    first = run(f"{title} full precision", full)
    bits: dict[str, Any] = dict.fromkeys(BITS, 8) | {"weight_bit": 4, "act_bit": 4}
    fine = replace(config, **bits, inputdir=str(out / "full" / "best.safetensors"), lr=0.05, lr_policy="step")
    second = run(f"{title} 4/4", fine)
    return second | {"full_precision": first}


if __name__ == "__main__":
    main()
