"""DeepBurning-MixQ on CIFAR-10: search of bit widths, training with the bits found, test, export and integer simulation.

    python recipes/mixq_cifar10.py search --cd 3e-5 --name mix_vggtiny_cifar_cd3e5
    python recipes/mixq_cifar10.py train --bitw 822222 --bita 833363 --name vggtiny_cifar_cd3e5
    python recipes/mixq_cifar10.py train --mixm mix_vggtiny_cifar_cd3e5 --name vggtiny_cifar_found
    python recipes/mixq_cifar10.py test -w vggtiny_cifar_cd3e5
    python recipes/mixq_cifar10.py export -w vggtiny_cifar_cd3e5
    python recipes/mixq_cifar10.py simulate -w vggtiny_cifar_cd3e5
    python recipes/mixq_cifar10.py all --smoke

`train` ends in conversion, verification, HLS project, C++ and a report; `all` does one after the other. Each has --help. Flags are those of
the published scripts (docs/mixq.md has the table), hyperparameters too: they are the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quantlib as ql
import zoo
from quantlib.training import (
    SGD,
    Cosine,
    CrossEntropy,
    Fit,
    Group,
    Images,
    accuracy,
    fit,
    is_main_process,
    predictions,
    read_images,
    right_answers,
)
from quantlib.training.deploy import Seconds, deploy, finish, integer_accuracy
from quantlib.training.flags import parse
from quantlib.training.mixq import (
    ALPHAS,
    Known,
    Priced,
    add_training,
    build,
    compared,
    draw_history,
    end_of_search,
    found_so_far,
    known,
    price_of,
    prices,
    run,
    run_folder,
    stated_bits,
    trained,
    two_simulations,
    upstream,
    weights_file,
)
from quantlib.training.report import write_json
from quantlib.training.smoke import enlarged_digits

CLASSES = {
    "VGGtiny": Known("vggtiny_cifar10"),
    "VGG_tiny": Known("vggtiny_cifar10"),
    "vggtiny_cifar10": Known("vggtiny_cifar10"),
    "VGGtinyFloat": Known("vggtiny_cifar10", {"quantizer": "float"}),
}
SHAPE, FIXED = (3, 32, 32), ("linear",)


@dataclass(frozen=True)
class Common:
    data: str = "cifar-10-batches-py"
    test: str = ""
    model: str = "VGGtiny"
    width: float = 1.0
    out: str = "build/mixq_cifar10"
    name: str = "vggtiny"
    images: int = 0
    curve_every: int = 1
    save_every: int = 200
    seed: int = 0
    threads: int = 0
    strict: bool = False
    resume: bool = False
    smoke: bool = False


@dataclass(frozen=True)
class Search(Common):
    name: str = "mix_vggtiny"
    epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    lra: float = 0.1
    cd: float = 3e-5
    cdt: float = 0.0
    bram_decay: float = 0.0
    no_share: bool = False


@dataclass(frozen=True)
class Train(Common):
    epochs: int = 0
    batch_size: int = 128
    lr: float = 0.03
    bitw: str = ""
    bita: str = ""
    mixm: str = ""
    weights: str = ""
    part: str = "xczu3eg"
    verify_images: int = 64
    cpp_images: int = 16


@dataclass(frozen=True)
class Use(Common):
    weights: str = ""
    bitw: str = ""
    bita: str = ""
    batch_size: int = 64
    batches: int = 0
    verbose: bool = False
    config: str = ""
    part: str = "xczu3eg"
    verify_images: int = 64
    cpp_images: int = 16


HELP = {
    "data": "training images: CIFAR-10 as torchvision unpacks it, an .npz, a .zip or a folder of class folders",
    "test": "test images (default: the split `test` of --data)",
    "model": "published class name or name in the zoo; a name that ends in Float is the form without quantizers",
    "width": "factor on the channels, for small trials",
    "out": "folder of all runs; a run's files are below its name",
    "name": "of the run",
    "images": "per epoch, chosen anew each time (0: all)",
    "curve_every": "measure each epoch on every n-th test image; final figures are on all",
    "save_every": "steps between checkpoints",
    "threads": "torch threads (0: as torch decides)",
    "strict": "an unreadable image is an error",
    "resume": "continue where a killed run stopped",
    "smoke": "the same on a few images made from scikit-learn's digits, one epoch",
    "epochs": "0: 200, or 40 in the form without quantizers",
    "lr": "first learning rate; a cosine takes it to a hundredth",
    "lra": "learning rate of the alphas; a cosine takes it to 0.3 --lr",
    "cd": "complexity decay: weight of the packing-aware price",
    "cdt": "weight of the price in bit operations",
    "bram_decay": "weight of the price in block RAM",
    "no_share": "weights of their own for each bit width",
    "bitw": "bits of each layer's weights, one digit each",
    "bita": "bits of each layer's input, one digit each",
    "mixm": "take both from this search: its name, or a checkpoint",
    "weights": "name of a run, or a file: what to start from (train), test or export",
    "batches": "test so many batches (0: all)",
    "verbose": "a line for each batch or layer",
    "config": "parallelism file, a header and one row `simd pe` for each convolution",
}
SHORT = {"bram_decay": "--bd", "no_share": "--noshare"}
SHORT_USE = {"model": "-m", "weights": "-w", "batch_size": "-bs", "batches": "-nb", "verbose": "-v", "config": "-c"}


def prepare(config: Common) -> Known:
    Console().print(f"{config}\n", highlight=False)
    torch.manual_seed(config.seed)
    if config.threads or config.smoke:
        torch.set_num_threads(config.threads or 1)
    return known(CLASSES, config.model, config.width)


def images(config: Common, split: str) -> Images:
    if config.smoke:
        data = enlarged_digits(split, 96 if split == "train" else 40)
    else:
        data = read_images((split == "test" and config.test) or config.data, split, config.strict)
    for path, reason in data.unreadable.items():
        Console().print(f"unreadable, left out: {path} ({reason})", style="yellow", highlight=False)
    return replace(data, levels=256)


def mixed(data: Images, count: int) -> Images:
    """So many of the images (0: all) in a fixed random order: files are sorted by class."""
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: count or None]]


def settings(config: Search | Train, epochs: int, groups: tuple[Group, ...] = ()) -> Fit:
    """SGD with momentum 0.9, weight decay 5e-4 on every parameter, half a cosine to a hundredth (the published settings)."""
    return Fit(
        epochs=1 if config.smoke else epochs,
        batch=32 if config.smoke else config.batch_size,
        lr=config.lr,
        weight_decay=5e-4,
        optimizer=SGD(0.9),
        schedule=Cosine(0.01),
        groups=groups,
        shift=4,
        flip=True,
        seed=config.seed,
        images=config.images,
        channels_last=True,
        save_every=config.save_every,
        tensorboard=True,
    )


def search(argv: list[str] | None = None) -> dict[str, Any]:
    """Search: one step for weights and alphas together, from the same loss of cross entropy and prices."""
    config, seconds = parse(Search(), search.__doc__ or "", HELP | {"epochs": ""}, argv, SHORT), Seconds()
    kind, folder = prepare(config), Path(config.out) / config.name
    training, testing = images(config, "train"), images(config, "test")
    net = ql.search.supernet(build(kind), input_shape=SHAPE, fixed=FIXED, share=not config.no_share)
    alphas = Group(ALPHAS, lr=config.lra, schedule=Cosine(0.3 * config.lr / config.lra))
    loss = Priced(CrossEntropy(), prices(net, config.cd, config.cdt, config.bram_decay))
    plan = settings(config, config.epochs, (alphas,))
    with seconds("search"):
        rows = fit(
            net, training, testing[:: config.curve_every], plan, loss, "search", folder, config.resume,
            note=partial(found_so_far, net), each_epoch=partial(draw_history, folder),
        )  # fmt: skip
    return end_of_search(config, kind.network, rows, plan.epochs, seconds) if is_main_process() else {}


def train(argv: list[str] | None = None) -> dict[str, Any]:
    """Training with fixed bits, or with none; then conversion, verification, HLS project, C++ and report."""
    config, seconds = parse(Train(), train.__doc__ or "", HELP, argv), Seconds()
    kind, out = prepare(config), Path(config.out)
    folder = out / config.name
    bits = stated_bits(weights_file(out, config.mixm, "last")) if config.mixm else (config.bitw, config.bita)
    model = build(kind, *bits)
    if config.weights:
        zoo.load(model, weights_file(out, config.weights))
    training, testing = images(config, "train"), images(config, "test")
    priced = price_of(kind, model, SHAPE, FIXED)
    plan = settings(config, config.epochs or (40 if kind.real else 200))
    with seconds("training"):
        rows = fit(
            model, training, testing[:: config.curve_every], plan, None, "training", folder, config.resume, note=lambda: priced
        )  # fmt: skip
    if not is_main_process():
        return {}
    add_training(config, rows, plan.epochs, priced)
    zoo.load(model, folder / "best.safetensors")
    with seconds("measure"):
        scores = {f"model, {testing.name}": accuracy(predictions(model, testing), testing.labels)}
    done = None
    if not kind.real:
        few = mixed(testing, max(config.verify_images, config.cpp_images))
        done = deploy(model, few.codes, config.part, folder, config.verify_images, config.cpp_images, seconds)
        with seconds("run integers"):
            scores[f"integers, {testing.name}"] = integer_accuracy(done.graph, testing)
    shown = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in priced.items()}
    return finish(f"{kind.network}: {config.name}", folder, config, scores, {"training": rows}, seconds, done, facts=priced, shown=shown)


def test(argv: list[str] | None = None) -> dict[str, Any]:
    """Accuracy of trained weights on the test images, every image counting once (the published script divides by whole batches)."""
    config = parse(Use(), test.__doc__ or "", HELP, argv, SHORT_USE)
    model, path = trained(config, prepare(config))
    data = mixed(images(config, "test"), config.batches * config.batch_size)
    right = torch.cat([right_answers(predictions(model, data[rows]), data.labels[rows]) for rows in batches(config, len(data))])
    if config.verbose:
        for n, part in enumerate(right.split(config.batch_size)):
            print(f"batch {n}: {int(part.sum())} of {len(part)}")
    result = {"weights": str(path), "images": len(data), "accuracy": float(right.double().mean())}
    print(f"{path}: {100 * result['accuracy']:.2f} % of {len(data):,} images")  # type: ignore[operator]
    return result


def batches(config: Use, count: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(count).split(config.batch_size)


def export(argv: list[str] | None = None) -> dict[str, Any]:
    """The published generator's files, and our own conversion, verification and HLS project with its C++ run beside the integers."""
    config, seconds = parse(Use(), export.__doc__ or "", HELP, argv, SHORT_USE), Seconds()
    kind = prepare(config)
    model, path = trained(config, kind)
    folder, data = run_folder(config) / "export", mixed(images(config, "test"), max(config.verify_images, config.cpp_images))
    files = upstream(model, (SHAPE[1], SHAPE[2]), folder / "published", config.config, path.stem)
    done = deploy(model, data.codes, config.part, folder, config.verify_images, config.cpp_images, seconds)
    with seconds("compare"):
        facts, sections = compared(model, data.codes[: config.verify_images])
    shown = {"published format": ", ".join(str(file) for file in files)}
    title = f"{kind.network}: export of {path}"
    return finish(title, folder, config, {}, {}, seconds, done, facts=facts, shown=shown, sections=sections)


