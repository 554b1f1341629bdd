"""DiracDeltaNet on CIFAR-10: full precision, then fewer bits from it, side by side; integers, HLS project, C++ and report for each.

One full-precision network is trained first. Every pair of --bits (weights/activations) then starts from its best weights, by the published
rule for clip scalars, and goes on for the same number of images at the same learning rates; 32/32 among them is the control, without which
longer training and fewer bits could not be told apart. Quantized networks have 8 bits in the first and last convolution, the activations
behind them and the classifier, so that all of them convert to integers.
Optimizer, weight decay and learning-rate policy are those published for ImageNet (Synetgy, FPGA 2019); the loss is that of the labels.

    python recipes/diracdeltanet_cifar10.py --data cifar-10-batches-py
    python recipes/diracdeltanet_cifar10.py --data train.zip --test test.zip --also-test more.npz --bits 32/32,8/8,4/4,1/4 --resume
    python recipes/diracdeltanet_cifar10.py --smoke
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import quantlib as ql
import zoo
from quantlib.training import SGD, EachStep, Epoch, Fit, Images, Linear, fit, is_main_process, predictions, read_images, right_among
from quantlib.training.deploy import Seconds, deploy, finish, integer_predictions
from quantlib.training.flags import parse
from quantlib.training.smoke import enlarged_digits
from zoo.diracdeltanet import inherit

REAL = "32/32"
PIXELS = ql.Grid(0, 255, 1 / 255)


@dataclass(frozen=True)
class Config:
    data: str = "cifar-10-batches-py"
    test: str = ""
    also_test: tuple[str, ...] = ()
    bits: tuple[str, ...] = (REAL, "4/4", "1/4")
    epochs: int = 90
    fine_epochs: int = 45
    batch: int = 128
    lr: float = 0.2
    fine_lr: float = 0.05
    keep_clips: bool = False
    signs: bool = False
    weight_decay: float = 4e-5
    images: int = 0
    base: int = 64
    blocks: tuple[int, ...] = (4, 8, 4)
    features: int = 512
    expansion: float = 2.0
    curve_every: int = 1
    part: str = "xczu3eg"
    verify_images: int = 64
    cpp_images: int = 16
    seed: int = 0
    threads: int = 0
    save_every: int = 200
    strict: bool = False
    resume: bool = False
    smoke: bool = False
    out: str = "build/diracdeltanet_cifar10"


HELP = {
    "data": "training images: CIFAR-10 as torchvision unpacks it, an .npz, a .zip or a folder of class folders",
    "test": "test images (default: the split `test` of --data)",
    "also_test": "further test sets for the final figures, separated by commas",
    "bits": "weights/activations of each network that starts from the full-precision one",
    "epochs": "of the full-precision network",
    "fine_epochs": "of each network that starts from it",
    "lr": "first learning rate; it falls in a straight line to 0, step by step",
    "fine_lr": "the same for the networks that start from the first one",
    "keep_clips": "start from every clip scalar as it is: the published rule makes 1 of those not between 0.1 and 10",
    "signs": "1-bit weights are -1 and +1 instead of the published -1 and 0",
    "images": "per epoch, chosen anew each time (0: all)",
    "base": "channels of the first layer of blocks, a multiple of 4",
    "blocks": "of each layer",
    "features": "inputs of the classifier",
    "curve_every": "measure each epoch on every n-th test image; final figures are on all",
    "threads": "torch threads (0: as torch decides)",
    "save_every": "steps between checkpoints",
    "strict": "an unreadable image is an error",
    "resume": "continue where a killed run stopped",
    "smoke": "everything once, with a tiny network, on a few images made from scikit-learn's digits",
}


def options(argv: list[str] | None) -> Config:
    config = parse(Config(), __doc__ or "", HELP, argv)
    for pair in config.bits:
        widths(pair)
    if config.smoke:
        small: dict[str, Any] = {"base": 16, "blocks": (2, 2, 1), "features": 32, "epochs": 1, "fine_epochs": 1, "batch": 32, "threads": 1}
        config = replace(config, **small, verify_images=4, cpp_images=2)
    return config


def widths(pair: str) -> dict[str, int]:
    """4/4 -> the network's options: so many bits for weights and activations, 8 at both ends; 32/32 -> none."""
    words = pair.split("/")
    if len(words) != 2 or not all(w.isdigit() and 1 <= int(w) <= 32 for w in words):
        raise SystemExit(f"--bits {pair}: write WEIGHTS/ACTIVATIONS, such as 4/4")
    if pair == REAL:
        return {}
    ends = ("first_weight_bits", "first_act_bits", "last_weight_bits", "last_act_bits", "fc_weight_bits")
    return {"weight_bits": int(words[0]), "act_bits": int(words[1])} | dict.fromkeys(ends, 8)


