"""ShuffleNetV2 1x on ImageNet with label refinery: the network DiracDeltaNet was made from, as its authors train and measure it.

Arguments and defaults are those of the published scripts (Synetgy, FPGA 2019), whose ShuffleNetV2 never quantizes: there are no bits to
choose, and no integers at the end.

    accelerate launch recipes/shufflenetv2_imagenet.py --datadir imagenet --teacher_weights resnet50.pth
    python recipes/shufflenetv2_imagenet.py --datadir imagenet --inputdir ShuffleNetv2.t7 --evaluate
    python recipes/shufflenetv2_imagenet.py --smoke
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

import zoo
from quantlib.training import refinery


@dataclass(frozen=True)
class Config(refinery.Arguments):
    outputdir: str = "build/shufflenetv2_imagenet"


def network(config: Config, classes: int) -> nn.Module:
    model = zoo.get("shufflenetv2_imagenet", base=config.base_channel_size, num_classes=classes)
    return zoo.load(model, config.inputdir) if config.inputdir else model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = refinery.options(Config(), __doc__ or "", argv, {}, {})
    Console().print(f"{config}\n", highlight=False)
    return refinery.run(
        "shufflenetv2_imagenet", config, lambda classes: network(config, classes), unquantized="ShuffleNetV2 is never quantized"
    )


if __name__ == "__main__":
    main()
