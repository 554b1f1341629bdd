"""Training with label refinery on ImageNet: arguments, defaults and steps of the published script of DiracDeltaNet and ShuffleNetV2.

Yang et al., "Synetgy", FPGA 2019, arXiv 1811.08634; code: Yang-YiFan/DiracDeltaNet. Both recipes are this file and a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantlib as ql
from quantlib.io.checkpoints import load
from quantlib.training.data import ImageFiles, image_files
from quantlib.training.deploy import Deployed, Seconds, deploy, finish, integer_accuracy
from quantlib.training.flags import parse
from quantlib.training.logs import Epoch
from quantlib.training.loop import Fit, fit, is_main_process
from quantlib.training.losses import CrossEntropy, Distillation, load_teacher
from quantlib.training.metrics import accuracy, batched, measure, right_among
from quantlib.training.optim import SGD, EachStep, Linear, Schedule, Steps
from quantlib.training.report import write
from quantlib.training.smoke import digit_files, untrained_teacher

POLICY: dict[str, Schedule] = {"linear": EachStep(Linear(over=-1)), "step": Steps((20, 30, 40), (1 / 5, 1 / 25, 1 / 125))}
TEST_BATCH = 1000  # the published script sums its test loss over batches of so many


@dataclass(frozen=True)
class Arguments:
    """The published arguments, then ours. A network's own follow in a subclass."""

    datadir: str = "imagenet"
    inputdir: str = ""
    outputdir: str = "build/refinery"
    logdir: str = "./log/log.txt"
    resume: bool = False
    lr: float = 0.5
    lr_policy: str = "linear"
    totalepoch: int = 90
    batch_size: int = 1024
    weight_decay: float = 4e-5
    crop_scale: float = 0.2
    base_channel_size: int = 116
    evaluate: bool = False
    teacher: str = "resnet50"
    teacher_weights: str = ""
    teacher_mode: str = "eval"
    labels: bool = False
    images: int = 0
    size: int = 224
    part: str = "xczu3eg"
    integer_images: int = 1000
    verify_images: int = 1
    cpp_images: int = 1
    seed: int = 0
    threads: int = 0
    workers: int = 30
    save_every: int = 500
    precision: str = "no"
    compile: bool = False
    strict: bool = False
    smoke: bool = False


HELP = {
    "datadir": "folder with train/<class>/<image> and val/<class>/<image>",
    "inputdir": "weights to fine-tune from, or to evaluate: best.safetensors of an earlier run, .pth, or a published .t7",
    "outputdir": "folder of checkpoints, report and HLS project (published: one file)",
    "logdir": "text file with a line for each epoch, counted from 0: top-1, top-5 in percent and summed loss while training, then on val",
    "resume": "continue exactly where a killed run of the same --outputdir stopped",
    "lr": "learning rate of the first iteration",
    "lr_policy": "linear: lr (1 - t / (T - 1)) before iteration t of T; step: lr, and a fifth of it more from epochs 20, 30, 40 on",
    "totalepoch": "passes over the training images",
    "batch_size": "images per step, over all processes together",
    "weight_decay": "of every parameter, clip scalars included",
    "crop_scale": "least share of an image's area that a training image shows",
    "base_channel_size": "channels of the first layer of blocks: 116 or 128, or any multiple of 4",
    "evaluate": "train nothing: measure --inputdir on val, and go on to integers",
    "teacher": "torchvision classifier whose softmax is learned",
    "teacher_weights": "file of its weights: .pth, .safetensors, or the published resnet50.t7",
    "teacher_mode": "eval: the teacher uses its running statistics; train: those of the batch, as the published script",
    "labels": "learn from labels instead of a teacher (not the published loss)",
    "images": "per epoch, chosen anew each time (0: all)",
    "size": "of the images; for testing the shorter side is resized to 8/7 of it",
    "integer_images": "test images for accuracy in integers beside the model's on the same",
    "threads": "torch threads (0: as torch decides)",
    "workers": "processes that decode images",
    "save_every": "steps between checkpoints",
    "precision": "no, bf16 or fp16",
    "compile": "torch.compile (slower on CPU)",
    "strict": "an unreadable image is an error",
    "smoke": "everything once, with a tiny network and 64x64 pixels, on a few images made from scikit-learn's digits",
}
SHORT = {"resume": "-r", "batch_size": "-b", "weight_decay": "--wd"}
CHOICES = {"lr_policy": tuple(POLICY), "teacher_mode": ("eval", "train"), "precision": ("no", "bf16", "fp16")}

A = TypeVar("A", bound=Arguments)


def options(defaults: A, description: str, argv: Sequence[str] | None, help: Mapping[str, str], short: Mapping[str, str]) -> A:
    """The command line; SystemExit says what is missing or cannot be."""
    config = parse(defaults, description, HELP | dict(help), argv, SHORT | dict(short))
    for name, values in CHOICES.items():
        if getattr(config, name) not in values:
            raise SystemExit(f"--{name} {getattr(config, name)}: give {' or '.join(values)}")
    if config.smoke:
        out = Path(config.outputdir)
        tiny: dict[str, Any] = {"teacher": "resnet18", "base_channel_size": 16, "size": 64, "totalepoch": 1, "batch_size": 16, "workers": 0}
        config = replace(config, **tiny, threads=1, integer_images=8, datadir=str(out / "sample"), logdir=str(out / "log.txt"))
        return replace(config, teacher_weights="" if config.labels else str(out / "sample" / "teacher.safetensors"))
    if config.evaluate:
        if not config.inputdir:
            raise SystemExit("--evaluate: give --inputdir, the weights to measure")
    elif not config.labels and not config.teacher_weights:
        raise SystemExit(f"give --teacher_weights, a file of torchvision's {config.teacher}, or learn from --labels")
    return config


