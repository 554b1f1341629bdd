"""Cost against size: seconds over width, depth, bits and batch of one plain network, and the exponent of each curve.

One thing varies at a time around `BASE`: 3x3 convolutions of equal width on 16x16 images. The sizes of one axis take turns, and medians are
taken. The exponent is the slope of log(seconds) over log(size) by least squares, with its standard error.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _network_speed import engine, images, ours, plain, timed  # type: ignore[import-not-found]
from torch import nn

import quantlib as ql

BASE = {"width": 32, "depth": 4, "bits": 4, "batch": 16}
AXES = {"width": (16, 32, 64, 128), "depth": (2, 4, 8, 16), "bits": (2, 3, 4, 6, 8), "batch": (2, 8, 32, 128)}
QUICK = {"width": (8, 16), "depth": (1, 2), "bits": (2, 4), "batch": (2, 4)}
SHAPE = (3, 16, 16)
OF_BATCH = ("run", "training step")  # what is timed over batches; conversion has none, and one simulation is like another


def exponent(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """(slope, its standard error) of log(seconds) over log(size); two sizes leave no error to estimate, which is then 0."""
    x, y = np.log(sizes), np.log(seconds)
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    free = len(x) - 2
    return slope, float(np.sqrt(rest @ rest / free / (x @ x))) if free > 0 else 0.0


def ways(size: dict[str, int], folder: Path, csim: bool) -> dict[str, Callable[[], Any]]:
    """What is timed for one size. Compilation of csim is done here, and counted by nobody."""
    torch.manual_seed(0)
    model = plain(ours(size["bits"]), (size["width"],) * size["depth"], SHAPE, padding=1)
    graph = ql.convert(model, SHAPE)
    codes, x = images(graph, size["batch"])
    labels = torch.arange(size["batch"]) % 10
    trained = copy.deepcopy(model).train()
    parameters = list(trained.parameters())

    def step() -> None:
        for p in parameters:
            p.grad = None
        nn.functional.cross_entropy(trained(x), labels).backward()

    def run() -> None:
        with engine("native"):
            ql.run(graph, codes)

    made: dict[str, Callable[[], Any]] = {"convert": lambda: ql.convert(model, SHAPE), "run": run, "training step": step}
    if csim:
        hls = ql.export(graph, folder / "_".join(f"{k}{v}" for k, v in size.items()))
        hls.csim(codes[:1])
        made["csim"] = lambda: hls.csim(codes)
    return made


def measure(folder: Path, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """One row per axis and way: sizes, seconds (median), exponent and its standard error."""
    torch.set_num_threads(1)
    rows = []
    for axis, sizes in (QUICK if quick else AXES).items():
        kinds = {n: ways({**BASE, axis: n}, folder, csim=axis != "batch") for n in sizes}
        taken: dict[str, dict[int, list[float]]] = {}
        for turn in range(rounds + 1):
            for n, functions in kinds.items():
                for way, function in functions.items():
                    seconds = timed(function)[0]
                    if turn and (axis != "batch" or way in OF_BATCH):  # the first turn warms up
                        taken.setdefault(way, {}).setdefault(n, []).append(seconds)
        for way, by_size in taken.items():
            medians = [statistics.median(v) for v in by_size.values()]
            slope, error = exponent([float(n) for n in by_size], medians)
            rows.append({"axis": axis, "way": way, "sizes": list(by_size), "seconds": medians, "exponent": slope, "error": error})
    return rows
