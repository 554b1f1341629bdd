"""Tables of FuSeConv: the published results beside ours, speed-ups over sizes of the array, and the MicroNet score of quantized networks.

For MobileNetV1, V2, V3 and MnasNet-B1: accuracy as published; operations, parameters and speed-up on a 64x64 array published and computed
here; then the speed-up of every variant on square arrays. The baseline runs on a plain output-stationary array, FuSe networks on one
whose rows broadcast. Images are not needed, weights neither.

    python recipes/fuseconv_tables.py --out build/fuseconv
    python recipes/fuseconv_tables.py --families mobilenet_v2,resnet50 --arrays 8,32,256
    python recipes/fuseconv_tables.py --show micronet --bits 4/4,8/8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantlib as ql
import zoo
from quantlib.analysis import plot, systolic_latency
from quantlib.analysis.systolic import Latency
from quantlib.analysis.text import aligned
from quantlib.training.checkpoint import write_bytes
from quantlib.training.flags import parse
from quantlib.training.report import write_json
from zoo._fuse_blocks import SqueezeExcite
from zoo.fuseconv import KINDS, TITLES

SHAPE = (3, 224, 224)
PUBLISHED_ARRAY = 64
SHOW = ("published", "arrays", "micronet")
PROXYLESSNAS = "proxylessnas_4b5b_imagenet"  # the network that the published MicroNet tool was written for


@dataclass(frozen=True)
class Config:
    families: tuple[str, ...] = tuple(TITLES)
    show: tuple[str, ...] = ("published", "arrays")
    arrays: tuple[int, ...] = (16, 32, 64, 128)
    bits: tuple[str, ...] = ("4/4", "8/8")
    out: str = ""


HELP = {
    "families": "of " + ", ".join(TITLES),
    "show": "tables, of " + ", ".join(SHOW),
    "arrays": "rows and columns of square arrays",
    "bits": "weights/activations of the networks that have a MicroNet score",
    "out": "folder for tables.json and latency.png",
}
NOTE = """Accuracies are published ones. Published parameters are truncated to two decimals. Published operations are no plain MACs:
the rule is MACs + 2 for each element of a batch norm, of a ReLU, h-swish or h-sigmoid (not ReLU6) and of the maps that are averaged.
Published speed-ups are rounded or truncated, and not all of them come out of the published code, whose cycles ours are."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = parse(Config(), __doc__ or "", HELP, argv)
    for flag, given, known in (("families", config.families, tuple(TITLES)), ("show", config.show, SHOW)):
        wrong = [word for word in given if word not in known]
        if wrong or not given:
            raise SystemExit(f"--{flag} {','.join(wrong)}: give {', '.join(known)}")
    result: dict[str, Any] = {"config": asdict(config)}
    if {"published", "arrays"} & set(config.show):
        result["networks"] = networks = {name: figures(name, config) for family in config.families for name in names(family)}
        latencies = {name: found.pop("latency") for name, found in networks.items()}
        for family in config.families:
            mine = {name: networks[name] for name in names(family)}
            if "published" in config.show:
                print(f"{TITLES[family]}, {PUBLISHED_ARRAY}x{PUBLISHED_ARRAY}\n{published_table(mine)}\n")
            if "arrays" in config.show:
                print(f"{TITLES[family]}, speed-up over the baseline by rows and columns of the array\n{array_table(mine, config)}\n")
        if "published" in config.show:
            print(NOTE)
        if config.out:
            image = BytesIO()
            plot(latencies).savefig(image, format="png")
            write_bytes(Path(config.out) / "latency.png", image.getvalue())
    if "micronet" in config.show:
        result["micronet"] = scores = micronet(config)
        print(micronet_table(scores, config))
    if config.out:
        write_json(Path(config.out) / "tables.json", result)
    return result


def names(family: str) -> list[str]:
    """Registered names: the baseline, half, full, and the two hybrids."""
    return [f"{family}{suffix}_imagenet" for suffix, _, _ in KINDS]


def title(name: str) -> str:
    return zoo.card(name).title


