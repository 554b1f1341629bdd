"""FracBNN on CIFAR-10: training in steps, integers, verification, HLS project, C++ and report in one command.

Step 1 trains real-valued weights on quantized activations, step 2 binary weights that start from step 1's best (FracBNN, FPGA 2021, and the
authors' published hyperparameters, which are the defaults). --steps 1,2,3 leaves the gates open in steps 1 and 2, so that every activation
has two bits, and trains gated convolutions in step 3 from step 2's weights, as the paper describes; --steps 2 skips real-valued weights.
The steps are one model with switches.

    python recipes/fracbnn_cifar10.py --data cifar-10-batches-py
    python recipes/fracbnn_cifar10.py --data train.zip --test test.zip --epochs 20 --images 10000 --gtarget 3 --resume
    accelerate launch recipes/fracbnn_cifar10.py --data cifar10.zip
    python recipes/fracbnn_cifar10.py --smoke
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quantlib as ql
import zoo
from quantlib.training import Epoch, Fit, accuracy, fit, is_main_process, predictions, read_images
from quantlib.training.deploy import Seconds, deploy, finish, integer_accuracy
from quantlib.training.flags import parse
from quantlib.training.optim import Linear, Schedule, Steps
from quantlib.training.smoke import enlarged_digits
from quantlib.training.steps import density, use_gating, use_real_weights

PUBLISHED = {"LUT": 51_444, "DSP": 126, "BRAM18": 212, "frames/s": 2806.9, "MHz": 250}  # paper, accelerator on Ultra96-V2
WEIGHT_DECAY = {1: 1e-5, 2: 0.0, 3: 0.0}
SCHEDULE: dict[int, Schedule] = {
    1: Linear(),
    2: Steps((0.4, 0.6, 0.8)),
    3: Steps((0.4, 0.6, 0.8)),
}  # of 250 epochs: times 0.1 at 100, 150, 200
TITLE = {1: "step 1, real weights", 2: "step 2, binary weights", 3: "step 3, gated"}


@dataclass(frozen=True)
class Config:
    data: str = "cifar-10-batches-py"
    test: str = ""
    also_test: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 2)
    epochs: int = 250
    batch: int = 128
    lr: float = 1e-3
    gtarget: float = 0.0
    images: int = 0
    curve_every: int = 1
    fixed_point: str = "12,6"
    part: str = "xczu3eg"
    verify_images: int = 64
    cpp_images: int = 64
    seed: int = 0
    threads: int = 0
    save_every: int = 200
    precision: str = "no"
    compile: bool = False
    strict: bool = False
    resume: bool = False
    smoke: bool = False
    out: str = "build/fracbnn_cifar10"


HELP = {
    "data": "training images: CIFAR-10 as torchvision unpacks it, an .npz, a .zip or a folder of class folders",
    "test": "test images (default: the split `test` of --data)",
    "also_test": "further test sets for the final figures, separated by commas",
    "steps": "1,2 as published; 2: binary from the start; 1,2,3: gates open until step 3",
    "epochs": "of each step; one number, the schedules keep their shape",
    "gtarget": "where the gating thresholds are pulled to (published script: -g)",
    "images": "per epoch, chosen anew each time (0: all)",
    "curve_every": "measure each epoch on every n-th test image; final figures are on all",
    "fixed_point": "grid of the integer network: BITS,FRACTION, or authors (the published accelerator's datapath)",
    "threads": "torch threads (0: as torch decides)",
    "save_every": "steps between checkpoints",
    "precision": "no, bf16 or fp16",
    "compile": "torch.compile (slower on CPU)",
    "strict": "an unreadable image is an error",
    "resume": "continue where a killed run stopped",
    "smoke": "everything once, on a few images made from scikit-learn's digits",
}


def options(argv: list[str] | None) -> Config:
    config = parse(Config(), __doc__ or "", HELP, argv, short={"gtarget": "-g"})
    if config.steps not in ((1, 2), (2,), (1, 2, 3), (2, 3)):
        raise SystemExit(f"--steps {','.join(map(str, config.steps))}: give 1,2 or 2 or 1,2,3 or 2,3")
    if config.smoke:
        config = replace(config, epochs=1, batch=32, verify_images=4, cpp_images=2, threads=1)
    return config


def grid(text: str) -> Any:
    """12,6 -> FixedPoint(12, 6); authors -> "authors"."""
    if text == "authors":
        return text
    bits, fraction = text.split(",")
    return ql.FixedPoint(int(bits), int(fraction))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console, seconds = options(argv), Console(), Seconds()
    out = Path(config.out)
    console.print(f"{config}\n", highlight=False)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)

    with seconds("data"):
        if config.smoke:
            train, test, others = enlarged_digits("train", 96), enlarged_digits("test", 40), {}
        else:
            train = read_images(config.data, "train", config.strict)
            test = read_images(config.test or config.data, "test", config.strict)
            others = {data.name: data for data in (read_images(path, "test", config.strict) for path in config.also_test)}
    unreadable = train.unreadable | test.unreadable
    for path, reason in unreadable.items():
        console.print(f"unreadable, left out: {path} ({reason})", style="yellow", highlight=False)
    console.print(f"{train.name}: {len(train):,} images; {test.name}: {len(test):,} images", highlight=False)

    # Train: one model, switched from step to step; each step starts from the best weights of the one before.
    model = zoo.get("fracbnn_cifar10")
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
            schedule=SCHEDULE[step],
            shift=4,
            flip=True,
            gate_target=config.gtarget,
            seed=config.seed + step,
            images=config.images,
            drop_last=True,
            precision=config.precision,  # type: ignore[arg-type]
            compile=config.compile,
            channels_last=True,
            save_every=config.save_every,
            tensorboard=True,
        )
        folder = out / f"step{step}"
        with seconds(TITLE[step]):
            curves[TITLE[step]] = fit(
                model, train, test[:: config.curve_every], settings, title=TITLE[step], out=folder, resume=config.resume
            )
        zoo.load(model, folder / "best.safetensors")
    use_real_weights(model, False)
    if not is_main_process():
        return {}

    # Measure, convert, verify, export.
    scores: dict[str, float] = {}
    integer = zoo.get("fracbnn_cifar10", fixed_point=grid(config.fixed_point))
    zoo.load(integer, model.state_dict())
    with seconds("measure"):
        for name, images in {test.name: test, **others}.items():
            scores[f"float, {name}"] = accuracy(predictions(model, images), images.labels)
    mixed = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    predictions(model, mixed[:512], 512)
    bits = 1 + density(model)
    done = deploy(integer, mixed.codes, config.part, out, config.verify_images, config.cpp_images, seconds)
    with seconds("run integers"):
        for name, images in {test.name: test, **others}.items():
            scores[f"integers {config.fixed_point}, {name}"] = integer_accuracy(done.graph, images)

    facts = {"activation_bits": bits, "images": {"train": len(train), "test": len(test)}, "unreadable": unreadable}
    shown = {f"average activation bits on {min(512, len(test))} test images": f"{bits:.3f}", "weights": str(folder / "best.safetensors")}
    return finish("fracbnn_cifar10", out, config, scores, curves, seconds, done, PUBLISHED, facts, shown)


if __name__ == "__main__":
    main()