def data(config: Arguments) -> tuple[ImageFiles, ImageFiles]:
    """Training and test images as published: random areas and mirroring without colour, or the middle of the image."""
    if config.smoke:
        digit_files(config.datadir)
        if config.teacher_weights:
            untrained_teacher(config.teacher, config.teacher_weights)
    settings = {"size": config.size, "resize": config.size * 8 // 7, "strict": config.strict, "lighting": 0.0, "crop": config.crop_scale}
    train, test = (image_files(config.datadir, split, **settings) for split in ("train", "val"))
    return train, test


def loss(config: Arguments, classes: int) -> nn.Module:
    if config.labels:
        return CrossEntropy()
    teacher = load_teacher(config.teacher, config.teacher_weights, classes)
    return Distillation(teacher, mode=config.teacher_mode, form="cross entropy")  # type: ignore[arg-type]


def log_line(row: Epoch, batch: int, test_images: int) -> str:
    """As published: epoch from 0, top-1, top-5 (percent) and loss of training, then of testing.

    The losses are sums over batches: the mean over the images times the number of batches (of `TEST_BATCH` images for testing).
    """
    trained = (100 * row.train_accuracy, 100 * row.more["train top-5"], row.loss * ceil(row.images / batch))
    tested = (100 * row.test_accuracy, 100 * row.more["test top-5"], row.more["test cross entropy"] * ceil(test_images / TEST_BATCH))
    return " ".join(map(str, (row.number - 1, *trained, *tested)))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """(N,): -log softmax(outputs)[label], the published loss while testing."""
    return F.cross_entropy(outputs.float(), labels, reduction="none")


def run(
    title: str,
    config: Arguments,
    network: Callable[[int], nn.Module],
    published: Mapping[str, float] | None = None,
    unquantized: str = "",
) -> dict[str, Any]:
    """Trains or evaluates, measures, converts, verifies, exports and reports; the content of report.json, {} in processes but the first.

    network: builds it for so many classes, with the weights it starts from. published: totals of an accelerator, to stand beside ours.
    unquantized: why there are no integers, where that is known.
    """
    out, seconds = Path(config.outputdir), Seconds()
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    with seconds("list files"):
        train, test = data(config)
    model = network(train.classes)
    also = {"top-5": right_among, "cross entropy": cross_entropy}
    curves: dict[str, list[Epoch]] = {}
    if config.evaluate:
        with seconds("measure"):
            found = measure(
                model, test, {"top-1": partial(right_among, most=1), **also}, min(config.batch_size, TEST_BATCH), config.workers
            )
    else:
        settings = Fit(
            epochs=config.totalepoch,
            batch=config.batch_size,
            lr=config.lr,
            weight_decay=config.weight_decay,
            optimizer=SGD(momentum=0.9),
            schedule=POLICY[config.lr_policy],
            flip=True,
            seed=config.seed,
            images=config.images,
            precision=config.precision,  # type: ignore[arg-type]
            compile=config.compile,
            channels_last=True,
            save_every=config.save_every,
            workers=config.workers,
            tensorboard=True,
        )

        def log(rows: Sequence[Epoch]) -> None:
            write(Path(config.logdir), "".join(log_line(row, config.batch_size, len(test)) + "\n" for row in rows))

        with seconds("train"):
            rows = fit(model, train, test, settings, loss(config, train.classes), title, out, config.resume, also=also, each_epoch=log)
        curves[title] = rows
        best = max(reversed(rows), key=lambda row: row.test_accuracy)
        found = {"top-1": best.test_accuracy, "top-5": best.more["test top-5"]}
        load(model, out / "best.safetensors")
    if not is_main_process():
        return {}
    if config.evaluate:
        print(f"top-1 accuracy: {100 * found['top-1']}, top-5 accuracy: {100 * found['top-5']}")
    scores = {f"model, {test.name}, {len(test):,} images, {k}": found[k] for k in ("top-1", "top-5")}
    shown = {"weights": config.inputdir if config.evaluate else str(out / "best.safetensors")}
    done = None
    if unquantized:
        shown["integers"] = f"none: {unquantized}"
    else:
        done = integers(config, model, test, out, seconds, scores, shown)
    facts = {"images": {"train": len(train), "test": len(test)}, "unreadable": train.unreadable | test.unreadable}
    return finish(title, out, config, scores, curves, seconds, done, published, facts | {"shown": shown}, shown)


def integers(
    config: Arguments, model: nn.Module, test: ImageFiles, out: Path, seconds: Seconds, scores: dict[str, float], shown: dict[str, str]
) -> Deployed | None:
    """Integers, HLS project and C++ where every layer is quantized; else `shown` says which layer is not."""
    few = test.sample(config.integer_images)
    try:
        done = deploy(model, few.codes, config.part, out, config.verify_images, config.cpp_images, seconds)
    except ql.ConversionError as error:
        shown["integers"] = f"none: {error}"
        return None
    with seconds("run integers"):
        scores[f"model, {few.name}, top-1"] = accuracy(batched(model.eval(), few.codes, 16), few.labels)  # it normalises uint8 itself
        scores[f"integers, {few.name}, top-1"] = integer_accuracy(done.graph, few, 4)
    return done
