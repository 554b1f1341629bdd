"""Frame rate against resources, over parts and bit widths: which folded designs of a network no other beats.

Every combination of the options' values is converted once, with random weights. On every part it is folded as fast as fits, then for ever
lower frame rates; of those designs the ones stay that no other of the same options on the same part beats or equals in frame rate and in
every resource. Several values of an option stand between commas, or between semicolons where a value holds commas.

    python recipes/explore.py ultranet_dacsdc --option weight_bits=2,4,8 act_bits=4 --parts PYNQ-Z2,Ultra96-V2,ZCU104
    python recipes/explore.py fracbnn_cifar10 --option "fixed_point=authors;12,6;14,6" --clock 250 --jobs 2
    python recipes/explore.py mobilenet_v2_imagenet --option weight_bits=4,8 act_bits=4 width=0.5,1.0 --parts ZCU104 --points 5

--out then holds points/ (one file for each combination and part: what is there is not computed again), pareto.csv, pareto.png, report.json
and report.html.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

import quantlib as ql
import zoo
from quantlib import parts
from quantlib.capture import CaptureError
from quantlib.parts import RESOURCES
from quantlib.schedule import Plan
from quantlib.training.checkpoint import write_bytes
from quantlib.training.flags import network_options
from quantlib.training.report import figure_file, page, table, text, write, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

Point = dict[str, Any]
COLUMNS = ("part", "options", "frames_per_second", "cycles", *RESOURCES, "share", "scarcest", "bottleneck", "accuracy")
SCORES = re.compile(r"top-1|IoU|accuracy")


@dataclass(frozen=True)
class Config:
    """What is searched. option: NAME=VALUES each; clock 0: the parts' own; points: frame rates, each `step` times lower than the last."""

    network: str
    option: tuple[str, ...]
    input_shape: tuple[int, ...]
    parts: tuple[str, ...]
    clock: float
    points: int
    step: float
    jobs: int
    fresh: bool
    out: str


