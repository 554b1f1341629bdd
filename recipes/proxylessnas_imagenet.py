"""Quantized ProxylessNAS on ImageNet (MicroNet 2019): training in two steps, cost, integers, verification, HLS project, C++ and report.

Step 1 starts from float weights and trains with 4 bits everywhere; step 2 starts from step 1's best and gives the depthwise layers 5 bits.
The published script's flags keep their names; where its two commands differ, a flag that is not given has each step's published value.
Both commands run as published: --depthwise-bit-width 4 means step 1 alone, 5 step 2 alone.

    python recipes/proxylessnas_imagenet.py --data imagenet --resume proxylessnas_mobile14-0662-0c0ad983.pth --finetune
    accelerate launch recipes/proxylessnas_imagenet.py --data imagenet --resume float.pth --finetune
    python recipes/proxylessnas_imagenet.py --data imagenet --resume best.safetensors --evaluate
    python recipes/proxylessnas_imagenet.py --compute-micronet-cost
    python recipes/proxylessnas_imagenet.py --smoke

The folder holds train/<class>/<image> and val/<class>/<image>; val is enough for --evaluate. --steps 0 trains the float network, for which
nothing was published.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.evaluator import exact
from quantlib.io.checkpoints import read
from quantlib.training import (
    SGD,
    Cosine,
    CrossEntropy,
    Epoch,
    Fit,
    Group,
    ImageFiles,
    Images,
    Linear,
    Steps,
    Warmup,
    batched,
    digits,
    fit,
    image_files,
    is_main_process,
)
from quantlib.training.autoaugment import autoaugment
from quantlib.training.deploy import Seconds, deploy, finish, integer_accuracy
from quantlib.training.flags import parse
from quantlib.training.loop import processes
from quantlib.training.metrics import evaluating
from quantlib.training.mix import MixedImages, MixedLoss
from quantlib.training.optim import Schedule
from quantlib.training.samples import DropoutSamples, MeanOverSamples, right_on_average
from zoo.proxylessnas import REDUCED


@dataclass(frozen=True)
class Step:
    """What the two published commands say differently."""

    title: str
    network: str
    epochs: int
    lr: float
    milestones: tuple[int, ...]
    depthwise_bit_width: int
    bn_no_wd: bool
    dropout_steps: int


STEPS = {
    0: Step("float", "proxylessnas_float_imagenet", 0, 0.0, (15, 30, 45), 32, False, 0),
    1: Step("step 1, all 4 bits", "proxylessnas_4b_imagenet", 60, 0.005, (15, 30, 45), 4, False, 0),
    2: Step("step 2, depthwise 5 bits", "proxylessnas_4b5b_imagenet", 20, 0.0001, (5, 10, 15), 5, True, 32),
}


@dataclass(frozen=True)
class Config:
    data: str = "imagenet"
    resume: str = ""
    finetune: bool = False
    evaluate: bool = False
    compute_micronet_cost: bool = False
    steps: tuple[int, ...] = ()
    epochs: int = 0
    lr: float = 0.0
    lr_schedule: str = "step"
    milestones: tuple[int, ...] = ()
    warmup: int = 0
    batch_size: int = 96
    optimizer_batch_size: int = -1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 3e-5
    bn_no_wd: bool = False
    label_smoothing: float = 0.1
    dropout_rate: float = 0.2
    dropout_steps: int = -1
    mix_rate: float = 0.0
    mix_prob: float = 0.5
    mix_type: str = "cutmix"
    norm_input: bool = False
    quant_type: str = "INT"
    bit_width: int = 4
    depthwise_bit_width: int = 0
    first_layer_bit_width: int = 8
    weight_scaling_impl_type: str = "STATS"
    hard_tanh_threshold: float = 10.0
    seed: int = 123456
    workers: int = 10
    print_freq: int = 10
    reduced: bool = False
    width: float = 1.0
    size: int = 224
    images: int = 0
    part: str = "xcu250"
    integer_images: int = 1000
    verify_images: int = 1
    cpp_images: int = 1
    threads: int = 0
    save_every: int = 500
    precision: str = "no"
    compile: bool = False
    strict: bool = False
    smoke: bool = False
    out: str = "build/proxylessnas_imagenet"


HELP = {
    "data": "folder with train/<class>/<image> and val/<class>/<image>",
    "resume": "weights to start from or to measure: of the float network for step 1, step 1's best for step 2; published files are read",
    "finetune": "start afresh from --resume; without it a killed run of the same command goes on where it stopped, if --out holds one",
    "evaluate": "only count right answers of --resume on val, as the network of the last of --steps",
    "compute_micronet_cost": "only print the network's MicroNet cost",
    "steps": "1,2; 1; 2; or first 0, the float network, with --epochs and --lr (none: 1,2, or the step of --depthwise-bit-width 4 or 5)",
    "epochs": "of each step (0: 60 in step 1, 20 in step 2, as published)",
    "lr": "(0: 0.005 in step 1, 0.0001 in step 2, as published)",
    "lr_schedule": "step, linear or cosine",
    "milestones": "epochs from which on the learning rate has one more factor 0.1 (none: 15,30,45 and 5,10,15, as published)",
    "warmup": "epochs e of learning rate lr (e + 1) / warmup, before the schedule",
    "batch_size": "images per step in each process (published: 3 of them)",
    "optimizer_batch_size": "the published option has no proper effect; only -1",
    "weight_decay": "of all parameters, learned log2 scales included",
    "bn_no_wd": "no weight decay on parameters whose names contain bn (step 2 as published, with it every step)",
    "label_smoothing": "share of the target spread over all classes, in the validation loss too",
    "dropout_rate": "of the multi-sample dropout before the classifier",
    "dropout_steps": "its samples (-1: none in step 1, 32 in step 2, as published; 0: no dropout)",
    "mix_rate": "parameter of the Beta distribution of cutmix or mixup (0: off, as published)",
    "mix_prob": "chance that a batch is mixed",
    "mix_type": "cutmix or mixup",
    "norm_input": "a published option that the submission leaves off: such images have no integer grid with padding 0, so it is refused",
    "quant_type": "only INT",
    "depthwise_bit_width": "of depthwise weights and of their inputs from 1x1 convolutions (0: 4 in step 1, 5 in step 2)",
    "weight_scaling_impl_type": "only STATS",
    "hard_tanh_threshold": "first range of the quantizers around the residual additions; it is learned",
    "seed": "torch's, numpy's and Python's, with the number of the process added before anything is drawn",
    "workers": "processes that decode images",
    "print_freq": "read for the sake of published commands; a bar shows every step",
    "reduced": "a network of six units with every kind of unit",
    "width": "multiplies all channels",
    "size": "of the images; for testing the shorter side is resized to 8/7 of it",
    "images": "per epoch, chosen anew each time (0: all)",
    "integer_images": "test images for accuracy in integers beside the model's on the same",
    "threads": "torch threads (0: as torch decides)",
    "save_every": "steps between checkpoints",
    "precision": "no, bf16 or fp16",
    "compile": "torch.compile (slower on CPU)",
    "strict": "an unreadable image is an error",
    "smoke": "everything once on a reduced network and a few images made from scikit-learn's digits",
}
ONLY = {"optimizer_batch_size": -1, "norm_input": False, "quant_type": "INT", "weight_scaling_impl_type": "STATS"}
CHOICES = {"lr_schedule": ("step", "linear", "cosine"), "mix_type": ("cutmix", "mixup"), "precision": ("no", "bf16", "fp16")}


def options(argv: list[str] | None) -> Config:
    config = parse(Config(), __doc__ or "", HELP, argv, short={"batch_size": "-b", "workers": "-j", "print_freq": "-p"})
    for name, value in ONLY.items():
        if getattr(config, name) != value:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(config, name)}: only {value} is supported; {HELP[name]}")
    for name, values in CHOICES.items():
        if getattr(config, name) not in values:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(config, name)}: give {', '.join(values)}")
    if not config.steps:
        published = {STEPS[number].depthwise_bit_width: (number,) for number in (1, 2)}
        config = replace(config, steps=published.get(config.depthwise_bit_width, (1, 2)))
    training = not (config.evaluate or config.compute_micronet_cost)
    if training and {1, 2} <= set(config.steps) and config.depthwise_bit_width:
        raise SystemExit(
            f"--depthwise-bit-width {config.depthwise_bit_width}: the two steps differ by it; give --steps 1 or --steps 2 with it"
        )
    if config.steps not in ((1, 2), (1,), (2,), (0,), (0, 1), (0, 1, 2)):
        raise SystemExit(f"--steps {','.join(map(str, config.steps))}: give 1,2 or 1 or 2, or those with 0 in front")
    if config.smoke:
        small: dict[str, Any] = {"reduced": True, "width": 1 / 8, "size": 32, "epochs": 1, "batch_size": 16, "workers": 0, "threads": 1}
        folder = Path(config.out) / "sample"
        small |= {"data": str(folder), "resume": str(folder / "float.pth"), "integer_images": 16, "verify_images": 4}
        small |= {"cpp_images": 4 if config.cpp_images else 0}
        return replace(config, **small)
    if config.evaluate and not config.resume:
        raise SystemExit("--evaluate: give --resume, the weights to measure")
    if training and not config.resume and config.steps[0] != 0:
        wanted = {1: "weights of the float network, or begin with --steps 0", 2: "step 1's best weights"}[config.steps[0]]
        raise SystemExit(f"give --resume, {wanted}")
    if training and 0 in config.steps and not (config.epochs and config.lr):
        raise SystemExit("--steps 0: give --epochs and --lr; the float network's training was not published with the others")
    return config


def of_step(config: Config, number: int) -> Step:
    """The published step with the flags that were given."""
    given: dict[str, Any] = {k: v for k in ("epochs", "lr", "milestones", "depthwise_bit_width") if (v := getattr(config, k))}
    given |= {"bn_no_wd": True} if config.bn_no_wd else {}
    given |= {"dropout_steps": config.dropout_steps} if config.dropout_steps >= 0 and number else {}
    return replace(STEPS[number], **given)


def network(config: Config, number: int, classes: int) -> nn.Module:
    step = of_step(config, number)
    shape: dict[str, Any] = {"num_classes": classes, "width": config.width, "image_size": config.size}
    shape |= {"stages": REDUCED} if config.reduced else {}
    if number:
        shape |= {"bit_width": config.bit_width, "depthwise_bit_width": step.depthwise_bit_width}
        shape |= {"first_layer_bit_width": config.first_layer_bit_width, "hard_tanh_threshold": config.hard_tanh_threshold}
    return zoo.get(step.network, **shape)


def start(model: nn.Module, path: str | Path, console: Console) -> None:
    """Loads weights and says what they did not hold."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        zoo.load(model, path)
    if is_main_process():
        console.print(f"weights of {path}", highlight=False, soft_wrap=True)
        for warning in said:
            console.print(str(warning.message), style="yellow", highlight=False, soft_wrap=True)


