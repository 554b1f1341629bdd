"""Accuracy of one zoo network with given weights on a data set: as the model computes it, in integers, and in compiled C++.

Counts every integer code that differs between the model and its integers, and every output integer that differs between those and the C++.

    python recipes/evaluate.py fracbnn_cifar10 --checkpoint weights.npz --data cifar10_test.npz --option fixed_point=authors
    python recipes/evaluate.py fracbnn_cifar10 --checkpoint weights.h --data cifar10_test.zip --option fixed_point=12,6 --cpp-images 100
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import quantlib as ql
import zoo
from quantlib.training import accuracy, batched, read_images
from quantlib.training.data import as_real
from quantlib.training.flags import network_options
from quantlib.training.report import write_json


@dataclass(frozen=True)
class Config:
    """What is evaluated. images and cpp_images: 0 means all; a negative cpp_images skips the C++."""

    network: str
    checkpoint: str
    data: str
    split: str
    option: tuple[str, ...]
    images: int
    verify_images: int
    cpp_images: int
    batch: int
    part: str
    out: str


def options(argv: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="one of " + ", ".join(zoo.names()))
    parser.add_argument("--checkpoint", default="", help="weights: .pt .pth .npz .safetensors .h (none: untrained)")
    parser.add_argument("--data", default="digits", help="digits, an .npz of images and labels, a .zip or folder of class folders")
    parser.add_argument("--split", default="test", help="split of the digits, or folder of a .zip that has several")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the network; a FixedPoint is BITS,FRACTION"
    )
    parser.add_argument("--images", type=int, default=0, help="use the first so many images (0: all)")
    parser.add_argument("--verify-images", type=int, default=64, help="compare every code on so many images")
    parser.add_argument("--cpp-images", type=int, default=100, help="run so many through compiled C++ (0: all, -1: none)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--part", default="xczu3eg")
    parser.add_argument("--out", default="build/evaluate", help="folder for the HLS project and report.json")
    values = vars(parser.parse_args(argv))
    return Config(**values | {"option": tuple(values["option"])})


def real(codes: Tensor, network: str) -> Tensor:
    """uint8 images as the network's model reads them: pixel / 255, normalised where its card says so."""
    normalisation = zoo.card(network).normalisation
    if normalisation is None:
        return as_real(codes)
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in normalisation)
    return (as_real(codes) - mean) / std


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console = options(argv), Console()
    console.print(f"{config}\n", highlight=False)
    data = read_images(config.data, config.split)
    data = data[: config.images] if config.images else data
    model = zoo.get(config.network, **network_options(config.option)).eval()
    if config.checkpoint:
        zoo.load(model, config.checkpoint)

    rows: list[tuple[str, str]] = [("data", f"{data.name}, {len(data)} images")]
    start = time.perf_counter()
    y_model = batched(lambda codes: model(real(codes, config.network)), data.codes, config.batch)
    result: dict[str, Any] = {"config": asdict(config), "images": len(data), "accuracy": {"float": accuracy(y_model, data.labels)}}
    rows.append(("accuracy of the model", f"{100 * result['accuracy']['float']:.2f} %  ({time.perf_counter() - start:.1f} s)"))
    try:
        graph = ql.convert(model, tuple(data.codes.shape[1:]))
    except ql.ConversionError as error:
        result["not_converted"] = str(error)
        known = "; ".join(", ".join(f"{k}={v}" for k, v in each.items()) for each in zoo.card(config.network).converts)
        rows += [("integers", f"does not convert: {error}"), ("options that convert", known or "the defaults")]
    else:
        rows += integers(config, model, graph, data, result)
    write_json(Path(config.out) / "report.json", result)
    table = Table(title=config.network, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return result


def integers(config: Config, model: torch.nn.Module, graph: ql.Graph, data: Any, result: dict[str, Any]) -> list[tuple[str, str]]:
    start = time.perf_counter()
    y = torch.cat([ql.run(graph, codes) for codes in data.codes.split(config.batch)])
    result["accuracy"]["integer"] = accuracy(y, data.labels)
    rows = [("accuracy in integers", f"{100 * result['accuracy']['integer']:.2f} %  ({time.perf_counter() - start:.1f} s)")]
    if config.verify_images:
        check = ql.verify(model, graph, data.codes[: config.verify_images])
        result["verify"] = check.to_dict()
        rows.append(("integers differing from the model", f"{check.mismatches:,} of {check.codes:,}"))
    if config.cpp_images >= 0:
        part = data[: config.cpp_images] if config.cpp_images else data
        hls = ql.export(graph, Path(config.out) / "hls", part=config.part)
        start = time.perf_counter()
        y_cpp, ours, theirs = hls.csim(part.codes), ql.run(graph, part.codes, integers=True), hls.csim(part.codes, integers=True)
        result["accuracy"]["cpp"] = accuracy(y_cpp, part.labels)
        result["cpp_images"] = len(part)
        result["cpp_mismatches"] = sum(int((ours[edge] != theirs[edge]).sum()) for edge in ours)
        score = f"{100 * result['accuracy']['cpp']:.2f} %  ({len(part)} images, {time.perf_counter() - start:.1f} s with compilation)"
        rows += [("accuracy in C++", score), ("C++ differing from the integers", f"{result['cpp_mismatches']:,}")]
    return rows


if __name__ == "__main__":
    main()
