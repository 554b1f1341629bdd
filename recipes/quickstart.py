"""From a network to bit-exact C++ in one go: scaled-down FracBNN on scikit-learn's digits.

Trains fracbnn_digits, converts it to integers, verifies every quantizer's code on the whole test set, estimates it for the part of the
Ultra96-V2, exports an HLS project, compiles that with g++, runs it on the test images, and compares every integer. Writes report.html and
report.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import quantlib as ql
import zoo
from quantlib.training import Epoch, Fit, accuracy, confusion, digits, fit, predictions
from quantlib.training.report import figure, page, table, text, write, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)


@dataclass(frozen=True)
class Config:
    """What a run is. Two runs of one configuration on one machine give the same weights, integers and C++."""

    network: str = "fracbnn_digits"
    epochs: int = 30
    batch: int = 64
    lr: float = 5e-3
    shift: int = 1  # pixels of random displacement while training
    seed: int = 0
    threads: int = 1  # maps of 8x8 pixels are too small to share among cores
    train_images: int = 1437
    test_images: int = 360
    cpp_images: int = 360
    part: str = "xczu3eg"
    out: str = "build/quickstart"


def options(argv: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return Config(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console = options(argv), Console()
    out, seconds = Path(config.out), {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    console.print(f"{config}\n", highlight=False)
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    with stage("data"):
        train, test = digits("train")[: config.train_images], digits("test")[: config.test_images]
        labels, x_cpp = test.labels, test.codes[: config.cpp_images]

    with stage("train"):
        model = zoo.get(config.network)
        settings = Fit(config.epochs, config.batch, config.lr, shift=config.shift, seed=config.seed)
        curve = fit(model, train, test, settings, title=config.network)
        y_float = predictions(model, test)

    with stage("convert"):
        graph = ql.convert(model.eval(), input_shape=tuple(test.codes.shape[1:]))
    with stage("run integers"):
        y_int = ql.run(graph, test.codes)
        integers = ql.run(graph, x_cpp, integers=True)
    with stage("verify"):
        check = ql.verify(model, graph, test.codes)
    with stage("estimate"):
        plan = ql.estimate(graph, part=config.part)
    with stage("export"):
        hls = ql.export(graph, out / "hls", part=config.part, plan=plan)
    with stage("compile C++"):
        hls.csim(x_cpp[:1])
    with stage("run C++"):
        y_cpp = hls.csim(x_cpp)
    cpp_integers = hls.csim(x_cpp, integers=True)
    differing = {edge: int((cpp_integers[edge] != integers[edge]).sum()) for edge in integers}

    result = {
        "config": asdict(config),
        "accuracy": {
            "float": accuracy(y_float, labels),
            "integer": accuracy(y_int, labels),
            "cpp": accuracy(y_cpp, labels[: len(y_cpp)]),
        },
        "images": {"train": len(train), "test": len(test), "cpp": len(x_cpp)},
        "verify": {"ok": check.ok, "mismatches": check.mismatches, "codes": check.codes},
        "cpp_mismatches": differing,
        "plan": plan.to_dict(),
        "seconds": seconds,
        "curve": [asdict(row) for row in curve],
    }
    counts = confusion(y_cpp, labels[: len(y_cpp)], 10)
    write_json(out / "report.json", result | {"confusion": counts.tolist()})
    write(out / "report.html", report(result, curve, counts, graph, plan, check))
    console.print(summary(result, plan, check))
    console.print(f"report: {out / 'report.html'}   HLS project: {out / 'hls'}", highlight=False)
    if not check.ok or any(differing.values()):
        raise SystemExit("integers differ: see the report")
    return result


def summary(result: dict[str, Any], plan: Any, check: Any) -> Table:
    rows = Table(title=f"{result['config']['network']} on {plan.part}", show_header=False)
    scores, images = result["accuracy"], result["images"]
    rows.add_row("accuracy float, integer, C++", ", ".join(f"{100 * scores[k]:.2f} %" for k in ("float", "integer", "cpp")))
    rows.add_row("images tested, in C++", f"{images['test']}, {images['cpp']}")
    rows.add_row("integers differing from the model", f"{check.mismatches:,} of {check.codes:,}")
    rows.add_row("C++ differing from the integers", f"{sum(result['cpp_mismatches'].values()):,}")
    rows.add_row("cycles per image, frames/s", f"{plan.cycles:,}, {plan.fps:,.0f} at {plan.clock_mhz:g} MHz")
    rows.add_row("LUT, FF, DSP, BRAM18", f"{plan.total.lut}, {plan.total.ff}, {plan.total.dsp}, {plan.total.bram18}")
    rows.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
    return rows


def report(result: dict[str, Any], curve: list[Epoch], counts: np.ndarray, graph: Any, plan: Any, check: Any) -> str:
    scores = result["accuracy"]
    nodes = {row.name: row for row in plan.rows}
    layers = [
        (n.name, type(n.op).__name__, str(n.type), nodes[n.name].folding.pe, nodes[n.name].folding.simd, nodes[n.name].cost.cycles,
         nodes[n.name].cost.lut, nodes[n.name].cost.bram18, nodes[n.name].cost.dsp)
        for n in graph
    ]  # fmt: skip
    speed = f"{plan.cycles:,} cycles per image, {plan.fps:,.0f} frames/s, slowest {plan.bottleneck}, latency {plan.latency:,} cycles"
    sections = [
        ("Accuracy", table(("", "share of images"), [(k, f"{100 * v:.2f} %") for k, v in scores.items()])),
        ("Time", table(("stage", "seconds"), [(k, f"{v:.2f}") for k, v in result["seconds"].items()])),
        ("Training", figure(training_plot(curve), "Loss and accuracy per epoch.")),
        ("Layers", table(("node", "op", "integers", "pe", "simd", "cycles", "LUT", "BRAM18", "DSP"), layers) + text(speed)),
        ("Thresholds", thresholds_section(graph)),
        ("Integers against the model", text(str(check))),
        ("Confusion, C++", figure(confusion_plot(counts), "Rows: true digit. Columns: predicted digit.")),
        ("Configuration", table(("option", "value"), result["config"].items())),
    ]
    return page(f"{result['config']['network']}: from training to C++", sections)


def training_plot(curve: list[Epoch]) -> Any:
    plot, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    epochs = [row.number for row in curve]
    left.plot(epochs, [row.loss for row in curve])
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.plot(epochs, [100 * row.train_accuracy for row in curve], label="train")
    right.plot(epochs, [100 * row.test_accuracy for row in curve], label="test")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    right.legend()
    plt.close(plot)
    return plot


def thresholds_section(graph: Any) -> str:
    """Where, on the sums of the first convolution, each channel's two-bit code changes: measured on every sum, as the tables are."""
    quantizer = next(n for n in graph if type(n.op).__name__ == "Threshold")
    chain = [quantizer]
    while type(graph.by_name[chain[0].inputs[0]].op).__name__ == "Requant":
        chain.insert(0, graph.by_name[chain[0].inputs[0]])
    sums = graph.by_name[chain[0].inputs[0]].type
    integers = torch.arange(sums.lo, sums.hi + 1, sums.step)
    codes = integers.reshape(-1, 1, 1, 1).expand(-1, sums.shape[0], 1, 1)
    for node in chain:
        codes = node.op.evaluate(codes)
    codes = codes[:, :, 0, 0]
    where, channel = torch.nonzero(codes[1:] != codes[:-1], as_tuple=True)

    plot, axes = plt.subplots(figsize=(9, 3.2))
    for code in codes[where + 1, channel].unique().tolist():
        chosen = codes[where + 1, channel] == code
        axes.plot(channel[chosen], integers[where + 1][chosen], "o", label=f"from here {code}")
    axes.set(xlabel="channel", ylabel=f"sum, {sums.lo}..{sums.hi}", xticks=range(sums.shape[0]))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(plot)
    names = " -> ".join([graph.by_name[chain[0].inputs[0]].name, *(n.name for n in chain)])
    return figure(plot, f"{names}: the least sum at which a channel's code changes.")


def confusion_plot(counts: np.ndarray) -> Any:
    plot, axes = plt.subplots(figsize=(4.5, 4.5))
    axes.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", color="white" if count > counts.max() / 2 else "black")
    axes.set(xticks=range(len(counts)), yticks=range(len(counts)), xlabel="predicted", ylabel="true")
    plt.close(plot)
    return plot


if __name__ == "__main__":
    main()