def shares(name: str, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    return {f"top-{k}, {name}": float(right_among(outputs, labels, k).double().mean()) for k in (1, 5)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console, seconds = options(argv), Console(), Seconds()
    out = Path(config.out)
    console.print(f"{config}\n", highlight=False)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)

    with seconds("data"):
        if config.smoke:
            train, test, others = enlarged_digits("train", 96), enlarged_digits("test", 40), []
        else:
            train = read_images(config.data, "train", config.strict)
            test = read_images(config.test or config.data, "test", config.strict)
            others = [read_images(path, "test", config.strict) for path in config.also_test]
    unreadable = train.unreadable | test.unreadable
    for path, reason in unreadable.items():
        console.print(f"unreadable, left out: {path} ({reason})", style="yellow", highlight=False)
    console.print(f"{train.name}: {len(train):,} images; {test.name}: {len(test):,} images", highlight=False)

    # Train: full precision, then each pair of bits from its best weights.
    shape: dict[str, Any] = {"base": config.base, "blocks": config.blocks, "features": config.features, "expansion": config.expansion}
    shape["num_classes"] = train.classes
    also = {"top-5": right_among}
    curves: dict[str, list[Epoch]] = {}
    models: dict[str, torch.nn.Module] = {}
    runs = {"full precision": REAL} | {f"from it, {pair}": pair for pair in config.bits}
    folders = {name: out / (f"w{pair.replace('/', 'a')}" if curve else "full") for curve, (name, pair) in enumerate(runs.items())}
    if not config.resume:
        for folder in folders.values():
            (folder / "last.safetensors").unlink(missing_ok=True)
    for name, pair in runs.items():
        first, folder = not curves, folders[name]
        model = zoo.get("diracdeltanet_cifar10", **shape, **widths(pair), signs=config.signs)
        if not first:
            state = models["full precision"].state_dict()
            zoo.load(model, state if config.keep_clips else inherit(state))
        settings = Fit(
            epochs=config.epochs if first else config.fine_epochs,
            batch=config.batch,
            lr=config.lr if first else config.fine_lr,
            weight_decay=config.weight_decay,
            optimizer=SGD(momentum=0.9),
            schedule=EachStep(Linear(over=-1)),
            shift=4,
            flip=True,
            seed=config.seed + len(curves),
            images=config.images,
            channels_last=True,
            save_every=config.save_every,
            tensorboard=True,
        )
        with seconds(name):
            curves[name] = fit(model, train, test[:: config.curve_every], settings, title=name, out=folder, resume=config.resume, also=also)
        zoo.load(model, folder / "best.safetensors")
        models[name] = model
    if not is_main_process():
        return {}

    # Measure, convert, verify, export: a report for each network that has integers, then one for all networks.
    right: dict[str, Tensor] = {}  # on the first test set, whether the label is among the first five
    scores: dict[str, float] = {}
    networks: dict[str, Any] = {}  # their reports
    facts = {"images": {"train": len(train), "test": len(test)}, "unreadable": unreadable}
    for name, model in models.items():
        own: dict[str, float] = {}
        spent = Seconds({name: seconds.spent[name]})
        with spent("measure"):
            for data in (test, *others):
                outputs = predictions(model, data)
                own |= shares(f"model, {data.name}", outputs, data.labels)
                right.setdefault(name, right_among(outputs, data.labels))
        if "32" not in runs[name].split("/"):
            folder, title, curve = folders[name], f"diracdeltanet_cifar10 {runs[name]}", {name: curves[name]}
            codes = mixed(test).codes
            done = deploy(model, codes, config.part, folder, config.verify_images, config.cpp_images, spent, PIXELS)
            with spent("run integers"):
                for data in (test, *others):
                    own |= shares(f"integers, {data.name}", integer_predictions(done.graph, data), data.labels)
            networks[name] = finish(title, folder, config, own, curve, spent, done, facts=facts)
        scores |= {f"{name}: {what}": value for what, value in own.items()}
    return compare(config, out, scores, right, curves, seconds, facts | {"networks": networks})


def mixed(test: Images) -> Images:
    """In a fixed random order, so that the first few are of all classes."""
    return test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]


def compare(
    config: Config,
    out: Path,
    scores: dict[str, float],
    right: dict[str, Tensor],
    curves: dict[str, list[Epoch]],
    seconds: Seconds,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """How many points of top-5 each network loses against the control, image by image, with the standard error of that difference."""
    control = right.get(f"from it, {REAL}", right["full precision"]).double()
    lost = {}
    for name, hits in right.items():
        difference = control - hits.double()
        lost[name] = {"points": 100 * float(difference.mean()), "error": 100 * float(difference.std() / len(difference) ** 0.5)}
    shown = {f"top-5 points lost, {name}": f"{d['points']:.2f} +- {d['error']:.2f}" for name, d in lost.items()}
    return finish("diracdeltanet_cifar10", out, config, scores, curves, seconds, facts=facts | {"top5_lost": lost}, shown=shown)


if __name__ == "__main__":
    main()
