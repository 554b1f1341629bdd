"""DeepBurning-MixQ on DAC-SDC object detection: search of bit widths, training with the bits found, test, export and integer simulation.

    python recipes/mixq_dacsdc.py search --cd 1e-5 --name mix_ultranet_cd1e5
    python recipes/mixq_dacsdc.py search --cd 1e-5 --name mix_skynet_cd1e5 --model SkyNet_MixQ
    python recipes/mixq_dacsdc.py train --bitw 444444444 --bita 844444444 --name ultranet_BJTU
    python recipes/mixq_dacsdc.py train --mixm mix_ultranet_cd1e5 --name ultranet_anypacking
    python recipes/mixq_dacsdc.py test -w ultranet_BJTU --save-pic
    python recipes/mixq_dacsdc.py export -w ultranet_BJTU
    python recipes/mixq_dacsdc.py simulate -w ultranet_BJTU
    python recipes/mixq_dacsdc.py make --images cifar10_train.zip --data made/train --count 2000
    python recipes/mixq_dacsdc.py all --smoke

`train` ends in conversion, verification, HLS project, C++ and a report; `all` does one after the other; `make` writes a small data set in
the official layout. Each has --help. Flags are those of the published scripts (docs/mixq.md has the table), hyperparameters too: they are
the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.training import SGD, Adam, Cosine, Fit, Group, Images, Ramp, fit, is_main_process, predictions, read_images
from quantlib.training.deploy import Seconds, deploy, finish
from quantlib.training.detection import (
    BoxImages,
    BoxOverlap,
    DetectionLoss,
    best_boxes,
    box_images,
    draw_boxes,
    in_pixels,
    make_box_images,
    overlap,
    save_pictures,
    save_png,
    sheet,
)
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
from quantlib.training.optim import Optimizer
from quantlib.training.report import figure_file, write_json

FLOAT, BYPASS = {"quantizer": "float"}, "UltraNet_Bypass"
CLASSES = {
    "UltraNet_FixQ": Known("ultranet_dacsdc"),
    "UltraNetFloat": Known("ultranet_dacsdc", FLOAT),
    "UltraNet_dorefa": Known("ultranet_dacsdc", {"quantizer": "dorefa"}),
    "UltraNet_ismart": Known("ultranet_dacsdc", {"quantizer": "dorefa", "setting": "ismart"}),
    BYPASS: Known("ultranet_bypass_dacsdc"),
    "UltraNetBypassFloat": Known("ultranet_bypass_dacsdc", FLOAT),
    "SkyNet": Known("skynet_dacsdc"),
    "SkyNetFloat": Known("skynet_dacsdc", FLOAT),
    "SkyNetBypassFloat": Known("skynet_dacsdc", FLOAT | {"bypass": True}),
    "SkyNetk5": Known("skynetk5_dacsdc"),
    "SkyNetk5Float": Known("skynetk5_dacsdc", FLOAT),
}
CLASSES |= {kind.network: kind for kind in reversed(CLASSES.values()) if not kind.options}
MOMENTUM, DECAY = 0.937, 4.84e-4


@dataclass(frozen=True)
class Common:
    data: str = "dac_sdc/train"
    test: str = "dac_sdc/test"
    model: str = "UltraNet_FixQ"
    width: float = 1.0
    bypass: bool = False
    out: str = "build/mixq_dacsdc"
    name: str = "ultranet"
    img_size: int = 320
    images: int = 0
    cache_images: bool = False
    curve_every: int = 1
    save_every: int = 200
    workers: int = 0
    seed: int = 0
    threads: int = 0
    strict: bool = False
    resume: bool = False
    smoke: bool = False


@dataclass(frozen=True)
class Learn(Common):
    epochs: int = 200
    batch_size: int = 64
    lr: float = 0.01
    adam: bool = False
    decay_weights: bool = False


@dataclass(frozen=True)
class Search(Learn):
    name: str = "mix_ultranet"
    epochs: int = 35
    lra: float = 0.01
    cd: float = 1e-5
    cdt: float = 0.0
    bram_decay: float = 0.0
    no_share: bool = False


@dataclass(frozen=True)
class Train(Learn):
    bitw: str = ""
    bita: str = ""
    mixm: str = ""
    weights: str = ""
    part: str = "xczu3eg"
    verify_images: int = 4
    cpp_images: int = 2


@dataclass(frozen=True)
class Use(Common):
    weights: str = ""
    bitw: str = ""
    bita: str = ""
    batch_size: int = 16
    batches: int = 0
    verbose: bool = False
    save_pic: bool = False
    config: str = ""
    part: str = "xczu3eg"
    verify_images: int = 4
    cpp_images: int = 2


@dataclass(frozen=True)
class Make:
    data: str = "made/train"
    images: str = ""
    split: str = "train"
    count: int = 2000
    seed: int = 0


HELP = {
    "data": "training pictures, <class folder>/<name>.jpg with <name>.xml beside it; make: where they are written",
    "test": "test pictures in the same layout (published scripts: --datapath)",
    "model": "published class name or name in the zoo; a name that ends in Float is the form without quantizers",
    "bypass": "the same as --model UltraNet_Bypass",
    "width": "factor on the channels, for small trials",
    "out": "folder of all runs; a run's files are below its name",
    "name": "of the run",
    "img_size": "width that pictures are resized to; they are half as high",
    "images": "per epoch, chosen anew each time (0: all); make: small images to paste (none: shapes)",
    "cache_images": "keep the resized pictures in memory (154 kB each)",
    "curve_every": "measure each epoch on every n-th test picture; final figures are on all",
    "save_every": "steps between checkpoints",
    "workers": "processes that read pictures",
    "threads": "torch threads (0: as torch decides)",
    "strict": "an unreadable file is an error",
    "resume": "continue where a killed run stopped",
    "smoke": "the same on a few small pictures made on the spot, one epoch",
    "lr": "first learning rate, biases twice that; half a cosine takes it to a thousandth (real weights and DoReFa: a hundredth)",
    "adam": "Adam for weights and alphas",
    "decay_weights": "weight decay on the weights of convolutions (published: by a wrong name it is on none)",
    "lra": "learning rate of the alphas; a cosine takes it to a tenth",
    "cd": "complexity decay: weight of the packing-aware price",
    "cdt": "weight of the price in bit operations",
    "bram_decay": "weight of the price in block RAM",
    "no_share": "weights of their own for each bit width",
    "bitw": "bits of each layer's weights, one digit each",
    "bita": "bits of each layer's input, one digit each",
    "mixm": "take both from this search: its name, or a checkpoint",
    "weights": "name of a run, or a file: what to start from (train), test or export",
    "batches": "test so many batches (0: all)",
    "verbose": "a line for each picture",
    "save_pic": "draw the found box (red) and the true one (green) into every picture",
    "config": "parallelism file, a header and one row `simd pe` (SkyNet: `simd pe actp pep`) for each convolution",
    "split": "of the images, where they have splits",
    "count": "pictures",
}
SHORT = {"bram_decay": "--bd", "no_share": "--noshare"}
SHORT_USE = {"model": "-m", "weights": "-w", "batch_size": "-bs", "batches": "-nb", "verbose": "-v", "config": "-c", "bypass": "-bp"}
SHORT_USE["test"] = "--datapath"


def prepare(config: Common) -> Known:
    Console().print(f"{config}\n", highlight=False)
    torch.manual_seed(config.seed)
    if config.threads or config.smoke:
        torch.set_num_threads(config.threads or 1)
    return known(CLASSES, BYPASS if config.bypass else config.model, config.width)


def size_of(config: Common) -> tuple[int, int]:
    return (32, 64) if config.smoke else (config.img_size // 2, config.img_size)


def pictures(config: Common, split: str) -> BoxImages:
    root = Path(config.data if split == "train" else config.test)
    if config.smoke:
        count, seed = (48, 0) if split == "train" else (12, 1)
        root = make_box_images(Path(config.out) / "made" / split, count, size=(72, 128), seed=seed)
    data = box_images(root, config.strict, size=size_of(config))
    if config.cache_images or config.smoke:
        data = data.in_memory()
    for path, reason in data.unreadable.items():
        Console().print(f"unreadable, left out: {path} ({reason})", style="yellow", highlight=False)
    return data


def settings(config: Learn, pictures: int, real: bool = False, alphas: tuple[Group, ...] = ()) -> Fit:
    """The published ones: SGD with Nesterov's momentum 0.937, half a cosine, and biases of their own.

    Biases learn twice as fast. For n = max(round(30 / steps of an epoch), 3) epochs and the one after, their rate falls in a straight line
    from ten times --lr to twice, and their momentum rises from 0.9. Weight decay: on nothing, or on the weights of convolutions.
    """
    batch = 8 if config.smoke else config.batch_size
    falling = Cosine(0.01 if real else 0.001)
    steps = -(-(config.images or pictures) // batch)
    n = max(round(30 / steps), 3)
    momentum = Ramp(n, 0.9 / MOMENTUM)
    bias = Group(r"\.bias$", lr=2 * config.lr, schedule=Ramp(n, 5.0, falling), momentum_schedule=momentum)
    convs = (Group(r"conv\d+\.(branches\.\d+\.)?weight$", weight_decay=DECAY),) if config.decay_weights else ()
    optimizer: Optimizer = Adam() if config.adam else SGD(MOMENTUM, nesterov=True)
    return Fit(
        epochs=1 if config.smoke else config.epochs,
        batch=batch,
        lr=config.lr,
        optimizer=optimizer,
        schedule=falling,
        groups=(*alphas, bias, *convs),
        flip=True,
        seed=config.seed,
        images=config.images,
        channels_last=True,
        save_every=config.save_every,
        workers=config.workers,
        tensorboard=True,
    )


def search(argv: list[str] | None = None) -> dict[str, Any]:
    """Search: one step for weights and alphas together, from the same loss of boxes and prices."""
    config, seconds = parse(Search(), search.__doc__ or "", HELP, argv, SHORT), Seconds()
    kind, folder = prepare(config), Path(config.out) / config.name
    training, testing = pictures(config, "train"), pictures(config, "test")
    net = ql.search.supernet(build(kind), input_shape=(3, *size_of(config)), share=not config.no_share)
    sgd = {} if config.adam else {"momentum": MOMENTUM, "nesterov": False}
    alphas = Group(ALPHAS, lr=config.lra, weight_decay=DECAY, schedule=Cosine(0.1), **sgd)  # type: ignore[arg-type]
    plan = settings(config, len(training), alphas=(alphas,))
    scale = plan.batch / 64
    loss = Priced(DetectionLoss(scale), prices(net, config.cd, config.cdt, config.bram_decay), gain=4 * scale)
    with seconds("search"):
        rows = fit(
            net, training, testing[:: config.curve_every], plan, loss, "search", folder, config.resume, BoxOverlap(size_of(config)),
            partial(found_so_far, net), each_epoch=partial(draw_history, folder),
        )  # fmt: skip
    return end_of_search(config, kind.network, rows, plan.epochs, seconds, "IoU") if is_main_process() else {}


def train(argv: list[str] | None = None) -> dict[str, Any]:
    """Training with fixed bits, or with none; then conversion, verification, HLS project, C++ and report with pictures."""
    config, seconds = parse(Train(), train.__doc__ or "", HELP, argv), Seconds()
    kind, out, size = prepare(config), Path(config.out), size_of(config)
    folder = out / config.name
    bits = stated_bits(weights_file(out, config.mixm, "last")) if config.mixm else (config.bitw, config.bita)
    model = build(kind, *bits)
    if config.weights:
        zoo.load(model, weights_file(out, config.weights))
    training, testing = pictures(config, "train"), pictures(config, "test")
    priced = price_of(kind, model, (3, *size), ())
    plan = settings(config, len(training), real=kind.options.get("quantizer", "mixq") != "mixq")
    loss = DetectionLoss(plan.batch / 64)
    with seconds("training"):
        rows = fit(
            model, training, testing[:: config.curve_every], plan, loss, "training", folder, config.resume, BoxOverlap(size),
            lambda: priced,
        )  # fmt: skip
    if not is_main_process():
        return {}
    add_training(config, rows, plan.epochs, priced)
    zoo.load(model, folder / "best.safetensors")
    with seconds("measure"):
        scores = {f"model, {testing.name}": float(overlaps(model, testing).mean())}
    few, true = testing.sample(16)
    drawn = drawings(few, true, predictions(model, few), size)
    save_png(folder / "boxes.png", drawn)
    done = None
    if not kind.real:
        done = deploy(model, few.codes, config.part, folder, config.verify_images, config.cpp_images, seconds)
        with seconds("run integers"):
            scores[f"integers, {testing.name}"] = float(overlaps(partial(integers, done.graph), testing).mean())
    shown = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in priced.items()}
    page = [("Boxes", figure_file(folder / "boxes.png", "Test pictures: found box red, true box green."))]
    title = f"{kind.network}: {config.name}"
    return finish(title, folder, config, scores, {"training": rows}, seconds, done, None, priced, shown, "IoU", page)


def integers(graph: Any, x: Tensor) -> Tensor:
    return ql.run(graph, (x * 256).round().to(torch.uint8))


def overlaps(model: Any, data: BoxImages, batch: int = 16) -> Tensor:
    """IoU of every picture that can be read. model: a module, or a function of images (N, 3, H, W)."""
    score, found = BoxOverlap(data.size), []
    if isinstance(model, nn.Module):
        model.eval()
    with torch.no_grad():
        for x, rows in data.read(torch.arange(len(data)).split(batch), None, (0, 0)):
            found.append(score(model(x), rows))
    return torch.cat(found)


def drawings(few: Images, true: Tensor, heads: Tensor, size: tuple[int, int]) -> Any:
    """A sheet of pictures with found and true boxes."""
    found, boxes = best_boxes(heads, size)[:, :4], in_pixels(true, size)
    pixels = few.codes.flip(1).permute(0, 2, 3, 1).numpy()
    marks = [f"IoU {value:.2f}" for value in overlap(found, boxes).tolist()]
    return sheet([draw_boxes(*parts) for parts in zip(pixels, boxes, found, marks)])


def test(argv: list[str] | None = None) -> dict[str, Any]:
    """Mean overlap (IoU) of the found with the true box on the test pictures; --save-pic draws them."""
    config = parse(Use(), test.__doc__ or "", HELP, argv, SHORT_USE)
    model, path = trained(config, prepare(config))
    data, folder = pictures(config, "test")[: config.batches * config.batch_size or None], run_folder(config) / "pictures"
    scores: list[float] = []
    files: list[Path] = []
    for start in range(0, len(data), config.batch_size):
        part = data[start : start + config.batch_size].in_memory()
        few, true = part.sample(len(part))
        found, boxes = best_boxes(predictions(model, few), part.size)[:, :4], in_pixels(true, part.size)
        scores += overlap(found, boxes).tolist()
        if config.save_pic:
            files += save_pictures(folder, [part.pixels(n) for n in range(len(part))], boxes, found, part.paths)
        if config.verbose:
            for name, score in zip(part.paths, scores[-len(part) :], strict=True):
                print(f"{name}: {score:.3f}")
    result: dict[str, Any] = {
        "weights": str(path),
        "images": len(scores),
        "IoU": sum(scores) / len(scores),
        "pictures": [str(f) for f in files],
    }
    print(f"{path}: IoU {100 * result['IoU']:.2f} % on {len(scores):,} pictures")
    if files:
        print(f"{len(files)} pictures in {folder}")
    return result


def export(argv: list[str] | None = None) -> dict[str, Any]:
    """The published generator's files, and our own conversion, verification and HLS project with its C++ run beside the integers."""
    config, seconds = parse(Use(), export.__doc__ or "", HELP, argv, SHORT_USE), Seconds()
    kind = prepare(config)
    model, path = trained(config, kind)
    folder = run_folder(config) / "export"
    files = upstream(model, size_of(config), folder / "published", config.config, path.stem)
    few, _ = pictures(config, "test").sample(max(config.verify_images, config.cpp_images))
    done = deploy(model, few.codes, config.part, folder, config.verify_images, config.cpp_images, seconds)
    with seconds("compare"):
        facts, sections = compared(model, few.codes[: config.verify_images])
    shown = {"published format": ", ".join(str(file) for file in files)}
    title = f"{kind.network}: export of {path}"
    return finish(title, folder, config, {}, {}, seconds, done, facts=facts, shown=shown, measure="IoU", sections=sections)


