"""Networks of FuSeConv on CIFAR-10 or CIFAR-100: depthwise layers against FuSe layers, trained alike, and their cycles on an array.

Arguments and defaults are those of the published script: images of 32x32 enlarged to 224x224, shifted by up to four pixels and mirrored;
stochastic gradient descent, a tenth of the learning rate from epochs 20 and 40 on (FuSeConv, DATE 2021). The rate follows from the epoch's
number and the last state is saved after every epoch, so a resumed run is the uninterrupted one. --variant takes several of baseline, half
and full: they are trained one after the other on the same images in the same order, and the page says how many points each one loses
against the first, image by image, and how many cycles it saves on a systolic array.

    python recipes/fuseconv_cifar.py -D CIFAR10 -N MobileNetV2 -n build/v2 -v half
    python recipes/fuseconv_cifar.py -N MobileNetV2 -n build/v2_small -v baseline,half,full --size 64 --width 0.5 --epochs 20
    python recipes/fuseconv_cifar.py --smoke
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import zoo
from quantlib.analysis import systolic_latency
from quantlib.training import SGD, Epoch, Fit, Images, Steps, fit, is_main_process, predictions, read_images, right_answers
from quantlib.training.deploy import Seconds, finish
from quantlib.training.flags import parse
from quantlib.training.smoke import enlarged_digits

NETWORKS = {
    "ResNet": "resnet50",
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3S": "mobilenet_v3_small",
    "MobileNetV3L": "mobilenet_v3_large",
    "MnasNet": "mnasnet_b1",
}
VARIANTS = {
    "baseline": "",
    "half": "_fuse_half",
    "full": "_fuse_full",
    "half_hybrid": "_fuse_half_hybrid",
    "full_hybrid": "_fuse_full_hybrid",
}
FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
MILESTONES = (20, 40, 60, 70, 80, 90)  # the published list; 60 epochs reach the first two


@dataclass(frozen=True)
class Config:
    dataset: str = "CIFAR10"
    network: str = "ResNet"
    name: str = "build/fuseconv_cifar"
    variant: tuple[str, ...] = ("baseline",)
    resume: bool = False
    data: str = ""
    test: str = ""
    also_test: tuple[str, ...] = ()
    epochs: int = 60
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = MILESTONES
    images: int = 0
    size: int = 224
    width: float = 1.0
    array: int = 64
    curve_every: int = 1
    seed: int = 42
    threads: int = 0
    save_every: int = 200
    precision: str = "no"
    strict: bool = False
    smoke: bool = False


HELP = {
    "dataset": "CIFAR10 or CIFAR100",
    "network": ", ".join(NETWORKS),
    "name": "of the run: the folder it writes to, one below it for each variant",
    "variant": ", ".join(VARIANTS),
    "resume": "continue where a killed run of the same name stopped",
    "data": "training images: CIFAR as torchvision unpacks it (default: the folder of --dataset), an .npz, a .zip or class folders",
    "test": "test images (default: the split `test` of --data)",
    "also_test": "further test sets for the final figures, separated by commas",
    "lr": "learning rate of the first epochs",
    "milestones": "epochs, counted from 0, from which on the rate is a tenth",
    "images": "per epoch, chosen anew each time (0: all)",
    "size": "that images are enlarged to",
    "width": "multiplies all channels",
    "array": "rows and columns of the systolic array whose cycles are counted",
    "curve_every": "measure each epoch on every n-th test image; final figures are on all",
    "threads": "torch threads (0: as torch decides)",
    "save_every": "steps between checkpoints",
    "precision": "no, bf16 or fp16",
    "strict": "an unreadable image is an error",
    "smoke": "everything once, with a tiny network, on a few images made from scikit-learn's digits",
}
SHORT = {"dataset": "-D", "network": "-N", "name": "-n", "variant": "-v", "resume": "-r"}


def options(argv: list[str] | None) -> Config:
    config = parse(Config(), __doc__ or "", HELP, argv, SHORT)
    for flag, given, known in (
        ("dataset", (config.dataset,), FOLDERS),
        ("network", (config.network,), NETWORKS),
        ("variant", config.variant, VARIANTS),
    ):
        wrong = [word for word in given if word not in known]
        if wrong or not given:
            raise SystemExit(f"--{flag} {','.join(wrong)}: give {', '.join(known)}")
    if config.smoke:
        small: dict[str, Any] = {"network": "MobileNetV2", "variant": ("baseline", "half", "full"), "epochs": 1, "batch": 32, "threads": 1}
        return replace(config, **small, size=64, width=1 / 8)
    return replace(config, data=config.data or FOLDERS[config.dataset])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console, seconds = options(argv), Console(), Seconds()
    out = Path(config.name)
    console.print(f"{config}\n", highlight=False)
    if config.threads:
        torch.set_num_threads(config.threads)

    with seconds("data"):
        if config.smoke:
            sets = [enlarged_digits("train", 96), enlarged_digits("test", 40)]
        else:
            sets = [read_images(config.data, "train", config.strict)]
            sets += [read_images(path, "test", config.strict) for path in (config.test or config.data, *config.also_test)]
    unreadable = {path: reason for data in sets for path, reason in data.unreadable.items()}
    for path, reason in unreadable.items():
        console.print(f"unreadable, left out: {path} ({reason})", style="yellow", highlight=False)
    console.print("; ".join(f"{data.name}: {len(data):,} images" for data in sets), highlight=False)
    train, test, *others = (replace(data, side=config.size, mean=MEAN, std=STD) for data in sets)

    # Train the variants, each on the same images in the same order.
    settings = Fit(
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        weight_decay=config.weight_decay,
        optimizer=SGD(momentum=0.9),
        schedule=Steps(config.milestones),
        shift=4,
        flip=True,
        seed=config.seed,
        images=config.images,
        channels_last=True,
        precision=config.precision,  # type: ignore[arg-type]
        save_every=config.save_every,
        tensorboard=True,
    )
    if not config.resume:
        for variant in config.variant:
            (out / variant / "last.safetensors").unlink(missing_ok=True)
    curves: dict[str, list[Epoch]] = {}
    models: dict[str, torch.nn.Module] = {}
    for variant in config.variant:
        name = f"{NETWORKS[config.network]}{VARIANTS[variant]}_imagenet"
        torch.manual_seed(config.seed)
        model = zoo.get(name, num_classes=train.classes, width=config.width)
        with seconds(f"train {variant}"):
            curves[variant] = fit(model, train, test[:: config.curve_every], settings, title=name, out=out / variant, resume=config.resume)
        models[variant] = zoo.load(model, out / variant / "best.safetensors")
    if not is_main_process():
        return {}
    return compare(config, models, [test, *others], curves, seconds, unreadable)


def compare(
    config: Config,
    models: dict[str, torch.nn.Module],
    sets: list[Images],
    curves: dict[str, list[Epoch]],
    seconds: Seconds,
    unreadable: dict[str, str],
) -> dict[str, Any]:
    """Accuracy of the best epoch's weights, what is lost against the first variant with its standard error, and cycles."""
    scores: dict[str, float] = {}
    facts: dict[str, Any] = {"unreadable": unreadable, "networks": {}}
    shown: dict[str, str] = {}
    first, baseline = config.variant[0], 0
    control: dict[str, torch.Tensor] = {}
    shape = (3, config.size, config.size)
    for variant, model in models.items():
        lost = {}
        with seconds("measure"):
            for data in sets:
                right = right_answers(predictions(model, data), data.labels).double()
                scores[f"{variant}, {data.name}"] = float(right.mean())
                difference = control.setdefault(data.name, right) - right
                lost[data.name] = {
                    "points": 100 * float(difference.mean()),
                    "error": 100 * float(difference.std() / len(difference) ** 0.5),
                }
        # networks without FuSe layers take the same cycles on either array
        cycles = systolic_latency(model, shape, config.array, config.array, array="fuse").cycles
        baseline = baseline or cycles
        parameters = sum(p.numel() for p in model.parameters())
        facts["networks"][variant] = {"parameters": parameters, "cycles": cycles, "speedup": baseline / cycles, "lost": lost}
        shown[f"{variant}: parameters, cycles"] = f"{parameters:,}, {cycles:,} ({baseline / cycles:.2f} times as fast as {first})"
        if variant != first:
            shown |= {f"{variant}: points lost, {name}": f"{d['points']:.2f} +- {d['error']:.2f}" for name, d in lost.items()}
    title = f"{NETWORKS[config.network]} on {config.dataset}"
    return finish(title, Path(config.name), config, scores, curves, seconds, facts=facts, shown=shown)


if __name__ == "__main__":
    main()