def configuration(argv: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="one of the zoo: " + ", ".join(zoo.names()))
    parser.add_argument("--option", nargs="+", action="extend", default=[], metavar="NAME=VALUES", help="options and the values to try")
    parser.add_argument("--input-shape", default="", metavar="C,H,W", help="shape of one image (default: the card's)")
    parser.add_argument("--parts", default="PYNQ-Z2,Ultra96-V2,ZCU104", help="parts or boards (default: %(default)s)")
    parser.add_argument("--clock", type=float, default=0.0, metavar="MHZ", help="clock of all parts (default: each part's)")
    parser.add_argument("--points", type=int, default=8, help="frame rates tried on each part (default: %(default)s)")
    parser.add_argument("--step", type=float, default=1.6, help="each is that many times lower than the one before (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="compute again what is in --out")
    parser.add_argument("--out", default="build/explore", help="folder of table, plot and report (default: %(default)s)")
    values = vars(parser.parse_args(argv))
    if values["points"] < 1 or values["jobs"] < 1 or values["step"] <= 1 or values["clock"] < 0:
        parser.error("--points and --jobs are at least 1, --step is above 1, --clock is positive")
    try:
        zoo.card(values["network"])
        names = tuple(dict.fromkeys(parts.part(name).name for name in values["parts"].split(",") if name))
    except (LookupError, zoo.ZooError) as error:
        parser.error(str(error))
    values["input_shape"] = tuple(int(n) for n in values["input_shape"].split(",") if n)
    return Config(**values | {"option": tuple(values["option"]), "parts": names})


def combinations(texts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """("a=1,2", "b=3") -> [("a=1", "b=3"), ("a=2", "b=3")]."""
    lists = []
    for item in texts:
        name, equals, values = item.partition("=")
        if not equals:
            raise SystemExit(f"--option {item}: write NAME=VALUE or NAME=VALUE,VALUE")
        several = values.split(";") if ";" in values else [values] if name == "fixed_point" else values.split(",")
        lists.append([f"{name}={value}" for value in several])
    return list(product(*lists))


def explored(config: Config, chosen: tuple[str, ...], todo: tuple[str, ...]) -> dict[str, list[Point]]:
    """Part -> the designs tried, fastest first; one that does not fit says what is missing."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = zoo.get(config.network, **network_options(chosen)).eval()
    graph = ql.convert(model, config.input_shape or zoo.card(config.network).input_shape)
    return {name: list(designs(graph, name, config)) for name in todo}


def designs(graph: ql.Graph, part: str, config: Config) -> Iterator[Point]:
    clock = config.clock or None
    fastest = ql.estimate(graph, part, clock_mhz=clock)
    yield point(fastest)
    cycles = {fastest.cycles}
    for k in range(1, config.points if fastest.fits else 1):
        plan = ql.estimate(graph, part, fastest.fps / config.step**k, clock_mhz=clock)
        if plan.cycles not in cycles:
            cycles.add(plan.cycles)
            yield point(plan)


def point(plan: Plan) -> Point:
    budget = plan.part.budget()
    shares = {r: getattr(plan.total, r) / budget[r] for r in RESOURCES if budget[r]}
    scarcest = max(shares, key=lambda r: shares[r])
    return {
        "frames_per_second": plan.fps,
        "cycles": plan.cycles,
        **{r: getattr(plan.total, r) for r in RESOURCES},
        "share": shares[scarcest],
        "scarcest": scarcest,
        "bottleneck": plan.bottleneck,
        "missing": dict(plan.missing),
        "smallest_part": plan.smallest,
    }


def undominated(points: list[Point]) -> list[Point]:
    """Those that no other beats or equals in frame rate and every resource; of equal ones the first."""

    def better(a: Point, b: Point) -> bool:
        return bool(a["frames_per_second"] >= b["frames_per_second"] and all(a[r] <= b[r] for r in RESOURCES))

    return [
        p for i, p in enumerate(points) if not any(better(q, p) and (j < i or not better(p, q)) for j, q in enumerate(points) if j != i)
    ]


def measured(network: str, chosen: tuple[str, ...]) -> str:
    """The accuracy on the network's card that names these options, as weight and activation bits 4/8 or name=value, and this width."""
    values = dict(item.split("=", 1) for item in chosen)
    signs = {
        f"{values.get('weight_bits')}/{values.get('act_bits')}",
        *(f"{k}={v}" for k, v in values.items()),
        *(f"{k}='{v}'" for k, v in values.items()),
    }
    for claim in zoo.card(network).measured:
        width = re.search(r"width ([\d.]+)", claim.what)
        same = float(width[1] if width else 1) == float(values.get("width", 1))
        if claim.unit == "%" and SCORES.search(claim.what) and same and (signs & set(re.split(r"[ ,]+", claim.what))):
            return f"{claim.value:g} % ({claim.what})"
    return ""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config, console = configuration(argv), Console()
    console.print(f"{config}\n", highlight=False)
    start, out = time.perf_counter(), Path(config.out)
    tried = collected(config, out, console)
    rows, lacking = [], []
    for (chosen, name), points in tried.items():
        about = {"part": name, "options": " ".join(chosen) or "defaults", "accuracy": measured(config.network, chosen)}
        rows += [about | p for p in undominated([p for p in points if not p["missing"]])]
        lacking += [about | p for p in points if p["missing"]]
    result = {"config": asdict(config), "seconds": time.perf_counter() - start, "pareto": rows, "does_not_fit": lacking}
    report(config, rows, lacking, result, out)
    for block in shown(config, rows):
        console.print(block)
    for p in lacking:
        console.print(f"{p['options']} does not fit {p['part']}: {missing(p)}", highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}   {result['seconds']:.0f} s", highlight=False, soft_wrap=True)
    return result


def collected(config: Config, out: Path, console: Console) -> dict[tuple[tuple[str, ...], str], list[Point]]:
    """(options, part) -> designs; read where an earlier run of the same settings left them, else computed and left."""
    files = {
        (chosen, name): out / "points" / f"{key(config, chosen, name)}.json"
        for chosen, name in product(combinations(config.option), config.parts)
    }
    have = {} if config.fresh else {k: json.loads(path.read_text())["points"] for k, path in files.items() if path.is_file()}
    todo: dict[tuple[str, ...], list[str]] = {}
    for chosen, name in files:
        if (chosen, name) not in have:
            todo.setdefault(chosen, []).append(name)

    def keep(chosen: tuple[str, ...], found: dict[str, list[Point]]) -> None:
        for name, points in found.items():
            have[chosen, name] = points
            write_json(files[chosen, name], {"network": config.network, "options": chosen, "part": name, "points": points})
        console.print(f"{' '.join(chosen) or 'defaults'}: {sum(map(len, found.values()))} designs on {', '.join(found)}", highlight=False)

    try:
        if config.jobs == 1 or len(todo) < 2:
            for chosen, names in todo.items():
                keep(chosen, explored(config, chosen, tuple(names)))
        else:
            with ProcessPoolExecutor(config.jobs, get_context("spawn")) as pool:
                started = {pool.submit(explored, config, chosen, tuple(names)): chosen for chosen, names in todo.items()}
                for done in as_completed(started):
                    keep(started[done], done.result())
    except (zoo.ZooError, CaptureError, ql.ConversionError) as error:
        raise SystemExit(f"{config.network}: {error}") from None
    return {k: have[k] for k in files}


def key(config: Config, chosen: tuple[str, ...], part: str) -> str:
    settings = (config.network, chosen, part, config.input_shape, config.clock, config.points, config.step, ql.__version__)
    words = "_".join([part, *(re.sub(r"\W+", "-", item) for item in chosen)])[:80]
    return f"{words}_{hashlib.sha256(repr(settings).encode()).hexdigest()[:10]}"


def missing(p: Point) -> str:
    lacking = ", ".join(f"{value:,.0f} {resource}" for resource, value in p["missing"].items())
    return f"missing {lacking}; smallest listed part that would do: {p['smallest_part'] or 'none'}"


HEAD = ("frames/s", "cycles", "LUT", "FF", "DSP", "BRAM18", "URAM", "of budget")


def cells(p: Point) -> list[str]:
    return [f"{p['frames_per_second']:,.1f}", *(f"{p[k]:,}" for k in ("cycles", *RESOURCES)), f"{100 * p['share']:.0f} % {p['scarcest']}"]


def shown(config: Config, rows: list[Point]) -> Iterator[Table]:
    """A table for each part and combination of options."""
    blocks: dict[tuple[str, str, str], list[Point]] = {}
    for p in rows:
        blocks.setdefault((p["part"], p["options"], p["accuracy"]), []).append(p)
    for (name, chosen, accuracy), points in blocks.items():
        block = Table(title=f"{config.network}, {chosen}, on {parts.part(name)}", caption=accuracy or None, min_width=76)
        for column in HEAD:
            block.add_column(column, justify="right", no_wrap=True)
        for p in points:
            block.add_row(*cells(p))
        yield block


def pareto_plot(config: Config, rows: list[Point]) -> Any:
    """One row for each part, one column for each resource in use: share of what may be used against frames per second."""
    names = [name for name in config.parts if any(p["part"] == name for p in rows)]
    used = [r for r in RESOURCES if any(p[r] for p in rows)]
    kinds = list(dict.fromkeys(p["options"] for p in rows))
    plot, axes = plt.subplots(
        len(names), len(used), figsize=(2.6 * len(used) + 1, 2.4 * len(names) + 0.6), squeeze=False, sharey=True, layout="constrained"
    )
    for (i, name), (j, resource) in product(enumerate(names), enumerate(used)):
        budget, ax = parts.part(name).budget()[resource], axes[i][j]
        for n, kind in enumerate(kinds):
            line = sorted((p[resource], p["frames_per_second"]) for p in rows if p["part"] == name and p["options"] == kind)
            if line and budget:
                ax.plot(
                    [100 * x / budget for x, _ in line], [y for _, y in line], "o-", color=f"C{n}", markersize=3, linewidth=1, alpha=0.8
                )
        ax.set(yscale="log", xlim=(0, 105))
        ax.grid(True, which="both", alpha=0.25)
        ax.axvline(100, color="0.5", linestyle=":")
        if not budget:
            ax.text(50, 0.5, "none on this part", transform=ax.get_xaxis_transform(), ha="center", fontsize=8, color="0.5")
        if i == len(names) - 1:
            ax.set_xlabel(f"{resource.upper()}, % of what may be used", fontsize=8)
        if j == 0:
            ax.set_ylabel(f"{name}\nframes/s", fontsize=8)
        ax.tick_params(labelsize=7)
    handles = [plt.Line2D([], [], color=f"C{n}", marker="o", markersize=3, label=kind) for n, kind in enumerate(kinds)]
    plot.legend(handles=handles, loc="outside upper center", ncols=min(3, len(kinds)), fontsize=8, title=config.network)
    plt.close(plot)
    return plot


def report(config: Config, rows: list[Point], lacking: list[Point], result: dict[str, Any], out: Path) -> None:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write(out / "pareto.csv", lines.getvalue())
    sections = []
    if rows:
        image = io.BytesIO()
        pareto_plot(config, rows).savefig(image, format="png", dpi=130, bbox_inches="tight")
        write_bytes(out / "pareto.png", image.getvalue())
        caption = "Every point is a folded design; along a line, resources buy frames. Dotted: all of the part that may be used."
        sections = [("Frame rate against resources", figure_file(out / "pareto.png", caption))]
    sections.append(
        (
            "Designs that no other beats",
            table(("part", "options", *HEAD, "slowest"), [(p["part"], p["options"], *cells(p), p["bottleneck"]) for p in rows]),
        )
    )
    if lacking:
        sections.append(("What does not fit", text("\n".join(f"{p['options']} on {p['part']}: {missing(p)}" for p in lacking))))
    named = dict.fromkeys(f"{p['options']}: {p['accuracy']}" for p in rows if p["accuracy"])
    if named:
        sections.append(("Accuracy, from the network's card", text("\n".join(named))))
    sections.append(("Configuration", table(("option", "value"), asdict(config).items())))
    write_json(out / "report.json", result)
    write(out / "report.html", page(f"{config.network}: frame rate against resources", sections))


if __name__ == "__main__":
    main()