def simulation(argv: list[str] | None = None) -> dict[str, Any]:
    """Both integer networks, the published exporter's and ours, on test pictures: IoU, and how far each is from the trained model."""
    config = parse(Use(batch_size=4, batches=4), simulation.__doc__ or "", HELP, argv, SHORT_USE)
    model, path = trained(config, prepare(config))
    few, true = pictures(config, "test").sample(config.batches * config.batch_size)
    facts: dict[str, Any] = {"weights": str(path), "images": len(few)}
    for mode in ("upstream", "corrected") if getattr(model, "branch", None) else ("upstream",):
        *outputs, where = two_simulations(model, few.codes, mode, config.batch_size)
        boxes = in_pixels(true, size_of(config))
        names = (f"published integers ({mode})", "our integers", "model")
        scores = {name: float(overlap(best_boxes(y, size_of(config))[:, :4], boxes).mean()) for name, y in zip(names, outputs)}
        for name, value in scores.items():
            print(f"{name}: IoU {100 * value:.2f} % on {len(few)} pictures")
        print(where)
        facts[mode] = {"IoU": scores, "differences": where.splitlines()}
    write_json(run_folder(config) / "simulation.json", facts)
    return facts


def make(argv: list[str] | None = None) -> dict[str, Any]:
    """A small data set in the official layout: images pasted on blurred ones, 640x360; without --images shapes on clouds."""
    config = parse(Make(), make.__doc__ or "", HELP, argv)
    source = read_images(config.images, config.split) if config.images else None
    root = make_box_images(config.data, config.count, source, seed=config.seed)
    print(f"{config.count:,} pictures in {root}")
    return {"data": str(root), "count": config.count}


def everything(argv: list[str] | None = None) -> dict[str, Any]:
    """search, train with the bits found, test, export and simulate, each with the flags given and its own defaults."""
    config = parse(Common(), everything.__doc__ or "", HELP, argv)
    words = [*(argv or ()), f"--name={config.name}"]
    found = search([*words, f"--name=mix_{config.name}"])
    steps = {"train": [f"--mixm=mix_{config.name}"], "test": ["--save-pic"], "export": [], "simulate": []}
    return {"search": found} | {step: COMMANDS[step]([*words, *more]) for step, more in steps.items()}


COMMANDS = {
    "search": search, "train": train, "test": test, "export": export, "simulate": simulation, "make": make, "all": everything,
}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(COMMANDS, argv, __doc__ or "")  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