def schedule(config: Config, step: Step) -> Schedule:
    """Milestones count epochs of the whole run; linear and cosine run over what the warm-up leaves."""
    then: Steps | Linear | Cosine = Linear() if config.lr_schedule == "linear" else Cosine()
    if config.lr_schedule == "step":
        then = Steps(tuple(m - config.warmup for m in step.milestones))
    return Warmup(config.warmup, then, first=True) if config.warmup else then


def settings(config: Config, step: Step, together: int = 1) -> Fit:
    return Fit(
        epochs=step.epochs,
        batch=config.batch_size * together,
        lr=step.lr,
        weight_decay=config.weight_decay,
        optimizer=SGD(config.momentum, config.nesterov),
        schedule=schedule(config, step),
        groups=(Group("bn", weight_decay=0.0),) if step.bn_no_wd else (),
        seed=config.seed,
        images=config.images,
        drop_last=True,
        precision=config.precision,  # type: ignore[arg-type]
        compile=config.compile,
        channels_last=True,
        save_every=config.save_every,
        workers=config.workers,
        tensorboard=True,
    )


def wrapped(config: Config, step: Step, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What is trained in the model's place, and its loss."""
    loss: nn.Module = MeanOverSamples(CrossEntropy(config.label_smoothing))
    trained = DropoutSamples(model, step.dropout_steps, config.dropout_rate) if step.dropout_steps else model
    if config.mix_rate > 0 and config.mix_prob > 0:
        kind: Literal["cutmix", "mixup"] = "mixup" if config.mix_type == "mixup" else "cutmix"
        trained = MixedImages(trained, config.mix_rate, config.mix_prob, kind)
        loss = MixedLoss(loss, trained)
    return trained, loss


def smoothed(smoothing: float) -> Any:
    """The loss of each image, (N,): validation has label smoothing too. Several dropout samples are averaged."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        samples = outputs if outputs.dim() == 3 else outputs[None]
        return torch.stack([F.cross_entropy(s, labels, reduction="none", label_smoothing=smoothing) for s in samples]).mean(0)

    return loss


def logits(model: Any, x: Tensor) -> Tensor:
    """Of the quantized network as the integers they stand for, so that equal logits are equal whatever the batch; else as they are.

    Exact where the accumulator has 24 bits or fewer, as float32 has: 19 in the published network.
    """
    pooled = model.pooled(x)
    outputs = model.output(pooled)
    if isinstance(pooled, Tensor):
        return outputs
    return (outputs.double() / (pooled.scale * model.output.quant_weight().scale).double()).round().long()


def top1(model: nn.Module, data: ImageFiles, batch: int, workers: int) -> tuple[int, int, int]:
    """(right answers, readable images, images whose largest logit is that of several classes). Of equal logits the lowest class wins."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = torch.zeros(3, dtype=torch.long)
    with evaluating(model.to(device)), exact():  # without TF32, which a GPU would use in convolutions
        for x, labels in data.read(torch.arange(len(data)).split(batch), None, (0, 0), workers):
            y = logits(model, x.to(device)).cpu()
            largest = y == y.max(1, keepdim=True).values
            first = largest.long().argmax(1)
            counts += torch.stack([(first == labels).sum(), torch.tensor(len(labels)), (largest.sum(1) > 1).sum()])
    model.cpu()
    right, images, tied = counts.tolist()
    return right, images, tied


def make_sample(config: Config) -> None:
    """The smoke test's folder: 64 + 32 coloured digits as PNG files of 40x40 pixels, and untrained weights of the float network."""
    from PIL import Image, ImageOps

    folder = Path(config.data)
    for split, data in (("train", digits("train")[:64]), ("val", digits("test")[:32])):
        for n, (codes, label) in enumerate(zip(data.codes, data.labels.tolist())):
            path = folder / split / str(label % 2) / f"{n:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = ("maroon", "navy", "teal", "olive")[n % 4]
            ImageOps.colorize(Image.fromarray(codes[0].numpy()), colour, "white").resize((40, 40)).save(path)
    torch.save(network(config, 0, 2).state_dict(), config.resume)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    from accelerate.utils import set_seed

    config, console, seconds = options(argv), Console(), Seconds()
    out, together = Path(config.out), processes()
    if is_main_process():
        console.print(f"{config}\n", highlight=False)
    set_seed(config.seed + together.local_process_index)
    if config.threads:
        torch.set_num_threads(config.threads)
    last = config.steps[-1]

    if config.compute_micronet_cost and not config.smoke:
        rows = (len(v) for key, v in read(config.resume).items() if key.endswith("output.weight")) if config.resume else iter(())
        model = network(config, last, classes=next(rows, 1000))
        if config.resume:
            start(model, config.resume, console)
        return {"micronet_cost": micronet_cost(model, config, console)}

    if config.smoke and is_main_process():
        make_sample(config)
    together.wait_for_everyone()
    with seconds("list files"):
        pixels: dict[str, Any] = {"levels": 128, "mean": (1.0,) * 3, "std": (1.0,) * 3}  # (u8 - 128) / 128
        pixels |= {"lighting": 0.0, "policy": autoaugment}
        sizes = {"size": config.size, "resize": config.size * 8 // 7, "strict": config.strict}
        test = image_files(config.data, "val", **sizes, **pixels)

    if config.evaluate and not config.smoke:
        model = network(config, last, test.classes)
        start(model, config.resume, console)
        return {"top1": say_top1(model, test, config, console)} if is_main_process() else {}

    with seconds("list files"):
        train = image_files(config.data, "train", **sizes, **pixels)
    if is_main_process():
        console.print(f"{train.name}: {len(train):,} images of {train.classes} classes; {test.name}: {len(test):,}", highlight=False)

    # Train: each step starts from the best weights of the one before.
    curves: dict[str, list[Epoch]] = {}
    weights: str | Path = config.resume
    for number in config.steps:
        step = of_step(config, number)
        model = network(config, number, train.classes)
        if weights:
            start(model, weights, console)
        trained_as, loss = wrapped(config, step, model)
        how, folder = settings(config, step, together.num_processes), out / f"step{number}"
        if not config.finetune and (folder / "last.safetensors").is_file() and is_main_process():
            console.print(f"{step.title}: goes on from {folder / 'last.safetensors'} (--finetune: afresh)", highlight=False)
        with seconds(step.title):
            curves[step.title] = fit(
                model, train, test, how, loss, title=step.title, out=folder, resume=not config.finetune, score=right_on_average,
                also={"loss": smoothed(config.label_smoothing)}, trained_as=trained_as,
            )  # fmt: skip
        weights = folder / "best.safetensors"
        zoo.load(model, weights)
    if not is_main_process():
        return {}

    # Measure, price, convert, verify, export.
    with seconds("evaluate"):
        right, images, tied = say_top1(model, test, config, console)
    scores = {f"model, {test.name}, {images:,} images": right / max(images, 1)}
    facts: dict[str, Any] = {"top1": {"right": right, "images": images, "tied": tied}}
    facts |= {"images": {"train": len(train), "test": len(test)}, "unreadable": train.unreadable | test.unreadable}
    shown = {"right answers, ties to the lowest class": f"{right:,} of {images:,}", "images with tied largest logits": f"{tied:,}"}
    done = None
    if last:
        with seconds("cost"):
            facts["micronet_cost"] = micronet_cost(model, config, console)
        shown["MicroNet cost, published fan-in"] = str(facts["micronet_cost"])
        few = test.sample(config.integer_images)
        scores[f"model, {few.name}"] = float((model_classes(model, few) == few.labels).double().mean())
        done = deploy(model, few.codes, config.part, out, config.verify_images, config.cpp_images, seconds)
        with seconds("run integers"):
            scores[f"integers, {few.name}"] = integer_accuracy(done.graph, few, 4)
    return finish(step.network.removesuffix("_imagenet"), out, config, scores, curves, seconds, done, facts=facts, shown=shown)


def model_classes(model: nn.Module, few: Images) -> Tensor:
    """The model's answers on pixels, ties to the lowest class."""
    model.eval()
    return batched(lambda codes: logits(model, (codes.float() - 128) / 128), few.codes, 16).argmax(1)


def say_top1(model: nn.Module, test: ImageFiles, config: Config, console: Console) -> tuple[int, int, int]:
    right, images, tied = top1(model, test, config.batch_size, config.workers)
    rule = f"{tied:,} images have several classes with the largest logit; the lowest of them counts"
    console.print(f"top-1: {right:,} of {images:,}, {100 * right / max(images, 1):.3f} %; {rule}", highlight=False, soft_wrap=True)
    return right, images, tied


def micronet_cost(model: nn.Module, config: Config, console: Console) -> Any:
    """float32 of the exact sum, with the published rule of accumulator widths."""
    cost = ql.analysis.micronet_cost(model.eval(), (3, config.size, config.size), fan_in="published")
    console.print(f"Micronet cost: {cost.printed}", highlight=False)
    return cost.printed


if __name__ == "__main__":
    main()
