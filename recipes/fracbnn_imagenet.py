"""FracBNN on ImageNet: training in steps with a teacher, integers, verification, HLS project, C++ and report in one command.

Step 1 trains real-valued weights on quantized activations, step 2 binary weights that start from step 1's best; the loss is the
Kullback-Leibler divergence from a teacher's softmax (FracBNN, FPGA 2021, with the authors' published hyperparameters as defaults).
--steps 1,2,3 leaves the gates open in steps 1 and 2 and trains gated convolutions in step 3. The steps are one model with switches.

    accelerate launch recipes/fracbnn_imagenet.py --data imagenet --teacher-weights resnet50.pth --workers 8
    python recipes/fracbnn_imagenet.py --data imagenet --labels
    python recipes/fracbnn_imagenet.py --smoke

The folder holds train/<class>/<image> and val/<class>/<image>. The teacher's weights are torchvision's for the network --teacher names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import quantlib as ql
import zoo
from quantlib.training import (
    CrossEntropy,
    Distillation,
    Epoch,
    Fit,
    accuracy,
    batched,
    fit,
    image_files,
    is_main_process,
    load_teacher,
)
from quantlib.training.deploy import Seconds, deploy, finish, integer_accuracy
from quantlib.training.flags import parse
from quantlib.training.optim import Linear
from quantlib.training.smoke import digit_files, untrained_teacher
from quantlib.training.steps import density, use_gating, use_real_weights

PUBLISHED = {"LUT": 50_656, "DSP": 224, "frames/s": 48.1, "MHz": 250}  # paper, accelerator on Ultra96-V2
WEIGHT_DECAY = {1: 1e-5, 2: 0.0, 3: 0.0}
TITLE = {1: "step 1, real weights", 2: "step 2, binary weights", 3: "step 3, gated"}


@dataclass(frozen=True)
class Config:
    data: str = "imagenet"
    teacher: str = "resnet50"
    teacher_weights: str = ""
    teacher_mode: str = "train"
    labels: bool = False
    steps: tuple[int, ...] = (1, 2)
    epochs: int = 120
    batch: int = 256
    lr: float = 5e-4
    gtarget: float = 0.0
    images: int = 0
    width: float = 1.0
    size: int = 224
    fixed_point: str = "14,6"
    part: str = "xczu3eg"
    integer_images: int = 1000
    verify_images: int = 2
    cpp_images: int = 1
    seed: int = 0
    threads: int = 0
    workers: int = 4
    save_every: int = 500
    precision: str = "no"
    compile: bool = False
    strict: bool = False
    resume: bool = False
    smoke: bool = False
    out: str = "build/fracbnn_imagenet"


HELP = {
    "data": "folder with train/<class>/<image> and val/<class>/<image>",
    "teacher": "torchvision classifier to learn from",
    "teacher_weights": "file of its weights, .pth or .safetensors",
    "teacher_mode": "train: the teacher normalises by the batch, as the published script; eval: by its running statistics",
    "labels": "learn from labels instead of a teacher (not the published loss)",
    "steps": "1,2 as published; 2: binary from the start; 1,2,3: gates open until step 3",
    "epochs": "of each step",
    "batch": "images per step, over all processes together",
    "gtarget": "where the gating thresholds are pulled to (published script: -g)",
    "images": "per epoch, chosen anew each time (0: all)",
    "width": "multiplies all channels",
    "size": "of the images; a multiple of 32",
    "fixed_point": "grid of the integer network: BITS,FRACTION",
    "integer_images": "test images for accuracy in integers beside the model's on the same",
    "threads": "torch threads (0: as torch decides)",
    "workers": "processes that decode images",
    "save_every": "steps between checkpoints",
    "precision": "no, bf16 or fp16",
    "compile": "torch.compile (slower on CPU)",
    "strict": "an unreadable image is an error",
    "resume": "continue where a killed run stopped",
    "smoke": "everything once, at 1/16 of the width and 64x64 pixels, on a few images made from scikit-learn's digits",
}


def options(argv: list[str] | None) -> Config:
    config = parse(Config(), __doc__ or "", HELP, argv, short={"gtarget": "-g"})
    if config.steps not in ((1, 2), (2,), (1, 2, 3), (2, 3)):
        raise SystemExit(f"--steps {','.join(map(str, config.steps))}: give 1,2 or 2 or 1,2,3 or 2,3")
    if config.teacher_mode not in ("train", "eval"):
        raise SystemExit(f"--teacher-mode {config.teacher_mode}: give train or eval")
    if config.smoke:
        small: dict[str, Any] = {"teacher": "resnet18", "width": 1 / 16, "size": 64, "epochs": 1, "batch": 16, "workers": 0, "threads": 1}
        config = replace(config, **small, integer_images=8, data=str(Path(config.out) / "sample"))
        config = replace(config, teacher_weights="" if config.labels else str(Path(config.out) / "sample" / "teacher.safetensors"))
    elif not config.labels and not config.teacher_weights:
        raise SystemExit(f"give --teacher-weights, a file of torchvision's {config.teacher}, or learn from --labels")
    return config


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console, seconds = options(argv), Console(), Seconds()
    out = Path(config.out)
    console.print(f"{config}\n", highlight=False)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)

    if config.smoke:
        digit_files(config.data)
        if config.teacher_weights:
            untrained_teacher(config.teacher, config.teacher_weights)
    with seconds("list files"):
        sizes = {"size": config.size, "resize": config.size * 8 // 7, "strict": config.strict}
        train, test = (image_files(config.data, split, **sizes) for split in ("train", "val"))
    console.print(f"{train.name}: {len(train):,} images of {train.classes} classes; {test.name}: {len(test):,}", highlight=False)

    # Train: one model, switched from step to step; each step starts from the best weights of the one before.
    shape: dict[str, Any] = {"num_classes": train.classes, "width": config.width}
    model = zoo.get("fracbnn_imagenet", **shape)
    curves: dict[str, list[Epoch]] = {}
    if not config.resume:
        for step in config.steps:
            (out / f"step{step}" / "last.safetensors").unlink(missing_ok=True)
    for step in config.steps:
        use_real_weights(model, step == 1)
        use_gating(model, gated=step == 3 or 3 not in config.steps)
        settings = Fit(
            epochs=config.epochs,
            batch=config.batch,
            lr=config.lr,
            weight_decay=WEIGHT_DECAY[step],
            schedule=Linear(),
            flip=True,
            gate_target=config.gtarget,
            seed=config.seed + step,
            images=config.images,
            drop_last=True,
            precision=config.precision,  # type: ignore[arg-type]
            compile=config.compile,
            channels_last=True,
            save_every=config.save_every,
            workers=config.workers,
            tensorboard=True,
        )
        folder = out / f"step{step}"
        with seconds(TITLE[step]):
            curves[TITLE[step]] = fit(
                model, train, test, settings, loss(config, train.classes), title=TITLE[step], out=folder, resume=config.resume
            )
        zoo.load(model, folder / "best.safetensors")
    use_real_weights(model, False)
    if not is_main_process():
        return {}

    # Measure on a sample, convert, verify, export. Accuracy on all test images is that of the best epoch.
    few = test.sample(config.integer_images)
    scores = {f"model, {test.name}, {len(test):,} images, best epoch": max(row.test_accuracy for row in curves[TITLE[step]])}
    with seconds("measure"):
        scores[f"model, {few.name}"] = accuracy(batched(model.eval(), few.codes, 16), few.labels)  # it normalises uint8 itself
    bits = 1 + density(model)
    word, fraction = map(int, config.fixed_point.split(","))
    integer = zoo.get("fracbnn_imagenet", fixed_point=ql.FixedPoint(word, fraction), **shape)
    zoo.load(integer, model.state_dict())
    done = deploy(integer, few.codes, config.part, out, config.verify_images, config.cpp_images, seconds)
    with seconds("run integers"):
        scores[f"integers {config.fixed_point}, {few.name}"] = integer_accuracy(done.graph, few, 4)

    unreadable = train.unreadable | test.unreadable
    facts = {"activation_bits": bits, "images": {"train": len(train), "test": len(test)}, "unreadable": unreadable}
    shown = {"average activation bits on the last images of the sample": f"{bits:.3f}", "weights": str(folder / "best.safetensors")}
    return finish("fracbnn_imagenet", out, config, scores, curves, seconds, done, PUBLISHED, facts, shown)


def loss(config: Config, classes: int) -> nn.Module:
    if config.labels:
        return CrossEntropy()
    return Distillation(load_teacher(config.teacher, config.teacher_weights, classes), mode=config.teacher_mode)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
