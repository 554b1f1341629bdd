"""What networks of the zoo cost before any hardware is chosen: parameters, operations, MicroNet score, cycles on a systolic array.

One network: its tables, layer by layer. Several (shell patterns are understood): a row each. Images are not needed, weights neither.

    python recipes/analyse.py proxylessnas_4b5b_imagenet --show micronet
    python recipes/analyse.py fracbnn_cifar10 --option fixed_point=12,6 --show count
    python recipes/analyse.py "proxylessnas*" "fracbnn*" --out build/analyse
    python recipes/analyse.py "mobilenet_v2*" --array fuse --baseline mobilenet_v2_imagenet --out build/latency
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import quantlib as ql
import zoo
from quantlib.analysis import speedup_table, systolic_latency
from quantlib.analysis.systolic import BUCKETS, Latency, plot, speedups
from quantlib.analysis.text import aligned
from quantlib.training.checkpoint import write_bytes
from quantlib.training.flags import network_options
from quantlib.training.report import write_json

SHOW = ("count", "micronet", "latency")
REFERENCES = {"imagenet": ql.analysis.IMAGENET, "cifar100": ql.analysis.CIFAR100}


@dataclass(frozen=True)
class Config:
    """What is computed. input_shape () means the card's; show names what is computed; baseline "" means no speed-ups."""

    networks: tuple[str, ...]
    option: tuple[str, ...]
    input_shape: tuple[int, ...]
    show: tuple[str, ...]
    fan_in: str
    reference: str
    threshold_bits: int
    rows: int
    cols: int
    array: str
    grouped: str
    baseline: str
    out: str


def configuration(argv: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="names or shell patterns, of " + ", ".join(zoo.names()))
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of every network; BITS,FRACTION is a grid"
    )
    parser.add_argument("--input-shape", default="", metavar="C,H,W", help="shape of one image (default: the card's)")
    parser.add_argument("--show", default=",".join(SHOW), help="what is computed (default: %(default)s)")
    parser.add_argument(
        "--fan-in", default="published", choices=("published", "true"), help="inputs in the accumulators of the MicroNet score"
    )
    parser.add_argument("--reference", default="imagenet", choices=REFERENCES, help="what the MicroNet score divides by")
    parser.add_argument(
        "--threshold-bits", type=int, default=ql.analysis.THRESHOLD_BITS, help="widest quantizer that is made of thresholds"
    )
    parser.add_argument("--rows", type=int, default=64, help="rows of the array: output pixels")
    parser.add_argument("--cols", type=int, default=64, help="columns of the array: output filters")
    parser.add_argument("--array", default="systolic", choices=("systolic", "fuse"), help="fuse: rows that broadcast 1-D convolutions")
    parser.add_argument(
        "--grouped", default="refuse", choices=("refuse", "published", "blocks"), help="how grouped convolutions are costed"
    )
    parser.add_argument("--baseline", default="", help="network whose cycles on the systolic array the others are compared with")
    parser.add_argument("--out", default="", help="folder for analysis.json and, with several networks, latency.png (default: none)")
    values = vars(parser.parse_args(argv))
    values["input_shape"] = tuple(int(n) for n in values["input_shape"].split(",") if n)
    values["show"] = tuple(values["show"].split(","))
    wrong = [name for name in values["show"] if name not in SHOW]
    if wrong:
        raise SystemExit(f"--show {','.join(wrong)}: there are {', '.join(SHOW)}")
    names = [name for pattern in values["networks"] for name in (zoo.names(pattern) or [pattern])]
    return Config(**values | {"networks": tuple(dict.fromkeys(names)), "option": tuple(values["option"])})


def analyse(name: str, config: Config) -> dict[str, Any]:
    """The results that config.show names, by their titles."""
    model, shape = zoo.get(name, **network_options(config.option)), config.input_shape or zoo.card(name).input_shape
    reference, limit, fan_in = REFERENCES[config.reference], config.threshold_bits, config.fan_in
    ways: dict[str, Callable[[], Any]] = {
        "count": lambda: ql.analysis.count(model, shape),
        "micronet": lambda: ql.analysis.micronet_cost(model, shape, fan_in=fan_in, reference=reference, threshold_bits=limit),  # type: ignore[arg-type]
        "latency": lambda: latency(name, config, config.array),
    }
    return {title: ways[title]() for title in config.show}


def latency(name: str, config: Config, array: Any) -> Latency:
    model = zoo.get(name, **network_options(config.option))
    grouped: Any = config.grouped
    return systolic_latency(model, config.input_shape or zoo.card(name).input_shape, config.rows, config.cols, array, grouped)


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Totals, as they go into analysis.json."""
    found: dict[str, Any] = {}
    for title, r in results.items():
        if title == "count":
            found |= {k: getattr(r, k) for k in ("parameters", "macs", "bit_operations", "weight_bits")}
        elif title == "micronet":
            found["micronet"] = {"score": r.printed, "exact": float(r.score), "memory_bits": r.memory_bits, "math_bits": r.math_bits}
        else:
            found["cycles"] = {"total": r.cycles} | {kind: r.of(kind) for kind in BUCKETS}
    return found


def row(totals: dict[str, Any]) -> dict[str, Any]:
    """The same, one cell each."""
    flat = {"micronet": lambda v: repr(v["score"]), "cycles": lambda v: v["total"]}
    return {k: flat.get(k, lambda v: v)(v) for k, v in totals.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = configuration(argv)
    results = {name: analyse(name, config) for name in config.networks}
    totals = {name: figures(found) for name, found in results.items()}
    result: dict[str, Any] = {"config": asdict(config), "networks": totals}
    if len(results) == 1:
        for title, table in results[config.networks[0]].items():
            print(f"{title} of {config.networks[0]}\n{table}\n")
    else:
        columns = list(row(totals[config.networks[0]]))
        print(
            aligned(("network", *(c.replace("_", " ") for c in columns)), [(name, *row(found).values()) for name, found in totals.items()])
        )
    latencies = {name: found["latency"] for name, found in results.items() if "latency" in found}
    if config.baseline and latencies:
        on_systolic = f"{config.baseline} (baseline)"
        latencies = {on_systolic: latency(config.baseline, config, "systolic")} | latencies
        result["speedups"] = speedups({name: latencies[name] for name in results}, latencies[on_systolic])
        print(f"\n{speedup_table(latencies, on_systolic)}")
    if config.out:
        write_json(Path(config.out) / "analysis.json", result)
        if len(latencies) > 1:
            image = BytesIO()
            plot(latencies).savefig(image, format="png")
            write_bytes(Path(config.out) / "latency.png", image.getvalue())
    return result


if __name__ == "__main__":
    main()