def figures(name: str, config: Config) -> dict[str, Any]:
    """Of one network; `latency` is the table of the published array, cycles the totals by size of the array."""
    model, card = zoo.get(name), zoo.card(name)
    sides = dict.fromkeys((*config.arrays, PUBLISHED_ARRAY))
    found = {n: systolic_latency(model, SHAPE, n, n, array="fuse") for n in sides}  # a baseline takes the same cycles on either kind
    latency: Latency = found[PUBLISHED_ARRAY]
    published = {claim.what: claim.value for claim in card.claims}
    return {
        "title": card.title,
        "published": published or None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": ql.analysis.count(model, SHAPE).macs,
        "rule": published_operations(model) if published else None,
        "cycles": {n: found[n].cycles for n in sides},
        "kinds": {kind: getattr(latency, kind) for kind in ("pointwise", "depthwise", "other")},
        "latency": latency,
    }


def published_operations(model: nn.Module) -> int:
    """Operations by a rule found by trial, no published text has one: it gives 20 of the 25 published figures, the others 1 million off."""
    macs, more = ql.analysis.count(model, SHAPE).macs, 0

    def outputs(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal more
        more += 2 * output.numel()

    def gated(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal more
        more += 2 * (output.numel() + output.shape[1])  # the averaged map and the h-sigmoid

    hooks = [m.register_forward_hook(outputs) for m in model.modules() if type(m) in (nn.BatchNorm2d, nn.ReLU, nn.Hardswish)]
    hooks += [m.register_forward_hook(gated) for m in model.modules() if isinstance(m, SqueezeExcite)]
    head, blocks = model.get_submodule("head") if model.head is not None else None, model.get_submodule("blocks")
    hooks.append((head or list(blocks.children())[-1]).register_forward_hook(outputs))  # the map in front of the global average
    with torch.no_grad():
        model.eval()(torch.zeros(1, *SHAPE))
    for hook in hooks:
        hook.remove()
    return int(macs + more)


def speedup(networks: Mapping[str, dict[str, Any]], name: str, side: int) -> float:
    baseline = next(iter(networks))
    return float(networks[baseline]["cycles"][side] / networks[name]["cycles"][side])


def published_table(networks: Mapping[str, dict[str, Any]]) -> str:
    """Published values (pub.) beside ours; the baseline is the first of the networks."""
    header = ("network", "top-1 % pub.", "operations M pub.", "by rule", "MAC M", "parameters M pub.", "parameters", "speed-up pub.",
              "speed-up", "difference", "cycles")  # fmt: skip
    rows = []
    for name, found in networks.items():
        ratio = speedup(networks, name, PUBLISHED_ARRAY)
        top1, operations, parameters, factor = (found["published"] or dict.fromkeys(range(4))).values()
        rows.append(
            (
                found["title"],
                "-" if top1 is None else f"{top1:.2f}",
                operations,
                None if found["rule"] is None else int(found["rule"] / 1e6),
                f"{found['macs'] / 1e6:.2f}",
                "-" if parameters is None else f"{parameters:.2f}",
                found["parameters"],
                factor,
                f"{ratio:.3f}",
                "-" if factor is None else f"{100 * (ratio / factor - 1):+.1f} %",
                found["cycles"][PUBLISHED_ARRAY],
            )
        )
    return aligned(header, rows)


def array_table(networks: Mapping[str, dict[str, Any]], config: Config) -> str:
    rows = [(found["title"], *(f"{speedup(networks, name, n):.2f}" for n in config.arrays)) for name, found in networks.items()]
    return aligned(("network", *(f"{n}x{n}" for n in config.arrays)), rows)


def micronet(config: Config) -> dict[str, dict[str, float]]:
    """The score of every network for each pair of bits, and that of the ProxylessNAS entry under its own name."""
    scores: dict[str, dict[str, float]] = {}
    for name in (name for family in config.families for name in names(family)):
        scores[name] = {}
        for pair in config.bits:
            weights, acts = (int(word) for word in pair.split("/"))
            model = zoo.get(name, weight_bits=weights, act_bits=acts)
            scores[name][pair] = ql.analysis.micronet_cost(model, SHAPE).printed
    scores[PROXYLESSNAS] = {"4/4 and 5": ql.analysis.micronet_cost(zoo.get(PROXYLESSNAS), SHAPE).printed}
    return scores


def micronet_table(scores: Mapping[str, Mapping[str, float]], config: Config) -> str:
    rows = [(title(name), *(f"{found[pair]:.4f}" for pair in config.bits)) for name, found in scores.items() if name != PROXYLESSNAS]
    entry = f"{title(PROXYLESSNAS)}: {next(iter(scores[PROXYLESSNAS].values()))!r}"
    return f"{aligned(('MicroNet score, weights/activations in bits', *config.bits), rows)}\n{entry}"


if __name__ == "__main__":
    main()
