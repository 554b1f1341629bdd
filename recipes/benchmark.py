"""How fast each way of running a network is: images per second, conversion and compile seconds, peak memory.

Every network runs in a process of its own. Within it the ways take turns, round after round, and the medians are compared, so that their
ratios hold although the machine is shared. Weights are random: no way of running depends on their values.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from brevitas import nn as qnn
from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.training.data import as_real
from quantlib.training.report import write_json


@dataclass(frozen=True)
class Config:
    networks: str = "fracbnn_digits,fracbnn_cifar10,cnv"
    batch: int = 64
    rounds: int = 5
    cpp_images: int = 8
    threads: int = 2
    out: str = "build/benchmark"
    one: str = ""  # internal: the network this process measures


class CNV(nn.Module):
    """The shape of FINN's CNV (59.5 M MAC) in 2-bit Brevitas layers: six unpadded 3x3 convolutions, two pools, three dense layers."""

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat)]
        channels = 3
        for width, pool in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, False)):
            layers += [
                qnn.QuantConv2d(channels, width, 3, bias=False, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=bits),
                nn.BatchNorm2d(width),
                qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits),
            ]
            layers += [nn.MaxPool2d(2)] if pool else []
            channels = width
        layers.append(nn.Flatten())
        for features, width in ((256, 512), (512, 512)):
            layers += [
                qnn.QuantLinear(features, width, bias=False, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=bits),
                nn.BatchNorm1d(width),
                qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits),
            ]
        layers.append(qnn.QuantLinear(512, 10, bias=False, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=bits))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def networks() -> dict[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]]:
    """Name -> (model that converts, model whose evaluation is the yardstick, input shape)."""

    def cnv() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
        model = CNV()
        with torch.no_grad():
            for _ in range(20):  # Brevitas' activation scales settle on statistics
                model.train()(torch.rand(16, 3, 32, 32))
        return model, model, (3, 32, 32)

    def digits() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
        return zoo.get("fracbnn_digits"), zoo.get("fracbnn_digits", fixed_point=None), (1, 8, 8)

    def cifar() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
        grid = zoo.card("fracbnn_cifar10").converts[-1]
        return zoo.get("fracbnn_cifar10", **grid), zoo.get("fracbnn_cifar10"), (3, 32, 32)

    return {"fracbnn_digits": digits, "fracbnn_cifar10": cifar, "cnv": cnv}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def memory() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, config: Config) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model, yardstick, shape = networks()[name]()
    model.eval(), yardstick.eval()
    codes = torch.randint(0, 256, (config.batch, *shape), dtype=torch.uint8)
    x = as_real(codes)
    few = codes[: config.cpp_images]
    row: dict[str, Any] = {"network": name, "batch": config.batch, "memory_start": memory()}

    row["convert_seconds"], graph = timed(lambda: ql.convert(model, shape))
    row["memory_convert"] = memory()
    hls = ql.export(graph, Path(config.out) / name)
    row["compile_seconds"] = timed(lambda: hls.csim(few[:1]))[0]
    row["first_run_seconds"] = timed(lambda: ql.run(graph, codes))[0]

    with torch.no_grad():
        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            "model": (len(x), lambda: yardstick(x)),
            "model, quantized": (len(x), lambda: model(x)),
            "run": (len(x), lambda: ql.run(graph, codes)),
            "csim": (len(few), lambda: hls.csim(few)),
        }
        for _, function in ways.values():
            function()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(config.rounds):
            for way, (_, function) in ways.items():
                seconds[way].append(timed(function)[0])
    row["images_per_second"] = {way: ways[way][0] / statistics.median(values) for way, values in seconds.items()}
    row["spread"] = {way: max(values) / min(values) for way, values in seconds.items()}
    row["run_over_model"] = row["images_per_second"]["run"] / row["images_per_second"]["model"]
    row["memory_peak"] = memory()
    return row


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in asdict(Config()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=argparse.SUPPRESS if name == "one" else " "
        )
    config = Config(**vars(parser.parse_args(argv)))
    if config.one:
        print(json.dumps(measure(config.one, config)))
        return []

    console, rows = Console(), []
    console.print(f"{config}\n", highlight=False)
    known = networks()
    for name in config.networks.split(","):
        if name not in known:
            raise SystemExit(f"no network {name!r} to measure; there are {', '.join(known)}")
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in asdict(config).items() if k != "one"]
        done = subprocess.run([sys.executable, __file__, *arguments, f"--one={name}"], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        console.print(f"{name} measured")
    write_json(Path(config.out) / "report.json", {"config": asdict(config), "rows": rows})

    table = Table(title=f"batch {config.batch}, {config.threads} threads; csim {config.cpp_images} images, one thread")
    table.add_column("")
    for row in rows:
        table.add_column(row["network"], justify="right")
    for way in rows[0]["images_per_second"]:
        table.add_row(f"images/s, {way}", *(f"{row['images_per_second'][way]:,.1f}" for row in rows))
    for title, key, form in (
        ("run / model", "run_over_model", ".2f"),
        ("conversion, s", "convert_seconds", ".2f"),
        ("C++ compilation, s", "compile_seconds", ".2f"),
        ("first run, s", "first_run_seconds", ".2f"),
        ("memory before, MB", "memory_start", ",.0f"),
        ("memory peak, MB", "memory_peak", ",.0f"),
    ):
        table.add_row(title, *(format(row[key], form) for row in rows))
    console.print(table)
    return rows


if __name__ == "__main__":
    main()
