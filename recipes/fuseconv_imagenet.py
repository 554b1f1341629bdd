"""The networks of FuSeConv on ImageNet: training as published, then integers: fine-tuned, converted, verified, exported, reported.

Two published recipes (FuSeConv, DATE 2021), chosen by the network unless --recipe says otherwise. "trainer" (MobileNetV2, V3, MnasNet):
RMSprop, an exponential staircase of the learning rate, a moving average of the weights, smoothed labels. "phases" (ResNet-50,
MobileNetV1): images of 128, 224 and 288 pixels in turn, learning rates by hand. --weight-bits and --act-bits make it a quantized network,
which starts from the weights of a real-valued one (--start), reads pixels, and ends as integers; nobody has published such networks.

    accelerate launch recipes/fuseconv_imagenet.py --data imagenet --network mobilenet_v2_fuse_half_imagenet --workers 16
    python recipes/fuseconv_imagenet.py --data imagenet --network resnet50_fuse_half_hybrid_imagenet --precision fp16
    python recipes/fuseconv_imagenet.py --data imagenet --network mobilenet_v2_fuse_half_imagenet --weight-bits 4 --act-bits 4 \\
        --start build/fuseconv_imagenet/best.safetensors --out build/w4a4 --lr 0.002 --epochs 30
    python recipes/fuseconv_imagenet.py --smoke

The folder holds train/<class>/<image> and val/<class>/<image>. The penalty on weights, published as a term of the loss, stands in the
optimizer: its gradient is the same. Test images of 288 pixels are rectangles of like ratios, but for quantized networks squares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import zoo
from quantlib.training import (
    SGD,
    Course,
    CrossEntropy,
    EachStep,
    Fit,
    Group,
    Ramp,
    RMSprop,
    Staircase,
    accuracy,
    batched,
    fit,
    image_files,
    is_main_process,
    right_among,
)
from quantlib.training.data import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, Phases, random_area_by_height
from quantlib.training.deploy import Deployed, Seconds, deploy, finish, integer_accuracy
from quantlib.training.flags import parse
from quantlib.training.rectangles import RectangularFiles
from quantlib.training.smoke import digit_files

RECIPES = ("trainer", "phases")
BY_PHASES = ("resnet50", "mobilenet_v1")
BASE_LR, BASE_BATCH = 0.016, 256  # of the trainer: the rate grows with the batch

# of the phases, epochs from 0: (first epoch, pixels, batch, least share of the area in a training image), (first epoch, rates)
DATA = ((0, 128, 512, 0.08), (14, 224, 224, 0.08), (39, 288, 128, 0.5))
PHASE_LR, PHASE_EPOCHS = 0.9, 52
RATES = (
    (0, 0.9, 1.8), (5, 0.9, 0.9), (14, 0.9 * 224 / 512, 0.9 * 224 / 512), (16, 0.09 * 224 / 512, 0.09 * 224 / 512),
    (32, 0.009 * 224 / 512, 0.009 * 224 / 512), (39, 0.009 * 128 / 512, 0.009 * 128 / 512), (40, 0.0009 * 128 / 512, 0.0009 * 128 / 512),
    (45, 0.00009 * 128 / 512, 0.00009 * 128 / 512), (49, 0.00009 * 224 / 512, 0.00009 * 224 / 512),
)  # fmt: skip
MENDED = (49, 224)  # the published rates of the last epochs are those of a batch of 224, which the published script never makes


@dataclass(frozen=True)
class Config:
    data: str = "imagenet"
    network: str = "mobilenet_v2_fuse_half_imagenet"
    recipe: str = ""
    start: str = ""
    weight_bits: int = 0
    act_bits: int = 0
    epochs: int = 0
    batch: int = 0
    lr: float = 0.0
    mend: bool = False
    no_bn_decay: bool = False
    images: int = 0
    width: float = 1.0
    size: int = 224
    part: str = "xczu15eg"
    integer_images: int = 1000
    verify_images: int = 1
    cpp_images: int = 1
    seed: int = 1995
    threads: int = 0
    workers: int = 4
    save_every: int = 500
    precision: str = "no"
    compile: bool = False
    strict: bool = False
    resume: bool = False
    smoke: bool = False
    out: str = "build/fuseconv_imagenet"


HELP = {
    "data": "folder with train/<class>/<image> and val/<class>/<image>",
    "network": "a name of the zoo: mobilenet_v2_imagenet, mnasnet_b1_fuse_full_imagenet, resnet50_fuse_half_hybrid_imagenet ...",
    "recipe": "trainer or phases (default: as published for the network)",
    "start": "weights of the same real-valued network to start from",
    "weight_bits": "of a quantized network, 8 in its first and last layer (0: real numbers)",
    "act_bits": "of a quantized network (0: real numbers)",
    "epochs": "0: 350 of the trainer, 52 of the phases, whose boundaries move in proportion",
    "batch": "images per step over all processes together (0: 256; 512 in the first phase, others in proportion)",
    "lr": "learning rate (0: 0.016 per 256 images, 0.9 in the first phase; others in proportion)",
    "mend": "phases: the last three epochs have the batch of 224 that their learning rate is meant for",
    "no_bn_decay": "phases: no weight decay of batch norms",
    "images": "per epoch, chosen anew each time (0: all)",
    "width": "multiplies all channels",
    "size": "of the images; those of the phases are in proportion to 224",
    "integer_images": "test images for accuracy in integers beside the model's on the same",
    "threads": "torch threads (0: as torch decides)",
    "workers": "processes that decode images",
    "save_every": "steps between checkpoints",
    "precision": "no, bf16 or fp16",
    "compile": "torch.compile (slower on CPU)",
    "strict": "an unreadable image is an error",
    "resume": "continue where a killed run stopped",
    "smoke": "everything once, at 1/8 of the width, on a few images made from scikit-learn's digits: real numbers, then 4 bits from them",
}


def options(argv: list[str] | None) -> Config:
    config = parse(Config(), __doc__ or "", HELP, argv)
    zoo.card(config.network)
    if config.recipe not in ("", *RECIPES):
        raise SystemExit(f"--recipe {config.recipe}: give {' or '.join(RECIPES)}")
    if (config.weight_bits == 0) != (config.act_bits == 0):
        raise SystemExit("give --weight-bits and --act-bits together, or neither for real numbers")
    if not config.recipe:
        config = replace(config, recipe="phases" if config.network.startswith(BY_PHASES) else "trainer")
    phases = config.recipe == "phases"
    if config.smoke:
        small: dict[str, Any] = {"width": 1 / 8, "size": 64, "batch": 32 if phases else 16, "epochs": 4 if phases else 1, "workers": 0}
        if phases:
            small["lr"] = 0.05  # small batches
        config = replace(config, **small, threads=1, integer_images=8, data=str(Path(config.out) / "sample"))
    elif config.weight_bits and not config.start:
        raise SystemExit("a quantized network starts from a real-valued one: give --start, its best.safetensors")
    epochs, batch = config.epochs or (PHASE_EPOCHS if phases else 350), config.batch or (512 if phases else 256)
    return replace(config, epochs=epochs, batch=batch, lr=config.lr or (PHASE_LR if phases else BASE_LR * batch / BASE_BATCH))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console = options(argv), Console()
    console.print(f"{config}\n", highlight=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.smoke:
        return run(config)
    digit_files(config.data)
    first = replace(config, out=str(Path(config.out) / "real"), weight_bits=0, act_bits=0)
    run(first)
    start = str(Path(first.out) / "best.safetensors")
    return run(replace(config, start=start, weight_bits=config.weight_bits or 4, act_bits=config.act_bits or 4))


def run(config: Config) -> dict[str, Any]:
    """Trains one network; a quantized one goes on to integers, a HLS project and C++."""
    out, seconds = Path(config.out), Seconds()
    torch.manual_seed(config.seed)
    with seconds("list files"):
        train, test = data(config, "train"), data(config, "val")
    model = network(config, train.parts[0][1].classes)
    rows = fit(
        model,
        train,
        test,
        settings(config, model, len(train)),
        CrossEntropy(smoothing=0.1 if config.recipe == "trainer" else 0.0),
        title=config.network,
        out=out,
        resume=config.resume,
        also={"top-5": right_among},
    )
    seconds.spent["train"] = sum(row.seconds for row in rows)
    zoo.load(model, out / "best.safetensors")
    if not is_main_process():
        return {}
    best = max(reversed(rows), key=lambda row: row.test_accuracy)
    scores = {f"{test.name}, top-1": best.test_accuracy, f"{test.name}, top-5": best.more["test top-5"]}
    shown = {"weights": str(out / "best.safetensors")}
    done: Deployed | None = None
    if config.weight_bits:
        few = test.at(config.epochs - 1).sample(config.integer_images)
        done = deploy(model, few.codes, config.part, out, config.verify_images, config.cpp_images, seconds)
        with seconds("run integers"):
            scores[f"model, {few.name}"] = accuracy(batched(model.eval(), few.codes, 16), few.labels)  # it takes pixels itself
            scores[f"integers, {few.name}"] = integer_accuracy(done.graph, few, 4)
    facts = {"images": {"train": len(train), "test": len(test)}, "unreadable": train.unreadable | test.unreadable}
    return finish(config.network, out, config, scores, {config.network: rows}, seconds, done, facts=facts, shown=shown)


def data(config: Config, split: str) -> Phases:
    """One data set of the trainer, three of the phases, in a form that fits the network: normalised numbers, or (pixel - 128) / 128."""
    pixels: dict[str, Any] = {"levels": 128, "mean": (1.0,) * 3, "std": (1.0,) * 3} if config.weight_bits else {}
    common: dict[str, Any] = {"strict": config.strict, "lighting": 0.0, **pixels}
    if config.recipe == "trainer":
        sizes = {
            "size": config.size,
            "resize": config.size * 8 // 7,
            "cut_first": True,
            "resample": "bicubic",
            "area": random_area_by_height,
        }
        return Phases(((0, image_files(config.data, split, **common, **sizes)),))
    files: ImageFiles = image_files(config.data, split, **common)
    parts = []
    for first, size, _, least in DATA:
        size = size * config.size // 224
        kind = RectangularFiles if first == DATA[-1][0] and not config.weight_bits else ImageFiles
        own = {f.name: getattr(files, f.name) for f in fields(files)} | {"size": size, "resize": int(1.14 * size), "crop": least}
        parts.append((scaled(first, config), kind(**own | {"unreadable": {}})))
    return Phases(tuple(parts))


def scaled(epoch: int, config: Config) -> int:
    """An epoch of the 52 published ones in a run of another length."""
    return ceil(epoch * config.epochs / PHASE_EPOCHS)


def settings(config: Config, model: nn.Module, images: int) -> Fit:
    """Of the published recipe."""
    common: dict[str, Any] = {"epochs": config.epochs, "batch": config.batch, "lr": config.lr, "flip": True, "seed": config.seed}
    common |= {"images": config.images, "precision": config.precision, "compile": config.compile, "channels_last": True}
    common |= {"save_every": config.save_every, "workers": config.workers, "tensorboard": True}
    if config.recipe == "trainer":
        steps = ceil((min(config.images, images) or images) / config.batch)  # per epoch
        stairs = Staircase(0.97, 2.4 * steps)
        warm = Ramp(5 * steps, BASE_LR / config.lr, stairs) if config.lr > BASE_LR else stairs
        undecayed = names_but(model, decayed=True)
        return Fit(
            **common,
            weight_decay=1e-5,
            optimizer=RMSprop(momentum=0.9, alpha=0.9, eps=1e-3),
            schedule=EachStep(warm),
            groups=(Group(undecayed, weight_decay=0.0),),
            average=0.9999 ** (config.batch / 4096),
        )
    batches = [(first, batch) for first, _, batch, _ in DATA[1:]] + ([MENDED] if config.mend else [])
    return Fit(
        **common,
        weight_decay=1e-4,
        optimizer=SGD(momentum=0.9),
        schedule=Course(tuple((scaled(first, config), a / PHASE_LR, b / PHASE_LR) for first, a, b in RATES)),
        groups=(Group(names_but(model, decayed=False), weight_decay=0.0),) if config.no_bn_decay else (),
        batches=tuple((scaled(first, config), batch * config.batch // 512) for first, batch in batches),
    )


def names_but(model: nn.Module, decayed: bool) -> str:
    """Expression for the parameters without weight decay.

    decayed: all but the weights of convolutions and linear layers and the classifier's bias, as in the trainer; else batch norms alone.
    """
    norms = {f"{name}.{leaf}" for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for leaf in ("weight", "bias")}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)} | {
        "classifier.bias",
        "fc.bias",
    }
    chosen = [name for name, _ in model.named_parameters() if (name not in linear if decayed else name in norms)]
    return f"^(?:{'|'.join(map(re.escape, chosen))})$"


def network(config: Config, classes: int) -> nn.Module:
    """With the weights it starts from; a quantized one takes those of a network that read normalised images, and learns its scales anew."""
    shape: dict[str, Any] = {"num_classes": classes, "width": config.width}
    if config.recipe == "trainer" and not config.network.startswith("resnet50"):
        shape["variant"] = "trainer"
    if not config.weight_bits:
        model = zoo.get(config.network, **shape)
        return zoo.load(model, config.start) if config.start else model
    real = zoo.load(zoo.get(config.network, **shape), config.start)
    model = zoo.get(config.network, **shape, weight_bits=config.weight_bits, act_bits=config.act_bits)
    return zoo.load(model, model.state_dict() | from_pixels(real.state_dict()))


def from_pixels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network that reads x = (p - 128) / 128 from that of one that reads (p / 255 - mean) / std, p = 0..255.

    The weights of the first convolution take the factors in, the running mean behind it the offset. At the border of the image, where
    zeros stand for other pixels, the results differ a little.
    """
    weight, mean = ("stem.0.weight", "stem.1.running_mean") if "stem.0.weight" in state else ("conv1.weight", "bn1.running_mean")
    means, stds = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    w = state[weight].double()
    offset = (w * (128 / 255 - means) / stds).sum((1, 2, 3))
    return state | {weight: (w * (128 / 255) / stds).float(), mean: (state[mean].double() - offset).float()}


if __name__ == "__main__":
    main()