def simulation(argv: list[str] | None = None) -> dict[str, Any]:
    """Both integer networks, the published exporter's and ours, on test images: accuracy, and how far each is from the trained model."""
    config = parse(Use(batches=4), simulation.__doc__ or "", HELP, argv, SHORT_USE)
    model, path = trained(config, prepare(config))
    data = mixed(images(config, "test"), config.batches * config.batch_size)
    *outputs, where = two_simulations(model, data.codes, "upstream")
    names = ("published integers", "our integers", "model")
    result: dict[str, Any] = {name: accuracy(output, data.labels) for name, output in zip(names, outputs)}
    for name, value in result.items():
        print(f"{name}: {100 * value:.2f} % of {len(data):,} images")
    print(where)
    facts = {"weights": str(path), "images": len(data), "accuracy": result, "differences": where.splitlines()}
    write_json(run_folder(config) / "simulation.json", facts)
    return facts


def everything(argv: list[str] | None = None) -> dict[str, Any]:
    """search, train with the bits found, test, export and simulate, each with the flags given and its own defaults."""
    config = parse(Common(), everything.__doc__ or "", HELP, argv)
    words = list(argv or ()) + [f"--name={config.name}"]
    found = search([*words, f"--name=mix_{config.name}"])
    steps = {"train": [f"--mixm=mix_{config.name}"], "test": [], "export": [], "simulate": []}
    return {"search": found} | {step: COMMANDS[step]([*words, *more]) for step, more in steps.items()}


COMMANDS = {"search": search, "train": train, "test": test, "export": export, "simulate": simulation, "all": everything}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(COMMANDS, argv, __doc__ or "")  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
